//! The head over the whole vocabulary where rows of W2 that cannot win are not read: the drafts are those of the full form
//! to the last bit, and bounds that are too small are found out.
#![cfg(feature = "cuda")]

mod common;

use common::full::Case;
use common::raw::device;
use common::{Rng, gpu, logits, mat, weight};
use dspark::ops::{DraftBatch, DraftHead, HeadKind, Ops, Rule, SamplingParams};
use half::bf16;

fn cases() -> Vec<Case> {
    let cases = [
        Case::new(1, 7, 49_152, 256),
        Case::new(3, 7, 1031, 64),
        Case::new(9, 3, 4100, 128).f32_logits(),
        Case::new(5, 16, 260, 16),
        Case::new(17, 2, 9001, 240).fp8(),
        Case::new(33, 2, 1028, 256),
        Case::new(65, 2, 132, 64).fp8().f32_logits(),
        Case::new(130, 2, 520, 256),
        Case::new(6, 3, 4, 32),
        Case::new(6, 3, 1031, 64).masked(),
        Case::new(20, 2, 8192, 128).fp8().masked(),
        Case::new(3, 2, 151_936, 32).fp8(),
    ];
    cases.map(Case::without_samples).into()
}

/// Base logits that leave the choice to W2: ties everywhere, and rows with nothing, one token or NaN.
fn adversarial() -> Vec<Case> {
    let mut flat = Case::new(7, 3, 1031, 64).without_samples();
    flat.base.fill(1.5);
    let mut tied = flat.clone();
    tied.markov_w2.fill(0.0);
    let mut sparse = Case::new(9, 4, 1028, 64).without_samples();
    for (i, value) in sparse.base.iter_mut().enumerate() {
        match (i / 1028 % 4, i % 1028) {
            (0, _) => *value = f32::NEG_INFINITY,
            (1, token) if token != 777 => *value = f32::NEG_INFINITY,
            (2, token) if token % 3 == 0 => *value = f32::NAN,
            _ => (),
        }
    }
    // Few tokens of many are near the top, and their base logits say nothing about it.
    let mut steep = Case::new(4, 5, 9001, 128).without_samples();
    let mut rng = Rng::new(4);
    for value in &mut steep.markov_w2 {
        *value = bf16::from_f32(rng.normal()).to_f32();
    }
    vec![flat, tied, sparse, steep]
}

#[test]
fn drafts_are_those_of_the_full_form() {
    let Some(device) = device() else { return };
    for case in cases().into_iter().chain(adversarial()) {
        let label = format!("{} reqs, vocab {}", case.num_reqs, case.vocab_size);
        let (want, got) = (case.all(&device), case.skipping(1.0).all(&device));
        assert_eq!(got.tokens, want.tokens, "{label}");
        assert_eq!(got.latents, want.latents, "{label}");
        let normalizers = got.log_normalizers.iter();
        assert!(
            normalizers
                .copied()
                .all(|bits| f32::from_bits(bits).is_nan())
        );
        let most = (case.draft_len * case.vocab_size) as u64;
        assert!(got.rows_read.iter().all(|&rows| rows <= most), "{label}");
    }
}

#[test]
fn most_rows_are_skipped_where_base_logits_decide() {
    let Some(device) = device() else { return };
    let mut case = Case::new(4, 3, 9001, 64).without_samples();
    case.base.iter_mut().for_each(|logit| *logit *= 4.0);
    let rows_read = case.skipping(1.0).all(&device).rows_read;
    let all = (case.draft_len * case.vocab_size) as u64;
    for rows in rows_read {
        assert!((1..all / 10).contains(&rows), "{rows} of {all}");
    }
}

#[test]
fn bounds_that_are_too_small_are_found_out() {
    let Some(device) = device() else { return };
    let steep = adversarial().pop().unwrap();
    let (want, got) = (steep.all(&device), steep.skipping(0.02).all(&device));
    assert_ne!(got.tokens, want.tokens);
}

#[test]
fn requests_that_draft_less_and_requests_that_sample_change_nobody() {
    let Some(device) = device() else { return };
    let whole = Case::new(40, 4, 1028, 64).without_samples();
    let mut ragged = whole.clone();
    ragged.draft_lens = (0..40).map(|r| r % 5).collect();
    ragged.rules[7] = 0;
    ragged.temperature[7] = 0.9;
    let (want, got) = (whole.all(&device), ragged.skipping(1.0).all(&device));
    for row in 0..40 * 4 {
        let token = match row / 4 {
            7 => 0,
            _ => want.tokens[row],
        };
        let drafted = ((row % 4) as i32) < ragged.draft_lens[row / 4];
        let token = if drafted {
            token
        } else {
            common::full::UNWRITTEN
        };
        assert_eq!(got.tokens[row], token, "row {row}");
    }
}

#[test]
fn the_backend_skips_for_few_requests_with_a_large_head() {
    const VOCAB: usize = 66_001;
    const RANK: usize = 256;
    const STEPS: usize = 2;
    let Some(mut cuda) = gpu() else { return };
    let mut rng = Rng::new(12);
    let mut head = DraftHead {
        kind: HeadKind::Vanilla,
        rank: RANK,
        markov_w1: Some(weight(
            &mut cuda,
            [VOCAB, RANK],
            &rng.normals(VOCAB * RANK, 0.1),
        )),
        markov_w2: Some(weight(
            &mut cuda,
            [VOCAB, RANK],
            &rng.normals(VOCAB * RANK, 0.1),
        )),
        ..DraftHead::none()
    };
    for num_reqs in [3, 9] {
        let rows = num_reqs * STEPS;
        let base = logits(&mut cuda, VOCAB, &rng.normals(rows * VOCAB, 3.0));
        let hidden = mat(&mut cuda, 8, &vec![0.0; rows * 8]);
        let sampling = |r: usize| SamplingParams {
            temperature: [0.0, 0.8][r % 2],
            rule: Rule::Coupled,
            seed: r as u64,
            ..SamplingParams::default()
        };
        let sampling: Vec<SamplingParams> = (0..num_reqs).map(sampling).collect();
        let anchors: Vec<u32> = (0..num_reqs as u32).map(|r| 100 * r).collect();
        let batch = DraftBatch {
            anchors: &anchors,
            anchor_positions: &anchors,
            sampling: &sampling,
            draft_len: STEPS,
            mask: None,
        };
        head.row_bounds = None;
        let (want, _) = cuda.draft_full(&head, &base, &hidden, &batch).unwrap();
        let w2 = head.markov_w2.as_ref().unwrap();
        head.row_bounds = Some(cuda.row_bounds(w2).unwrap());
        let (got, law) = cuda.draft_full(&head, &base, &hidden, &batch).unwrap();
        assert_eq!(got, want, "{num_reqs} requests");
        let skipped = law.log_normalizers.iter().all(|value| value.is_nan());
        assert_eq!(skipped, num_reqs <= 8, "{num_reqs} requests");
    }
}
