"""The nvlink dispatcher between processes that share memory, as GPUs of one host do over NVLink."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import CapacityError, DispatchTimeout
from moe_layer.ops import ep, ep_model
from moe_layer.parallel import compat, parallelize
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import Result, assert_same_bits, config_for, joined, make_case, run_case
from tests.distributed.pool import Pool
from tests.distributed.test_parallelize import D, Model, config

pytestmark = pytest.mark.dist


def _context(size: int, name: str, deadline_s: float = 20.0) -> ParallelContext:
    """This process's EP group: the world in blocks of `size`, each with windows of its own."""
    me, world = dist.get_rank(), dist.get_world_size()
    blocks = [list(range(first, first + size)) for first in range(0, world, size)]
    groups = [compat.new_group(block, backend="gloo", timeout_s=deadline_s + 1) for block in blocks]
    mine = me // size
    store = compat.prefixed(compat.default_store(), f"{name}/{mine}")
    owned = (groups[mine],)
    return ParallelContext(groups[mine], ep_rank=me % size, ep_size=size, store=store, owned=owned)


# ---- bits -----------------------------------------------------------------------------------------------------------

KEYS: list[dict[str, Any]] = [
    {},
    {"rows": "compact", "apply_probs": "combine"},
    {"alignment": 8},
    {"capacity": "static", "static_factor": 3.0},
    {"dispatch_format": "fp8_1x128"},
    {"apply_probs": "source"},
]


def all_options(size: int) -> list[Result]:
    context = _context(size, f"options{size}")
    case = make_case(size, T=26, D=16, E=16, K=4)
    found = [run_case(case, config_for("nvlink", **keys), context) for keys in KEYS]
    context.close()
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_bits(pool: Pool, size: int) -> None:
    """Every option gives the bits of one rank; at size 2 two groups work side by side."""
    case = make_case(size, T=26, D=16, E=16, K=4)
    answers = pool.run(all_options, size)
    for first in range(0, 4, size):
        for i, keys in enumerate(KEYS):
            same = {name: value for name, value in keys.items() if name in ("apply_probs", "dispatch_format")}
            got = joined([answer[i] for answer in answers[first : first + size]])
            assert_same_bits(got, run_case(case, DispatchConfig(**same)))


def _cuts(step: int) -> list[int]:
    """Tokens of four ranks at a step: any split, zero on one or all ranks."""
    g = torch.Generator().manual_seed(step)
    total = int(torch.randint(0, 50, (), generator=g)) if step % 10 else 0
    return [0, *sorted(torch.randint(0, total + 1, (3,), generator=g).tolist()), total]


def uneven_steps() -> list[Result]:
    context = _context(4, "uneven")
    found = []
    for step in range(50):
        context.step, cuts = step, _cuts(step)
        case = make_case(step, T=cuts[-1], D=8, E=8, K=3, absent=0.3)
        settings = config_for("nvlink", rows=("expert_major", "compact")[step % 2])
        found.append(run_case(case, settings, context, cuts=cuts))
    context.close()
    return found


def test_uneven_and_empty_ranks_over_50_steps(pool: Pool) -> None:
    answers = pool.run(uneven_steps)
    cuts = [_cuts(step) for step in range(50)]
    assert any(c[-1] == 0 for c in cuts) and any(a == b for c in cuts for a, b in itertools.pairwise(c) if c[-1])
    for step in range(50):
        case = make_case(step, T=cuts[step][-1], D=8, E=8, K=3, absent=0.3)
        assert_same_bits(joined([answer[step] for answer in answers]), run_case(case, DispatchConfig()))


# ---- a rank that dies in the middle of a send -----------------------------------------------------------------------

VICTIM, DEADLINE_S = 2, 1.0


