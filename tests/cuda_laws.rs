//! The CUDA draft head against the plain Rust backend: the same Philox draws, so the same tokens, except where two scores
//! are too close to call.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, Tolerance, assert_close, gpu, logits, mat, norm, reference, weight};
use dspark::ops::{
    ConfidenceHead, DraftBatch, DraftHead, Drafted, HeadKind, Ops, Rule, SamplingParams,
};
use dspark::reference::philox::token_exponential;

/// Two scores (log scale) closer than this may be ordered either way.
const NEAR_TIE: f64 = 1e-3;

struct Head {
    kind: HeadKind,
    num_reqs: usize,
    draft_len: usize,
    vocab_size: usize,
    hidden_size: usize,
    rank: usize,
    /// Confidence head, and whether it sees the Markov row.
    confidence: Option<bool>,
    seed: u64,
}

struct HeadResult {
    logits: Vec<f32>,
    drafted: Drafted,
}

impl Head {
    fn weights<O: Ops>(&self, ops: &mut O) -> DraftHead<O> {
        let &Self {
            kind,
            vocab_size,
            hidden_size: d,
            rank: r,
            ..
        } = self;
        let mut rng = Rng::new(self.seed + 100);
        let mut matrix = |ops: &mut O, shape: [usize; 2]| {
            let scale = (shape[1] as f32).sqrt().recip();
            weight(ops, shape, &rng.normals(shape[0] * shape[1], scale))
        };
        let markov = kind != HeadKind::None;
        let projection = match kind {
            HeadKind::None | HeadKind::Vanilla => None,
            HeadKind::Gated => Some([r, d + r]),
            HeadKind::Rnn => Some([3 * r, 2 * r + d]),
        };
        let markov_w1 = markov.then(|| {
            // Entries of size one, so that the bias changes what is drafted.
            let values = Rng::new(self.seed + 7).normals(vocab_size * r, 1.0);
            weight(ops, [vocab_size, r], &values)
        });
        let markov_w2 = markov.then(|| matrix(ops, [vocab_size, r]));
        let proj_weight = projection.map(|shape| matrix(ops, shape));
        let confidence = self.confidence.map(|with_markov| ConfidenceHead {
            weight: matrix(ops, [1, d + if with_markov { r } else { 0 }]),
            bias: 0.25,
            with_markov,
        });
        let bias = projection.map(|shape| Rng::new(5).normals(shape[0], 0.5));
        DraftHead {
            kind,
            rank: r,
            markov_w1,
            markov_w2,
            proj_weight,
            proj_bias: bias.map(|bias| norm(ops, &bias)),
            confidence,
        }
    }

    /// Every third request greedy, the others at different temperatures.
    fn sampling(&self) -> Vec<SamplingParams> {
        (0..self.num_reqs)
            .map(|r| SamplingParams {
                temperature: [0.0, 1.0, 0.6][r % 3],
                rule: [Rule::Token, Rule::Coupled][r / 3 % 2],
                seed: 0x1234_5678_9abc_0000 + 17 * r as u64,
                ..SamplingParams::default()
            })
            .collect()
    }

    fn anchors(&self) -> (Vec<u32>, Vec<u32>) {
        let mut rng = Rng::new(self.seed + 1);
        let anchors = (0..self.num_reqs)
            .map(|_| rng.below(self.vocab_size) as u32)
            .collect();
        let positions = (0..self.num_reqs).map(|_| rng.below(5000) as u32).collect();
        (anchors, positions)
    }

    fn base_logits(&self) -> Vec<f32> {
        let mut rng = Rng::new(self.seed + 2);
        let mut values = rng.normals(self.num_reqs * self.draft_len * self.vocab_size, 2.0);
        for row in values.chunks_mut(self.vocab_size) {
            // A tie at the top, on tokens far apart, and a token that can never be drawn.
            let top = row.iter().copied().fold(f32::MIN, f32::max);
            row[self.vocab_size - 1] = top;
            row[self.vocab_size / 3] = f32::NEG_INFINITY;
        }
        values
    }

    /// Runs the requests in `which`.
    fn run<O: Ops>(&self, ops: &mut O, which: std::ops::Range<usize>) -> HeadResult {
        self.run_on(ops, which, &self.base_logits())
    }

