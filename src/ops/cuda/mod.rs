//! The CUDA backend: [`Ops`] over the launchers of the C ABI and cuBLASLt.
//!
//! Activations, weights and caches are bf16 (f32 and f16 checkpoints are rounded at load; a cache may be e4m3), and so are
//! the target's logits;
//! a drafter's are f32. Everything goes
//! to the device's one stream in the order of the calls; only [`Ops::draft_full`],
//! [`Ops::draft_candidates`], [`Ops::accept`] and the `read_*`
//! functions wait. What a call needs from the host (ids, lengths, sampling parameters) is packed into one upload
//! through a buffer that is reused: stream order keeps a later upload behind the kernels that read the earlier one.
//!
//! One file per kernel family, one safe function per launcher; this file only says which belongs to which method.

mod arguments;
mod attention;
mod bounds;
mod cache;
mod candidates;
mod draft;
mod full;
mod gemm;
mod logits;
mod matrix;
mod norm;
mod passes;
mod rope;
mod rows;
mod schedule;
mod verify;

use half::bf16;

use super::{
    AcceptBatch, Accepted, AttentionSpec, DraftBatch, DraftHead, Drafted, HostTensor, KvGeometry,
    KvScales, KvSink, LowRankLaw, Ops, PassKey, RopeSpec, RowMap, ScheduleInputs, Scheduled,
    SparseLaw,
};
use crate::device::{Device, Gemm, Growing};
use crate::error::{Error, Result};
use crate::sys;

use draft::Walk;
use passes::Passes;

pub use bounds::RowBounds;
pub use cache::KvCache;
pub use logits::Logits;
pub use matrix::{DeviceMatrix, Norm, Quantized};
pub use rope::Rope;
pub use rows::Rows;
pub use verify::Committed;

/// Room for the packed arguments of a few hundred requests, in 32-bit words, before the first growth.
const INITIAL_WORDS: usize = 1 << 13;

/// The backend of one device.
pub struct Cuda {
    device: Device,
    gemm: Gemm,
    /// Host arrays of the current call.
    arguments: Growing<u32>,
    /// Small outputs of the current call.
    results: Growing<u32>,
    /// Scratch of the current launch.
    workspace: Growing<u8>,
    /// See [`Cuda::set_batch_invariant`].
    batch_invariant: bool,
    /// See [`Cuda::set_recording`].
    recording: bool,
    passes: Passes,
}

impl Cuda {
    /// The backend on `device`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without cuBLASLt; [`Error::Cuda`].
    pub fn new(device: Device) -> Result<Self> {
        Ok(Self {
            gemm: Gemm::new(&device)?,
            arguments: Growing::new(&device, INITIAL_WORDS)?,
            results: Growing::new(&device, INITIAL_WORDS)?,
            workspace: Growing::new(&device, 1 << 20)?,
            batch_invariant: false,
            recording: true,
            passes: Passes::default(),
            device,
        })
    }

    /// The backend on device `ordinal`.
    ///
    /// # Errors
    /// As [`Device::open`] and [`Cuda::new`].
    pub fn open(ordinal: usize) -> Result<Self> {
        Self::new(Device::open(ordinal)?)
    }

    /// The device all work goes to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether attention gives a request bitwise the same result whatever else is in the batch. Off by default: the
    /// work of a pass is then cut into equal shares over all requests, which is faster, and a request's sums may be
    /// ordered otherwise in other company (they are the same from run to run either way).
    pub fn set_batch_invariant(&mut self, batch_invariant: bool) {
        self.batch_invariant = batch_invariant;
    }

    fn stream(&self) -> sys::dspark_stream {
        self.device.raw_stream().cast()
    }

    /// Scratch memory for a launch: its address (null when none is needed).
    fn workspace(&mut self, bytes: usize) -> Result<*mut std::ffi::c_void> {
        if bytes == 0 {
            return Ok(std::ptr::null_mut());
        }
        Ok(self.workspace.at_least(bytes)?.mut_ptr(0).cast())
    }
}

/// The first member of every params struct.
fn struct_size<T>() -> u32 {
    size_of::<T>() as u32
}

