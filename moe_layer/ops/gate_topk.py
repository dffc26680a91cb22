"""`moe_layer::gate_topk`: the gate GEMM and `route_topk` in one functional op, x -> expert ids.

    logits = x @ weight.T (+ gate_bias), fp32 accumulation;  the rest as `route_topk(logits, ...)`

On Hopper one kernel (csrc/router_gate.cuh) keeps the logits of a block of tokens in shared memory and selects from
there; they reach device memory only if `want_logits`, which the backward needs. `fits` says which calls it serves.
T tokens, D hidden, E experts, K top-k. Precision: bf16 operands, fp32 products and sums (fp64 for fp64 operands); the
backward rounds d(logits) to the operands' dtype, as `gate_logits` does under `fp32_out`. Logits differ from
`gate_logits`' in the order of the sum over D only, so an id may differ where the deciding keys are that close.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_layer.ops import route_topk as plain
from moe_layer.ops._call import call_plain
from moe_layer.ops.fan_out import LateProduct
from moe_layer.ops.gate import gate_logits
from moe_layer.ops.kernels import kernels_loaded, load_kernels
from moe_layer.ops.route_topk_bwd import logits_gradient, what_backward_reads
from moe_layer.ops.route_topk_check import check_arguments, check_losses
from moe_layer.ops.route_topk_result import RouteTopk

_OPTIONS = (
    "bool want_logits, int top_k, str score_function, str softmax_order, bool renormalize, float scaling_factor,"
    " int num_groups, int group_topk, str group_rule, str weights_mode, str aux_counts, bool want_z,"
    " bool want_losses, float aux_coeff, float z_coeff"
)
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? gate_bias, Tensor? expert_bias, Tensor? replay_ids, Tensor? replay_weights,"
    f" Tensor? valid, *, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor, Tensor, Tensor)"
)
MAX_TOP_K = 16
_UNASKED = {"want_probs": False, "want_scores": False, "map_format": "none"}


def _product(x_TD: Tensor, weight: Tensor, gate_bias: Tensor | None) -> Tensor:
    """[T, E] logits, fp32 (fp64); the bits of `gate_logits`."""
    if x_TD.dtype in (torch.float32, torch.float64):
        return F.linear(x_TD, weight, None if gate_bias is None else gate_bias.to(x_TD.dtype))
    if x_TD.is_cuda:
        logits_TE = torch.mm(x_TD, weight.t(), out_dtype=torch.float32)
    else:
        logits_TE = F.linear(x_TD.float(), weight.float())
    return logits_TE if gate_bias is None else logits_TE + gate_bias.float()


@torch.library.custom_op("moe_layer::gate_topk", mutates_args=(), schema=SCHEMA)
def _op(
    x: Tensor, weight: Tensor, gate_bias: Tensor | None, *routing_inputs: Any, want_logits: bool, **options: Any
) -> tuple[Tensor, ...]:
    logits_TE = _product(x, weight, gate_bias)
    outputs = plain._op._init_fn(logits_TE, *routing_inputs, None, **options, **_UNASKED)
    return (logits_TE if want_logits else logits_TE.new_empty((0, weight.shape[0])), *outputs)


@_op.register_fake
def _fake(
    x: Tensor, weight: Tensor, gate_bias: Tensor | None, *routing_inputs: Any, want_logits: bool, **options: Any
) -> tuple[Tensor, ...]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits_TE = x.new_empty((x.shape[0], weight.shape[0]), dtype=wide)
    outputs = plain._fake(logits_TE, *routing_inputs, None, **options, **_UNASKED)
    return (logits_TE if want_logits else logits_TE.new_empty((0, weight.shape[0])), *outputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x, weight, gate_bias, *routing_inputs = inputs
    logits, *routed = output
    given = (logits, *routing_inputs, None)
    saved = what_backward_reads(ctx, given, keyword_only_inputs, routed)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if gate_bias is None else gate_bias.dtype
    ctx.late = None
    ctx.save_for_backward(x, weight, *saved)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, *saved = ctx.saved_tensors
    d_logits, *others = grads
    through = logits_gradient(ctx, tuple(saved), tuple(others))
    d_logits = through if d_logits is None else d_logits if through is None else d_logits + through
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if d_logits is None:
        return (None,) * 7
    d_bias = d_logits.sum(0).to(ctx.bias_dtype) if need_bias else None
    d_logits = d_logits.to(x.dtype)
    d_x = None
    if need_x and ctx.late is not None and not torch.is_grad_enabled():
        ctx.late.put(d_logits, weight)
    elif need_x:
        d_x = d_logits @ weight
    return (d_x, d_logits.t() @ x if need_weight else None, d_bias, None, None, None, None)


_op.register_autograd(_backward, setup_context=_setup_context)


class _EagerDoor(torch.autograd.Function):
    """The op's autograd for eager mode; see `route_topk._EagerDoor` for why."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, late, options = inputs
        output = call_plain(torch.ops.moe_layer.gate_topk, *tensors, **options)
        _setup_context(ctx, tuple(tensors), options, output)
        ctx.late = late
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, *grads), None, None)


