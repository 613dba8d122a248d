//! Family gemm: linears through cuBLASLt.

use half::bf16;

use super::{Cuda, DeviceMatrix, expect};
use crate::device::{Buffer, GemmOut};
use crate::error::Result;
use crate::ops::Matrix;

/// Element types a product can be written in.
pub(super) trait ProductElement: Sized {
    fn out(buffer: &mut Buffer<Self>) -> GemmOut<'_>;
}

impl ProductElement for bf16 {
    fn out(buffer: &mut Buffer<Self>) -> GemmOut<'_> {
        GemmOut::Bf16(buffer)
    }
}

impl ProductElement for f32 {
    fn out(buffer: &mut Buffer<Self>) -> GemmOut<'_> {
        GemmOut::F32(buffer)
    }
}

impl Cuda {
    /// `out[rows, n] = x[rows, k] weight[n, k]^T`.
    pub(super) fn product<T>(
        &mut self,
        x: &DeviceMatrix<bf16>,
        weight: &DeviceMatrix<bf16>,
        out: &mut DeviceMatrix<T>,
    ) -> Result<()>
    where
        T: ProductElement + cudarc::driver::DeviceRepr + Copy + bytemuck::Zeroable,
    {
        expect("weight.cols", x.cols(), weight.cols())?;
        expect("out.cols", weight.rows(), out.cols())?;
        out.set_rows(x.rows())?;
        if x.rows() == 0 {
            return Ok(());
        }
        let shape = [x.rows(), weight.rows(), x.cols()];
        self.gemm
            .run(shape, x.buffer(), weight.buffer(), T::out(out.buffer_mut()))
    }
}
