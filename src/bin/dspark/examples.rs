//! What `--help` shows below the options.

pub const GENERATE_EXAMPLES: &str = "\
Examples:
  dspark generate --target Qwen3-4B --draft dspark_qwen3_4b_block7 --prompt 'Why is the sky blue?'
  dspark generate --target Qwen3-4B --mode none --temperature 0.7 --top-p 0.9 --seed 7 --prompt Hi
  dspark generate --target DIR --draft DIR --prompts questions.jsonl --max-num-reqs 16 --stats
  dspark generate --target DIR --draft DIR --prompt-ids 1,2,3 --schedule threshold:0.5 --trace t.json
  dspark generate --target DIR --draft DIR --prompt Hi --logprobs 3

A prompts file has one JSON object a line: {\"turns\": [\"user message\", ...]} (the first turn is used),
{\"prompt\": \"text\"} or {\"prompt_ids\": [1, 2, 3]}.";

pub const COMPARE_EXAMPLES: &str = "\
Examples:
  dspark compare --target DIR --draft dspark=DIR --draft mtp=DIR --prompt 'Why is the sky blue?'
  dspark compare --target DIR --draft dspark=DIR --draft mtp=DIR --prompts gsm8k.jsonl --limit 40 \\
      --max-num-reqs 16 --temperature 1";

pub const INVARIANCE_EXAMPLES: &str = "\
Examples:
  dspark invariance --target DIR --draft dspark=DIR --draft mtp=DIR --prompts questions.jsonl --limit 200 \\
      --temperature 0.7 --rule coupled --draft-lens 1,3 --schedules threshold:0.5,delayed \\
      --head-forms candidates:64 --max-num-reqs 200

Exit status 1 means that outputs differ by more than rounding explains.";

pub const DOCTOR_EXAMPLES: &str = "\
Examples:
  dspark doctor
  dspark doctor --target Qwen3-4B --draft dspark_qwen3_4b_block7";

pub const CALIBRATE_EXAMPLES: &str = "\
Examples:
  dspark calibrate --target DIR --draft DIR --prompts math.jsonl --prompts chat.jsonl --temperature 1
  dspark calibrate --target DIR --draft DIR --traces a.json --held-out b.json -o DIR/calibration.json

Writes the calibration and, beside it, diagrams as .svg and .png. A calibration.json in the drafter's
directory is used without being asked for.";

pub const PROFILE_EXAMPLES: &str = "\
Examples:
  dspark profile --target Qwen3-4B --draft dspark_qwen3_4b_block7 --max-num-reqs 256 -o cost.json
  dspark profile --target tools/bench/shapes/qwen3-8b --draft tools/bench/shapes/qwen3-8b-dspark \\
      --max-num-reqs 512 --context 128 -o cost.json

A directory whose config.json says \"random_weights\": true needs no weights: only shapes cost time.";

pub const SIMULATE_EXAMPLES: &str = "\
Examples:
  dspark simulate --traces chat.json --cost cost.json --loads 1,8,64,512
  dspark simulate --traces chat.json --traces math.json --cost cost.json --loads 256 --arrivals waves:50000:16
  dspark simulate --traces chat.json --cost cost.json --loads 512 --arrivals bursts:2:30:20
  dspark simulate --traces chat.json --cost cost.json --loads 64 --rules threshold:0.3,threshold:0.6,threshold:0.9

Traces are what `dspark generate --schedule fixed --trace FILE` writes.";
