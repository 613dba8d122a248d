//! The draft head against the formula, and the exact law of drafting and acceptance, enumerated.

use super::*;
use crate::ops::{AcceptExtras, DraftBatch, LowRankLaw, Purpose};
use crate::reference::choices::{Enumerator, enumerate};

const VOCAB: usize = 5;
const RANK: usize = 3;
const WIDTH: usize = 4;

/// The tensors of a head, kept for the naive computation.
struct Tensors {
    w1: Vec<f32>,
    w2: Vec<f32>,
    proj: Vec<f32>,
    bias: Vec<f32>,
    confidence: Vec<f32>,
}

fn head(ops: &mut Reference, kind: HeadKind, with_markov: bool) -> (DraftHead<Reference>, Tensors) {
    let (outputs, inputs) = match kind {
        HeadKind::Gated => (RANK, WIDTH + RANK),
        _ => (3 * RANK, 2 * RANK + WIDTH),
    };
    let rank = if kind == HeadKind::None { 0 } else { RANK };
    let input = WIDTH + if with_markov { rank } else { 0 };
    let f32 = Dtype::F32;
    let (w1, w1_values) = weight(ops, f32, [VOCAB, RANK], &noise(1, VOCAB * RANK));
    let (w2, w2_values) = weight(ops, f32, [VOCAB, RANK], &noise(2, VOCAB * RANK));
    let (proj, proj_values) = weight(ops, f32, [outputs, inputs], &noise(3, outputs * inputs));
    let (confidence, confidence_values) = weight(ops, f32, [1, input], &noise(4, input));
    let bias = noise(5, outputs);
    let projected = matches!(kind, HeadKind::Gated | HeadKind::Rnn);
    let head = DraftHead {
        kind,
        rank,
        markov_w1: (rank > 0).then_some(w1),
        markov_w2: (rank > 0).then_some(w2),
        w2_fp8: None,
        row_bounds: None,
        bigrams: None,
        proj_weight: projected.then_some(proj),
        proj_bias: projected.then(|| bias.clone()),
        confidence: Some(ConfidenceHead {
            weight: confidence,
            bias: 0.3,
            with_markov,
        }),
    };
    let tensors = Tensors {
        w1: w1_values,
        w2: w2_values,
        proj: proj_values,
        bias,
        confidence: confidence_values,
    };
    (head, tensors)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn product(weight: &[f32], x: &[f64]) -> Vec<f64> {
    let dot = |w: &[f32]| w.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
    weight.chunks(x.len()).map(dot).collect()
}

/// Biases and confidences of one request's drafts, from the formulas.
fn naive_head(
    kind: HeadKind,
    t: &Tensors,
    hidden: &[f32],
    previous: &[u32],
) -> (Vec<f64>, Vec<f64>) {
    let (mut biases, mut confidences) = (Vec::new(), Vec::new());
    let mut state = [0.0; RANK];
    for (h, &token) in hidden.chunks(WIDTH).zip(previous) {
        let h: Vec<f64> = h.iter().map(|&h| f64::from(h)).collect();
        let w1: Vec<f64> = t.w1[token as usize * RANK..][..RANK]
            .iter()
            .map(|&w| f64::from(w))
            .collect();
        let with_bias = |z: &[f64]| -> Vec<f64> {
            product(&t.proj, z)
                .iter()
                .zip(&t.bias)
                .map(|(p, &b)| p + f64::from(b))
                .collect()
        };
        let code = match kind {
            HeadKind::None => vec![0.0; RANK],
            HeadKind::Vanilla => w1.clone(),
            HeadKind::Gated => {
                let gates = with_bias(&[&h[..], &w1].concat());
                gates
                    .iter()
                    .zip(&w1)
                    .map(|(g, w)| sigmoid(*g) * w)
                    .collect()
            }
            HeadKind::Rnn => {
                let z = with_bias(&[&state[..], &w1, &h].concat());
                for i in 0..RANK {
                    let g = sigmoid(z[i]);
                    state[i] = g * state[i] + (1.0 - g) * z[RANK + i].tanh();
                }
                z[2 * RANK..].iter().map(|o| o.tanh()).collect()
            }
        };
        biases.extend(product(&t.w2, &code));
        let input = [&h[..], &w1].concat();
        let logit = product(&t.confidence, &input[..t.confidence.len()])[0];
        confidences.push(sigmoid(logit + f64::from(0.3_f32)));
    }
    (biases, confidences)
}

/// `U + W2 latent`, from the latents handed on.
fn low_rank_logits(base: &[f32], tensors: &Tensors, law: &LowRankLaw) -> Vec<f32> {
    let mut logits = base.to_vec();
    if law.rank > 0 {
        let rows = logits.chunks_exact_mut(VOCAB);
        for (row, latent) in rows.zip(law.latents.chunks_exact(law.rank)) {
            let latent: Vec<f64> = latent.iter().copied().map(f64::from).collect();
            let bias = product(&tensors.w2, &latent);
            for (logit, bias) in row.iter_mut().zip(bias) {
                *logit = (f64::from(*logit) + bias) as f32;
            }
        }
    }
    logits
}

/// A request whose anchor is token 1 at position 0.
fn one_request(sampling: &[SamplingParams], draft_len: usize) -> DraftBatch<'_> {
    DraftBatch {
        anchors: &[1],
        anchor_positions: &[0],
        sampling,
        draft_len,
        mask: None,
    }
}

