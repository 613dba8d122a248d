//! How a request samples: the rule, the target law's parameters, and the purposes of random numbers.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// What a draw is for. Purposes never share a Philox counter, so that no two draws of a request are correlated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Sampling a draft token.
    Draft = 1,
    /// The uniform of an accept decision.
    Accept = 2,
    /// Sampling the recovered token from the residual.
    Residual = 3,
    /// Sampling the bonus token, or any token from the plain target law. The coupled rule draws all its target tokens,
    /// and its drafts, with this purpose: sharing it is what makes them agree.
    Bonus = 4,
}

/// How drafts are accepted at temperature > 0. Every rule keeps the target's law; at temperature 0 all are greedy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Rule {
    /// Each draft by its own ratio of target and draft probability, left to right (Leviathan et al., Chen et al. 2023);
    /// on trees with sibling-wise residuals (SpecInfer).
    #[default]
    Token = 0,
    /// The longest prefix whose joint ratio passes, tested from the tail (Sun et al. 2024): never shorter in expectation.
    Block = 1,
    /// The target's token at a position is a function of seed, position and target law alone; a draft is accepted iff it
    /// is that token. The output is the one of plain decoding with the same seed.
    Coupled = 2,
}

impl Rule {
    /// What draft tokens are drawn with.
    pub fn draft_purpose(self) -> Purpose {
        match self {
            Self::Token | Self::Block => Purpose::Draft,
            Self::Coupled => Purpose::Bonus,
        }
    }
}

impl FromStr for Rule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "token" => Ok(Self::Token),
            "block" => Ok(Self::Block),
            "coupled" => Ok(Self::Coupled),
            _ => Err(Error::argument("rule", "token, block or coupled", text)),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Token => "token",
            Self::Block => "block",
            Self::Coupled => "coupled",
        })
    }
}

/// How one request samples. The target law is made of the logits by penalties and [`TokenEdits`], then a grammar mask,
/// then `softmax(· / temperature)`, then top-k, top-p, min-p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k largest logits (ties with the k-th kept); 0 is off.
    pub top_k: u32,
    /// Keep the smallest top set of at least this mass; 1 is off.
    pub top_p: f32,
    /// Keep tokens of at least this share of the top probability; 0 is off.
    pub min_p: f32,
    /// Seed of the request's Philox streams.
    pub seed: u64,
    /// How drafts are accepted.
    pub rule: Rule,
    /// Logits of tokens of the prompt or the output so far are divided by it where positive, multiplied where negative;
    /// 1 is off.
    pub repetition_penalty: f32,
    /// Taken from the logit of every token of the output so far; 0 is off.
    pub presence_penalty: f32,
    /// Taken from the logit of every token of the output so far, once for each time it came; 0 is off.
    pub frequency_penalty: f32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            rule: Rule::default(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
        }
    }
}

impl SamplingParams {
    /// Checks every field's domain.
    ///
    /// # Errors
    /// Names the field that is out of its domain.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::argument(
                "temperature",
                "a finite number >= 0",
                self.temperature,
            ));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::argument("top_p", "a number in (0, 1]", self.top_p));
        }
        if !(self.min_p >= 0.0 && self.min_p < 1.0) {
            return Err(Error::argument("min_p", "a number in [0, 1)", self.min_p));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            let expected = "a finite number > 0";
            let found = self.repetition_penalty;
            return Err(Error::argument("repetition_penalty", expected, found));
        }
        for (field, penalty) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if !penalty.is_finite() {
                return Err(Error::argument(field, "a finite number", penalty));
            }
        }
        Ok(())
    }

    /// Whether a penalty is on, so that acceptance needs the tokens of the context.
    pub fn has_penalties(&self) -> bool {
        (
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
        ) != (1.0, 0.0, 0.0)
    }
}

/// What is known about one token of the vocabulary in one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenEdit {
    /// The token.
    pub token: u32,
    /// Times in the output so far, the anchor included; `Some(0)` for a token of the prompt alone, `None` for one that
    /// is in neither.
    pub count: Option<u32>,
    /// Added to its logit, after the penalties.
    pub bias: f32,
}

/// The tokens of one request whose logits change: context tokens (where penalties are on) and biased ones, in ascending
/// order, each once. Drafts of the pass need not be listed: row k counts the drafts before it by itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenEdits(Vec<TokenEdit>);

impl TokenEdits {
    /// Edits from a context (`prompt`, then `output`) and a sparse bias; a token may be biased more than once.
    pub fn new(prompt: &[u32], output: &[u32], bias: &[(u32, f32)]) -> Self {
        let mut edits: BTreeMap<u32, TokenEdit> = BTreeMap::new();
        let mut edit = |token: u32, count: Option<u32>, bias: f32| {
            let none = TokenEdit {
                token,
                count: None,
                bias: 0.0,
            };
            let edit = edits.entry(token).or_insert(none);
            edit.count = match (edit.count, count) {
                (None, count) | (count, None) => count,
                (Some(a), Some(b)) => Some(a + b),
            };
            edit.bias += bias;
        };
        for &token in prompt {
            edit(token, Some(0), 0.0);
        }
        for &token in output {
            edit(token, Some(1), 0.0);
        }
        for &(token, bias) in bias {
            edit(token, None, bias);
        }
        Self(edits.into_values().collect())
    }

    /// The edits, ascending by token.
    pub fn as_slice(&self) -> &[TokenEdit] {
        &self.0
    }
}
