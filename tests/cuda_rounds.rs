//! Whole rounds on the GPU against the plain Rust backend: acceptance of ragged batches, survival and commit.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, gpu, logits, mat, reference};
use dspark::Error;
use dspark::ops::{
    AcceptBatch, AcceptExtras, Accepted, DraftBatch, DraftHead, DraftLaw, HeadKind, Ops,
    SamplingParams,
};

/// A round of many requests: ragged verify lengths, none and all, every filter, ties and `-inf`.
struct Round {
    num_reqs: usize,
    draft_len: usize,
    vocab_size: usize,
    qo_indptr: Vec<i32>,
    target: Vec<f32>,
    draft: Vec<f32>,
    draft_tokens: Vec<u32>,
    positions: Vec<u32>,
    sampling: Vec<SamplingParams>,
}

impl Round {
    fn new(num_reqs: usize, draft_len: usize, vocab_size: usize) -> Self {
        let mut rng = Rng::new((num_reqs * vocab_size) as u64);
        let mut qo_indptr = vec![0];
        for r in 0..num_reqs {
            let rows = match r % 5 {
                0 => draft_len + 1,
                1 => 1,
                2 if r > 2 => 0,
                _ => 1 + rng.below(draft_len + 1),
            };
            qo_indptr.push(qo_indptr[r] + rows as i32);
        }
        let draft = rng.normals(num_reqs * draft_len * vocab_size, 2.0);
        let sampling: Vec<_> = (0..num_reqs).map(|r| Self::params(r, vocab_size)).collect();
        let positions: Vec<u32> = (0..num_reqs).map(|_| rng.below(3000) as u32).collect();
        let mut round = Self {
            num_reqs,
            draft_len,
            vocab_size,
            qo_indptr,
            target: Vec::new(),
            draft,
            draft_tokens: Vec::new(),
            positions,
            sampling,
        };
        round.draft_tokens = round.drafts();
        for r in 0..num_reqs {
            round.push_target_rows(&mut rng, r);
        }
        round
    }

    fn params(r: usize, vocab_size: usize) -> SamplingParams {
        let plain = SamplingParams {
            temperature: 1.0,
            seed: 0xFEED_0000_0000 + 31 * r as u64,
            ..SamplingParams::default()
        };
        match r % 7 {
            0 => SamplingParams {
                temperature: 0.0,
                ..plain
            },
            1 => SamplingParams {
                temperature: 0.7,
                ..plain
            },
            2 => SamplingParams {
                top_k: 1 + (vocab_size / 3) as u32,
                ..plain
            },
            3 => SamplingParams {
                top_p: 0.9,
                ..plain
            },
            4 => SamplingParams {
                min_p: 0.05,
                temperature: 1.3,
                ..plain
            },
            5 => SamplingParams {
                top_k: 20,
                top_p: 0.8,
                min_p: 0.02,
                ..plain
            },
            _ => plain,
        }
    }

    /// Drafts sampled from the draft law, by the reference.
    fn drafts(&self) -> Vec<u32> {
        let mut ops = reference();
        let head = DraftHead {
            kind: HeadKind::None,
            rank: 0,
            markov_w1: None,
            markov_w2: None,
            proj_weight: None,
            proj_bias: None,
            confidence: None,
        };
        let rows = self.num_reqs * self.draft_len;
        let hidden = mat(&mut ops, 8, &vec![0.0; rows * 8]);
        let mut logits = logits(&mut ops, self.vocab_size, &self.draft);
        let anchors = vec![0; self.num_reqs];
        let batch = DraftBatch {
            anchors: &anchors,
            anchor_positions: &self.positions,
            sampling: &self.sampling,
            draft_len: self.draft_len,
            mask: None,
        };
        let drafted = ops.draft_head(&head, &mut logits, &hidden, &batch);
        drafted.unwrap().tokens
    }

