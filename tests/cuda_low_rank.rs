//! Acceptance under a low-rank draft law (base logits, latents, W2) on the GPU: against the plain Rust backend, by
//! chi-square over a million draws, and where the draft law is the target's own.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, gpu, logits, reference, weight};
use dspark::ops::{
    AcceptBatch, AcceptExtras, Accepted, DraftLaw, LowRankLaw, Ops, Purpose, Rule, SamplingParams,
    W2,
};
use dspark::reference::choices::{Choices, Draw, Philox};
use half::bf16;

const RANK: usize = 32;

/// Requests of one shape whose drafts come from their low-rank laws.
struct Batch {
    vocab_size: usize,
    draft_len: usize,
    base: Vec<f32>,
    w2: Vec<f32>,
    law: LowRankLaw,
    target: Vec<f32>,
    tokens: Vec<u32>,
    sampling: Vec<SamplingParams>,
}

fn sixteen_bits(values: Vec<f32>) -> Vec<f32> {
    let round = |value: f32| bf16::from_f32(value).to_f32();
    values.into_iter().map(round).collect()
}

fn softmax(row: &[f32], temperature: f32) -> (Vec<f64>, f64) {
    let scaled = |l: f32| f64::from(l) / f64::from(temperature);
    let max = row.iter().copied().map(scaled).fold(f64::MIN, f64::max);
    let total: f64 = row.iter().map(|&l| (scaled(l) - max).exp()).sum();
    let law = row.iter().map(|&l| (scaled(l) - max).exp() / total);
    (law.collect(), max + total.ln())
}

impl Batch {
    /// `target` makes a request's target rows from its draft logits; the row behind the drafts is `None`.
    fn new(
        num_reqs: usize,
        [vocab_size, draft_len]: [usize; 2],
        masked: bool,
        params: impl Fn(usize) -> SamplingParams,
        mut target: impl FnMut(&mut Rng, Option<&[f32]>) -> Vec<f32>,
    ) -> Self {
        let mut rng = Rng::new((num_reqs * vocab_size) as u64 + u64::from(masked));
        let num_drafts = num_reqs * draft_len;
        let words = vocab_size.div_ceil(32);
        let mut batch = Self {
            vocab_size,
            draft_len,
            base: rng.normals(num_drafts * vocab_size, 1.0),
            w2: sixteen_bits(rng.normals(vocab_size * RANK, 0.4)),
            law: LowRankLaw {
                rank: RANK,
                latents: sixteen_bits(rng.normals(num_drafts * RANK, 0.5)),
                log_normalizers: Vec::new(),
                mask: masked.then(|| {
                    (0..num_drafts * words)
                        .map(|_| !(1 << rng.below(32)))
                        .collect()
                }),
            },
            target: Vec::new(),
            tokens: Vec::new(),
            sampling: (0..num_reqs).map(params).collect(),
        };
        for index in 0..num_drafts {
            let (r, k) = (index / draft_len, index % draft_len);
            let row = batch.draft_row(index);
            let params = &batch.sampling[r];
            let (law, log_normalizer) = softmax(&row, params.temperature);
            batch.law.log_normalizers.push(log_normalizer as f32);
            let draw = Draw {
                seed: params.seed,
                position: 1 + k as u32,
                purpose: params.rule.draft_purpose(),
                ordinal: 0,
            };
            batch.tokens.push(Philox.categorical(draw, &law) as u32);
            batch.target.extend(target(&mut rng, Some(&row)));
            if k + 1 == draft_len {
                batch.target.extend(target(&mut rng, None));
            }
        }
        batch
    }

