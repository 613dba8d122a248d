//! A sequential head: its weights, its forms, what it is asked and what it answers.

use super::{Ops, SamplingParams, W2, accept, grammar};
use crate::error::{Error, Result};

/// Which sequential head a drafter has (spec: vanilla, gated, rnn; `None` is DFlash or an autoregressive drafter).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadKind {
    /// No bias between positions.
    None,
    /// `B_k = W2 W1[x_{k-1}]`.
    Vanilla,
    /// `B_k = W2 (sigmoid(gate [h_k; W1 x]) * W1 x)`.
    Gated,
    /// A recurrent state over the block.
    Rnn,
}

/// How much of the vocabulary a head looks at, and with what numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadForm {
    /// All of it.
    #[default]
    Full,
    /// All of it, by a copy of W2 in e4m3.
    FullFp8,
    /// The tokens of the K largest base logits, joined with those of the M largest biases `W2 W1[x_{k-1}]`.
    Candidates(usize, usize),
}

impl HeadForm {
    /// The most candidates of either kind.
    pub const MAX_CANDIDATES: usize = 256;

    /// Checks the number of candidates.
    ///
    /// # Errors
    /// None, more than [`HeadForm::MAX_CANDIDATES`], or more than the vocabulary has.
    pub fn check(self, vocab_size: usize) -> Result<()> {
        let most = Self::MAX_CANDIDATES.min(vocab_size);
        match self {
            Self::Candidates(n, _) if n == 0 || n > most => {
                let expected = format!("1 to {most} candidates");
                Err(Error::argument("head_form", expected, n))
            }
            Self::Candidates(_, n) if n > most => {
                let expected = format!("at most {most} bigrams");
                Err(Error::argument("head_form", expected, n))
            }
            _ => Ok(()),
        }
    }
}

impl std::str::FromStr for HeadForm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let candidates = || {
            let counts = text.strip_prefix("candidates:")?;
            let (num_top, num_bigram) = counts.split_once(':').unwrap_or((counts, "0"));
            Some(Self::Candidates(
                num_top.parse().ok()?,
                num_bigram.parse().ok()?,
            ))
        };
        match text {
            "full" => Ok(Self::Full),
            "full-fp8" => Ok(Self::FullFp8),
            _ => candidates().ok_or_else(|| {
                let expected = "full, full-fp8, candidates:K or candidates:K:M";
                Error::argument("head_form", expected, text)
            }),
        }
    }
}

impl std::fmt::Display for HeadForm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => f.write_str("full"),
            Self::FullFp8 => f.write_str("full-fp8"),
            Self::Candidates(num_top, 0) => write!(f, "candidates:{num_top}"),
            Self::Candidates(num_top, num_bigram) => write!(f, "candidates:{num_top}:{num_bigram}"),
        }
    }
}

/// The weights of a semi-autoregressive head, in the backend's types.
pub struct DraftHead<O: Ops> {
    /// Which recurrence.
    pub kind: HeadKind,
    /// Markov rank r; 0 for [`HeadKind::None`].
    pub rank: usize,
    /// `[vocab, r]`, rows looked up by the previous token.
    pub markov_w1: Option<O::Weight>,
    /// `[vocab, r]`, rows are output tokens.
    pub markov_w2: Option<O::Weight>,
    /// A copy of it, which takes its place in [`Ops::draft_full`].
    pub w2_fp8: Option<O::Quantized>,
    /// Candidates that the token before brings along, for [`Ops::draft_candidates`].
    pub bigrams: Option<O::TokenTable>,
    /// gated `[r, d + r]` over `[h; w1]`; rnn `[3r, 2r + d]` over `[s; w1; h]`.
    pub proj_weight: Option<O::Weight>,
    /// gated `[r]`, rnn `[3r]` = `[g; c; o]`.
    pub proj_bias: Option<O::Norm>,
    /// The confidence head, if there is one.
    pub confidence: Option<ConfidenceHead<O>>,
}

impl<O: Ops> DraftHead<O> {
    /// A head without a bias and without confidences.
    pub fn none() -> Self {
        Self {
            kind: HeadKind::None,
            rank: 0,
            markov_w1: None,
            markov_w2: None,
            w2_fp8: None,
            bigrams: None,
            proj_weight: None,
            proj_bias: None,
            confidence: None,
        }
    }

    /// What [`Ops::draft_full`] multiplies latents with.
    pub fn w2(&self) -> Option<W2<'_, O>> {
        match (&self.w2_fp8, &self.markov_w2) {
            (Some(copy), _) => Some(W2::Quantized(copy)),
            (None, Some(weight)) => Some(W2::Stored(weight)),
            (None, None) => None,
        }
    }
}

/// `sigmoid(w . [h_k ; W1 x_{k-1}] + b)`.
pub struct ConfidenceHead<O: Ops> {
    /// `[1, d + r]`, or `[1, d]` without the Markov part.
    pub weight: O::Weight,
    /// The bias.
    pub bias: f32,
    /// Whether `W1[x_{k-1}]` is part of the input.
    pub with_markov: bool,
}

/// The requests of a walk of the head, one entry each.
#[derive(Clone, Copy, Debug)]
pub struct DraftBatch<'a> {
    /// Last committed tokens.
    pub anchors: &'a [u32],
    /// Their positions.
    pub anchor_positions: &'a [u32],
    /// How the requests sample.
    pub sampling: &'a [SamplingParams],
    /// Steps.
    pub draft_len: usize,
    /// `[num_reqs * draft_len, ceil(vocab / 32)]`: bit `v % 32` of word `v / 32` set allows token v; `None` allows all.
    pub mask: Option<&'a [u32]>,
}

impl DraftBatch<'_> {
    /// Checks everything against a vocabulary.
    ///
    /// # Errors
    /// Names the argument that does not fit.
    pub(crate) fn check(&self, vocab_size: usize) -> Result<()> {
        let num_reqs = self.anchors.len();
        let expect = accept::expect;
        expect("anchor_positions", num_reqs, self.anchor_positions.len())?;
        expect("sampling", num_reqs, self.sampling.len())?;
        self.sampling
            .iter()
            .try_for_each(SamplingParams::validate)?;
        if let Some(mask) = self.mask {
            let words = num_reqs * self.draft_len * grammar::mask_words(vocab_size);
            expect("mask", words, mask.len())?;
        }
        accept::expect_tokens("anchor", self.anchors.iter(), vocab_size)
    }
}

/// What the head drafted, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drafted {
    /// `[num_reqs * draft_len]`.
    pub tokens: Vec<u32>,
    /// `[num_reqs * draft_len]`, conditional confidences before calibration; `None` without a confidence head.
    pub confidence: Option<Vec<f32>>,
}
