//! The command line's grammar.

mod schedule;

pub use schedule::{CalibrateArgs, ProfileArgs, SimulateArgs};

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use dspark::ops::{HeadForm, KvDtype, Rule};
use dspark::schedule::Policy;

use crate::examples::{
    CALIBRATE_EXAMPLES, COMPARE_EXAMPLES, DOCTOR_EXAMPLES, GENERATE_EXAMPLES, INVARIANCE_EXAMPLES,
    PROFILE_EXAMPLES, SIMULATE_EXAMPLES,
};

/// DSpark speculative decoding: generate, compare with the baselines, look after the set-up.
#[derive(Debug, Parser)]
#[command(name = "dspark", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Generate text with a target model, with or without a drafter.
    #[command(after_help = GENERATE_EXAMPLES)]
    Generate(GenerateArgs),
    /// Run the same prompts with no drafter and with each given one, and show them side by side.
    #[command(after_help = COMPARE_EXAMPLES)]
    Compare(CompareArgs),
    /// Check that the text depends on seed and target alone: every way to decode against plain decoding.
    #[command(after_help = INVARIANCE_EXAMPLES)]
    Invariance(InvarianceArgs),
    /// Say what was built, which devices there are, and whether a target and a drafter fit.
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(DoctorArgs),
    /// Fit the temperatures of a drafter's confidences and draw their reliability.
    #[command(after_help = CALIBRATE_EXAMPLES)]
    Calibrate(CalibrateArgs),
    /// Measure what a step costs on this machine, for algorithm1, delayed and global.
    #[command(after_help = PROFILE_EXAMPLES)]
    Profile(ProfileArgs),
    /// Replay recorded rounds against a step cost for any load and schedule.
    #[command(after_help = SIMULATE_EXAMPLES)]
    Simulate(SimulateArgs),
}

/// How tokens are proposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Plain autoregressive decoding.
    None,
    /// An MTP-1 module.
    Mtp,
    /// A DFlash drafter: parallel drafts without a sequential head.
    Dflash,
    /// A DSpark drafter.
    Dspark,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mtp => "mtp",
            Self::Dflash => "dflash",
            Self::Dspark => "dspark",
        }
    }
}

/// Where to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "expected auto, cpu, cuda or cuda:N".to_owned()),
        }
    }
}

/// Model and memory of a run.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Target checkpoint: a Hugging Face directory (Qwen3 dense or Llama).
    #[arg(long, value_name = "DIR")]
    pub target: PathBuf,
    /// Where to run: auto (CUDA where there is a device), cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceChoice,
    /// Requests decoded together; further ones wait in order.
    #[arg(
        long,
        default_value_t = 8,
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub max_num_reqs: usize,
    /// Tokens in a KV page.
    #[arg(
        long,
        default_value_t = 16,
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub page_size: usize,
    /// Pages in the KV pool [default: enough for max-num-reqs of the longest request; more are never made].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub num_pages: Option<usize>,
    /// How the target's KV cache holds keys and values: native (bf16 on CUDA, f32 on the CPU) or fp8 (e4m3: half of the
    /// memory and traffic, with the checkpoint's k_scale and v_scale, else as they are, cut at +-448). The output is that of
    /// plain decoding with the same cache; a drafter's own cache stays native.
    #[arg(long, default_value = "native", value_name = "TYPE")]
    pub kv_dtype: KvDtype,
    /// Prompt tokens run through the target in one pass.
    #[arg(
        long,
        default_value_t = 256,
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub prefill_chunk: usize,
    /// Threads of the cpu device, at most 1024 [default: all].
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = parse_threads)]
    pub threads: Option<usize>,
    /// On CUDA, attention of a request that is bitwise the same whatever else is decoded beside it; somewhat slower.
    #[arg(long)]
    pub batch_invariant: bool,
}

