"""Load a built library next to this machine's torch and compare what it registers with the Python schemas.

Catches, without a GPU: an undefined symbol that torch does not export, a misspelt m.impl name (the kernel would never
run), and a kernel without a Python op. On a CPU build of torch the CUDA half of the C shim is replaced by stubs that
only satisfy the linker.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# What libtorch_cuda.so adds to the shim; everything else must be in libtorch_cpu.so.
CUDA_SHIM = re.compile(
    r"aoti_torch_(get_current_cuda_stream|cuda_caching_allocator_\w+|\w*cuda_(stream_)?guard\w*)|torch_c10_cuda_\w+"
)


def symbols(library: Path, kind: str) -> set[str]:
    text = subprocess.run(["nm", "-D", kind, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in text.splitlines()}


def load_stub(names: set[str]) -> None:
    folder = Path(tempfile.mkdtemp())
    source, stub = folder / "stub.c", folder / "libtorch_cuda.so"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(names)) or "int moe_stub;\n")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(source), "-o", str(stub)], check=True
    )
    ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(ROOT / "csrc"))
    build = importlib.import_module("build")
    toolkit = build.find_toolkit()
    ctypes.CDLL(str(next((toolkit.root / "lib64").glob("libcudart.so.*"))), mode=ctypes.RTLD_GLOBAL)


def main() -> int:
    library = Path(sys.argv[1]).resolve()
    torch_cpu = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    wanted = {name for name in symbols(library, "--undefined-only") if name.startswith(("aoti_torch_", "torch_"))}
    absent = wanted - symbols(torch_cpu, "--defined-only")
    unknown = sorted(name for name in absent if not CUDA_SHIM.fullmatch(name))
    problems = [f"torch {torch.__version__} does not export {name}, which the library needs" for name in unknown]
    if torch.version.cuda is None:
        load_stub(absent)
    torch.ops.load_library(str(library))

    ops = importlib.import_module("moe_layer.ops")
    for module in pkgutil.walk_packages(ops.__path__, "moe_layer.ops."):
        importlib.import_module(module.name)
    registered = sorted(
        {name for path in (ROOT / "csrc").glob("*.cu") for name in re.findall(r'm\.impl\(\s*"(\w+)"', path.read_text())}
    )
    for name in registered:
        qualified = f"moe_layer::{name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
            problems.append(f"{qualified} is written in csrc but the library does not register it")
        if not hasattr(torch.ops.moe_layer, name):
            problems.append(f"{qualified} has a CUDA kernel but no schema in moe_layer/ops")
    for problem in problems:
        print(f"csrc: {problem}", file=sys.stderr)
    if not problems:
        print(f"csrc: {len(registered)} CUDA kernels match their Python schemas: {', '.join(registered)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
