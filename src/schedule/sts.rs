//! Sequential Temperature Scaling: one temperature per draft position, fitted left to right.
//!
//! For k = 1, 2, … the temperature `T_k` is the grid point that makes the expected calibration error of the survival
//! `prod over i <= k of sigmoid(z_i / T_i)` smallest against "the first k drafts were all accepted", the earlier
//! temperatures fixed (the paper's section 3.2). A round counts for position k only where k drafts were really
//! verified: what was not looked at is neither a hit nor a miss.

use serde::{Deserialize, Serialize};

use super::metrics::{Bin, auc, brier, ece, ece_floor, reliability};
use super::survival::calibrate_one;
use crate::error::{Error, Result};

/// Rounds a position needs before it is fitted; below, it keeps the temperature of the position before it.
const MIN_ROUNDS: usize = 50;

/// Grid points between [`LOWEST`] and its inverse, evenly spaced in the logarithm.
const GRID_POINTS: usize = 97;

/// The lowest temperature of the grid.
const LOWEST: f64 = 0.2;

/// What a round said about its drafts: the part of `--trace` that calibration and simulation read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RecordedRound {
    /// Confidences of all drafts, before calibration.
    pub confidence: Vec<f32>,
    /// Drafts that were verified.
    pub verify_len: usize,
    /// Drafts that were accepted.
    pub num_accepted: usize,
}

/// Errors of the survivals of one position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Expected calibration error over 20 bins.
    pub ece: f64,
    /// What right predictions would show of it on as many rounds ([`ece_floor`]).
    #[serde(default)]
    pub ece_floor: f64,
    /// Area under the ROC curve; `None` when all drafts were accepted or none was.
    pub auc: Option<f64>,
    /// Mean squared error.
    pub brier: f64,
}

/// One position before and after the fit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PositionFit {
    /// Draft position, from 1.
    pub position: usize,
    /// Rounds that verified it.
    pub num_rounds: usize,
    /// With temperature 1 everywhere.
    pub before: Metrics,
    /// With the fitted temperatures.
    pub after: Metrics,
}

/// Candidate temperatures, 1 among them, in order of their distance from 1: the first of equals changes least.
pub(super) fn grid() -> Vec<f32> {
    let half = (GRID_POINTS / 2) as f64;
    let mut steps: Vec<f64> = (0..GRID_POINTS).map(|i| i as f64 - half).collect();
    steps.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
    steps
        .into_iter()
        .map(|step| (LOWEST.ln() * step / half).exp() as f32)
        .collect()
}

/// Fits the temperatures of `draft_len` positions to recorded rounds.
///
/// # Errors
/// No position has enough rounds; a round has fewer confidences than verified drafts.
pub fn fit_temperatures(rounds: &[RecordedRound], draft_len: usize) -> Result<Vec<f32>> {
    check(rounds)?;
    let grid = grid();
    let mut temperatures: Vec<f32> = Vec::with_capacity(draft_len);
    // Survival of the positions fitted so far, by round.
    let mut survivals = vec![1.0_f64; rounds.len()];
    for k in 0..draft_len {
        let counted: Vec<usize> = (0..rounds.len())
            .filter(|&i| rounds[i].verify_len > k)
            .collect();
        let predict = |i: usize, t: f32| {
            let c = f64::from(calibrate_one(rounds[i].confidence[k], t));
            (survivals[i] * c, rounds[i].num_accepted > k)
        };
        let error = |t: f32| ece(&counted.iter().map(|&i| predict(i, t)).collect::<Vec<_>>());
        let enough = counted.len() >= MIN_ROUNDS;
        let best = match grid.iter().map(|&t| (error(t), t)).reduce(least) {
            Some((_, t)) if enough => t,
            _ => temperatures.last().copied().unwrap_or(1.0),
        };
        if k == 0 && !enough {
            let expected = format!("at least {MIN_ROUNDS} rounds with a verified draft");
            return Err(Error::argument("rounds", expected, counted.len()));
        }
        for &i in &counted {
            survivals[i] *= f64::from(calibrate_one(rounds[i].confidence[k], best));
        }
        temperatures.push(best);
    }
    Ok(temperatures)
}

/// The smaller error; of equals the first.
fn least(a: (f64, f32), b: (f64, f32)) -> (f64, f32) {
    if b.0 < a.0 { b } else { a }
}

