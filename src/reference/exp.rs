//! The exponential in f32, without branches, so that loops over it run in vectors.

#![allow(
    clippy::inline_always,
    reason = "vector code must be inlined into the function that has the machine's features"
)]

/// `e^x` within 2 units in the last place; below -87.3, where f32 turns subnormal, 0; `inf` above 88.7; NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// ln 2 in two parts; the product of the first with a small integer is exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// Adding and subtracting it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.clamp(-87.33, 88.8) * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x.clamp(-87.33, 88.8) - n * LN2[0] - n * LN2[1];
    // Taylor's polynomial on |r| <= ln 2 / 2.
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    // 2^n as two factors, each of which is a normal number.
    let n = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .cast_signed();
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let y = p * power(half) * power(n - half);
    if x < -87.33 { 0.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn within_two_units_of_the_exponential() {
        for i in -87_320..88_720 {
            let x = i as f32 * 1e-3 + 3e-5;
            let want = f64::from(x).exp();
            let unit = f64::from(f32::EPSILON) * want;
            let error = (f64::from(exp(x)) - want).abs();
            assert!(error <= 2.0 * unit, "exp({x}) = {:e}, not {want:e}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }
}
