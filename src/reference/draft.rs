//! The semi-autoregressive head over the base logits of a draft block.

use super::Reference;
use super::choices::{Choices, Draw};
use super::gemm::linear;
use super::law;
use super::norm::{add, sigmoid};
use super::pool::Pool;
use super::tensor::{F32Matrix, expect_len, expect_shape};
use super::weight::Weight;
use crate::error::{Error, Result};
use crate::ops::grammar::{mask_allows, mask_words};
use crate::ops::{DraftBatch, DraftHead, Drafted, HeadForm, HeadKind, Matrix, SparseLaw};

/// Arguments of [`crate::ops::Ops::draft_head`].
pub(super) struct DraftPass<'a> {
    pub(super) head: &'a DraftHead<Reference>,
    pub(super) logits: &'a mut F32Matrix,
    pub(super) hidden: &'a F32Matrix,
    pub(super) batch: DraftBatch<'a>,
    /// Everything but the largest base logits becomes -inf.
    pub(super) num_top: Option<usize>,
}

/// [`crate::ops::Ops::draft_candidates`], on a copy of the base logits: `pass.num_top` of each row are the candidates.
pub(super) fn candidates(
    pass: DraftPass<'_>,
    pool: &Pool,
    choices: &mut dyn Choices,
) -> Result<(Drafted, SparseLaw)> {
    let num_candidates = pass.num_top.unwrap_or(pass.logits.cols());
    HeadForm::Candidates(num_candidates).check(pass.logits.cols())?;
    let mut tops = Vec::new();
    let DraftPass {
        head,
        hidden,
        batch,
        num_top,
        logits,
    } = pass;
    let walk = DraftPass {
        head,
        logits: &mut *logits,
        hidden,
        batch,
        num_top,
    };
    let drafted = walk.run_noting(pool, choices, &mut tops)?;
    let mut law = SparseLaw {
        num_candidates,
        tokens: vec![SparseLaw::NO_PAIR; tops.len() * num_candidates],
        logits: vec![f32::NEG_INFINITY; tops.len() * num_candidates],
    };
    // Noted step by step; the law goes request by request.
    let num_reqs = batch.anchors.len();
    for (i, top) in tops.iter().enumerate() {
        let row = i % num_reqs * batch.draft_len + i / num_reqs;
        for (j, &token) in top.iter().enumerate() {
            law.tokens[row * num_candidates + j] = token as u32;
            law.logits[row * num_candidates + j] = logits.row(row)[token];
        }
    }
    Ok((drafted, law))
}

