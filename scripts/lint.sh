#!/usr/bin/env bash
# What CI runs: ruff, pyrefly, clang-format, shell syntax. `bash scripts/lint.sh --fix` repairs what a tool can repair.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="$(sed -n 2p .stamp 2>/dev/null || true)"
PYTHON="${PYTHON:-.venv/bin/python}"
BIN="$(dirname "$PYTHON")"
for tool in ruff pyrefly clang-format; do
    if ! [ -x "$BIN/$tool" ]; then
        echo "lint: $BIN has no $tool; run: $PYTHON -m pip install -r requirements/lint.txt (or bash scripts/setup.sh)" >&2
        exit 1
    fi
done

failed=()
check() { local name="$1"; shift; "$@" || failed+=("$name"); }

mapfile -t sources < <(find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' | sort)
if [ "${1:-}" = --fix ]; then
    "$BIN/ruff" check -q --fix . || true
    "$BIN/ruff" format -q .
    "$BIN/clang-format" -i "${sources[@]}"
fi
check "ruff check" "$BIN/ruff" check -q .
check "ruff format (bash scripts/lint.sh --fix)" "$BIN/ruff" format -q --check .
check "pyrefly" "$BIN/pyrefly" check --summary=none
check "clang-format (bash scripts/lint.sh --fix)" "$BIN/clang-format" --dry-run -Werror "${sources[@]}"
for script in scripts/*.sh .ci/run; do check "syntax of $script" bash -n "$script"; done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'lint: FAILED: %s\n' "$(IFS=';'; echo "${failed[*]}")" >&2
    exit 1
fi
echo "lint: ruff, pyrefly, clang-format, bash: clean"
