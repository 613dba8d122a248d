#!/usr/bin/env bash
# Sets up what is missing and holds every way to decode against plain decoding, on the demo pair: 200 self-written
# prompts, the coupled rule at temperature 0.7, modes none, mtp and dspark, several draft lengths, schedules, batches
# and forms of the head. On CUDA `--batch-invariant` takes the near-ties away. Arguments are passed to `dspark invariance` after these (`--limit 20`, say: the CPU is slow).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup.sh --demo

dspark_say "building dspark (the first time takes some minutes)"
cargo build --release --quiet --bin dspark
prompts=$dspark_target/invariance.jsonl
PYTHONPATH=tools/train python3 - >"$prompts" <<'PYTHON'
import itertools, json
from prompts import turns
whole = (turn for turn in turns(200) if not turn.open)
for turn in itertools.islice(whole, 200):
    print(json.dumps({"prompt": turn.text}))
PYTHON
dspark_say "running"
"$dspark_target/release/dspark" invariance \
    --target "$dspark_target/demo/target" --draft dspark=tools/demo/dspark --draft mtp=tools/demo/mtp \
    --prompts "$prompts" --temperature 0.7 --rule coupled --seed 1 --max-new-tokens 64 \
    --max-num-reqs 200 --batches 1 --draft-lens 1,3,5 --schedules threshold:0.5,delayed \
    --head-forms full-skip,full-fp8,candidates:64,candidates:64:16,candidates:8 "$@"
