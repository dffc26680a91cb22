"""A call-signature double of TransformerEngine 2.20.2: what `experts/transformer_engine.py` calls, computed with torch.

It is not TransformerEngine. Signatures, what is refused and where gradients go are those of 2.20.2 (test_te_gpu.py
compares the signatures with the real ones); the numbers are torch's, with operands rounded to e4m3 under a recipe.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

FP8_ROWS = 16
active: list[Any] = [None]  # recipes of the entered autocasts
seen: list[tuple[str, list[int]]] = []  # recipe name and m_splits of every GroupedLinear call


class Recipe:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class DelayedScaling(Recipe):
    """Scales with the largest absolute value of past calls, so the first call and the second differ."""


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class Format:
    HYBRID = "hybrid"


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    return ((rows.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(rows.dtype)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, splits: list[int], fuse: bool, *weights: Tensor) -> Tensor:
        ctx.splits, ctx.fuse, ctx.weights = splits, fuse, weights
        ctx.save_for_backward(inp)
        return torch.cat([x @ w.t() for x, w in zip(inp.split(splits), weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (inp,), parts = ctx.saved_tensors, gradients[0].split(ctx.splits)
        d_inp = torch.cat([g @ w for g, w in zip(parts, ctx.weights, strict=True)])
        if not ctx.weights[0].requires_grad:
            return (d_inp, None, None, *[None] * len(ctx.weights))
        packed = torch.stack([g.t() @ x for g, x in zip(parts, inp.split(ctx.splits), strict=True)])
        if ctx.fuse:
            for weight, wgrad in zip(ctx.weights, packed, strict=True):
                weight.main_grad += wgrad
            return (d_inp, None, None, *[None] * len(ctx.weights))
        return (d_inp, None, None, *packed.unbind(0))


class GroupedLinear(nn.Module):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        name: str | None = None,
        use_grouped_tensor: bool | None = None,
    ) -> None:
        super().__init__()
        assert not bias, "the double has no bias"
        self.num_gemms, self.fuse_wgrad_accumulation = num_gemms, fuse_wgrad_accumulation
        self.peak: Tensor | None = None
        for i in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=params_dtype))
            self.register_parameter(f"weight{i}", weight)

    def forward(
        self,
        inp: Tensor,
        m_splits: Tensor,
        is_first_microbatch: bool | None = None,
        out: Tensor | None = None,
        dgrad_out: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(m_splits, Tensor):
            m_splits = torch.tensor(m_splits, dtype=torch.int64, device="cpu")
        if m_splits.size() != (self.num_gemms,):
            raise ValueError(f"Shape of splits tensor ({tuple(m_splits.size())}) does not match {self.num_gemms}")
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        for weight in weights:
            if weight.dtype != inp.dtype:
                raise TypeError(f"Found input dtype: {inp.dtype} and weight dtype: {weight.dtype}")
        splits, recipe = m_splits.tolist(), active[-1]
        assert sum(splits) == inp.shape[0]
        seen.append((type(recipe).__name__, splits))
        if recipe is not None:
            assert all(rows % FP8_ROWS == 0 for rows in splits), f"FP8 needs multiples of {FP8_ROWS} rows: {splits}"
            inp = inp + (self._quantized(inp.detach(), recipe) - inp.detach())
        return _Grouped.apply(inp, splits, self.fuse_wgrad_accumulation, *weights)

    def _quantized(self, inp: Tensor, recipe: Recipe) -> Tensor:
        if isinstance(recipe, Float8BlockScaling):
            return _rounded(inp, inp.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 448)
        now = inp.float().abs().max().clamp_min(1e-12)
        past = now if self.peak is None or isinstance(recipe, Float8CurrentScaling) else self.peak
        self.peak = 2 * now
        return _rounded(inp, past / 448)


@contextlib.contextmanager
def autocast(
    enabled: bool = True,
    calibrating: bool = False,
    recipe: Recipe | None = None,
    amax_reduction_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    active.append(recipe if enabled else None)
    try:
        yield
    finally:
        active.pop()


def _available(return_reason: bool = False) -> bool | tuple[bool, str]:
    return (True, "") if return_reason else True


def modules() -> dict[str, types.ModuleType]:
    """What to put into sys.modules."""
    root, common, pytorch, recipe = (
        types.ModuleType("transformer_engine" + name) for name in ("", ".common", ".pytorch", ".common.recipe")
    )
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "Format"):
        setattr(recipe, name, globals()[name])
    pytorch.GroupedLinear, pytorch.autocast = GroupedLinear, autocast  # type: ignore[attr-defined]
    pytorch.is_fp8_available = pytorch.is_fp8_block_scaling_available = _available  # type: ignore[attr-defined]
    common.recipe, root.common, root.pytorch = recipe, common, pytorch  # type: ignore[attr-defined]
    return {module.__name__: module for module in (root, common, pytorch, recipe)}
