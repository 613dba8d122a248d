//! Confidence to calibrated confidence to survival, as `dspark_survival` of the C ABI states it.
//!
//! The arithmetic is f32 throughout, without fused multiply-adds and with a logarithm and an exponential of its own, so
//! that a device can repeat it bit for bit (`cuda/kernels/schedule/calibrate.cuh` does): schedules made here and there
//! are the same.

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

/// `log2(a / b)` of positive normal numbers, to 1e-6: the difference of the exponents, then the odd series in
/// (a - b) / (a + b) of mantissas whose ratio is within sqrt(2) of 1.
fn log2_ratio(a: f32, b: f32) -> f32 {
    let exponent = |x: f32| (x.to_bits() >> 23) as i32;
    let mantissa = |x: f32| f32::from_bits((x.to_bits() & 0x007f_ffff) | 0x3f80_0000);
    let mut whole = exponent(a) - exponent(b);
    let (mut a, mut b) = (mantissa(a), mantissa(b));
    if a > b * std::f32::consts::SQRT_2 {
        a *= 0.5;
        whole += 1;
    } else if b > a * std::f32::consts::SQRT_2 {
        b *= 0.5;
        whole -= 1;
    }
    let s = (a - b) / (a + b);
    let z = s * s;
    let series = ((0.412_198_6 * z + 0.577_078) * z + 0.961_796_7) * z + 2.885_39;
    whole as f32 + s * series
}

/// `2^y`, to 1e-7; `y` is held to the exponents of normal numbers.
fn exp2(y: f32) -> f32 {
    let y = y.clamp(-126.0, 126.0);
    let whole = y.round_ties_even();
    let f = y - whole;
    let series =
        ((((0.000_154_035_3 * f + 0.001_333_355_8) * f + 0.009_618_129) * f + 0.055_504_11) * f
            + 0.240_226_5)
            * f
            + std::f32::consts::LN_2;
    let scale = f32::from_bits(((whole as i32 + 127) as u32) << 23);
    (series * f + 1.0) * scale
}

/// `sigmoid(logit(confidence) / temperature)`, exact at 0 and 1. A NaN counts as 0, others are clamped to [0, 1].
pub fn calibrate_one(confidence: f32, temperature: f32) -> f32 {
    let c = if confidence.is_nan() {
        0.0
    } else {
        confidence.clamp(0.0, 1.0)
    };
    if temperature == 1.0 || c < f32::MIN_POSITIVE || c == 1.0 {
        return c;
    }
    let log_odds = log2_ratio(c, 1.0 - c) * (1.0 / temperature);
    1.0 / (1.0 + exp2(-log_odds))
}

/// [`calibrate_one`] of `[num_reqs, draft_len]` by position; the cleaned confidences themselves without temperatures.
/// `temperatures` may be longer than `draft_len`.
///
/// # Errors
/// Fewer temperatures than `draft_len`.
pub fn calibrate(
    confidence: &[f32],
    draft_len: usize,
    temperatures: Option<&[f32]>,
) -> Result<Vec<f32>> {
    let Some(temperatures) = temperatures else {
        return Ok(confidence.iter().map(|&c| calibrate_one(c, 1.0)).collect());
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
        .map(|(&c, &t)| calibrate_one(c, t))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_logarithm_and_exponential_are_good_to_a_few_ulp() {
        for i in 1..20_000_u16 {
            let (a, b) = (f32::from(i) * 5e-5, 1.0 - f32::from(i) * 4e-5);
            let error = f64::from(log2_ratio(a, b)) - (f64::from(a) / f64::from(b)).log2();
            assert!(error.abs() < 1e-6, "log2({a} / {b}) is off by {error}");
            let y = (f32::from(i) - 10_000.0) * 2e-3;
            let ratio = f64::from(exp2(y)) / f64::from(y).exp2() - 1.0;
            assert!(ratio.abs() < 4e-7, "exp2({y}) is off by {ratio}");
        }
    }

    #[test]
    fn calibration_never_leaves_the_unit_interval_and_keeps_order() {
        for temperature in [0.05, 0.3, 1.0, 2.5, 40.0] {
            let mut last = 0.0;
            for i in 0..=4096_u16 {
                let c = calibrate_one(f32::from(i) / 4096.0, temperature);
                assert!((last..=1.0).contains(&c), "{c} after {last}");
                last = c;
            }
        }
        assert_eq!(calibrate_one(f32::NAN, 2.0), 0.0);
        assert_eq!(calibrate_one(1e-40, 2.0), 1e-40);
        assert_eq!(calibrate_one(7.0, 2.0), 1.0);
    }
}