def half_a_send(how: int, phase: str, push: str) -> tuple[str, float, list[bool], str]:
    """The victim writes one chunk of its rows and is gone. The others: error, seconds, NaN outputs, next error."""
    context = _context(4, f"dies{how}{phase}{push}", DEADLINE_S)
    case = make_case(3, T=80, D=8, E=8, K=3, absent=0.0)
    mine = slice(20 * context.ep_rank, 20 * context.ep_rank + 20)
    settings = config_for("nvlink", deadline_s=DEADLINE_S, push=push)
    run_case(case, settings, context)
    dispatcher = make_dispatcher(settings, num_experts=8, top_k=3, context=context)
    send_rows, outputs = ep_model.Trip.send_rows, []

    def one_chunk(trip: Any, rows_of: Any, counts: list[int], *, epoch: Tensor) -> None:
        if context.ep_rank == VICTIM and trip.words["phase"] == ("dispatch", "combine").index(phase):
            send_rows(trip, rows_of, [min(count, trip.words["chunk_rows"]) for count in counts], epoch=epoch)
            os.kill(os.getpid(), how)
        send_rows(trip, rows_of, counts, epoch=epoch)

    def noted(op: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = op(*args, **options)
            outputs.append(options["out"] if "out" in options else result[0])
            return result

        return call

    ep_model.Trip.send_rows = one_chunk  # type: ignore[method-assign]
    expand, home = ep.ep_expand, ep.ep_home
    ep.ep_expand, ep.ep_home = noted(expand), noted(home)
    routing = Routing.from_ids(case.ids_TK[mine], case.w_TK[mine], num_experts=8)
    began, errors = time.monotonic(), []
    try:
        for _ in range(2):
            try:
                received = dispatcher.dispatch(case.x_TD[mine], routing)
                dispatcher.combine(received.rows, received)
            except DispatchTimeout as error:
                errors.append((str(error), time.monotonic() - began))
    finally:
        ep_model.Trip.send_rows, ep.ep_expand, ep.ep_home = send_rows, expand, home  # type: ignore[method-assign]
    return *errors[0], [bool(out.isnan().all()) for out in outputs], errors[1][0]


@pytest.mark.parametrize(
    ("how", "phase", "push"),
    [
        (signal.SIGKILL, "dispatch", "slots"),
        (signal.SIGSTOP, "combine", "slots"),
        (signal.SIGKILL, "dispatch", "dense"),
    ],
)
def test_a_rank_dies_in_the_middle_of_a_send(how: int, phase: str, push: str) -> None:
    pool = Pool(4)
    try:
        answers = pool.run(half_a_send, int(how), phase, push, timeout_s=60.0, lost=VICTIM)
    finally:
        pool.close()
    for rank, answer in enumerate(answers):
        if rank == VICTIM:
            continue
        text, seconds, nan, again = answer
        assert f"layer 0, step 0, phase {phase} on rank {rank}: ranks [{VICTIM}] of 4 did not report" in text
        assert f"rank {VICTIM} reached epoch" in text
        assert seconds < DEADLINE_S + 2.0, seconds
        # the rows of a dense push come before its headers: without these there is nothing to fill
        want = [False, True] if phase == "combine" else [True] if push == "slots" else []
        assert nan == want, "what did not arrive whole is NaN, whole"
        assert "unusable since" in again


# ---- lifetime -------------------------------------------------------------------------------------------------------


def come_and_go(times: int) -> tuple[int, int, set[Any]]:
    """Build, step, close, over and over; mappings and files of the windows that are left, sums of the outputs."""
    sums = set()
    for turn in range(times):
        model = Model(config("nvlink"))
        context = parallelize(model, init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "ep")))
        x = torch.randn(3, D, generator=torch.Generator().manual_seed(dist.get_rank()))
        y = model(x)
        if turn % 2:
            y.sum().backward()
        sums.add(float(y.detach().sum()))
        if turn % 3:
            context.close()  # otherwise the context goes with the model
        del model, context, y
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("/dev/shm/moe_layer")
    return maps, len(list(Path("/dev/shm").glob(f"moe_layer_{os.getpid()}_*"))), sums


def test_create_and_destroy_20_times(pool: Pool) -> None:
    for maps, files, sums in pool.run(come_and_go, 20):
        assert (maps, files) == (0, 0) and len(sums) == 1


def window_bytes() -> tuple[int, int]:
    gc.collect()  # what other tests left
    context = _context(4, "bytes")
    d: Any = make_dispatcher(config_for("nvlink"), num_experts=8, top_k=2, context=context)
    promised = d.buffer_bytes(16, torch.float32)
    run_case(make_case(0, T=8, D=16, E=8, K=2), config_for("nvlink"), context)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/moe_layer" in line]
    sizes = {line[5]: 0 for line in lines}
    for line in lines:
        first, last = (int(part, 16) for part in line[0].split("-"))
        sizes[line[5]] += last - first
    context.close()
    (size,) = set(sizes.values())
    assert len(sizes) == 4, f"one's own window and those of three peers, found {sizes}"
    return promised, size


def test_buffer_bytes_is_the_allocation(pool: Pool) -> None:
    for promised, made in pool.run(window_bytes):
        assert promised <= made < promised + 4096, "the kernel's maps are whole pages"


def too_large() -> tuple[str, int]:
    context = _context(4, "too large")
    case = make_case(0, T=8, D=16, E=8, K=2)
    try:
        run_case(case, config_for("nvlink", max_tokens_per_rank=10**10), context)
    except CapacityError as error:
        return str(error), len(list(Path("/dev/shm").glob(f"moe_layer_{os.getpid()}_*")))
    finally:
        context.close()
    return "no error", 0


def test_a_window_that_does_not_fit_is_an_error(pool: Pool) -> None:
    """Not a SIGBUS at the first write."""
    for text, files in pool.run(too_large):
        assert "does not fit into /dev/shm" in text and "lower dispatch.max_tokens_per_rank" in text and files == 0


def tensors_of(model: Model) -> dict[str, Tensor]:
    return {name: p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for name, p in model.named_parameters()}


def gradients(backend: str, ep_size: int) -> tuple[float, dict[str, Tensor]]:
    """A whole model over `parallelize`: this rank's loss and gradients (local parts)."""
    model = Model(config(backend))
    mesh = init_device_mesh("cpu", (4 // ep_size, ep_size), mesh_dim_names=("dp", "ep"))
    context = parallelize(model, mesh)
    x = torch.randn(2 + dist.get_rank(), D, generator=torch.Generator().manual_seed(dist.get_rank()))
    loss = (model(x) - 1).square().mean()
    loss.backward()
    found = {name: gradient.clone() for name, gradient in tensors_of(model).items() if gradient is not None}
    context.close()
    return float(loss), found


@pytest.mark.parametrize("ep_size", [2, 4])
def test_parallelized_model_gives_the_bits_of_all_to_all(pool: Pool, ep_size: int) -> None:
    pairs = zip(pool.run(gradients, "nvlink", ep_size), pool.run(gradients, "all_to_all", ep_size), strict=True)
    for (loss, got), (want_loss, want) in pairs:
        assert loss == want_loss and got.keys() == want.keys() and len(got) > 10
        for name, value in want.items():
            assert torch.equal(got[name], value), name
