//! What acceptance is given, what it answers, and the checks that need no device.

use std::borrow::Cow;

use super::{Ops, Rule, SamplingParams, TokenEdits};
use crate::error::{Error, Result};

/// What is to be decided about a batch: see [`Ops::accept`].
pub struct AcceptBatch<'a, O: Ops> {
    /// Target logits `[num_rows, vocab]`.
    pub target: &'a O::Logits,
    /// `[num_reqs + 1]`: request r brings rows `qo_indptr[r] .. qo_indptr[r + 1]`, 0 or `1 + verify_len` of them.
    pub qo_indptr: &'a [i32],
    /// `[num_reqs * draft_len]`; draft k of a request (from 0) is row `1 + k` of its rows.
    pub draft_tokens: &'a [u32],
    /// Columns of `draft_tokens`; at least every `verify_len`.
    pub draft_len: usize,
    /// What the drafts were drawn from.
    pub law: DraftLaw<'a, O>,
    /// `[num_reqs]`.
    pub anchor_positions: &'a [u32],
    /// `[num_reqs]`.
    pub sampling: &'a [SamplingParams],
    /// The parts that most batches leave out.
    pub extras: AcceptExtras<'a>,
}

/// Optional inputs of [`Ops::accept`]; each is off by default.
#[derive(Clone, Copy, Default)]
pub struct AcceptExtras<'a> {
    /// `[num_reqs * draft_len]` the row (of the same request) that draft k follows: 0 the anchor's, else 1 + a lower
    /// draft. Siblings are tried in order. Off: chains. Under the token rule siblings must be drawn independently.
    pub parents: Option<&'a [u32]>,
    /// `[num_reqs]` context tokens for the penalties, and biases.
    pub edits: Option<&'a [TokenEdits]>,
    /// `[num_rows, ceil(vocab / 32)]`: bit `v % 32` of word `v / 32` set allows token v.
    pub mask: Option<&'a [u32]>,
    /// `[num_reqs * draft_len, ceil(vocab / 32)]`, as `mask`, of the rows of a low-rank draft law: what the head was not
    /// allowed to draft.
    pub draft_mask: Option<&'a [u32]>,
    /// `[num_reqs]`: the accepted run ends with the first of these tokens, which then is the next token.
    pub stop_tokens: Option<&'a [&'a [u32]]>,
    /// Log-probabilities of the committed tokens and of the likeliest n (at most [`MAX_TOP_LOGPROBS`]) at each.
    pub logprobs: Option<usize>,
}

/// The most likely tokens that acceptance reports beside each committed one.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// What acceptance decided, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Accepted {
    /// `[num_reqs]` drafts kept.
    pub num_accepted: Vec<u32>,
    /// `[num_reqs]` the recovered or bonus token, or the stop token that ended the run.
    pub next_tokens: Vec<u32>,
    /// `[num_reqs * draft_len]` which drafts were kept; in a chain the first `num_accepted`.
    pub flags: Vec<bool>,
    /// `[num_reqs]`, one entry for each committed token; empty unless asked for.
    pub logprobs: Vec<Vec<TokenLogprobs>>,
}

/// How likely a committed token was under the target's law (at temperature 0: under that of temperature 1).
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct TokenLogprobs {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens and their log-probabilities, descending, equals by ascending token; tokens without
    /// probability are not listed.
    pub top: Vec<(u32, f32)>,
}

/// The law the drafts were sampled from, as acceptance needs it. Row `r * draft_len + k` belongs to draft k of request r;
/// rows behind those of the last request with a draft to verify may be missing.
pub enum DraftLaw<'a, O: Ops> {
    /// A point mass on each draft token.
    PointMass,
    /// `softmax(logits / temperature)`.
    Logits(&'a O::Logits),
    /// `softmax(logits / temperature)` over a few candidates, nothing elsewhere.
    Sparse(&'a SparseLaw),
    /// `exp((U(v) + W2[v] . latent) / temperature - log_normalizer)`, U the base logits: nothing of the vocabulary's
    /// size was written when the drafts were drawn.
    LowRank {
        /// `[num_reqs * draft_len, vocab]`, as the head read them.
        base: &'a O::Logits,
        /// `[vocab, rank]`.
        w2: &'a O::Weight,
        /// The latents and normalisers that the head handed on.
        law: &'a LowRankLaw,
    },
}

/// What the head over the whole vocabulary hands on, besides the base logits, for each draft.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LowRankLaw {
    /// Columns of W2.
    pub rank: usize,
    /// `[num_reqs * draft_len * rank]`; each a number of the 16-bit type that W2 is multiplied in.
    pub latents: Vec<f32>,
    /// `[num_reqs * draft_len]`, `ln sum exp(l / temperature)`; NaN or -inf where the row is no law.
    pub log_normalizers: Vec<f32>,
}

