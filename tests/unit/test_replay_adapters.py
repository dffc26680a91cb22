"""Adapters against golden files: every source gives the same trace; records that lie about themselves are refused."""

from __future__ import annotations

import base64
import copy
import json
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moe_layer import RoutingTrace, TraceError
from moe_layer.replay.adapters import (
    LayerAxis,
    from_megatron,
    from_megatron_inference,
    from_nemo_rl,
    from_prime_rl,
    from_sglang,
    from_vllm,
    record_transformers,
    to_megatron,
)
from tests.unit import replay_wire as wire

LAYERS = ("model.layers.1.mlp", "model.layers.3.mlp")
AXIS = LayerAxis.of(LAYERS, num_decoder_layers=4)
SMALL: dict[str, Any] = {"num_experts": 8, "axis": AXIS, "num_tokens": wire.TOKENS}
LARGE: dict[str, Any] = SMALL | {"num_experts": 300}


def golden(name: str) -> Any:
    return json.loads((wire.FOLDER / f"{name}.json").read_text())


def _request(name: str) -> tuple[Any, Any]:
    data = golden(name)
    return SimpleNamespace(routed_experts=data["routed_experts"]), SimpleNamespace(**data)


def expected(experts: int) -> torch.Tensor:
    rows = torch.tensor(wire.moe_rows(wire.RUN, experts), dtype=torch.int32)
    return torch.cat((rows, torch.full((1, 2, 2), -1, dtype=torch.int32)))


