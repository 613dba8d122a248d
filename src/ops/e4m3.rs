//! Numbers of eight bits: a sign, four bits of exponent (bias 7) and three of mantissa; no infinity, 0x7f is NaN.

/// The largest number.
pub const MAX: f32 = 448.0;

/// What `byte` stands for.
pub fn decode(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (8.0 + mantissa) * 2f32.powi(exponent - 10),
    }
}

/// The nearest number, of two the even one; the largest for what lies beyond it.
pub fn encode(value: f32) -> u8 {
    let sign = u8::from(value.is_sign_negative()) << 7;
    if value.is_nan() {
        return sign | 0x7f;
    }
    let size = value.abs().min(MAX);
    // Numbers from 2^e on are 2^(e - 3) apart, and those below 2^-6 are 2^-9.
    let exponent = ((size.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (size * 2f32.powi(3 - exponent)).round_ties_even() as i32;
    sign | (8 * (exponent + 6) + steps) as u8
}

/// A row in e4m3: `row[i]` is about `scale * decode(bytes[i])`, the largest to the bit. The factor is returned.
pub fn quantize_row(row: &[f32], bytes: &mut [u8]) -> f32 {
    let largest = row.iter().fold(0.0, |max: f32, value| max.max(value.abs()));
    let scale = largest / MAX;
    // Also where the factor would not be a normal number.
    let scale = if scale < f32::MIN_POSITIVE {
        1.0
    } else {
        scale
    };
    for (byte, value) in bytes.iter_mut().zip(row) {
        *byte = encode(value / scale);
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_for_the_numbers_of_the_format() {
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 2_f32.powi(-9)),
            (0x08, 2_f32.powi(-6)),
            (0x38, 1.0),
            (0x7e, 448.0),
            (0xb9, -1.125),
        ] {
            assert_eq!(decode(byte), value, "{byte:#x}");
        }
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan());
    }

    #[test]
    fn every_number_is_its_own_nearest() {
        for byte in 0..=u8::MAX {
            let value = decode(byte);
            if value.is_nan() {
                assert_eq!(byte & 0x7f, 0x7f);
            } else {
                assert_eq!(encode(value), byte, "{value}");
            }
        }
    }

    #[test]
    fn values_go_to_the_nearest_and_ties_to_the_even_number() {
        for byte in 0..0x7e_u8 {
            let (low, high) = (decode(byte), decode(byte + 1));
            let middle = f32::midpoint(low, high);
            assert_eq!(encode(middle), byte + (byte & 1), "{low} to {high}");
            assert_eq!(encode(middle.next_down()), byte);
            assert_eq!(encode(-middle.next_up()), 0x80 | (byte + 1));
        }
        assert_eq!((encode(1e9), encode(-449.0)), (0x7e, 0xfe));
        assert_eq!(decode(0x7e), MAX);
        assert!(decode(encode(f32::NAN)).is_nan());
    }

    #[test]
    fn rows_keep_their_largest() {
        let row = [0.5, -3.0, 0.0, 1e-3];
        let mut bytes = [0; 4];
        let scale = quantize_row(&row, &mut bytes);
        assert_eq!(bytes[1], 0xfe);
        for (byte, value) in bytes.into_iter().zip(row) {
            // Half of the step at the value's size: 2^-4 of it, or 2^-10 of the factor.
            let error = (scale * decode(byte) - value).abs();
            assert!(error <= (value.abs() / 16.0).max(scale / 1024.0), "{value}");
        }
        assert_eq!(quantize_row(&[0.0; 3], &mut bytes[..3]), 1.0);
        assert_eq!(bytes[..3], [0; 3]);
    }
}