/// A launcher's status as a result; `op` names the launcher.
fn check(op: &str, status: sys::dspark_status) -> Result<()> {
    const UNSUPPORTED: std::ops::Range<i32> = 100..200;
    if status == sys::DSPARK_OK {
        return Ok(());
    }
    let text = |pointer: *const std::ffi::c_char| {
        // SAFETY: both functions return a NUL-terminated string that stays valid until this thread's next call.
        unsafe { std::ffi::CStr::from_ptr(pointer) }
            .to_string_lossy()
            .into_owned()
    };
    // SAFETY: host functions without preconditions.
    let (name, message) = unsafe {
        (
            text(sys::launch::dspark_status_name_cu(status)),
            text(sys::launch::dspark_last_error_cu()),
        )
    };
    if UNSUPPORTED.contains(&status) {
        return Err(Error::Unsupported {
            what: op.to_owned(),
            reason: format!("{message} ({name})"),
        });
    }
    Err(Error::Cuda(format!("{op}: {message} ({name})")))
}

/// A size as the ABI's int32.
fn int(name: &str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::argument(name, "at most 2147483647", value))
}

/// Refuses `found != expected`, naming the operand.
fn expect(field: &str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::argument(field, expected.to_string(), found))
}

impl Ops for Cuda {
    type Mat = DeviceMatrix<bf16>;
    type Logits = Logits;
    type Weight = DeviceMatrix<bf16>;
    type Quantized = Quantized;
    type RowBounds = RowBounds;
    type TokenTable = DeviceMatrix<u32>;
    type Norm = Norm;
    type KvCache = KvCache;
    type Rows = Rows;
    type Rope = Rope;

    fn describe(&self) -> String {
        let name = self.device.name().unwrap_or_else(|_| "GPU".into());
        format!("CUDA:{} {name}", self.device.ordinal())
    }

    fn synchronize(&mut self) -> Result<()> {
        self.device.synchronize()
    }

    fn is_slow_at_first(&self) -> bool {
        true
    }

