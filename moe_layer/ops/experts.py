"""The grouped expert MLP as an opaque op pair: the door that `torch.compile` takes.

Schemas, fakes and autograd live here; `moe_layer.experts.compute`, which also serves the eager door
(`moe_layer.experts.autograd`), registers the kernels: ops know nothing of the backends above them.

Letters: N rows, N_c compact rows, D hidden, F expert width, L local experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.ops.stash import packed_columns

_LAYOUT = "Tensor x, Tensor? index, Tensor? probs, Tensor offsets, Tensor counts, Tensor row_CK, Tensor ids_CK"
_WEIGHTS = "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias"
_SPEC = "str backend, str activation, float limit, float alpha, str keep_h, ScalarType compute_dtype, int num_experts"
NUM_LAYOUT, NUM_WEIGHTS = 7, 4

torch.library.define("moe_layer::experts_fwd", f"({_LAYOUT}, {_WEIGHTS}, {_SPEC}) -> (Tensor, Tensor)")
torch.library.define(
    "moe_layer::experts_bwd",
    f"(Tensor d_rows, Tensor h, {_LAYOUT}, {_WEIGHTS}, {_SPEC}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("moe_layer::experts_fwd")
def _fwd_fake(x: Tensor, index: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    gate_up = rest[5]
    keep_h, compute_dtype = rest[-3], rest[-2]
    num_rows = x.shape[0] if index is None else index.shape[0]
    columns = gate_up.shape[1]
    if keep_h == "fp8":
        h = x.new_empty(num_rows, packed_columns(columns), dtype=torch.uint8)
    else:
        h = x.new_empty(num_rows if keep_h == "input" else 0, columns, dtype=compute_dtype)
    return x.new_empty(num_rows, x.shape[1]), h


@torch.library.register_fake("moe_layer::experts_bwd")
def _bwd_fake(d_rows: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x, probs = rest[0], rest[2]
    wanted = (x, probs, *rest[NUM_LAYOUT : NUM_LAYOUT + NUM_WEIGHTS])
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else x.new_empty(0)
        for t, need in zip(wanted, rest[-1], strict=True)
    )


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    tensors = inputs[: NUM_LAYOUT + NUM_WEIGHTS]
    ctx.spec = inputs[NUM_LAYOUT + NUM_WEIGHTS :]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, d_rows: Tensor | None, d_h: None) -> tuple:
    none = (None,) * len(ctx.needs_input_grad)
    if d_rows is None:
        return none
    *tensors, h = ctx.saved_tensors
    wanted = (0, 2, *range(NUM_LAYOUT, NUM_LAYOUT + NUM_WEIGHTS))
    needs = [bool(ctx.needs_input_grad[i]) for i in wanted]
    found = torch.ops.moe_layer.experts_bwd(d_rows, h, *tensors, *ctx.spec, needs)
    result = list(none)
    for i, need, gradient in zip(wanted, needs, found, strict=True):
        result[i] = gradient if need else None
    return tuple(result)


torch.library.register_autograd("moe_layer::experts_fwd", _backward, setup_context=_setup)
