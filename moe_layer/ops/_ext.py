"""Load csrc's library, which registers CUDA kernels for the ops that this package defines in Python.

Without it every op still runs on CUDA, in its PyTorch reference body, slower. `status()` says which of the two it is
and why; `moe-layer env` prints it, and `warn_if_missing()` warns once when a CUDA tensor meets an unloaded extension.
Environment: `MOE_LAYER_CUDA=0` at run time leaves the library unloaded, for comparisons with the reference.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

PACKAGE = Path(__file__).resolve().parent.parent
REBUILD = "MOE_LAYER_CUDA=1 pip install --no-build-isolation --no-deps -e . (or: bash scripts/build_ext.sh)"


@dataclass(frozen=True)
class ExtensionStatus:
    """What happened to `_C.abi3.so`.

    Attributes:
        state: `loaded`, `missing` (there is nothing to load here) or `failed` (there is, and it is unusable).
        reason: one sentence; for `loaded`, what was loaded.
        info: what the library says about its build: torch_headers, cuda, archs, version, sources.
    """

    state: Literal["loaded", "missing", "failed"]
    reason: str
    info: Mapping[str, str] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        return self.state == "loaded"

    def sentence(self) -> str:
        """One sentence with the remedy, for warnings and reports."""
        if self.loaded:
            return f"CUDA extension loaded: {self.reason}"
        return f"CUDA extension not loaded: {self.reason}; using the PyTorch reference. Rebuild with: {REBUILD}"


@functools.cache
def status() -> ExtensionStatus:
    """Load the library on the first call; later calls return the same answer. Never initialises CUDA."""
    if os.environ.get("MOE_LAYER_CUDA") == "0":
        return ExtensionStatus("missing", "MOE_LAYER_CUDA=0 is set")
    if torch.version.cuda is None:
        return ExtensionStatus("missing", f"torch {torch.__version__} is not a CUDA build")
    library = PACKAGE / "_C.abi3.so"
    if not library.exists():
        return ExtensionStatus("missing", f"{library} does not exist, the extension was not built")
    return load_library(library, csrc=PACKAGE.parent / "csrc")


def load_library(library: Path, *, csrc: Path) -> ExtensionStatus:
    """Load `library` unless it was built from sources other than those in `csrc` (ignored when that folder is absent).

    A kernel of an older source behind a newer Python schema reads its arguments at the wrong places, so a stale library
    is refused before it can register anything.
    """
    try:
        info = _build_info(library)
    except (OSError, ValueError) as error:
        return ExtensionStatus("failed", f"{library} cannot be loaded ({error})")
    built_from, present = info.get("sources"), source_hash(csrc)
    if present is not None and built_from != present:
        reason = f"{library} was built from csrc {built_from} but csrc is now {present}"
        return ExtensionStatus("failed", reason, info)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return ExtensionStatus("failed", f"{library} cannot be loaded ({error})", info)
    cuda = int(info["cuda"])
    versions = f"CUDA {cuda // 1000}.{cuda % 1000 // 10}, headers of torch {info['torch_headers']}"
    return ExtensionStatus("loaded", f"{library.name} for {_arch_names(info)}, {versions}", info)


def _arch_names(info: Mapping[str, str]) -> str:
    return ", ".join(f"sm_{arch}" for arch in info["archs"].split("_"))


def arch_problem(info: Mapping[str, str], capability: tuple[int, int]) -> str | None:
    """Why a library built for `info["archs"]` has no kernels for a GPU of this compute capability; None when it has.

    Machine code runs on its own major version from its own minor version on; `90a` runs on exactly 9.0.
    """
    major, minor = capability
    for arch in info["archs"].split("_"):
        built = (int(arch.rstrip("af")[:-1]), int(arch.rstrip("af")[-1]))
        if built == capability or (arch[-1].isdigit() and built[0] == major and built[1] <= minor):
            return None
    wanted = f"{major}{minor}"
    has = f"the extension has kernels for {_arch_names(info)}"
    return f"{has} but this GPU is sm_{wanted}; rebuild with MOE_LAYER_CUDA_ARCHS={wanted}"


@functools.cache
def warn_if_missing() -> None:
    """Warn once, at the first CUDA tensor, that the slower reference runs; raise when this GPU's kernels are missing.

    Raises:
        RuntimeError: the loaded library was built for other GPUs (its kernels already took precedence over the
            reference).
    """
    current = status()
    if not current.loaded:
        warnings.warn(f"moe_layer: {current.sentence()}", RuntimeWarning, stacklevel=3)
        return
    problem = arch_problem(current.info, torch.cuda.get_device_capability())
    if problem is not None:
        raise RuntimeError(f"{problem}, or run with MOE_LAYER_CUDA=0 to use the PyTorch reference")


def _build_info(library: Path) -> dict[str, str]:
    """The text compiled into the library, found in the file's bytes: reading it runs no static constructor."""
    data = library.read_bytes()
    start = data.find(b"torch_headers=")
    if start < 0:
        raise ValueError("it has no build information; it was not built by csrc/build.py")
    text = data[start : data.index(b"\0", start)].decode()
    return dict(part.split("=", 1) for part in text.split(";"))


def source_hash(csrc: Path) -> str | None:
    """Hash of the sources in `csrc`, as csrc/build.py computes it; None when there are none (an installed wheel)."""
    if not csrc.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*csrc.glob("*.cu"), *csrc.glob("*.cuh"), *csrc.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
