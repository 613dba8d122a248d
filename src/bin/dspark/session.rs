//! What every command does before it can work: choose the device, load the pair, start an engine.

use std::path::{Path, PathBuf};

use anyhow::Result;
use dspark::engine::text::Tokenizer;
use dspark::engine::{Completion, Engine, EngineConfig, Event, Request};
use dspark::model::{
    DrafterConfig, GenerationConfig, Limits, Pair, TargetConfig, drafter_identity, target_identity,
};
use dspark::ops::{HeadForm, HeadKind, KvDtype, MAX_TREE_ROWS, Ops, SamplingParams};
use dspark::reference::Reference;
use dspark::schedule::{
    Adapt, CALIBRATION_FILE, Calibration, CostFile, CostIdentity, PairIdentity, Policy,
};
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
    on(choice, threads, false, job)
}

/// The same on the device of a run.
pub fn on_device_of<J: Job>(run: &RunArgs, job: J) -> Result<J::Output> {
    on(run.device, run.threads, run.batch_invariant, job)
}

/// What a run's passes go through: its device, and its cache where that is not the native one.
pub fn device_of<O: Ops>(ops: &O, run: &RunArgs) -> String {
    match run.kv_dtype {
        KvDtype::Native => ops.describe(),
        KvDtype::Fp8 => format!("{}, KV cache in fp8", ops.describe()),
    }
}

#[cfg_attr(
    not(feature = "cuda"),
    expect(unused_variables, reason = "what is batch-invariant on CUDA alone")
)]
fn on<J: Job>(
    choice: DeviceChoice,
    threads: Option<usize>,
    batch_invariant: bool,
    job: J,
) -> Result<J::Output> {
    let choice = match choice {
        DeviceChoice::Auto if device_is_available() => DeviceChoice::Cuda(0),
        DeviceChoice::Auto => DeviceChoice::Cpu,
        chosen => chosen,
    };
    match choice {
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(ordinal) => {
            let mut ops = open_cuda(ordinal)?;
            ops.set_batch_invariant(batch_invariant);
            job.run(ops)
        }
        #[cfg(not(feature = "cuda"))]
        DeviceChoice::Cuda(_) => {
            let expected = "auto or cpu (this build is without the `cuda` feature)";
            Err(Error::argument("--device", expected, "cuda").into())
        }
        DeviceChoice::Auto | DeviceChoice::Cpu => job.run(Reference::new(threads)?),
    }
}

/// The CUDA backend; a device that is missing or too old is the option's fault.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> dspark::Result<dspark::ops::cuda::Cuda> {
    dspark::ops::cuda::Cuda::open(ordinal).map_err(|error| match error {
        Error::Unsupported { reason, .. } => {
            let expected = "a CUDA device that can be used, or cpu";
            Error::argument("--device", expected, format!("cuda:{ordinal} ({reason})"))
        }
        other => other,
    })
}

/// How tokens will be proposed, settled from `--mode` and `--draft`.
#[derive(Clone, Debug)]
pub struct Drafting {
    pub mode: Mode,
    /// The drafter's directory; `None` exactly when the mode is none.
    pub dir: Option<PathBuf>,
    /// Tokens drafted a round; 0 exactly when the mode is none.
    pub draft_len: usize,
    pub policy: Policy,
    pub head_form: HeadForm,
    /// Second choices verified beside the drafts.
    pub alternates: usize,
    /// `--calibration`.
    calibration: Option<PathBuf>,
    /// `--cost`.
    cost: Option<PathBuf>,
}

impl Drafting {
    /// Plain decoding.
    pub fn none() -> Self {
        Self {
            mode: Mode::None,
            dir: None,
            draft_len: 0,
            policy: Policy::Fixed,
            head_form: HeadForm::Full,
            alternates: 0,
            calibration: None,
            cost: None,
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
            (Some(Mode::None), _) => return Ok(Self::none()),
            (None, None) => {
                refuse_draft_options(args)?;
                return Ok(Self::none());
            }
            (_, Some(dir)) => dir,
            (Some(Mode::Mtp), None) => target,
            (Some(mode), None) => {
                let expected = format!("a drafter's directory for --mode {}", mode.name());
                return Err(Error::argument("--draft", expected, "none").into());
            }
        };
        let config = DrafterConfig::read(dir)?;
        let held = held_mode(&config);
        if let Some(mode) = mode
            && mode != held
        {
            let expected = format!("a drafter for {} in {}", mode.name(), dir.display());
            return Err(Error::argument("--mode", expected, held.name()).into());
        }
        if args.alternates > 0 && !matches!(args.head_form, HeadForm::Candidates(2.., _)) {
            let expected = "0 without --head-form candidates:K of at least 2";
            return Err(Error::argument("--alternates", expected, args.alternates).into());
        }
        Ok(Self {
            mode: held,
            dir: Some(dir.into()),
            draft_len: draft_len(&config, args.draft_len)?,
            policy: args.schedule,
            head_form: args.head_form,
            alternates: args.alternates,
            calibration: args.calibration.clone(),
            cost: args.cost.clone(),
        })
    }