impl DraftPass<'_> {
    pub(super) fn run(self, pool: &Pool, choices: &mut dyn Choices) -> Result<Drafted> {
        self.run_noting(pool, choices, &mut Vec::new())
    }

    /// The same; `tops` takes the candidates of every request of each step in turn.
    fn run_noting(
        mut self,
        pool: &Pool,
        choices: &mut dyn Choices,
        tops: &mut Vec<Vec<usize>>,
    ) -> Result<Drafted> {
        self.check()?;
        let num_reqs = self.batch.anchors.len();
        let mut previous = self.batch.anchors.to_vec();
        let mut state = vec![0.0; num_reqs * self.head.rank];
        let mut drafted = Drafted {
            tokens: vec![0; num_reqs * self.batch.draft_len],
            confidence: self
                .head
                .confidence
                .as_ref()
                .map(|_| vec![0.0; num_reqs * self.batch.draft_len]),
        };
        for k in 0..self.batch.draft_len {
            let embedded = self.embed_previous(&previous);
            self.forbid(k);
            self.keep_top(k, tops);
            self.add_bias(pool, k, &embedded, &mut state);
            if let Some(confidence) = &mut drafted.confidence {
                for (r, value) in self.confidence(pool, k, &embedded).into_iter().enumerate() {
                    confidence[r * self.batch.draft_len + k] = value;
                }
            }
            for (r, token) in previous.iter_mut().enumerate() {
                *token = self.sample(choices, r, k);
                drafted.tokens[r * self.batch.draft_len + k] = *token;
            }
        }
        Ok(drafted)
    }

    /// `W1[x_{k-1}]` of all requests, `[num_reqs, rank]`.
    fn embed_previous(&self, previous: &[u32]) -> Vec<f32> {
        let rank = self.head.rank;
        let mut embedded = vec![0.0; previous.len() * rank];
        if let Some(w1) = &self.head.markov_w1 {
            for (&token, row) in previous.iter().zip(embedded.chunks_exact_mut(rank.max(1))) {
                w1.copy_row(token as usize, row);
            }
        }
        embedded
    }

    /// Adds `B_k` to the logits of step `k` of all requests.
    fn add_bias(&mut self, pool: &Pool, k: usize, embedded: &[f32], state: &mut [f32]) {
        let Some(w2) = &self.head.markov_w2 else {
            return;
        };
        let code = match self.head.kind {
            HeadKind::None => return,
            HeadKind::Vanilla => embedded.to_vec(),
            HeadKind::Gated => self.gated(pool, k, embedded),
            HeadKind::Rnn => self.recurrent(pool, k, embedded, state),
        };
        let vocab_size = w2.rows();
        let mut bias = vec![0.0; self.batch.anchors.len() * vocab_size];
        linear(pool, &code, w2, &mut bias);
        for (r, bias) in bias.chunks_exact(vocab_size).enumerate() {
            add(self.logits.row_mut(r * self.batch.draft_len + k), bias);
        }
    }

    /// Takes the tokens that the mask does not allow out of step `k` of all requests.
    fn forbid(&mut self, k: usize) {
        let Some(mask) = self.batch.mask else {
            return;
        };
        let words = mask_words(self.logits.cols());
        for r in 0..self.batch.anchors.len() {
            let index = r * self.batch.draft_len + k;
            let mask = &mask[index * words..][..words];
            for (v, logit) in self.logits.row_mut(index).iter_mut().enumerate() {
                if !mask_allows(mask, v as u32) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Takes everything but the largest base logits out of step `k` of all requests, where that is asked for.
    fn keep_top(&mut self, k: usize, tops: &mut Vec<Vec<usize>>) {
        let Some(num_top) = self.num_top else {
            return;
        };
        for r in 0..self.batch.anchors.len() {
            let row = self.logits.row_mut(r * self.batch.draft_len + k);
            let mut order: Vec<usize> = (0..row.len())
                .filter(|&v| row[v] > f32::NEG_INFINITY)
                .collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            order.truncate(num_top);
            let kept: Vec<f32> = order.iter().map(|&v| row[v]).collect();
            row.fill(f32::NEG_INFINITY);
            for (&v, logit) in order.iter().zip(kept) {
                row[v] = logit;
            }
            tops.push(order);
        }
    }

    /// `sigmoid(P [h_k ; w1] + bias) * w1`, `[num_reqs, rank]`.
    fn gated(&self, pool: &Pool, k: usize, embedded: &[f32]) -> Vec<f32> {
        let gates = self.project(pool, |r, input| {
            input.extend_from_slice(self.hidden_row(r, k));
            input.extend_from_slice(&embedded[r * self.head.rank..][..self.head.rank]);
        });
        let gated = gates.iter().zip(embedded);
        gated.map(|(&gate, &w1)| sigmoid(gate) * w1).collect()
    }

    /// Moves the state on and returns `tanh(o)`, `[num_reqs, rank]`.
    fn recurrent(&self, pool: &Pool, k: usize, embedded: &[f32], state: &mut [f32]) -> Vec<f32> {
        let rank = self.head.rank;
        let projected = self.project(pool, |r, input| {
            input.extend_from_slice(&state[r * rank..][..rank]);
            input.extend_from_slice(&embedded[r * rank..][..rank]);
            input.extend_from_slice(self.hidden_row(r, k));
        });
        let mut output = Vec::with_capacity(state.len());
        for (row, state) in projected
            .chunks_exact(3 * rank)
            .zip(state.chunks_exact_mut(rank))
        {
            let (g, c, o) = (&row[..rank], &row[rank..2 * rank], &row[2 * rank..]);
            for ((state, &g), &c) in state.iter_mut().zip(g).zip(c) {
                *state = sigmoid(g) * *state + sigmoid(-g) * c.tanh();
            }
            output.extend(o.iter().map(|o| o.tanh()));
        }
        output
    }

    /// `P z + bias` of all requests, `input` writing the `z` of a request.
    fn project(&self, pool: &Pool, input: impl Fn(usize, &mut Vec<f32>)) -> Vec<f32> {
        let (Some(weight), Some(bias)) = (&self.head.proj_weight, &self.head.proj_bias) else {
            return Vec::new();
        };
        let mut inputs = Vec::new();
        (0..self.batch.anchors.len()).for_each(|r| input(r, &mut inputs));
        let mut out = vec![0.0; self.batch.anchors.len() * weight.rows()];
        linear(pool, &inputs, weight, &mut out);
        for row in out.chunks_exact_mut(bias.len().max(1)) {
            add(row, bias);
        }
        out
    }

    /// `sigmoid(w . [h_k ; w1] + b)` of all requests.
    fn confidence(&self, pool: &Pool, k: usize, embedded: &[f32]) -> Vec<f32> {
        let Some(head) = &self.head.confidence else {
            return Vec::new();
        };
        let mut inputs = Vec::new();
        for r in 0..self.batch.anchors.len() {
            inputs.extend_from_slice(self.hidden_row(r, k));
            if head.with_markov {
                inputs.extend_from_slice(&embedded[r * self.head.rank..][..self.head.rank]);
            }
        }
        let mut out = vec![0.0; self.batch.anchors.len()];
        linear(pool, &inputs, &head.weight, &mut out);
        out.iter().map(|logit| sigmoid(logit + head.bias)).collect()
    }

    /// Draft `k` (from 0) of request `r`. A row that is no law yields token 0.
    fn sample(&self, choices: &mut dyn Choices, r: usize, k: usize) -> u32 {
        let logits = self.logits.row(r * self.batch.draft_len + k);
        let params = &self.batch.sampling[r];
        let token = if law::defect(logits).is_some() {
            0
        } else if params.temperature == 0.0 {
            law::argmax(logits)
        } else {
            let draw = Draw {
                seed: params.seed,
                position: self.batch.anchor_positions[r] + 1 + k as u32,
                purpose: params.rule.draft_purpose(),
                ordinal: 0,
            };
            choices.categorical(draw, &law::softmax(logits, params.temperature))
        };
        token as u32
    }

    fn hidden_row(&self, r: usize, k: usize) -> &[f32] {
        self.hidden.row(r * self.batch.draft_len + k)
    }

    fn check(&self) -> Result<()> {
        let num_reqs = self.batch.anchors.len();
        let rows = num_reqs * self.batch.draft_len;
        let vocab_size = self.logits.cols();
        expect_shape("logits", self.logits, rows, vocab_size)?;
        let DraftHead { kind, rank, .. } = *self.head;
        let width = self.hidden.cols();
        let needs_hidden = matches!(kind, HeadKind::Gated | HeadKind::Rnn);
        if needs_hidden || self.head.confidence.is_some() {
            expect_shape("hidden", self.hidden, rows, width)?;
        }
        if kind != HeadKind::None {
            expect_weight(
                "markov_w1",
                self.head.markov_w1.as_ref(),
                (vocab_size, rank),
            )?;
            expect_weight(
                "markov_w2",
                self.head.markov_w2.as_ref(),
                (vocab_size, rank),
            )?;
        }
        if needs_hidden {
            let (outputs, inputs) = match kind {
                HeadKind::Gated => (rank, width + rank),
                _ => (3 * rank, 2 * rank + width),
            };
            expect_weight(
                "proj_weight",
                self.head.proj_weight.as_ref(),
                (outputs, inputs),
            )?;
            let bias = self.head.proj_bias.as_ref();
            expect_len("proj_bias", bias.map_or(0, Vec::len), outputs)?;
        }
        if let Some(confidence) = &self.head.confidence {
            let markov = if confidence.with_markov { rank } else { 0 };
            expect_shape("confidence weight", &confidence.weight, 1, width + markov)?;
        }
        self.batch.check(vocab_size)
    }
}

fn expect_weight(field: &str, weight: Option<&Weight>, (rows, cols): (usize, usize)) -> Result<()> {
    match weight {
        Some(weight) => expect_shape(field, weight, rows, cols),
        None => Err(Error::argument(field, format!("[{rows}, {cols}]"), "none")),
    }
}
