"""Inject faults into expert-parallel training over gloo and judge what the surviving ranks report.

    python scripts/faults.py --n 200 --deadline 2 --seed 0 [--ranks 3] [--jobs 2] [--kinds kill,stop] [--json F]
    python scripts/faults.py --backend nvlink   # its windows, in memory that the processes share; or nvlink:dense

Each injection starts a group of ranks that train two MoE layers, and breaks one of them at a random step, layer and
place (before the dispatch, inside the experts, in backward):

    kill        SIGKILL                       exit        os._exit
    stop        SIGSTOP                       sleep       busy for longer than the deadline
    exception   raised between two halves     size        dispatches rows of another width
    skip_layer  leaves one layer out          wrong_step  counts one step more than the others

A survivor passes when it raises DispatchTimeout or RankMismatch that names the step, the phase and the victim within
deadline + 2 s of the injection (plus `--slack` for a busy machine) and its process then ends. Anything else is a
failure: no error (wrong data), an untyped error, a wrong name, a hang. Exit code 0 when every survivor of every
injection passed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

KINDS = ("kill", "exit", "stop", "sleep", "exception", "size", "skip_layer", "wrong_step")
PLACES = ("dispatch", "experts", "backward")
LAYERS, STEPS, TOKENS, HIDDEN, EXPERTS = 2, 4, 6, 8, 12
GRACE_S = 2.0


@dataclass(frozen=True)
class Injection:
    """What happens to whom, where and when."""

    kind: str
    victim: int
    place: str
    layer: int
    step: int


@dataclass
class Outcome:
    """How the survivors took it; `problems` is empty when all passed."""

    injection: Injection
    latencies_s: list[float] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def draw(rng: random.Random, *, kind: str, ranks: int) -> Injection:
    place = rng.choice(PLACES) if kind in ("kill", "exit", "stop", "sleep", "exception") else "dispatch"
    return Injection(kind, rng.randrange(ranks), place, rng.randrange(LAYERS), rng.randrange(1, STEPS - 1))


# ---- in the ranks -------------------------------------------------------------------------------------------------


class Fault(Exception):
    """The exception that a faulty model raises."""


def strike(kind: str, *, deadline_s: float) -> None:
    """Faults that hit the whole process."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(7)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "sleep":
        time.sleep(deadline_s + GRACE_S + 3)
        os._exit(0)
    if kind == "exception":
        raise Fault("a bug in the model")


def worker(
    rank: int, ranks: int, port: int, injection: Injection, deadline_s: float, backend: str, report: Connection
) -> None:
    """Train until the fault; send ("injected", time) or ("raised", type, text, time)."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=deadline_s + 2))
    try:
        train(rank, ranks, injection, deadline_s, backend, report)
        report.send(("finished", "", "", time.time()))
    except Exception as error:
        report.send(("raised", type(error).__name__, str(error), time.time()))


def train(rank: int, ranks: int, injection: Injection, deadline_s: float, backend: str, report: Connection) -> None:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh

    from moe_layer.config.model import DispatchConfig, ExpertsConfig, MoEConfig, RouterConfig
    from moe_layer.layer import MoELayer
    from moe_layer.parallel import parallelize, sync_gradients

    torch.manual_seed(0)
    backend, _, push = backend.partition(":")
    keys = {"max_tokens_per_rank": TOKENS, "push": push or "slots"} if backend == "nvlink" else {}
    config = MoEConfig(
        hidden_size=HIDDEN,
        router=RouterConfig(num_experts=EXPERTS, top_k=2),
        experts=ExpertsConfig(intermediate_size=4),
        dispatch=DispatchConfig(backend=backend, deadline_s=deadline_s, **keys),  # type: ignore[arg-type]
    )
    model = nn.ModuleList(MoELayer(config) for _ in range(LAYERS))
    context = parallelize(model, init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "ep")))
    for step in range(STEPS):
        mine = rank == injection.victim and step == injection.step
        if mine and injection.kind == "wrong_step":
            report.send(("injected", "", "", time.time()))
            context.step += 1
        x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        for index, layer in enumerate(model):
            here = mine and index == injection.layer
            x = faulty_layer(layer, x, injection, deadline_s, report) if here else x + layer(x)
        x.sum().backward()
        sync_gradients(model)
        for parameter in model.parameters():
            parameter.grad = None


def faulty_layer(layer: Any, x: Any, injection: Injection, deadline_s: float, report: Connection) -> Any:
    """This layer's forward on the victim."""
    import torch

    from moe_layer.types import Routing

    def hit(*_: Any) -> None:
        report.send(("injected", "", "", time.time()))
        strike(injection.kind, deadline_s=deadline_s)

    if injection.kind == "skip_layer":
        report.send(("injected", "", "", time.time()))
        return x
    if injection.kind == "size":
        report.send(("injected", "", "", time.time()))
        ids = torch.zeros(TOKENS, 2, dtype=torch.int64)
        layer.dispatcher.dispatch(
            x[:, : HIDDEN // 2], Routing.from_ids(ids, torch.ones(TOKENS, 2), num_experts=EXPERTS)
        )
    if injection.kind == "wrong_step":
        return x + layer(x)
    if injection.place == "dispatch":
        hit()
    if injection.place == "experts":
        layer.experts.register_forward_pre_hook(lambda module, inputs: hit())
    y = layer(x)
    if injection.place == "backward":
        y.register_hook(hit)
    return x + y


# ---- outside ------------------------------------------------------------------------------------------------------


def inject(injection: Injection, *, ranks: int, deadline_s: float, slack_s: float, backend: str) -> Outcome:
    """Run one injection to its end. The store lives here, as with torchrun, not in a rank."""
    import torch.distributed as dist

    context = multiprocessing.get_context("forkserver")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(
            target=worker,
            args=(rank, ranks, store.port, injection, deadline_s, backend, pipes[rank][1]),
            daemon=True,
        )
        for rank in range(ranks)
    ]
    outcome = Outcome(injection)
    try:
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        survivors = [rank for rank in range(ranks) if rank != injection.victim]
        reports, injected = collect(
            [receiver for receiver, _ in pipes], survivors, limit_s=deadline_s + 30 + slack_s, injection=injection
        )
        judge(outcome, reports, injected, survivors=survivors, limit_s=deadline_s + GRACE_S + slack_s)
        for rank in survivors:
            processes[rank].join(deadline_s + 5 + slack_s)
            if processes[rank].is_alive():
                outcome.problems.append(f"rank {rank} raised but its process does not end")
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    return outcome


