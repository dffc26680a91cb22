#!/usr/bin/env bash
# Run tests under compute-sanitizer on a GPU machine: bash scripts/sanitize.sh [memcheck|racecheck|synccheck|initcheck] [pytest args]
# Default: all four tools over tests/gpu. Slow (10 to 100 times); name one test file while debugging.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v compute-sanitizer >/dev/null || { echo "sanitize: compute-sanitizer is not on PATH; it comes with the CUDA toolkit" >&2; exit 1; }
bash scripts/setup.sh
PYTHON="$(sed -n 2p .stamp)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
tools=(memcheck racecheck synccheck initcheck)
case "${1:-}" in memcheck | racecheck | synccheck | initcheck) tools=("$1"); shift ;; esac
[ $# -gt 0 ] || set -- tests/gpu
# torch's caching allocator hands out pieces of large blocks: without it an access past the end of a tensor is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "${tools[@]}"; do
    echo "sanitize: $tool"
    options=(--tool "$tool" --error-exitcode 99 --target-processes all --kernel-name kernel_substring=moe_layer)
    compute-sanitizer "${options[@]}" "$PYTHON" -m pytest -q -x --timeout 3000 "$@"
done
