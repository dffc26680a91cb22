"""Two processes with NCCL as their default group, for what `tests.distributed.pool` (gloo by default) cannot show.

One pair runs every scenario, because a start takes ten seconds; the last one leaves rank 0 with an aborted group and
must still let the process end. `device="cpu"` runs the same over gloo.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import DispatchTimeout
from moe_layer.parallel import ParallelContext, clip_grad_norm, compat, parallelize, sync_gradients
from moe_layer.parallel.fsdp import shard_rest
from moe_layer.types import Routing
from tests.distributed.cases import config_for
from tests.distributed.test_parallelize import B, Model, config, data

DEADLINE_S = 3.0
STAYS_AWAY_S = 12.0
EXIT_CODE = 7  # of the survivor, which ends by an ordinary SystemExit


@dataclass(frozen=True)
class Outcome:
    """What the two ranks put into the queue, their exit codes, and when rank 0's process ended after its error."""

    found: dict[tuple[int, str], Any]
    exit_codes: tuple[int | None, int | None]
    exit_after_error_s: float


def gradients(model: Model, share: slice, *, average: bool, device: str) -> tuple[dict[str, Tensor], float]:
    (model(data(0)[share].to(device)) - 1).square().mean().backward()
    if average:
        sync_gradients(model)
    norm = float(clip_grad_norm(model, math.inf))
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).cpu()
    return found, norm


def fsdp_and_experts(rank: int, device: str, backend: str) -> dict[str, float]:
    """Relative errors of all gradients and of the norm against one process on the same device."""
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    want, want_norm = gradients(Model(config()).to(device), slice(None), average=False, device=device)
    mesh = init_device_mesh(torch.device(device).type, (2,), mesh_dim_names=("ep",))
    model = Model(config(backend)).to(device)
    context = parallelize(model, mesh)
    shard_rest(model, mesh, modules=model.blocks)
    half = B // 2
    found, norm = gradients(model, slice(rank * half, (rank + 1) * half), average=True, device=device)
    context.close()
    errors = {
        name: float((found[name] - value).norm() / value.norm()) if float(value.norm()) else float(found[name].norm())
        for name, value in want.items()
    }
    return errors | {"norm": abs(norm - want_norm) / want_norm}


def call_options(rank: int, device: str, backend: str) -> list[str]:
    """`num_tokens`, `out` and `x_scale` over two ranks, each against the plain call; names of what was compared.

    Two backends, in the run of the default one.
    """
    if backend != "auto":
        return []
    store = compat.prefixed(compat.default_store(), "options")
    context = ParallelContext(dist.group.WORLD, ep_rank=rank, ep_size=2, device=device, store=store)
    T, D, E, K, pads, done = 24, 128, 8, 2, 5, []
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(T + pads, D, generator=generator).to(device)
    ids = torch.rand(T + pads, E, generator=generator).topk(K).indices.to(device)
    weights = torch.rand(T + pads, K, generator=generator).to(device)
    scale = x.abs().amax(1, keepdim=True) / 448.0
    x8 = (x / scale).to(torch.float8_e4m3fn)
    for backend in ("all_to_all", "nvlink"):
        for rows in ("expert_major", "compact"):
            settings = config_for(backend, rows=rows, deadline_s=20.0)
            dispatcher = make_dispatcher(settings, num_experts=E, top_k=K, context=context)

            def run(n: int, dispatcher: Any = dispatcher, **options: Any) -> Tensor:
                routing = Routing.from_ids(ids[:n], weights[:n], num_experts=E)
                received = dispatcher.dispatch(x[:n], routing, **options)
                index = received.index_N
                got = received.rows if index is None else received.rows.index_select(0, index)
                return dispatcher.combine(torch.tanh(got) * received.probs_N.unsqueeze(1), received)

            want = run(T)
            padded = run(T + pads, num_tokens=torch.tensor(T, device=device))
            assert torch.equal(padded[:T], want) and not padded[T:].any(), f"{backend} {rows} num_tokens"
            buffer = torch.empty(2 * (T + pads) * K, D, device=device)
            assert torch.equal(run(T, out=buffer), want), f"{backend} {rows} out"
            plain = dispatcher.dispatch(x, Routing.from_ids(ids, weights, num_experts=E))
            received = dispatcher.dispatch(x8, Routing.from_ids(ids, weights, num_experts=E), x_scale=scale)
            exact = (plain.rows / (plain.rows.abs().amax(1, keepdim=True) / 448.0)).to(torch.float8_e4m3fn)
            used = int(received.offsets_L1[-1]) if rows == "expert_major" else exact.shape[0]
            assert torch.equal(received.rows.view(torch.uint8)[:used], exact.view(torch.uint8)[:used])
            done.append(f"{backend} {rows}")
    return done


def missing_rank(rank: int, device: str, backend: str) -> tuple[str, float]:
    """Rank 1 stays away from a dispatch; rank 0's error and the seconds until it came."""
    timeout_s = DEADLINE_S + (1.0 if device == "cpu" else 30.0)  # as parallelize
    group = compat.new_group([0, 1], backend=None, timeout_s=timeout_s)
    store = compat.prefixed(compat.default_store(), "missing")
    context = ParallelContext(group, ep_rank=rank, ep_size=2, device=device, store=store, owned=(group,))
    sizes = {"num_experts": 8, "top_k": 2}
    settings = config_for(backend, deadline_s=DEADLINE_S)
    dispatcher = make_dispatcher(settings, context=context, layer_index=4, **sizes)
    routing = Routing.from_ids(
        torch.arange(12, device=device).view(6, 2) % 8, torch.ones(6, 2, device=device), num_experts=8
    )
    dispatcher.dispatch(torch.ones(6, 8, device=device), routing)  # both are there
    if rank == 1:
        time.sleep(STAYS_AWAY_S)
        return "stayed away", STAYS_AWAY_S
    began = time.monotonic()
    try:
        dispatcher.dispatch(torch.ones(6, 8, device=device), routing)
    except DispatchTimeout as error:
        return str(error), time.monotonic() - began
    return "no error", time.monotonic() - began


def _rank(rank: int, folder: str, device_type: str, moe_backend: str, results: Any) -> None:
    device = f"cuda:{rank}" if device_type == "cuda" else "cpu"
    torch.set_num_threads(1)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for scenario in (fsdp_and_experts, call_options, missing_rank):
        try:
            results.put((rank, scenario.__name__, scenario(rank, device, moe_backend)))
        except Exception:
            results.put((rank, scenario.__name__, traceback.format_exc()))
            break
    results.close()
    results.join_thread()
    if rank == 0:
        raise SystemExit(EXIT_CODE)


def run_pair(device_type: str, *, limit_s: float, backend: str = "auto") -> Outcome:
    """Start the pair, collect its results, wait for rank 0 to end by itself; whoever is left is killed.

    `backend`: `dispatch.backend` of the scenarios.
    """
    context = multiprocessing.get_context("spawn")
    results, found = context.Queue(), {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(r, folder, device_type, backend, results), daemon=True) for r in (0, 1)
        ]
        for process in ranks:
            process.start()
        try:
            until = time.monotonic() + limit_s
            while (0, "missing_rank") not in found:
                rank, name, value = results.get(timeout=max(until - time.monotonic(), 0.1))
                found[rank, name] = value
            began = time.monotonic()
            ranks[0].join(10.0)
            seconds = time.monotonic() - began
            ranks[1].join(STAYS_AWAY_S + 10.0)
        finally:
            codes = (ranks[0].exitcode, ranks[1].exitcode)
            for process in ranks:
                process.kill()
                process.join()
    return Outcome(found, codes, seconds)
