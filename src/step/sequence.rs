//! The state of one request between rounds, and what a round did to it.

use std::time::Duration;

use crate::kv::PageTable;
use crate::ops::{Constraint, Grammar, SamplingParams, TokenEdits, TokenLogprobs};
use crate::schedule::StepShape;

/// A request as the step sees it.
///
/// `pages.len()` is the number of cache entries, which is the position of the anchor: while the prompt is being
/// prefilled there is no anchor yet.
pub struct Sequence {
    /// Stable slot, `0 .. max_num_reqs`; no two live sequences share one.
    pub slot: usize,
    /// Last committed token, not yet run through the target; `None` until the prompt is prefilled.
    pub anchor: Option<u32>,
    /// Pages of the caches and the number of entries in them.
    pub pages: PageTable,
    /// How the request samples.
    pub sampling: SamplingParams,
    /// Whether its outcomes calibrate confidences. Not where its law is one the drafter cannot know of (penalties,
    /// a grammar mask).
    pub calibrates: bool,
    /// Prompt tokens in the cache.
    pub prompt: Vec<u32>,
    /// Generated tokens, the anchor included.
    pub output: Vec<u32>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// A draft that is one of these ends the accepted run.
    pub stop_tokens: Vec<u32>,
    /// What may be generated.
    pub grammar: Option<Box<dyn Grammar>>,
    /// Log-probabilities of the generated tokens and of the likeliest n beside each.
    pub logprobs: Option<usize>,
}

impl Sequence {
    /// A sequence whose prompt has not been seen.
    pub fn new(slot: usize, pages: PageTable, sampling: SamplingParams) -> Self {
        Self {
            slot,
            anchor: None,
            pages,
            sampling,
            calibrates: true,
            prompt: Vec::new(),
            output: Vec::new(),
            logit_bias: Vec::new(),
            stop_tokens: Vec::new(),
            grammar: None,
            logprobs: None,
        }
    }

    /// Its grammar after what was generated so far.
    pub fn constraint(&self) -> Option<Constraint<'_>> {
        self.grammar.as_deref().map(|grammar| Constraint {
            grammar,
            committed: &self.output,
        })
    }

    /// What it asked for of the log-probabilities of some of its tokens, which were computed for the whole batch.
    pub(super) fn asked_of(&self, mut logprobs: Vec<TokenLogprobs>) -> Vec<TokenLogprobs> {
        let Some(num_top) = self.logprobs else {
            return Vec::new();
        };
        for token in &mut logprobs {
            token.top.truncate(num_top);
        }
        logprobs
    }

    /// The tokens whose logits change: the context where a penalty is on, and the biased ones.
    pub(super) fn edits(&self) -> TokenEdits {
        let penalised = self.sampling.has_penalties();
        let (prompt, output): (&[u32], &[u32]) = if penalised {
            (&self.prompt, &self.output)
        } else {
            (&[], &[])
        };
        TokenEdits::new(prompt, output, &self.logit_bias)
    }

    /// Cache entries = position of the anchor.
    pub fn seq_len(&self) -> usize {
        self.pages.len()
    }
}

/// What the drafter proposed for a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Proposal {
    /// Tokens drafted per request; 0 when nothing was drafted.
    pub draft_len: usize,
    /// Requests that were drafted for: the first of the batch. The others have nothing to verify.
    pub num_drafted: usize,
    /// `[num_reqs * draft_len]`; 0 where nothing was drafted.
    pub tokens: Vec<u32>,
    /// `[num_reqs * draft_len]` before calibration; of a drafter without a confidence head the probabilities of its
    /// likeliest tokens where the schedule estimates confidences from them, else `None`.
    pub confidence: Option<Vec<f32>>,
}

impl Proposal {
    /// Drafts of request `r`; none where it was not drafted for.
    pub fn tokens_of(&self, r: usize) -> &[u32] {
        self.row_of(&self.tokens, r)
    }

    /// Confidences of request `r`; empty without a confidence head.
    pub fn confidence_of(&self, r: usize) -> &[f32] {
        self.row_of(self.confidence.as_deref().unwrap_or_default(), r)
    }

    /// The entries of request `r` in `[num_reqs * draft_len]`; none where it was not drafted for or `values` is empty.
    pub(super) fn row_of<'v, T>(&self, values: &'v [T], r: usize) -> &'v [T] {
        if r >= self.num_drafted || values.is_empty() {
            return &[];
        }
        &values[r * self.draft_len..(r + 1) * self.draft_len]
    }
}

/// One round of one request.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Round {
    /// All drafted tokens.
    pub draft_tokens: Vec<u32>,
    /// Confidences of all drafted tokens, before calibration; empty where there are none.
    pub confidence: Vec<f32>,
    /// The same after calibration, as the schedule took them.
    pub predicted: Vec<f32>,
    /// Drafts that were verified; up to the one that ended the output, where one did: what came after was not decided.
    pub verify_len: usize,
    /// Drafts that were accepted.
    pub num_accepted: usize,
    /// A second choice that was accepted after them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alternate: Option<u32>,
    /// The accepted drafts (with the alternate) and the recovered or bonus token; without it where the last draft ended the
    /// output.
    pub committed: Vec<u32>,
    /// Of the committed tokens, where the sequence asked for them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprobs>,
}

/// Host time spent in each phase. A phase that only enqueues on a device leaves its time to the next one that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseTimes {
    /// Prompt passes.
    pub prefill: Duration,
    /// Drafting.
    pub propose: Duration,
    /// Choosing how many drafts to verify.
    pub schedule: Duration,
    /// The target's pass and acceptance.
    pub verify: Duration,
    /// Moving the sequences on and the drafter's look at the committed rows.
    pub commit: Duration,
}

/// One step of all its sequences, for who wants to see where time goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct StepRecord {
    /// Requests in the step.
    pub num_reqs: usize,
    /// What its cost depends on.
    #[serde(flatten)]
    pub shape: StepShape,
    /// Rows that the drafter looked at, of this step and of earlier ones.
    pub num_looked_at: usize,
    /// What the schedule expected the step to take; `None` where it knows no cost.
    pub expected_seconds: Option<f64>,
    /// What it took on the host, which waits for the device once, within `verify`: what `commit` enqueues is found in the
    /// next step's time.
    pub seconds: f64,
    /// Of them, for drafting.
    pub propose_seconds: f64,
    /// For choosing how many drafts to verify.
    pub schedule_seconds: f64,
    /// For the target's pass and acceptance.
    pub verify_seconds: f64,
    /// For moving the sequences on.
    pub commit_seconds: f64,
}