/// What to generate from.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub struct PromptArgs {
    /// One user message (or plain text with --raw).
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Token ids, separated by commas; works without a tokenizer.
    #[arg(long, value_name = "IDS", value_parser = parse_ids)]
    pub prompt_ids: Option<Ids>,
    /// A JSONL file of prompts.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
}

/// Sampling and stopping.
#[derive(Clone, Debug, Args)]
pub struct SamplingArgs {
    /// Tokens to generate for each prompt, at most.
    #[arg(
        long,
        default_value_t = 256,
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub max_new_tokens: usize,
    /// 0 is greedy.
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "T",
        allow_negative_numbers = true
    )]
    pub temperature: f32,
    /// Sample from the K most likely tokens; 0 is off.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "K",
        allow_negative_numbers = true
    )]
    pub top_k: u32,
    /// Sample from the smallest set of this probability; 1 is off.
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    pub top_p: f32,
    /// Sample from tokens at least P times as likely as the likeliest; 0 is off.
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    pub min_p: f32,
    /// Seed of the first request; request i uses S + i.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "S",
        allow_negative_numbers = true
    )]
    pub seed: u64,
    /// How drafts are accepted at temperature > 0; none changes the target's law. token: each by its own; block: by the
    /// longest prefix that passes, a little longer; coupled: the text of plain decoding with the same seed, token by token.
    #[arg(long, default_value = "token", value_name = "RULE")]
    pub rule: Rule,
    /// Divide the positive logits of all tokens so far by P and multiply the others; 1 is off.
    #[arg(long, default_value_t = 1.0, value_name = "P")]
    pub repetition_penalty: f32,
    /// Take P from the logits of all generated tokens; 0 is off.
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    pub presence_penalty: f32,
    /// Take P from the logits of all generated tokens for each time they came; 0 is off.
    #[arg(
        long,
        default_value_t = 0.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    pub frequency_penalty: f32,
    /// Stop before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Keep going past the model's end tokens.
    #[arg(long)]
    pub ignore_eos: bool,
    /// No chat template: the prompt is plain text.
    #[arg(long)]
    pub raw: bool,
}

/// How many tokens to draft and to verify.
#[derive(Clone, Debug, Args)]
pub struct DraftArgs {
    /// Tokens drafted in a round [default: the drafter's block size; 1 for mtp].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub draft_len: Option<usize>,
    /// How many drafts are verified: fixed (all), threshold:X (cut before the first confidence below X), algorithm1
    /// (by calibrated confidence and measured cost until throughput first falls; also called adaptive), delayed (the
    /// best number by the confidences of two steps before), global (the best number; greedy requests only).
    #[arg(long, default_value = "fixed", value_name = "RULE")]
    pub schedule: Policy,
    /// How a DSpark or DFlash head drafts: full (from the whole vocabulary); full-skip (the same drafts, on CUDA
    /// without reading rows of W2 that cannot win while at most eight requests, all greedy or coupled, draft with a large W2); full-fp8 (by a copy of W2 in
    /// e4m3, made at load); candidates:K (from the K likeliest tokens before the head's own bias) or candidates:K:M (joined with the M
    /// tokens that the token before speaks for most, from a table made at load); at most 256 candidates in all.
    #[arg(long, default_value = "full", value_name = "FORM")]
    pub head_form: HeadForm,
    /// Verify second choices beside the first N drafts, with --head-form candidates:K: where a draft is turned down, its
    /// second choice may be kept.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "N",
        allow_negative_numbers = true
    )]
    pub alternates: usize,
    /// Temperatures of the drafter's confidences [default: calibration.json in the drafter's directory, if there].
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Step costs of `dspark profile`; measured and written where the file does not exist yet [default: measured].
    #[arg(long, value_name = "FILE")]
    pub cost: Option<PathBuf>,
}

impl DraftArgs {
    /// Every draft verified, nothing given.
    pub fn fixed() -> Self {
        Self {
            draft_len: None,
            schedule: Policy::Fixed,
            head_form: HeadForm::Full,
            alternates: 0,
            calibration: None,
            cost: None,
        }
    }
}

