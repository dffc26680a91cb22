"""What an installed package promises: a lean import, equal pins, a build that says why it does nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import moe_layer

ROOT = Path(__file__).resolve().parents[2]

# Heavy or optional: they may be imported only where they are used.
NOT_AT_IMPORT = [
    "matplotlib",
    "triton",
    "transformers",
    "tensorboard",
    "rich",
    "megatron",
    "quack",
    "transformer_engine",
]


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_import_is_lean() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import moe_layer, moe_layer.config
moe_layer.MoELayer  # names load on first use
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert not new & set({NOT_AT_IMPORT!r}), new & set({NOT_AT_IMPORT!r})
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists() -> None:
    missing = [name for name in moe_layer.__all__ if not hasattr(moe_layer, name)]
    assert not missing
    assert re.fullmatch(r"\d+\.\d+\.\d+", moe_layer.__version__)
    assert (ROOT / "moe_layer/py.typed").exists()


def test_pins_agree() -> None:
    """`pip install .[dev]` and scripts/setup.sh give the same tools."""
    project = (ROOT / "pyproject.toml").read_text()
    dev = re.findall(r'^  "(.+)",$', project[project.index("dev = [") : project.index("[project.scripts]")], re.M)
    lines = [
        line.strip()
        for name in ("test", "lint")
        for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert dev == lines


def test_supported_torch_is_said_once_everywhere() -> None:
    assert 'torch>=2.11"' in (ROOT / "pyproject.toml").read_text()
    assert "(2, 11)" in (ROOT / "scripts/setup.sh").read_text()
    assert "0x020b000000000000" in (ROOT / "csrc/build.py").read_text()
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


def test_build_says_why_it_does_nothing() -> None:
    code = (
        "import runpy, sys; sys.argv = ['build.py', '--why-not']; runpy.run_path('csrc/build.py', run_name='__main__')"
    )
    done = run_python(code, CUDA_HOME="/nonexistent")
    assert done.returncode == 1
    assert "no CUDA toolkit: /nonexistent/bin/nvcc does not exist; set CUDA_HOME" in done.stdout


def test_unknown_arch_is_an_error() -> None:
    code = "import sys; sys.path.insert(0, 'csrc'); import build; print(build.choose_archs())"
    done = run_python(code, MOE_LAYER_CUDA_ARCHS="hopper")
    assert "MOE_LAYER_CUDA_ARCHS has 'hopper'; write for example 90 or 80;90;100;120" in done.stderr
    done = run_python(code, MOE_LAYER_CUDA_ARCHS="9.0;sm_100 80")
    assert done.stdout.strip() == "['80', '90a', '100']"


def test_setup_py_reads_its_mode() -> None:
    done = run_python("import setuptools, runpy; runpy.run_path('setup.py')", MOE_LAYER_CUDA="yes")
    assert done.returncode == 1
    assert "MOE_LAYER_CUDA is 'yes'; write auto, 0 or 1" in done.stderr
