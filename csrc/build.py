"""Compile csrc/*.cu and register.cpp into moe_layer/_C.abi3.so: the one place that knows the flags.

Used by setup.py, scripts/build_ext.sh and scripts/check_csrc.sh. Standard library only, and torch is located but never
imported: the library is built against the LibTorch stable ABI (headers of torch >= 2.11), so that one file serves later
torch versions and any Python, and a machine without a GPU and with a CPU build of torch can build it ("cross").

Instead of torch's libraries (a CPU build has no libtorch_cuda.so) it is linked with empty stubs of the same soname. All
that matters is the DT_NEEDED entry: torch loads its libraries with RTLD_LOCAL, and without that entry loading ends in
"undefined symbol: aoti_torch_...".
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80;90;100;120"
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch this package supports


class BuildError(RuntimeError):
    """Why the extension cannot be built here; the text is shown to the user as it is."""


@dataclass(frozen=True)
class Toolkit:
    root: Path
    nvcc: Path
    version: str


@dataclass(frozen=True)
class TorchInstall:
    include: Path
    version: str
    cuda: str | None


def find_torch() -> TorchInstall:
    """The torch that this Python would import, read from its files."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(f"torch is not installed for {sys.executable} (an isolated pip build never has it)")
    package = Path(spec.origin).parent
    text = (package / "version.py").read_text()
    version = re.search(r"^__version__.*?=\s*['\"]([^'\"]+)", text, re.M)
    cuda = re.search(r"^cuda\b.*?=\s*['\"]([^'\"]+)", text, re.M)
    if version is None or not (package / "include/torch/csrc/stable/library.h").exists():
        raise BuildError(f"the torch at {package} has no stable-ABI headers; install torch >= 2.11")
    if tuple(int(part) for part in re.findall(r"\d+", version[1])[:2]) < (2, 11):
        raise BuildError(f"torch {version[1]} is older than 2.11; upgrade torch")
    return TorchInstall(package / "include", version[1], cuda[1] if cuda else None)


def find_toolkit() -> Toolkit:
    """The CUDA toolkit: $CUDA_HOME, else nvcc on PATH, else /usr/local/cuda.

    nvcc on PATH may be a wrapper outside the toolkit, so the root is asked from nvcc itself and not from its path.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).exists():
        raise BuildError(f"no CUDA toolkit: {found} does not exist; set CUDA_HOME or put nvcc on PATH")
    dry = subprocess.run([found, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.M)
    root = Path(top[1].strip()).resolve() if top else Path(found).resolve().parent.parent
    if not any((root / sub / "cuda_runtime.h").exists() for sub in ("include", "targets/x86_64-linux/include")):
        raise BuildError(f"the CUDA toolkit at {root} has no include/cuda_runtime.h; install the toolkit's headers")
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", text)
    return Toolkit(root, Path(found), version[1] if version else "0.0")


def choose_archs() -> list[str]:
    """$MOE_LAYER_CUDA_ARCHS, else the visible GPUs' architectures, else the default list."""
    text = os.environ.get("MOE_LAYER_CUDA_ARCHS", "")
    if not text and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        text = ";".join(re.findall(r"^\s*(\d+\.\d+)\s*$", done.stdout, re.M)) if done.returncode == 0 else ""
    names = re.split(r"[;,\s]+", (text or DEFAULT_ARCHS).strip())
    archs = sorted({_arch(name) for name in names if name}, key=lambda a: int(a.rstrip("af")))
    return archs


def _arch(name: str) -> str:
    """`9.0`, `sm_90`, `90` -> `90a`: Hopper's wgmma and setmaxnreg exist only in the arch-specific target."""
    match = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d)([af]?)", name.strip())
    if match is None:
        raise BuildError(f"MOE_LAYER_CUDA_ARCHS has {name!r}; write for example 90 or 80;90;100;120")
    number = match[1] + match[2]
    return number + (match[3] or ("a" if number == "90" else ""))


