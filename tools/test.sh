#!/usr/bin/env bash
# Sets up what is missing and runs every test. Arguments go to `cargo test` (a filter, say).
# Tests that need a GPU use one if it is there, say "skipped" if not, and fail without one under
# DSPARK_REQUIRE_GPU=1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup.sh --demo

export DSPARK_DEMO_TARGET=${DSPARK_DEMO_TARGET:-$dspark_target/demo/target}
cargo test --release "$@"
