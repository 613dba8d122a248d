//! Exact laws: functions of the token history, and what decoding by them must give.

use std::collections::HashMap;
use std::rc::Rc;

use dspark::ops::SamplingParams;

/// Logits of the token after a history.
pub type LogitsOf = Rc<dyn Fn(&[u32]) -> Vec<f32>>;

/// A number in [-1, 1) that depends on every part.
pub fn noise(salt: u64, history: &[u32], v: u64) -> f32 {
    let mut state = salt ^ 0x9e37_79b9_7f4a_7c15;
    for part in history.iter().map(|&t| u64::from(t)).chain([1000 + v]) {
        state = (state ^ part).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state ^= state >> 29;
    }
    state = state.wrapping_mul(0x94d0_49bb_1331_11eb);
    (state >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// Logits in `[-spread, spread)` that depend on the whole history.
pub fn random_logits(vocab_size: usize, salt: u64, spread: f32) -> LogitsOf {
    Rc::new(move |history| {
        (0..vocab_size)
            .map(|v| spread * noise(salt, history, v as u64))
            .collect()
    })
}

/// The target law after a history, written once more from the contract: temperature, top-k, top-p, min-p.
pub fn exact_law(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let n = logits.len();
    if params.temperature == 0.0 {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let first = logits.iter().position(|&l| l == best);
        return (0..n)
            .map(|v| f64::from(u8::from(Some(v) == first)))
            .collect();
    }
    let t = f64::from(params.temperature);
    let mut p: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / t).exp()).collect();
    let mut filter = |keep: &dyn Fn(f64, &[f64]) -> bool| {
        let before = p.clone();
        let kept = before
            .iter()
            .map(|&x| if keep(x, &before) { x } else { 0.0 });
        let kept: Vec<f64> = kept.collect();
        let total: f64 = kept.iter().sum();
        p = kept.iter().map(|x| x / total).collect();
    };
    filter(&|_, _| true);
    if params.top_k > 0 {
        filter(&|x, p| p.iter().filter(|&&y| y > x).count() < params.top_k as usize);
    }
    // x stays while those strictly above it do not reach the mass.
    filter(&|x, p| {
        params.top_p >= 1.0 || p.iter().filter(|&&y| y > x).sum::<f64>() < f64::from(params.top_p)
    });
    filter(&|x, p| {
        let max = p.iter().copied().fold(0.0, f64::max);
        x >= f64::from(params.min_p) * max
    });
    p
}

/// The law of the first `n` tokens after `prompt`.
pub fn sequence_law(
    law: &LogitsOf,
    prompt: &[u32],
    params: &SamplingParams,
    n: usize,
) -> HashMap<Vec<u32>, f64> {
    let mut laws = HashMap::from([(Vec::new(), 1.0)]);
    for _ in 0..n {
        let mut longer = HashMap::new();
        for (tokens, probability) in laws {
            let history = [prompt, &tokens].concat();
            for (v, p) in exact_law(&law(&history), params).into_iter().enumerate() {
                if p > 0.0 {
                    longer.insert([&tokens[..], &[v as u32]].concat(), probability * p);
                }
            }
        }
        laws = longer;
    }
    laws
}

/// Greedy decoding with nothing but the target's law.
pub fn greedy(law: &LogitsOf, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut history = prompt.to_vec();
    for _ in 0..n {
        let p = exact_law(&law(&history), &SamplingParams::default());
        let v = p.iter().position(|&p| p == 1.0).unwrap();
        history.push(v as u32);
    }
    history.split_off(prompt.len())
}

/// Pearson's statistic of counts against an exact law, divided by the limit it passes once in about 1e9 times when the
/// law holds (Wilson and Hilferty's approximation): above 1 the law is wrong.
pub fn chi_square_ratio(counts: &HashMap<Vec<u32>, u64>, law: &HashMap<Vec<u32>, f64>) -> f64 {
    let n: u64 = counts.values().sum();
    if counts.keys().any(|tokens| !law.contains_key(tokens)) {
        return f64::INFINITY;
    }
    let statistic: f64 = law
        .iter()
        .map(|(tokens, p)| {
            let mean = p * n as f64;
            assert!(mean > 5.0, "too few samples for chi-square");
            (counts.get(tokens).copied().unwrap_or(0) as f64 - mean).powi(2) / mean
        })
        .sum();
    let df = (law.len() - 1) as f64;
    let spread = 2.0 / (9.0 * df);
    statistic / (df * (1.0 - spread + 6.0 * spread.sqrt()).powi(3))
}
