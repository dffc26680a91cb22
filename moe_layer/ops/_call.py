"""Call an op where no graph is being built; refuse where one of the second order is."""

from __future__ import annotations

from typing import Any

import torch


def call_plain(op: Any, *args: Any, **kwargs: Any) -> Any:
    """`op(...)` without its Python wrappers, for calls that need no gradient from it.

    `torch.library.custom_op` puts two wrappers in front of every kernel: autograd, for integer tensors too and inside
    the forward and backward of an autograd.Function, where it has nothing to do; and for mutated arguments one that
    counts their versions, which costs 30 us a call and serves tensors that autograd has saved, which these never are.
    torch.compile traces the op itself.
    """
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op(*args, **kwargs)


def refuse_second_derivative() -> None:
    """For the backward of an autograd.Function whose own derivative does not exist.

    Raises:
        RuntimeError: under create_graph=True. torch would take the missing part as zero wherever some other path from
            the gradient to the inputs exists.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "moe_layer has no second derivatives (create_graph=True); differentiate once, or leave the layer out of "
            "what is differentiated twice"
        )
