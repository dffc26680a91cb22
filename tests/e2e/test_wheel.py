"""A wheel, installed where no checkout is in sight, runs the layer from a preset."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import torch, moe_layer
from moe_layer.observe.env import report
assert "site" in moe_layer.__file__, moe_layer.__file__
small = ["hidden_size=32", "router.num_experts=4", "router.top_k=2", "experts.intermediate_size=16"]
layer = moe_layer.MoELayer(moe_layer.load_config("mixtral-8x7b", small))
layer(torch.randn(5, 32)).sum().backward()
assert layer.experts.down_proj.grad.abs().sum() > 0
assert "extension" in report()
"""


def test_the_cpu_wheel_is_complete(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHON": sys.executable, "DIST_DIR": str(tmp_path / "dist")}
    subprocess.run(["bash", "scripts/build_wheel.sh", "cpu"], cwd=ROOT, env=env, check=True)
    (wheel,) = (tmp_path / "dist").glob("moe_layer-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    assert not [name for name in names if name.endswith((".so", ".cu")) or name.startswith("tests/")]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
