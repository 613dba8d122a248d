#!/usr/bin/env bash
# Runs a test binary under compute-sanitizer: memcheck, initcheck, synccheck and racecheck, one line for each.
#
#   tools/sanitize.sh BIN [FILTER]        BIN: a test binary, such as target/release/deps/cuda_ops-<hash>
#                                         (`cargo test --release --no-run` names it); FILTER: which tests
#
# Logs go to $OUT, or target/sanitizer where OUT is not set: <binary>.<tool>.log (what the sanitizer says) and
# <binary>.<tool>.out (what the binary prints). The exit status is 0 when every tool ran and found nothing, 1 when one
# found something or the tests failed under it, 2 when one could not run.
#
# TOOLS="memcheck racecheck" runs some of the four. The sanitizer is COMPUTE_SANITIZER, or the one in CUDA_HOME, in
# PATH or in target/cuda-toolkit; it is also a wheel of its own (pip install nvidia-cuda-sanitizer-api==13.0.*).
#
# initcheck and racecheck leave out cuBLASLt's kernels, which are not ours to judge: they read past what was written
# inside tiles whose result they drop, and synchronise through means racecheck does not follow. What they write still
# counts as initialised.
set -uo pipefail

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

case ${1:-} in
    '' | -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; [ $# -gt 0 ] && exit 0 || exit 2 ;;
esac
[ $# -le 2 ] || die "expected BIN and at most one FILTER, found $# arguments"
bin=$1
filter=${2:-}
[ -x "$bin" ] || die "$bin: expected a test binary"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
logs=${OUT:-$target/sanitizer}
mkdir -p "$logs" || die "$logs: cannot be made"

find_sanitizer() {
    local candidate
    for candidate in "${COMPUTE_SANITIZER:-}" "${CUDA_HOME:+$CUDA_HOME/bin/compute-sanitizer}" \
        "$(command -v compute-sanitizer)" "$target/cuda-toolkit/nvidia/cu13/bin/compute-sanitizer"; do
        [ -n "$candidate" ] && [ -x "$candidate" ] && { printf '%s\n' "$candidate"; return; }
    done
    return 1
}
sanitizer=$(find_sanitizer) || die "compute-sanitizer not found; set COMPUTE_SANITIZER or CUDA_HOME, or install the \
wheel nvidia-cuda-sanitizer-api==13.0.* into $target/cuda-toolkit (pip install --target)"

# The kernels of cuBLAS and of the CUTLASS inside it, by their mangled names.
not_ours='regex=cublas|cutlass|gemm|gemv|splitK|nvjet'

options_of() {
    case $1 in
        memcheck) echo "--leak-check no --report-api-errors explicit" ;;
        initcheck) echo "--kernel-name-exclude $not_ours" ;;
        synccheck) echo "" ;;
        racecheck) echo "--racecheck-report analysis --kernel-name-exclude $not_ours" ;;
        *) die "TOOLS: expected some of memcheck initcheck synccheck racecheck, found $1" ;;
    esac
}

# What the tool counted: "ERROR SUMMARY: 0 errors" or "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)".
count_in() { sed -n 's/.*\(ERROR\|RACECHECK\) SUMMARY: \([0-9]*\) .*/\2/p' "$1" | tail -n 1; }

worst=0
name=$(basename "$bin")
for tool in ${TOOLS:-memcheck initcheck synccheck racecheck}; do
    options=$(options_of "$tool") || exit 2
    log=$logs/$name.$tool.log
    out=$logs/$name.$tool.out
    started=$SECONDS
    # shellcheck disable=SC2086 # options and filter are words, or nothing
    DSPARK_REQUIRE_GPU=1 "$sanitizer" --tool "$tool" --error-exitcode 99 --print-limit 50 $options --log-file "$log" \
        "$bin" --test-threads=1 ${filter:+"$filter"} >"$out" 2>&1
    status=$?
    count=$(count_in "$log" 2>/dev/null)
    passed=$(sed -n 's/^test result: \(.*\); [0-9]* ignored.*/\1/p' "$out" | tail -n 1)
    printf '%s: %s errors; tests: %s; %ds (%s)\n' "$tool" "${count:-no count of}" "${passed:-no result}" \
        $((SECONDS - started)) "$log"
    if [ -z "$count" ] || [ -z "$passed" ]; then
        worst=2
    elif [ "$status" -ne 0 ] || [ "$count" -ne 0 ]; then
        [ "$worst" = 2 ] || worst=1
    fi
done
exit $worst