    /// Names of the models, for files that were measured with them.
    pub fn identity(&self, target: &Path) -> dspark::Result<PairIdentity> {
        let drafter = self.dir.as_deref().map(drafter_identity).transpose()?;
        Ok(PairIdentity {
            target: target_identity(target)?,
            drafter: drafter.unwrap_or_default(),
        })
    }

    /// STS temperatures: of the file that was named, else of the drafter's own, which is passed over with a warning
    /// where it was made with another target.
    fn temperatures(&self, target: &Path) -> dspark::Result<Option<Vec<f32>>> {
        let Some(dir) = &self.dir else {
            return Ok(None);
        };
        let own = dir.join(CALIBRATION_FILE);
        let file = match &self.calibration {
            Some(file) => file,
            None if own.is_file() => &own,
            None => return Ok(None),
        };
        let calibration = Calibration::read(file)?;
        match calibration.check(file, &self.identity(target)?, self.draft_len) {
            Err(error) if self.calibration.is_none() => {
                eprintln!("warning: the drafter's calibration is not used: {error}");
                Ok(None)
            }
            result => result.map(|()| Some(calibration.temperatures)),
        }
    }

    /// The cost file, where one was named and the schedule reads costs, and what it must be of.
    fn costs(
        &self,
        target: &Path,
        device: String,
    ) -> dspark::Result<Option<(&Path, CostIdentity)>> {
        let Some(file) = self.cost.as_deref().filter(|_| self.policy.needs_cost()) else {
            return Ok(None);
        };
        let pair = self.identity(target)?;
        let identity = CostIdentity::of_this_build(pair, device, self.draft_len);
        Ok(Some((file, identity)))
    }
}

/// Options that mean nothing in plain decoding must not look as if they did something.
fn refuse_draft_options(args: &DraftArgs) -> Result<()> {
    let option = match (args.draft_len, args.schedule, args.head_form) {
        (Some(_), ..) => "--draft-len",
        (None, Policy::Fixed, HeadForm::Full) => return Ok(()),
        (None, Policy::Fixed, _) => "--head-form",
        (None, ..) => "--schedule",
    };
    let expected = "a drafter (--draft) to go with it";
    Err(Error::argument(option, expected, "none").into())
}

/// Tokens drafted a round: what was asked for, or else a whole block, and 1 of an MTP module.
fn draft_len(config: &DrafterConfig, asked: Option<usize>) -> Result<usize> {
    let longest = config.max_draft_len();
    let default = match config {
        DrafterConfig::DSpark(_) => longest,
        DrafterConfig::Mtp(_) => 1,
    };
    match asked {
        Some(len) if len == 0 || len > longest => {
            let expected = format!("1 to {longest} (the drafter's longest draft)");
            Err(Error::argument("--draft-len", expected, len).into())
        }
        asked => Ok(asked.unwrap_or(default)),
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
        // A directory without a target is to be called that, not one without a tokenizer.
        TargetConfig::read(target)?;
        let tokenizer = Tokenizer::exists(target)
            .then(|| Tokenizer::load(target))
            .transpose()?;
        Ok(Self {
            tokenizer,
            eos_token_ids: GenerationConfig::read(target)?.eos_token_ids,
        })
    }

    /// One request for each prompt, in order.
    pub fn requests(&self, prompts: &[Vec<u32>], args: &SamplingArgs) -> Vec<Request> {
        let request =
            |(index, prompt): (usize, &Vec<u32>)| self.request(prompt.clone(), index, args);
        prompts.iter().enumerate().map(request).collect()
    }

    /// How the request of prompt number `index` samples.
    pub fn sampling(index: usize, args: &SamplingArgs) -> SamplingParams {
        SamplingParams {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            seed: args.seed.wrapping_add(index as u64),
            rule: args.rule,
            repetition_penalty: args.repetition_penalty,
            presence_penalty: args.presence_penalty,
            frequency_penalty: args.frequency_penalty,
        }
    }

    /// The request of prompt number `index`.
    fn request(&self, prompt_ids: Vec<u32>, index: usize, args: &SamplingArgs) -> Request {
        Request {
            stop_tokens: if args.ignore_eos {
                Vec::new()
            } else {
                self.eos_token_ids.clone()
            },
            stop_strings: args.stop.clone(),
            text: self.tokenizer.as_ref().map(|t| Box::new(t.stream()) as _),
            ..Request::new(prompt_ids, Self::sampling(index, args), args.max_new_tokens)
        }
    }
}

