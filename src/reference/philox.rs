//! Philox4x32-10, the counter-based generator of every draw (Salmon et al., "Parallel random numbers: as easy as 1, 2,
//! 3", SC 2011).

use std::cell::OnceCell;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words of `counter` under `key`.
pub fn philox4x32(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            high(second) ^ counter[1] ^ key[0],
            low(second),
            high(first) ^ counter[3] ^ key[1],
            low(first),
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The key of a request's `seed`.
pub fn key(seed: u64) -> [u32; 2] {
    [low(seed), high(seed)]
}

/// The uniform in (0, 1) of a random word: `(word + 0.5) * 2^-32`.
pub fn uniform(word: u32) -> f64 {
    (f64::from(word) + 0.5) * (-32.0_f64).exp2()
}

/// The uniform in (0, 1) of 52 bits of two random words.
pub fn wide_uniform(high: u32, low: u32) -> f64 {
    let bits = u64::from(high) << 20 | u64::from(low >> 12);
    (bits as f64 + 0.5) * (-52.0_f64).exp2()
}

/// Tokens that share the noise of their minimum: see [`Zone`].
pub const ZONE: usize = 64;

/// Zones whose minima come from one counter.
const ZONES_PER_COUNTER: usize = 4;

/// Tokens that a draw by inversion picks together first.
pub const STRIP: usize = 256;

/// The exponential noise of one zone of [`ZONE`] neighbouring tokens, for one draw.
///
/// A draw is a race: with independent `E_v` of rate 1, the v that minimises `E_v / weight(v)` is distributed as the
/// weights. The `E_v` of a zone are made from their minimum m, exponential of rate `ZONE`, and where it is: every other
/// one is m plus an exponential of rate 1, since what is left of an exponential is one again. So they are independent of
/// rate 1, and m alone can rule out a zone.
#[derive(Clone, Debug)]
pub struct Zone {
    key: [u32; 2],
    position: u32,
    purpose: u32,
    index: usize,
    /// The smallest `E_v` of the zone.
    pub least: f64,
    /// Its token, relative to the zone, once it is asked for.
    least_at: OnceCell<usize>,
}

impl Zone {
    /// Zone `index` (tokens from `index * ZONE` on) of the draw of `seed`, `position` and `purpose`.
    pub fn new(seed: u64, position: u32, purpose: u32, index: usize) -> Self {
        let key = key(seed);
        let four = (index / ZONES_PER_COUNTER) as u32;
        let words = philox4x32(key, [four, position, purpose, 1]);
        Self {
            key,
            position,
            purpose,
            index,
            least: exponential(words[index % ZONES_PER_COUNTER]) / ZONE as f64,
            least_at: OnceCell::new(),
        }
    }

    fn words(&self, first: usize, last: u32) -> [u32; 4] {
        philox4x32(self.key, [first as u32, self.position, self.purpose, last])
    }

    /// `E_v` of tokens `4 * quad .. 4 * quad + 4` of the zone.
    pub fn quad(&self, quad: usize) -> [f64; 4] {
        let least_at = *self
            .least_at
            .get_or_init(|| self.words(self.index, 3)[0] as usize % ZONE);
        let words = self.words(self.index * ZONE / 4 + quad, 0);
        std::array::from_fn(|lane| {
            if 4 * quad + lane == least_at {
                self.least
            } else {
                self.least + exponential(words[lane])
            }
        })
    }
}

/// `E_v` of one token of a draw.
pub fn token_exponential(seed: u64, position: u32, purpose: u32, token: usize) -> f64 {
    let zone = Zone::new(seed, position, purpose, token / ZONE);
    zone.quad(token % ZONE / 4)[token % 4]
}

/// The exponential of rate 1 of a random word.
pub fn exponential(word: u32) -> f64 {
    -(-uniform(word)).ln_1p()
}

fn high(x: u64) -> u32 {
    (x >> 32) as u32
}

fn low(x: u64) -> u32 {
    (x & 0xFFFF_FFFF) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(
            philox4x32([0; 2], [0; 4]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn key_and_uniform_follow_the_contract() {
        assert_eq!(key(0x0123_4567_89ab_cdef), [0x89ab_cdef, 0x0123_4567]);
        assert_eq!(uniform(0), 0.5 / 4_294_967_296.0);
        assert_eq!(uniform(u32::MAX), 1.0 - 0.5 / 4_294_967_296.0);
        assert_eq!(wide_uniform(0, 0xfff), (-53.0_f64).exp2());
        assert_eq!(wide_uniform(u32::MAX, u32::MAX), 1.0 - (-53.0_f64).exp2());
    }
}
