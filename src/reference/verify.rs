//! Acceptance of a batch: checks, the laws of a request's rows, and what is reported.

use std::borrow::Cow;

use super::Reference;
use super::accept::{self, Walk};
use super::choices::{Choices, Draw, TRIES, TRIES_LOW_RANK};
use super::law;
use super::norm::add;
use super::pool::Pool;
use super::shape::Shape;
use super::tensor::{F32Matrix, expect_shape};
use crate::error::{Error, Result};
use crate::ops::grammar::mask_words;
use crate::ops::{
    AcceptBatch, Accepted, DraftLaw, Matrix, Purpose, SamplingParams, SparseLaw, TokenLogprobs, W2,
};

/// The `next_tokens` entry of a request without rows.
pub const NO_TOKEN: u32 = u32::MAX;

/// See [`crate::ops::Ops::accept`].
pub(super) fn accept(
    batch: &AcceptBatch<'_, Reference>,
    pool: &Pool,
    choices: &mut dyn Choices,
) -> Result<Accepted> {
    batch.check(batch.target.rows(), batch.target.cols())?;
    check_law(batch)?;
    let mut accepted = Accepted::default();
    for req in 0..batch.sampling.len() {
        let window = Window { batch, pool, req };
        let mut flags = vec![false; batch.draft_len];
        let mut logprobs = Vec::new();
        let walk = if window.num_rows() == 0 {
            Walk {
                path: Vec::new(),
                next: NO_TOKEN,
            }
        } else {
            let walk = accept::decide(&window, choices)?;
            if let Some(num_top) = batch.extras.logprobs {
                logprobs = window.logprobs(&walk, num_top)?;
            }
            walk
        };
        walk.path.iter().for_each(|&row| flags[row - 1] = true);
        accepted.num_accepted.push(walk.path.len() as u32);
        accepted.next_tokens.push(walk.next);
        accepted.flags.extend(flags);
        if batch.extras.logprobs.is_some() {
            accepted.logprobs.push(logprobs);
        }
    }
    Ok(accepted)
}

/// One request of a batch.
pub(super) struct Window<'a> {
    batch: &'a AcceptBatch<'a, Reference>,
    pool: &'a Pool,
    req: usize,
}