def sources() -> list[Path]:
    return [*sorted(CSRC.glob("*.cu")), CSRC / "register.cpp"]


def source_hash() -> str:
    """Identifies csrc's contents; moe_layer/ops/_ext.py recomputes it to notice a library older than its sources."""
    digest = hashlib.sha256()
    for path in sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cuh"), *CSRC.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def flags(torch: TorchInstall, archs: list[str]) -> list[str]:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [
        *targets,
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "-lineinfo",
        # Sums promise bits (docs/design.md section 3): a fused multiply-add rounds differently from torch.
        "-fmad=false",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-unused-parameter",
        "-Xfatbin=-compress-all",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f"-I{torch.include}",
        f"-I{CSRC}",
    ]


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    text = (done.stdout + done.stderr).strip()
    if done.returncode != 0:
        raise BuildError(f"{what} failed (exit {done.returncode}):\n{' '.join(command)}\n{text}")
    if text:
        print(f"{what}:\n{text}", flush=True)


def read_with_headers(source: Path) -> list[bytes]:
    """Contents of a source and of the csrc headers that it includes, directly or not."""
    seen, todo = {source: source.read_bytes()}, [source]
    while todo:
        for name in re.findall(rb'^#include "([^"]+)"', seen[todo.pop()], re.M):
            header = CSRC / name.decode()
            if header not in seen and header.exists():
                seen[header] = header.read_bytes()
                todo.append(header)
    return [seen[path] for path in sorted(seen)]


def compile_all(
    toolkit: Toolkit, torch: TorchInstall, archs: list[str], build_dir: Path, jobs: int, pattern: str = "*"
) -> list[Path]:
    """Compile all matching sources in parallel; an object is reused while source, headers and flags are the same."""
    build_dir.mkdir(parents=True, exist_ok=True)
    version = re.search(r'"([^"]+)"', (ROOT / "moe_layer/_version.py").read_text().split("__version__", 1)[1])
    common = flags(torch, archs)
    launcher = [ccache] if (ccache := shutil.which("ccache")) else []

    def compile_one(source: Path) -> Path:
        extra = []
        if source.suffix == ".cpp":
            names = {"ARCHS": "_".join(archs), "VERSION": version[1] if version else "?", "SOURCES": source_hash()}
            # nvcc splits option values at commas, hence the underscores
            extra = [f"-DMOE_LAYER_{key}={value}" for key, value in names.items()]
        options = [flag for flag in common + extra if not flag.startswith("-I")]  # objects serve another checkout too
        identity = f"{toolkit.version} {torch.version} {options}".encode() + b"".join(read_with_headers(source))
        target = build_dir / f"{source.stem}-{hashlib.sha256(identity).hexdigest()[:16]}.o"
        if not target.exists():
            start, partial = time.monotonic(), target.with_suffix(f".{os.getpid()}.tmp.o")
            command = [*launcher, str(toolkit.nvcc), *common, *extra, "-c", str(source), "-o", str(partial)]
            _run(command, f"compile {source.name}")
            partial.replace(target)
            print(f"compiled {source.name} for {','.join(archs)} in {time.monotonic() - start:.1f} s", flush=True)
        return target

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return list(pool.map(compile_one, [source for source in sources() if source.match(pattern)]))


