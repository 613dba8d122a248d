//! `W2 latent`: the bias of a head over the whole vocabulary, when a draft is drawn and again when it is accepted.

use half::f16;

use super::Reference;
use super::gemm::linear;
use super::pool::Pool;
use super::weight::Weight;
use crate::error::Result;
use crate::ops::{Dtype, HostTensor, Matrix, W2, e4m3};

/// A weight in e4m3, with a factor for each row.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The numbers without the factors, which bf16 holds exactly.
    numbers: Weight,
    scales: Vec<f32>,
}

impl Quantized {
    pub(super) fn new(weight: &Weight) -> Result<Self> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let (mut row, mut codes) = (vec![0.0; cols], vec![0; cols]);
        let mut scales = Vec::with_capacity(rows);
        let mut bytes = Vec::with_capacity(2 * rows * cols);
        for v in 0..rows {
            weight.copy_row(v, &mut row);
            scales.push(e4m3::quantize_row(&row, &mut codes));
            let number = |&code: &u8| half::bf16::from_f32(e4m3::decode(code)).to_le_bytes();
            bytes.extend(codes.iter().flat_map(number));
        }
        let numbers = Weight::new(&[HostTensor {
            name: "markov_w2".into(),
            dtype: Dtype::Bf16,
            shape: vec![rows, cols],
            bytes: &bytes,
        }])?;
        Ok(Self { numbers, scales })
    }
}

impl W2<'_, Reference> {
    /// `[vocab, rank]`.
    pub(super) fn shape(&self) -> [usize; 2] {
        let weight = match self {
            Self::Stored(weight) => weight,
            Self::Quantized(copy) => &copy.numbers,
        };
        [weight.rows(), weight.cols()]
    }

    /// Makes latents those that are multiplied: beside e4m3, numbers of f16.
    pub(super) fn round(&self, latents: &mut [f32]) {
        if matches!(self, Self::Quantized(_)) {
            let limit = f16::MAX.to_f32();
            for latent in latents {
                *latent = f16::from_f32(latent.clamp(-limit, limit)).to_f32();
            }
        }
    }

    /// `W2 latent` of every latent of `[n, rank]`, `[n, vocab]`; bitwise the same for a latent whatever is beside it.
    pub(super) fn bias(&self, pool: &Pool, latents: &[f32]) -> Vec<f32> {
        let [vocab_size, rank] = self.shape();
        let mut bias = vec![0.0; latents.len() / rank.max(1) * vocab_size];
        match self {
            Self::Stored(weight) => linear(pool, latents, weight, &mut bias),
            Self::Quantized(Quantized { numbers, scales }) => {
                linear(pool, latents, numbers, &mut bias);
                for row in bias.chunks_exact_mut(vocab_size.max(1)) {
                    row.iter_mut()
                        .zip(scales)
                        .for_each(|(bias, scale)| *bias *= scale);
                }
            }
        }
        bias
    }
}
