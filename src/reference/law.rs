//! Laws over the vocabulary, in f64 from f32 logits.

use crate::ops::SamplingParams;

/// What makes a row of logits no law; `None` when it is one.
pub fn defect(logits: &[f32]) -> Option<&'static str> {
    let (mut finite, mut bad) = (false, None);
    for &logit in logits {
        if logit.is_nan() {
            return Some("NaN");
        }
        finite |= logit.is_finite();
        if logit == f32::INFINITY {
            bad = Some("+inf");
        }
    }
    bad.or((!finite).then_some("only -inf"))
}

/// The largest logit; the lowest index wins. A row without a number above -inf yields 0.
pub fn argmax(logits: &[f32]) -> usize {
    let (mut winner, mut best) = (0, f32::NEG_INFINITY);
    for (v, &logit) in logits.iter().enumerate() {
        if logit > best {
            (winner, best) = (v, logit);
        }
    }
    winner
}

/// `softmax(logits / temperature)` of a row that is a law; `temperature > 0`.
pub fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let scale = f64::from(temperature).recip();
    let mut probs: Vec<f64> = logits
        .iter()
        .map(|&logit| ((f64::from(logit) - max) * scale).exp())
        .collect();
    normalise(&mut probs);
    probs
}

/// `ln sum exp(logits / temperature)` of a row that is a law; `temperature > 0`.
pub fn log_normalizer(logits: &[f32], temperature: f32) -> f64 {
    let scale = f64::from(temperature).recip();
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let terms = logits
        .iter()
        .map(|&logit| ((f64::from(logit) - max) * scale).exp());
    max * scale + terms.sum::<f64>().ln()
}

/// The target law of a row that is a law: softmax at the request's temperature (> 0), then top-k, top-p and min-p, each
/// on the renormalised rest. Ties at a threshold are all kept.
pub fn target_law(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let mut probs = softmax(logits, params.temperature);
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < logits.len() {
        let mut sorted = logits.to_vec();
        let (_, &mut kth, _) = sorted.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
        keep(&mut probs, |v, _| logits[v] >= kth);
        normalise(&mut probs);
    }
    if params.top_p < 1.0 {
        let least = top_p_threshold(&probs, f64::from(params.top_p));
        keep(&mut probs, |_, prob| prob >= least);
    }
    if params.min_p > 0.0 {
        let max = probs.iter().copied().fold(0.0, f64::max);
        let least = f64::from(params.min_p) * max;
        keep(&mut probs, |_, prob| prob >= least);
    }
    normalise(&mut probs);
    probs
}

/// The largest `t` with mass `{v : probs[v] >= t}` at least `top_p`.
fn top_p_threshold(probs: &[f64], top_p: f64) -> f64 {
    // Tokens below `floor` hold less than the mass that may go, all together: none of them sets the threshold, and the
    // few others are cheap to sort. Half of it leaves room for rounding.
    let floor = 0.5 * (1.0 - top_p) / probs.len() as f64;
    let mut sorted: Vec<f64> = probs
        .iter()
        .copied()
        .filter(|&prob| prob >= floor)
        .collect();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut mass = 0.0;
    for &prob in &sorted {
        mass += prob;
        if mass >= top_p {
            return prob;
        }
    }
    0.0
}

/// `max(share * target - draft, 0)`.
pub fn remainder(share: f64, target: &[f64], draft: &[f64]) -> Vec<f64> {
    let pairs = target.iter().zip(draft);
    pairs
        .map(|(&target, &draft)| (share * target - draft).max(0.0))
        .collect()
}

