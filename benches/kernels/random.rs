//! Seeded numbers: the same on every machine and in every run.

/// SplitMix64.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in the open interval (0, 1).
    fn uniform(&mut self) -> f32 {
        ((self.next() >> 41) as f32 + 0.5) / (1_u64 << 23) as f32
    }

    /// Uniform in `0 .. n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// `len` standard normal numbers (Box-Muller).
    pub fn normals(&mut self, len: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(len + 1);
        while values.len() < len {
            let radius = (-2.0 * self.uniform().ln()).sqrt();
            let (sin, cos) = (std::f32::consts::TAU * self.uniform()).sin_cos();
            values.extend([radius * cos, radius * sin]);
        }
        values.truncate(len);
        values
    }

    /// A draw from `softmax(logits / temperature)` by Gumbel-max; the argmax at temperature 0.
    pub fn draw(&mut self, logits: &[f32], temperature: f32) -> i32 {
        let mut best = (0, f32::NEG_INFINITY);
        for (token, &logit) in logits.iter().enumerate() {
            let score = if temperature > 0.0 {
                logit / temperature - (-self.uniform().ln()).ln()
            } else {
                logit
            };
            if score > best.1 {
                best = (token, score);
            }
        }
        best.0 as i32
    }

    /// `0 .. n` in random order.
    pub fn permutation(&mut self, n: usize) -> Vec<i32> {
        let mut order: Vec<i32> = (0..n as i32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}