    /// The same on other base logits (of all requests).
    fn run_on<O: Ops>(
        &self,
        ops: &mut O,
        which: std::ops::Range<usize>,
        base: &[f32],
    ) -> HeadResult {
        let head = self.weights(ops);
        let rows = which.start * self.draft_len..which.end * self.draft_len;
        let hidden =
            Rng::new(self.seed + 3).normals(self.num_reqs * self.draft_len * self.hidden_size, 1.0);
        let hidden = &hidden[rows.start * self.hidden_size..rows.end * self.hidden_size];
        let hidden = mat(ops, self.hidden_size, hidden);
        let base = &base[rows.start * self.vocab_size..rows.end * self.vocab_size];
        let mut logits = logits(ops, self.vocab_size, base);
        let (anchors, positions) = self.anchors();
        let drafted = ops
            .draft_head(
                &head,
                &mut logits,
                &hidden,
                &DraftBatch {
                    anchors: &anchors[which.clone()],
                    anchor_positions: &positions[which.clone()],
                    sampling: &self.sampling()[which],
                    draft_len: self.draft_len,
                    mask: None,
                },
            )
            .unwrap();
        HeadResult {
            logits: ops.read_logits(&logits).unwrap(),
            drafted,
        }
    }

    /// How much worse than the reference's token `token` scores in the reference's own row; 0 for the same token.
    fn regret(&self, want: &HeadResult, index: usize, token: u32) -> f64 {
        let (r, k) = (index / self.draft_len, index % self.draft_len);
        let row = &want.logits[index * self.vocab_size..][..self.vocab_size];
        let params = self.sampling()[r];
        let position = self.anchors().1[r] + 1 + k as u32;
        let score = |v: u32| {
            let logit = f64::from(row[v as usize]);
            if params.temperature == 0.0 {
                return logit;
            }
            let purpose = params.rule.draft_purpose() as u32;
            let e = token_exponential(params.seed, position, purpose, v as usize);
            logit / f64::from(params.temperature) - e.ln()
        };
        if token == want.drafted.tokens[index] {
            return 0.0;
        }
        score(want.drafted.tokens[index]) - score(token)
    }

    /// Compares request by request up to the first token that differs, which must be a near-tie.
    fn compare(&self, label: &str, got: &HeadResult, want: &HeadResult) {
        let (vocab, draft_len) = (self.vocab_size, self.draft_len);
        for r in 0..self.num_reqs {
            for k in 0..draft_len {
                let index = r * draft_len + k;
                let row = |values: &[f32]| values[index * vocab..][..vocab].to_vec();
                let label = format!("{label}: request {r}, draft {k}");
                // The recurrent state carries its rounding along the block.
                let tolerance = Tolerance::f32(1e-4);
                assert_close(
                    &label,
                    &row(&got.logits),
                    &row(&want.logits),
                    vocab,
                    tolerance,
                );
                if let (Some(got), Some(want)) = (&got.drafted.confidence, &want.drafted.confidence)
                {
                    assert!(
                        (got[index] - want[index]).abs() < 1e-4,
                        "{label}: {} {}",
                        got[index],
                        want[index]
                    );
                }
                let token = got.drafted.tokens[index];
                let regret = self.regret(want, index, token);
                assert!(
                    regret < NEAR_TIE,
                    "{label}: token {token} is worse by {regret}"
                );
                if token != want.drafted.tokens[index] {
                    println!("{label}: near-tie of {regret}");
                    break;
                }
            }
        }
    }
}

