//! Family norm: RMSNorm, SwiGLU, gathers and copies.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use bytemuck::Zeroable;
use cudarc::driver::DeviceRepr;
use half::bf16;

use super::{Cuda, DeviceMatrix, Norm, check, expect, int, struct_size};
use crate::error::{Error, Result};
use crate::ops::Matrix;
use crate::sys;

type Mat = DeviceMatrix<bf16>;

/// Element types that rows of can be copied, with their number in the ABI.
pub(super) trait Element: DeviceRepr + Copy + Zeroable {
    const DTYPE: sys::dspark_dtype;
}

impl Element for bf16 {
    const DTYPE: sys::dspark_dtype = sys::DSPARK_DTYPE_BF16;
}

impl Element for f32 {
    const DTYPE: sys::dspark_dtype = sys::DSPARK_DTYPE_F32;
}

/// What a norm reads and updates: `x` and `delta` are contiguous matrices of this shape, `tap` a window as large.
struct NormInput {
    x: *mut c_void,
    delta: *const c_void,
    shape: [usize; 2],
    tap: *mut c_void,
    stride_tap_row: i64,
}

/// Refuses a window of `dst` at `[row, col]` that it has no room for.
fn check_window(dst: &Mat, [row, col]: [usize; 2], [num_rows, num_cols]: [usize; 2]) -> Result<()> {
    if row + num_rows > dst.max_rows() {
        let expected = format!("at most {} rows", dst.max_rows());
        return Err(Error::argument("dst_row", expected, row + num_rows));
    }
    if col + num_cols > dst.cols() {
        let expected = format!("at most {} columns", dst.cols());
        return Err(Error::argument("dst_col", expected, col + num_cols));
    }
    Ok(())
}

impl Cuda {
    /// `out = rms_norm(x)`.
    pub(super) fn norm_rows(
        &mut self,
        x: &Mat,
        weight: &Norm,
        eps: f32,
        out: &mut Mat,
    ) -> Result<()> {
        let input = NormInput {
            // The launcher writes x only together with delta, so the const cast changes nothing.
            x: x.ptr(0, 0).cast_mut().cast(),
            delta: null(),
            shape: [x.rows(), x.cols()],
            tap: null_mut(),
            stride_tap_row: 0,
        };
        self.launch_rms_norm(&input, weight, eps, out)
    }

    /// `residual += delta; out = rms_norm(residual)`; the residual goes to the window of `tap` at its column as well.
    pub(super) fn add_norm_rows(
        &mut self,
        delta: &Mat,
        residual: &mut Mat,
        weight: &Norm,
        eps: f32,
        out: &mut Mat,
        tap: Option<(&mut Mat, usize)>,
    ) -> Result<()> {
        expect("delta.rows", residual.rows(), delta.rows())?;
        expect("delta.cols", residual.cols(), delta.cols())?;
        let mut input = NormInput {
            x: residual.mut_ptr(0, 0).cast(),
            delta: delta.ptr(0, 0).cast(),
            shape: [residual.rows(), residual.cols()],
            tap: null_mut(),
            stride_tap_row: 0,
        };
        if let Some((tap, col)) = tap {
            check_window(tap, [0, col], input.shape)?;
            input.tap = tap.mut_ptr(0, col).cast();
            input.stride_tap_row = tap.stride();
        }
        self.launch_rms_norm(&input, weight, eps, out)
    }

    fn launch_rms_norm(
        &mut self,
        input: &NormInput,
        weight: &Norm,
        eps: f32,
        out: &mut Mat,
    ) -> Result<()> {
        let [rows, cols] = input.shape;
        expect("weight", cols, weight.len())?;
        expect("out.cols", cols, out.cols())?;
        out.set_rows(rows)?;
        if rows == 0 {
            return Ok(());
        }
        let params = sys::dspark_rms_norm_params {
            struct_size: struct_size::<sys::dspark_rms_norm_params>(),
            dtype: bf16::DTYPE,
            num_rows: int("rows", rows)?,
            hidden_size: int("cols", cols)?,
            eps,
            x: input.x,
            delta: input.delta,
            weight: weight.ptr().cast(),
            out: out.mut_ptr(0, 0).cast(),
            stride_x_row: cols as i64,
            stride_delta_row: cols as i64,
            stride_out_row: out.stride(),
            tap: input.tap,
            stride_tap_row: input.stride_tap_row,
        };
        self.device.bind()?;
        // SAFETY: the operands are live device matrices of the shapes checked above, distinct by Rust's borrows.
        check("rms_norm", unsafe {
            sys::launch::dspark_rms_norm_cu(&raw const params, self.stream())
        })
    }