#[test]
fn heads_against_their_formulas() {
    let mut ops = ops();
    let (num_reqs, draft_len) = (3, 4);
    let base = noise(10, num_reqs * draft_len * VOCAB);
    let hidden_values = noise(11, num_reqs * draft_len * WIDTH);
    let hidden = mat(&mut ops, WIDTH, &hidden_values);
    let anchors = [4, 0, 2];
    let sampling = [0.0, 1.0, 0.5].map(|temperature| SamplingParams {
        temperature,
        seed: 77,
        ..SamplingParams::default()
    });
    let batch = DraftBatch {
        anchors: &anchors,
        anchor_positions: &[9, 9, 30],
        sampling: &sampling,
        draft_len,
        mask: None,
    };
    for kind in [
        HeadKind::None,
        HeadKind::Vanilla,
        HeadKind::Gated,
        HeadKind::Rnn,
    ] {
        for with_markov in [false, kind != HeadKind::None] {
            let (head, tensors) = head(&mut ops, kind, with_markov);
            let logits = mat(&mut ops, VOCAB, &base);
            let (drafted, law) = ops.draft_full(&head, &logits, &hidden, &batch).unwrap();
            let found = low_rank_logits(&base, &tensors, &law);
            for r in 0..num_reqs {
                let tokens = &drafted.tokens[r * draft_len..][..draft_len];
                let previous = [&anchors[r..=r], &tokens[..draft_len - 1]].concat();
                let hidden = &hidden_values[r * draft_len * WIDTH..][..draft_len * WIDTH];
                let (biases, confidence) = naive_head(kind, &tensors, hidden, &previous);
                let rows = r * draft_len * VOCAB..(r + 1) * draft_len * VOCAB;
                let want: Vec<f64> = base[rows.clone()]
                    .iter()
                    .zip(&biases)
                    .map(|(&u, b)| f64::from(u) + b)
                    .collect();
                assert_close(&found[rows.clone()], &want, 1e-6);
                let temperature = sampling[r].temperature;
                for (k, row) in found[rows].chunks_exact(VOCAB).enumerate() {
                    if temperature > 0.0 {
                        let total = row.iter().map(|l| f64::from(l / temperature).exp());
                        let want = [total.sum::<f64>().ln()];
                        let row = r * draft_len + k;
                        assert_close(&law.log_normalizers[row..=row], &want, 1e-6);
                    }
                }
                let found = drafted.confidence.as_ref().unwrap();
                assert_close(&found[r * draft_len..][..draft_len], &confidence, 1e-6);
            }
            for k in 0..draft_len {
                let row = &found[k * VOCAB..][..VOCAB];
                assert_eq!(drafted.tokens[k] as usize, law::argmax(row));
            }
        }
    }
}

