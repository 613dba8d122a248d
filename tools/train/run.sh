#!/usr/bin/env bash
# Corpus, both drafters and their evaluation in one time box on one GPU.
#
#   run.sh TARGET_DIR OUT_DIR PROMPTS_DIR [--smoke]
#
# Results are packed into SHIP (default OUT_DIR/ship) after every phase; a phase that fails costs only itself.
# Settings are environment variables. DSpark's training gets what the other phases leave of BUDGET seconds.
set -uo pipefail
if [ $# -lt 3 ]; then sed -n '2,7p' "$0"; exit 2; fi
target=$1 out=$2 prompts=$3 smoke=${4:-}
here=$(cd "$(dirname "$0")" && pwd)
if [ "$smoke" = --smoke ]; then
  : "${BUDGET:=75}" "${GEN_SECONDS:=8}" "${DSPARK_SECONDS:=8}" "${MTP_SECONDS:=5}" "${EVAL_SECONDS:=15}" "${EVAL_LIMIT:=4}" "${EVAL_NEW:=64}"
fi
: "${BUDGET:=540}" "${GEN_SECONDS:=150}" "${MTP_SECONDS:=65}" "${EVAL_SECONDS:=45}" "${DSPARK_SECONDS:=}"
: "${SLOTS:=2048}" "${MAX_LEN:=640}" "${ANSWER_CAP:=448}" "${TOKENS:=16384}" "${EVAL_LIMIT:=80}" "${EVAL_NEW:=256}"
: "${LR:=1.2e-3}" "${MTP_LR:=1.2e-3}" "${SEED:=1}" "${PYTHON:=python3}" "${SHIP:=$out/ship}" "${EVAL_SETS:=gsm8k humaneval mt-bench}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true
command="GEN_SECONDS=$GEN_SECONDS DSPARK_SECONDS=$DSPARK_SECONDS MTP_SECONDS=$MTP_SECONDS BUDGET=$BUDGET SLOTS=$SLOTS MAX_LEN=$MAX_LEN ANSWER_CAP=$ANSWER_CAP TOKENS=$TOKENS LR=$LR MTP_LR=$MTP_LR SEED=$SEED tools/train/run.sh TARGET OUT PROMPTS"
mkdir -p "$out"
say() { echo "=== $SECONDS s: $*"; }
ship() { "$PYTHON" "$here/ship.py" pack "$out" "$SHIP" --command "$command"; }
generate() { "$PYTHON" "$here/generate.py" --target "$target" --out "$out" --gen-seconds "$1" --slots "$2" --max-len "$MAX_LEN" --answer-cap "$ANSWER_CAP" --seed "$SEED"; }
train() { "$PYTHON" "$here/train.py" "$1" --target "$target" --corpus "$out/corpus.npz" --out "$out/$1" --seconds "$2" --lr "$3" --tokens "$TOKENS" --max-len "$MAX_LEN" --seed "$SEED"; }

say "generate"
generate "$GEN_SECONDS" "$SLOTS" || { say "again without Triton"; DSPARK_NO_TRITON=1 generate "$((GEN_SECONDS * 2 / 3))" "$((SLOTS / 2 + 1))"; } || exit 1
seconds=${DSPARK_SECONDS:-$((BUDGET - SECONDS - MTP_SECONDS - EVAL_SECONDS - 30))}
say "train dspark for $seconds s"
train dspark "$seconds" "$LR" || { say "again without Triton"; export DSPARK_NO_TRITON=1; train dspark "$((seconds * 2 / 3))" "$LR"; }
ship
say "train mtp for $MTP_SECONDS s"
train mtp "$MTP_SECONDS" "$MTP_LR"
ship
say "evaluate"
files=(); for set in $EVAL_SETS; do files+=("$prompts/$set.jsonl"); done
"$PYTHON" "$here/evaluate.py" --target "$target" --drafter "$out/dspark" --drafter "$out/mtp" --prompts "${files[@]}" \
  --limit "$EVAL_LIMIT" --max-new "$EVAL_NEW" --seconds "$EVAL_SECONDS" --out "$out/eval.json" --seed "$SEED"
ship
say "done"