    /// `out = silu(gate) * up`.
    pub(super) fn gated_silu(&mut self, gate_up: &Mat, out: &mut Mat) -> Result<()> {
        expect("gate_up.cols", 2 * out.cols(), gate_up.cols())?;
        out.set_rows(gate_up.rows())?;
        if gate_up.rows() == 0 {
            return Ok(());
        }
        let params = sys::dspark_silu_mul_params {
            struct_size: struct_size::<sys::dspark_silu_mul_params>(),
            dtype: bf16::DTYPE,
            num_rows: int("rows", gate_up.rows())?,
            ffn_size: int("cols", out.cols())?,
            gate_up: gate_up.ptr(0, 0).cast(),
            out: out.mut_ptr(0, 0).cast(),
            stride_gate_up_row: gate_up.stride(),
            stride_out_row: out.stride(),
        };
        self.device.bind()?;
        // SAFETY: the operands are live device matrices of the shapes checked above, distinct by Rust's borrows.
        check("silu_mul", unsafe {
            sys::launch::dspark_silu_mul_cu(&raw const params, self.stream())
        })
    }

    /// `out[i] = src[index[i]]`; `field` names the index in errors.
    pub(super) fn gather(
        &mut self,
        src: &Mat,
        field: &str,
        index: &[u32],
        out: &mut Mat,
    ) -> Result<()> {
        expect("out.cols", src.cols(), out.cols())?;
        out.set_rows(index.len())?;
        if let Some((i, &row)) = index
            .iter()
            .enumerate()
            .find(|&(_, &row)| row as usize >= src.rows())
        {
            let expected = format!("below {}", src.rows());
            return Err(Error::argument(format!("{field}[{i}]"), expected, row));
        }
        if index.is_empty() {
            return Ok(());
        }
        let num_rows = index.len();
        let index = self.upload_index(index)?;
        let stride = out.stride();
        self.launch_gather(src, index, num_rows, out.mut_ptr(0, 0), stride)
    }

    /// Copies `src` to the window of `dst` that begins at `[row, col]`.
    pub(super) fn copy_window(
        &mut self,
        src: &Mat,
        dst: &mut Mat,
        [row, col]: [usize; 2],
    ) -> Result<()> {
        check_window(dst, [row, col], [src.rows(), src.cols()])?;
        if src.rows() == 0 {
            return Ok(());
        }
        let stride = dst.stride();
        self.launch_gather(src, null(), src.rows(), dst.mut_ptr(row, col), stride)
    }

    /// `dst[first + i * step] = src[i]`.
    pub(super) fn scatter_rows<T: Element>(
        &mut self,
        src: &DeviceMatrix<T>,
        dst: &mut DeviceMatrix<T>,
        first: usize,
        step: usize,
    ) -> Result<()> {
        expect("dst.cols", src.cols(), dst.cols())?;
        if src.rows() == 0 {
            return Ok(());
        }
        let last = first + (src.rows() - 1) * step;
        if step == 0 || last >= dst.max_rows() {
            let expected = format!("rows below {} with a step >= 1", dst.max_rows());
            return Err(Error::argument(
                "dst",
                expected,
                format!("{first} .. {last} by {step}"),
            ));
        }
        let stride = dst.stride() * step as i64;
        self.launch_gather(src, null(), src.rows(), dst.mut_ptr(first, 0), stride)
    }

    /// `num_rows` rows of `src`, by `index` or in order, to `out`, whose room the caller has checked.
    fn launch_gather<T: Element>(
        &mut self,
        src: &DeviceMatrix<T>,
        index: *const i32,
        num_rows: usize,
        out: *mut T,
        stride_out_row: i64,
    ) -> Result<()> {
        let params = sys::dspark_gather_rows_params {
            struct_size: struct_size::<sys::dspark_gather_rows_params>(),
            dtype: T::DTYPE,
            num_rows: int("rows", num_rows)?,
            num_cols: int("cols", src.cols())?,
            num_src_rows: int("src.rows", src.rows())?,
            src: src.ptr(0, 0).cast(),
            index,
            out: out.cast(),
            stride_src_row: src.stride(),
            stride_out_row,
        };
        self.device.bind()?;
        // SAFETY: src and out are distinct live device matrices with room for the rows (checked by the callers); the
        // index, where given, holds num_rows entries uploaded on this stream.
        check("gather_rows", unsafe {
            sys::launch::dspark_gather_rows_cu(&raw const params, self.stream())
        })
    }
}