#[test]
fn a_draft_row_that_is_no_law_yields_token_zero_and_keeps_acceptance_lossless() {
    let mut ops = ops();
    let (head, _) = head(&mut ops, HeadKind::None, false);
    let hidden = mat(&mut ops, WIDTH, &[0.0; WIDTH]);
    let sampling = [sampling(1.0)];
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let logits = mat(&mut ops, VOCAB, &[bad; VOCAB]);
        let (drafted, low_rank) = ops
            .draft_full(&head, &logits, &hidden, &one_request(&sampling, 1))
            .unwrap();
        assert_eq!(drafted.tokens, [0]);
        let target = noise(3, 2 * VOCAB);
        let law = enumerate(|choices| {
            let mut ops = enumerated(choices);
            let target = mat(&mut ops, VOCAB, &target);
            let accepted = accept(
                &mut ops,
                &target,
                &[0, 2],
                (&[0], 1),
                DraftLaw::LowRank {
                    base: &logits,
                    w2: None,
                    law: &low_rank,
                },
                &[0],
                &sampling,
            )
            .unwrap();
            if accepted.num_accepted[0] == 1 {
                0
            } else {
                accepted.next_tokens[0]
            }
        });
        let want = law::target_law(&target[..VOCAB], &sampling[0]);
        for (v, want) in want.iter().enumerate() {
            let got: f64 = law
                .iter()
                .filter(|(_, x)| *x as usize == v)
                .map(|(p, _)| p)
                .sum();
            assert!((got - want).abs() < 1e-12);
        }
    }
}

/// A batch without extras.
fn accept(
    ops: &mut Reference,
    target: &F32Matrix,
    qo_indptr: &[i32],
    (draft_tokens, draft_len): (&[u32], usize),
    law: DraftLaw<'_, Reference>,
    anchor_positions: &[u32],
    sampling: &[SamplingParams],
) -> Result<Accepted> {
    ops.accept(&AcceptBatch {
        target,
        qo_indptr,
        draft_tokens,
        draft_len,
        law,
        anchor_positions,
        sampling,
        extras: AcceptExtras::default(),
    })
}

pub(super) fn sampling(temperature: f32) -> SamplingParams {
    SamplingParams {
        temperature,
        ..SamplingParams::default()
    }
}

fn enumerated(choices: &Enumerator) -> Reference {
    Reference::new(Some(1))
        .unwrap()
        .with_choices(Box::new(choices.clone()))
}

/// Target logits after `prefix`: a function of the whole prefix, as a model's are.
fn target_logits(prefix: &[u32]) -> Vec<f32> {
    let stream = prefix.iter().fold(1, |hash, &token| hash * 7 + token + 1);
    noise(stream, VOCAB).iter().map(|l| 3.0 * l).collect()
}

/// Which slip the round makes on purpose.
#[derive(Clone, Copy, PartialEq)]
enum Slip {
    None,
    /// Acceptance is shown the draft law of the neighbouring row.
    ShiftedLaw,
    /// The verify rows are one position off.
    ShiftedTarget,
}