impl Window<'_> {
    pub(super) fn params(&self) -> &SamplingParams {
        &self.batch.sampling[self.req]
    }

    pub(super) fn num_rows(&self) -> usize {
        (self.batch.qo_indptr[self.req + 1] - self.batch.qo_indptr[self.req]) as usize
    }

    /// The draft that row `row` (from 1) stands for.
    pub(super) fn token(&self, row: usize) -> u32 {
        self.batch.draft_tokens[self.draft_index(row)]
    }

    /// Rows that follow `row`, in the order they are tried.
    pub(super) fn children(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        (row + 1..self.num_rows()).filter(move |&child| self.parent(child) == row)
    }

    pub(super) fn is_stop(&self, token: u32) -> bool {
        let stops = self.batch.extras.stop_tokens;
        stops.is_some_and(|stops| stops[self.req].contains(&token))
    }

    /// The shaped logits of a row.
    pub(super) fn logits(&self, row: usize) -> Result<Cow<'_, [f32]>> {
        let batch = self.batch;
        let index = batch.qo_indptr[self.req] as usize + row;
        let drafts: Vec<u32> = self.path_to(row).map(|row| self.token(row)).collect();
        let words = batch.target.cols().div_ceil(32);
        let shape = Shape {
            params: self.params(),
            edits: batch.extras.edits.map(|edits| &edits[self.req]),
            drafts: &drafts,
            mask: batch
                .extras
                .mask
                .map_or(&[], |mask| &mask[index * words..][..words]),
        };
        let logits = shape.apply(batch.target.row(index));
        match law::defect(&logits) {
            None => Ok(logits),
            Some(found) => Err(Error::BadLogits {
                request: self.req,
                found: found.to_owned(),
            }),
        }
    }

    /// The target law of a row, at temperature > 0.
    pub(super) fn target_law(&self, row: usize) -> Result<Vec<f64>> {
        Ok(law::target_law(&self.logits(row)?, self.params()))
    }

    /// The law the draft of row `row` (from 1) was drawn from. A row of draft logits that is no law yielded its token
    /// with certainty.
    pub(super) fn draft_law(&self, row: usize) -> Vec<f64> {
        let (index, token) = (self.draft_index(row), self.token(row) as usize);
        let (temperature, vocab_size) = (self.params().temperature, self.batch.target.cols());
        match &self.batch.law {
            DraftLaw::Logits(logits) if law::defect(logits.row(index)).is_none() => {
                law::softmax(logits.row(index), temperature)
            }
            DraftLaw::Sparse(sparse) => {
                let range = index * sparse.num_candidates..(index + 1) * sparse.num_candidates;
                let logits = &sparse.logits[range.clone()];
                if law::defect(logits).is_some() {
                    return law::point_mass(token, vocab_size);
                }
                let mut probs = vec![0.0; vocab_size];
                let pairs = sparse.tokens[range].iter();
                let pairs = pairs.zip(law::softmax(logits, temperature));
                for (&token, prob) in pairs.filter(|(token, _)| **token != SparseLaw::NO_PAIR) {
                    probs[token as usize] += prob;
                }
                probs
            }
            DraftLaw::LowRank { base, w2, law: low } => {
                let latent = &low.latents[index * low.rank..][..low.rank];
                let mut logits = base.row(index).to_vec();
                if let Some(w2) = w2 {
                    add(&mut logits, &w2.bias(self.pool, latent));
                }
                if let Some(mask) = &low.mask {
                    let words = mask_words(vocab_size);
                    forbid(&mut logits, &mask[index * words..][..words]);
                }
                if law::defect(&logits).is_some() {
                    return law::point_mass(token, vocab_size);
                }
                law::softmax(&logits, temperature)
            }
            DraftLaw::PointMass | DraftLaw::Logits(_) => law::point_mass(token, vocab_size),
        }
    }

    /// Tries of a residual: see [`Choices::residual`].
    pub(super) fn num_tries(&self) -> u32 {
        match self.batch.law {
            DraftLaw::LowRank { .. } => TRIES_LOW_RANK,
            _ => TRIES,
        }
    }

    /// A decision on the token behind `row`.
    pub(super) fn draw(&self, row: usize, purpose: Purpose, ordinal: u32) -> Draw {
        let depth = self.path_to(row).count() as u32;
        Draw {
            seed: self.params().seed,
            position: self.batch.anchor_positions[self.req] + 1 + depth,
            purpose,
            ordinal,
        }
    }

    /// `row` and the rows before it up to the anchor's, which is left out.
    fn path_to(&self, row: usize) -> impl Iterator<Item = usize> + '_ {
        let parent = |&row: &usize| Some(self.parent(row)).filter(|&parent| parent > 0);
        std::iter::successors(Some(row).filter(|&row| row > 0), parent)
    }

    fn parent(&self, row: usize) -> usize {
        let parents = self.batch.extras.parents;
        parents.map_or(row - 1, |parents| parents[self.draft_index(row)] as usize)
    }

    fn draft_index(&self, row: usize) -> usize {
        self.req * self.batch.draft_len + row - 1
    }

    /// Log-probabilities of the committed tokens.
    fn logprobs(&self, walk: &Walk, num_top: usize) -> Result<Vec<TokenLogprobs>> {
        let rows = std::iter::once(0).chain(walk.path.iter().copied());
        let tokens = walk.path.iter().map(|&row| self.token(row));
        rows.zip(tokens.chain([walk.next]))
            .map(|(row, token)| {
                let probs = if self.params().temperature > 0.0 {
                    self.target_law(row)?
                } else {
                    law::softmax(&self.logits(row)?, 1.0)
                };
                let mut order: Vec<usize> = (0..probs.len()).filter(|&v| probs[v] > 0.0).collect();
                order.sort_by(|&a, &b| probs[b].total_cmp(&probs[a]));
                order.truncate(num_top);
                let ln = |v: usize| probs[v].ln() as f32;
                Ok(TokenLogprobs {
                    logprob: ln(token as usize),
                    top: order.iter().map(|&v| (v as u32, ln(v))).collect(),
                })
            })
            .collect()
    }
}

/// What only the law says about the batch.
fn check_law(batch: &AcceptBatch<'_, Reference>) -> Result<()> {
    let (num_drafts, vocab_size) = (batch.draft_tokens.len(), batch.target.cols());
    match &batch.law {
        DraftLaw::PointMass => Ok(()),
        DraftLaw::Logits(logits) => check_draft_logits(batch, logits),
        DraftLaw::Sparse(sparse) => sparse.check(num_drafts, vocab_size),
        DraftLaw::LowRank { base, w2, law } => {
            check_draft_logits(batch, base)?;
            law.check(num_drafts, vocab_size)?;
            let (expected, found) = ([vocab_size, law.rank], w2.as_ref().map(W2::shape));
            match found {
                None if law.rank == 0 => Ok(()),
                Some(found) if found == expected => Ok(()),
                _ => {
                    let (expected, found) = (format!("{expected:?}"), format!("{found:?}"));
                    Err(Error::argument("markov_w2", expected, found))
                }
            }
        }
    }
}

fn check_draft_logits(batch: &AcceptBatch<'_, Reference>, logits: &F32Matrix) -> Result<()> {
    let num_drafts = batch.draft_tokens.len();
    let enough = batch.least_law_rows()..=num_drafts;
    let rows = if enough.contains(&logits.rows()) {
        logits.rows()
    } else {
        num_drafts
    };
    expect_shape("draft logits", logits, rows, batch.target.cols())
}

/// -inf where the mask has 0.
fn forbid(logits: &mut [f32], mask: &[u32]) {
    for (v, logit) in logits.iter_mut().enumerate() {
        if mask[v / 32] >> (v % 32) & 1 == 0 {
            *logit = f32::NEG_INFINITY;
        }
    }
}
