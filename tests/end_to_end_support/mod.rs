//! Ways to run the golden checkpoints through the engine, and how equal the tokens must be.
#![allow(dead_code)] // Each test binary uses its own part.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dspark::engine::{Completion, Engine, EngineConfig, Event, Request};
use dspark::model::{DecoderTarget, DrafterConfig, Limits, Pair, Target};
use dspark::ops::{KvDtype, Ops, RowMap, SamplingParams};
use dspark::schedule::{CostTable, Policy, StepCost};

use crate::model_support::{Golden, drafter_dir, ids, target_dir};

/// How requests share the engine.
#[derive(Clone, Copy, Debug)]
pub enum Batch {
    /// One after the other.
    Alone,
    /// All at once.
    Together,
    /// Each joins while those before it are being decoded.
    Staggered,
    /// Pages for the largest request only, small and odd pages, prompts in chunks.
    TinyPool,
}

pub const BATCHES: [Batch; 4] = [
    Batch::Alone,
    Batch::Together,
    Batch::Staggered,
    Batch::TinyPool,
];

/// A target and its drafter, by their golden names.
#[derive(Clone, Copy, Debug)]
pub struct Models {
    pub target: &'static str,
    pub drafter: Option<&'static str>,
}

impl Models {
    pub fn alone(target: &'static str) -> Self {
        Self {
            target,
            drafter: None,
        }
    }

    pub fn of_drafter(drafter: &'static str) -> Self {
        let target = if drafter.starts_with("llama") {
            "llama_bf16"
        } else {
            "qwen3_bf16"
        };
        Self {
            target,
            drafter: Some(drafter),
        }
    }

    pub fn draft_dir(self) -> Option<PathBuf> {
        self.drafter.map(drafter_dir)
    }

    pub fn config(self) -> Option<DrafterConfig> {
        self.draft_dir()
            .map(|dir| DrafterConfig::read(&dir).unwrap())
    }

    pub fn has_confidence(self) -> bool {
        matches!(self.config(), Some(DrafterConfig::DSpark(c)) if c.confidence.is_some())
    }

    /// 1, 2 and the block size; some length of its own for MTP.
    pub fn draft_lens(self) -> Vec<usize> {
        match self.config() {
            None => vec![0],
            Some(DrafterConfig::DSpark(config)) => vec![1, 2, config.block_size],
            Some(DrafterConfig::Mtp(_)) => vec![1, 2, 5],
        }
    }
}

/// One way to run the models.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub models: Models,
    pub draft_len: usize,
    pub policy: Policy,
    pub batch: Batch,
}

impl Setting {
    pub fn plain(target: &'static str) -> Self {
        Self {
            models: Models::alone(target),
            draft_len: 0,
            policy: Policy::Fixed,
            batch: Batch::Alone,
        }
    }

    pub fn engine<O: Ops + 'static>(&self, ops: O, requests: &[Ask]) -> Engine<O> {
        let target = target_dir(self.models.target);
        self.engine_on(ops, requests, (&target, KvDtype::Native))
    }

    /// The same with the target of another directory and another cache.
    pub fn engine_on<O: Ops + 'static>(
        &self,
        mut ops: O,
        requests: &[Ask],
        (target, kv_dtype): (&Path, KvDtype),
    ) -> Engine<O> {
        let pages = |ask: &Ask, page_size: usize| {
            (ask.prompt.len() + ask.num_tokens + self.draft_len + 1).div_ceil(page_size)
        };
        let (max_num_reqs, page_size, prefill_chunk) = match self.batch {
            Batch::Alone => (1, 16, 64),
            Batch::Together | Batch::Staggered => (3, 4, 64),
            Batch::TinyPool => (4, 3, 5),
        };
        let largest = requests.iter().map(|ask| pages(ask, page_size)).max();
        let shares = if matches!(self.batch, Batch::TinyPool) {
            1
        } else {
            max_num_reqs
        };
        let config = EngineConfig {
            max_num_reqs,
            num_pages: shares * largest.unwrap(),
            page_size,
            prefill_chunk,
            draft_len: Some(self.draft_len),
            policy: self.policy,
            sts_temperatures: None,
            cost: Some(StepCost::new(
                CostTable::new(vec![(1, 1.0), (33, 4.2)]).unwrap(),
                None,
            )),
        };
        let limits = Limits {
            max_num_reqs,
            max_rows: config.max_rows(self.draft_len),
            max_logit_rows: max_num_reqs * (1 + self.draft_len),
            max_draft_len: self.draft_len.max(1),
            num_pages: config.num_pages,
            page_size,
        };
        let draft = self.models.draft_dir();
        let pair =
            Pair::load_with_kv(&mut ops, target, draft.as_deref(), &limits, kv_dtype).unwrap();
        Engine::new(ops, Box::new(pair.target), pair.drafter, config).unwrap()
    }

    /// Runs all requests and returns their completions in order.
    pub fn run<O: Ops + 'static>(&self, ops: O, requests: &[Ask]) -> Vec<Completion> {
        self.run_with(ops, requests, |_, _| ())
    }

    /// The same, with something of its own for each request.
    pub fn run_with<O: Ops + 'static>(
        &self,
        ops: O,
        requests: &[Ask],
        change: impl Fn(usize, &mut Request),
    ) -> Vec<Completion> {
        self.run_on(self.engine(ops, requests), requests, change)
    }

    /// The same on an engine of this setting.
    pub fn run_on<O: Ops>(
        &self,
        mut engine: Engine<O>,
        requests: &[Ask],
        change: impl Fn(usize, &mut Request),
    ) -> Vec<Completion> {
        let mut done = HashMap::new();
        let mut take = |event| {
            if let Event::Finished {
                request,
                completion,
            } = event
            {
                done.insert(request, *completion);
            }
        };
        for (i, ask) in requests.iter().enumerate() {
            let mut request = ask.request();
            change(i, &mut request);
            engine.submit(request).unwrap();
            if matches!(self.batch, Batch::Staggered) {
                for _ in 0..=i {
                    engine.advance().unwrap().into_iter().for_each(&mut take);
                }
            }
        }
        engine.run(take).unwrap();
        assert_eq!(engine.pool().num_free(), engine.pool().num_pages());
        (0..requests.len())
            .map(|i| done.remove(&i).unwrap())
            .collect()
    }
}

