#!/usr/bin/env bash
# Compile csrc with nvcc, link it, and check what it registers; no GPU and no CUDA build of torch needed.
# `check_csrc.sh router` compiles only the router, for every architecture of the default list.
#
# Environment: CHECK_ARCHS (default 90a: one architecture keeps it under two minutes on two cores), MAX_JOBS, PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then PYTHON="$(sed -n 2p .stamp 2>/dev/null || true)"; fi
PYTHON="${PYTHON:-.venv/bin/python}"
if ! reason="$("$PYTHON" csrc/build.py --why-not --cross)"; then
    echo "csrc: NOT compiled: $reason"
    exit 0
fi
if [ "${1:-}" = router ]; then # the router for every architecture of the default list; nothing is linked
    MOE_LAYER_CUDA_ARCHS="80;90;100;120" "$PYTHON" csrc/build.py --cross --compile-only 'router_*.cu'
    exit
fi
MOE_LAYER_CUDA_ARCHS="${CHECK_ARCHS:-90a}" "$PYTHON" csrc/build.py --cross --output build/check/_C.abi3.so
PYTHONPATH="$PWD" "$PYTHON" scripts/check_registrations.py build/check/_C.abi3.so