/// `normalise(max(share * target - draft, 0))`: the law of the recovered token; `share` is 1 but for the block rule, where
/// it is the joint ratio of the prefix before. `None` when no mass is left, which exact
/// arithmetic rules out after a rejection (the rejected token has `target < draft`, so another has `target > draft`).
pub fn residual(share: f64, target: &[f64], draft: &[f64]) -> Option<Vec<f64>> {
    let mut rest = remainder(share, target, draft);
    // Scaled by the maximum first: the mass may be so small that its reciprocal is not a number.
    let max = rest.iter().copied().fold(0.0, f64::max);
    if max <= 0.0 {
        return None;
    }
    for rest in &mut rest {
        *rest /= max;
    }
    normalise(&mut rest);
    Some(rest)
}

/// A law that has all its mass on `token`.
pub fn point_mass(token: usize, vocab_size: usize) -> Vec<f64> {
    let mut probs = vec![0.0; vocab_size];
    probs[token] = 1.0;
    probs
}

fn keep(probs: &mut [f64], kept: impl Fn(usize, f64) -> bool) {
    for (v, prob) in probs.iter_mut().enumerate() {
        if !kept(v, *prob) {
            *prob = 0.0;
        }
    }
}

fn normalise(probs: &mut [f64]) {
    let scale = probs.iter().sum::<f64>().recip();
    for prob in probs {
        *prob *= scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::philox::{philox4x32, uniform};

    const INF: f32 = f32::INFINITY;

    fn params(temperature: f32, top_k: u32, top_p: f32, min_p: f32) -> SamplingParams {
        SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            ..SamplingParams::default()
        }
    }

    /// The law by trying every threshold, straight from the words of the contract.
    fn brute_law(logits: &[f32], p: &SamplingParams) -> Vec<f64> {
        let exps: Vec<f64> = logits
            .iter()
            .map(|&l| (f64::from(l) / f64::from(p.temperature)).exp())
            .collect();
        let mut kept = vec![true; logits.len()];
        if p.top_k > 0 {
            for v in 0..logits.len() {
                let larger = logits.iter().filter(|&&l| l > logits[v]).count();
                kept[v] = larger < p.top_k as usize;
            }
        }
        let mass =
            |kept: &[bool]| -> f64 { (0..kept.len()).filter(|&v| kept[v]).map(|v| exps[v]).sum() };
        if p.top_p < 1.0 {
            let total = mass(&kept);
            let mut smallest = kept.clone();
            for t in 0..logits.len() {
                let set: Vec<bool> = (0..kept.len())
                    .map(|v| kept[v] && exps[v] >= exps[t])
                    .collect();
                if mass(&set) / total >= f64::from(p.top_p) && mass(&set) < mass(&smallest) {
                    smallest = set;
                }
            }
            kept = smallest;
        }
        let max = exps.iter().copied().fold(0.0, f64::max);
        for v in 0..kept.len() {
            kept[v] &= exps[v] >= f64::from(p.min_p) * max;
        }
        let total = mass(&kept);
        (0..kept.len())
            .map(|v| if kept[v] { exps[v] / total } else { 0.0 })
            .collect()
    }

    #[test]
    fn filters_agree_with_brute_force() {
        for case in 0..400_u32 {
            let word = |i: u32| philox4x32([case, 1], [i, 0, 0, 0])[0];
            let n = 1 + word(0) % 23;
            // Few distinct values, so that ties at thresholds are common; exact halves keep sums exact enough.
            let logits: Vec<f32> = (0..n)
                .map(|v| {
                    if word(v + 9) % 11 == 0 {
                        -INF
                    } else {
                        (word(v + 99) % 9) as f32 * 0.5
                    }
                })
                .collect();
            if defect(&logits).is_some() {
                continue;
            }
            let p = params(
                [0.3, 0.7, 1.0, 2.5][word(1) as usize % 4],
                [0, 1, 2, 5, 40][word(2) as usize % 5],
                [1.0, 0.999, 0.83, 0.41, 1e-6][word(3) as usize % 5],
                [0.0, 0.1, 0.77][word(4) as usize % 3],
            );
            for (v, (got, want)) in target_law(&logits, &p)
                .iter()
                .zip(brute_law(&logits, &p))
                .enumerate()
            {
                assert!(
                    (got - want).abs() < 1e-12,
                    "case {case} token {v}: {got} for {want}"
                );
            }
        }
    }

    #[test]
    fn top_p_keeps_what_sorting_the_whole_vocabulary_keeps() {
        let logits: Vec<f32> = (0..5000_u32)
            .map(|v| (8.0 * uniform(philox4x32([5, 5], [v, 0, 0, 0])[0])) as f32)
            .collect();
        let probs = softmax(&logits, 1.0);
        for top_p in [0.01, 0.5, 0.9, 0.9999] {
            let mut sorted = probs.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let mut mass = 0.0;
            let count = sorted
                .iter()
                .take_while(|&&p| {
                    let before = mass;
                    mass += p;
                    before < top_p
                })
                .count();
            assert_eq!(top_p_threshold(&probs, top_p), sorted[count - 1]);
        }
    }

    #[test]
    fn ties_with_the_kth_are_kept() {
        let law = target_law(&[1.0, 0.0, 1.0, 1.0, -3.0], &params(1.0, 2, 1.0, 0.0));
        assert_eq!(law[1], 0.0);
        assert!(law[0] == law[2] && law[2] == law[3] && (law[0] - 1.0 / 3.0).abs() < 1e-15);
    }

    #[test]
    fn extreme_temperatures_and_tails() {
        assert_eq!(softmax(&[3.0, -INF, 2.0], 1e-30), [1.0, 0.0, 0.0]);
        let flat = softmax(&[3.0, -4.0], 1e30);
        assert!((flat[0] - 0.5).abs() < 1e-15);
        // f32 would lose this tail.
        let tail = softmax(&[0.0, -200.0], 1.0)[1];
        assert!((tail / (-200.0_f64).exp() - 1.0).abs() < 1e-12);
        let large = softmax(&[f32::MAX, f32::MAX, -f32::MAX], 0.5);
        assert_eq!(large, [0.5, 0.5, 0.0]);
    }

    #[test]
    fn rows_that_are_no_law() {
        assert_eq!(defect(&[0.0, f32::NAN]), Some("NaN"));
        assert_eq!(defect(&[INF, 0.0, f32::NAN]), Some("NaN"));
        assert_eq!(defect(&[0.0, INF]), Some("+inf"));
        assert_eq!(defect(&[-INF, -INF]), Some("only -inf"));
        assert_eq!(defect(&[-INF, -1e30]), None);
        assert_eq!(argmax(&[-INF, 2.0, 2.0, 1.0]), 1);
        assert_eq!(argmax(&[f32::NAN, -INF]), 0);
    }

    #[test]
    fn residuals() {
        let one_hot = point_mass(1, 3);
        assert_eq!(
            residual(1.0, &[0.5, 0.25, 0.25], &one_hot),
            Some(vec![2.0 / 3.0, 0.0, 1.0 / 3.0])
        );
        assert_eq!(
            residual(1.0, &[0.5, 0.0, 0.5], &one_hot),
            Some(vec![0.5, 0.0, 0.5])
        );
        assert_eq!(
            residual(1.0, &one_hot, &[0.5, 0.5, 0.0]),
            Some(vec![0.0, 1.0, 0.0])
        );
        assert_eq!(residual(1.0, &one_hot, &one_hot), None);
        // A mass far below any clamp, down to subnormal numbers, is still a law.
        let tiny = residual(1.0, &[0.0, 3e-310, 1e-310], &[1.0, 0.0, 0.0]).unwrap();
        assert!((tiny[1] - 0.75).abs() < 1e-6 && (tiny[2] - 0.25).abs() < 1e-6);
        let tiny = residual(1.0, &[0.5 + 1e-12, 0.5 - 1e-12], &[0.5, 0.5]).unwrap();
        assert_eq!(tiny, [1.0, 0.0]);
    }
}