/// A request, to be made as often as needed.
#[derive(Clone, Debug)]
pub struct Ask {
    pub prompt: Vec<u32>,
    pub num_tokens: usize,
    pub sampling: SamplingParams,
    pub stop_tokens: Vec<u32>,
}

impl Ask {
    pub fn greedy(prompt: Vec<u32>, num_tokens: usize) -> Self {
        Self {
            prompt,
            num_tokens,
            sampling: SamplingParams::default(),
            stop_tokens: Vec::new(),
        }
    }

    pub fn sampled(prompt: Vec<u32>, num_tokens: usize, temperature: f32, seed: u64) -> Self {
        Self {
            sampling: SamplingParams {
                temperature,
                seed,
                ..SamplingParams::default()
            },
            ..Self::greedy(prompt, num_tokens)
        }
    }

    pub fn request(&self) -> Request {
        Request {
            stop_tokens: self.stop_tokens.clone(),
            ..Request::new(self.prompt.clone(), self.sampling, self.num_tokens)
        }
    }
}

/// The golden prompts, each with its greedy continuation by transformers.
pub fn golden_prompts(target: &str) -> Vec<(Vec<u32>, Vec<u32>)> {
    let golden = Golden::read(&target_dir(target));
    let prompts = golden.list("prompts").iter();
    prompts
        .map(|prompt| (ids(&prompt["ids"]), ids(&prompt["greedy"])))
        .collect()
}

pub fn tokens(completions: &[Completion]) -> Vec<Vec<u32>> {
    completions.iter().map(|c| c.tokens.clone()).collect()
}

/// Logits after `tokens` in a plain pass.
pub fn next_logits<O: Ops + 'static>(ops: O, target: &str, tokens: &[u32]) -> Vec<f32> {
    next_logits_on(ops, (&target_dir(target), KvDtype::Native), tokens)
}

/// The same of the target in a directory, by a cache of a type.
pub fn next_logits_on<O: Ops + 'static>(
    mut ops: O,
    (dir, kv_dtype): (&Path, KvDtype),
    tokens: &[u32],
) -> Vec<f32> {
    let limits = Limits {
        max_num_reqs: 1,
        max_rows: tokens.len(),
        max_logit_rows: 1,
        max_draft_len: 1,
        num_pages: 1,
        page_size: tokens.len(),
    };
    let mut target = DecoderTarget::load_with_kv(&mut ops, dir, &limits, &[], kv_dtype).unwrap();
    let mut map = RowMap::new(1);
    map.push(tokens.len(), 0, 0, &[0]).unwrap();
    let last = [tokens.len() as u32 - 1];
    target.forward(&mut ops, tokens, &map, Some(&last)).unwrap();
    ops.read_logits(target.logits()).unwrap()
}

/// How equal two backends' or two batches' greedy tokens must be.
#[derive(Clone, Copy)]
pub enum Judge {
    /// Token for token.
    Exact,
    /// At the first difference, this share of the row's largest logit may lie between the two: bf16 activations carry 8
    /// bits, and a handful of layers add up a few of their roundings.
    Regret(f32),
}

impl Judge {
    pub fn check<O: Ops + 'static>(
        self,
        open: &dyn Fn() -> O,
        context: &str,
        target: &str,
        prompt: &[u32],
        tokens: [&[u32]; 2],
    ) {
        let on = (&*target_dir(target), KvDtype::Native);
        self.check_on(open, context, on, prompt, tokens);
    }

    /// The same for the target in a directory and a cache of a type.
    pub fn check_on<O: Ops + 'static>(
        self,
        open: &dyn Fn() -> O,
        context: &str,
        on: (&Path, KvDtype),
        prompt: &[u32],
        [found, expected]: [&[u32]; 2],
    ) {
        let Self::Regret(share) = self else {
            assert_eq!(found, expected, "{context}");
            return;
        };
        assert_eq!(found.len(), expected.len(), "{context}");
        let Some(at) = (0..found.len()).find(|&i| found[i] != expected[i]) else {
            return;
        };
        let row = next_logits_on(open(), on, &[prompt, &found[..at]].concat());
        let best = row.iter().copied().fold(f32::MIN, f32::max);
        let largest = row.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        for token in [found[at], expected[at]] {
            let regret = best - row[token as usize];
            assert!(
                regret <= share * largest,
                "{context}: token {at} is {} instead of {}, {token} has regret {regret} (largest logit {largest})",
                found[at],
                expected[at]
            );
        }
    }
}
