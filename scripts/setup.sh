#!/usr/bin/env bash
# Choose a Python for this checkout, make one if needed, and remember the choice in .stamp. Safe to call any number of times.
#
# Choice: $PYTHON (default python3) as it is, if it has torch >= 2.11, numpy, einops, yaml and safetensors: nothing is installed into
# it. Otherwise .venv with the pinned CPU torch and the test and lint tools. Where the chosen torch is a CUDA build and a toolkit is
# found, csrc is built in place. Environment: PYTHON, MOE_LAYER_CUDA=auto|0|1, and those of scripts/build_ext.sh.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
WANTED="${PYTHON:-python3}"

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

wanted_path="$(command -v "$WANTED" || true)"
[ -n "$wanted_path" ] || die "no Python: '$WANTED' is not on PATH; install Python 3.10 or later or set PYTHON=/path/to/python"

# .stamp: line 1 identifies what the environment was made from, line 2 is the Python to use, line 3 says why.
identity="$(cat requirements/*.txt pyproject.toml setup.py scripts/setup.sh csrc/*.c* csrc/*.py |
    cat - <(echo "$wanted_path ${VIRTUAL_ENV:-} ${MOE_LAYER_CUDA:-auto} ${MOE_LAYER_CUDA_ARCHS:-}") | sha256sum | cut -c1-32)"
if [ -f .stamp ]; then
    { read -r stamped; read -r python; read -r why; } <.stamp || true
    if [ "$stamped" = "$identity" ] && [ -x "$python" ]; then
        say "up to date: $python ($why)"
        exit 0
    fi
fi

# Prints nothing and succeeds if the Python can run the package; else prints the one reason. Reads metadata: torch is not imported.
missing() {
    "$1" - <<'PY'
import re, sys
from importlib import metadata, util
if sys.version_info < (3, 10):
    sys.exit(print(f"it is Python {sys.version_info[0]}.{sys.version_info[1]}, older than 3.10") or 1)
absent = [name for name in ("torch", "numpy", "einops", "yaml", "safetensors") if util.find_spec(name) is None]
if absent:
    sys.exit(print("it has no " + ", ".join(absent)) or 1)
version = metadata.version("torch")
if tuple(map(int, re.findall(r"\d+", version)[:2])) < (2, 11):
    sys.exit(print(f"its torch {version} is older than 2.11") or 1)
PY
}

if reason="$(missing "$wanted_path")"; then
    python="$wanted_path"
    why="$WANTED already has torch >= 2.11 and the rest; nothing was installed into it"
else
    why="$WANTED was not used because ${reason:-it does not run}"
    python="$ROOT/.venv/bin/python"
    if ! [ -x "$python" ] || ! "$python" -c 'import pip' 2>/dev/null; then
        "$wanted_path" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$why, and .venv needs Python 3.10 or later: set PYTHON"
        say "making .venv: $why"
        "$wanted_path" -m venv .venv || die "could not make .venv; on Debian: apt-get install python3-venv"
    fi
    say "installing the pinned CPU torch and the test and lint tools into .venv (some minutes the first time): $why"
    # PyPI's torch for Linux brings CUDA along (5 GB); PyTorch's own index has the CPU build, which pip prefers where it sees both.
    cpu_index=https://download.pytorch.org/whl/cpu
    extra=()
    if "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=5)' "$cpu_index" 2>/dev/null; then
        extra=(--extra-index-url "$cpu_index")
    fi
    "$python" -m pip install -q --disable-pip-version-check "${extra[@]}" -r requirements/cpu.txt -r requirements/test.txt -r requirements/lint.txt ||
        die "installation failed; is there a network? Then run the same command again"
    say "installed torch $("$python" -c 'from importlib import metadata; print(metadata.version("torch"))')"
    MOE_LAYER_CUDA=0 "$python" -m pip install -q --disable-pip-version-check --no-index --no-build-isolation --no-deps -e . ||
        die "could not install the package into .venv"
fi

case "${MOE_LAYER_CUDA:-auto}" in
    0) say "CUDA extension not built: MOE_LAYER_CUDA=0" ;;
    1) "$python" csrc/build.py --if-needed || die "MOE_LAYER_CUDA=1 but the CUDA extension could not be built" ;;
    auto)
        if reason="$("$python" csrc/build.py --why-not)"; then
            "$python" csrc/build.py --if-needed || die "the CUDA extension does not compile; MOE_LAYER_CUDA=0 leaves it out"
        else
            say "CUDA extension not built: $reason"
        fi ;;
    *) die "MOE_LAYER_CUDA is '$MOE_LAYER_CUDA'; write auto, 0 or 1" ;;
esac

printf '%s\n%s\n%s\n' "$identity" "$python" "$why" >.stamp
say "using $python ($why)"
