"""ops/_ext.py: the status texts, without a GPU and without a library that would load."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moe_layer.errors import ConfigError
from moe_layer.ops import _ext, kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """`status()` answers once a process; each test asks anew, and the true answer is back afterwards."""
    monkeypatch.setattr(_ext, "status", _ext.status.__wrapped__)
    monkeypatch.delenv("MOE_LAYER_CUDA", raising=False)
    return monkeypatch


def fake_library(folder: Path, sources: str, archs: str = "90a") -> Path:
    text = f"torch_headers=2.13.0;cuda=13000;archs={archs};version=0.1.0;sources={sources}"
    path = folder / "_C.abi3.so"
    path.write_bytes(b"\x7fELF" + b"\0" * 60 + text.encode() + b"\0rest")
    return path


def test_cpu_build(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(torch.version, "cuda", None)
    status = _ext.status()
    assert status.state == "missing" and not status.loaded
    assert status.reason == f"torch {torch.__version__} is not a CUDA build"
    assert "using the PyTorch reference. Rebuild with: MOE_LAYER_CUDA=1 pip install" in status.sentence()


def test_switched_off(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("MOE_LAYER_CUDA", "0")
    assert _ext.status().reason == "MOE_LAYER_CUDA=0 is set"


def test_not_built(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(torch.version, "cuda", "13.0")
    fresh.setattr(_ext, "PACKAGE", tmp_path)
    status = _ext.status()
    assert status.state == "missing"
    assert status.reason == f"{tmp_path / '_C.abi3.so'} does not exist, the extension was not built"


def test_stale_library_is_refused(tmp_path: Path) -> None:
    status = _ext.load_library(fake_library(tmp_path, "0123456789ab"), csrc=ROOT / "csrc")
    assert status.state == "failed"
    assert "was built from csrc 0123456789ab but csrc is now " in status.reason


def test_damaged_library(tmp_path: Path) -> None:
    sources = _ext.source_hash(ROOT / "csrc")
    assert sources is not None
    status = _ext.load_library(fake_library(tmp_path, sources), csrc=ROOT / "csrc")
    assert status.state == "failed" and "cannot be loaded" in status.reason
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    status = _ext.load_library(tmp_path / "_C.abi3.so", csrc=ROOT / "csrc")
    assert "it has no build information; it was not built by csrc/build.py" in status.reason


def test_builder_and_loader_hash_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    monkeypatch.delitem(sys.modules, "build", raising=False)
    build = __import__("build")
    monkeypatch.delitem(sys.modules, "build")
    assert build.source_hash() == _ext.source_hash(ROOT / "csrc")
    assert _ext.source_hash(ROOT / "no such folder") is None


@pytest.mark.parametrize(
    ("archs", "capability", "fits"),
    [
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a", (8, 0), False),
        ("80_90a", (8, 6), True),
        ("80_90a", (7, 5), False),
        ("86", (8, 0), False),
        ("80_90a_100_120", (12, 1), True),
        ("100a", (10, 3), False),
    ],
)
def test_architectures(archs: str, capability: tuple[int, int], fits: bool) -> None:
    problem = _ext.arch_problem({"archs": archs}, capability)
    assert (problem is None) == fits
    if problem is not None:
        assert f"this GPU is sm_{capability[0]}{capability[1]}; rebuild with MOE_LAYER_CUDA_ARCHS=" in problem


def test_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "status", lambda: _ext.ExtensionStatus("missing", "for this test"))
    _ext.warn_if_missing.cache_clear()
    with pytest.warns(RuntimeWarning, match="moe_layer: CUDA extension not loaded: for this test; using the PyTorch"):
        _ext.warn_if_missing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ext.warn_if_missing()
    _ext.warn_if_missing.cache_clear()


class OnCuda:
    """Answers as a CUDA tensor does to whoever only asks where it is."""

    is_cuda = True


@functools.cache
def _loaded() -> _ext.ExtensionStatus:
    return _ext.ExtensionStatus("loaded", "for this test", {"archs": "90a"})


def test_every_door_to_the_ops_loads_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only a layer: a dispatcher alone, and the adapters that call ops on somebody else's tensors."""
    from moe_layer.compat import megatron, transformer_engine, transformers
    from moe_layer.config.model import DispatchConfig
    from moe_layer.dispatch import make_dispatcher

    asked: list[str] = []
    monkeypatch.setattr(_ext, "status", lambda: asked.append("asked") or _ext.ExtensionStatus("missing", "test"))

    def asks(call: Callable[[], object]) -> bool:
        asked.clear()
        with contextlib.suppress(AttributeError, ImportError, ConfigError):  # stand-ins break after the question
            call()
        return bool(asked)

    assert asks(lambda: make_dispatcher(DispatchConfig(), num_experts=4, top_k=2, context=None))
    assert asks(transformers.enable)
    assert asks(lambda: megatron.MegatronExperts(1, None))
    for door in (
        lambda: transformer_engine.fused_topk_with_score_function(OnCuda(), 1, True, None, None, None, "softmax", None),
        lambda: transformer_engine.fused_compute_score_for_moe_aux_loss(OnCuda(), 1, "softmax"),
        lambda: kernels.note_first_cuda_use("auto", OnCuda()),
    ):
        _ext.warn_if_missing.cache_clear()
        with pytest.warns(RuntimeWarning, match="CUDA extension not loaded: test"):
            assert asks(door)
    _ext.warn_if_missing.cache_clear()


