#!/usr/bin/env bash
# Sets up what is missing, runs every test and ends with their number. Arguments go to `cargo test` (a filter, say).
# Tests that need a GPU use one if it is there, say "skipped" if not, and fail without one under
# DSPARK_REQUIRE_GPU=1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup.sh --demo

export DSPARK_DEMO_TARGET=${DSPARK_DEMO_TARGET:-$dspark_target/demo/target}
log=$dspark_target/test.log
status=0
cargo test --release --no-fail-fast "$@" 2>&1 | tee "$log" || status=$?

# cargo counts by binary; add up.
awk '/^test result:/ { passed += $4; failed += $6; skipped += $8 }
     END { printf "\n%d passed, %d failed, %d skipped\n", passed, failed, skipped }' "$log"
exit "$status"