/// Loads the pair and starts an engine with `requests` in its queue. Whatever is wrong with them is said before the
/// weights are read.
pub fn start<O: Ops + 'static>(
    ops: O,
    run: &RunArgs,
    drafting: &Drafting,
    requests: Vec<Request>,
) -> Result<Engine<O>> {
    let mut engine = build(ops, run, drafting, &requests)?;
    for request in requests {
        engine.submit(request)?;
    }
    Ok(engine)
}

/// Loads the pair and makes an engine of the size that these requests need.
pub fn build<O: Ops + 'static>(
    mut ops: O,
    run: &RunArgs,
    drafting: &Drafting,
    requests: &[Request],
) -> Result<Engine<O>> {
    let target = TargetConfig::read(&run.target)?.decoder;
    for request in requests {
        request.validate(target.vocab_size, target.max_position)?;
    }
    let mut config = engine_config(run, drafting, requests, target.max_position)?;
    config.sts_temperatures = drafting.temperatures(&run.target)?;
    let costs = drafting.costs(&run.target, device_of(&ops, run))?;
    config.cost = match &costs {
        Some((file, identity)) if file.exists() => {
            let held = CostFile::read(file)?;
            held.check(file, identity)?;
            Some(held.cost(file)?)
        }
        _ => None,
    };
    let measured = config.cost.is_none();
    let limits = Limits {
        max_num_reqs: config.max_num_reqs,
        max_rows: config.max_rows(drafting.draft_len + drafting.alternates),
        max_logit_rows: config.max_num_reqs * (1 + drafting.draft_len + drafting.alternates),
        max_draft_len: drafting.draft_len.max(1),
        num_pages: config.num_pages,
        page_size: config.page_size,
    };
    let draft = drafting.dir.as_deref();
    let mut pair = Pair::load_with_kv(&mut ops, &run.target, draft, &limits, run.kv_dtype)?;
    if let Some(drafter) = &mut pair.drafter {
        drafter.set_head_form(&mut ops, drafting.head_form)?;
    }
    let mut engine = Engine::new(ops, Box::new(pair.target), pair.drafter, config)?;
    engine.set_alternates(drafting.alternates)?;
    engine.set_adapt(Adapt::ON);
    engine.warm_up()?;
    if let (Some((file, identity)), Some(cost), true) =
        (costs, engine.step().scheduler().cost(), measured)
    {
        CostFile::new(cost, identity, "measured").write(file)?;
    }
    Ok(engine)
}

/// Sizes for these requests: what was asked for, but no more than they can use.
fn engine_config(
    run: &RunArgs,
    drafting: &Drafting,
    requests: &[Request],
    max_position: usize,
) -> Result<EngineConfig> {
    let asked = EngineConfig {
        max_num_reqs: run.max_num_reqs,
        num_pages: run.num_pages.unwrap_or(usize::MAX),
        page_size: run.page_size,
        prefill_chunk: run.prefill_chunk,
        draft_len: Some(drafting.draft_len),
        policy: drafting.policy,
        sts_temperatures: None,
        cost: None,
    };
    asked.validate()?;
    let num_tokens = |r: &Request| r.prompt_ids.len().saturating_add(r.max_new_tokens);
    let longest = requests.iter().map(num_tokens).max().unwrap_or(1);
    let prompt_tokens: usize = requests.iter().map(|r| r.prompt_ids.len()).sum();
    // Prompt and output within the model's context, an anchor and the drafts behind it.
    let window = 1 + drafting.draft_len + drafting.alternates.min(MAX_TREE_ROWS);
    let num_entries = longest.min(max_position) + window;
    let max_num_reqs = asked.max_num_reqs.min(requests.len().max(1));
    let page_size = asked.page_size.min(num_entries);
    Ok(EngineConfig {
        max_num_reqs,
        num_pages: asked
            .num_pages
            .min(max_num_reqs * num_entries.div_ceil(page_size)),
        page_size,
        prefill_chunk: asked.prefill_chunk.min(prompt_tokens.max(1)),
        ..asked
    })
}

/// Runs everything that was submitted and returns the outputs in order of submission. An error of `on_event` ends it.
pub fn finish<O: Ops>(
    engine: &mut Engine<O>,
    mut on_event: impl FnMut(&Event) -> Result<()>,
) -> Result<Vec<Completion>> {
    let mut done = Vec::new();
    while !engine.is_idle() {
        for event in engine.advance()? {
            on_event(&event)?;
            if let Event::Finished {
                request,
                completion,
            } = event
            {
                done.push((request, *completion));
            }
        }
    }
    let bad = engine.step().scheduler().bad_confidences();
    if bad > 0 {
        eprintln!(
            "warning: {bad} confidences of the drafter were no probabilities (NaN or outside 0 to 1) and were counted as \
             0 or 1; the output is sound, the drafter's confidence head is not"
        );
    }
    done.sort_by_key(|(request, _)| *request);
    Ok(done.into_iter().map(|(_, completion)| completion).collect())
}
