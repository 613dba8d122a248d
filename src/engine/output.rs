//! The growing output of one request: where it ends, and its text.

use super::request::{FinishReason, Piece, Request, TextStream};
use super::stop::StopStrings;
use crate::ops::TokenLogprobs;

/// Takes committed tokens and decides how many of them belong to the output.
pub struct Output {
    /// Tokens so far.
    pub tokens: Vec<u32>,
    /// Of the tokens, where the request asked for it.
    pub logprobs: Vec<TokenLogprobs>,
    /// Text so far.
    pub text: String,
    /// Set when the output is complete.
    pub reason: Option<FinishReason>,
    stream: Option<Box<dyn TextStream>>,
    stop_strings: StopStrings,
    stop_tokens: Vec<u32>,
    max_tokens: usize,
    max_reason: FinishReason,
}

impl Output {
    /// An empty output for `request`, of which at most `room` tokens fit into the context.
    pub fn new(request: &mut Request, room: usize) -> Self {
        Self {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            text: String::new(),
            reason: None,
            stream: request.text.take(),
            stop_strings: StopStrings::new(std::mem::take(&mut request.stop_strings)),
            stop_tokens: request.stop_tokens.clone(),
            max_tokens: request.max_new_tokens.min(room),
            max_reason: if room < request.max_new_tokens {
                FinishReason::Context
            } else {
                FinishReason::MaxNewTokens
            },
        }
    }

    /// Adds what a round committed, the first `num_drafted` being accepted drafts, up to where the output ends: with the
    /// last token at the latest if `complete`. `logprobs` is empty or has an entry for each token.
    pub fn push(
        &mut self,
        committed: &[u32],
        logprobs: &[TokenLogprobs],
        num_drafted: usize,
        complete: bool,
    ) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(committed.len());
        for (i, &token) in committed.iter().enumerate() {
            let mut text = self.push_token(token);
            if complete && i + 1 == committed.len() && self.reason.is_none() {
                self.reason = Some(FinishReason::GrammarComplete);
                text += &self.rest();
            }
            self.text.push_str(&text);
            self.logprobs.extend(logprobs.get(i).cloned());
            pieces.push(Piece {
                token,
                text,
                drafted: i < num_drafted,
                logprobs: logprobs.get(i).cloned(),
            });
            if self.reason.is_some() {
                break;
            }
        }
        pieces
    }

    /// Text that may be shown after one more token.
    fn push_token(&mut self, token: u32) -> String {
        self.tokens.push(token);
        if self.stop_tokens.contains(&token) {
            self.reason = Some(FinishReason::StopToken);
            return self.rest();
        }
        let text = self.stream.as_mut().map(|stream| stream.push(token));
        let (mut text, stopped) = self.stop_strings.push(&text.unwrap_or_default());
        if stopped {
            self.reason = Some(FinishReason::StopString);
        } else if self.tokens.len() == self.max_tokens {
            self.reason = Some(self.max_reason);
            text += &self.rest();
        }
        text
    }

    /// What was held back of the text, at the end.
    fn rest(&mut self) -> String {
        let text = self.stream.as_mut().map(|stream| stream.finish());
        let (mut text, stopped) = self.stop_strings.push(&text.unwrap_or_default());
        if !stopped {
            text += &self.stop_strings.finish();
        }
        text
    }
}
