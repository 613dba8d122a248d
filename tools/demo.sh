#!/usr/bin/env bash
# Sets up what is missing and lets a small real model answer one question three ways: plain decoding, MTP-1
# and DSpark. Prints the texts, the accepted length, acceptance by position and tokens per second.
# Arguments are passed to `dspark compare` after the demo's own (a later --prompt is an error; see --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup.sh --demo

dspark_say "building dspark (the first time takes some minutes)"
cargo build --release --quiet --bin dspark
dspark_say "running"
"$dspark_target/release/dspark" compare \
    --target "$dspark_target/demo/target" \
    --draft mtp=tools/demo/mtp \
    --draft dspark=tools/demo/dspark \
    --prompt "Write a Python function that returns the sum of the squares of a list of numbers, and explain how it works." \
    --max-new-tokens 160 "$@"
