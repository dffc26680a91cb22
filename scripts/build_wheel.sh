#!/usr/bin/env bash
# Write a wheel into $DIST_DIR (default dist/): bash scripts/build_wheel.sh cpu|cuda
#
#   cpu   moe_layer-VERSION-py3-none-any.whl: no compiled code, for every machine
#   cuda  moe_layer-VERSION-cp310-abi3-linux_x86_64.whl: with the CUDA extension, for torch >= 2.11, Python >= 3.10. Needs nvcc
#         but neither a GPU nor a CUDA build of torch (MOE_LAYER_CUDA_ARCHS, default 80;90;100;120 without a visible GPU)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-$(sed -n 2p .stamp 2>/dev/null || true)}"
PYTHON="${PYTHON:-.venv/bin/python}"
case "${1:-}" in
    cpu) export MOE_LAYER_CUDA=0 ;;
    cuda) export MOE_LAYER_CUDA=1 MOE_LAYER_CUDA_CROSS=1 ;;
    *) echo "usage: bash scripts/build_wheel.sh cpu|cuda" >&2; exit 2 ;;
esac
# setuptools keeps files of earlier builds in build/lib*, and would pack a library that is no longer wanted.
rm -rf build/lib* build/bdist*
PYTHONWARNINGS=ignore exec "$PYTHON" -m pip wheel -q --disable-pip-version-check --no-index --no-build-isolation --no-deps -w "${DIST_DIR:-dist}" .
