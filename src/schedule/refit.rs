//! Recursive least squares with forgetting, for the factors of a step's cost terms.

/// How much of the past a new step leaves: a memory of some 200 steps.
const KEEP: f64 = 0.995;

/// Factors stay within this of 1, either way: a table that is off by more was profiled elsewhere.
const MOST: f64 = 4.0;

/// A step that took this many times the prediction was disturbed and says nothing.
const DISTURBED: f64 = 3.0;

/// Variance of the factors before the first step, in units of the variance of a step's own noise, and the most it may
/// grow to without news.
const PRIOR_VARIANCE: f64 = 20.0;

/// `seconds = sum of factor * term`, factors near 1.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Refit {
    factors: [f64; 3],
    covariance: [[f64; 3]; 3],
}

impl Default for Refit {
    fn default() -> Self {
        let mut covariance = [[0.0; 3]; 3];
        (0..3).for_each(|i| covariance[i][i] = PRIOR_VARIANCE);
        Self {
            factors: [1.0; 3],
            covariance,
        }
    }
}

impl Refit {
    pub(super) fn factors(&self) -> [f64; 3] {
        self.factors
    }

    /// Moves the factors towards what a step of these terms took. Errors count relative to the prediction, so that
    /// short and long steps weigh the same.
    pub(super) fn observe(&mut self, terms: [f64; 3], seconds: f64) {
        let predicted: f64 = terms.iter().zip(self.factors).map(|(t, f)| t * f).sum();
        if !(seconds.is_finite() && seconds > 0.0 && predicted > 0.0) {
            return;
        }
        if seconds > DISTURBED * predicted {
            return;
        }
        let x = terms.map(|term| term / predicted);
        let px: [f64; 3] =
            std::array::from_fn(|i| (0..3).map(|j| self.covariance[i][j] * x[j]).sum());
        let spread = KEEP + x.iter().zip(px).map(|(x, p)| x * p).sum::<f64>();
        let error = seconds / predicted - 1.0;
        for i in 0..3 {
            let moved = self.factors[i] + px[i] / spread * error;
            self.factors[i] = moved.clamp(1.0 / MOST, MOST);
            for j in 0..3 {
                self.covariance[i][j] = (self.covariance[i][j] - px[i] * px[j] / spread) / KEEP;
            }
        }
        // A term that does not vary would grow without bound.
        let largest = (0..3).map(|i| self.covariance[i][i]).fold(0.0, f64::max);
        if largest > PRIOR_VARIANCE {
            let scale = PRIOR_VARIANCE / largest;
            self.covariance
                .iter_mut()
                .flatten()
                .for_each(|c| *c *= scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factors_of_a_drifted_machine_are_found() {
        let mut refit = Refit::default();
        for i in 0..600_u32 {
            let terms = [
                1.0 + f64::from(i % 7) * 0.2,
                f64::from(i % 5) * 0.1,
                0.1 + f64::from(i % 3) * 0.2,
            ];
            let noise = 1.0 + 0.01 * f64::from(i % 11) - 0.05;
            let seconds = (terms[0] * 1.2 + terms[1] * 2.0 + terms[2] * 0.7) * noise;
            refit.observe(terms, seconds);
        }
        for (found, truth) in refit.factors().iter().zip([1.2, 2.0, 0.7]) {
            assert!((found / truth - 1.0).abs() < 0.08, "{:?}", refit.factors());
        }
    }

    #[test]
    fn disturbed_and_senseless_steps_change_nothing() {
        let mut refit = Refit::default();
        for seconds in [50.0, f64::NAN, 0.0, -1.0, f64::INFINITY] {
            refit.observe([1.0, 0.0, 0.5], seconds);
        }
        assert_eq!(refit, Refit::default());
        // A term that never occurs keeps its factor.
        (0..50).for_each(|_| refit.observe([1.0, 0.0, 0.0], 1.1));
        assert_eq!(refit.factors()[1..], [1.0, 1.0]);
        assert!((refit.factors()[0] - 1.1).abs() < 0.01);
    }
}
