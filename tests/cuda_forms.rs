//! The candidate form of the head through [`Ops`], for every kind of head, against the reference: its masks, the
//! candidates that the token before brings along, and the request's own filters.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, gpu, logits, mat, norm, reference, weight};
use dspark::ops::{
    ConfidenceHead, DraftBatch, DraftHead, Drafted, HeadKind, Ops, Rule, SamplingParams, SparseLaw,
};

const NUM_REQS: usize = 9;
const DRAFT_LEN: usize = 4;
const VOCAB_SIZE: usize = 1031;
const WIDTH: usize = 48;
const RANK: usize = 64;
const NUM_TOP: usize = 20;
const NUM_BIGRAM: usize = 5;

const KINDS: [HeadKind; 4] = [
    HeadKind::None,
    HeadKind::Vanilla,
    HeadKind::Gated,
    HeadKind::Rnn,
];

/// Other tokens for each, the last of them none.
fn bigrams<O: Ops>(ops: &mut O) -> O::TokenTable {
    let token = |i: usize| match i % NUM_BIGRAM {
        4 => SparseLaw::NO_PAIR,
        j => ((7 * (i / NUM_BIGRAM) + 131 * j) % VOCAB_SIZE) as u32,
    };
    let tokens: Vec<u32> = (0..VOCAB_SIZE * NUM_BIGRAM).map(token).collect();
    ops.token_table(&tokens, NUM_BIGRAM).unwrap()
}

fn head<O: Ops>(ops: &mut O, kind: HeadKind) -> DraftHead<O> {
    let mut rng = Rng::new(5);
    let mut table = |ops: &mut O, rows: usize, cols: usize| {
        weight(ops, [rows, cols], &rng.normals(rows * cols, 0.25))
    };
    let rank = if kind == HeadKind::None { 0 } else { RANK };
    let shape = match kind {
        HeadKind::None | HeadKind::Vanilla => None,
        HeadKind::Gated => Some((RANK, WIDTH + RANK)),
        HeadKind::Rnn => Some((3 * RANK, 2 * RANK + WIDTH)),
    };
    DraftHead {
        kind,
        rank,
        markov_w1: (rank > 0).then(|| table(ops, VOCAB_SIZE, RANK)),
        markov_w2: (rank > 0).then(|| table(ops, VOCAB_SIZE, RANK)),
        w2_fp8: None,
        row_bounds: None,
        bigrams: (kind != HeadKind::None).then(|| bigrams(ops)),
        proj_weight: shape.map(|(rows, cols)| table(ops, rows, cols)),
        proj_bias: shape.map(|(rows, _)| norm(ops, &Rng::new(6).normals(rows, 0.5))),
        confidence: Some(ConfidenceHead {
            weight: table(ops, 1, WIDTH + rank),
            bias: 0.25,
            with_markov: rank > 0,
        }),
    }
}

/// Requests of every kind of sampling, and base logits that tell the candidates apart.
struct Case {
    base: Vec<f32>,
    hidden: Vec<f32>,
    anchors: Vec<u32>,
    positions: Vec<u32>,
    sampling: Vec<SamplingParams>,
    mask: Vec<u32>,
}

impl Case {
    fn new() -> Self {
        let mut rng = Rng::new(8);
        let rows = NUM_REQS * DRAFT_LEN;
        let sampling = |r: usize| SamplingParams {
            temperature: [0.0, 0.7, 1.0][r % 3],
            seed: 50 + r as u64,
            rule: [Rule::Token, Rule::Coupled][r / 3 % 2],
            top_k: [0, 6][r % 2],
            top_p: [1.0, 1.0, 0.8][r / 3],
            min_p: [0.0, 0.05, 0.0][r / 3],
            ..SamplingParams::default()
        };
        Self {
            base: rng.normals(rows * VOCAB_SIZE, 2.0),
            hidden: rng.normals(rows * WIDTH, 1.0),
            anchors: (0..NUM_REQS)
                .map(|_| rng.below(VOCAB_SIZE) as u32)
                .collect(),
            positions: (0..NUM_REQS as u32).map(|r| 10 + r).collect(),
            sampling: (0..NUM_REQS).map(sampling).collect(),
            mask: (0..rows * VOCAB_SIZE.div_ceil(32))
                .map(|_| rng.next() as u32)
                .collect(),
        }
    }