/// Survivals and outcomes of position `k` (from 0) over the rounds that verified it.
pub fn predictions(
    rounds: &[RecordedRound],
    temperatures: Option<&[f32]>,
    k: usize,
) -> Vec<(f64, bool)> {
    let survival = |round: &RecordedRound| -> f64 {
        let confidence = round.confidence[..=k].iter().enumerate();
        confidence
            .map(|(i, &c)| f64::from(calibrate_one(c, temperatures.map_or(1.0, |t| t[i]))))
            .product()
    };
    rounds
        .iter()
        .filter(|round| round.verify_len > k && round.confidence.len() > k)
        .map(|round| (survival(round), round.num_accepted > k))
        .collect()
}

/// Errors of every position with temperature 1 and with `temperatures`.
pub fn report(rounds: &[RecordedRound], temperatures: &[f32]) -> Vec<PositionFit> {
    (0..temperatures.len())
        .map(|k| {
            let before = predictions(rounds, None, k);
            PositionFit {
                position: k + 1,
                num_rounds: before.len(),
                before: metrics(&before),
                after: metrics(&predictions(rounds, Some(temperatures), k)),
            }
        })
        .collect()
}

/// Reliability diagrams of every position, as [`report`] counts.
pub fn diagrams(rounds: &[RecordedRound], temperatures: &[f32]) -> Vec<[Vec<Bin>; 2]> {
    (0..temperatures.len())
        .map(|k| {
            [None, Some(temperatures)]
                .map(|t: Option<&[f32]>| reliability(&predictions(rounds, t, k)))
        })
        .collect()
}

fn metrics(predictions: &[(f64, bool)]) -> Metrics {
    Metrics {
        ece: ece(predictions),
        ece_floor: ece_floor(predictions),
        auc: auc(predictions),
        brier: brier(predictions),
    }
}

/// Refuses rounds that contradict themselves.
pub(super) fn check(rounds: &[RecordedRound]) -> Result<()> {
    for (i, round) in rounds.iter().enumerate() {
        if round.num_accepted > round.verify_len || round.verify_len > round.confidence.len() {
            let found = format!(
                "{} accepted, {} verified, {} confidences",
                round.num_accepted,
                round.verify_len,
                round.confidence.len()
            );
            let expected = "accepted <= verified <= confidences";
            return Err(Error::argument(format!("rounds[{i}]"), expected, found));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds whose acceptance follows `sigmoid(logit(c) / truth[k])`, drawn by a fixed generator.
    fn rounds(truth: &[f32], n: usize) -> Vec<RecordedRound> {
        let mut state = 1_u64;
        let mut next = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..n)
            .map(|_| {
                let confidence: Vec<f32> = truth.iter().map(|_| 0.05 + 0.9 * next()).collect();
                let accepted = confidence
                    .iter()
                    .zip(truth)
                    .take_while(|&(&c, &t)| next() < calibrate_one(c, t));
                RecordedRound {
                    num_accepted: accepted.count(),
                    verify_len: truth.len(),
                    confidence,
                }
            })
            .collect()
    }

    #[test]
    fn known_temperatures_are_found() {
        let truth = [2.0, 0.5, 1.0];
        let rounds = rounds(&truth, 20_000);
        let found = fit_temperatures(&rounds, 3).unwrap();
        for (found, truth) in found.iter().zip(truth) {
            assert!((found / truth).ln().abs() < 0.25, "{found} for {truth}");
        }
        for position in report(&rounds, &found) {
            assert!(position.after.ece < 0.012, "{position:?}");
            assert!(
                position.after.brier <= position.before.brier + 1e-4,
                "{position:?}"
            );
        }
        assert!(report(&rounds, &found)[0].before.ece > 0.05);
    }

    #[test]
    fn unverified_positions_do_not_count() {
        let mut rounds = rounds(&[1.5, 1.5], 4000);
        let before = fit_temperatures(&rounds, 2).unwrap();
        // Rounds that verified nothing, with absurd confidences.
        rounds.extend(vec![
            RecordedRound {
                confidence: vec![1.0, 1.0],
                verify_len: 0,
                num_accepted: 0,
            };
            4000
        ]);
        assert_eq!(fit_temperatures(&rounds, 2).unwrap(), before);
        assert_eq!(report(&rounds, &before)[1].num_rounds, 4000);
    }

    #[test]
    fn sparse_positions_keep_the_neighbours_temperature_and_none_is_refused() {
        let mut rounds = rounds(&[2.0, 2.0], 3000);
        for round in &mut rounds[20..] {
            round.verify_len = 1;
            round.num_accepted = round.num_accepted.min(1);
        }
        let found = fit_temperatures(&rounds, 2).unwrap();
        assert_eq!(found[0], found[1]);
        assert!(fit_temperatures(&rounds[..10], 2).is_err());
        rounds[3].num_accepted = 5;
        let error = fit_temperatures(&rounds, 2).unwrap_err().to_string();
        assert!(error.contains("rounds[3]"), "{error}");
    }
}
