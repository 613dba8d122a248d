//! Matrix products through cuBLASLt: `out[M, N] = x[M, K] W[N, K]^T`, bf16 operands, f32 accumulation.
//!
//! cuBLASLt is column-major, where a row-major matrix is its own transpose; the product asked of it is therefore
//! `out^T[N, M] = (W^T)^T x^T`: A is `W` (transposed), B is `x`.
//!
//! The algorithm for a shape is chosen by cuBLASLt's heuristic and kept. Row counts change from step to step, and a choice takes
//! a millisecond (a kernel that was not used before must be loaded, too): it is made for the next *bucket* of row counts, and
//! holds for all in it. Between buckets it may differ, so a row's last bits may depend on the batch it is in.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::ptr::from_ref;

use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys;
use half::bf16;

use super::{Buffer, Device};
use crate::error::{Error, Result};

/// What NVIDIA recommends on Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

/// Where the product goes; the variant is its element type.
pub enum GemmOut<'a> {
    /// Rounded to bf16.
    Bf16(&'a mut Buffer<bf16>),
    /// Kept in f32.
    F32(&'a mut Buffer<f32>),
}

/// The cuBLASLt handle, its workspace, the plans of the shapes seen so far and the algorithms chosen for them, by the
/// buckets of these shapes.
pub struct Gemm {
    plans: HashMap<Shape, Plan>,
    algorithms: HashMap<Shape, sys::cublasLtMatmulAlgo_t>,
    handle: Handle,
    workspace: Buffer<u8>,
    device: Device,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    out_f32: bool,
}

impl Shape {
    /// The shape that algorithms are chosen for: its row count is the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, …
    fn bucket(self) -> Self {
        let power = self.m.next_power_of_two();
        let between = power / 4 * 3;
        let m = if self.m <= between { between } else { power };
        Self { m, ..self }
    }
}

impl Gemm {
    /// Loads cuBLASLt and takes a workspace.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the library is missing; [`Error::Cuda`].
    pub fn new(device: &Device) -> Result<Self> {
        super::library::load_cublaslt()?;
        device.bind()?;
        Ok(Self {
            plans: HashMap::new(),
            algorithms: HashMap::new(),
            handle: Handle(lt::create_handle().map_err(cublas)?),
            workspace: Buffer::zeros(device, WORKSPACE_BYTES)?,
            device: device.clone(),
        })
    }

    /// `out[m, n] = x[m, k] weight[n, k]^T`, all row-major and contiguous. Enqueues only.
    ///
    /// # Errors
    /// [`Error::Argument`] when a buffer is too short; [`Error::Cuda`].
    pub fn run(
        &mut self,
        [m, n, k]: [usize; 3],
        x: &Buffer<bf16>,
        weight: &Buffer<bf16>,
        out: GemmOut<'_>,
    ) -> Result<()> {
        let (out_len, out_f32, out_ptr): (_, _, *mut c_void) = match out {
            GemmOut::Bf16(out) => (out.len(), false, out.mut_ptr(0).cast()),
            GemmOut::F32(out) => (out.len(), true, out.mut_ptr(0).cast()),
        };
        for (name, need, len) in [
            ("x", m * k, x.len()),
            ("weight", n * k, weight.len()),
            ("out", m * n, out_len),
        ] {
            if len < need {
                return Err(Error::argument(name, format!("{need} elements"), len));
            }
        }
        if m == 0 || n == 0 || k == 0 {
            return Err(Error::argument(
                "shape",
                "no empty side",
                format!("{m} x {n} x {k}"),
            ));
        }
        self.device.bind()?;
        let shape = Shape { m, n, k, out_f32 };
        let plan = kept(&mut self.plans, shape, || Plan::new(shape))?;
        let bucket = shape.bucket();
        let algorithm = kept(&mut self.algorithms, bucket, || {
            Plan::new(bucket)?.algorithm(&self.handle)
        })?;
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: handle, descriptors and algorithm are alive (owned by self), the three buffers hold at least what the
        // layouts describe (checked above), alpha and beta are host f32 as the descriptor's scale type says, and the
        // stream belongs to the context bound above.
        unsafe {
            lt::matmul(
                self.handle.0,
                plan.desc.0,
                from_ref(&one).cast(),
                from_ref(&zero).cast(),
                weight.ptr(0).cast(),
                plan.weight.0,
                x.ptr(0).cast(),
                plan.x.0,
                out_ptr,
                plan.out.0,
                out_ptr,
                plan.out.0,
                from_ref(algorithm),
                self.workspace.mut_ptr(0).cast(),
                self.workspace.len(),
                self.device.raw_stream().cast(),
            )
        }
        .map_err(cublas)
    }
}

/// What is kept for a shape; it is made where it is not there yet.
fn kept<T>(
    all: &mut HashMap<Shape, T>,
    shape: Shape,
    make: impl FnOnce() -> std::result::Result<T, CublasError>,
) -> Result<&T> {
    Ok(match all.entry(shape) {
        Entry::Occupied(there) => there.into_mut(),
        Entry::Vacant(place) => place.insert(make().map_err(cublas)?),
    })
}

// SAFETY: the handle and descriptors are plain heap objects of cuBLASLt, which is thread-safe and ties none of them to
// the thread that made them; `Gemm` is used through `&mut self`.
unsafe impl Send for Gemm {}

struct Handle(sys::cublasLtHandle_t);

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `create_handle`, destroyed once. A failure leaves nothing to do.
        let _ = unsafe { lt::destroy_handle(self.0) };
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    /// Column-major, dense.
    fn new(
        dtype: sys::cudaDataType,
        rows: usize,
        cols: usize,
    ) -> std::result::Result<Self, CublasError> {
        lt::create_matrix_layout(dtype, rows as u64, cols as u64, rows as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `create_matrix_layout`, destroyed once.
        let _ = unsafe { lt::destroy_matrix_layout(self.0) };
    }
}

struct Desc(sys::cublasLtMatmulDesc_t);

impl Drop for Desc {
    fn drop(&mut self) {
        // SAFETY: made by `create_matmul_desc`, destroyed once.
        let _ = unsafe { lt::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `create_matmul_pref`, destroyed once.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}

/// `CUBLAS_OP_T` of `cublasOperation_t`, which cudarc's cuBLASLt bindings leave out.
const TRANSPOSE: i32 = 1;

/// `CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE`: split sums meet in f32 through the workspace, in a fixed order; the other
/// schemes add atomically or round to the output type first.
const REDUCE_IN_F32: u32 = 2;

/// The descriptors of one shape.
struct Plan {
    desc: Desc,
    weight: Layout,
    x: Layout,
    out: Layout,
}

impl Plan {
    fn new(shape: Shape) -> std::result::Result<Self, CublasError> {
        let Shape { m, n, k, out_f32 } = shape;
        let operand = sys::cudaDataType::CUDA_R_16BF;
        let result = if out_f32 {
            sys::cudaDataType::CUDA_R_32F
        } else {
            operand
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let scale = sys::cudaDataType::CUDA_R_32F;
        let desc = Desc(lt::create_matmul_desc(compute, scale)?);
        // SAFETY: the attribute takes a 32-bit `cublasOperation_t` by address, read during the call.
        unsafe {
            lt::set_matmul_desc_attribute(
                desc.0,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                from_ref(&TRANSPOSE).cast(),
                size_of_val(&TRANSPOSE),
            )?;
        }
        let weight = Layout::new(operand, k, n)?;
        let x = Layout::new(operand, k, m)?;
        let out = Layout::new(result, n, m)?;
        Ok(Self {
            desc,
            weight,
            x,
            out,
        })
    }

    /// What cuBLASLt holds to be the fastest way.
    fn algorithm(
        &self,
        handle: &Handle,
    ) -> std::result::Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        let preference = Preference(lt::create_matmul_pref()?);
        // SAFETY: the attributes take a `usize` and a 32-bit mask by address; all descriptors above are alive.
        let found = unsafe {
            lt::set_matmul_pref_attribute(
                preference.0,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                from_ref(&REDUCE_IN_F32).cast(),
                size_of_val(&REDUCE_IN_F32),
            )?;
            lt::set_matmul_pref_attribute(
                preference.0,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                from_ref(&WORKSPACE_BYTES).cast(),
                size_of_val(&WORKSPACE_BYTES),
            )?;
            lt::get_matmul_algo_heuristic(
                handle.0,
                self.desc.0,
                self.weight.0,
                self.x.0,
                self.out.0,
                self.out.0,
                preference.0,
            )?
        };
        Ok(found.algo)
    }
}

#[allow(clippy::needless_pass_by_value)] // the shape `map_err` wants
fn cublas(error: CublasError) -> Error {
    Error::Cuda(format!("cuBLASLt: {error}"))
}

#[cfg(test)]
mod tests {
    use super::Shape;

    #[test]
    fn buckets_grow_by_a_half_or_a_third() {
        let bucket = |m| {
            let shape = Shape {
                m,
                n: 5,
                k: 7,
                out_f32: false,
            };
            shape.bucket().m
        };
        let buckets: Vec<usize> = (1..=17).map(bucket).collect();
        let expected = [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24];
        assert_eq!(buckets, expected);
        assert!((1..5000).all(|m| bucket(m) >= m && bucket(bucket(m)) == bucket(m)));
    }
}
