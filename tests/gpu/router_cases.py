"""What the tests of the CUDA router share: cases, inputs and the comparison with the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.ops import route_topk_select as ref
from moe_layer.ops.route_topk import RouteTopk, route_topk

DEEPSEEK = {"score_function": "sigmoid", "num_groups": 8, "group_topk": 4, "scaling_factor": 2.5}
CASES: dict[str, tuple[int, dict[str, Any], bool]] = {  # experts, options, with a bias
    "e8-k2": (8, {"top_k": 2}, False),
    "e8-k8": (8, {"top_k": 8}, False),
    "e1-k1": (1, {"top_k": 1, "softmax_order": "pre", "renormalize": False}, False),
    "e24-k12-sigmoid": (24, {"top_k": 12, "score_function": "sigmoid"}, True),
    "e60-k4-pre": (60, {"top_k": 4, "softmax_order": "pre", "renormalize": False}, False),
    "e64-k8-pre": (64, {"top_k": 8, "softmax_order": "pre", "renormalize": False}, False),
    "e128-k8": (128, {"top_k": 8}, False),
    "e128-k8-sigmoid": (128, {"top_k": 8, "score_function": "sigmoid"}, False),
    "e128-k8-sqrtsoftplus-bias": (128, {"top_k": 8, "score_function": "sqrtsoftplus"}, True),
    "e129-k5-bias": (129, {"top_k": 5, "score_function": "sigmoid"}, True),
    "e160-k6-groups-of-20": (160, {"top_k": 6, "num_groups": 8, "group_topk": 3, "softmax_order": "pre"}, False),
    "e256-k8-deepseek": (256, {"top_k": 8, **DEEPSEEK}, True),
    "e256-k16": (256, {"top_k": 16}, False),
    "e256-k8-megatron-groups": (
        256,
        {"top_k": 8, "num_groups": 4, "group_topk": 2, "group_rule": "sum_topk_per_group", "score_function": "sigmoid"},
        False,
    ),
    "e320-k9": (320, {"top_k": 9}, False),
    "e384-k8-bias": (384, {"top_k": 8, "score_function": "sigmoid"}, True),
    "e512-k10": (512, {"top_k": 10, "softmax_order": "pre"}, False),
    "e512-k10-post-bias": (512, {"top_k": 10}, True),
    "e1000-k32": (1000, {"top_k": 32, "score_function": "sigmoid", "renormalize": False}, False),
    "e1024-k4-groups": (1024, {"top_k": 4, "num_groups": 16, "group_topk": 2, "score_function": "sqrtsoftplus"}, False),
    "e40-k40-general": (40, {"top_k": 40, "score_function": "sigmoid"}, False),
    "e2000-k12-general": (2000, {"top_k": 12, **DEEPSEEK}, True),
}
ALL = {"aux_counts": "live", "want_z": True, "want_probs": True, "want_scores": True, "map_format": "bytemap"}
GRADIENTS = ("weights", "score_sum", "z_sum", "probs", "scores")
LOSSES = {"aux_counts": "live", "want_z": True}
"""What a training step asks for; without dense outputs, replay and sequences the lean kernels run."""
TRAINED = ("weights", "score_sum", "z_sum")


def logits_for(experts: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=generator) * 2).to(dtype)


def bias_for(experts: int, with_bias: bool) -> Tensor | None:
    return torch.randn(experts, generator=torch.Generator().manual_seed(1)) * 0.1 if with_bias else None


def on_cuda(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cuda()


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def differing_rows(ours: Tensor, logits: Tensor, bias: Tensor | None, options: dict[str, Any]) -> int:
    """Rows whose ids are not the CPU's; fails unless every such pair of ids has keys less than 8 ulp apart."""
    selection = {name: options[name] for name in ("top_k", "score_function") if name in options}
    given = {"score_function": "softmax", "softmax_order": "post"} | options
    theirs = route_topk(logits, bias, **options).ids
    rows = (ours != theirs).any(dim=1).nonzero().flatten().tolist()
    x_TE = logits.float()
    plain = bias is None and not options.get("num_groups")
    key_TE = x_TE if plain else ref.selection_key(x_TE, None, bias, given["score_function"], given["softmax_order"])
    for row in rows:
        if options.get("num_groups"):
            continue  # a near tie of two groups' sums changes several ids; counted, and bounded by the caller
        mine, other = key_TE[row, ours[row].long()], key_TE[row, theirs[row].long()]
        ulp = torch.finfo(torch.float32).eps * torch.maximum(mine.abs(), other.abs())
        assert ((mine - other).abs() < 8 * ulp).all(), (row, selection, ours[row].tolist(), theirs[row].tolist())
    return len(rows)


