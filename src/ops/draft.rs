//! A sequential head: its weights, its forms, what it is asked and what it answers.

use super::{Ops, SamplingParams, SparseLaw, W2, accept, grammar};
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
    /// All of it, but where all requests are greedy or coupled rows of W2 that cannot win may be passed over (on CUDA:
    /// up to eight requests, W2 above 32 MB). The same drafts.
    FullSkip,
    /// All of it, by a copy of W2 in e4m3.
    FullFp8,
    /// The tokens of the K largest base logits, joined with those of the M largest biases `W2 W1[x_{k-1}]`.
    Candidates(usize, usize),
}

impl HeadForm {
    /// The most candidates of both kinds together, which is what acceptance takes of a draft law.
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
            Self::Candidates(num_top, num_bigram)
                if num_top + num_bigram > Self::MAX_CANDIDATES =>
            {
                let expected = format!("at most {} candidates in all", Self::MAX_CANDIDATES);
                Err(Error::argument("head_form", expected, self))
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
            "full-skip" => Ok(Self::FullSkip),
            "full-fp8" => Ok(Self::FullFp8),
            _ => candidates().ok_or_else(|| {
                let expected = "full, full-skip, full-fp8, candidates:K or candidates:K:M";
                Error::argument("head_form", expected, text)
            }),
        }
    }
}

impl std::fmt::Display for HeadForm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => f.write_str("full"),
            Self::FullSkip => f.write_str("full-skip"),
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
    /// Bounds of the rows of `markov_w2`, which let [`Ops::draft_full`] pass over some.
    pub row_bounds: Option<O::RowBounds>,
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
            row_bounds: None,
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
    /// Whether every request draws a token that no acceptance asks the law of.
    #[cfg(feature = "cuda")]
    pub(crate) fn wants_winners_alone(&self) -> bool {
        let wins = |params: &SamplingParams| {
            params.temperature == 0.0 || params.rule == super::Rule::Coupled
        };
        self.sampling.iter().all(wins)
    }

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

/// Checks a table of `cols` tokens for each token of a vocabulary, and returns how many rows it has.
///
/// # Errors
/// Rows that are not whole, a token past the last row, or one that is twice in a row.
pub(crate) fn check_token_table(tokens: &[u32], cols: usize) -> Result<usize> {
    if cols == 0 || !tokens.len().is_multiple_of(cols) {
        let expected = format!("whole rows of {cols}");
        return Err(Error::argument("tokens", expected, tokens.len()));
    }
    let num_rows = tokens.len() / cols;
    let mut sorted = Vec::with_capacity(cols);
    for row in tokens.chunks_exact(cols) {
        sorted.clear();
        sorted.extend(row.iter().filter(|token| **token != SparseLaw::NO_PAIR));
        accept::expect_tokens("tokens", sorted.iter(), num_rows)?;
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::argument("tokens", "each once in a row", pair[0]));
        }
    }
    Ok(num_rows)
}

/// What the head drafted, on the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Drafted {
    /// `[num_reqs * draft_len]`.
    pub tokens: Vec<u32>,
    /// `[num_reqs * draft_len]`, conditional confidences before calibration; `None` without a confidence head.
    pub confidence: Option<Vec<f32>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_read_as_they_are_written() {
        let forms = [
            (HeadForm::Full, "full"),
            (HeadForm::FullSkip, "full-skip"),
            (HeadForm::FullFp8, "full-fp8"),
            (HeadForm::Candidates(64, 0), "candidates:64"),
            (HeadForm::Candidates(64, 16), "candidates:64:16"),
        ];
        for (form, text) in forms {
            assert_eq!(form.to_string(), text);
            assert_eq!(text.parse::<HeadForm>().unwrap(), form);
        }
        for text in [
            "",
            "candidates",
            "candidates:",
            "candidates:1:",
            "candidates:1:2:3",
            "fp8",
        ] {
            assert!(text.parse::<HeadForm>().is_err(), "{text}");
        }
        let check = |num_top, num_bigram| HeadForm::Candidates(num_top, num_bigram).check(300);
        assert!(check(1, 0).is_ok() && check(128, 128).is_ok() && check(256, 0).is_ok());
        assert!(check(0, 1).is_err() && check(257, 0).is_err() && check(1, 257).is_err());
        assert!(check(256, 1).is_err());
        assert!(HeadForm::Candidates(5, 0).check(4).is_err());
    }

    #[test]
    fn tables_name_tokens_of_the_vocabulary_once() {
        const NONE: u32 = SparseLaw::NO_PAIR;
        assert_eq!(
            check_token_table(&[1, NONE, 0, 1, NONE, NONE], 2).unwrap(),
            3
        );
        for (bad, cols) in [
            (&[0, 1, 2][..], 2),
            (&[1, 1], 2),
            (&[0, 2, 1, 0], 2),
            (&[0], 0),
        ] {
            assert!(check_token_table(bad, cols).is_err(), "{bad:?}");
        }
    }
}
