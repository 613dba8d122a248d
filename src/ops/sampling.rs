//! Per-request sampling parameters and the purposes of random numbers.

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
    /// Sampling the bonus token, or any token from the plain target law.
    Bonus = 4,
}

/// How one request samples. The target law is `softmax(logits / temperature)`, then top-k, top-p, min-p.
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
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
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
        Ok(())
    }
}
