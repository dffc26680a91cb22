"""The names and shapes other programs give one MoE block, as mappings onto ours.

Ours (docs/design.md, section 1): gate rows first, then up rows; weights `[E, out, in]`. Families and formats:

| family | in memory (transformers v5) | stored (per expert) |
|---|---|---|
| mixtral | `gate`, `experts.gate_up_proj` | `experts.{i}.w1` gate, `w3` up, `w2` down |
| qwen3_moe, olmoe | same | `experts.{i}.{gate,up,down}_proj` |
| qwen3_next | same, `shared_expert`, `shared_expert_gate` | as qwen3_moe |
| deepseek_v3 | same, `gate.e_score_correction_bias`, `shared_experts` | as qwen3_moe |
| gpt_oss | `router`, transposed weights, gate and up columns alternate, biases | as in memory |

Megatron-core: `sequential` is SequentialMLP (`experts.local_experts.{i}.linear_fc1.weight`), `grouped` is TEGroupedMLP
(`experts.linear_fc1.weight{i}`). Source: transformers 5.23.0 and megatron-core 0.16.1 modules and saved files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from moe_layer.checkpoint.mapping import BlockMapping, Piece, Region, Shape
from moe_layer.config.model import MoEConfig
from moe_layer.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """Names of one transformers model family.

    Attributes:
        router: name of the router module. shared: name of the shared expert, if the family has one.
        stored_experts: per-expert names of (gate, up, down) on disk, or None when disk equals memory.
        memory_prefix, stored_prefix: of a block in a whole model, with `{layer}`.
    """

    router: str = "gate"
    shared: str | None = None
    stored_experts: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    memory_prefix: str = "model.layers.{layer}.mlp."
    stored_prefix: str = "model.layers.{layer}.mlp."
    transposed: bool = False
    interleaved: bool = False


def family_names() -> tuple[str, ...]:
    """The model families whose checkpoints are understood (`model_type` in config.json)."""
    return tuple(_families())


def family_named(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        CheckpointError: not one of `family_names()`.
    """
    families = _families()
    if model_type not in families:
        raise CheckpointError(f"model_type {model_type!r} is not known here; known are {', '.join(families)}")
    return families[model_type]


def _families() -> dict[str, Family]:
    deepseek = Family(shared="shared_experts")
    return {
        "mixtral": Family(stored_experts=("w1", "w3", "w2"), stored_prefix="model.layers.{layer}.block_sparse_moe."),
        "qwen3_moe": Family(),
        "olmoe": Family(),
        "qwen3_next": Family(shared="shared_expert"),
        "deepseek_v3": deepseek,
        "kimi_k2": deepseek,
        "gpt_oss": Family(router="router", stored_experts=None, transposed=True, interleaved=True),
    }


def block_shapes(config: MoEConfig) -> dict[str, Shape]:
    """Name -> shape of every saved tensor of a MoELayer with this config (all E experts)."""
    router, hidden, width = config.router, config.hidden_size, config.experts.intermediate_size
    num_experts = router.num_experts
    shapes: dict[str, Shape] = {"router.weight": (num_experts, hidden)}
    if router.linear_bias:
        shapes["router.bias"] = (num_experts,)
    if router.expert_bias:
        shapes["router.expert_bias"] = (num_experts,)
    shapes["experts.gate_up_proj"] = (num_experts, 2 * width, hidden)
    shapes["experts.down_proj"] = (num_experts, hidden, width)
    if config.experts.bias:
        shapes["experts.gate_up_proj_bias"] = (num_experts, 2 * width)
        shapes["experts.down_proj_bias"] = (num_experts, hidden)
    if config.shared_expert is not None:
        shared = config.shared_expert.intermediate_size
        shapes["shared_expert.gate_proj.weight"] = (shared, hidden)
        shapes["shared_expert.up_proj.weight"] = (shared, hidden)
        shapes["shared_expert.down_proj.weight"] = (hidden, shared)
        if config.shared_expert.gate:
            shapes["shared_expert_gate.weight"] = (1, hidden)
    return shapes


def transformers_mapping(config: MoEConfig, family: str, *, stored: bool) -> BlockMapping:
    """One block of a transformers model.

    Args:
        config: of our layer. family: a `model_type`.
        stored: the names in checkpoint files, else those of the v5 module's state dict.

    Raises:
        CheckpointError: unknown family, or the config has a part that the family has no name for.
    """
    names = family_named(family)
    ours = block_shapes(config)
    pieces = [
        *_router_pieces(ours, names.router, expert_bias=f"{names.router}.e_score_correction_bias"),
        *_shared_pieces(ours, names.shared, family),
    ]
    per_expert = names.stored_experts if stored else None
    if per_expert is None:
        pieces += _stacked_pieces(ours, names)
    else:
        pieces += _per_expert_pieces(config, ours, per_expert, family)
    label = f"{family} block {'on disk' if stored else 'in memory'}"
    return BlockMapping(label, ours, _their_shapes(ours, pieces), tuple(pieces))


