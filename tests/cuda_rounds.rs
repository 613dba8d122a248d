//! The law of whole rounds on the GPU: chi-square at every position over millions of rounds in one call, with negative
//! controls that must fail.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, gpu, logits};
use dspark::ops::{
    AcceptBatch, AcceptExtras, Accepted, DraftLaw, Ops, Purpose, Rule, SamplingParams, SparseLaw,
};
use dspark::reference::choices::{Choices, Draw, Philox};
use rayon::prelude::*;

const VOCAB: usize = 6;
const DRAFT_LEN: usize = 3;
const NUM_ROWS: usize = DRAFT_LEN + 1;
/// So many that a million get to the last position.
const NUM_ROUNDS: usize = 9 << 18;
/// Of a control, which only has to be caught.
const NUM_CONTROLS: usize = 1 << 20;

/// What chi-square with 5 degrees of freedom passes 2.1e-10 of the time: of a round's four positions one does in 1e9.
const LIMIT: f64 = 54.0;

type Counts = [u64; VOCAB];

fn chi_square(counts: &Counts, law: &[f64]) -> f64 {
    let total: u64 = counts.iter().sum();
    let terms = counts.iter().zip(law).map(|(&count, p)| {
        let mean = p * total as f64;
        (count as f64 - mean).powi(2) / mean
    });
    terms.sum()
}

