"""Every configuration key changes behaviour, and here is the proof of each; a key without a proof fails this file.

To add a key: add a case to every_key_layer.py or every_key_train.py, or name the test that proves it in ELSEWHERE.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from moe_layer.config import MoEConfig, TrainConfig, load_config
from moe_layer.ops import _ext
from moe_layer.ops.kernels import require_kernels
from tests.unit.config_cases import LAYER, ROOT, RUN, all_keys, write
from tests.unit.every_key import Case, check
from tests.unit.every_key_layer import LAYER_CASES
from tests.unit.every_key_train import TRAIN_CASES

SMALL = [
    "data.max_bytes=40000",
    "data.sequence_length=32",
    "train.steps=3",
    "train.global_batch=4",
    "train.micro_batch=4",
    "train.val_batches=1",
    "optimizer.warmup_steps=0",
    "sample.tokens=4",
]

ELSEWHERE = {
    "moe.kernels": "tests/unit/test_every_key.py::test_kernels",
    "moe.router.fused_gate": "tests/ops/test_gate_topk.py::test_the_layer_asks_for_logits_only_to_return_them",
    "moe.experts.fp8_recipe": "tests/unit/test_experts_te.py::test_fp8_pads_groups_and_changes_the_numbers",
    "moe.shared_expert.mode": "tests/unit/test_packed.py::test_one_grouped_call",
    "moe.dispatch.backend": "tests/distributed/test_keys.py::test_backend",
    "moe.dispatch.push": "tests/distributed/test_nvlink_dense.py::test_the_key",
    "moe.dispatch.ring_depth": "tests/distributed/test_nvlink.py::test_ring_depth",
    "moe.dispatch.sm_budget": "tests/distributed/test_nvlink.py::test_sm_budget",
    "moe.dispatch.p2p_world_size": "tests/distributed/test_hierarchical.py::test_a_token_crosses_once",
    "moe.dispatch.reduce": "tests/distributed/test_keys.py::test_reduce",
    "moe.dispatch.deadline_s": "tests/distributed/test_keys.py::test_deadline_s",
    "moe.losses.aux_group": "tests/distributed/test_keys.py::test_aux_group",
}
"""Key -> the test that proves it, where a pair of single-process observations cannot."""

PENDING: set[str] = set()
"""Keys of parts that are still being built. Must be empty when issue 2 is resolved."""


def _id(case: Case) -> str:
    return f"{case.key}={Path(case.after).name if '/' in case.after else case.after}"


def test_every_key_has_one_kind_of_proof() -> None:
    cases = {case.key for case in (*LAYER_CASES, *TRAIN_CASES)}
    assert cases | set(ELSEWHERE) | PENDING == set(all_keys())
    assert not (cases & set(ELSEWHERE) or cases & PENDING or set(ELSEWHERE) & PENDING)


@pytest.mark.parametrize("key", ELSEWHERE)
def test_the_named_proof_exists(key: str) -> None:
    file, _, name = ELSEWHERE[key].partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("case", LAYER_CASES, ids=_id)
def test_layer_key(case: Case, tmp_path: Path) -> None:
    path = write(tmp_path, LAYER)
    before, after = (load_config(path, overrides, kind=MoEConfig) for overrides in case.overrides())
    check(case, before, after)


@pytest.mark.parametrize("case", TRAIN_CASES, ids=_id)
def test_train_key(case: Case, tmp_path: Path) -> None:
    path = write(tmp_path, RUN)
    before, after = (load_config(path, [*SMALL, *overrides], kind=TrainConfig) for overrides in case.overrides())
    check(case, before, after)


def test_kernels() -> None:
    """`cuda` insists on the compiled library, `reference` on its absence, `auto` on nothing."""
    loaded = _ext.status().loaded
    require_kernels("auto")
    with pytest.raises(ValueError, match="kernels: "):
        require_kernels("reference" if loaded else "cuda")