/// The law of the first `horizon` tokens when one round of drafting and acceptance is completed by plain sampling,
/// against the target's own law: the largest difference.
fn round_error(
    kind: HeadKind,
    params: SamplingParams,
    (point_mass, fp8): (bool, bool),
    slip: Slip,
) -> f64 {
    const DRAFT_LEN: usize = 2;
    const HORIZON: usize = DRAFT_LEN + 1;
    let base = noise(20, DRAFT_LEN * VOCAB)
        .iter()
        .map(|l| 2.0 * l)
        .collect::<Vec<_>>();
    let branches = enumerate(|choices| {
        let mut ops = enumerated(choices);
        let (mut head, _) = head(&mut ops, kind, false);
        if fp8 && let Some(w2) = &head.markov_w2 {
            head.w2_fp8 = Some(ops.quantize(w2).unwrap());
        }
        let hidden = mat(&mut ops, WIDTH, &noise(21, DRAFT_LEN * WIDTH));
        let mut logits = mat(&mut ops, VOCAB, &base);
        let drafting = SamplingParams {
            temperature: if point_mass { 0.0 } else { params.temperature },
            ..params
        };
        let batch = [drafting];
        let batch = one_request(&batch, DRAFT_LEN);
        let (drafted, mut low_rank) = ops.draft_full(&head, &logits, &hidden, &batch).unwrap();
        let first = usize::from(slip == Slip::ShiftedTarget);
        let rows: Vec<f32> = (first..=DRAFT_LEN + first)
            .flat_map(|k| target_logits(&drafted.tokens[..k.min(DRAFT_LEN)]))
            .collect();
        if slip == Slip::ShiftedLaw {
            let values = logits.values().to_vec();
            logits.values_mut()[..VOCAB].copy_from_slice(&values[VOCAB..]);
            low_rank.latents.rotate_left(low_rank.rank);
            low_rank.log_normalizers.rotate_left(1);
        }
        let target = mat(&mut ops, VOCAB, &rows);
        let draft_law = if point_mass {
            DraftLaw::PointMass
        } else {
            DraftLaw::LowRank {
                base: &logits,
                w2: head.w2(),
                law: &low_rank,
            }
        };
        let indptr = [0, 1 + DRAFT_LEN as i32];
        let accepted = accept(
            &mut ops,
            &target,
            &indptr,
            (&drafted.tokens, DRAFT_LEN),
            draft_law,
            &[0],
            &[params],
        )
        .unwrap();
        let mut committed = drafted.tokens[..accepted.num_accepted[0] as usize].to_vec();
        committed.push(accepted.next_tokens[0]);
        committed
    });
    let total: f64 = branches.iter().map(|(p, _)| p).sum();
    assert!((total - 1.0).abs() < 1e-12);
    // Conditional laws of what a round commits, completed by plain sampling.
    let probability = |sequence: &[u32]| -> f64 {
        let plain = |from: usize| -> f64 {
            (from..HORIZON)
                .map(|k| {
                    law::target_law(&target_logits(&sequence[..k]), &params)[sequence[k] as usize]
                })
                .product()
        };
        let of_branch = |(p, committed): &(f64, Vec<u32>)| {
            if sequence.starts_with(committed) {
                p * plain(committed.len())
            } else {
                0.0
            }
        };
        branches.iter().map(of_branch).sum::<f64>() - plain(0)
    };
    let mut worst = 0.0_f64;
    for code in 0..VOCAB.pow(HORIZON as u32) {
        let digit = |k: usize| (code / VOCAB.pow(k as u32) % VOCAB) as u32;
        let sequence: Vec<u32> = (0..HORIZON).map(digit).collect();
        worst = worst.max(probability(&sequence).abs());
    }
    worst
}

