"""moe_layer.compat.perplexity used wrongly: one typed error with the name, and the call can be repaired."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_layer.compat.perplexity import AllToAll
from moe_layer.config.model import DispatchConfig
from moe_layer.errors import CapacityError, ConfigError
from moe_layer.parallel.context import ParallelContext
from tests.distributed.perplexity_cases import (
    FILL,
    MOST,
    E,
    H,
    K,
    S,
    Tokens,
    check_buffers,
    config_of,
    inputs,
    make,
    make_out,
    make_tokens,
)
from tests.distributed.ranks import ThreadRanks


def answer(tokens: Tokens, expert_y: torch.Tensor) -> dict[str, Any]:
    """Arguments of a combine."""
    out_tokens = torch.zeros(tokens.x_TH.shape)
    return {"out_tokens": out_tokens, "expert_y": expert_y, "indices": tokens.ids_TK, "weights": tokens.w_TK}


def test_halves_out_of_order() -> None:
    layer, tokens, out = make(None), make_tokens(1, 4), make_out(E, 20, padded=False)
    given = out.arguments(prob=False, scale=False) | inputs(tokens)
    back = answer(tokens, out.x)
    sent, received = "a dispatch was sent and not received", "a dispatch was received and not combined"

    def fails(call: Any, arguments: dict[str, Any], text: str, **halves: bool) -> None:
        with pytest.raises(RuntimeError, match=text):
            call(**arguments, **halves)

    fails(layer.dispatch, given, "dispatch receive while no call is in flight; send first", do_send=False)
    fails(layer.combine, back, "combine while no call is in flight; dispatch and receive first")
    layer.dispatch(**given, do_recv=False)
    fails(layer.dispatch, given, f"dispatch send while {sent}; receive it first", do_recv=False)
    fails(layer.dispatch, given, f"dispatch send while {sent}")
    fails(layer.combine, back, f"combine while {sent}")
    with pytest.raises(ValueError, match="sending half had"):
        layer.dispatch(**given | {"out_expert_prob": out.prob}, do_send=False)
    layer.dispatch(**given, do_send=False)
    fails(layer.dispatch, given, f"dispatch receive while {received}; send first", do_send=False)
    fails(layer.combine, back, f"combine receive while {received}; send first", do_send=False)
    layer.combine(**back, do_recv=False)
    combining = "a combine was sent and not received"
    fails(layer.combine, back, f"combine send while {combining}; receive it first", do_recv=False)
    fails(layer.dispatch, given, f"dispatch send while {combining}; receive it first")
    fails(layer.dispatch, given, f"dispatch receive while {combining}", do_send=False)
    layer.combine(**back, do_send=False)
    fails(layer.combine, back, "combine while no call is in flight")
    layer.dispatch(**given)
    layer.dispatch(**given)  # a dispatch need not be combined
    for call, arguments in ((layer.dispatch, given), (layer.combine, back)):
        with pytest.raises(ValueError, match="at least one half"):
            call(**arguments, do_send=False, do_recv=False)


@pytest.mark.parametrize("padded", [True, False])
def test_small_buffers_name_the_size_and_may_be_replaced(ranks: ThreadRanks, padded: bool) -> None:
    """Nobody waits in vain: the ranks with too small a buffer repeat the receiving half."""
    tokens = [make_tokens(60 + r, 7) for r in range(2)]

    def one(context: ParallelContext) -> None:
        layer, small = make(context), make_out(E // 2, 3, padded=padded)
        given = inputs(tokens[context.ep_rank])
        with pytest.raises(CapacityError, match=r"out_expert_x holds 3 rows.*repeat the receiving half") as caught:
            layer.dispatch(**small.arguments(prob=True, scale=False), **given)
        assert (small.x == FILL).all() and (small.prob == FILL).all() and (small.count_L == -FILL).all()
        need = int(str(caught.value).split("room for ")[1].split()[0])
        out = make_out(E // 2, need, padded=padded)
        layer.dispatch(**out.arguments(prob=True, scale=False), **given, do_send=False)
        places = check_buffers(out, tokens, context.ep_rank, alignment=1, prob=True, scale=False)
        assert max(place[-1] for place in places) == need - 1
        layer.combine(out_tokens=torch.zeros(7, H), expert_y=out.x, indices=given["indices"], weights=given["weights"])

    ranks.run(2, one)


TENSORS = ("out_expert_num_tokens", "out_expert_x", "out_expert_prob", "dp_x", "indices", "weights")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dp_x": torch.zeros(4, H + 1)}, r"dp_x must be \[any, 6\], got \[4, 7\]"),
        ({"dp_x": torch.zeros(4, H).double()}, "dp_x must be torch.float32, got torch.float64"),
        ({"indices": torch.zeros(3, K).int()}, r"indices must be \[4, 3\]"),
        ({"indices": torch.zeros(4, K)}, "indices must be torch.uint32 or torch.int32 or torch.int64"),
        ({"indices": torch.full((4, K), E)}, r"must lie in \[-1, 8\)"),
        ({"indices": torch.full((4, K), 2**33)}, r"indices must be -1 or an expert"),
        ({"indices": torch.full((4, K), -2).int().view(torch.uint32)}, r"must lie in \[-1, 8\)"),
        ({"weights": torch.zeros(4, K).double()}, "weights must be torch.float32"),
        ({"weights": torch.zeros(4, K, requires_grad=True)}, "weights require grad"),
        ({"bound_m": torch.tensor(5)}, r"bound_m is 5, it must lie in \[0, 4\]"),
        ({"bound_m": torch.tensor([1, 2])}, "bound_m must be one integer"),
        ({"bound_m": torch.tensor(1.0)}, "bound_m must be one integer"),
        ({"bound_m": 3}, "bound_m must be a tensor of one integer, got 3"),
        *(({name: [1]}, f"{name} must be a tensor, got list") for name in TENSORS),
        ({"out_expert_num_tokens": torch.zeros(E).long()}, "out_expert_num_tokens must be torch.int32"),
        ({"out_expert_num_tokens": torch.zeros(E + 1).int()}, r"out_expert_num_tokens must be \[8\]"),
        ({"out_expert_x": torch.zeros(E + 1, 9, H)}, r"out_expert_x must be \[8, any, 6\]"),
        ({"out_expert_x": torch.zeros(H, 40).T}, "out_expert_x must be contiguous"),
        ({"out_expert_prob": torch.zeros(39)}, r"out_expert_prob must be \[40\]"),
        ({"out_expert_prob": torch.zeros(40).double()}, "out_expert_prob must be torch.float32"),
        ({"dp_x_scale": torch.zeros(4, S)}, "dp_x_scale and out_expert_x_scale must be given together"),
        ({"out_expert_x_scale": torch.zeros(40, S)}, "must be given together"),
        (
            {"dp_x_scale": torch.zeros(4, S), "out_expert_x_scale": torch.zeros(40, S + 1)},
            r"dp_x_scale must be \[4, 3\]",
        ),
        ({"dp_x_scale": torch.zeros(4, S), "out_expert_x_scale": torch.zeros(40, S).half()}, "must be torch.float32"),
    ],
)
def test_wrong_arguments_of_dispatch(change: dict[str, Any], text: str) -> None:
    layer, out = make(None), make_out(E, 40, padded=False)
    with pytest.raises(ValueError, match=text):
        layer.dispatch(**(out.arguments(prob=False, scale=False) | inputs(make_tokens(1, 4)) | change))
    assert (out.x == FILL).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"out_tokens": torch.zeros(3, H)}, CapacityError, r"out_tokens has 3 rows for 4 dispatched.*\[4, 6\]"),
        ({"out_tokens": torch.zeros(4, H).half()}, ValueError, "out_tokens must be torch.float32"),
        ({"indices": torch.zeros(4, K).int()}, ValueError, "indices differ"),
        ({"weights": torch.zeros(5, K)}, ValueError, r"weights must be \[4, 3\]"),
        ({"expert_y": torch.zeros(2, H)}, ValueError, "expert_y has 2 rows, the dispatch delivered"),
        ({"expert_y": torch.zeros(E, 0, H)}, ValueError, "expert_y has 0 rows"),
        ({"expert_y": torch.zeros(40, H).int()}, ValueError, "expert_y must be torch.bfloat16 or"),
        ({"bound_m": torch.tensor(-1)}, ValueError, "bound_m is -1"),
        ({"expert_y": None}, ValueError, "expert_y must be a tensor, got NoneType"),
        ({"out_tokens": None}, ValueError, "out_tokens must be a tensor, got NoneType"),
    ],
)
def test_wrong_arguments_of_combine(change: dict[str, Any], error: type[Exception], text: str) -> None:
    """The call survives: the corrected combine goes through."""
    layer, out, tokens = make(None), make_out(E, 40, padded=False), make_tokens(1, 4)
    layer.dispatch(**out.arguments(prob=False, scale=False), **inputs(tokens))
    back = answer(tokens, out.x)
    with pytest.raises(error, match=text):
        layer.combine(**(back | change))
    layer.combine(**back)


def test_construction_and_too_many_tokens() -> None:
    for config in (
        DispatchConfig(),
        config_of(rows="compact"),
        config_of(capacity="static", max_tokens_per_rank=4),
        config_of(chunks=2),
    ):
        with pytest.raises(ConfigError):
            make(None, config=config)
    for sizes in ((0, 1), (4, 0), (4, 5)):
        with pytest.raises(ConfigError, match=f"num_experts is {sizes[0]} and top_k {sizes[1]}; there must be experts"):
            AllToAll(num_experts=sizes[0], experts_per_token=sizes[1], hidden_dim=H, max_num_tokens=MOST)
    assert isinstance(make(None, config=config_of(capacity="static", max_tokens_per_rank=MOST)), AllToAll)
    layer, out = make(None), make_out(E, 40, padded=False)
    with pytest.raises(CapacityError, match="dp_x has 10 tokens, max_num_tokens is 9; raise it to 10"):
        layer.dispatch(**out.arguments(prob=False, scale=False), **inputs(make_tokens(1, 10)))