def gate_topk(
    x_TD: Tensor,
    weight: Tensor,
    gate_bias: Tensor | None = None,
    expert_bias: Tensor | None = None,
    *,
    top_k: int,
    score_function: str = "softmax",
    softmax_order: str = "post",
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    num_groups: int = 0,
    group_topk: int = 0,
    group_rule: str = "sum_top2",
    replay_ids: Tensor | None = None,
    replay_weights: Tensor | None = None,
    weights_mode: str = "live",
    valid: Tensor | None = None,
    aux_counts: str = "none",
    want_z: bool = False,
    loss_coeffs: tuple[float, float] | None = None,
    want_logits: bool = False,
    late: LateProduct | None = None,
) -> tuple[Tensor, RouteTopk]:
    """Logits `x @ weight.T (+ gate_bias)` routed as by `route_topk`; differentiable in x, weight and gate_bias.

    Args:
        x_TD: `[T, D]`, any strides. weight: `[E, D]` in x's dtype. gate_bias: `[E]` or None.
        want_logits: return the logits although nothing is differentiated.
        late: of the `fan_out` that made x_TD, see `gate_logits`.
        others: of `route_topk`.

    Returns:
        logits fp32 (fp64) `[T, E]`, differentiable, `[0, E]` if nobody needs them; and what `route_topk` returns.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, device, size or name.
    """
    if x_TD.ndim != 2 or weight.ndim != 2 or x_TD.shape[1] != weight.shape[1] or x_TD.shape[1] == 0:
        raise ValueError(f"x [T, D] and weight [E, D] do not fit: {tuple(x_TD.shape)} and {tuple(weight.shape)}")
    if x_TD.dtype != weight.dtype:
        raise TypeError(f"x is {x_TD.dtype} and weight {weight.dtype}; cast one of them")
    check_arguments(
        x_TD[:, :1].expand(x_TD.shape[0], weight.shape[0]),  # has the logits' shape
        expert_bias,
        replay_ids=replay_ids,
        replay_weights=replay_weights,
        valid=valid,
        cu_seqlens=None,
        top_k=top_k,
        score_function=score_function,
        softmax_order=softmax_order,
        num_groups=num_groups,
        group_topk=group_topk,
        group_rule=group_rule,
        weights_mode=weights_mode,
        aux_counts=aux_counts,
    )
    options: dict[str, Any] = {
        "top_k": top_k,
        "score_function": score_function,
        "softmax_order": softmax_order,
        "renormalize": renormalize,
        "scaling_factor": float(scaling_factor),
        "num_groups": num_groups,
        "group_topk": group_topk,
        "group_rule": group_rule,
        "weights_mode": weights_mode,
        "aux_counts": aux_counts,
        "want_z": want_z,
    }
    if loss_coeffs is not None:
        check_losses(aux_counts=aux_counts, want_z=want_z, cu_seqlens=None)
    if gate_bias is not None and gate_bias.dtype not in (x_TD.dtype, torch.float32):
        gate_bias = gate_bias.float()
    tensors = (x_TD, weight, gate_bias, expert_bias, replay_ids, replay_weights, valid)
    load_kernels(x_TD)
    if x_TD.is_cuda and kernels_loaded() and not gate_fits(x_TD, weight, expert_bias, **options):
        logits = gate_logits(x_TD, weight, gate_bias, gate_dtype="fp32_out", late=late)
        options.update(replay_ids=replay_ids, replay_weights=replay_weights, valid=valid, loss_coeffs=loss_coeffs)
        return logits, plain.route_topk(logits, expert_bias, **options)
    aux_coeff, z_coeff = (0.0, 0.0) if loss_coeffs is None else loss_coeffs
    options |= {"want_losses": loss_coeffs is not None, "aux_coeff": float(aux_coeff), "z_coeff": float(z_coeff)}
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:3])
    options["want_logits"] = want_logits or learns
    if torch.compiler.is_compiling():
        logits, *routed = torch.ops.moe_layer.gate_topk(*tensors, **options)
    elif learns:
        logits, *routed = _EagerDoor.apply(*tensors, late, options)
    else:
        logits, *routed = call_plain(torch.ops.moe_layer.gate_topk, *tensors, **options)
    return logits, RouteTopk(*routed)


def gate_fits(
    x_TD: Tensor,
    weight: Tensor,
    expert_bias: Tensor | None,
    *,
    top_k: int,
    score_function: str,
    num_groups: int,
    group_topk: int,
    group_rule: str,
    **_: Any,
) -> bool:
    """Whether csrc/router_gate.cuh serves this call: sizes, dtype, options of `gate_topk` and the GPU, never values."""
    num_experts, hidden = weight.shape
    keyed = expert_bias is not None or num_groups > 0
    per_group = 2 if group_rule == "sum_top2" else top_k // max(group_topk, 1)
    return (
        x_TD.is_cuda
        and x_TD.dtype == torch.bfloat16
        and hidden % 8 == 0
        and num_experts % 8 == 0
        and 16 <= num_experts <= 128
        and top_k <= MAX_TOP_K
        and score_function == ("sigmoid" if keyed else "softmax")
        and (num_groups == 0 or (num_experts // num_groups in (8, 16, 32) and per_group <= 2))
        and _hopper_sms(x_TD.device.index) > 0
    )


@torch.compiler.assume_constant_result
def _hopper_sms(device: int | None) -> int:
    """Multiprocessors of a Hopper GPU with the library loaded, else 0."""
    return _sms_of(device) if kernels_loaded() else 0


@functools.cache
def _sms_of(device: int | None) -> int:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def gate_wins(x_TD: Tensor, weight: Tensor, expert_bias: Tensor | None, **options: Any) -> bool:
    """Whether the router takes `gate_topk` in place of `gate_logits` and `route_topk`: it fits and measured faster."""
    return gate_fits(x_TD, weight, expert_bias, **options) and _fills(x_TD.shape[0], _hopper_sms(x_TD.device.index))


def _fills(tokens: int, sms: int) -> bool:
    """Few blocks idle: 1024 tokens to 32 for each multiprocessor, and 115.2 to 128 for each (132 of them: 1024 to 4224
    and 15206 to 16896). Between and above, two launches took as long or less on an H200. The same for training and
    inference, so that a pass that is computed again takes the same path."""
    return 1024 <= tokens <= 32 * sms or 9 * 128 * sms <= 10 * tokens <= 10 * 128 * sms
