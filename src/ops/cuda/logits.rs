//! Logits in device memory.

use half::bf16;

use super::{Cuda, DeviceMatrix};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::Matrix;
use crate::sys;

/// Logits `[rows, vocab]`: in f32, or in bf16 where they are only read. They come from bf16 activations and weights, and
/// bf16 halves what acceptance reads; the law of a row is that of its rounded logits, in every mode alike.
#[derive(Debug)]
pub enum Logits {
    /// As they were summed.
    F32(DeviceMatrix<f32>),
    /// Rounded.
    Bf16(DeviceMatrix<bf16>),
}

impl Logits {
    pub(super) fn f32(device: &Device, max_rows: usize, vocab_size: usize) -> Result<Self> {
        DeviceMatrix::new(device, max_rows, vocab_size).map(Self::F32)
    }

    pub(super) fn bf16(device: &Device, max_rows: usize, vocab_size: usize) -> Result<Self> {
        DeviceMatrix::new(device, max_rows, vocab_size).map(Self::Bf16)
    }

    pub(super) fn dtype(&self) -> sys::dspark_dtype {
        match self {
            Self::F32(_) => sys::DSPARK_DTYPE_F32,
            Self::Bf16(_) => sys::DSPARK_DTYPE_BF16,
        }
    }

    /// The device address of the first row.
    pub(super) fn ptr(&self) -> *const std::ffi::c_void {
        match self {
            Self::F32(matrix) => matrix.ptr(0, 0).cast(),
            Self::Bf16(matrix) => matrix.ptr(0, 0).cast(),
        }
    }

    /// Elements between rows.
    pub(super) fn stride(&self) -> i64 {
        match self {
            Self::F32(matrix) => matrix.stride(),
            Self::Bf16(matrix) => matrix.stride(),
        }
    }

    pub(super) fn write(&mut self, values: &[f32]) -> Result<()> {
        match self {
            Self::F32(matrix) => matrix.write(values),
            Self::Bf16(matrix) => {
                let values: Vec<bf16> = values.iter().copied().map(bf16::from_f32).collect();
                matrix.write(&values)
            }
        }
    }

    pub(super) fn read(&self) -> Result<Vec<f32>> {
        match self {
            Self::F32(matrix) => matrix.read(),
            Self::Bf16(matrix) => Ok(matrix.read()?.into_iter().map(bf16::to_f32).collect()),
        }
    }
}

impl Matrix for Logits {
    fn rows(&self) -> usize {
        match self {
            Self::F32(matrix) => matrix.rows(),
            Self::Bf16(matrix) => matrix.rows(),
        }
    }

    fn cols(&self) -> usize {
        match self {
            Self::F32(matrix) => matrix.cols(),
            Self::Bf16(matrix) => matrix.cols(),
        }
    }

    fn max_rows(&self) -> usize {
        match self {
            Self::F32(matrix) => matrix.max_rows(),
            Self::Bf16(matrix) => matrix.max_rows(),
        }
    }

    fn set_rows(&mut self, rows: usize) -> Result<()> {
        match self {
            Self::F32(matrix) => matrix.set_rows(rows),
            Self::Bf16(matrix) => matrix.set_rows(rows),
        }
    }
}

impl Cuda {
    /// `dst[first + i * step] = src[i]`, both of one type.
    pub(super) fn scatter_logits(
        &mut self,
        src: &Logits,
        dst: &mut Logits,
        first: usize,
        step: usize,
    ) -> Result<()> {
        match (src, dst) {
            (Logits::F32(src), Logits::F32(dst)) => self.scatter_rows(src, dst, first, step),
            (Logits::Bf16(src), Logits::Bf16(dst)) => self.scatter_rows(src, dst, first, step),
            _ => Err(Error::argument("dst", "logits of src's type", "another")),
        }
    }

    /// `out = x W^T`, rounded to what `out` holds.
    pub(super) fn product_logits(
        &mut self,
        x: &DeviceMatrix<bf16>,
        weight: &DeviceMatrix<bf16>,
        out: &mut Logits,
    ) -> Result<()> {
        match out {
            Logits::F32(out) => self.product(x, weight, out),
            Logits::Bf16(out) => self.product(x, weight, out),
        }
    }
}
