//! What the commands about schedules take: `calibrate`, `profile`, `simulate`.

use std::path::PathBuf;

use clap::Args;
use clap::builder::TypedValueParser as _;
use dspark::schedule::Policy;
use dspark::schedule::simulate::Arrivals;

use super::{RunArgs, SamplingArgs};

#[derive(Clone, Debug, Args)]
pub struct CalibrateArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Drafter checkpoint with a confidence head.
    #[arg(long, value_name = "DIR")]
    pub draft: PathBuf,
    /// A JSONL file of prompts to generate from; may be given several times.
    #[arg(long, value_name = "FILE", required_unless_present = "traces")]
    pub prompts: Vec<PathBuf>,
    /// Fit recorded rounds instead of generating; may be given several times.
    #[arg(long, value_name = "FILE", conflicts_with = "prompts")]
    pub traces: Vec<PathBuf>,
    /// Judge the fit on these recorded rounds; may be given several times.
    #[arg(long, value_name = "FILE")]
    pub held_out: Vec<PathBuf>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Where to write the temperatures.
    #[arg(short, long, value_name = "FILE", default_value = "calibration.json")]
    pub out: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub struct ProfileArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Drafter checkpoint.
    #[arg(long, value_name = "DIR")]
    pub draft: Option<PathBuf>,
    /// Tokens drafted in a round [default: the drafter's block size; 1 for mtp].
    #[arg(long, value_name = "N")]
    pub draft_len: Option<usize>,
    /// The longest context to measure at.
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub context: usize,
    /// Where to write the costs.
    #[arg(short, long, value_name = "FILE", default_value = "cost.json")]
    pub out: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub struct SimulateArgs {
    /// Recorded rounds, all drafts verified; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    pub traces: Vec<PathBuf>,
    /// Step costs.
    #[arg(long, value_name = "FILE")]
    pub cost: PathBuf,
    /// Temperatures of the confidences.
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Most requests at once, one run for each number.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,8,64,512",
        value_parser = clap::value_parser!(u32).range(1..=4096).map(|n| n as usize))]
    pub loads: Vec<usize>,
    /// Schedules to run beside no drafts, every fixed length and the oracle.
    #[arg(
        long,
        value_name = "RULE,..",
        value_delimiter = ',',
        default_value = "algorithm1,delayed"
    )]
    pub rules: Vec<Policy>,
    /// How requests come: closed (always as many as the load); poisson:RATE (requests a second, at most the load at
    /// once, the others wait); bursts:CALM:BUSY:SECONDS (the rate jumps between two); waves:TOKENS:LOW (the load and LOW
    /// requests in turns of equal work) or tides:SECONDS:LOW (in turns of equal time).
    #[arg(long, value_name = "HOW", default_value = "closed", value_parser = crate::simulate::parse_arrivals)]
    pub arrivals: Arrivals,
    /// Tokens drafted in a round [default: as recorded].
    #[arg(long, value_name = "N")]
    pub draft_len: Option<usize>,
    /// Steps to run (with poisson and bursts: as many requests as full batches serve in them).
    #[arg(long, default_value_t = 2000, value_name = "N")]
    pub steps: usize,
    /// Tokens of a request, on average.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub num_tokens: usize,
    /// Cache entries of a request when it starts.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub prompt_len: usize,
    /// Learn on the way: online STS, cost factors, bypass.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub adapt: bool,
    /// Of all draws.
    #[arg(long, default_value_t = 0, value_name = "S")]
    pub seed: u64,
    /// Print the figures as JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}
