//! Online STS: temperatures that follow live outcomes.
//!
//! Every verified draft whose predecessors were accepted is one observation of its conditional confidence; drafts that
//! were not verified, or that follow a rejection, are none. A position's temperature is the grid point of the highest
//! likelihood over its decayed counts, with the counts of all positions as a prior of fixed weight (positions that are
//! seldom reached lean on the others) and a pull towards the offline temperature (nothing seen, nothing changed).

use super::outcomes::{Cells, Outcomes};
use super::sts::grid;

/// Outcomes of a position after which its older half counts half.
const HALF_LIFE: f64 = 800.0;

/// Weight of all positions together in the fit of one, in outcomes.
const POOLED_WEIGHT: f64 = 60.0;

/// Strength of the pull towards the offline temperature, in squared logarithms.
const PULL: f64 = 4.0;

/// Temperatures in use and the outcomes behind them.
#[derive(Clone, Debug)]
pub(super) struct OnlineSts {
    offline: Vec<f32>,
    temperatures: Vec<f32>,
    outcomes: Outcomes,
    grid: Vec<f32>,
    next: usize,
}

impl OnlineSts {
    /// Starts from offline temperatures, or from 1.
    pub(super) fn new(draft_len: usize, offline: Option<&[f32]>) -> Self {
        let offline: Vec<f32> = (0..draft_len)
            .map(|k| offline.and_then(|t| t.get(k)).copied().unwrap_or(1.0))
            .collect();
        Self {
            temperatures: offline.clone(),
            offline,
            outcomes: Outcomes::new(draft_len, HALF_LIFE),
            grid: grid(),
            next: 0,
        }
    }

    pub(super) fn temperatures(&self) -> &[f32] {
        &self.temperatures
    }

    /// Counts a round by its confidences before calibration.
    pub(super) fn add(&mut self, confidence: &[f32], verify_len: usize, num_accepted: usize) {
        self.outcomes.add(confidence, verify_len, num_accepted);
    }

    /// Fits one position, the next in turn: some ten thousand multiplications, after the round.
    pub(super) fn refit_next(&mut self) {
        let k = self.next;
        self.next = (k + 1) % self.outcomes.draft_len().max(1);
        if k >= self.temperatures.len() {
            return;
        }
        let own = self.outcomes.at(k);
        let pooled = self.outcomes.pooled();
        let pooled_count: f64 = pooled.iter().map(|cell| cell.count).sum();
        let weight = POOLED_WEIGHT / pooled_count.max(POOLED_WEIGHT);
        let loss = |t: f32| {
            let away = f64::from(t / self.offline[k]).ln();
            let t = f64::from(t);
            unlikelihood(own, t) + weight * unlikelihood(&pooled, t) + PULL * away * away
        };
        let best = self.grid.iter().map(|&t| (loss(t), t));
        if let Some((_, t)) = best.min_by(|a, b| a.0.total_cmp(&b.0)) {
            self.temperatures[k] = t;
        }
    }
}

/// Minus the log-likelihood of the outcomes under a temperature.
fn unlikelihood(cells: &Cells, temperature: f64) -> f64 {
    cells
        .iter()
        .filter(|cell| cell.count > 0.0)
        .map(|cell| {
            let z = cell.mean_log_odds() / temperature;
            // ln(1 + e^-z) for a hit, ln(1 + e^z) for a miss.
            let hit = (-z).exp().ln_1p();
            cell.hits * hit + (cell.count - cell.hits) * (hit + z)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::calibrate_one;

    fn random(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32
        }
    }

    /// Feeds rounds whose acceptance follows `truth`.
    fn feed(sts: &mut OnlineSts, truth: &[f32], rounds: usize, next: &mut impl FnMut() -> f32) {
        for _ in 0..rounds {
            let confidence: Vec<f32> = truth.iter().map(|_| 0.1 + 0.85 * next()).collect();
            let accepted = confidence
                .iter()
                .zip(truth)
                .take_while(|&(&c, &t)| next() < calibrate_one(c, t))
                .count();
            sts.add(&confidence, truth.len(), accepted);
            sts.refit_next();
        }
    }

    #[test]
    fn temperatures_follow_a_change_of_text() {
        let mut next = random(3);
        let mut sts = OnlineSts::new(3, None);
        for truth in [[2.0_f32, 2.0, 2.0], [0.6, 0.6, 0.6]] {
            feed(&mut sts, &truth, 8000, &mut next);
            for (k, found) in sts.temperatures().iter().enumerate() {
                assert!(
                    (found / truth[k]).ln().abs() < 0.3,
                    "{:?}",
                    sts.temperatures()
                );
            }
        }
    }

    #[test]
    fn nothing_seen_keeps_the_offline_temperature_and_sparse_positions_lean_on_the_others() {
        let mut sts = OnlineSts::new(3, Some(&[1.5, 0.7, 1.0]));
        (0..9).for_each(|_| sts.refit_next());
        for (found, offline) in sts.temperatures().iter().zip([1.5, 0.7, 1.0]) {
            assert!(
                (found / offline).ln().abs() < 0.04,
                "{:?}",
                sts.temperatures()
            );
        }
        // Only position 1 is ever verified, and it is overconfident.
        let mut sts = OnlineSts::new(3, None);
        let mut next = random(5);
        feed(&mut sts, &[3.0], 4000, &mut next);
        assert!(sts.temperatures()[0] > 2.0 && sts.temperatures()[2] > 1.2);
    }

    #[test]
    fn drafts_behind_a_rejection_or_not_verified_are_not_counted() {
        let mut sts = OnlineSts::new(2, None);
        for _ in 0..500 {
            sts.add(&[0.9, 0.9], 2, 0);
            sts.add(&[0.9, f32::NAN], 1, 1);
        }
        let count = |k| {
            sts.outcomes
                .at(k)
                .iter()
                .map(|cell| cell.count)
                .sum::<f64>()
        };
        assert!(count(0) > 400.0);
        assert_eq!(count(1), 0.0);
    }
}