SOURCES: dict[str, tuple[Callable[[], RoutingTrace], int]] = {
    "sglang_int32": (lambda: from_sglang(golden("sglang_int32"), top_k=2, **SMALL), 8),
    "sglang_uint8": (lambda: from_sglang(golden("sglang_uint8"), top_k=2, **SMALL), 8),
    "sglang_uint16": (lambda: from_sglang(golden("sglang_uint16"), top_k=2, **LARGE), 300),
    "sglang_openai": (lambda: from_sglang(golden("sglang_openai"), top_k=2, **SMALL), 8),
    "sglang_tensor": (lambda: from_sglang(golden("sglang_tensor"), top_k=2, **SMALL), 8),
    "vllm_0_14": (lambda: from_vllm(*_request("vllm_0_14"), **SMALL), 8),
    "vllm_0_21": (lambda: from_vllm(*_request("vllm_0_21"), **SMALL), 8),
    "vllm_0_22": (lambda: from_vllm(golden("vllm_0_22")["routed_experts"], **SMALL), 8),
    "megatron_inference": (
        lambda: from_megatron_inference(golden("megatron_inference")["moe_topk_indices"], **SMALL),
        8,
    ),
    "prime_rl_uint8": (lambda: from_prime_rl(golden("prime_rl_uint8"), **SMALL), 8),
    "prime_rl_uint16": (lambda: from_prime_rl(golden("prime_rl_uint16"), **LARGE), 300),
    "prime_rl_padded": (lambda: from_prime_rl(golden("prime_rl_padded"), recorded_rows=5, **SMALL), 8),
    "nemo_rl_int8": (lambda: from_nemo_rl(golden("nemo_rl_int8"), **SMALL), 8),
    "nemo_rl_int16": (lambda: from_nemo_rl(golden("nemo_rl_int16"), **LARGE), 300),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_trace(source: str) -> None:
    make, experts = SOURCES[source]
    trace = make()
    assert trace.spec.layers == LAYERS and trace.lengths == [wire.TOKENS]
    assert torch.equal(trace.wide_ids(), expected(experts))


@pytest.mark.parametrize("decoder", [False, True])
def test_recorded_weights_follow_their_ids(decoder: bool) -> None:
    """Of an axis with the dense layers on it too, and with the row of the last token added."""
    rows = (wire.decoder_rows if decoder else wire.moe_rows)(wire.RUN, 8)
    ids = np.asarray(rows, dtype=np.uint8)
    record = {"data": base64.b64encode(ids.tobytes()).decode(), "shape": list(ids.shape), "dtype": "uint8"}
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
    for given in (weights, weights.numpy(), weights.double()):
        trace = from_prime_rl(record, weights=given, **SMALL)
        assert torch.equal(trace.wide_ids(), expected(8)) and trace.weights is not None
        assert torch.equal(trace.weights[:-1], weights[:, [1, 3]] if decoder else weights)
    with pytest.raises(TraceError, match=r"prime-rl weights have shape \(5, 1, 2\) and its ids"):
        from_prime_rl(record, weights=weights[:, :1], **SMALL)


@pytest.mark.parametrize("dtype", [np.int32, np.int16, np.uint16, np.uint8, torch.int16, torch.uint8])
@pytest.mark.parametrize("name", ["vllm_0_14", "vllm_0_21", "vllm_0_22"])
def test_vllm_arrays_of_every_generation_and_dtype(name: str, dtype: Any) -> None:
    """int32, then int16, then whatever is narrow; NumPy arrays or tensors."""

    def typed(rows: Any) -> Any:
        return torch.tensor(rows, dtype=dtype) if isinstance(dtype, torch.dtype) else np.array(rows, dtype=dtype)

    parts = {field: typed(rows) for field, rows in golden(name).items()}
    trace = from_vllm(SimpleNamespace(**parts), SimpleNamespace(**parts), **SMALL)
    assert torch.equal(trace.wide_ids(), expected(8))


def test_vllm_prefix_that_was_left_out_is_spliced() -> None:
    tokens = torch.arange(6)
    first = from_vllm(golden("vllm_0_22")["routed_experts"], **SMALL, token_ids=tokens).rows(0, 3)
    tail = from_vllm(golden("vllm_tail")["routed_experts"], **SMALL, start=3, token_ids=tokens[3:])
    assert tail.first_position == 3 and torch.equal(first.splice(tail).wide_ids(), expected(8))
    with pytest.raises(TraceError, match="returned 2 rows for 6 tokens"):
        from_vllm(golden("vllm_tail")["routed_experts"], **SMALL)


def test_golden_files_are_what_the_writer_writes() -> None:
    written = {path.stem: json.loads(path.read_text()) for path in wire.FOLDER.glob("*.json")}
    assert written == wire.fixtures()


def test_megatron_lists_both_ways() -> None:
    recorded = [torch.tensor(layer) for layer in golden("megatron_recorded")]
    trace = from_megatron(recorded, num_experts=8, layers=LAYERS)
    assert torch.equal(trace.wide_ids(), expected(8)[:-1])
    again = to_megatron(trace.plan(layers=LAYERS))
    assert all(a.dtype == torch.int64 and torch.equal(a, b) for a, b in zip(again, recorded, strict=True))
    with pytest.raises(TraceError, match="has no missing slots"):
        to_megatron(trace.plan(torch.tensor([0, -1])))


def test_sglang_turns_are_spliced() -> None:
    tokens = torch.arange(6)
    first = from_sglang(golden("sglang_int32"), top_k=2, num_experts=8, axis=AXIS, num_tokens=6, token_ids=tokens).rows(
        0, 3
    )
    later = from_sglang(
        golden("sglang_start"), top_k=2, num_experts=8, axis=AXIS, num_tokens=5, start=3, token_ids=tokens[3:5]
    )
    whole = first.splice(later)
    assert torch.equal(whole.wide_ids(), expected(8)[:5])
    whole.plan(tokens=tokens[:5])


def _changed(name: str, **changes: Any) -> Any:
    return copy.deepcopy(golden(name)) | changes


def _meta(**changes: Any) -> Any:
    return from_sglang(_changed("sglang_int32", **changes), top_k=2, **SMALL)


def _vllm(name: str, **changes: Any) -> Any:
    return from_vllm(*_request(name), **(SMALL | changes))


LIES: dict[str, tuple[Callable[[], Any], str]] = {
    "sglang without the field": (lambda: from_sglang({}, top_k=2, **SMALL), "no routed_experts; start the server"),
    "sglang truncated": (
        lambda: _meta(routed_experts=golden("sglang_int32")["routed_experts"][:-8]),
        "does not decode",
    ),
    "sglang no base64": (lambda: _meta(routed_experts="!!!!"), "does not decode"),
    "sglang ignored start": (
        lambda: from_sglang(golden("sglang_int32"), top_k=2, start=3, **SMALL),
        "returned 5 rows for 3 tokens",
    ),
    "sglang dtype": (lambda: _meta(routed_experts_dtype="float32"), "routed_experts_dtype float32"),
    "vllm without the field": (lambda: from_vllm(SimpleNamespace(routed_experts=None), **SMALL), "got NoneType"),
    "vllm too many rows": (lambda: _vllm("vllm_0_14", num_tokens=4), "returned 5 rows for 4 tokens, must be 4 or 3"),
    "vllm other layers": (lambda: _vllm("vllm_0_14", axis=LayerAxis(("a", "b", "c"))), "has 4 layers, expected 3"),
    "vllm floats": (lambda: from_vllm(torch.zeros(5, 2, 2), **SMALL), "must be integers"),
    "vllm fractions in lists": (lambda: from_vllm([[[0, 1.5], [2, 3]]], **SMALL), "must be integers, got float64"),
    "vllm truth values": (lambda: from_vllm(torch.ones(5, 2, 2, dtype=torch.bool), **SMALL), "got torch.bool"),
    "vllm rows of unequal lengths": (lambda: from_vllm([[[0, 1], [2]]], **SMALL), "lists of unequal lengths"),
    "vllm gaps in lists": (lambda: from_vllm([[[0, None], [2, 3]]], **SMALL), "must be integers, got object"),
    "vllm negative start": (lambda: _vllm("vllm_0_14", start=-1), "start must be an integer from 0, got -1"),
    "vllm stages not gathered": (
        lambda: from_vllm(
            torch.tensor(wire.decoder_rows(wire.RUN, 8)) * torch.tensor([1, 1, 1, 0]).view(4, 1), **SMALL
        ),
        "'model.layers.3.mlp' is zero in every row",
    ),
    "megatron registered twice": (
        lambda: from_megatron([torch.zeros(2, 2)] * 4, num_experts=8, layers=LAYERS),
        "recorded 4 routers and 2 layers",
    ),
    "megatron layer did not run": (
        lambda: from_megatron([torch.zeros(2, 2), None], num_experts=8, layers=LAYERS),  # type: ignore[list-item]
        "nothing for",
    ),
    "prime-rl shape": (lambda: from_prime_rl(_changed("prime_rl_uint8", shape=[9, 2, 2]), **SMALL), "does not decode"),
    "prime-rl dtype": (lambda: from_prime_rl(_changed("prime_rl_uint8", dtype="int64"), **SMALL), "uint8 or uint16"),
    "prime-rl start": (
        lambda: from_prime_rl(_changed("prime_rl_uint8", start="2"), **SMALL),
        "must be an integer from 0",
    ),
    "prime-rl keys": (lambda: from_prime_rl({"data": ""}, **SMALL), "lacks"),
    "prime-rl padding as experts": (lambda: from_prime_rl(golden("prime_rl_padded"), **SMALL), "name an expert twice"),
    "nemo codec": (lambda: from_nemo_rl("nrlre2:int8:1x1x1:AA==", **SMALL), "not a NeMo-RL record"),
    "nemo no text": (lambda: from_nemo_rl(None, **SMALL), "not a NeMo-RL record: 'None'"),  # type: ignore[arg-type]
    "nemo dtype": (lambda: from_nemo_rl(golden("nemo_rl_int16"), **SMALL), "uses int8 for 8 experts"),
    "nemo partial row": (
        lambda: from_nemo_rl(f"nrlre1:int8:1x2x2:{wire.pack([[[1, -1], [2, 3]]], 'b')}", **(SMALL | {"num_tokens": 1})),
        "recorded in part",
    ),
    "axis of equal numbers": (lambda: LayerAxis.of(["a.1", "b.1"], num_decoder_layers=4), "must differ"),
    "sglang nothing recorded": (lambda: from_sglang(None, top_k=2, **SMALL), "must be a mapping, got NoneType"),  # type: ignore[arg-type]
    "prime-rl nothing recorded": (lambda: from_prime_rl(None, **SMALL), "must be a mapping, got NoneType"),  # type: ignore[arg-type]
    "prime-rl rows below 0": (
        lambda: from_prime_rl(golden("prime_rl_padded"), recorded_rows=-1, **SMALL),
        "recorded_rows is -1",
    ),
    "layers for an axis": (lambda: _vllm("vllm_0_14", axis=LAYERS), r"LayerAxis, got tuple; use LayerAxis\.of"),
    "layers for an axis, sglang": (
        lambda: from_sglang(golden("sglang_int32"), top_k=2, **(SMALL | {"axis": LAYERS})),
        "LayerAxis, got tuple",
    ),
    "axis of other indices": (lambda: LayerAxis(LAYERS, decoder=(4, (1, 4))), "its index below 4"),
    "axis of fewer indices": (lambda: LayerAxis(LAYERS, decoder=(4, (1,))), "each of the 2 layers"),
    "axis of a string": (lambda: LayerAxis.of("model.layers.1.mlp"), "must be a list of module paths"),
    "axis without layers": (lambda: LayerAxis.of([], num_decoder_layers=4), "layers is empty"),
    "axis without numbers": (lambda: LayerAxis.of(["a", "b"], num_decoder_layers=4), "exactly one number"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_are_refused(case: str) -> None:
    act, text = LIES[case]
    with pytest.raises(TraceError, match=text):
        act()


def _mutated(value: Any, dice: random.Random) -> Any:
    """The same with one leaf, key or entry changed, lost or doubled."""
    if isinstance(value, (dict, list)) and value:
        copied: Any = copy.copy(value)
        at = dice.choice(list(copied) if isinstance(copied, dict) else range(len(copied)))
        fate = dice.random()
        if fate < 0.15:
            del copied[at]
        elif fate < 0.25 and isinstance(copied, list):
            copied.append(copied[at])
        else:
            copied[at] = _mutated(copied[at], dice)
        return copied
    if isinstance(value, str):
        at = dice.randrange(max(1, len(value)))
        return dice.choice(
            [value[:at] + dice.choice("Az=!9\u00e9:x-") + value[at + 1 :], value[:at], value + "A", None, 5]
        )
    return dice.choice([0, -1, -2, 10**6, 2**63, None, "x", 1.5, True, [1]])


@pytest.mark.parametrize(
    "source", ["sglang_int32", "sglang_openai", "sglang_tensor", "vllm_0_21", "prime_rl_uint8", "nemo_rl_int8"]
)
def test_mutated_records_are_valid_or_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to a record on its way: a trace that validates, or a TraceError; never another exception."""
    dice, original = random.Random(source), golden(source)
    refused = 0
    for _ in range(150):
        changed = _mutated(original, dice)
        if source.startswith("vllm") and "routed_experts" not in changed:
            continue
        monkeypatch.setitem(globals(), "golden", lambda name, changed=changed: changed)
        try:
            SOURCES[source][0]().validate()
        except TraceError:
            refused += 1
    assert refused > 50


# ---- transformers ---------------------------------------------------------------------------------------------------


class Qwen3MoeTopKRouter(torch.nn.Module):
    """Stands in for transformers' class of that name: it returns what the golden file says, call after call."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = 8, 2
        self.calls = iter(golden("transformers"))
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ids = torch.tensor(next(self.calls)[self.layer]["indices"])
        return torch.zeros(ids.shape[0], 8), torch.full(ids.shape, 0.5), ids


def _stand_in() -> torch.nn.Module:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"gate": Qwen3MoeTopKRouter(i)}) for i in range(2))
    return model