#[derive(Clone, Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Drafter checkpoint (DeepSpec's DSpark or DFlash, or an MTP-1 module).
    #[arg(long, value_name = "DIR")]
    pub draft: Option<PathBuf>,
    /// How tokens are proposed [default: what --draft holds, none without it].
    #[arg(long, value_name = "MODE")]
    pub mode: Option<Mode>,
    #[command(flatten)]
    pub prompts: PromptArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub drafting: DraftArgs,
    /// Print after each answer how likely its tokens were and the N likeliest beside each; at most 20, 0 for none.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub logprobs: Option<usize>,
    /// Write every round and every step as JSON, with what each took and was expected to.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Print accepted length, acceptance by position and speed to standard error.
    #[arg(long)]
    pub stats: bool,
}

/// A target, its drafters, and what they answer in several ways.
#[derive(Clone, Debug, Args)]
pub struct PairsArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// A drafter and its mode, as MODE=DIR; may be given several times.
    #[arg(long, value_name = "MODE=DIR", required = true, value_parser = parse_mode_dir)]
    pub draft: Vec<(Mode, PathBuf)>,
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// Use the first N prompts of the file.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub limit: Option<NonZeroUsize>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Clone, Debug, Args)]
pub struct CompareArgs {
    #[command(flatten)]
    pub pairs: PairsArgs,
    #[command(flatten)]
    pub drafting: DraftArgs,
    /// Also run each DSpark and DFlash drafter with these forms of its head (--head-form).
    #[arg(long, value_name = "FORM,..", value_delimiter = ',')]
    pub head_forms: Vec<HeadForm>,
    /// Print the figures as JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct InvarianceArgs {
    #[command(flatten)]
    pub pairs: PairsArgs,
    /// Numbers of requests decoded together, beside --max-num-reqs; the first is what the others are compared with.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1")]
    pub batches: Vec<usize>,
    /// Draft lengths, beside the drafter's longest (1 for mtp).
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    pub draft_lens: Vec<usize>,
    /// Schedules beside fixed.
    #[arg(long, value_name = "RULE,..", value_delimiter = ',')]
    pub schedules: Vec<Policy>,
    /// Forms of the head beside full.
    #[arg(long, value_name = "FORM,..", value_delimiter = ',')]
    pub head_forms: Vec<HeadForm>,
    /// Also run each form of candidates with second choices beside the first N drafts; 0 is off.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub alternates: usize,
}

#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Target checkpoint to check.
    #[arg(long, value_name = "DIR")]
    pub target: Option<PathBuf>,
    /// Drafter checkpoint to check against the target.
    #[arg(long, value_name = "DIR", requires = "target")]
    pub draft: Option<PathBuf>,
    /// Where to run the check: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceChoice,
}

/// Parsed `--prompt-ids`.
#[derive(Clone, Debug)]
pub struct Ids(pub Vec<u32>);

fn parse_ids(text: &str) -> Result<Ids, String> {
    let parse = |id: &str| {
        id.trim().parse().map_err(|_| {
            format!(
                "expected token ids separated by commas, found '{}'",
                id.trim()
            )
        })
    };
    if text.trim().is_empty() {
        return Ok(Ids(Vec::new()));
    }
    text.split(',')
        .map(parse)
        .collect::<Result<_, _>>()
        .map(Ids)
}

fn parse_threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=1024).contains(&n) => Ok(n),
        _ => Err("expected 1 to 1024".to_owned()),
    }
}

fn parse_mode_dir(text: &str) -> Result<(Mode, PathBuf), String> {
    let expected = "expected MODE=DIR with MODE one of mtp, dflash, dspark";
    let (mode, dir) = text.split_once('=').ok_or(expected)?;
    match Mode::from_str(mode, false) {
        Ok(mode) if mode != Mode::None && !dir.is_empty() => Ok((mode, dir.into())),
        _ => Err(expected.to_owned()),
    }
}