impl LowRankLaw {
    /// Checks the law of `num_drafts` drafts.
    ///
    /// # Errors
    /// Names the array that does not fit.
    pub(crate) fn check(&self, num_drafts: usize) -> Result<()> {
        expect("latents", num_drafts * self.rank, self.latents.len())?;
        expect("log_normalizers", num_drafts, self.log_normalizers.len())
    }
}

/// Truncated draft laws: `num_candidates` (token, logit) pairs for each draft.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseLaw {
    /// Pairs per draft, at least 1.
    pub num_candidates: usize,
    /// `[num_reqs * draft_len * num_candidates]`; no token twice for one draft, and [`SparseLaw::NO_PAIR`] for a pair that is
    /// none.
    pub tokens: Vec<u32>,
    /// As `tokens`; -inf for a pair that is none.
    pub logits: Vec<f32>,
}

impl SparseLaw {
    /// The token of a pair that is none.
    pub const NO_PAIR: u32 = u32::MAX;

    /// The same for `num_drafts` drafts, of which those behind the last have no law.
    pub fn padded(&self, num_drafts: usize) -> Cow<'_, Self> {
        let num_pairs = num_drafts * self.num_candidates;
        if num_pairs <= self.tokens.len() {
            return Cow::Borrowed(self);
        }
        let mut padded = self.clone();
        padded.tokens.resize(num_pairs, Self::NO_PAIR);
        padded.logits.resize(num_pairs, f32::NEG_INFINITY);
        Cow::Owned(padded)
    }

    /// The laws of single steps, `[num_reqs]` each, as that of `[num_reqs * steps]` drafts.
    pub fn interleave(steps: &[Self], num_reqs: usize) -> Self {
        let num_candidates = steps.first().map_or(0, |step| step.num_candidates);
        let rows = (0..num_reqs).flat_map(|r| {
            let pairs = r * num_candidates..(r + 1) * num_candidates;
            steps.iter().map(move |step| (step, pairs.clone()))
        });
        let (mut tokens, mut logits) = (Vec::new(), Vec::new());
        for (step, pairs) in rows {
            tokens.extend_from_slice(&step.tokens[pairs.clone()]);
            logits.extend_from_slice(&step.logits[pairs]);
        }
        Self {
            num_candidates,
            tokens,
            logits,
        }
    }

    /// As [`Ops::top_probabilities`], of the law of each draft.
    pub fn top_probabilities(&self, temperature: &[f32]) -> Vec<f32> {
        let rows = self.logits.chunks_exact(self.num_candidates.max(1));
        rows.zip(temperature)
            .map(|(row, &temperature)| super::top_probability(row, temperature))
            .collect()
    }

    /// Checks the law of `num_drafts` drafts.
    ///
    /// # Errors
    /// Names the array that does not fit, or a token outside the vocabulary.
    pub(crate) fn check(&self, num_drafts: usize, vocab_size: usize) -> Result<()> {
        if self.num_candidates == 0 {
            return Err(Error::argument("num_candidates", "at least 1", 0));
        }
        let num_pairs = num_drafts * self.num_candidates;
        expect("candidate tokens", num_pairs, self.tokens.len())?;
        expect("candidate logits", num_pairs, self.logits.len())?;
        let pairs = self.tokens.iter().filter(|&&token| token != Self::NO_PAIR);
        expect_tokens("candidate tokens", pairs, vocab_size)
    }
}

