"""scripts/rl_replay.py --quick: the whole loop runs in CI, keeps its promises, and says when it does not."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_layer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("transformers", reason="rollouts come from a transformers model")
sys.path.insert(0, str(ROOT / "scripts"))

from rl.report import failures  # noqa: E402
from rl.settings import check_mode, load_settings  # noqa: E402

CONFIG = ROOT / "configs/rl/tiny.yaml"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("rl")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "scripts/rl_replay.py"),
        str(CONFIG),
        "--seed",
        "1",
        "--out",
        str(out),
        "--quick",
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=580)
    print(done.stdout, f"{time.perf_counter() - start:.0f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "replay.png").stat().st_size > 10_000
    return json.loads((out / "results.json").read_text())


@pytest.mark.timeout(600)
def test_quick_run(results: dict[str, Any]) -> None:
    assert results["failures"] == [] and set(results["shapes"]) == {"A", "B"}
    for shape in results["shapes"].values():
        exact = [r for r in shape["scoring"] if r["precision"] == "fp32->fp32"]
        assert exact and all(r["metrics"]["mismatch"] < 1e-3 for r in exact)
        assert any(r["metrics"]["mismatch"] > 0 for r in shape["scoring"])
        modes = {r["mode"] for r in shape["grpo"]}
        assert modes == {"off", "R2", "R3", "R3_straight_through", "shifted"}
        assert shape["pretrain"]["loss_last"] < shape["pretrain"]["loss_first"] - 0.5


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "R3 worse": (lambda s: [r["variants"]["R3"].update(kl=9.0) for r in s["scoring"]] and None, "is not below live"),
    "control too good": (
        lambda s: [r["variants"]["shifted"].update(kl=0.0) for r in s["scoring"]] and None,
        "over 100 times",
    ),
    "other experts": (lambda s: s["scoring"][0].update(effective_equals_recorded=False), "did not use the recorded"),
    "silent alarm": (lambda s: s["scoring"][0].update(shifted_alarm=False), "raised no alarm"),
    "false alarm": (lambda s: [r.update(aligned_alarm=True) for r in s["scoring"]] and None, "aligned trace raised"),
    "NaN": (lambda s: s["grpo"][0].update(kl=float("nan")), "not finite"),
    "GRPO": (lambda s: [r.update(kl=9.0) for r in s["grpo"] if r["mode"] == "R3"] and None, "mean KL with R3"),
    "GRPO alarm": (lambda s: [r.update(alarm=0.0) for r in s["grpo"]] and None, "did not tell"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_broken_promises_are_found(results: dict[str, Any], case: str) -> None:
    change, text = BREAKS[case]
    shape = copy.deepcopy(results["shapes"]["B"])
    assert not list(failures("B", shape["scoring"], shape["grpo"]))
    change(shape)
    assert any(text in sentence for sentence in failures("B", shape["scoring"], shape["grpo"]))


def test_r2_and_r3_together_is_an_error() -> None:
    with pytest.raises(ConfigError, match="can honour only one"):
        check_mode("R2+R3")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("[off, R2", "[off, R2+R3, R2", "can honour only one"),
        ("fp32->fp32,", "fp64->fp32,", "must be ROLLOUT->TRAINER"),
        ("vocab: 32", "vocabulary: 32", "unknown keys"),
        ("group: 8", "group: 9\n  x: 1", "unknown keys"),
        ("mini_batches: 4", "mini_batches: 7", "must divide"),
    ],
)
def test_wrong_settings(tmp_path: Path, old: str, new: str, text: str) -> None:
    source = CONFIG.read_text().replace('"off"', "off").replace("modes: [off", 'modes: ["off"')
    source = source.replace(old.replace("[off", '["off"'), new.replace("[off", '["off"'))
    (tmp_path / "a.yaml").write_text(source)
    with pytest.raises(ConfigError, match=text):
        load_settings(tmp_path / "a.yaml", quick=False)


def test_overrides() -> None:
    settings = load_settings(
        CONFIG, quick=False, overrides=["grpo.rollout=fp8_1x128", "grpo.trainer=bf16", "shapes.A.steps=3"]
    )
    assert (settings.grpo.rollout, settings.grpo.trainer, settings.shapes["A"].steps) == ("fp8_1x128", "bf16", 3)
    for wrong, text in (("grpo.nothing=1", "there is no key"), ("grpo.trainer=fp8", "must be ROLLOUT->TRAINER")):
        with pytest.raises(ConfigError, match=text):
            load_settings(CONFIG, quick=True, overrides=[wrong])
