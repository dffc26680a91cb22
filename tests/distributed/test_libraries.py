"""The adapters of deep_ep and nccl_ep against `all_to_all`, over call-signature doubles (see library_doubles.py)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import ConfigError, RoutingError
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Received, Routing
from tests.distributed import library_doubles as doubles
from tests.distributed.cases import Case, even_cuts, joined, make_case, run_case
from tests.distributed.ranks import ThreadRanks

LIBRARIES = ("deep_ep", "nccl_ep")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", doubles.deep_ep())
    for name, module in doubles.nccl_ep().items():
        monkeypatch.setitem(sys.modules, name, module)


def case_for(library: str, seed: int, tokens: int = 26) -> Case:
    """bf16; without -1 ids where the library has none."""
    absent = 0.1 if library == "deep_ep" else 0.0
    return make_case(seed, T=tokens, D=16, E=8, K=3, absent=absent, dtype=torch.bfloat16)


def config_for(library: str, **options: Any) -> DispatchConfig:
    return DispatchConfig(backend=library, max_tokens_per_rank=32, deadline_s=20, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("apply_probs", ["activation", "combine"])
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
def test_gradients_of_all_to_all(
    installed: None, ranks: ThreadRanks, library: str, size: int, apply_probs: str, rows: str
) -> None:
    """y, dx, dprobs and expert dW within the rounding of bf16 sums (the ranks' order of addition differs)."""
    case = case_for(library, size)
    options: dict[str, Any] = {"apply_probs": apply_probs, "rows": rows}
    want = joined(ranks.run(size, lambda c: run_case(case, DispatchConfig(backend="all_to_all", **options), c)))
    got = joined(ranks.run(size, lambda c: run_case(case, config_for(library, **options), c)))
    for name in ("y", "dx", "dw", "d_experts"):
        a, b = getattr(got, name).float(), getattr(want, name).float()
        assert a.shape == b.shape and float(b.norm()) > 0
        assert float((a - b).norm() / b.norm()) < 5e-3, name


def received(case: Case, config: DispatchConfig, context: ParallelContext) -> Received:
    cuts = even_cuts(case.x_TD.shape[0], context.ep_size)
    mine = slice(cuts[context.ep_rank], cuts[context.ep_rank + 1])
    dispatcher = make_dispatcher(config, num_experts=case.num_experts, top_k=case.top_k, context=context)
    routing = Routing(ids_TK=case.ids_TK[mine], weights_TK=case.w_TK[mine], counts_E=torch.zeros(8, dtype=torch.int32))
    return dispatcher.dispatch(case.x_TD[mine], routing)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("rows", "alignment"), [("expert_major", 8), ("compact", 1)])
def test_rows_are_those_of_all_to_all(
    installed: None, ranks: ThreadRanks, library: str, rows: str, alignment: int
) -> None:
    """However the library shuffles them: rows, probabilities, offsets, counts by source, sources, maps."""
    case = case_for(library, 1)
    options: dict[str, Any] = {"rows": rows, "alignment": alignment}
    want = ranks.run(4, lambda c: received(case, DispatchConfig(backend="all_to_all", **options), c))
    got = ranks.run(4, lambda c: received(case, config_for(library, **options), c))
    for a, b in zip(got, want, strict=True):
        for name in ("rows", "probs_N", "offsets_L1", "counts_L", "counts_LR", "src_N3", "row_CK", "ids_CK"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("library", LIBRARIES)
def test_uneven_tokens(installed: None, ranks: ThreadRanks, library: str) -> None:
    """Ranks with other numbers of tokens every step, none among them."""
    for step, cuts in enumerate(([0, 0, 3, 9, 20], [0, 12, 12, 12, 20], [0, 1, 2, 3, 20])):
        case = case_for(library, step, tokens=20)
        want = joined(
            ranks.run(4, lambda c, k=case, s=cuts: run_case(k, DispatchConfig(backend="all_to_all"), c, cuts=s))
        )
        got = joined(ranks.run(4, lambda c, k=case, s=cuts: run_case(k, config_for(library), c, cuts=s)))
        for name in ("y", "dx", "dw", "d_experts"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_buffer_for_all_layers_until_close(installed: None, ranks: ThreadRanks, library: str) -> None:
    case, kind = case_for(library, 0), doubles.ElasticBuffer if library == "deep_ep" else doubles.EpGroup

    def work(context: ParallelContext) -> int:
        for layer in range(3):
            run_case(case, config_for(library), context, layer_index=layer)
        held = list(context.libraries.values())
        if library == "nccl_ep":
            assert held[0].group.handles == 0, "a handle outlived its graph"
        context.close()
        return len(held)

    before = len(kind.opened)
    assert ranks.run(2, work, fresh=True) == [1, 1]
    assert len(kind.opened) == before, "close() left a buffer open"


@pytest.mark.parametrize("library", LIBRARIES)
def test_without_the_library(ranks: ThreadRanks, library: str) -> None:
    def work(context: ParallelContext) -> str:
        with pytest.raises(ConfigError) as caught:
            make_dispatcher(config_for(library), num_experts=8, top_k=3, context=context)
        return str(caught.value)

    for text in ranks.run(2, work):
        assert text.startswith(f"dispatch.backend {library} needs a library that cannot be imported")
        assert "use all_to_all or nvlink" in text


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("key", "value"),
    [("apply_probs", "source"), ("dispatch_format", "fp8_1x128"), ("combine_format", "fp32"), ("capacity", "static")],
)
def test_what_libraries_cannot_do(library: str, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} \({value}\) cannot be had with backend {library}"):
        config_for(library, **{key: value})


def test_sizes_and_dtypes(installed: None, ranks: ThreadRanks) -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_rank is required by backend deep_ep"):
        DispatchConfig(backend="deep_ep")
    wide = make_case(0, T=8, D=16, E=8, K=3)
    for error in ranks.run(2, lambda c: run_case(wide, config_for("deep_ep"), c), fresh=True):
        assert isinstance(error, RoutingError) and "moves bfloat16 rows, x is torch.float32" in str(error)
    gaps = make_case(0, T=20, D=16, E=8, K=3, absent=0.5, dtype=torch.bfloat16)
    for error in ranks.run(2, lambda c: run_case(gaps, config_for("nccl_ep"), c), fresh=True):
        assert isinstance(error, RoutingError) and "some ids are -1" in str(error)
