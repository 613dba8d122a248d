//! Target law and acceptance.

use super::Reference;
use super::choices::{Choices, Draw};
use super::law;
use super::tensor::{F32Matrix, expect_len, expect_shape};
use crate::error::{Error, Result};
use crate::ops::{Accepted, DraftLaw, Matrix, Purpose, SamplingParams};

/// The `next_tokens` entry of a request without rows.
pub const NO_TOKEN: u32 = u32::MAX;

/// Arguments of [`crate::ops::Ops::accept`].
pub(super) struct AcceptPass<'a> {
    pub(super) target: &'a F32Matrix,
    pub(super) qo_indptr: &'a [i32],
    pub(super) draft_tokens: &'a [u32],
    pub(super) draft_len: usize,
    pub(super) law: DraftLaw<'a, Reference>,
    pub(super) anchor_positions: &'a [u32],
    pub(super) sampling: &'a [SamplingParams],
}

impl AcceptPass<'_> {
    pub(super) fn run(&self, choices: &mut dyn Choices) -> Result<Accepted> {
        self.check()?;
        let mut accepted = Accepted::default();
        for r in 0..self.sampling.len() {
            let (num_accepted, next_token) = if self.num_rows(r) == 0 {
                (0, NO_TOKEN)
            } else if self.sampling[r].temperature == 0.0 {
                self.accept_greedy(r)?
            } else {
                self.accept_token_rule(r, choices)?
            };
            accepted.num_accepted.push(num_accepted as u32);
            accepted.next_tokens.push(next_token);
        }
        Ok(accepted)
    }

    /// Drafts kept as long as each is the argmax, and the argmax of the first row not matched.
    fn accept_greedy(&self, r: usize) -> Result<(usize, u32)> {
        let verify_len = self.num_rows(r) - 1;
        for k in 0..verify_len {
            let best = law::argmax(self.target_row(r, k)?) as u32;
            if best != self.draft_token(r, k) {
                return Ok((k, best));
            }
        }
        let bonus = law::argmax(self.target_row(r, verify_len)?);
        Ok((verify_len, bonus as u32))
    }

    /// The token rule: draft `x` is kept if `u * q(x) < p(x)`; at the first rejection the recovered token comes from the
    /// residual, and from `p` where rounding has left no residual.
    fn accept_token_rule(&self, r: usize, choices: &mut dyn Choices) -> Result<(usize, u32)> {
        let params = &self.sampling[r];
        let verify_len = self.num_rows(r) - 1;
        for k in 0..verify_len {
            let token = self.draft_token(r, k) as usize;
            let target_probs = law::target_law(self.target_row(r, k)?, params);
            let draft_probs = self.draft_law(r, k, token);
            let draw = self.draw(r, k, Purpose::Accept);
            if choices.accept(draw, target_probs[token], draft_probs[token]) {
                continue;
            }
            let residual = law::residual(&target_probs, &draft_probs).unwrap_or(target_probs);
            let recovered = choices.categorical(self.draw(r, k, Purpose::Residual), &residual);
            return Ok((k, recovered as u32));
        }
        let target_probs = law::target_law(self.target_row(r, verify_len)?, params);
        let draw = self.draw(r, verify_len, Purpose::Bonus);
        Ok((verify_len, choices.categorical(draw, &target_probs) as u32))
    }

    /// The law draft `k` (from 0) of request `r` was sampled from. A row of draft logits that is no law yielded its token
    /// with certainty.
    fn draft_law(&self, r: usize, k: usize, token: usize) -> Vec<f64> {
        if let DraftLaw::Logits(logits) = &self.law {
            let row = logits.row(r * self.draft_len + k);
            if law::defect(row).is_none() {
                return law::softmax(row, self.sampling[r].temperature);
            }
        }
        law::point_mass(token, self.target.cols())
    }

    /// The decision on row `k` of request `r`.
    fn draw(&self, r: usize, k: usize, purpose: Purpose) -> Draw {
        Draw {
            seed: self.sampling[r].seed,
            position: self.anchor_positions[r] + 1 + k as u32,
            purpose,
        }
    }

    fn num_rows(&self, r: usize) -> usize {
        (self.qo_indptr[r + 1] - self.qo_indptr[r]) as usize
    }

    fn draft_token(&self, r: usize, k: usize) -> u32 {
        self.draft_tokens[r * self.draft_len + k]
    }

    fn target_row(&self, r: usize, k: usize) -> Result<&[f32]> {
        let row = self.target.row(self.qo_indptr[r] as usize + k);
        match law::defect(row) {
            None => Ok(row),
            Some(found) => Err(Error::BadLogits {
                request: r,
                found: found.to_owned(),
            }),
        }
    }

    fn check(&self) -> Result<()> {
        let num_reqs = self.sampling.len();
        self.sampling
            .iter()
            .try_for_each(SamplingParams::validate)?;
        expect_len("anchor_positions", self.anchor_positions.len(), num_reqs)?;
        expect_len(
            "draft_tokens",
            self.draft_tokens.len(),
            num_reqs * self.draft_len,
        )?;
        expect_len("qo_indptr", self.qo_indptr.len(), num_reqs + 1)?;
        let ascending = self.qo_indptr.is_sorted() && self.qo_indptr[0] == 0;
        if !ascending {
            let found = format!("{:?}", self.qo_indptr);
            return Err(Error::argument(
                "qo_indptr",
                "ascending numbers from 0",
                found,
            ));
        }
        let vocab_size = self.target.cols();
        let num_rows = self.qo_indptr[num_reqs] as usize;
        expect_shape("target logits", self.target, num_rows, vocab_size)?;
        if let DraftLaw::Logits(logits) = &self.law {
            expect_shape(
                "draft logits",
                *logits,
                num_reqs * self.draft_len,
                vocab_size,
            )?;
        }
        for r in 0..num_reqs {
            let verify_len = self.num_rows(r).saturating_sub(1);
            if verify_len > self.draft_len {
                let field = format!("rows of request {r}");
                let expected = format!("at most 1 + {}", self.draft_len);
                return Err(Error::argument(field, expected, self.num_rows(r)));
            }
            for k in 0..verify_len {
                if self.draft_token(r, k) as usize >= vocab_size {
                    let expected = format!("below {vocab_size}");
                    return Err(Error::argument(
                        "draft token",
                        expected,
                        self.draft_token(r, k),
                    ));
                }
            }
        }
        Ok(())
    }
}