def link(toolkit: Toolkit, objects: list[Path], build_dir: Path, output: Path) -> None:
    stubs = build_dir / "stubs"
    stubs.mkdir(exist_ok=True)
    for name in ("torch_cpu", "torch_cuda"):
        stub = stubs / f"lib{name}.so"
        if not stub.exists():
            command = [
                "g++",
                "-shared",
                "-nostdlib",
                f"-Wl,-soname,lib{name}.so",
                "-x",
                "c",
                "/dev/null",
                "-o",
                str(stub),
            ]
            _run(command, f"stub of lib{name}.so")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(f".{os.getpid()}.tmp")  # rename at the end: a running process keeps its mapping whole
    libraries = [f"-L{stubs}", "-Xlinker=--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]
    objects_text = [str(path) for path in objects]
    command = [str(toolkit.nvcc), "-shared", "-cudart", "shared", *objects_text, *libraries, "-o", str(partial)]
    _run(command, "link")
    partial.replace(output)


def check_torch_and_toolkit(*, cross: bool = False) -> tuple[TorchInstall, Toolkit]:
    """What to build with; raises BuildError with the one reason why there is nothing to build here."""
    torch, toolkit = find_torch(), find_toolkit()
    if not cross:
        if torch.cuda is None:
            raise BuildError(f"torch {torch.version} is a CPU build")
        if torch.cuda.split(".")[0] != toolkit.version.split(".")[0]:
            raise BuildError(
                f"torch {torch.version} is for CUDA {torch.cuda} but the toolkit at {toolkit.root} is "
                f"{toolkit.version}; set CUDA_HOME to a toolkit with the same major version"
            )
    return torch, toolkit


def up_to_date(output: Path) -> bool:
    """Whether `output` was built from these sources and has kernels for every architecture that would be built now."""
    if not output.exists():
        return False
    text = re.search(rb"torch_headers=[^\0]*", output.read_bytes())
    info = dict(part.split("=", 1) for part in text[0].decode().split(";")) if text else {}
    return info.get("sources") == source_hash() and set(choose_archs()) <= set(info.get("archs", "").split("_"))


def build(output: Path, *, cross: bool = False, jobs: int | None = None) -> str:
    """Build the library and return one line that says what was built.

    Args:
        output: where the library goes.
        cross: build even if the installed torch is a CPU build (the result is for another machine).
        jobs: parallel compilations; default $MAX_JOBS, else the number of cores.
    """
    torch, toolkit = check_torch_and_toolkit(cross=cross)
    archs = choose_archs()
    build_dir = ROOT / "build/csrc"
    jobs = jobs or int(os.environ.get("MAX_JOBS") or 0) or os.cpu_count() or 1
    start = time.monotonic()
    objects = compile_all(toolkit, torch, archs, build_dir, jobs)
    link(toolkit, objects, build_dir, output)
    size, seconds = output.stat().st_size // 1024, time.monotonic() - start
    where = f"CUDA {toolkit.version}, torch {torch.version} headers, sm_{','.join(archs)}"
    return f"built {output} ({size} KiB, {where}) in {seconds:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "moe_layer/_C.abi3.so")
    parser.add_argument(
        "--cross", action="store_true", help="also with a CPU build of torch: the result is for a GPU machine"
    )
    parser.add_argument(
        "--jobs", type=int, default=None, help="parallel compilations (default: $MAX_JOBS, else all cores)"
    )
    parser.add_argument("--if-needed", action="store_true", help="keep a library that is up to date, whoever built it")
    parser.add_argument(
        "--why-not", action="store_true", help="build nothing; exit 1 and print why nothing can be built here"
    )
    parser.add_argument(
        "--compile-only",
        metavar="PATTERN",
        help="compile matching sources (router_*.cu), link nothing: do they compile?",
    )
    args = parser.parse_args()
    if args.why_not:
        try:
            check_torch_and_toolkit(cross=args.cross)
        except BuildError as error:
            print(error)
            return 1
        return 0
    try:
        if args.if_needed and up_to_date(args.output):
            print(f"{args.output} is up to date")
            return 0
        if args.compile_only:
            torch, toolkit = check_torch_and_toolkit(cross=args.cross)
            jobs = args.jobs or int(os.environ.get("MAX_JOBS") or 0) or os.cpu_count() or 1
            made = compile_all(toolkit, torch, choose_archs(), ROOT / "build/csrc", jobs, args.compile_only)
            print(f"{len(made)} sources compile for sm_{', '.join(choose_archs())}")
            return 0
        print(build(args.output, cross=args.cross, jobs=args.jobs))
    except BuildError as error:
        print(f"moe_layer: CUDA extension not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
