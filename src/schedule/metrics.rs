//! How good predicted probabilities are: calibration error, ranking, squared error.

/// Equal bins of [0, 1] that calibration errors are counted over.
pub const NUM_BINS: usize = 20;

/// Predictions of one bin against what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Bin {
    /// Predictions in it.
    pub count: f64,
    /// Their mean; 0 without any.
    pub predicted: f64,
    /// The share that came true; 0 without any.
    pub observed: f64,
}

fn bin_of(p: f64) -> usize {
    ((p * NUM_BINS as f64) as usize).min(NUM_BINS - 1)
}

/// The reliability diagram of predictions `(probability, came true)` over [`NUM_BINS`] bins.
pub fn reliability(predictions: &[(f64, bool)]) -> Vec<Bin> {
    let mut bins = vec![Bin::default(); NUM_BINS];
    for &(p, hit) in predictions {
        let bin = &mut bins[bin_of(p)];
        bin.count += 1.0;
        bin.predicted += p;
        bin.observed += f64::from(u8::from(hit));
    }
    for bin in bins.iter_mut().filter(|bin| bin.count > 0.0) {
        bin.predicted /= bin.count;
        bin.observed /= bin.count;
    }
    bins
}

/// Expected calibration error: mean distance of predicted and observed over the bins, weighted by count; 0 without
/// predictions.
pub fn ece(predictions: &[(f64, bool)]) -> f64 {
    let distance: f64 = reliability(predictions)
        .iter()
        .map(|bin| bin.count * (bin.predicted - bin.observed).abs())
        .sum();
    distance / predictions.len().max(1) as f64
}

/// The calibration error that right predictions would show on as many outcomes, by chance alone: what they come to in
/// a bin scatters by `sqrt(sum of p (1 - p))`, and the mean distance of a normal number from 0 is `sqrt(2 / pi)` of
/// that. An [`ece`] near it says that nothing is wrong that these outcomes could show.
pub fn ece_floor(predictions: &[(f64, bool)]) -> f64 {
    let mut variances = [0.0; NUM_BINS];
    for &(p, _) in predictions {
        variances[bin_of(p)] += p * (1.0 - p);
    }
    let scatter: f64 = variances.iter().map(|variance| variance.sqrt()).sum();
    scatter * std::f64::consts::FRAC_2_PI.sqrt() / predictions.len().max(1) as f64
}

/// Mean squared error; 0 without predictions.
pub fn brier(predictions: &[(f64, bool)]) -> f64 {
    let sum: f64 = predictions
        .iter()
        .map(|&(p, hit)| (p - f64::from(u8::from(hit))).powi(2))
        .sum();
    sum / predictions.len().max(1) as f64
}

/// Probability that a prediction that came true is above one that did not, ties counted half; `None` unless both
/// kinds are there.
pub fn auc(predictions: &[(f64, bool)]) -> Option<f64> {
    let mut sorted = predictions.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut wins, mut hits) = (0.0, 0.0, 0.0);
    for tied in sorted.chunk_by(|a, b| a.0 == b.0) {
        let tied_hits = tied.iter().filter(|(_, hit)| *hit).count() as f64;
        let misses = tied.len() as f64 - tied_hits;
        wins += tied_hits * (below + 0.5 * misses);
        below += misses;
        hits += tied_hits;
    }
    (below > 0.0 && hits > 0.0).then(|| wins / (below * hits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_known_predictions() {
        let predictions = [(0.9, true), (0.9, true), (0.9, false), (0.2, false)];
        // 0.9 against 2/3 with weight 3/4, 0.2 against 0 with weight 1/4.
        assert!((ece(&predictions) - (0.75 * (0.9 - 2.0 / 3.0) + 0.25 * 0.2)).abs() < 1e-12);
        assert!((brier(&predictions) - (0.01 + 0.01 + 0.81 + 0.04) / 4.0).abs() < 1e-12);
        // Pairs: 2 hits at 0.9 against misses at 0.9 (tie) and 0.2 (win).
        assert_eq!(auc(&predictions), Some(0.75));
        assert_eq!(auc(&predictions[..2]), None);
        assert_eq!((ece(&[]), brier(&[]), auc(&[])), (0.0, 0.0, None));
    }

    /// Outcomes drawn from the predictions themselves show the floor, whatever their number.
    #[test]
    fn right_predictions_show_the_floor() {
        let mut state = 7_u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        for len in [300, 3000, 30_000] {
            let (mut shown, mut floor) = (0.0, 0.0);
            for _ in 0..40 {
                let predictions: Vec<(f64, bool)> = (0..len)
                    .map(|_| {
                        let p = uniform();
                        (p, uniform() < p)
                    })
                    .collect();
                shown += ece(&predictions);
                floor += ece_floor(&predictions);
            }
            assert!((shown / floor - 1.0).abs() < 0.06, "{shown} for {floor}");
        }
        assert_eq!(ece_floor(&[]), 0.0);
        assert_eq!(ece_floor(&[(1.0, true), (0.0, false)]), 0.0);
    }

    #[test]
    fn certain_predictions_fall_into_the_outer_bins() {
        let bins = reliability(&[(0.0, false), (1.0, true), (1.0, false)]);
        assert_eq!((bins[0].count, bins[19].count), (1.0, 2.0));
        assert_eq!(bins[19].observed, 0.5);
    }
}
