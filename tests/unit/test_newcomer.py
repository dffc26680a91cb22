"""What people get wrong in their first hour: every mistake is one clear sentence, none is accepted silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_layer import MoELayer, RoutingSession, load_config, parallelize
from moe_layer.cli import main
from moe_layer.config import MoEConfig
from moe_layer.errors import ConfigError, RoutingError, TraceError

TINY = ["hidden_size=16", "router.num_experts=4", "router.top_k=2", "experts.intermediate_size=8"]


def config(*more: str) -> MoEConfig:
    return load_config("olmoe-1b-7b", [*TINY, *more], kind=MoEConfig)


def boundaries(*values: Any, **options: Any) -> dict[str, Any]:
    return {"cu_seqlens": torch.tensor(values, **options)}


@pytest.mark.parametrize(
    ("x", "arguments", "text"),
    [
        ([[0.0] * 16], {}, "x must be a torch.Tensor, got list"),
        (torch.zeros(3, 16).numpy(), {}, "x must be a torch.Tensor, got ndarray"),
        (torch.zeros(1, 16), {"valid": [True]}, "valid must be a torch.Tensor, got list"),
        (torch.zeros(1, 16), {"cu_seqlens": [0, 1]}, r"cu_seqlens must be an int32 tensor \[S\+1\], got list"),
        (torch.zeros(9, 16), boundaries(0.0, 9.0), "got torch.float32"),
        (torch.zeros(9, 16), boundaries(0, 7, 3, 9), r"rise from 0 to at most 9 .*got \[0, 7, 3, 9\]"),
        (torch.zeros(9, 16), boundaries(0, 50), "at most 9"),
        (torch.zeros(9, 16), boundaries(-1, 9), "rise from 0"),
        (torch.zeros(9, 16), {"replay": "trace.safetensors"}, "got str; of a Routing, pass RoutingDecision"),
    ],
)
@pytest.mark.parametrize("aux", ["none", "sequence"])
def test_forward(x: Any, arguments: dict[str, Any], text: str, aux: str) -> None:
    layer = MoELayer(config(f"losses.aux={aux}", f"losses.aux_coeff={0.01 if aux != 'none' else 0}"))
    if isinstance(x, torch.Tensor) and x.ndim == 2 and "cu_seqlens" not in arguments:
        x = x[None]
        arguments = {name: value if name != "valid" else [value] for name, value in arguments.items()}
    with pytest.raises(RoutingError, match=text):
        layer(x, **arguments)


def test_padding_after_the_last_sequence_is_allowed() -> None:
    layer = MoELayer(config("losses.aux=sequence", "losses.aux_coeff=0.01"))
    assert layer(torch.randn(9, 16), cu_seqlens=torch.tensor([0, 4, 7])).isfinite().all()


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: MoELayer(config(), device="meta")(torch.zeros(1, 16)), RoutingError, 'device "meta"; call to_empty'),
        (
            lambda: MoELayer(config(), dtype=torch.int32),
            ConfigError,
            r"dtype must be torch\.bfloat16, .* got torch\.int32",
        ),
        (
            lambda: MoELayer(config(), dtype="bfloat16"),
            ConfigError,
            r"dtype must be torch\.bfloat16, .* got 'bfloat16'",
        ),
        (lambda: MoELayer(config(), dtype=torch.float8_e4m3fn), ConfigError, r"float64, got torch\.float8_e4m3fn"),
        (
            lambda: MoELayer(config()).set_loss_scale(None),
            ValueError,
            "scale must be a number or a tensor, got NoneType",
        ),
        (
            lambda: load_config({"hidden_size": 8}),
            ConfigError,
            "or a preset's name, got dict; give values as overrides of one",
        ),
        (lambda: MoELayer(config()).set_loss_scale(float("nan")), ValueError, "scale must be finite, got nan"),
        (lambda: MoELayer(config()).set_loss_scale(torch.ones(3)), ValueError, r"one number, got .* \(3,\)"),
        (lambda: MoELayer(config()).warmup(-1), ValueError, "num_tokens must be at least 0, got -1"),
        (lambda: parallelize(MoELayer(config()), None), ConfigError, 'dimensions named "dp" and "ep"'),  # type: ignore[arg-type]
        (lambda: load_config("olmoe-1b-7b", [3]), ConfigError, "such as 'router.top_k=4', got 3"),  # type: ignore[list-item]
    ],
)
def test_calls(call: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_sessions() -> None:
    layer, x = MoELayer(config()), torch.randn(3, 16)
    session = RoutingSession(layer)
    with pytest.raises(TraceError, match="no layer ran inside record"), session.record():
        pass
    with session.record() as recording:
        layer(x)
    session.close()
    for block in (session.record(), session.replay(recording.trace())):
        with pytest.raises(RoutingError, match="this session was closed"), block:
            layer(x)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train"], "the following arguments are required: config\n"),
        (["config", "show"], "the following arguments are required: config\n"),
        (["plot", "no-such-run"], "no-such-run has no metrics.jsonl; give the folder of a run"),
        (["train", "configs/train/tiny.yaml", "--out", "/proc/none/x"], "moe-layer: /proc/none"),
    ],
)
def test_command_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert text in err and "Errno" not in err and "Traceback" not in err
