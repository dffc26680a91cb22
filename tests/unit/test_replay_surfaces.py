"""What RL drivers call: Megatron's RouterReplay statics, mojo_opset's forced_expert_ids, and the command line."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_layer import RoutingDecision, RoutingError, RoutingSession, RoutingTrace
from moe_layer.cli import main
from moe_layer.compat.megatron_replay import RouterReplay, RouterReplayAction
from moe_layer.compat.mojo_opset import MojoMoE
from moe_layer.config import ReplayConfig
from moe_layer.replay import compare
from tests.unit.replay_models import LAYERS, D, E, K, T, assert_same, grads, make_model, make_trace, random_ids

RECORD, FORWARD, BACKWARD = RouterReplayAction
SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.fixture(autouse=True)
def _detached() -> Iterator[None]:
    yield
    RouterReplay.clear_global_router_replay_instances()


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(seed))


def layers_of(seed: int) -> list[torch.Tensor]:
    return list(random_ids(seed=seed).unbind(1))


def explicit(model: Any, x: torch.Tensor, ids: list[torch.Tensor], run: Any = None) -> torch.Tensor:
    for block, ids_TK in zip(model.blocks, ids, strict=True):
        x = x + block.moe(block.norm(x), replay=RoutingDecision(ids_TK))
    return x


# ---- Megatron -------------------------------------------------------------------------------------------------------


def test_the_statics_are_megatrons() -> None:
    """Every public name of the real class exists with the same arguments."""
    import inspect

    real = pytest.importorskip("megatron.core.transformer.moe.router_replay", reason="the surface we imitate")
    for name, value in vars(real.RouterReplay).items():
        if name.startswith("_") or name == "get_replay_topk":  # Megatron's own hook into its router
            continue
        ours = getattr(RouterReplay, name)
        if callable(getattr(real.RouterReplay, name)):
            expected = list(inspect.signature(value.__func__ if isinstance(value, staticmethod) else value).parameters)
            found = [p for p in inspect.signature(ours).parameters.values() if p.name != "self"]
            wanted = [p for p in expected if p != "self"]
            assert [p.name for p in found[: len(wanted)]] == wanted, name
            assert all(p.default is not p.empty for p in found[len(wanted) :]), f"{name}: extras are optional"
    assert {a.name: a.value for a in real.RouterReplayAction} == {a.name: a.value for a in RouterReplayAction}


def test_r2_as_verl_drives_it() -> None:
    """Record in the old-logprob pass, harvest per micro-batch, replay forward and recompute in 1F1B order."""
    model = make_model()
    RouterReplay.attach(model)
    RouterReplay.set_global_router_replay_action(RECORD)
    recorded = []
    for index in range(2):
        with torch.no_grad():
            model(batch(index))
        recorded.append(RouterReplay.get_recorded_data())
    RouterReplay.clear_global_indices()
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.weight.add_(0.3 * torch.randn_like(block.moe.router.weight))

    def run(block: Any, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False)

    losses = []
    for index in range(2):
        RouterReplay.set_replay_data(recorded[index])
        RouterReplay.set_global_router_replay_action(FORWARD)
        losses.append(model(batch(index), run).square().sum())
    for loss in losses:
        RouterReplay.set_global_router_replay_action(BACKWARD)
        loss.backward()
    RouterReplay.clear_global_router_replay_action()
    found = grads(model)
    for index in range(2):
        explicit(model, batch(index), [ids for ids in recorded[index] if ids is not None]).square().sum().backward()
    assert_same(found, grads(model))
    assert torch.equal(model(batch()), copy.deepcopy(model)(batch())), "cleared: live again, and copies have no tap"


def test_r3_as_verl_drives_it() -> None:
    """The rollout's ids, S-1 rows padded with zeros; a mask keeps the last row of each sequence native."""
    model, x = make_model(), batch()
    RouterReplay.attach(model)
    assert RouterReplay.router_instances is RouterReplay.global_router_replay_instances
    mask = torch.ones(T, dtype=torch.bool)
    mask[[T // 2 - 1, T - 1]] = False
    ids = [torch.where(mask.unsqueeze(1), layer, 0) for layer in layers_of(4)]

    def run(block: Any, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(block, x, use_reentrant=False)

    for router, target in zip(RouterReplay.router_instances, ids, strict=True):
        router.set_target_indices(target, replay_mask=mask)
    RouterReplay.set_global_router_replay_action(FORWARD)
    y = model(x, run)
    RouterReplay.set_global_router_replay_action(BACKWARD)
    y.square().sum().backward()
    RouterReplay.clear_global_router_replay_action()
    found = grads(model)
    expected = explicit(model, x, [torch.where(mask.unsqueeze(1), layer, -1) for layer in ids])
    expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert_same(found, grads(model))
    for wrong in (mask[:-1], mask.int()):
        with pytest.raises(ValueError, match=rf"replay_mask must be bool \[{T}\]"):
            RouterReplay.router_instances[0].set_target_indices(ids[0], wrong)
    RouterReplay.clear_global_indices()
    assert RouterReplay.router_instances[0].target_replay_mask is None


@pytest.mark.parametrize("kind", SIGNED + UNSIGNED)
def test_megatron_takes_ids_of_any_integer_dtype(kind: torch.dtype) -> None:
    """SGLang's uint16 and verl's int16 reach the routers as they came."""
    model, x = make_model(), batch()
    RouterReplay.attach(model)
    RouterReplay.set_replay_data([ids.to(kind) for ids in layers_of(5)])
    RouterReplay.set_global_router_replay_action(FORWARD)
    y = model(x)
    RouterReplay.clear_global_router_replay_action()
    assert torch.equal(y, explicit(model, x, layers_of(5)))


def test_megatron_static_buffer() -> None:
    model = make_model()
    RouterReplay.attach(model)
    buffer = torch.zeros(T + 2, 2, K, dtype=torch.int32)
    RouterReplay.set_global_static_buffers(buffer)
    RouterReplay.set_global_router_replay_action(RECORD)
    model(batch())
    assert all(torch.equal(ids, buffer[:T, i]) for i, ids in enumerate(RouterReplay.get_recorded_data()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be \[max_tokens, 2, K\]"):
        RouterReplay.set_global_static_buffers(buffer[:, :1])


def test_megatron_raises_where_the_original_is_silent() -> None:
    model = make_model()
    RouterReplay.attach(model)
    with pytest.raises(RoutingError, match="is attached to this model"):
        RouterReplay.attach(model)
    with pytest.raises(RoutingError, match="is attached to this model"):
        RoutingSession(model)
    with pytest.raises(ValueError, match=r"\(1\) does not match instances \(2\)"):
        RouterReplay.set_replay_data(layers_of(0)[:1])
    RouterReplay.set_global_router_replay_action(FORWARD)
    with pytest.raises(RoutingError, match="no target indices"):
        model(batch())
    RouterReplay.set_replay_data([ids[:-1] for ids in layers_of(0)])
    with pytest.raises(RoutingError, match=rf"must be integers \[{T}, {K}\]"):
        model(batch())
    RouterReplay.set_replay_data(layers_of(0))
    with pytest.raises(RoutingError, match=r"got replay=\.\.\. under REPLAY_FORWARD; use one of them"):
        model.blocks[0].moe(batch(), replay=layers_of(1)[0])
    RouterReplay.clear_global_indices()
    RouterReplay.set_global_router_replay_action(BACKWARD)
    with pytest.raises(RoutingError, match="nothing left to replay"):
        model(batch())
    RouterReplay.set_global_router_replay_action(FORWARD)
    losses = []
    for seed in range(2):
        RouterReplay.set_replay_data(layers_of(seed))
        losses.append(model(batch(), lambda b, x: checkpoint(b, x, use_reentrant=False)).sum())
    with pytest.raises(RoutingError, match="set REPLAY_BACKWARD before the backward"):
        (losses[0] + losses[1]).backward()
    RouterReplay.clear_global_indices()
    RouterReplay.set_replay_data(layers_of(0))
    loss = model(batch(), lambda b, x: checkpoint(b, x, use_reentrant=False)).sum()
    RouterReplay.clear_global_router_replay_action()
    with pytest.raises(RoutingError, match="recomputes without an action while 1 micro-batches"):
        loss.backward()
    RouterReplay.clear_global_indices()
    model(batch(), lambda b, x: checkpoint(b, x, use_reentrant=False)).sum().backward()  # live


# ---- mojo_opset -----------------------------------------------------------------------------------------------------


def mojo(dtype: torch.dtype = torch.float32, **settings: Any) -> MojoMoE:
    return MojoMoE(make_model(aux=False, **settings).blocks[0].moe.to(dtype))


@pytest.mark.parametrize("kind", SIGNED + UNSIGNED)
@pytest.mark.parametrize("flat", [False, True])
def test_forced_ids_of_any_integer_dtype(kind: torch.dtype, flat: bool) -> None:
    moe, x = mojo(), batch()
    ids = random_ids(layers=1)[:, 0]
    expected = moe.layer(x, replay=ids)
    assert torch.equal(moe(x, (ids if flat else ids.view(2, -1, K)).to(kind)), expected)
    assert torch.equal(moe(x), moe.layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_forced_gate_weights_are_fp32_on_every_backend(dtype: torch.dtype, backend: str) -> None:
    from dataclasses import replace

    from moe_layer import MoELayer
    from tests.unit.replay_models import config

    settings = config(aux=False)
    layer = MoELayer(replace(settings, experts=replace(settings.experts, backend=backend))).to(dtype)  # type: ignore[arg-type]
    x, ids = batch().to(dtype), random_ids(layers=1)[:, 0]
    _, routing = layer(x, replay=ids, return_routing=True)
    scores = torch.softmax(routing.stats["logits"].double(), -1).gather(1, ids)
    assert routing.weights_TK.dtype == torch.float32
    torch.testing.assert_close(routing.weights_TK.double(), scores / scores.sum(1, keepdim=True), rtol=1e-6, atol=1e-7)
    assert MojoMoE(layer)(x, ids).dtype == dtype


def test_forced_ids_out_of_shape_or_range() -> None:
    moe, x = mojo(), batch()
    good = rf"must be \(2, {T // 2}, {K}\) or \({T}, {K}\), got "
    for shape in ((T, K + 1), (T - 1, K), (2, T // 2), (1, T, K)):
        with pytest.raises(ValueError, match=good):
            moe(x, torch.zeros(shape, dtype=torch.int64))
    for value in (E, -2):
        with pytest.raises(ValueError, match=rf"must lie in \[-1, {E}\)"):
            moe(x, torch.full((T, K), value))
    for kind in UNSIGNED:
        with pytest.raises(ValueError, match=rf"run from {E} to {E} and must lie in \[-1, {E}\)"):
            moe(x, torch.full((T, K), E).to(kind))
    for kind in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match="must be integers"):
            moe(x, torch.zeros(T, K, dtype=kind))
    for wrong in (5, [[0, 1]] * T):
        with pytest.raises(ValueError, match="must be a RoutingDecision or an integer tensor"):
            moe(x, wrong)


def test_forced_ids_with_gaps_never_repeat_an_expert() -> None:
    moe, x = mojo(), batch()
    ids = random_ids(layers=1)[:, 0]
    ids[:, 1] = -1
    _, routing = moe.layer(x, replay=ids, return_routing=True)
    moe(x, ids)
    assert bool((routing.ids_TK.sort(1).values.diff(dim=1) > 0).all())
    assert torch.equal(routing.ids_TK[:, 0], ids[:, 0].int())


def test_renormalisation_is_what_the_docstring_says() -> None:
    x, ids = batch(), random_ids(layers=1)[:, 0]
    pre = {"softmax_order": "pre", "renormalize": False}
    sums = {}
    for policy in ("router", "always"):
        layer = mojo(replay=ReplayConfig(renormalize=policy), **pre).layer  # type: ignore[arg-type]
        sums[policy] = layer(x, replay=ids, return_routing=True)[1].weights_TK.sum(1)
    assert bool((sums["router"] < 0.99).all())
    torch.testing.assert_close(sums["always"], torch.ones(T))


def test_strict_raises_what_was_only_counted() -> None:
    moe = mojo()
    moe.strict = True
    moe(batch(), random_ids(layers=1)[:, 0])
    moe.layer.router.faults[4] = 3  # what a CUDA forward would have left behind
    with pytest.raises(ValueError, match="3 replay ids outside"):
        moe(batch())


# ---- command line ---------------------------------------------------------------------------------------------------


def test_inspect_and_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    make_trace(cu_seqlens=[0, 5, T], notes={"engine": "x"}).save(path)
    assert main(["replay", "inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for part in (
        f"{T} in 2 sequences of 5 to 7",
        "8, top-2, ids as uint8",
        "2, blocks.0.moe",
        "engine=x",
        "version  3",
    ):
        assert part in text
    (tmp_path / "b.safetensors").write_bytes(path.read_bytes()[:-4])
    assert main(["replay", "validate", str(path), str(tmp_path / "b.safetensors")]) == 2
    text = capsys.readouterr().out
    assert "a.safetensors: ok" in text and "b.safetensors: DAMAGED: " in text
    ids = random_ids()
    ids[0] = -1
    RoutingTrace.from_ids(ids, num_experts=E, layers=LAYERS).save(path)
    assert main(["replay", "validate", str(path)]) == 0
    assert main(["replay", "validate", "--complete", str(path)]) == 2


@pytest.mark.parametrize("by", [0, 1, -2])
def test_differences_of_traces_against_loops(by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk, with missing slots."""
    monkeypatch.setattr(compare, "CHUNK", 7)
    pair = []
    for seed in range(2):
        ids = random_ids(40, top_k=3, seed=seed)
        ids[:9] = random_ids(9, top_k=3).flip(2) if seed else ids[:9]  # the same experts in another order
        ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.03] = -1
        pair.append(RoutingTrace.from_ids(ids, num_experts=E, layers=LAYERS))
    first, second = (trace.wide_ids().tolist() for trace in pair)
    both = list(zip(first[max(by, 0) :], second[max(-by, 0) :], strict=False))
    calls = [[(a, b) for a, b in zip(*token, strict=True) if min(a + b) >= 0] for token in both]
    rows = [call for token in calls for call in token]
    found = compare._difference(*pair, by=by)
    assert found.rows == len(rows) and 0 < found.mismatch < 1
    assert found.mismatch == pytest.approx(sum(set(a) != set(b) for a, b in rows) / len(rows))
    assert found.order_only == pytest.approx(sum(set(a) == set(b) and a != b for a, b in rows) / len(rows))
    assert found.overlap == pytest.approx(sum(len(set(a) & set(b)) for a, b in rows) / len(rows) / 3)
    assert found.zero_overlap == pytest.approx(sum(not set(a) & set(b) for a, b in rows) / len(rows))
    tokens = [token for token in calls if token]
    assert found.token_mismatch == pytest.approx(
        sum(any(set(a) != set(b) for a, b in token) for token in tokens) / len(tokens)
    )


def test_splice_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_trace(200, weights=None, token_ids=None)
    paths = {
        name: str(tmp_path / f"{name}.npz") for name in ("first", "later", "whole", "joined", "shifted", "swapped")
    }
    whole.save(paths["whole"])
    whole.rows(0, 90).save(paths["first"])
    whole.rows(90, 200).save(paths["later"])
    assert main(["replay", "splice", paths["first"], paths["later"], "--out", paths["joined"]]) == 0
    assert main(["replay", "compare", paths["whole"], paths["joined"]]) == 0
    assert "sets that differ       0.00%" in capsys.readouterr().out
    ids = whole.wide_ids()
    RoutingTrace.from_ids(ids.roll(1, 0), num_experts=E, layers=LAYERS).save(paths["shifted"])
    assert main(["replay", "compare", paths["whole"], paths["shifted"]]) == 1
    assert "when the second is moved by -1 tokens" in capsys.readouterr().out
    RoutingTrace.from_ids(ids.flip(2), num_experts=E, layers=LAYERS).save(paths["swapped"])
    assert main(["replay", "compare", paths["whole"], paths["swapped"]]) == 0
    assert "order alone differs    100.00%" in capsys.readouterr().out
    assert main(["replay", "splice", paths["whole"], paths["later"], "--start", "95", "--out", paths["joined"]]) == 0
    assert "wrote 200 rows" in capsys.readouterr().out
    assert main(["replay", "compare", paths["whole"], paths["first"]]) == 2
    assert "cannot compare 200 rows" in capsys.readouterr().err
    assert main(["replay", "inspect", str(tmp_path / "gone.npz")]) == 2
    assert "there is no trace" in capsys.readouterr().err
    assert main(["replay", "splice", paths["later"], paths["first"], "--out", paths["joined"]]) == 2
    assert "a gap cannot be spliced" in capsys.readouterr().err
