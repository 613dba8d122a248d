//! The device's schedule against the host's: the same decisions, bit for bit.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, gpu};
use dspark::ops::{Ops, ScheduleInputs, ScheduleRule};
use dspark::schedule::{Ticks, calibrate, decide};

/// Confidences of every kind: random, ties, certain ones, and what is no confidence.
fn confidences(rng: &mut Rng, len: usize, kind: usize) -> Vec<f32> {
    let odd = [
        f32::NAN,
        0.0,
        1.0,
        -1.0,
        2.0,
        f32::INFINITY,
        1e-40,
        0.999_999_9,
    ];
    (0..len)
        .map(|i| match kind {
            0 => rng.uniform().sqrt(),
            1 => 0.5,
            2 => 1.0,
            3 => odd[(rng.uniform() * 8.0) as usize % 8],
            _ if i % 3 == 0 => odd[i % 8],
            _ => rng.uniform(),
        })
        .collect()
}

#[test]
fn decisions_are_the_hosts() {
    let Some(mut cuda) = gpu() else { return };
    let mut rng = Rng::new(41);
    let mut lengths = std::collections::BTreeSet::new();
    let mut num_offered = 0;
    for (num_reqs, draft_len) in [
        (1, 1),
        (1, 7),
        (2, 16),
        (13, 5),
        (37, 7),
        (256, 7),
        (293, 7),
        (300, 13),
        (640, 12),
        (1024, 16),
        (1021, 16),
        (8192, 2),
        // Eighths without a request, and one that is too large for its share of a cluster.
        (9, 200),
        (9, 1820),
    ] {
        for kind in 0..5 {
            let confidence = confidences(&mut rng, num_reqs * draft_len, kind);
            let temperature: Vec<f32> = (0..draft_len).map(|_| 0.4 + 2.0 * rng.uniform()).collect();
            let limits: Vec<usize> = (0..num_reqs)
                .map(|r| if r % 5 == 4 { r % draft_len } else { draft_len })
                .collect();
            let slope = f64::from(rng.uniform()) * 2.0 / num_reqs as f64;
            let bucket = [1, 8, 100][kind % 3];
            let ticks = Ticks::new(num_reqs * draft_len, |n| {
                1.0 + slope * ((num_reqs + n).div_ceil(bucket) * bucket) as f64
            });
            let capacity = (rng.uniform() * (num_reqs * draft_len) as f32) as usize;
            for rule in [
                ScheduleRule::FirstFall,
                ScheduleRule::Best,
                ScheduleRule::Capacity(capacity, num_reqs),
                ScheduleRule::Capacity(capacity, 2 * num_reqs + 1),
                ScheduleRule::Capacity(0, 1),
            ] {
                for temperature in [None, Some(temperature.as_slice())] {
                    let inputs = ScheduleInputs {
                        rule,
                        confidence: &confidence,
                        temperature,
                        limits: &limits,
                        ticks: ticks.as_slice(),
                    };
                    let (got, want) = (cuda.schedule(&inputs).unwrap(), decide(&inputs).unwrap());
                    assert_eq!(got, want, "{num_reqs} x {draft_len}, kind {kind}, {rule:?}");
                    // Small decisions are left to the host.
                    if let Some(offered) = Ops::schedule(&mut cuda, &inputs).unwrap() {
                        assert_eq!(
                            offered, want,
                            "{num_reqs} x {draft_len}, kind {kind}, {rule:?}"
                        );
                        num_offered += 1;
                    }
                    lengths.insert(want.verify_lens.iter().sum::<usize>());
                }
            }
        }
    }
    assert!(lengths.len() > 50, "the cases are too much alike");
    assert!(num_offered > 100, "{num_offered}");
}

/// The smallest decision that a cluster makes, once by each rule: few enough launches for a tool that follows every access.
#[test]
fn a_clusters_smallest_decision_is_the_hosts() {
    let Some(mut cuda) = gpu() else { return };
    let (num_reqs, draft_len) = (147, 7);
    let confidence = confidences(&mut Rng::new(47), num_reqs * draft_len, 4);
    let limits: Vec<usize> = (0..num_reqs).map(|r| draft_len - r % 3).collect();
    let ticks = Ticks::new(num_reqs * draft_len, |n| 1.0 + 0.01 * (num_reqs + n) as f64);
    for rule in [
        ScheduleRule::FirstFall,
        ScheduleRule::Best,
        ScheduleRule::Capacity(200, num_reqs),
    ] {
        let inputs = ScheduleInputs {
            rule,
            confidence: &confidence,
            temperature: None,
            limits: &limits,
            ticks: ticks.as_slice(),
        };
        let (got, want) = (cuda.schedule(&inputs).unwrap(), decide(&inputs).unwrap());
        assert!(want.verify_lens.iter().any(|&len| len > 0), "{rule:?}");
        assert_eq!(got, want, "{rule:?}");
    }
}

/// Nothing drafted, as many requests as there may be.
#[test]
fn nothing_is_decided_about_nothing() {
    let Some(mut cuda) = gpu() else { return };
    for num_reqs in [1, 257, 8192] {
        let inputs = ScheduleInputs {
            rule: ScheduleRule::FirstFall,
            confidence: &[],
            temperature: None,
            limits: &vec![0; num_reqs],
            ticks: &[7],
        };
        let scheduled = cuda.schedule(&inputs).unwrap();
        assert_eq!(scheduled.verify_lens, vec![0; num_reqs]);
        assert_eq!(scheduled.best, 0);
    }
}

#[test]
fn calibration_is_the_hosts_bit_for_bit() {
    let Some(mut cuda) = gpu() else { return };
    let mut rng = Rng::new(43);
    for kind in [0, 4] {
        let confidence = confidences(&mut rng, 4096, kind);
        for temperature in [0.05, 0.7, 1.0, 3.3] {
            // One position: survival is the calibrated confidence.
            let got = cuda.survival(&confidence, Some(&[temperature]), 1).unwrap();
            let want = calibrate(&confidence, 1, Some(&[temperature])).unwrap();
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            let differ = bits(&got)
                .iter()
                .zip(bits(&want))
                .filter(|(a, b)| **a != *b)
                .count();
            assert_eq!(differ, 0, "temperature {temperature}");
        }
    }
}
