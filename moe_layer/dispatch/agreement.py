"""Once, when a layer is bound: every rank's static facts in one fixed-size all-gather, so that no later message is
misread."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from typing import Any

import torch

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.wire import Link
from moe_layer.errors import RankMismatch
from moe_layer.parallel import compat

_RECORD = 2048  # bytes of JSON per rank


def static_facts(
    config: DispatchConfig, *, num_experts: int, top_k: int, layer_index: int, ranks: int
) -> dict[str, Any]:
    """What all ranks of an EP group must agree about."""
    facts = {"num_experts": num_experts, "top_k": top_k, "layer": layer_index, "ranks": ranks}
    return facts | {f"dispatch.{name}": value for name, value in asdict(config).items()}


def facts_hash(facts: dict[str, Any]) -> int:
    """Travels in every header."""
    return zlib.crc32(json.dumps(facts, sort_keys=True).encode())


def agree(link: Link, facts: dict[str, Any]) -> None:
    """Compare the facts of all ranks.

    Raises:
        RankMismatch: names every differing fact with each rank's value.
        DispatchTimeout: a rank did not take part.
    """
    text = json.dumps(facts, sort_keys=True).encode()
    assert len(text) <= _RECORD, "a fixed-size record cannot hold the facts"
    mine = torch.frombuffer(bytearray(text.ljust(_RECORD)), dtype=torch.uint8).to(link.context.device)
    every = mine.new_empty(link.size * _RECORD)
    at = link.at("bind")
    link.wait(link.start(lambda: compat.all_gather(link.group, every, mine), at), at, read=True)
    records = [json.loads(bytes(record.tolist())) for record in every.view(link.size, _RECORD).cpu()]
    differing = [name for name in facts if any(record.get(name) != facts[name] for record in records)]
    if differing:
        link.context.failure = f"{at}: ranks disagree"
        lines = "; ".join(
            f"{name}: " + ", ".join(f"{record.get(name)!r} on rank {rank}" for rank, record in enumerate(records))
            for name in differing
        )
        raise RankMismatch(
            f"ranks of the EP group disagree about {lines}; start every rank with the same configuration"
        )
