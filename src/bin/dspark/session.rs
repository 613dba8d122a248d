//! What every command does before it can work: choose the device, load the pair, start an engine.

use std::path::{Path, PathBuf};

use anyhow::Result;
use dspark::engine::text::Tokenizer;
use dspark::engine::{Completion, Engine, EngineConfig, Event, Request};
use dspark::model::{DrafterConfig, GenerationConfig, Limits, Pair};
use dspark::ops::{HeadKind, Ops, SamplingParams};
use dspark::reference::Reference;
use dspark::schedule::Policy;
use dspark::{Error, device_is_available};

use crate::args::{DeviceChoice, DraftArgs, Mode, RunArgs, SamplingArgs};

/// Work that runs on whichever backend the user chose.
pub trait Job {
    type Output;
    fn run<O: Ops + 'static>(self, ops: O) -> Result<Self::Output>;
}

/// Opens the device and runs `job` on it.
pub fn on_device<J: Job>(
    choice: DeviceChoice,
    threads: Option<usize>,
    job: J,
) -> Result<J::Output> {
    let choice = match choice {
        DeviceChoice::Auto if device_is_available() => DeviceChoice::Cuda(0),
        DeviceChoice::Auto => DeviceChoice::Cpu,
        chosen => chosen,
    };
    match choice {
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(ordinal) => job.run(dspark::ops::cuda::Cuda::open(ordinal)?),
        #[cfg(not(feature = "cuda"))]
        DeviceChoice::Cuda(_) => {
            let expected = "auto or cpu (this build is without the `cuda` feature)";
            Err(Error::argument("device", expected, "cuda").into())
        }
        DeviceChoice::Auto | DeviceChoice::Cpu => job.run(Reference::new(threads)?),
    }
}

/// How tokens will be proposed, settled from `--mode` and `--draft`.
#[derive(Clone, Debug)]
pub struct Drafting {
    pub mode: Mode,
    /// The drafter's directory; `None` exactly when the mode is none.
    pub dir: Option<PathBuf>,
    /// Tokens drafted a round; `None` is the drafter's longest.
    pub draft_len: Option<usize>,
    pub policy: Policy,
}

impl Drafting {
    /// Plain decoding.
    pub fn none() -> Self {
        Self {
            mode: Mode::None,
            dir: None,
            draft_len: None,
            policy: Policy::Fixed,
        }
    }

    /// Checks the drafter's kind against the mode. MTP without a directory is looked for in the target's own.
    pub fn new(
        mode: Option<Mode>,
        draft: Option<&Path>,
        target: &Path,
        args: &DraftArgs,
    ) -> Result<Self> {
        let dir = match (mode, draft) {
            (Some(Mode::None), _) | (None, None) => return Ok(Self::none()),
            (_, Some(dir)) => dir,
            (Some(Mode::Mtp), None) => target,
            (Some(mode), None) => {
                let expected = format!("a drafter's directory for --mode {}", mode.name());
                return Err(Error::argument("--draft", expected, "none").into());
            }
        };
        let held = held_mode(&DrafterConfig::read(dir)?);
        if let Some(mode) = mode
            && mode != held
        {
            let expected = format!("a drafter for {} in {}", mode.name(), dir.display());
            return Err(Error::argument("--mode", expected, held.name()).into());
        }
        let longest_by_default = if held == Mode::Mtp { Some(1) } else { None };
        Ok(Self {
            mode: held,
            dir: Some(dir.into()),
            draft_len: args.draft_len.or(longest_by_default),
            policy: args.schedule,
        })
    }
}

fn held_mode(config: &DrafterConfig) -> Mode {
    match config {
        DrafterConfig::Mtp(_) => Mode::Mtp,
        DrafterConfig::DSpark(config) if config.head == HeadKind::None => Mode::Dflash,
        DrafterConfig::DSpark(_) => Mode::Dspark,
    }
}