@pytest.mark.parametrize("first", ["reference", "auto", None])
def test_an_op_called_without_any_layer_loads_the_library(monkeypatch: pytest.MonkeyPatch, first: str | None) -> None:
    """Unless a layer of `kernels: reference` was built: loading would break that layer."""
    asked: list[str] = []
    monkeypatch.setattr(_ext, "warn_if_missing", lambda: asked.append("asked"))
    monkeypatch.setattr(kernels, "_reference_layers", False)
    if first is not None:
        kernels.require_kernels(first)
    kernels.load_kernels(torch.zeros(1))
    assert not asked
    kernels.load_kernels(OnCuda())
    assert asked == ([] if first == "reference" else ["asked"])


def test_every_op_with_a_kernel_asks_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that a user would call by themselves, each before its op runs."""
    from moe_layer.ops import (
        batch_losses,
        copy_ids,
        dispatch_plan,
        gate_topk,
        gather_rows,
        histogram,
        route_topk,
        sort_slots,
        tree_reduce,
    )

    ids, rows, counts = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 8), torch.tensor([3, 0], dtype=torch.int32)
    sums = torch.ones(1, 2)
    calls: dict[ModuleType, Callable[[], object]] = {
        batch_losses: lambda: batch_losses.batch_losses(counts, counts[None], sums, top_k=1),
        copy_ids: lambda: copy_ids.copy_ids(ids, torch.empty_like(ids), num_experts=2),
        dispatch_plan: lambda: dispatch_plan.dispatch_plan(ids, num_experts=2, num_ranks=1),
        gate_topk: lambda: gate_topk.gate_topk(rows, torch.ones(2, 8), top_k=1),
        gather_rows: lambda: gather_rows.gather_rows(rows, ids[:, 0]),
        histogram: lambda: histogram.expert_histogram(ids, num_experts=2),
        route_topk: lambda: route_topk.route_topk(rows, top_k=1),
        sort_slots: lambda: sort_slots.sort_slots(ids, first_expert=0, num_local=2, alignment=1, num_rows=3),
        tree_reduce: lambda: tree_reduce.tree_reduce(rows, ids, ids_MK=ids, num_experts=2, blocks=1),
    }
    for module, call in calls.items():
        asked: list[Tensor] = []
        monkeypatch.setattr(module, "load_kernels", asked.append)
        call()
        assert asked, module.__name__


def test_reference_is_never_silently_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of `kernels: reference`, then somebody loads the library: its next CUDA call says so."""
    _loaded.cache_clear()
    monkeypatch.setattr(_ext, "status", _loaded)
    kernels.note_first_cuda_use("reference", OnCuda())
    kernels.require_kernels("auto")
    with pytest.raises(ConfigError, match="kernels: reference, but this process already loaded the CUDA library"):
        kernels.note_first_cuda_use("reference", OnCuda())
    kernels.note_first_cuda_use("reference", torch.zeros(1))
