"""Call an op where no graph is being built."""

from __future__ import annotations

from typing import Any

import torch


def call_plain(op: Any, *args: Any, **kwargs: Any) -> Any:
    """`op(...)` without its Python autograd wrapper, for calls that need no gradient from it.

    `torch.library.custom_op` puts that wrapper in front of every kernel, for integer tensors too and inside the forward
    and backward of an autograd.Function, where it has nothing to do. torch.compile traces the op itself.
    """
    if torch.compiler.is_compiling():
        return op(*args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args, **kwargs)
