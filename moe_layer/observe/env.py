"""`moe-layer env`: versions, devices, and which optional parts work, each absent one with its reason."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from moe_layer import __version__
from moe_layer.ops import _ext

PACKAGE = Path(__file__).resolve().parent.parent


def report() -> str:
    """Aligned `name  value` lines. Initialises CUDA if there is a GPU; everything else is read from metadata."""
    rows = [
        ("moe-layer", f"{__version__} at {PACKAGE}"),
        ("git", git_state(PACKAGE.parent)),
        ("python", f"{platform.python_version()} at {sys.executable}"),
        ("platform", f"{platform.platform()}, {os.cpu_count()} cores"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("cuda", _cuda()),
        *_gpus(),
        ("nvcc", _nvcc()),
        ("extension", extension()),
        ("distributed", _distributed()),
        *(
            (name, optional(name))
            for name in ("numpy", "einops", "safetensors", "triton", "rich", "tensorboard", "matplotlib")
        ),
        *((name, optional(name)) for name in ("transformers", "megatron-core", "quack-kernels", "transformer-engine")),
        ("apex", apex()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def git_state(root: Path) -> str:
    """Short sha and whether tracked files differ from it, or why there is none."""
    if not (root / ".git").exists():
        return "not a git checkout"
    if shutil.which("git") is None:
        return "git is not installed"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else f"unknown ({done.stderr.strip() or 'no commit'})"


def extension() -> str:
    """State of the native library, with the reason when it is not loaded or does not fit this GPU."""
    status = _ext.status()
    if status.loaded and torch.cuda.is_available():
        problem = _ext.arch_problem(status.info, torch.cuda.get_device_capability())
        if problem is not None:
            return f"loaded, but {problem}"
    if status.loaded:
        return f"loaded: {status.reason}"
    return f"{status.state}: {status.reason}"


def optional(distribution: str) -> str:
    """Version of an installed distribution, or the line that installs it; the module is not imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return f"not installed (pip install {distribution})"


def apex() -> str:
    """NVIDIA's apex has `apex.optimizers`; the `apex` on PyPI is an unrelated project and is told apart by that."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed (FusedAdam is optional; build NVIDIA/apex from source, PyPI's apex is another project)"
    places = [Path(place) for place in spec.submodule_search_locations or []]
    if any((place / "optimizers").is_dir() for place in places):
        return "NVIDIA apex, with apex.optimizers"
    where = places[0] if places else spec.origin
    return f"another project called apex at {where}, not NVIDIA's; ignored (pip uninstall apex)"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch is a CPU build"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}, but no GPU is visible"
    return f"torch is built for CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPU(s) visible{_driver()}"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return f", driver {lines[0]}" if lines else ""


def _gpus() -> list[tuple[str, str]]:
    rows = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} SMs"
        text = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {size}"
        rows.append((f"gpu {index}", text))
    return rows


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") or (f"{home}/bin/nvcc" if home else "/usr/local/cuda/bin/nvcc")
    if not Path(found).exists():
        return "not found (set CUDA_HOME or put nvcc on PATH)"
    text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if "release" in line]
    return f"{lines[0].split('release ')[-1] if lines else 'unknown version'} at {found}"


def _distributed() -> str:
    if not dist.is_available():
        return "torch.distributed is not available in this build"
    nccl = f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}" if dist.is_nccl_available() else "no nccl"
    return f"{'gloo' if dist.is_gloo_available() else 'no gloo'}, {nccl}"
