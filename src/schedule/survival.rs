//! Confidence to calibrated confidence to survival, as `dspark_survival` of the C ABI states it.

use crate::error::{Error, Result};

/// Checks STS temperatures.
///
/// # Errors
/// One is not a finite number above 0.
pub fn validate_temperatures(temperatures: &[f32]) -> Result<()> {
    match temperatures.iter().find(|t| !(t.is_finite() && **t > 0.0)) {
        Some(t) => Err(Error::argument("sts_temperatures", "finite numbers > 0", t)),
        None => Ok(()),
    }
}

/// `sigmoid(logit(confidence[r, k]) / temperatures[k])` of `[num_reqs, draft_len]`; the confidences themselves without
/// temperatures. A NaN counts as 0, others are clamped to [0, 1]. `temperatures` may be longer than `draft_len`.
///
/// # Errors
/// Fewer temperatures than `draft_len`.
pub fn calibrate(
    confidence: &[f32],
    draft_len: usize,
    temperatures: Option<&[f32]>,
) -> Result<Vec<f32>> {
    let clean = |c: f32| if c.is_nan() { 0.0 } else { c.clamp(0.0, 1.0) };
    let Some(temperatures) = temperatures else {
        return Ok(confidence.iter().map(|&c| clean(c)).collect());
    };
    if temperatures.len() < draft_len {
        let expected = format!("one for each of {draft_len} positions");
        return Err(Error::argument(
            "sts_temperatures",
            expected,
            temperatures.len(),
        ));
    }
    Ok(confidence
        .iter()
        .zip(temperatures[..draft_len].iter().cycle())
        .map(|(&c, &t)| {
            // c = 0 and 1 have logits -inf and inf, which stay what they are.
            let c = f64::from(clean(c));
            let z = (c / (1.0 - c)).ln() / f64::from(t);
            (1.0 / (1.0 + (-z).exp())) as f32
        })
        .collect())
}

/// Running products along each request: `survival[r, k] = prod over i <= k of calibrated[r, i]`.
pub fn survival(calibrated: &[f32], draft_len: usize) -> Vec<f32> {
    let mut survival = Vec::with_capacity(calibrated.len());
    for row in calibrated.chunks(draft_len.max(1)) {
        survival.extend(row.iter().scan(1.0_f32, |product, &c| {
            *product *= c;
            Some(*product)
        }));
    }
    survival
}
