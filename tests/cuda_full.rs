//! The draft head over the whole vocabulary: the law it hands on against f64, its draws against that law, and what must not
//! change them.
#![cfg(feature = "cuda")]

mod common;

use common::full::{Case, UNWRITTEN};
use common::raw::device;
use dspark::sys;

fn cases() -> Vec<Case> {
    vec![
        Case::new(1, 7, 49_152, 256),
        Case::new(3, 7, 1031, 64),
        Case::new(9, 3, 4100, 128).f32_logits(),
        Case::new(5, 16, 260, 16),
        Case::new(17, 2, 9001, 240).fp8(),
        Case::new(33, 2, 1028, 256),
        Case::new(65, 2, 132, 64).fp8().f32_logits(),
        Case::new(130, 2, 520, 256),
        Case::new(70, 3, 17_008, 256).fp8(),
        Case::new(128, 3, 16_391, 192),
        Case::new(6, 3, 4, 32),
        Case::new(6, 3, 1031, 64).masked(),
        Case::new(20, 2, 8192, 128).fp8().masked(),
        Case::new(4, 3, 1031, 0),
        Case::new(3, 2, 151_936, 32).fp8(),
    ]
}

#[test]
fn the_law_handed_on_is_the_one_drawn_from() {
    let Some(device) = device() else { return };
    for case in cases() {
        let label = format!("{} reqs, vocab {}", case.num_reqs, case.vocab_size);
        assert_eq!(case.objections(&case.all(&device), 0), 0, "{label}");
    }
}

#[test]
fn draws_with_noise_shifted_by_a_position_are_told_apart() {
    let Some(device) = device() else { return };
    let case = Case::new(12, 3, 1031, 64);
    let hot = case.temperature.iter().filter(|&&t| t > 0.0).count() * case.draft_len;
    let objections = case.objections(&case.all(&device), 1);
    assert!(objections > hot / 2, "{objections} of {hot}");
}

#[test]
fn a_request_drafts_the_same_alone_and_in_company() {
    let Some(device) = device() else { return };
    for case in cases() {
        let all = case.all(&device);
        for r in 0..case.num_reqs {
            let alone = case.run(&device, r..r + 1);
            let rows = r * case.draft_len..(r + 1) * case.draft_len;
            assert_eq!(alone.tokens, all.tokens[rows.clone()], "request {r}");
            assert_eq!(alone.log_normalizers, all.log_normalizers[rows.clone()]);
            let latents = rows.start * case.rank..rows.end * case.rank;
            assert_eq!(alone.latents, all.latents[latents]);
        }
    }
}

#[test]
fn requests_that_draft_less_write_less_and_change_nobody() {
    let Some(device) = device() else { return };
    let whole = Case::new(40, 4, 1028, 64);
    let mut ragged = whole.clone();
    ragged.draft_lens = (0..40).map(|r| r % 5).collect();
    let (want, got) = (whole.all(&device), ragged.all(&device));
    for row in 0..40 * 4 {
        let drafted = ((row % 4) as i32) < ragged.draft_lens[row / 4];
        let token = if drafted { want.tokens[row] } else { UNWRITTEN };
        assert_eq!(got.tokens[row], token, "row {row}");
        if drafted {
            assert_eq!(got.log_normalizers[row], want.log_normalizers[row]);
        } else {
            assert_eq!(got.log_normalizers[row], 0xFFFF_FFFF);
        }
    }
}

#[test]
fn a_mask_is_base_logits_of_minus_infinity() {
    let Some(device) = device() else { return };
    for case in [
        Case::new(6, 3, 1031, 64),
        Case::new(35, 2, 260, 128).fp8(),
        Case::new(3, 2, 1028, 0),
    ] {
        let mut forbidden = case.clone();
        for (i, value) in forbidden.base.iter_mut().enumerate() {
            if i % case.vocab_size % 3 == 1 {
                *value = f32::NEG_INFINITY;
            }
        }
        let free = case.all(&device);
        let got = case.masked().all(&device);
        assert_eq!(got, forbidden.all(&device));
        assert_ne!(got.tokens, free.tokens, "the mask changed nothing");
    }
}

#[test]
fn a_row_without_a_law_drafts_token_zero() {
    let Some(device) = device() else { return };
    let mut case = Case::new(7, 2, 1028, 64);
    for (row, value) in [
        (0, f32::NEG_INFINITY),
        (3, f32::NAN),
        (7, f32::NEG_INFINITY),
    ] {
        case.base[row * 1028..(row + 1) * 1028].fill(value);
    }
    let drafts = case.all(&device);
    for row in [0, 3, 7] {
        assert_eq!(drafts.tokens[row], 0, "row {row}");
        let normalizer = f32::from_bits(drafts.log_normalizers[row]);
        assert!(!normalizer.is_finite(), "row {row}: {normalizer}");
    }
}

/// Chi-square of `counts` against `law`, in degrees of freedom.
fn chi_square(counts: &[f64], law: &[f64]) -> f64 {
    let total: f64 = counts.iter().sum();
    let terms = counts.iter().zip(law).filter(|(_, p)| **p > 0.0);
    let sum: f64 = terms
        .map(|(count, p)| (count - total * p).powi(2) / (total * p))
        .sum();
    sum / (law.len() - 1) as f64
}

#[test]
fn tokens_have_the_frequencies_of_the_law_and_of_no_other() {
    const DRAWS: usize = 16_384;
    const VOCAB: usize = 130;
    let Some(device) = device() else { return };
    for (fp8, rule) in [
        (false, sys::DSPARK_RULE_TOKEN),
        (true, sys::DSPARK_RULE_TOKEN),
        (false, sys::DSPARK_RULE_COUPLED),
    ] {
        let mut case = Case::new(DRAWS, 1, VOCAB, 16);
        if fp8 {
            case = case.fp8();
        }
        case.temperature = vec![0.8; DRAWS];
        case.rules = vec![rule; DRAWS];
        case.anchors = vec![3; DRAWS];
        let first: Vec<f32> = (0..VOCAB).map(|v| (v * 5 % 12) as f32 * 0.25).collect();
        case.base = first.repeat(DRAWS);
        let drafts = case.all(&device);
        let logits = case.logits(0, &case.latent(&drafts, 0, 3));
        let weights: Vec<f64> = logits.iter().map(|l| (l / 0.8).exp()).collect();
        let total: f64 = weights.iter().sum();
        let law: Vec<f64> = weights.iter().map(|w| w / total).collect();
        let mut counts = vec![0.0; VOCAB];
        for &token in &drafts.tokens {
            counts[token as usize] += 1.0;
        }
        // At 129 degrees of freedom a true law exceeds 1.9 each about once in 10^9.
        let ratio = chi_square(&counts, &law);
        assert!(ratio < 1.9, "{ratio}");
        let mut shifted = law.clone();
        shifted.rotate_left(1);
        let ratio = chi_square(&counts, &shifted);
        assert!(ratio > 1.9, "a shifted law passes: {ratio}");
    }
}

/// A kernel's limit of shared memory belongs to the process: a small launch must not lower it under a large one.
#[test]
fn threads_with_launches_of_different_sizes_do_not_meet() {
    if device().is_none() {
        return;
    }
    let cases = [(1, 64), (40, 64), (8, 256), (33, 256)];
    std::thread::scope(|scope| {
        for (num_reqs, rank) in cases {
            scope.spawn(move || {
                let device = device().expect("there is one");
                let case = Case::new(num_reqs, 2, 1028, rank);
                let first = case.all(&device);
                for _ in 0..50 {
                    assert_eq!(case.all(&device).tokens, first.tokens);
                }
            });
        }
    });
}