    /// Target rows near the draft's, so that some drafts are kept; sometimes coarse (ties) or with `-inf`.
    fn push_target_rows(&mut self, rng: &mut Rng, r: usize) {
        let rows = (self.qo_indptr[r + 1] - self.qo_indptr[r]) as usize;
        for k in 0..rows {
            let near = (k < self.draft_len).then(|| (r * self.draft_len + k) * self.vocab_size);
            for v in 0..self.vocab_size {
                let base = near.map_or(0.0, |row| self.draft[row + v]);
                let mut logit = base + 0.5 * rng.normal();
                if r % 3 == 1 {
                    logit = logit.round();
                }
                if r % 4 == 3 && v % 2 == 1 {
                    logit = f32::NEG_INFINITY;
                }
                self.target.push(logit);
            }
            if r.is_multiple_of(14) && k < self.draft_len {
                // A greedy request whose drafts are all kept.
                let best = self.draft_tokens[r * self.draft_len + k] as usize;
                let row = self.target.len() - self.vocab_size;
                self.target[row + best] = 50.0;
            }
        }
    }

    fn run<O: Ops>(&self, ops: &mut O, point_mass: bool) -> dspark::Result<Accepted> {
        self.run_at(ops, point_mass, &self.positions)
    }

    fn run_at<O: Ops>(
        &self,
        ops: &mut O,
        point_mass: bool,
        positions: &[u32],
    ) -> dspark::Result<Accepted> {
        let target = logits(ops, self.vocab_size, &self.target);
        let draft = logits(ops, self.vocab_size, &self.draft);
        let law = if point_mass {
            DraftLaw::PointMass
        } else {
            DraftLaw::Logits(&draft)
        };
        ops.accept(&AcceptBatch {
            target: &target,
            qo_indptr: &self.qo_indptr,
            draft_tokens: &self.draft_tokens,
            draft_len: self.draft_len,
            law,
            anchor_positions: positions,
            sampling: &self.sampling,
            extras: AcceptExtras::default(),
        })
    }
}

/// Requests decided differently.
fn mismatches(got: &Accepted, want: &Accepted) -> Vec<usize> {
    (0..want.next_tokens.len())
        .filter(|&r| {
            got.num_accepted[r] != want.num_accepted[r] || got.next_tokens[r] != want.next_tokens[r]
        })
        .collect()
}

fn rounds() -> Vec<Round> {
    let sizes = [
        (1, 1, 2),
        (64, 7, 13),
        (210, 4, 257),
        (35, 7, 1031),
        (8, 3, 32_003),
    ];
    sizes
        .into_iter()
        .map(|(r, k, v)| Round::new(r, k, v))
        .collect()
}

#[test]
fn acceptance_decides_as_the_reference_does() {
    let Some(mut cuda) = gpu() else { return };
    let mut undecided = 0;
    for round in rounds() {
        for point_mass in [false, true] {
            let got = round.run(&mut cuda, point_mass).unwrap();
            let want = round.run(&mut reference(), point_mass).unwrap();
            let off = mismatches(&got, &want);
            for &r in &off {
                println!(
                    "vocab {} request {r} {:?}: got {} + {}, reference {} + {}",
                    round.vocab_size,
                    round.sampling[r],
                    got.num_accepted[r],
                    got.next_tokens[r],
                    want.num_accepted[r],
                    want.next_tokens[r],
                );
                assert!(
                    round.sampling[r].temperature > 0.0,
                    "a greedy decision is exact"
                );
            }
            undecided += off.len();
        }
    }
    // f32 laws against f64: about one decision in 10^5 is too close to call.
    assert!(undecided <= 1, "{undecided} requests decided differently");
}

#[test]
fn the_acceptance_comparison_fails_on_noise_shifted_by_a_position() {
    let mut oracle = reference();
    let round = Round::new(210, 4, 257);
    let want = round.run(&mut oracle, false).unwrap();
    let shifted: Vec<u32> = round.positions.iter().map(|p| p + 1).collect();
    let got = round.run_at(&mut oracle, false, &shifted).unwrap();
    assert!(mismatches(&got, &want).len() > 50);
    let kept = want.num_accepted.iter().filter(|&&n| n > 0).count();
    assert!(kept > 30, "the rounds must keep drafts, too: {kept}");
}