fn softmax(row: &[f32], temperature: f32) -> Vec<f64> {
    let weights: Vec<f64> = row
        .iter()
        .map(|&l| (f64::from(l) / f64::from(temperature)).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

/// What is broken.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Slip {
    None,
    /// Acceptance sees the draft laws of the next position.
    DraftRow,
    /// The bonus token is drawn from a draft's law.
    Bonus,
    /// The drafts are drawn with the numbers of the residual.
    SharedNoise,
    /// How many drafts are verified depends on what the first one is.
    Peek,
}

/// Rounds of three drafts, the same laws in every round.
struct Rounds {
    target: [Vec<f32>; NUM_ROWS],
    draft: [Vec<f32>; DRAFT_LEN],
    params: SamplingParams,
    sparse: bool,
    slip: Slip,
    number: usize,
}

/// The drafts of many rounds and what acceptance made of them.
struct Played {
    tokens: Vec<u32>,
    accepted: Accepted,
}

impl Rounds {
    fn new(rule: Rule, temperature: f32, sparse: bool, slip: Slip) -> Self {
        let mut rng = Rng::new(rule as u64 + 3);
        let target = [(); NUM_ROWS].map(|()| rng.normals(VOCAB, 1.0));
        let right = slip == Slip::None;
        let draft = [0, 1, 2].map(|k| {
            // Near the target's, for rounds to get far; else far off, for slips to show.
            let scale = if right { 0.25 } else { 1.5 };
            let near = target[k].iter().zip(rng.normals(VOCAB, scale));
            let mut row: Vec<f32> = near.map(|(l, e)| l + e).collect();
            let least = (0..VOCAB).min_by(|&a, &b| row[a].total_cmp(&row[b]));
            row[least.unwrap()] = f32::NEG_INFINITY;
            row
        });
        Self {
            target,
            draft,
            params: SamplingParams {
                temperature,
                rule,
                ..SamplingParams::default()
            },
            sparse,
            slip,
            number: if right { NUM_ROUNDS } else { NUM_CONTROLS },
        }
    }

    /// The law of a committed token at a position.
    fn target_law(&self, position: usize) -> Vec<f64> {
        softmax(&self.target[position], self.params.temperature)
    }

    fn draft_token(&self, laws: &[Vec<f64>; DRAFT_LEN], round: usize, k: usize) -> u32 {
        let mut draw = Draw {
            seed: round as u64,
            position: 1 + k as u32,
            purpose: self.params.rule.draft_purpose(),
            ordinal: 0,
        };
        if self.slip == Slip::SharedNoise {
            draw.purpose = Purpose::Residual;
            return Philox.sample(draw, &laws[k]) as u32;
        }
        Philox.categorical(draw, &laws[k]) as u32
    }

    fn play(&self, ops: &mut impl Ops) -> Played {
        let laws = [0, 1, 2].map(|k| softmax(&self.draft[k], self.params.temperature));
        let tokens: Vec<u32> = (0..self.number * DRAFT_LEN)
            .into_par_iter()
            .map(|i| self.draft_token(&laws, i / DRAFT_LEN, i % DRAFT_LEN))
            .collect();
        let mut qo_indptr = vec![0];
        let mut target = Vec::with_capacity(self.number * NUM_ROWS * VOCAB);
        for r in 0..self.number {
            let peeks = self.slip == Slip::Peek && tokens[r * DRAFT_LEN] < 3;
            let rows = if peeks { 1 } else { NUM_ROWS };
            qo_indptr.push(qo_indptr[r] + rows as i32);
            for k in 0..rows {
                let bonus = self.slip == Slip::Bonus && k == DRAFT_LEN;
                target.extend(if bonus {
                    &self.draft[0]
                } else {
                    &self.target[k]
                });
            }
        }
        let accepted = self.accept(ops, &tokens, &qo_indptr, &target);
        Played { tokens, accepted }
    }

    fn accept(
        &self,
        ops: &mut impl Ops,
        tokens: &[u32],
        qo_indptr: &[i32],
        target: &[f32],
    ) -> Accepted {
        let mut rows = self.draft.concat();
        if self.slip == Slip::DraftRow {
            rows.rotate_left(VOCAB);
        }
        let all: Vec<u32> = (0..VOCAB as u32).collect();
        let sparse = SparseLaw {
            num_candidates: VOCAB,
            tokens: all.repeat(tokens.len()),
            logits: rows.repeat(self.number),
        };
        let target = logits(ops, VOCAB, target);
        let draft = logits(ops, VOCAB, &rows.repeat(self.number));
        let sampling: Vec<_> = (0..self.number as u64)
            .map(|seed| SamplingParams {
                seed,
                ..self.params
            })
            .collect();
        ops.accept(&AcceptBatch {
            target: &target,
            qo_indptr,
            draft_tokens: tokens,
            draft_len: DRAFT_LEN,
            law: if self.sparse {
                DraftLaw::Sparse(&sparse)
            } else {
                DraftLaw::Logits(&draft)
            },
            anchor_positions: &vec![0; self.number],
            sampling: &sampling,
            extras: AcceptExtras::default(),
        })
        .unwrap()
    }

    /// Counts of tokens by position. Target rows do not depend on the drafts, so a token has the law of its row. Under the
    /// token and the coupled rule that holds among the rounds that get to a position, since whether they do is decided
    /// before it. The block rule decides about a whole round at once: there it holds for rounds that are continued
    /// from the target where they were cut, as the next round would do.
    fn counts(&self, played: &Played) -> [Counts; NUM_ROWS] {
        let laws = [0, 1, 2, 3].map(|k| self.target_law(k));
        let continued = self.params.rule == Rule::Block;
        let mut counts = [[0; VOCAB]; NUM_ROWS];
        for r in 0..self.number {
            let n = played.accepted.num_accepted[r] as usize;
            let drafts = &played.tokens[r * DRAFT_LEN..][..n];
            let committed = drafts.iter().chain([&played.accepted.next_tokens[r]]);
            for (k, &token) in committed.enumerate() {
                counts[k][token as usize] += 1;
            }
            let cut = if continued { n + 1 } else { NUM_ROWS };
            for (k, law) in laws.iter().enumerate().skip(cut) {
                let draw = Draw {
                    seed: r as u64,
                    position: 1001 + k as u32,
                    purpose: Purpose::Bonus,
                    ordinal: 0,
                };
                counts[k][Philox.sample(draw, law)] += 1;
            }
        }
        counts
    }

    /// Chi-square of every position over its limit.
    fn ratios(&self, ops: &mut impl Ops) -> [f64; NUM_ROWS] {
        let counts = self.counts(&self.play(ops));
        for (k, counts) in counts.iter().enumerate() {
            let total: u64 = counts.iter().sum();
            let enough = self.slip != Slip::None || total >= 1_000_000;
            assert!(enough, "{total} draws at position {k}");
        }
        [0, 1, 2, 3].map(|k| chi_square(&counts[k], &self.target_law(k)) / LIMIT)
    }
}

#[test]
fn every_position_of_a_round_has_the_targets_law() {
    let Some(mut cuda) = gpu() else { return };
    for rule in [Rule::Token, Rule::Block, Rule::Coupled] {
        for (temperature, sparse) in [(1.0, false), (0.7, true)] {
            let rounds = Rounds::new(rule, temperature, sparse, Slip::None);
            let ratios = rounds.ratios(&mut cuda);
            println!("{rule} T {temperature}: {ratios:.2?}");
            assert!(
                ratios.iter().all(|&ratio| ratio < 1.0),
                "{rule} T {temperature}: {ratios:?}"
            );
        }
    }
}

#[test]
fn broken_rounds_are_caught() {
    let Some(mut cuda) = gpu() else { return };
    for rule in [Rule::Token, Rule::Block] {
        for slip in [Slip::DraftRow, Slip::Bonus, Slip::SharedNoise, Slip::Peek] {
            let ratios = Rounds::new(rule, 1.0, false, slip).ratios(&mut cuda);
            println!("{rule} {slip:?}: {ratios:.2?}");
            assert!(
                ratios.iter().any(|&ratio| ratio > 1.0),
                "{rule} {slip:?}: {ratios:?}"
            );
        }
    }
}

/// Sibling drafts at the root, each with its own numbers or, `twins`, the same. The first committed token's chi-square
/// over its limit.
fn siblings_ratio(ops: &mut impl Ops, twins: bool) -> f64 {
    let mut rounds = Rounds::new(Rule::Token, 1.0, false, Slip::None);
    rounds.number = NUM_CONTROLS;
    rounds.draft = [0, 1, 2].map(|_| rounds.target[1].clone());
    let draft_law = softmax(&rounds.draft[0], 1.0);
    let tokens: Vec<u32> = (0..rounds.number * DRAFT_LEN)
        .into_par_iter()
        .map(|i| {
            let sibling = (i % DRAFT_LEN) as u32;
            let draw = Draw {
                seed: (i / DRAFT_LEN) as u64,
                position: 1,
                purpose: Purpose::Draft,
                ordinal: if twins { 0 } else { sibling },
            };
            Philox.sample(draw, &draft_law) as u32
        })
        .collect();
    let number = rounds.number;
    let qo_indptr: Vec<i32> = (0..=number).map(|r| (r * NUM_ROWS) as i32).collect();
    let target = logits(ops, VOCAB, &rounds.target.concat().repeat(number));
    let draft = logits(ops, VOCAB, &rounds.draft.concat().repeat(number));
    let sampling: Vec<_> = (0..number as u64)
        .map(|seed| SamplingParams {
            seed,
            ..rounds.params
        })
        .collect();
    let accepted = ops
        .accept(&AcceptBatch {
            target: &target,
            qo_indptr: &qo_indptr,
            draft_tokens: &tokens,
            draft_len: DRAFT_LEN,
            law: DraftLaw::Logits(&draft),
            anchor_positions: &vec![0; number],
            sampling: &sampling,
            extras: AcceptExtras {
                parents: Some(&vec![0; number * DRAFT_LEN]),
                ..AcceptExtras::default()
            },
        })
        .unwrap();
    let mut counts = [0; VOCAB];
    let mut kept = [0; DRAFT_LEN];
    for r in 0..number {
        let flags = &accepted.flags[r * DRAFT_LEN..][..DRAFT_LEN];
        let child = flags.iter().position(|&flag| flag);
        let first = child.map_or(accepted.next_tokens[r], |k| tokens[r * DRAFT_LEN + k]);
        counts[first as usize] += 1;
        if let Some(child) = child {
            kept[child] += 1;
        }
    }
    assert!(twins || kept.iter().all(|&n| n > 1000), "{kept:?}");
    chi_square(&counts, &rounds.target_law(0)) / LIMIT
}

#[test]
fn a_million_trees_have_the_targets_law() {
    let Some(mut cuda) = gpu() else { return };
    let right = siblings_ratio(&mut cuda, false);
    assert!(right < 1.0, "{right}");
    let wrong = siblings_ratio(&mut cuda, true);
    assert!(wrong > 1.0, "siblings of one draw: {wrong}");
}