    fn weight(&mut self, parts: &[HostTensor<'_>]) -> Result<Self::Weight> {
        DeviceMatrix::from_parts(&self.device, parts)
    }

    fn quantize(&mut self, weight: &DeviceMatrix<bf16>) -> Result<Quantized> {
        Quantized::new(&self.device, weight)
    }

    fn row_bounds(&mut self, w2: &DeviceMatrix<bf16>) -> Result<RowBounds> {
        self.find_row_bounds(w2)
    }

    fn token_table(&mut self, tokens: &[u32], cols: usize) -> Result<DeviceMatrix<u32>> {
        let num_rows = super::check_token_table(tokens, cols)?;
        let mut table = DeviceMatrix::new(&self.device, num_rows, cols)?;
        table.write(tokens)?;
        Ok(table)
    }

    fn norm(&mut self, tensor: &HostTensor<'_>) -> Result<Self::Norm> {
        Norm::new(&self.device, tensor)
    }

    fn rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope> {
        Rope::new(&self.device, spec)
    }

    fn mat(&mut self, max_rows: usize, cols: usize) -> Result<Self::Mat> {
        DeviceMatrix::new(&self.device, max_rows, cols)
    }

    fn logits(&mut self, max_rows: usize, vocab_size: usize) -> Result<Self::Logits> {
        Logits::f32(&self.device, max_rows, vocab_size)
    }

    fn fixed_logits(&mut self, max_rows: usize, vocab_size: usize) -> Result<Self::Logits> {
        Logits::bf16(&self.device, max_rows, vocab_size)
    }

    fn kv_cache(&mut self, geometry: &KvGeometry) -> Result<Self::KvCache> {
        KvCache::new(&self.device, geometry, None)
    }

    fn kv_cache_e4m3(&mut self, geometry: &KvGeometry, scales: &KvScales) -> Result<Self::KvCache> {
        KvCache::new(&self.device, geometry, Some(scales))
    }

    fn rows(&mut self) -> Result<Self::Rows> {
        Rows::new(&self.device)
    }

    fn set_row_map(&mut self, rows: &mut Self::Rows, map: &RowMap) -> Result<()> {
        rows.set(map)
    }

    fn read_mat(&mut self, mat: &Self::Mat) -> Result<Vec<f32>> {
        Ok(mat.read()?.into_iter().map(bf16::to_f32).collect())
    }

    fn read_logits(&mut self, logits: &Self::Logits) -> Result<Vec<f32>> {
        logits.read()
    }

    fn write_mat(&mut self, values: &[f32], mat: &mut Self::Mat) -> Result<()> {
        let values: Vec<bf16> = values.iter().copied().map(bf16::from_f32).collect();
        mat.write(&values)
    }

    fn write_logits(&mut self, values: &[f32], logits: &mut Self::Logits) -> Result<()> {
        logits.write(values)
    }

    fn embed(&mut self, table: &Self::Weight, ids: &[u32], out: &mut Self::Mat) -> Result<()> {
        self.gather(table, "ids", ids, out)
    }

    fn gather_rows(&mut self, src: &Self::Mat, index: &[u32], out: &mut Self::Mat) -> Result<()> {
        self.gather(src, "index", index, out)
    }

    fn copy_into(
        &mut self,
        src: &Self::Mat,
        dst: &mut Self::Mat,
        dst_row: usize,
        dst_col: usize,
    ) -> Result<()> {
        self.copy_window(src, dst, [dst_row, dst_col])
    }

    fn copy_logits(
        &mut self,
        src: &Self::Logits,
        dst: &mut Self::Logits,
        first: usize,
        step: usize,
    ) -> Result<()> {
        self.scatter_logits(src, dst, first, step)
    }

    fn rms_norm(
        &mut self,
        x: &Self::Mat,
        weight: &Self::Norm,
        eps: f32,
        out: &mut Self::Mat,
    ) -> Result<()> {
        self.norm_rows(x, weight, eps, out)
    }

    fn add_rms_norm(
        &mut self,
        delta: &Self::Mat,
        residual: &mut Self::Mat,
        weight: &Self::Norm,
        eps: f32,
        out: &mut Self::Mat,
        tap: Option<(&mut Self::Mat, usize)>,
    ) -> Result<()> {
        self.add_norm_rows(delta, residual, weight, eps, out, tap)
    }

    fn linear(&mut self, x: &Self::Mat, weight: &Self::Weight, out: &mut Self::Mat) -> Result<()> {
        self.product(x, weight, out)
    }

    fn linear_logits(
        &mut self,
        x: &Self::Mat,
        weight: &Self::Weight,
        out: &mut Self::Logits,
    ) -> Result<()> {
        self.product_logits(x, weight, out)
    }

    fn silu_mul(&mut self, gate_up: &Self::Mat, out: &mut Self::Mat) -> Result<()> {
        self.gated_silu(gate_up, out)
    }

    fn qk_norm_rope(
        &mut self,
        spec: &AttentionSpec,
        qkv: &Self::Mat,
        norms: Option<(&Self::Norm, &Self::Norm)>,
        rope: &Self::Rope,
        rows: &Self::Rows,
        q_out: Option<&mut Self::Mat>,
        sink: KvSink<'_, Self>,
    ) -> Result<()> {
        self.rotate_and_append(spec, qkv, norms, rope, rows, q_out, sink)
    }

    fn verify_attention(
        &mut self,
        spec: &AttentionSpec,
        q: &Self::Mat,
        kv: &Self::KvCache,
        layer: usize,
        rows: &Self::Rows,
        out: &mut Self::Mat,
    ) -> Result<()> {
        self.attend(spec, q, (kv, layer), None, rows, out)
    }

    fn draft_attention(
        &mut self,
        spec: &AttentionSpec,
        q: &Self::Mat,
        kv: &Self::KvCache,
        layer: usize,
        block: &Self::Mat,
        rows: &Self::Rows,
        out: &mut Self::Mat,
    ) -> Result<()> {
        self.attend(spec, q, (kv, layer), Some(block), rows, out)
    }

    fn pass_key(&self, rows: &Self::Rows, work: u64) -> Option<PassKey> {
        self.key_of_pass(rows, work)
    }

    fn recorded(
        &mut self,
        key: Option<PassKey>,
        work: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<bool> {
        self.record_or_replay(key, work)
    }

    fn commit_tree(
        &mut self,
        kv: &mut Self::KvCache,
        rows: &Self::Rows,
        kept: &[u64],
    ) -> Result<()> {
        self.commit_rows(kv, rows, kept)
    }

    fn draft_full(
        &mut self,
        head: &DraftHead<Self>,
        logits: &Self::Logits,
        hidden: &Self::Mat,
        batch: &DraftBatch<'_>,
    ) -> Result<(Drafted, LowRankLaw)> {
        let walk = Walk {
            head,
            logits,
            hidden,
            batch,
        };
        self.run_full(&walk)
    }

    fn draft_candidates(
        &mut self,
        head: &DraftHead<Self>,
        logits: &Self::Logits,
        hidden: &Self::Mat,
        batch: &DraftBatch<'_>,
        num_top: usize,
    ) -> Result<(Drafted, SparseLaw)> {
        let walk = Walk {
            head,
            logits,
            hidden,
            batch,
        };
        self.run_candidates(&walk, num_top)
    }

    fn schedule(&mut self, inputs: &ScheduleInputs<'_>) -> Result<Option<Scheduled>> {
        self.schedule_if_many(inputs)
    }

    fn accept(&mut self, batch: &AcceptBatch<'_, Self>) -> Result<Accepted> {
        self.accept_drafts(batch)
    }
}
