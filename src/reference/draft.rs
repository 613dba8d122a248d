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
use crate::ops::{
    DraftBatch, DraftHead, Drafted, HeadForm, HeadKind, LowRankLaw, Matrix, SparseLaw, W2,
};

/// A table of tokens, `cols` for each token of the vocabulary.
#[derive(Clone, Debug)]
pub struct TokenTable {
    pub(super) tokens: Vec<u32>,
    pub(super) cols: usize,
}

/// Arguments of [`crate::ops::Ops::draft_full`].
pub(super) struct DraftPass<'a> {
    pub(super) head: &'a DraftHead<Reference>,
    /// A copy of the base logits; `U + B` of what may be drafted, -inf elsewhere, after the walk.
    pub(super) logits: F32Matrix,
    pub(super) hidden: &'a F32Matrix,
    pub(super) batch: DraftBatch<'a>,
    /// How many of the largest base logits are candidates; `None`: the whole vocabulary is.
    pub(super) num_top: Option<usize>,
}

/// What a walk does at each request of each step in turn, for the law that is handed on.
#[derive(Default)]
struct Noted {
    /// The candidates, by falling base logit, then those of the token before.
    candidates: Vec<Vec<Option<usize>>>,
    /// What W2 is multiplied with.
    latents: Vec<Vec<f32>>,
}

/// [`crate::ops::Ops::draft_candidates`].
pub(super) fn candidates(
    mut pass: DraftPass<'_>,
    pool: &Pool,
    choices: &mut dyn Choices,
) -> Result<(Drafted, SparseLaw)> {
    let num_top = pass.num_top.unwrap_or_default();
    let num_bigram = pass.head.bigrams.as_ref().map_or(0, |table| table.cols);
    HeadForm::Candidates(num_top, num_bigram).check(pass.logits.cols())?;
    let mut noted = Noted::default();
    let drafted = pass.walk(pool, choices, &mut noted)?;
    let num_candidates = num_top + num_bigram;
    let num_pairs = noted.candidates.len() * num_candidates;
    let mut law = SparseLaw {
        num_candidates,
        tokens: vec![SparseLaw::NO_PAIR; num_pairs],
        logits: vec![f32::NEG_INFINITY; num_pairs],
    };
    for (i, candidates) in noted.candidates.iter().enumerate() {
        let row = pass.row_of_noted(i);
        for (j, token) in candidates.iter().enumerate() {
            if let Some(token) = *token {
                law.tokens[row * num_candidates + j] = token as u32;
                law.logits[row * num_candidates + j] = pass.logits.row(row)[token];
            }
        }
    }
    Ok((drafted, law))
}

/// [`crate::ops::Ops::draft_full`].
pub(super) fn full(
    mut pass: DraftPass<'_>,
    pool: &Pool,
    choices: &mut dyn Choices,
) -> Result<(Drafted, LowRankLaw)> {
    let mut noted = Noted::default();
    let drafted = pass.walk(pool, choices, &mut noted)?;
    let rank = pass.head.rank;
    let mut law = LowRankLaw {
        rank,
        latents: vec![0.0; noted.latents.len() * rank],
        log_normalizers: vec![f32::NAN; pass.logits.rows()],
        mask: pass.batch.mask.map(<[u32]>::to_vec),
    };
    for (i, latent) in noted.latents.iter().enumerate() {
        law.latents[pass.row_of_noted(i) * rank..][..rank].copy_from_slice(latent);
    }
    for (row, normalizer) in law.log_normalizers.iter_mut().enumerate() {
        let temperature = pass.batch.sampling[row / pass.batch.draft_len].temperature;
        let logits = pass.logits.row(row);
        if temperature > 0.0 && law::defect(logits).is_none() {
            *normalizer = law::log_normalizer(logits, temperature) as f32;
        }
    }
    Ok((drafted, law))
}

