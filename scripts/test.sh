#!/usr/bin/env bash
# Run the tests.
#
#   bash scripts/test.sh                     everything: unit and op tests in parallel, then tests that start processes or use the
#                                            GPU one after the other, then csrc compiled with nvcc where there is one
#   bash scripts/test.sh tests/ops -k topk   one pytest run with these arguments, nothing else
#
# Environment: TEST_WORKERS (default: the number of cores, at most 4), and those of scripts/setup.sh.
set -uo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
bash scripts/setup.sh || exit 1
PYTHON="$(sed -n 2p .stamp)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# nproc answers OMP_NUM_THREADS when that is set, so it is asked first, and without it.
cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)"
# Two pytest workers with a thread pool each are slower than with one thread each on two cores, and gloo workers likewise.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if ! "$PYTHON" -c 'import pytest, pytest_timeout' 2>/dev/null; then
    echo "test: $PYTHON has no pytest with pytest-timeout; install requirements/test.txt into it, or set PYTHON to one without torch to get .venv" >&2
    exit 1
fi
if [ $# -gt 0 ]; then
    exec "$PYTHON" -m pytest "$@"
fi

workers="${TEST_WORKERS:-$((cores < 4 ? cores : 4))}"
parallel=()
if [ "$workers" -gt 1 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n "$workers" --dist worksteal); fi

failed=()
start=$SECONDS
echo "test: 1 of 3, unit and op tests (${workers} workers)"
"$PYTHON" -m pytest -q "${parallel[@]}" --ignore tests/distributed --ignore tests/e2e --ignore tests/gpu tests || failed+=("unit and op tests")
echo "test: 2 of 3, distributed, end-to-end and GPU tests ($((SECONDS - start)) s so far)"
"$PYTHON" -m pytest -q tests/distributed tests/e2e tests/gpu || failed+=("distributed, end-to-end and GPU tests")
echo "test: 3 of 3, csrc ($((SECONDS - start)) s so far)"
bash scripts/check_csrc.sh || failed+=("csrc")

if [ ${#failed[@]} -gt 0 ]; then
    printf 'test: FAILED after %d s: %s\n' "$((SECONDS - start))" "$(IFS=';'; echo "${failed[*]}")" >&2
    exit 1
fi
echo "test: all passed in $((SECONDS - start)) s"
