"""Expert GEMMs through TransformerEngine's GroupedLinear, in the rows' dtype or in FP8 (`experts.fp8_recipe`).

The weights stay this package's packed parameters: each call lends TE their slices in place of the ones that a
GroupedLinear owns (which stay on the meta device): names, checkpoints and gradients are those of every other backend.
TE's scales and amax histories (recipe `delayed`) live beside the module and in no checkpoint: they refill after a
resume. TE wants the rows per expert on the host: one read a forward, so no CUDA graphs.

Letters: N rows, P rows with FP8's pads, D hidden, F expert width, L local experts.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_layer.experts.autograd import NAMES, main_grad_of
from moe_layer.experts.compute import to_source_rows
from moe_layer.experts.spec import ExpertsSpec, Layout, Weights
from moe_layer.ops.cast import no_autocast
from moe_layer.ops.glu import glu

INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.2'"
FP8_ROWS = 16  # FP8 GEMMs take groups of a multiple of this many rows


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return f"TransformerEngine is not installed; {INSTALL} (needs a CUDA build of torch, nvcc and cuDNN's headers)"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # its loader raises what the missing library raises
        return f"transformer_engine.pytorch does not import ({type(error).__name__}: {error}); {INSTALL}"
    return None


def obstacle(
    device: torch.device, dtype: torch.dtype, *, fp8_recipe: str, bias: bool, hidden_size: int, width: int
) -> str | None:
    """Why TransformerEngine cannot run experts like these, with the remedy; None when it can."""
    if device.type != "cuda":
        return f"TransformerEngine runs on CUDA and the experts are on {device}; move them"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"TransformerEngine is used in bfloat16 and float16, not {dtype}; use bfloat16 or autocast"
    if bias:
        return "experts.bias is true and the second bias is multiplied by the routing probability; use grouped_mm"
    multiple = 8 if fp8_recipe == "none" else 16
    if hidden_size % multiple or width % multiple:
        return (
            f"with fp8_recipe {fp8_recipe} it needs multiples of {multiple}, and hidden_size {hidden_size}, width "
            f"{width} are not both; round them up"
        )
    return _missing() or _recipe_obstacle(fp8_recipe)


@functools.cache
def _recipe_obstacle(fp8_recipe: str) -> str | None:
    if fp8_recipe == "none":
        return None
    import transformer_engine.pytorch as te

    check = te.is_fp8_block_scaling_available if fp8_recipe == "blockwise" else te.is_fp8_available
    available, reason = check(return_reason=True)
    return None if available else f"fp8_recipe {fp8_recipe} cannot run here ({reason}); use fp8_recipe none"


@functools.cache  # TE names a recipe by its text, made once for each object
def make_recipe(fp8_recipe: str) -> Any:
    """TE's recipe object, None for `none`.

    Nothing is reduced over ranks: they hold other experts, and may call them a different number of times.
    """
    if fp8_recipe == "none":
        return None
    from transformer_engine.common import recipe

    if fp8_recipe == "delayed":
        return recipe.DelayedScaling(fp8_format=recipe.Format.HYBRID, reduce_amax=False)
    return recipe.Float8CurrentScaling() if fp8_recipe == "current" else recipe.Float8BlockScaling()


class GroupedLinears:
    """The two GroupedLinear modules of one `Experts`: made at first use, made anew in copies and after unpickling."""

    def __init__(self) -> None:
        self._modules: tuple[Any, Any] | None = None

    def of(self, weights: Weights) -> tuple[Any, Any]:
        """(up, down); their own parameters have no memory."""
        if self._modules is None:
            from transformer_engine.pytorch import GroupedLinear

            self._modules = tuple(  # type: ignore[assignment]
                GroupedLinear(w.shape[0], w.shape[2], w.shape[1], bias=False, params_dtype=w.dtype, device="meta")
                for w in (weights.gate_up, weights.down)
            )
        return self._modules  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupedLinears:
        return GroupedLinears()

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupedLinears, ()


class _Gather(torch.autograd.Function):
    """x[index] whose gradient sums the slots of a row in the package's fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout, spec: ExpertsSpec) -> Tensor:
        ctx.layout, ctx.spec = layout._replace(probs=None), spec
        assert layout.index is not None
        return x.index_select(0, layout.index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return to_source_rows(gradients[0], ctx.layout, ctx.spec), None, None


class _Slices(torch.autograd.Function):
    """A packed [L, X, Y] weight as L views; their gradients are taken over without a copy where TE packed them too."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        base = gradients[0]._base
        if base is not None and base.shape == (len(gradients), *gradients[0].shape) and base.is_contiguous():
            step = gradients[0].numel() * base.element_size()
            if all(g._base is base and g.data_ptr() == base.data_ptr() + i * step for i, g in enumerate(gradients)):
                return base
        return torch.stack(gradients)


def _linear(
    module: Any, rows: Tensor, m_splits: Tensor, weight: Tensor, main_grad: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """TE's `module` on the slices of `weight` in place of its own parameters."""
    module.fuse_wgrad_accumulation = main_grad is not None
    if main_grad is None:
        slices = _Slices.apply(weight.to(dtype))
    else:
        slices = weight.detach().to(dtype).unbind(0)
        for part, target in zip(slices, main_grad.unbind(0), strict=True):
            part.requires_grad_()
            setattr(part, "main_grad", target)  # noqa: B010 (torch.Tensor declares no such attribute)
    lent = {f"weight{i}": part for i, part in enumerate(slices)}
    return torch.func.functional_call(module, lent, (rows, m_splits), tie_weights=False)


def _padded_places(m_splits: Tensor, offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor | None]:
    """Rows per expert rounded up to FP8_ROWS, and the padded row of each row (None where nothing moves)."""
    padded = (m_splits + FP8_ROWS - 1) // FP8_ROWS * FP8_ROWS
    if torch.equal(padded, m_splits):
        return m_splits, None
    shift_L = (padded - m_splits).cumsum(0) - (padded - m_splits)
    row_N = torch.arange(num_rows, device=offsets.device)
    expert_N = torch.bucketize(row_N, offsets[1:-1].long(), right=True)
    return padded, row_N + shift_L.to(offsets.device, non_blocking=True)[expert_N]


def _spread(rows: Tensor, place_N: Tensor | None, num_padded: int) -> Tensor:
    if place_N is None:
        return rows
    return rows.new_zeros(num_padded, *rows.shape[1:]).index_copy(0, place_N, rows)


@torch.compiler.disable(reason="TransformerEngine's GroupedLinear: a documented graph break")
def forward(
    layout: Layout,
    weights: Weights,
    spec: ExpertsSpec,
    *,
    parameters: tuple[Tensor | None, ...],
    fp8_recipe: str,
    modules: GroupedLinears,
) -> Tensor:
    """rows [N, D] in the dtype of `layout.x`, differentiable in x, probabilities and weights; pads and tail undefined.

    Args:
        layout, weights, spec: see `moe_layer.experts.spec`; x, probs and weights carry autograd.
        parameters: the weights' owners; where one has a main_grad, TE adds the gradient to it in its wgrad GEMM.
        fp8_recipe: `none`, `delayed`, `current` or `blockwise`. modules: of this layer.

    Raises:
        RuntimeError: called while a CUDA graph is captured.
        ValueError: a main_grad that cannot be honoured.
    """
    import transformer_engine.pytorch as te

    if layout.x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "experts.backend transformer_engine reads the rows per expert on the host, which a CUDA graph cannot "
            "hold; set experts.backend to quack or grouped_mm, or run this layer outside the graph"
        )
    grads = [main_grad_of(p, name) for p, name in zip(parameters[:2], NAMES[:2], strict=True)]
    dtype, up_and_down = spec.compute_dtype, modules.of(weights)
    recipe = make_recipe(fp8_recipe)
    with no_autocast(layout.x.device.type), te.autocast(enabled=recipe is not None, recipe=recipe):
        rows = layout.x if layout.index is None else _Gather.apply(layout.x, layout, spec)
        offsets = layout.offsets.to("cpu", torch.int64)
        m_splits, count = offsets.diff(), int(offsets[-1])
        if count == 0:  # no GEMM; the weights still get gradients, of zeros
            idle = [w.sum() for w, grad in zip(weights[:2], grads, strict=True) if grad is None]
            return pad((rows[:0] + 0 * sum(idle)).to(layout.x.dtype), (0, 0, 0, layout.num_rows))
        place_N = None
        num_padded = count
        if recipe is not None:
            m_splits, place_N = _padded_places(m_splits, layout.offsets, count)
            num_padded = int(m_splits.sum())
        x_PD = _spread(rows[:count].to(dtype), place_N, num_padded)
        probs_P = None if layout.probs is None else _spread(layout.probs[:count], place_N, num_padded)
        h_P2F = _linear(up_and_down[0], x_PD, m_splits, weights.gate_up, grads[0], dtype)
        a_PF = glu(h_P2F, probs_P, activation=spec.activation, limit=spec.limit, alpha=spec.alpha)
        out_PD = _linear(up_and_down[1], a_PF, m_splits, weights.down, grads[1], dtype)
        out_ND = out_PD if place_N is None else out_PD.index_select(0, place_N)
        if out_ND.requires_grad:
            owners = [p for p, grad in zip(parameters, grads, strict=False) if grad is not None]
            out_ND.register_hook(functools.partial(_mark_added, owners))
        return pad(out_ND, (0, 0, 0, layout.num_rows - count)).to(layout.x.dtype)


def _mark_added(owners: list[Any], gradient: Tensor) -> None:
    for parameter in owners:
        parameter.grad_added_to_main_grad = True
