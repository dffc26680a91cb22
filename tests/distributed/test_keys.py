"""Keys whose effect shows only between ranks; tests/unit/test_every_key.py names these tests as proofs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_layer.config import DispatchConfig, ExpertsConfig, LossesConfig, MoEConfig, RouterConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import DispatchTimeout
from moe_layer.parallel.context import ParallelContext
from moe_layer.router import Router
from moe_layer.types import Received, Routing
from tests.distributed.cases import config_for
from tests.distributed.pool import Pool
from tests.distributed.ranks import ThreadRanks

BASE = DispatchConfig(rows="compact")


def _dispatch(config: DispatchConfig, context: ParallelContext) -> tuple[Received, torch.Tensor]:
    """Six tokens a rank, every one of them on expert 0, which rank 0 owns; y of experts that change nothing."""
    ids_TK = torch.tensor([[0, -1]], dtype=torch.int32).repeat(6, 1)
    routing = Routing.from_ids(ids_TK, torch.ones(6, 2), num_experts=4)
    dispatcher = make_dispatcher(config, num_experts=4, top_k=2, context=context)
    received = dispatcher.dispatch(torch.ones(6, 8), routing)
    assert received.index_N is not None
    return received, dispatcher.combine(received.rows[received.index_N.long()], received)


def test_backend(ranks: ThreadRanks) -> None:
    """all_to_all and nvlink send rank 1 nothing, all_gather every token of both, replicated takes the six at hand."""
    rows = {}
    for backend in ("auto", "all_to_all", "nvlink", "all_gather", "replicated"):
        config = config_for(backend, rows="compact")
        found = ranks.run(2, lambda context, config=config: _dispatch(config, context)[0].rows.shape[0])
        rows[backend] = tuple(found)
    sparse = dict.fromkeys(("auto", "all_to_all", "nvlink"), (12, 0))
    assert rows == sparse | {"all_gather": (12, 12), "replicated": (6, 6)}


def test_reduce(ranks: ThreadRanks) -> None:
    """Rank 1 owns none of the experts: its partial sum is zero, the group's is the tokens themselves."""
    sums = {}
    for reduce in (True, False):
        config = replace(BASE, backend="replicated", reduce=reduce)
        sums[reduce] = ranks.run(2, lambda context, config=config: _dispatch(config, context)[1].sum().item())
    assert sums == {True: [48.0, 48.0], False: [48.0, 0.0]}


@pytest.mark.parametrize("deadline_s", [0.3, 0.9])
def test_deadline_s(ranks: ThreadRanks, deadline_s: float) -> None:
    """Rank 1 never dispatches; rank 0 waits as long as it was told to and says so."""
    config = replace(BASE, backend="all_to_all", deadline_s=deadline_s)

    def one(context: ParallelContext) -> None:
        if context.ep_rank == 0:
            _dispatch(config, context)
        else:
            make_dispatcher(config, num_experts=4, top_k=2, context=context)

    error, idle = ranks.run(2, one, fresh=True)
    assert idle is None
    assert isinstance(error, DispatchTimeout)
    assert f"deadline {deadline_s:g} s" in str(error)


def balance_loss_of_rank(aux_group: str) -> float:
    """In a worker: the unscaled loss of this rank's own tokens, f_e over all ranks or over this one."""
    config = MoEConfig(
        hidden_size=8,
        router=RouterConfig(num_experts=4, top_k=2),
        experts=ExpertsConfig(intermediate_size=8, init_std=1.0),
        losses=LossesConfig(aux="batch", aux_coeff=0.1, aux_group=aux_group),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    router = Router(config)
    router.context = ParallelContext(None, ep_rank=0, ep_size=1, data_group=dist.group.WORLD)
    x_TD = torch.randn(16, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    return router(x_TD).losses_unscaled["aux"].item()


def test_aux_group(pool: Pool) -> None:
    over_all, alone = pool.run(balance_loss_of_rank, "data"), pool.run(balance_loss_of_rank, "local")
    assert all(abs(a - b) > 1e-4 for a, b in zip(over_all, alone, strict=True))
