"""The trainer's own collectives: a peer that is gone is a sentence, and facts that differ are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from moe_layer.errors import DispatchTimeout, RankMismatch
from moe_layer.train.checkpoint import Layout
from moe_layer.train.world import World

TWO = World(rank=0, layout=Layout(world=2, ep=2), device=torch.device("cpu"), mesh=None)
CALLS: dict[str, Callable[[], object]] = {
    "all_reduce": lambda: TWO.total(torch.zeros(1)),
    "barrier": TWO.barrier,
    "broadcast": lambda: TWO.broadcast(torch.zeros(1)),
    "all_gather_object": lambda: TWO.require_same({}),
}


@pytest.mark.parametrize("collective", CALLS)
def test_a_lost_peer_is_one_sentence(monkeypatch: pytest.MonkeyPatch, collective: str) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[gloo/pair.cc:553]\n  Connection closed by peer")

    monkeypatch.setattr(dist, collective, broken)
    with pytest.raises(DispatchTimeout, match=r"rank 0 lost another rank .*553\] Connection closed .*--resume auto$"):
        CALLS[collective]()


def test_differing_facts_are_named_with_every_rank_s_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(every: list[dict[str, object]], mine: dict[str, object]) -> None:
        every[:] = [mine, {**mine, "seed": 4}]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(RankMismatch, match=r"^ranks disagree about seed: 1 on rank 0, 4 on rank 1; start every rank"):
        TWO.require_same({"seed": 1, "name": "x"})
    TWO.require_same({"seed": 4, "name": "x"})
