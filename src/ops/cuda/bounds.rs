//! Family draft: what bounds the bias of every token.

use half::bf16;

use super::matrix::DeviceMatrix;
use super::{Cuda, check, int, struct_size};
use crate::device::Buffer;
use crate::error::Result;
use crate::ops::Matrix;
use crate::ops::directions::leading_directions;
use crate::sys;

/// Directions of a basis: what the kernels know how to use.
const DIRECTIONS: usize = 3;
/// Neighbours of W2 looked at for a basis, and from how many places.
const SAMPLE_ROWS: usize = 64;
const SAMPLES: usize = 64;

/// How far the bias of each token can reach, given the latent.
#[derive(Debug)]
pub struct RowBounds {
    /// `[vocab, 4]`.
    pub(super) bounds: Buffer<f32>,
    /// `[DIRECTIONS, rank]`.
    pub(super) basis: Buffer<f32>,
}

impl Cuda {
    /// The method of the trait; see there.
    pub(super) fn find_row_bounds(&mut self, w2: &DeviceMatrix<bf16>) -> Result<RowBounds> {
        let (vocab_size, rank) = (w2.rows(), w2.cols());
        let mut found = RowBounds {
            bounds: Buffer::zeros(&self.device, 4 * vocab_size)?,
            basis: Buffer::zeros(&self.device, DIRECTIONS * rank)?,
        };
        let directions = leading_directions(&sample(w2)?, rank, DIRECTIONS);
        found.basis.upload(0, &directions)?;
        let params = sys::dspark_draft_bounds_params {
            struct_size: struct_size::<sys::dspark_draft_bounds_params>(),
            w2_dtype: sys::DSPARK_DTYPE_BF16,
            vocab_size: int("vocab_size", vocab_size)?,
            markov_rank: int("markov_rank", rank)?,
            markov_w2: w2.ptr(0, 0).cast(),
            w2_scales: std::ptr::null(),
            basis: found.basis.ptr(0),
            bounds: found.bounds.mut_ptr(0),
        };
        self.device.bind()?;
        // SAFETY: a live matrix of vocab_size rows of rank, a basis and room for bounds of those sizes.
        check("draft_bounds", unsafe {
            sys::launch::dspark_draft_bounds_cu(&raw const params, self.stream())
        })?;
        Ok(found)
    }
}

/// Rows from all over the vocabulary, on the host.
fn sample(w2: &DeviceMatrix<bf16>) -> Result<Vec<f32>> {
    let (vocab_size, rank) = (w2.rows(), w2.cols());
    let num_rows = SAMPLE_ROWS.min(vocab_size);
    let mut values = vec![bf16::ZERO; num_rows * rank];
    let mut rows = Vec::with_capacity(SAMPLES * values.len());
    for i in 0..SAMPLES {
        let first = (vocab_size - num_rows) * i / (SAMPLES - 1);
        w2.buffer().download(first * rank, &mut values)?;
        rows.extend(values.iter().map(|value| value.to_f32()));
    }
    Ok(rows)
}