    fn batch(&self, masked: bool) -> DraftBatch<'_> {
        DraftBatch {
            anchors: &self.anchors,
            anchor_positions: &self.positions,
            sampling: &self.sampling,
            draft_len: DRAFT_LEN,
            mask: masked.then_some(&self.mask),
        }
    }

    fn candidates<O: Ops>(
        &self,
        ops: &mut O,
        kind: HeadKind,
        masked: bool,
    ) -> (Drafted, SparseLaw) {
        let head = head(ops, kind);
        let hidden = mat(ops, WIDTH, &self.hidden);
        let base = logits(ops, VOCAB_SIZE, &self.base);
        let batch = self.batch(masked);
        let found = ops.draft_candidates(&head, &base, &hidden, &batch, NUM_TOP);
        assert_eq!(
            ops.read_logits(&base).unwrap(),
            self.base,
            "the logits stay"
        );
        found.unwrap()
    }

    fn allows(&self, row: usize, token: u32) -> bool {
        let words = VOCAB_SIZE.div_ceil(32);
        self.mask[row * words + token as usize / 32] >> (token % 32) & 1 == 1
    }
}

fn close(a: f32, b: f32) -> bool {
    a == b || (a - b).abs() < 2e-3
}

#[test]
fn candidates_agree_with_the_reference() {
    let Some(mut cuda) = gpu() else { return };
    let case = Case::new();
    for kind in KINDS {
        for masked in [false, true] {
            let (found, law) = case.candidates(&mut cuda, kind, masked);
            let (wanted, wanted_law) = case.candidates(&mut reference(), kind, masked);
            let mut compared = 0;
            for r in 0..NUM_REQS {
                for k in 0..DRAFT_LEN {
                    let row = r * DRAFT_LEN + k;
                    let n = law.num_candidates;
                    let pairs = row * n..(row + 1) * n;
                    let context = format!("{kind:?} {masked} request {r} draft {k}");
                    // The drafts before are the same.
                    let tokens = &law.tokens[pairs.clone()];
                    assert_eq!(tokens, &wanted_law.tokens[pairs.clone()], "{context}");
                    let logits = law.logits[pairs.clone()].iter();
                    let same = logits
                        .zip(&wanted_law.logits[pairs])
                        .all(|(&a, &b)| close(a, b));
                    assert!(same, "{context}: {law:?}");
                    let confidence = |of: &Drafted| of.confidence.as_ref().unwrap()[row];
                    assert!(close(confidence(&found), confidence(&wanted)), "{context}");
                    compared += 1;
                    if found.tokens[row] != wanted.tokens[row] {
                        break;
                    }
                }
            }
            // A near-tie may send a walk another way, but not many.
            assert!(
                compared > NUM_REQS * DRAFT_LEN - 6,
                "{kind:?}: {compared} steps"
            );
        }
    }
}

#[test]
fn no_candidate_is_what_the_mask_forbids() {
    let Some(mut cuda) = gpu() else { return };
    let case = Case::new();
    for kind in KINDS {
        let (drafted, law) = case.candidates(&mut cuda, kind, true);
        let num_candidates = law.num_candidates;
        for (i, &token) in law.tokens.iter().enumerate() {
            assert!(token == SparseLaw::NO_PAIR || case.allows(i / num_candidates, token));
        }
        let forbidden = |(row, &token): (usize, &u32)| !case.allows(row, token);
        assert!(
            !drafted.tokens.iter().enumerate().any(forbidden),
            "{kind:?}"
        );
    }
}