#[test]
fn a_round_has_exactly_the_targets_law() {
    let filters = [
        (0, 1.0, 0.0),
        (3, 1.0, 0.0),
        (0, 0.8, 0.0),
        (0, 1.0, 0.2),
        (4, 0.9, 0.1),
    ];
    for kind in [
        HeadKind::None,
        HeadKind::Vanilla,
        HeadKind::Gated,
        HeadKind::Rnn,
    ] {
        for temperature in [0.6, 1.0, 1.7] {
            for (top_k, top_p, min_p) in filters {
                let params = SamplingParams {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    ..SamplingParams::default()
                };
                for form in [(false, false), (true, false), (false, true)] {
                    let error = round_error(kind, params, form, Slip::None);
                    assert!(error < 1e-9, "{kind:?} {params:?} {form:?}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn a_round_with_the_wrong_rows_has_another_law() {
    for slip in [Slip::ShiftedLaw, Slip::ShiftedTarget] {
        for fp8 in [false, true] {
            let error = round_error(HeadKind::Vanilla, sampling(1.0), (false, fp8), slip);
            assert!(error > 1e-3, "{error:e}");
        }
    }
}

#[test]
fn greedy_acceptance_is_exact_in_a_ragged_batch() {
    let mut ops = ops();
    let one_hot = |token: usize| (0..VOCAB).map(move |v| if v == token { 1.0 } else { -1.0 });
    // Request 0: both kept; 1: no rows; 2: the first rejected; 3: nothing to verify, a tie, the lowest index wins.
    let rows: Vec<f32> = [1, 2, 3, 4, 0]
        .into_iter()
        .flat_map(one_hot)
        .chain([0.0, 2.0, 2.0, 1.0, 0.0])
        .collect();
    let target = mat(&mut ops, VOCAB, &rows);
    let drafts = [1, 2, 9, 9, 3, 9, 9, 9];
    let accepted = accept(
        &mut ops,
        &target,
        &[0, 3, 3, 5, 6],
        (&drafts, 2),
        DraftLaw::PointMass,
        &[0; 4],
        &[sampling(0.0); 4],
    )
    .unwrap();
    assert_eq!(accepted.num_accepted, [2, 0, 0, 0]);
    assert_eq!(accepted.next_tokens, [3, NO_TOKEN, 4, 1]);
}

#[test]
fn the_token_rule_uses_the_uniforms_of_the_contract() {
    let mut ops = ops();
    let params = SamplingParams {
        seed: 0xFEED_0000_BEEF,
        ..sampling(1.0)
    };
    let (rows, draft_rows) = (noise(1, 2 * VOCAB), noise(2, VOCAB));
    let target = mat(&mut ops, VOCAB, &rows);
    let draft = mat(&mut ops, VOCAB, &draft_rows);
    let (p, q) = (
        law::softmax(&rows[..VOCAB], 1.0),
        law::softmax(&draft_rows, 1.0),
    );
    let words = |a, position, purpose: Purpose, b| {
        philox4x32([0x0000_BEEF, 0xFEED], [a, position, purpose as u32, b])
    };
    // One strip: its own uniform changes nothing, the token's is the second.
    let draw = |weights: &[f64], number, position, purpose| {
        let [_, _, high, low] = words(number, position, purpose, 2);
        let bits = u64::from(high) << 20 | u64::from(low) >> 12;
        let mut left = (bits as f64 + 0.5) / 2.0_f64.powi(52) * weights.iter().sum::<f64>();
        let passes = |&weight: &f64| {
            left -= weight;
            left < 0.0
        };
        weights.iter().position(passes).unwrap()
    };
    let bonus_law = law::softmax(&rows[VOCAB..], 1.0);
    let mut tries = 0;
    let mut kept = 0;
    for anchor in 0..200 {
        let token = anchor % VOCAB as u32;
        let accepted = accept(
            &mut ops,
            &target,
            &[0, 2],
            (&[token], 1),
            DraftLaw::Logits(&draft),
            &[anchor],
            &[params],
        )
        .unwrap();
        let x = token as usize;
        let keep = uniform(words(0, anchor + 1, Purpose::Accept, 0)[0]) * q[x] < p[x];
        let next = if keep {
            draw(&bonus_law, 0, anchor + 2, Purpose::Bonus)
        } else {
            let residual = |number| {
                let v = draw(&p, number, anchor + 1, Purpose::Residual);
                let word = words(number, anchor + 1, Purpose::Residual, 0)[0];
                (uniform(word) * p[v] < p[v] - q[v]).then_some((number, v))
            };
            let (number, v) = (0..64).find_map(residual).unwrap();
            tries = tries.max(number);
            v
        } as u32;
        assert_eq!(
            (accepted.num_accepted[0], accepted.next_tokens[0]),
            (u32::from(keep), next)
        );
        kept += u32::from(keep);
    }
    assert!(0 < kept && kept < 200 && tries > 1);
}

#[test]
fn bad_logits_name_the_request_and_arguments_are_checked() {
    let mut ops = ops();
    let mut rows = noise(1, 3 * VOCAB);
    rows[2 * VOCAB + 1] = f32::NAN;
    let target = mat(&mut ops, VOCAB, &rows);
    for temperature in [0.0, 1.0] {
        let params = [sampling(temperature); 3];
        let result = accept(
            &mut ops,
            &target,
            &[0, 1, 2, 3],
            (&[], 0),
            DraftLaw::PointMass,
            &[0; 3],
            &params,
        );
        assert!(
            matches!(result, Err(Error::BadLogits { request: 2, ref found }) if found == "NaN")
        );
    }
    let params = [sampling(0.0)];
    let law = || DraftLaw::PointMass;
    let found = accept(&mut ops, &target, &[0, 3], (&[1], 1), law(), &[0], &params);
    assert_argument(found, "rows of request 0");
    let found = accept(
        &mut ops,
        &target,
        &[0, 3],
        (&[1, VOCAB as u32], 2),
        law(),
        &[0],
        &params,
    );
    assert_argument(found, "draft token");
    let found = accept(&mut ops, &target, &[0, 2], (&[1], 1), law(), &[0], &params);
    assert_argument(found, "target logits");
    let found = accept(
        &mut ops,
        &target,
        &[0, 3],
        (&[1, 1], 2),
        law(),
        &[0],
        &[sampling(-1.0)],
    );
    assert_argument(found, "temperature");
}
