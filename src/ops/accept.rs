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
        /// `[vocab, rank]`; `None` of a head without a bias.
        w2: Option<W2<'a, O>>,
        /// The latents and normalisers that the head handed on.
        law: &'a LowRankLaw,
    },
}

/// What latents are multiplied with.
pub enum W2<'a, O: Ops> {
    /// The weight.
    Stored(&'a O::Weight),
    /// Its copy in e4m3.
    Quantized(&'a O::Quantized),
}

/// What the head over the whole vocabulary hands on, besides the base logits, for each draft.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LowRankLaw {
    /// Columns of W2; 0 without.
    pub rank: usize,
    /// `[num_reqs * draft_len * rank]`; on CUDA each a number of bf16, of f16 beside e4m3.
    pub latents: Vec<f32>,
    /// `[num_reqs * draft_len]`, `ln sum exp(l / temperature)`; NaN or -inf where the row is no law. At temperature 0,
    /// where no rule looks at it, it may be anything.
    pub log_normalizers: Vec<f32>,
    /// `[num_reqs * draft_len, ceil(vocab / 32)]`, what the head was allowed to draft; `None`: everything.
    pub mask: Option<Vec<u32>>,
}

impl LowRankLaw {
    /// The same for `num_drafts` drafts, of which those behind the last have no law.
    pub fn padded(&self, num_drafts: usize) -> Cow<'_, Self> {
        let len = self.log_normalizers.len();
        if num_drafts <= len {
            return Cow::Borrowed(self);
        }
        let mut padded = self.clone();
        padded.latents.resize(num_drafts * self.rank, 0.0);
        padded.log_normalizers.resize(num_drafts, f32::NAN);
        if let Some(mask) = &mut padded.mask {
            mask.resize(mask.len() / len.max(1) * num_drafts, 0);
        }
        Cow::Owned(padded)
    }

    /// The laws of single steps, `[num_reqs]` each, as that of `[num_reqs * steps]` drafts.
    pub fn interleave(steps: &[Self], num_reqs: usize) -> Self {
        let of = |array: fn(&Self) -> &[f32]| interleave(steps.iter().map(array), num_reqs);
        let masks: Option<Vec<&[u32]>> = steps.iter().map(|step| step.mask.as_deref()).collect();
        Self {
            rank: steps.first().map_or(0, |step| step.rank),
            latents: of(|step| &step.latents),
            log_normalizers: of(|step| &step.log_normalizers),
            mask: masks.map(|masks| interleave(masks.into_iter(), num_reqs)),
        }
    }

    /// Checks the law of `num_drafts` drafts.
    ///
    /// # Errors
    /// Names the array that does not fit.
    pub(crate) fn check(&self, num_drafts: usize, vocab_size: usize) -> Result<()> {
        expect("latents", num_drafts * self.rank, self.latents.len())?;
        expect("log_normalizers", num_drafts, self.log_normalizers.len())?;
        let words = num_drafts * super::grammar::mask_words(vocab_size);
        expect(
            "draft mask",
            words,
            self.mask.as_ref().map_or(words, Vec::len),
        )
    }
}

/// Arrays of single steps, each of as many entries for every request, as one of `[num_reqs, steps, entries]`.
fn interleave<'s, T: Copy + 's>(steps: impl Iterator<Item = &'s [T]>, num_reqs: usize) -> Vec<T> {
    let steps: Vec<&[T]> = steps.collect();
    let of_request = |r: usize| {
        steps.iter().flat_map(move |step| {
            let len = step.len() / num_reqs;
            &step[r * len..][..len]
        })
    };
    (0..num_reqs).flat_map(of_request).copied().collect()
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
        Self {
            num_candidates: steps.first().map_or(0, |step| step.num_candidates),
            tokens: interleave(steps.iter().map(|step| &step.tokens[..]), num_reqs),
            logits: interleave(steps.iter().map(|step| &step.logits[..]), num_reqs),
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