fn heads() -> Vec<Head> {
    let head = |kind, num_reqs, draft_len, vocab_size, hidden_size, rank, confidence| Head {
        kind,
        num_reqs,
        draft_len,
        vocab_size,
        hidden_size,
        rank,
        confidence,
        seed: (num_reqs * vocab_size) as u64,
    };
    vec![
        head(HeadKind::None, 3, 7, 1031, 64, 0, None),
        head(HeadKind::None, 1, 1, 5, 64, 0, Some(false)),
        head(HeadKind::Vanilla, 5, 7, 1031, 72, 64, Some(true)),
        head(HeadKind::Vanilla, 1, 4, 49_152, 576, 64, None),
        head(HeadKind::Vanilla, 9, 2, 257, 33, 7, Some(false)),
        head(HeadKind::Gated, 3, 7, 1031, 576, 64, Some(true)),
        head(HeadKind::Gated, 1, 3, 100, 65, 33, Some(true)),
        head(HeadKind::Rnn, 3, 7, 1031, 576, 64, Some(true)),
        head(HeadKind::Rnn, 17, 5, 258, 40, 256, Some(false)),
        // Tensor cores: vocabularies that end inside a tile, every way of sharing a CTA's warps, one and several groups
        // of requests.
        head(HeadKind::Vanilla, 1, 7, 49_152, 64, 256, None),
        head(HeadKind::Vanilla, 2, 7, 1028, 64, 256, Some(true)),
        head(HeadKind::Vanilla, 8, 3, 4100, 64, 128, None),
        head(HeadKind::Vanilla, 17, 3, 1028, 64, 192, None),
        head(HeadKind::Vanilla, 64, 2, 132, 64, 64, None),
        head(HeadKind::Vanilla, 65, 2, 132, 64, 64, None),
        head(HeadKind::Vanilla, 130, 2, 260, 64, 64, None),
        head(HeadKind::Vanilla, 3, 2, 4, 64, 64, None),
        head(HeadKind::Gated, 3, 7, 1028, 576, 256, Some(true)),
        head(HeadKind::Gated, 70, 2, 132, 64, 64, None),
        head(HeadKind::Rnn, 9, 5, 1028, 40, 128, Some(true)),
        // Aligned rows of a rank that they do not take.
        head(HeadKind::Vanilla, 7, 2, 260, 64, 48, None),
    ]
}

#[test]
fn draft_head() {
    let Some(mut cuda) = gpu() else { return };
    for case in heads() {
        let label = format!(
            "{:?} {} reqs, vocab {}",
            case.kind, case.num_reqs, case.vocab_size
        );
        let got = case.run(&mut cuda, 0..case.num_reqs);
        let want = case.run(&mut reference(), 0..case.num_reqs);
        assert_eq!(got.drafted.confidence.is_some(), case.confidence.is_some());
        case.compare(&label, &got, &want);
    }
}

#[test]
fn a_request_drafts_the_same_alone_and_in_company() {
    let Some(mut cuda) = gpu() else { return };
    for case in heads() {
        let all = case.run(&mut cuda, 0..case.num_reqs);
        let rows = case.draft_len * case.vocab_size;
        for r in 0..case.num_reqs {
            let alone = case.run(&mut cuda, r..r + 1);
            assert_eq!(
                alone.drafted.tokens,
                all.drafted.tokens[r * case.draft_len..][..case.draft_len]
            );
            assert_eq!(
                alone.logits,
                all.logits[r * rows..][..rows],
                "{:?} request {r}",
                case.kind
            );
        }
    }
}

#[test]
fn a_row_without_a_law_drafts_token_zero() {
    let Some(mut cuda) = gpu() else { return };
    for case in heads() {
        let mut base = case.base_logits();
        let rows: Vec<usize> = (0..case.num_reqs)
            .map(|r| r * case.draft_len + r % case.draft_len)
            .collect();
        for (&row, value) in rows
            .iter()
            .zip([f32::NEG_INFINITY, f32::NAN].iter().cycle())
        {
            base[row * case.vocab_size..][..case.vocab_size].fill(*value);
        }
        let got = case.run_on(&mut cuda, 0..case.num_reqs, &base);
        for row in rows {
            assert_eq!(got.drafted.tokens[row], 0, "{:?} row {row}", case.kind);
        }
    }
}

#[test]
fn the_draft_comparison_fails_on_noise_shifted_by_a_position() {
    let mut oracle = reference();
    let case = &heads()[0];
    let want = case.run(&mut oracle, 0..case.num_reqs);
    let mut shifted = case.run(&mut oracle, 0..case.num_reqs);
    shifted.drafted.tokens.rotate_left(1);
    let compare = || case.compare("shifted", &shifted, &want);
    assert!(std::panic::catch_unwind(compare).is_err());
}
