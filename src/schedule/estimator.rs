//! Confidences for drafters without a confidence head, from the probability of the drafter's likeliest token.
//!
//! It must be the top probability and never the drawn token's: the latter is computed from the draft itself, so that
//! what is admitted would depend on it. The estimate is the share of accepted drafts among live outcomes of about the
//! same top probability at the same position, smoothed by the same share over all positions, smoothed by the
//! probability itself.

use super::outcomes::{Outcomes, log_odds};

/// Outcomes of a position after which its older half counts half.
const HALF_LIFE: f64 = 3000.0;

/// Weight of what is known less specifically, in outcomes.
const PRIOR_WEIGHT: f64 = 8.0;

/// The outcomes seen so far.
#[derive(Clone, Debug)]
pub(super) struct Estimator {
    outcomes: Outcomes,
}

impl Estimator {
    pub(super) fn new(draft_len: usize) -> Self {
        Self {
            outcomes: Outcomes::new(draft_len, HALF_LIFE),
        }
    }

    /// Counts a round by its top probabilities.
    pub(super) fn add(&mut self, top_probability: &[f32], verify_len: usize, num_accepted: usize) {
        self.outcomes.add(top_probability, verify_len, num_accepted);
    }

    /// Confidences `[num_reqs, draft_len]` of top probabilities of the same shape. What is no probability counts as 0.
    pub(super) fn confidence(&self, top_probability: &[f32], draft_len: usize) -> Vec<f32> {
        let estimate = |(i, &p): (usize, &f32)| {
            if !(0.0..=1.0).contains(&p) {
                return 0.0;
            }
            let z = log_odds(p);
            let own = self.outcomes.cell(i % draft_len, z);
            let all = self.outcomes.pooled_cell(z);
            let general = (all.hits + PRIOR_WEIGHT * f64::from(p)) / (all.count + PRIOR_WEIGHT);
            ((own.hits + PRIOR_WEIGHT * general) / (own.count + PRIOR_WEIGHT)) as f32
        };
        top_probability.iter().enumerate().map(estimate).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_accepted_drafts_are_learnt_by_position() {
        let mut estimator = Estimator::new(2);
        assert_eq!(estimator.confidence(&[0.5, 0.5], 2), [0.5, 0.5]);
        for i in 0..4000 {
            // Position 1 is accepted three times of four, position 2 once of four of these.
            let accepted = usize::from(i % 4 != 0) + usize::from(i % 16 == 1);
            estimator.add(&[0.5, 0.5], 2, accepted);
        }
        let found = estimator.confidence(&[0.5, 0.5, f32::NAN, 2.0], 2);
        assert!((found[0] - 0.75).abs() < 0.02, "{found:?}");
        assert!((found[1] - 1.0 / 12.0).abs() < 0.03, "{found:?}");
        assert_eq!(found[2..], [0.0, 0.0]);
    }
}