#[test]
fn rows_that_are_no_law_name_their_request() {
    let Some(mut cuda) = gpu() else { return };
    for (value, greedy) in [
        (f32::NAN, true),
        (f32::NAN, false),
        (f32::INFINITY, false),
        (f32::NEG_INFINITY, true),
    ] {
        let mut round = Round::new(4, 2, 65);
        let r = if greedy { 0 } else { 3 };
        round.sampling[r].temperature = if greedy { 0.0 } else { 1.0 };
        let row = round.qo_indptr[r] as usize * 65;
        let width = if value == f32::NEG_INFINITY { 65 } else { 1 };
        round.target[row..row + width].fill(value);
        for result in [
            round.run(&mut cuda, false),
            round.run(&mut reference(), false),
        ] {
            assert!(
                matches!(result, Err(Error::BadLogits { request, .. }) if request == r),
                "{value}: {result:?}"
            );
        }
    }
}

#[test]
fn survival_is_the_calibrated_product() {
    let Some(mut cuda) = gpu() else { return };
    let (num_reqs, draft_len) = (37, 7);
    let mut rng = Rng::new(2);
    let mut confidence: Vec<f32> = (0..num_reqs * draft_len).map(|_| rng.uniform()).collect();
    confidence[..6].copy_from_slice(&[0.0, 1.0, f32::NAN, -0.5, 1.5, 1e-30]);
    confidence[draft_len..2 * draft_len].fill(1.0);
    let calibration: Vec<f32> = (0..draft_len).map(|k| 0.5 + 0.25 * k as f32).collect();
    for temperature in [None, Some(calibration.as_slice())] {
        let got = cuda.survival(&confidence, temperature, draft_len).unwrap();
        for (r, row) in confidence.chunks(draft_len).enumerate() {
            let mut want = 1.0_f64;
            for (k, &value) in row.iter().enumerate() {
                let value = if value.is_nan() {
                    0.0
                } else {
                    f64::from(value.clamp(0.0, 1.0))
                };
                let odds = (value / (1.0 - value))
                    .powf(temperature.map_or(1.0, |t| 1.0 / f64::from(t[k])));
                want *= if odds.is_infinite() {
                    1.0
                } else {
                    odds / (1.0 + odds)
                };
                let found = f64::from(got[r * draft_len + k]);
                assert!(
                    (found - want).abs() < 1e-5,
                    "request {r}, draft {k}: {found}, expected {want}"
                );
            }
        }
    }
    assert!(cuda.survival(&[], None, 7).unwrap().is_empty());
    assert!(cuda.survival(&[0.5; 8], None, 7).is_err());
}

#[test]
fn commit_moves_lengths_and_anchors() {
    let Some(mut cuda) = gpu() else { return };
    let drafts = [10, 11, 12, 20, 21, 22, 30, 31, 32, 40, 41, 42];
    let committed = cuda
        .commit(
            &drafts,
            3,
            [
                &[3, 0, 2, 1],
                &[99, 98, 97, -1],
                &[5, 6, 7, 8],
                &[1, 2, 3, 4],
            ],
        )
        .unwrap();
    assert_eq!(committed.num_committed, [4, 1, 3, 0]);
    assert_eq!(committed.seq_lens, [9, 7, 10, 8]);
    assert_eq!(committed.anchors, [99, 98, 97, 4]);
    assert_eq!(
        committed.tokens[..12],
        [10, 11, 12, 99, 98, -1, -1, -1, 30, 31, 97, -1]
    );
    let alone = cuda.commit(&[], 0, [&[0], &[7], &[0], &[1]]).unwrap();
    assert_eq!((alone.tokens, alone.seq_lens), (vec![7], vec![1]));
    assert!(
        cuda.commit(&drafts, 3, [&[4, 0, 0, 0], &[0; 4], &[0; 4], &[0; 4]])
            .is_err()
    );
}
