#!/usr/bin/env bash
# Build moe_layer/_C.abi3.so in place.
#
#   bash scripts/build_ext.sh                              for this machine's GPU (CUDA torch and toolkit needed)
#   MOE_LAYER_CUDA_ARCHS=90a bash scripts/build_ext.sh --cross    on a machine without a GPU and with a CPU build of torch:
#       the result is for another machine, copy it there as moe_layer/_C.abi3.so (loads with torch >= 2.11 for CUDA 13)
#
# Environment: PYTHON, MOE_LAYER_CUDA_ARCHS (default: the visible GPU, else 80;90;100;120), MAX_JOBS, CUDA_HOME; ccache is used if installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" csrc/build.py "$@"