impl<O: Ops> AcceptBatch<'_, O> {
    /// Requests of the batch.
    pub fn num_reqs(&self) -> usize {
        self.sampling.len()
    }

    /// Rows of logits that the law of the batch must have at least: up to those of the last request that has a draft to
    /// verify.
    pub(crate) fn least_law_rows(&self) -> usize {
        let verifies = |&r: &usize| self.qo_indptr[r + 1] - self.qo_indptr[r] > 1;
        let last = (0..self.num_reqs()).rfind(verifies);
        last.map_or(0, |r| (r + 1) * self.draft_len)
    }

    /// Checks everything but the draft law against target logits `[num_rows, vocab_size]`.
    ///
    /// # Errors
    /// Names the argument that does not fit.
    pub(crate) fn check(&self, num_rows: usize, vocab_size: usize) -> Result<()> {
        let num_reqs = self.num_reqs();
        self.sampling
            .iter()
            .try_for_each(SamplingParams::validate)?;
        expect("anchor_positions", num_reqs, self.anchor_positions.len())?;
        let num_drafts = num_reqs * self.draft_len;
        expect("draft_tokens", num_drafts, self.draft_tokens.len())?;
        expect("qo_indptr", num_reqs + 1, self.qo_indptr.len())?;
        if self.qo_indptr[0] != 0 || !self.qo_indptr.is_sorted() {
            let found = format!("{:?}", self.qo_indptr);
            return Err(Error::argument(
                "qo_indptr",
                "ascending numbers from 0",
                found,
            ));
        }
        expect("target logits", self.qo_indptr[num_reqs] as usize, num_rows)?;
        for r in 0..num_reqs {
            let rows = (self.qo_indptr[r + 1] - self.qo_indptr[r]) as usize;
            if rows > 1 + self.draft_len {
                let expected = format!("at most 1 + {}", self.draft_len);
                return Err(Error::argument(
                    format!("rows of request {r}"),
                    expected,
                    rows,
                ));
            }
            let verified = r * self.draft_len..r * self.draft_len + rows.saturating_sub(1);
            let drafts = &self.draft_tokens[verified.clone()];
            expect_tokens("draft token", drafts.iter(), vocab_size)?;
            self.check_parents(r, verified)?;
        }
        if let Some(mask) = self.extras.draft_mask {
            if !matches!(self.law, DraftLaw::LowRank { .. }) {
                return Err(Error::argument("draft_mask", "a low-rank law", "another"));
            }
            let words = num_drafts * vocab_size.div_ceil(32);
            expect("draft_mask", words, mask.len())?;
        }
        self.extras.check(num_reqs, num_rows, vocab_size)
    }

    fn check_parents(&self, req: usize, verified: std::ops::Range<usize>) -> Result<()> {
        let Some(parents) = self.extras.parents else {
            return Ok(());
        };
        expect("parents", self.draft_tokens.len(), parents.len())?;
        let verified = parents[verified].iter().enumerate();
        if let Some((k, parent)) = verified.clone().find(|&(k, &p)| p as usize > k) {
            let expected = format!("a row before row {}", k + 1);
            return Err(Error::argument("parents", expected, parent));
        }
        let chain = verified.clone().all(|(k, &parent)| parent as usize == k);
        let params = &self.sampling[req];
        if params.rule == Rule::Block && params.temperature > 0.0 && !chain {
            let expected = "the token or coupled rule for a tree";
            return Err(Error::argument("rule", expected, params.rule));
        }
        Ok(())
    }
}

impl AcceptExtras<'_> {
    fn check(&self, num_reqs: usize, num_rows: usize, vocab_size: usize) -> Result<()> {
        if let Some(edits) = self.edits {
            expect("edits", num_reqs, edits.len())?;
            let tokens = edits
                .iter()
                .flat_map(TokenEdits::as_slice)
                .map(|edit| &edit.token);
            expect_tokens("edited token", tokens, vocab_size)?;
        }
        if let Some(mask) = self.mask {
            expect(
                "mask",
                num_rows * super::grammar::mask_words(vocab_size),
                mask.len(),
            )?;
        }
        if let Some(stops) = self.stop_tokens {
            expect("stop_tokens", num_reqs, stops.len())?;
        }
        match self.logprobs {
            Some(n) if n > MAX_TOP_LOGPROBS => {
                let expected = format!("at most {MAX_TOP_LOGPROBS}");
                Err(Error::argument("logprobs", expected, n))
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn expect(field: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::argument(field, format!("{expected} entries"), found))
}

pub(super) fn expect_tokens<'t>(
    field: &str,
    mut tokens: impl Iterator<Item = &'t u32>,
    vocab_size: usize,
) -> Result<()> {
    match tokens.find(|&&token| token as usize >= vocab_size) {
        Some(token) => Err(Error::argument(field, format!("below {vocab_size}"), token)),
        None => Ok(()),
    }
}