    fn draft_row(&self, index: usize) -> Vec<f32> {
        let latent = &self.law.latents[index * RANK..][..RANK];
        let words = self.vocab_size.div_ceil(32);
        let logit = |v: usize| {
            let allowed = |mask: &Vec<u32>| mask[index * words + v / 32] >> (v % 32) & 1 == 1;
            if !self.law.mask.as_ref().is_none_or(allowed) {
                return f32::NEG_INFINITY;
            }
            let pairs = self.w2[v * RANK..][..RANK].iter().zip(latent);
            let dot: f64 = pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            (f64::from(self.base[index * self.vocab_size + v]) + dot) as f32
        };
        (0..self.vocab_size).map(logit).collect()
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Accepted {
        let target = logits(ops, self.vocab_size, &self.target);
        let base = logits(ops, self.vocab_size, &self.base);
        let w2 = weight(ops, [self.vocab_size, RANK], &self.w2);
        let num_reqs = self.sampling.len();
        let rows = self.draft_len + 1;
        let qo_indptr: Vec<i32> = (0..=num_reqs).map(|r| (r * rows) as i32).collect();
        ops.accept(&AcceptBatch {
            target: &target,
            qo_indptr: &qo_indptr,
            draft_tokens: &self.tokens,
            draft_len: self.draft_len,
            law: DraftLaw::LowRank {
                base: &base,
                w2: Some(W2::Stored(&w2)),
                law: &self.law,
            },
            anchor_positions: &vec![0; num_reqs],
            sampling: &self.sampling,
            extras: AcceptExtras::default(),
        })
        .unwrap()
    }
}

fn near(rng: &mut Rng, row: Option<&[f32]>, vocab_size: usize) -> Vec<f32> {
    let noise = rng.normals(vocab_size, 0.5);
    match row {
        None => noise,
        Some(row) => row
            .iter()
            .zip(noise)
            .map(|(&l, e)| l.max(-3.0) + e)
            .collect(),
    }
}

fn params(r: usize) -> SamplingParams {
    SamplingParams {
        temperature: [1.0, 0.7, 1.3][r % 3],
        top_k: [0, 0, 0, 12][r % 4],
        seed: 0x5EED_0000 + 31 * r as u64,
        rule: [Rule::Token, Rule::Block, Rule::Coupled][r / 2 % 3],
        ..SamplingParams::default()
    }
}

#[test]
fn low_rank_laws_decide_as_the_reference_does() {
    let Some(mut cuda) = gpu() else { return };
    let (mut requests, mut off) = (0, 0);
    for (num_reqs, vocab_size) in [(180, 37), (60, 1031), (12, 5003)] {
        for masked in [false, true] {
            let target = |rng: &mut Rng, row: Option<&[f32]>| near(rng, row, vocab_size);
            let batch = Batch::new(num_reqs, [vocab_size, 4], masked, params, target);
            let (got, want) = (batch.run(&mut cuda), batch.run(&mut reference()));
            assert!(want.num_accepted.iter().any(|&n| n > 0));
            requests += num_reqs;
            off += (0..num_reqs)
                .filter(|&r| {
                    (got.num_accepted[r], got.next_tokens[r])
                        != (want.num_accepted[r], want.next_tokens[r])
                })
                .count();
        }
    }
    // f32 laws against f64.
    assert!(off <= 2, "{off} of {requests} requests decided differently");
}

/// Where q is p a draft may be refused only when its uniform is within the rounding of the laws of 1: a normaliser of
/// size 20 in f32 makes q some 1e-6 wrong.
#[test]
fn drafts_of_the_targets_own_law_are_kept() {
    let Some(mut cuda) = gpu() else { return };
    let vocab_size = 1031;
    for rule in [Rule::Token, Rule::Block] {
        let params = |r: usize| SamplingParams {
            temperature: 1.0,
            seed: 77 + r as u64,
            rule,
            ..SamplingParams::default()
        };
        let target = |rng: &mut Rng, row: Option<&[f32]>| {
            row.map_or_else(|| rng.normals(vocab_size, 1.0), <[f32]>::to_vec)
        };
        let batch = Batch::new(1000, [vocab_size, 3], false, params, target);
        let accepted = batch.run(&mut cuda);
        let refused = accepted.num_accepted.iter().filter(|&&n| n < 3).count();
        assert!(refused <= 1, "{rule}: {refused} of 1000 requests");
        let mut other = batch;
        other.law.latents.rotate_left(RANK);
        let kept = other.run(&mut cuda).num_accepted;
        assert!(
            kept.iter().any(|&n| n < 3),
            "another law is not the target's"
        );
    }
}

/// The first committed token of 2^20 requests has the target's law: chi-square over the limit that it passes once in
/// 1e9 times. `shifted`: acceptance sees the law of the neighbouring draft.
fn ratio(ops: &mut impl Ops, rule: Rule, shifted: bool) -> f64 {
    const VOCAB: usize = 6;
    const NUM_DRAWS: usize = 1 << 20;
    let mut rng = Rng::new(5);
    let w2 = sixteen_bits(rng.normals(VOCAB * RANK, 0.4));
    let (base, latents) = (rng.normals(2 * VOCAB, 1.0), rng.normals(2 * RANK, 0.5));
    let target_rows = rng.normals(3 * VOCAB, 1.0);
    let mut batch = Batch {
        vocab_size: VOCAB,
        draft_len: 2,
        base,
        w2,
        law: LowRankLaw {
            rank: RANK,
            latents: sixteen_bits(latents),
            log_normalizers: Vec::new(),
            mask: None,
        },
        target: target_rows.repeat(NUM_DRAWS),
        tokens: Vec::new(),
        sampling: (0..NUM_DRAWS as u64)
            .map(|seed| SamplingParams {
                temperature: 1.0,
                seed,
                rule,
                ..SamplingParams::default()
            })
            .collect(),
    };
    let laws = [0, 1].map(|k| softmax(&batch.draft_row(k), 1.0));
    for seed in 0..NUM_DRAWS as u64 {
        for (k, (law, _)) in laws.iter().enumerate() {
            let draw = Draw {
                seed,
                position: 1 + k as u32,
                purpose: Purpose::Draft,
                ordinal: 0,
            };
            batch.tokens.push(Philox.categorical(draw, law) as u32);
        }
    }
    let shift = usize::from(shifted);
    let normalizers = [0, 1].map(|k| laws[(k + shift) % 2].1 as f32);
    batch.law.log_normalizers = normalizers.repeat(NUM_DRAWS);
    batch.base.rotate_left(shift * VOCAB);
    batch.law.latents.rotate_left(shift * RANK);
    batch.base = batch.base.repeat(NUM_DRAWS);
    batch.law.latents = batch.law.latents.repeat(NUM_DRAWS);
    let accepted = batch.run(ops);
    let mut counts = [0.0; VOCAB];
    for r in 0..NUM_DRAWS {
        let kept = accepted.num_accepted[r] > 0;
        let first = if kept {
            batch.tokens[2 * r]
        } else {
            accepted.next_tokens[r]
        };
        counts[first as usize] += 1.0;
    }
    let (law, _) = softmax(&target_rows[..VOCAB], 1.0);
    let terms = counts.iter().zip(law).map(|(count, p)| {
        let mean = p * NUM_DRAWS as f64;
        (count - mean).powi(2) / mean
    });
    terms.sum::<f64>() / 50.0 // 5 degrees of freedom: the 1 - 1e-9 quantile
}

#[test]
fn a_million_low_rank_draws_have_the_targets_law() {
    let Some(mut cuda) = gpu() else { return };
    for rule in [Rule::Token, Rule::Block] {
        let right = ratio(&mut cuda, rule, false);
        assert!(right < 1.0, "{rule}: {right}");
        let wrong = ratio(&mut cuda, rule, true);
        assert!(wrong > 1.0, "{rule}, shifted: {wrong}");
    }
}
