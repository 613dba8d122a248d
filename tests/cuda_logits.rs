//! Target logits in bf16: the product is the f32 one rounded, and acceptance decides over them as over the same numbers in
//! f32.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, gpu, mat, round, weight};
use dspark::ops::cuda::Cuda;
use dspark::ops::{
    AcceptBatch, AcceptExtras, Accepted, DraftLaw, Matrix, Ops, Rule, SamplingParams,
};

#[test]
fn the_product_is_rounded_once() {
    let Some(mut cuda) = gpu() else { return };
    for (rows, vocab_size, width) in [(1, 331, 64), (5, 1031, 48), (17, 512, 256), (130, 4099, 72)]
    {
        let mut rng = Rng::new(rows as u64);
        let x = mat(&mut cuda, width, &rng.normals(rows * width, 1.0));
        let w = weight(
            &mut cuda,
            [vocab_size, width],
            &rng.normals(vocab_size * width, 0.25),
        );
        let mut exact = cuda.logits(rows, vocab_size).unwrap();
        let mut rounded = cuda.fixed_logits(rows, vocab_size).unwrap();
        cuda.linear_logits(&x, &w, &mut exact).unwrap();
        cuda.linear_logits(&x, &w, &mut rounded).unwrap();
        assert_eq!((rounded.rows(), rounded.cols()), (rows, vocab_size));
        let exact = cuda.read_logits(&exact).unwrap();
        let rounded = cuda.read_logits(&rounded).unwrap();
        for (i, (&exact, &rounded)) in exact.iter().zip(&rounded).enumerate() {
            // Half a unit in the last of 8 bits, and what another order of the f32 sum may add.
            let bound = exact.abs() * (0.5 / 128.0) * 1.01 + 1e-4;
            assert!(
                (exact - rounded).abs() <= bound,
                "{i}: {rounded} for {exact}"
            );
            assert_eq!(round(rounded), rounded);
        }
    }
}

struct Batch {
    vocab_size: usize,
    qo_indptr: Vec<i32>,
    drafts: Vec<u32>,
    sampling: Vec<SamplingParams>,
}

const DRAFT_LEN: usize = 3;

impl Batch {
    fn new(rng: &mut Rng, vocab_size: usize) -> Self {
        let mut qo_indptr = vec![0];
        let num_reqs = 24;
        for r in 0..num_reqs {
            qo_indptr.push(qo_indptr[r] + (r % (DRAFT_LEN + 2)) as i32);
        }
        let drafts = (0..num_reqs * DRAFT_LEN).map(|_| rng.below(vocab_size.min(4)) as u32);
        let sampling = |r: usize| SamplingParams {
            temperature: [0.0, 0.7, 1.0][r % 3],
            top_k: [0, 0, 3][r / 3 % 3],
            top_p: [1.0, 0.8][r / 2 % 2],
            seed: r as u64,
            rule: [Rule::Token, Rule::Block, Rule::Coupled][r / 4 % 3],
            ..SamplingParams::default()
        };
        Self {
            vocab_size,
            drafts: drafts.collect(),
            sampling: (0..num_reqs).map(sampling).collect(),
            qo_indptr,
        }
    }

    fn num_rows(&self) -> usize {
        *self.qo_indptr.last().unwrap() as usize
    }

    fn accept(&self, cuda: &mut Cuda, target: &<Cuda as Ops>::Logits) -> Accepted {
        cuda.accept(&AcceptBatch {
            target,
            qo_indptr: &self.qo_indptr,
            draft_tokens: &self.drafts,
            draft_len: DRAFT_LEN,
            law: DraftLaw::PointMass,
            anchor_positions: &vec![9; self.sampling.len()],
            sampling: &self.sampling,
            extras: AcceptExtras {
                logprobs: Some(4),
                ..AcceptExtras::default()
            },
        })
        .unwrap()
    }
}

/// The same decisions, and log-probabilities up to the order of a sum.
#[track_caller]
fn assert_same(a: &Accepted, b: &Accepted) {
    let decisions = |of: &Accepted| {
        let flags = of.flags.clone();
        (of.num_accepted.clone(), of.next_tokens.clone(), flags)
    };
    assert_eq!(decisions(a), decisions(b));
    let places = a.logprobs.concat().into_iter().zip(b.logprobs.concat());
    for (a, b) in places {
        let tops = a.top.iter().zip(&b.top);
        let close = |a: f32, b: f32| (a - b).abs() < 1e-4;
        let same = tops.into_iter().all(|(a, b)| a.0 == b.0 && close(a.1, b.1));
        assert!(same && close(a.logprob, b.logprob), "{a:?} {b:?}");
    }
}

#[test]
fn acceptance_reads_both_types_alike() {
    let Some(mut cuda) = gpu() else { return };
    for vocab_size in [7, 331, 1031, 4096] {
        let mut rng = Rng::new(vocab_size as u64);
        let batch = Batch::new(&mut rng, vocab_size);
        // Drafts among the likely tokens, so that runs of every length come about.
        let mut values = rng.normals(batch.num_rows() * vocab_size, 1.0);
        for row in values.chunks_mut(vocab_size) {
            row.iter_mut()
                .take(4)
                .for_each(|logit| *logit = round(*logit + 6.0));
        }
        let mut exact = cuda.logits(batch.num_rows(), vocab_size).unwrap();
        let mut rounded = cuda.fixed_logits(batch.num_rows(), vocab_size).unwrap();
        cuda.write_logits(&values, &mut exact).unwrap();
        cuda.write_logits(&values, &mut rounded).unwrap();
        let (exact, rounded) = (
            batch.accept(&mut cuda, &exact),
            batch.accept(&mut cuda, &rounded),
        );
        assert!(
            exact.num_accepted.iter().any(|&n| n > 0),
            "{vocab_size}: nothing accepted"
        );
        assert_same(&exact, &rounded);
        // Other logits are told apart.
        values.rotate_right(1);
        let mut other = cuda
            .fixed_logits(batch.num_rows(), batch.vocab_size)
            .unwrap();
        cuda.write_logits(&values, &mut other).unwrap();
        let other = batch.accept(&mut cuda, &other);
        assert_ne!(other.next_tokens, rounded.next_tokens, "{vocab_size}");
    }
}