def collect(
    receivers: list[Connection], survivors: list[int], *, limit_s: float, injection: Injection
) -> tuple[dict[int, tuple[Any, ...]], float | None]:
    """Each survivor's last report, and when the fault struck."""
    reports: dict[int, tuple[Any, ...]] = {}
    injected = None
    open_pipes = dict(zip(receivers, range(len(receivers)), strict=True))
    until = time.monotonic() + limit_s
    while open_pipes and not all(rank in reports for rank in survivors) and time.monotonic() < until:
        for ready in wait(list(open_pipes), timeout=0.2):
            rank = open_pipes[ready]  # type: ignore[index]
            try:
                message = ready.recv()  # type: ignore[union-attr]
            except EOFError:
                del open_pipes[ready]  # type: ignore[arg-type]
                continue
            if message[0] == "injected":
                injected = message[3]
            else:
                reports[rank] = message
    return reports, injected


def judge(
    outcome: Outcome,
    reports: dict[int, tuple[Any, ...]],
    injected: float | None,
    *,
    survivors: list[int],
    limit_s: float,
) -> None:
    injection = outcome.injection
    if injected is None:
        outcome.problems.append("the fault was never injected: the ranks failed before")
    for rank in survivors:
        if rank not in reports:
            outcome.problems.append(f"rank {rank} hangs or vanished without an error")
            continue
        what, kind, text, at = reports[rank]
        outcome.messages.append(f"rank {rank}: {kind}: {text}")
        if what != "raised" or kind not in ("DispatchTimeout", "RankMismatch"):
            outcome.problems.append(f"rank {rank} {what} {kind} {text}".strip())
            continue
        victim = injection.victim
        names = [f"ranks [{victim}] of"] if kind == "DispatchTimeout" else [f"rank {victim} {v}" for v in ("has", "is")]
        named = any(name in text for name in names)
        if not named or "phase" not in text or "step" not in text:
            outcome.problems.append(f"rank {rank} does not name rank {victim}, step and phase: {text}")
        if injected is not None:
            outcome.latencies_s.append(at - injected)
            if at - injected > limit_s:
                outcome.problems.append(f"rank {rank} raised after {at - injected:.1f} s, limit {limit_s:.1f} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16, help="injections")
    parser.add_argument("--deadline", type=float, default=2.0, help="dispatch.deadline_s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="injections at a time")
    parser.add_argument("--slack", type=float, default=2.0, help="seconds more for a busy machine")
    backends = ("all_to_all", "nvlink", "nvlink:dense")
    parser.add_argument("--backend", choices=backends, default="all_to_all", help="dispatch.backend, dispatch.push")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--json", type=Path, help="write every outcome here")
    args = parser.parse_args(arguments)
    kinds = args.kinds.split(",")
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or args.n < 1 or not 2 <= args.ranks or EXPERTS % args.ranks:
        parser.error(f"kinds are {', '.join(KINDS)}; n >= 1; ranks must divide {EXPERTS}; got {unknown or args.ranks}")
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch.distributed.tensor", "moe_layer.layer", "moe_layer.parallel"]
    )
    rng = random.Random(args.seed)
    injections = [draw(rng, kind=kinds[i % len(kinds)], ranks=args.ranks) for i in range(args.n)]

    def one(injection: Injection) -> Outcome:
        return inject(injection, ranks=args.ranks, deadline_s=args.deadline, slack_s=args.slack, backend=args.backend)

    outcomes = []
    with ThreadPoolExecutor(args.jobs) as threads:
        for outcome in threads.map(one, injections):
            outcomes.append(outcome)
            where = outcome.injection
            verdict = "FAILED" if outcome.problems else f"ok, {max(outcome.latencies_s, default=0):.2f} s"
            place = f"rank {where.victim} step {where.step} layer {where.layer} {where.place:8s}"
            print(f"{where.kind:10s} {place} {verdict}", flush=True)
            for problem in outcome.problems:
                print(f"    {problem}")
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    slowest = max((max(outcome.latencies_s, default=0.0) for outcome in outcomes), default=0.0)
    passed = f"{len(outcomes) - failed}/{len(outcomes)} injections reported by every survivor"
    print(f"faults: {passed}, slowest {slowest:.2f} s (deadline {args.deadline:g} s)")
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
