#!/usr/bin/env bash
# Run tests under compute-sanitizer on a GPU machine, and say for each tool how many of our kernels ran and what it found.
#
#   bash scripts/sanitize.sh                         the four tools over a short list: every kernel of csrc, tiny shapes
#   bash scripts/sanitize.sh racecheck               one tool (memcheck, racecheck, synccheck, initcheck)
#   bash scripts/sanitize.sh --all [tool]            all of tests/gpu; hours
#   bash scripts/sanitize.sh [tool] tests/... [pytest options]   these tests instead of the list
#
# Environment: PYTHON (default: the one scripts/setup.sh prepares), SANITIZE_LOGS (folder of the full outputs, default build/sanitize).
# Only kernels of the namespace moe_layer are instrumented; initcheck must see every kernel, or what torch wrote would count as
# uninitialised, and its reports are counted where they name moe_layer. Each test file runs in a process of its own, so that one
# failure does not hide the rest. Exit code 1 if a tool found an error or a test failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v compute-sanitizer >/dev/null || { echo "sanitize: compute-sanitizer is not on PATH; it comes with the CUDA toolkit" >&2; exit 1; }
if [ -z "${PYTHON:-}" ]; then
    bash scripts/setup.sh || exit 1
    PYTHON="$(sed -n 2p .stamp)"
fi
LOGS="${SANITIZE_LOGS:-build/sanitize}"
mkdir -p "$LOGS"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# No bf16 GEMM of torch's here: racecheck dies of it ("failed to handle a hardware exception"), initcheck does not see grouped_mm's
# writes. And no gate_kernel, of which racecheck dies in the same way (TMA and wgmma): memcheck and synccheck of
# tests/gpu/test_gate_cuda.py pass, and all but racecheck of tests/gpu/test_nvlink_phases_gpu.py -k fp8.
tests=(
    "tests/gpu/test_glue_cuda.py::test_sort_slots[37-3-8-16-0.2-False]"
    "tests/gpu/test_glue_cuda.py::test_sort_slots_of_a_middle_rank"
    "tests/gpu/test_glue_cuda.py::test_tree_reduce[50-3-8-7-dtype1]"
    "tests/gpu/test_glue_cuda.py::test_tree_reduce[31-10-512-512-dtype1]"
    "tests/gpu/test_glue_cuda.py::test_tree_reduce[20-40-64-24-dtype0]"
    "tests/gpu/test_glue_cuda.py::test_gather_rows[3-dtype1]"
    "tests/gpu/test_glue_cuda.py::test_gather_rows[64-dtype1]"
    "tests/gpu/test_histogram.py::test_equals_reference[(37, 3)-60]"
    "tests/gpu/test_histogram.py::test_equals_reference[(37, 3)-40000]"
    "tests/gpu/test_batch_losses_cuda.py::test_values_and_gradients[1000-8-both]"
    "tests/gpu/test_layer_gpu.py::test_packed_h_has_the_bits_of_the_cpu[132-dtype0]"
    "tests/gpu/test_layer_gpu.py::test_loop_in_fp32_has_the_values_of_the_cpu"
    "tests/gpu/test_router_cuda.py::test_values_and_gradients[e8-k2-dtype1]"
    "tests/gpu/test_router_cuda.py::test_values_and_gradients[e129-k5-bias-dtype0]"
    "tests/gpu/test_router_cuda.py::test_values_and_gradients[e40-k40-general-dtype0]"
    "tests/gpu/test_router_cuda.py::test_what_training_asks_for[e8-k2-dtype1-True]"
    "tests/gpu/test_router_cuda.py::test_what_training_asks_for[e256-k8-deepseek-dtype1-True]"
    "tests/gpu/test_router_cuda.py::test_copy_ids[dtype1]"
    "tests/gpu/test_nvlink_phases_gpu.py::test_small[keys0-expert_major]"
    "tests/gpu/test_nvlink_phases_gpu.py::test_small[keys2-compact]"
    "tests/gpu/test_nvlink_phases_gpu.py::test_small[keys3-expert_major]"
    "tests/gpu/test_nvlink_phases_gpu.py::test_small_shapes_of_the_routing[expert_major-slots-no token]"
    "tests/gpu/test_nvlink_phases_gpu.py::test_small_shapes_of_the_routing[expert_major-dense-one slot]"
)
[ "${1:-}" != --all ] || { shift; tests=(tests/gpu); }
tools=(memcheck racecheck synccheck initcheck)
case "${1:-}" in memcheck | racecheck | synccheck | initcheck) tools=("$1"); shift ;; esac
options=()
if [ $# -gt 0 ]; then  # paths first, then pytest's options
    tests=()
    while [ $# -gt 0 ] && [[ "$1" == tests/* ]]; do tests+=("$1"); shift; done
    options=("$@")
fi

# A sanitizer does not say what it looked at, so the same tests run once under the profiler (not with --all: too many events).
if [ "${tests[0]}" = tests/gpu ]; then
    kernels="kernels not counted"
else
    "$PYTHON" scripts/kernels_run.py "${tests[@]}" "${options[@]}" >"$LOGS/kernels.log" 2>&1 || { tail -n 30 "$LOGS/kernels.log"; exit 1; }
    kernels="$(tail -n 1 "$LOGS/kernels.log")"
fi
# torch's caching allocator hands out pieces of large blocks: without it an access past the end of a tensor is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
failed=0
# run TOOL LOG TESTS...: one process under the tool; adds to errors, passed and broken
run() {
    local tool="$1" log="$2" filter=(--kernel-name kernel_substring=moe_layer) found code
    shift 2
    [ "$tool" != initcheck ] || filter=(--show-backtrace no --print-limit 1000)
    compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all "${filter[@]}" \
        "$PYTHON" -m pytest -q -p no:cacheprovider -o timeout=3000 "$@" >"$log" 2>&1
    code=$?
    if [ "$tool" = initcheck ]; then
        found="$(grep -cE "^=+     at .*moe_layer" "$log")"
    else
        found="$(grep -E "^=+ (ERROR|RACECHECK) SUMMARY" "$log" | grep -oE "[0-9]+ errors?" | awk '{n += $1} END {print n + 0}')"
    fi
    errors=$((errors + found))
    passed=$((passed + $(grep -oE "^[0-9]+ passed" "$log" | grep -oE "[0-9]+" || echo 0)))
    # initcheck's exit code also counts what it says of others' kernels
    if [ $code -ne 0 ] && ! { [ "$tool" = initcheck ] && [ $code -eq 99 ]; } || ! grep -qE "^[0-9]+ passed" "$log"; then
        broken="$broken $(basename "$log")($code)"
    fi
}
for tool in "${tools[@]}"; do
    began=$SECONDS errors=0 passed=0 broken=""
    for file in $(printf '%s\n' "${tests[@]}" | grep -oE "^tests/[^: ]+" | sort -u); do
        mapfile -t part < <(printf '%s\n' "${tests[@]}" | grep -E "^$file($|::)")
        run "$tool" "$LOGS/$tool-$(basename "$file" .py).log" "${part[@]}" "${options[@]}"
    done
    [ "$errors" -eq 0 ] && [ -z "$broken" ] || failed=1
    echo "sanitize: $tool: $errors errors, $passed tests passed, failed:${broken:- none}; $((SECONDS - began)) s; $kernels; $LOGS/$tool-*.log"
done
exit $failed