impl DraftPass<'_> {
    /// The row that entry `i` of [`Noted`] is about: it goes step by step, rows go request by request.
    fn row_of_noted(&self, i: usize) -> usize {
        let num_reqs = self.batch.anchors.len();
        i % num_reqs * self.batch.draft_len + i / num_reqs
    }

    fn walk(
        &mut self,
        pool: &Pool,
        choices: &mut dyn Choices,
        noted: &mut Noted,
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
            self.keep_candidates(k, &previous, &mut noted.candidates);
            self.add_bias(pool, k, &embedded, &mut state, &mut noted.latents);
            self.filter(k);
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
    fn add_bias(
        &mut self,
        pool: &Pool,
        k: usize,
        embedded: &[f32],
        state: &mut [f32],
        latents: &mut Vec<Vec<f32>>,
    ) {
        let w2 = match self.num_top {
            None => self.head.w2(),
            Some(_) => self.head.markov_w2.as_ref().map(W2::Stored),
        };
        let (mut code, w2) = match (self.head.kind, w2) {
            (HeadKind::None, _) | (_, None) => return,
            (HeadKind::Vanilla, Some(w2)) => (embedded.to_vec(), w2),
            (HeadKind::Gated, Some(w2)) => (self.gated(pool, k, embedded), w2),
            (HeadKind::Rnn, Some(w2)) => (self.recurrent(pool, k, embedded, state), w2),
        };
        w2.round(&mut code);
        let bias = w2.bias(pool, &code);
        for (r, bias) in bias.chunks_exact(self.logits.cols()).enumerate() {
            add(self.logits.row_mut(r * self.batch.draft_len + k), bias);
        }
        latents.extend(code.chunks_exact(self.head.rank).map(<[f32]>::to_vec));
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

    /// Takes everything but the candidates out of step `k` of all requests, where that is asked for.
    fn keep_candidates(&mut self, k: usize, previous: &[u32], noted: &mut Vec<Vec<Option<usize>>>) {
        let Some(num_top) = self.num_top else {
            return;
        };
        for (r, &previous) in previous.iter().enumerate() {
            let row = self.logits.row_mut(r * self.batch.draft_len + k);
            let mut order: Vec<usize> = (0..row.len())
                .filter(|&v| row[v] > f32::NEG_INFINITY)
                .collect();
            let by_logit = |a: &usize, b: &usize| row[*b].total_cmp(&row[*a]).then(a.cmp(b));
            if num_top < order.len() {
                order.select_nth_unstable_by(num_top, by_logit);
                order.truncate(num_top);
            }
            order.sort_by(by_logit);
            let mut candidates: Vec<Option<usize>> = order.iter().copied().map(Some).collect();
            candidates.resize(num_top, None);
            if let Some(table) = &self.head.bigrams {
                let bigrams = &table.tokens[previous as usize * table.cols..][..table.cols];
                let is_new = |&token: &u32| {
                    let logit = row.get(token as usize);
                    logit.is_some_and(|&logit| logit > f32::NEG_INFINITY)
                        && !order.contains(&(token as usize))
                };
                let pair = |token: &u32| is_new(token).then_some(*token as usize);
                candidates.extend(bigrams.iter().map(pair));
            }
            let kept: Vec<(usize, f32)> =
                candidates.iter().flatten().map(|&v| (v, row[v])).collect();
            row.fill(f32::NEG_INFINITY);
            for (v, logit) in kept {
                row[v] = logit;
            }
            noted.push(candidates);
        }
    }

    /// Takes what the request's own filters cut from the law of candidates out of step `k` of all requests.
    fn filter(&mut self, k: usize) {
        if self.num_top.is_none() {
            return;
        }
        for (r, params) in self.batch.sampling.iter().enumerate() {
            let row = self.logits.row_mut(r * self.batch.draft_len + k);
            let is_filtered = params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0;
            if params.temperature == 0.0 || !is_filtered || law::defect(row).is_some() {
                continue;
            }
            let kept = law::target_law(row, params);
            for (logit, _) in row.iter_mut().zip(kept).filter(|(_, prob)| *prob == 0.0) {
                *logit = f32::NEG_INFINITY;
            }
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
        expect_shape("logits", &self.logits, rows, vocab_size)?;
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
            let w2 = self.head.w2().map(|w2| w2.shape());
            if w2 != Some([vocab_size, rank]) {
                let expected = format!("[{vocab_size}, {rank}]");
                return Err(Error::argument("markov_w2", expected, format!("{w2:?}")));
            }
        }
        if let Some(table) = &self.head.bigrams {
            expect_len("bigrams", table.tokens.len(), vocab_size * table.cols)?;
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