def test_transformers_golden_layout() -> None:
    model: Any = _stand_in()
    with record_transformers(model, weights=True) as recording:
        for tokens in (4, 1):
            for layer in model.layers:
                layer["gate"](torch.zeros(tokens, 3))
    trace = recording.trace()
    assert trace.spec.layers == ("layers.0", "layers.1") and torch.equal(trace.wide_ids(), expected(8)[:-1])
    assert trace.weights is not None and bool((trace.weights == 0.5).all())


def test_transformers_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = _stand_in()
    for wrong in (torch.zeros(4, 8), (torch.zeros(4, 8), torch.zeros(4, 2)), (None, None, torch.zeros(4, 2))):
        monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", lambda self, x, wrong=wrong: wrong)
        with pytest.raises(TraceError, match=r"did not return \(logits, weights, indices"), record_transformers(model):
            model.layers[0]["gate"](torch.zeros(4, 3))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_transformers_generation_records_every_token_but_the_last(family: str) -> None:
    """Prefill and cached decoding, left padding, and the same routing as one pass over the whole sequences."""
    pytest.importorskip("transformers", reason="this is the adapter for transformers")
    from moe_layer.replay.index_map import generation_index, inverse_index
    from tests.unit.hf_blocks import hf_model

    model = hf_model(family).eval()
    prompts, mask = torch.randint(1, 64, (2, 4)), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with record_transformers(model, weights=True) as recording:
        out = model.generate(
            prompts, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
        )
    assert out.shape == (2, 9)
    index = generation_index(mask, steps=4)
    real = index >= 0
    flat = torch.where(real, index, -1)[real]
    rows = 2 * 4 + 4 * 2
    trace = recording.trace(inverse_index(flat, rows=rows), cu_seqlens=[0, 6, 14], token_ids=out[:, :-1][real])
    assert trace.lengths == [6, 8], "S - 1 rows"
    for number, start in enumerate((2, 0)):
        with record_transformers(model) as whole:
            model(out[number : number + 1, start:-1])
        assert torch.equal(whole.trace().ids, trace.sequence(number).ids)


def test_transformers_records_once_under_checkpointing() -> None:
    pytest.importorskip("transformers", reason="this is the adapter for transformers")
    from tests.unit.hf_blocks import hf_model

    model = hf_model("qwen3_moe").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 64, (1, 5))
    with record_transformers(model, exclude=["*.layers.0.*"]) as recording:
        model(ids, labels=ids).loss.backward()
    trace = recording.trace()
    assert trace.num_tokens == 5 and trace.spec.layers == ("model.layers.1.mlp",)
    with pytest.raises(TraceError, match="has 0 TopKRouters"), record_transformers(torch.nn.Linear(1, 1)):
        pass