def megatron_mapping(config: MoEConfig, layout: Literal["sequential", "grouped"] = "sequential") -> BlockMapping:
    """One megatron-core MoELayer at expert parallel size 1: SequentialMLP or TEGroupedMLP names.

    Raises:
        CheckpointError: unknown layout.
    """
    patterns = {
        "sequential": "experts.local_experts.{expert}.{linear}.{kind}",
        "grouped": "experts.{linear}.{kind}{expert}",
    }
    if layout not in patterns:
        raise CheckpointError(f"layout {layout!r} is not known; use one of {', '.join(patterns)}")
    ours = block_shapes(config)
    pieces = list(_router_pieces(ours, "router", expert_bias="router.expert_bias"))
    linears = {"gate_up_proj": "linear_fc1", "down_proj": "linear_fc2"}
    for name, linear in linears.items():
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            if f"experts.{name}{suffix}" in ours:
                pieces += [
                    Piece(
                        Region(f"experts.{name}{suffix}", expert),
                        Region(patterns[layout].format(expert=expert, linear=linear, kind=kind)),
                    )
                    for expert in range(config.router.num_experts)
                ]
    if config.shared_expert is not None:
        width = config.shared_expert.intermediate_size
        fc1 = "shared_experts.linear_fc1.weight"
        pieces.append(Piece(Region("shared_expert.gate_proj.weight"), Region(fc1, rows=(0, width))))
        pieces.append(Piece(Region("shared_expert.up_proj.weight"), Region(fc1, rows=(width, 2 * width))))
        pieces.append(Piece(Region("shared_expert.down_proj.weight"), Region("shared_experts.linear_fc2.weight")))
        if config.shared_expert.gate:
            pieces.append(Piece(Region("shared_expert_gate.weight"), Region("shared_experts.gate_weight")))
    return BlockMapping(f"megatron {layout} block", ours, _their_shapes(ours, pieces), tuple(pieces))


def _router_pieces(ours: Mapping[str, Shape], router: str, *, expert_bias: str) -> Iterator[Piece]:
    names = {"router.weight": f"{router}.weight", "router.bias": f"{router}.bias", "router.expert_bias": expert_bias}
    for name, theirs in names.items():
        if name in ours:
            yield Piece(Region(name), Region(theirs))


def _shared_pieces(ours: Mapping[str, Shape], shared: str | None, family: str) -> Iterator[Piece]:
    for name in ours:
        if not name.startswith("shared_expert"):
            continue
        if shared is None or (name.startswith("shared_expert_gate") and shared != "shared_expert"):
            raise CheckpointError(
                f"{family} has no name for {name}; remove shared_expert from the config or convert to another family"
            )
        theirs = name if name.startswith("shared_expert_gate") else name.replace("shared_expert", shared, 1)
        yield Piece(Region(name), Region(theirs))


def _stacked_pieces(ours: Mapping[str, Shape], names: Family) -> Iterator[Piece]:
    for name in ours:
        if name.startswith("experts."):
            is_bias = name.endswith("_bias")
            yield Piece(
                Region(name),
                Region(name),
                transposed=names.transposed and not is_bias,
                interleaved=names.interleaved and "gate_up" in name,
            )


def _per_expert_pieces(
    config: MoEConfig, ours: Mapping[str, Shape], names: tuple[str, str, str], family: str
) -> Iterator[Piece]:
    if "experts.gate_up_proj_bias" in ours:
        raise CheckpointError(f"{family} has no name for experts.gate_up_proj_bias; set experts.bias: false")
    gate, up, down = names
    width = config.experts.intermediate_size
    for expert in range(config.router.num_experts):
        gate_rows, up_rows = (0, width), (width, 2 * width)
        yield Piece(Region("experts.gate_up_proj", expert, gate_rows), Region(f"experts.{expert}.{gate}.weight"))
        yield Piece(Region("experts.gate_up_proj", expert, up_rows), Region(f"experts.{expert}.{up}.weight"))
    for expert in range(config.router.num_experts):
        yield Piece(Region("experts.down_proj", expert), Region(f"experts.{expert}.{down}.weight"))


def _their_shapes(ours: Mapping[str, Shape], pieces: list[Piece]) -> dict[str, Shape]:
    """The other side's manifest: what the pieces imply."""
    shapes: dict[str, Shape] = {}
    for piece in pieces:
        shape = list(ours[piece.ours.name][0 if piece.ours.expert is None else 1 :])
        if piece.ours.rows is not None:
            shape[0] = piece.ours.rows[1] - piece.ours.rows[0]
        if piece.transposed:
            shape[-2:] = shape[:-3:-1]
        if piece.theirs.rows is not None:
            shape[0] = max(piece.theirs.rows[1], shapes.get(piece.theirs.name, (0,))[0])
        shapes[piece.theirs.name] = tuple(shape)
    return shapes