def run(
    logits: Tensor, bias: Tensor | None, options: dict[str, Any], grads: dict[str, Tensor], **inputs: Any
) -> tuple[RouteTopk, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    out = route_topk(leaf, bias, **options, **inputs)
    kept = [(getattr(out, name), grad.to(getattr(out, name))) for name, grad in grads.items()]
    torch.autograd.backward([tensor for tensor, _ in kept], [grad for _, grad in kept])
    assert leaf.grad is not None
    return out, leaf.grad


def close(name: str, ours: Tensor, fp32: Tensor, exact: Tensor) -> None:
    """|ours - exact| at most twice the fp32 path's worst error, plus the rounding of the dtype and 4 ulp of fp32."""
    exact = exact.double().cpu()
    assert torch.equal(ours.cpu().isnan(), exact.isnan()), name
    ours, fp32, exact = ours.double().cpu().nan_to_num(), fp32.double().nan_to_num(), exact.nan_to_num()
    scale = exact.abs().max() if exact.numel() else torch.zeros(())
    allowed = 2 * (fp32 - exact).abs().max() + 4 * 1.2e-7 * scale + 1e-30 if exact.numel() else scale
    error = (ours - exact).abs().max() if exact.numel() else scale
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, largest value {scale:.3e}"


def gradients_for(out: RouteTopk, names: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(getattr(out, name).shape, generator=generator) for name in names}


def check(
    logits: Tensor, bias: Tensor | None, options: dict[str, Any], names: tuple[str, ...] = GRADIENTS, **inputs: Any
) -> RouteTopk:
    """Every output and the gradient, on CUDA, against the CPU's fp32 and fp64 paths given CUDA's ids."""
    with torch.no_grad():
        shape = route_topk(logits, bias, **options, **inputs)
    grads = gradients_for(shape, names)
    cuda = on("cuda", inputs)
    ours, d_ours = run(logits.cuda(), on_cuda(bias), options, on("cuda", grads), **cuda)
    fixed = dict(inputs)
    if "replay_ids" not in inputs:
        assert differing_rows_valid(ours.ids.cpu(), logits, bias, options, inputs) <= max(1, logits.shape[0] // 50)
        fixed["replay_ids"] = ours.ids.cpu()
    else:
        assert torch.equal(ours.ids.cpu(), shape.ids)
        assert ours.events.tolist() == shape.events.tolist()
    narrow, d_narrow = run(logits.float(), bias, options, grads, **fixed)
    wide, d_wide = run(logits.double(), bias, options, grads, **fixed)
    assert torch.equal(ours.counts.cpu(), wide.counts)
    assert (ours.aux_counts.cpu() - wide.aux_counts).abs().sum() <= 2 * max(1, logits.shape[0] // 50)
    assert torch.equal(ours.map.cpu(), wide.map)
    for name in ("weights", "score_sum", "z_sum", "scores"):
        close(name, getattr(ours, name), getattr(narrow, name), getattr(wide, name))
    close("probs", ours.probs, narrow.probs.to(ours.probs.dtype), wide.probs)
    close("d_logits", d_ours, d_narrow.to(d_ours.dtype), d_wide)
    return ours


def differing_rows_valid(
    ids: Tensor, logits: Tensor, bias: Tensor | None, options: dict[str, Any], inputs: dict[str, Any]
) -> int:
    kept = {name: value for name, value in options.items() if name not in ALL}
    valid = inputs.get("valid")
    if valid is None:
        return differing_rows(ids, logits, bias, kept)
    assert (ids[~valid] == -1).all()
    return differing_rows(ids[valid], logits[valid], bias, kept)
