//! What goes into the engine and what comes out.

use super::stats::RequestStats;
use crate::error::{Error, Result};
use crate::ops::{Constraint, Grammar, MAX_TOP_LOGPROBS, SamplingParams, TokenLogprobs};
use crate::step::Round;

/// Names a request of one engine, in order of submission from 0.
pub type RequestId = usize;

/// Turns tokens into text as they come.
pub trait TextStream {
    /// Takes the next token and returns the text that is complete by now: never half a character. May be empty.
    fn push(&mut self, token: u32) -> String;
    /// Returns what is left at the end.
    fn finish(&mut self) -> String;
}

/// A prompt and how to continue it.
pub struct Request {
    /// The prompt; at least one token, and shorter than the model's context.
    pub prompt_ids: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Added to the logits of these tokens; a large negative number bans one.
    pub logit_bias: Vec<(u32, f32)>,
    /// What may be generated. The output ends where the grammar allows nothing more; a stop token ends it before, if the
    /// grammar allows that.
    pub grammar: Option<Box<dyn Grammar>>,
    /// Log-probabilities of the generated tokens under the law they are drawn from, and the likeliest n (at most
    /// [`MAX_TOP_LOGPROBS`]) beside each; at temperature 0 those of temperature 1.
    pub logprobs: Option<usize>,
    /// The most tokens to generate; at least 1. The model's context may end the output earlier.
    pub max_new_tokens: usize,
    /// Each of these tokens ends the output. It is the last of the generated tokens and no part of the text.
    pub stop_tokens: Vec<u32>,
    /// Each of these strings ends the output. The text is cut before it; the tokens go up to the one that completed it.
    pub stop_strings: Vec<String>,
    /// Makes text of the tokens; without one the text stays empty and there can be no stop strings.
    pub text: Option<Box<dyn TextStream>>,
}

impl Request {
    /// A request without stop conditions or text.
    pub fn new(prompt_ids: Vec<u32>, sampling: SamplingParams, max_new_tokens: usize) -> Self {
        Self {
            prompt_ids,
            sampling,
            logit_bias: Vec::new(),
            grammar: None,
            logprobs: None,
            max_new_tokens,
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            text: None,
        }
    }

    /// Checks everything that does not depend on the page pool.
    ///
    /// # Errors
    /// Names the field that is out of its domain.
    pub fn validate(&self, vocab_size: usize, max_position: usize) -> Result<()> {
        self.sampling.validate()?;
        if self.prompt_ids.is_empty() {
            return Err(Error::argument("prompt", "at least one token", "none"));
        }
        if let Some(id) = self
            .prompt_ids
            .iter()
            .find(|&&id| id as usize >= vocab_size)
        {
            let expected = format!("token ids below {vocab_size}");
            return Err(Error::argument("prompt", expected, id));
        }
        if self.prompt_ids.len() >= max_position {
            let expected = format!("fewer than {max_position} tokens (the model's context)");
            return Err(Error::argument("prompt", expected, self.prompt_ids.len()));
        }
        if let Some((id, _)) = self
            .logit_bias
            .iter()
            .find(|(id, bias)| *id as usize >= vocab_size || bias.is_nan())
        {
            let expected = format!("a number for token ids below {vocab_size}");
            return Err(Error::argument("logit_bias", expected, id));
        }
        if let Some(n) = self.logprobs.filter(|&n| n > MAX_TOP_LOGPROBS) {
            let expected = format!("at most {MAX_TOP_LOGPROBS}");
            return Err(Error::argument("logprobs", expected, n));
        }
        let constraint = self.grammar.as_deref().map(|grammar| Constraint {
            grammar,
            committed: &[],
        });
        if constraint.is_some_and(|constraint| constraint.is_complete(vocab_size)) {
            let expected = "one that allows a first token";
            return Err(Error::argument("grammar", expected, "one that allows none"));
        }
        if self.max_new_tokens == 0 {
            return Err(Error::argument("max_new_tokens", "at least 1", 0));
        }
        if self.stop_strings.iter().any(String::is_empty) {
            let expected = "strings of at least one character";
            return Err(Error::argument("stop_strings", expected, "an empty string"));
        }
        if !self.stop_strings.is_empty() && self.text.is_none() {
            let expected = "a tokenizer to find stop strings with";
            return Err(Error::argument("stop_strings", expected, "none"));
        }
        Ok(())
    }
}

/// Why an output ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// One of the stop tokens came.
    StopToken,
    /// One of the stop strings came.
    StopString,
    /// The grammar allows nothing more.
    GrammarComplete,
    /// `max_new_tokens` were generated.
    MaxNewTokens,
    /// The model's context is full.
    Context,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The token.
    pub token: u32,
    /// Text that became complete with it; held back while it may be the beginning of a stop string.
    pub text: String,
    /// Whether it was drafted and accepted, rather than drawn from the target.
    pub drafted: bool,
    /// How likely it was, where the request asked for it.
    pub logprobs: Option<TokenLogprobs>,
}

/// What happened to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// New tokens: the first one after the prompt, or what a round added.
    Tokens {
        /// Whose.
        request: RequestId,
        /// In order; at least one.
        pieces: Vec<Piece>,
    },
    /// The output is complete; the request has left the batch.
    Finished {
        /// Whose.
        request: RequestId,
        /// Everything about it.
        completion: Box<Completion>,
    },
}

/// A complete output.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Completion {
    /// The prompt.
    pub prompt_ids: Vec<u32>,
    /// The generated tokens, at most `max_new_tokens`; a stop token is the last of them.
    pub tokens: Vec<u32>,
    /// One entry for each of them where the request asked for it, else empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<TokenLogprobs>,
    /// Their text, without stop token and stop string.
    pub text: String,
    /// Why it ended.
    pub reason: FinishReason,
    /// Every round in full, also where the output was cut inside one. The first token comes from the prefill and
    /// belongs to no round.
    pub rounds: Vec<Round>,
    /// Counts and times.
    pub stats: RequestStats,
}
