#!/usr/bin/env bash
# Looks into one family of kernels with Nsight Compute.
#
#   tools/profile.sh FAMILY [CASE]        FAMILY: attention, draft_head, candidates, acceptance, layers, linear or schedule
#                                         CASE: text in the case's name, such as "D=128 reqs=32 context=4096 q=8"
#
# Runs `benches/kernels` with --once: every case once, outside of a graph. Nsight Compute replays each kernel from cold
# caches for every group of counters and leaves the clocks alone (--clock-control none), so that a duration it gives is
# comparable with the bench's. Name a case: a family has dozens, and each kernel takes seconds.
#
# Reads:  BENCH   the bench binary; default: built here (cargo bench --no-run --bench kernels)
#         NCU     Nsight Compute; default: ncu from PATH or CUDA_HOME
#         KERNEL  only kernels whose name matches this regular expression
#         COUNT   at most so many kernels (default 40)
#         OUT     where the report goes; default target/profile
# Writes: $OUT/<family>.ncu-rep (for ncu-ui) and $OUT/<family>.txt (the same for reading). Needs permission to read the
# GPU's counters: root, or the driver's NVreg_RestrictProfilingToAdminUsers=0 (ERR_NVGPUCTRPERM says it is missing).
#
# How to read it, in this order:
#   SpeedOfLight             memory- or compute-bound, and how far from either; below 60 % of both it is latency
#   LaunchStats, Occupancy   waves (a tail of a fraction of one?), registers, shared memory, what limits residency
#   MemoryWorkloadAnalysis   DRAM bytes against the bench's floor: more means something is read twice; sectors per
#                            request; bank conflicts
#   SchedulerStats, WarpStateStats   what warps wait for when they do not issue
#   SourceCounters           which lines; uncoalesced accesses
set -euo pipefail

die() { printf 'error: %s\n' "$*" >&2; exit 2; }

case ${1:-} in
    '' | -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; [ $# -gt 0 ] && exit 0 || exit 2 ;;
esac
[ $# -le 2 ] || die "expected FAMILY and at most one CASE, found $# arguments"
family=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-${CARGO_TARGET_DIR:-$root/target}/profile}
mkdir -p "$out"

ncu=${NCU:-$(command -v ncu || true)}
[ -n "$ncu" ] || ncu=${CUDA_HOME:+$CUDA_HOME/bin/ncu}
[ -n "$ncu" ] && [ -x "$ncu" ] || die "ncu not found; set NCU or CUDA_HOME, or put it in PATH"

bench=${BENCH:-}
if [ -z "$bench" ]; then
    cd "$root"
    bench=$(cargo bench --no-run --bench kernels --message-format=json-render-diagnostics |
        python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("target", {}).get("name") == "kernels" and message.get("executable"): print(message["executable"])' |
        tail -n 1)
fi
[ -x "$bench" ] || die "$bench: expected the binary of benches/kernels"

sections=()
for section in SpeedOfLight LaunchStats Occupancy MemoryWorkloadAnalysis MemoryWorkloadAnalysis_Tables SchedulerStats \
    WarpStateStats SourceCounters; do
    sections+=(--section "$section")
done
"$ncu" --clock-control none --cache-control all --launch-count "${COUNT:-40}" \
    ${KERNEL:+--kernel-name "regex:$KERNEL"} "${sections[@]}" --import-source yes \
    --force-overwrite --export "$out/$family.ncu-rep" "$bench" --once "$family" ${2:+--case "$2"}
"$ncu" --import "$out/$family.ncu-rep" --page details >"$out/$family.txt"
printf '%s\n' "$out/$family.ncu-rep" "$out/$family.txt"
