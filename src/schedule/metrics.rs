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

/// The reliability diagram of predictions `(probability, came true)` over [`NUM_BINS`] bins.
pub fn reliability(predictions: &[(f64, bool)]) -> Vec<Bin> {
    let mut bins = vec![Bin::default(); NUM_BINS];
    for &(p, hit) in predictions {
        let bin = &mut bins[((p * NUM_BINS as f64) as usize).min(NUM_BINS - 1)];
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

    #[test]
    fn certain_predictions_fall_into_the_outer_bins() {
        let bins = reliability(&[(0.0, false), (1.0, true), (1.0, false)]);
        assert_eq!((bins[0].count, bins[19].count), (1.0, 2.0));
        assert_eq!(bins[19].observed, 0.5);
    }
}