/// What is read from the target's directory besides weights.
pub struct Texts {
    pub tokenizer: Option<Tokenizer>,
    pub eos_token_ids: Vec<u32>,
}

impl Texts {
    pub fn load(target: &Path) -> Result<Self> {
        let tokenizer = Tokenizer::exists(target)
            .then(|| Tokenizer::load(target))
            .transpose()?;
        Ok(Self {
            tokenizer,
            eos_token_ids: GenerationConfig::read(target)?.eos_token_ids,
        })
    }

    /// The request of prompt number `index`.
    pub fn request(&self, prompt_ids: Vec<u32>, index: usize, args: &SamplingArgs) -> Request {
        let sampling = SamplingParams {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            seed: args.seed.wrapping_add(index as u64),
            rule: args.rule,
            repetition_penalty: args.repetition_penalty,
            presence_penalty: args.presence_penalty,
            frequency_penalty: args.frequency_penalty,
        };
        Request {
            stop_tokens: if args.ignore_eos {
                Vec::new()
            } else {
                self.eos_token_ids.clone()
            },
            stop_strings: args.stop.clone(),
            text: self.tokenizer.as_ref().map(|t| Box::new(t.stream()) as _),
            ..Request::new(prompt_ids, sampling, args.max_new_tokens)
        }
    }
}

/// Loads the pair and starts an engine that can hold `longest` tokens (prompt and output) for each request at once.
pub fn start<O: Ops + 'static>(
    mut ops: O,
    run: &RunArgs,
    drafting: &Drafting,
    num_prompts: usize,
    longest: usize,
) -> Result<Engine<O>> {
    let draft_len = match (&drafting.dir, drafting.draft_len) {
        (None, _) => 0,
        (Some(_), Some(len)) => len,
        (Some(dir), None) => match DrafterConfig::read(dir)? {
            DrafterConfig::DSpark(config) => config.block_size,
            DrafterConfig::Mtp(_) => 1,
        },
    };
    let max_num_reqs = run.max_num_reqs.min(num_prompts.max(1));
    let default_pages = max_num_reqs
        * (longest + draft_len + 1)
            .div_ceil(run.page_size.max(1))
            .max(1);
    let config = EngineConfig {
        max_num_reqs,
        num_pages: run.num_pages.unwrap_or(default_pages),
        page_size: run.page_size,
        prefill_chunk: run.prefill_chunk,
        draft_len: drafting.draft_len,
        policy: drafting.policy,
        sts_temperatures: None,
        cost: None,
    };
    config.validate()?;
    let max_rows = config.max_rows(draft_len);
    let limits = Limits {
        max_num_reqs,
        max_rows,
        max_logit_rows: max_num_reqs * (1 + draft_len),
        max_draft_len: draft_len.max(1),
        num_pages: config.num_pages,
        page_size: config.page_size,
    };
    let pair = Pair::load(&mut ops, &run.target, drafting.dir.as_deref(), &limits)?;
    Ok(Engine::new(
        ops,
        Box::new(pair.target),
        pair.drafter,
        config,
    )?)
}

/// Tokens of the longest request, prompt and output, within the model's context.
pub fn longest(prompts: &[Vec<u32>], max_new_tokens: usize, max_position: usize) -> usize {
    let prompt = prompts.iter().map(Vec::len).max().unwrap_or(0);
    prompt.saturating_add(max_new_tokens).min(max_position)
}

/// Runs everything that was submitted and returns the outputs in order of submission.
pub fn finish<O: Ops>(
    engine: &mut Engine<O>,
    mut on_event: impl FnMut(&Event),
) -> Result<Vec<Completion>> {
    let mut done = Vec::new();
    engine.run(|event| {
        on_event(&event);
        if let Event::Finished {
            request,
            completion,
        } = event
        {
            done.push((request, *completion));
        }
    })?;
    done.sort_by_key(|(request, _)| *request);
    Ok(done.into_iter().map(|(_, completion)| completion).collect())
}
