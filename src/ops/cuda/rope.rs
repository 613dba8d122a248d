//! Family rope: per-head norms, rotary embedding and the append to the cache.

use std::ptr::{null, null_mut};

use half::bf16;

use super::rows::Reach;
use super::{Cuda, DeviceMatrix, Norm, Rows, check, expect, int, struct_size};
use crate::device::{Buffer, Device};
use crate::error::Result;
use crate::ops::{AttentionSpec, KvSink, Matrix, RopeSpec};
use crate::sys;

/// Uploaded rotary frequencies.
#[derive(Debug)]
pub struct Rope {
    inv_freq: Buffer<f32>,
    scale: f32,
}

impl Rope {
    pub(super) fn new(device: &Device, spec: &RopeSpec) -> Result<Self> {
        let mut inv_freq = Buffer::uninit(device, spec.inv_freq.len())?;
        inv_freq.upload(0, &spec.inv_freq)?;
        Ok(Self {
            inv_freq,
            scale: spec.scale,
        })
    }
}

impl Cuda {
    /// The method of the trait; see there.
    #[allow(clippy::too_many_arguments)] // as the trait has them
    pub(super) fn rotate_and_append(
        &mut self,
        spec: &AttentionSpec,
        qkv: &DeviceMatrix<bf16>,
        norms: Option<(&Norm, &Norm)>,
        rope: &Rope,
        rows: &Rows,
        q_out: Option<&mut DeviceMatrix<bf16>>,
        sink: KvSink<'_, Self>,
    ) -> Result<()> {
        let &AttentionSpec {
            num_q_heads,
            num_kv_heads,
            head_dim,
            ..
        } = spec;
        let q_heads = if q_out.is_some() { num_q_heads } else { 0 };
        expect("qkv.rows", rows.num_rows(), qkv.rows())?;
        expect(
            "qkv.cols",
            (q_heads + 2 * num_kv_heads) * head_dim,
            qkv.cols(),
        )?;
        expect("rope", head_dim / 2, rope.inv_freq.len())?;
        if let Some((q_norm, k_norm)) = norms {
            expect("q_norm", head_dim, q_norm.len())?;
            expect("k_norm", head_dim, k_norm.len())?;
        }
        let raw = rows.raw()?;
        let mut params = sys::dspark_qk_norm_rope_append_params {
            struct_size: struct_size::<sys::dspark_qk_norm_rope_append_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            num_rows: raw.num_rows,
            num_reqs: raw.num_reqs,
            num_q_heads: int("num_q_heads", q_heads)?,
            num_kv_heads: int("num_kv_heads", num_kv_heads)?,
            head_dim: int("head_dim", head_dim)?,
            page_size: 1,
            max_pages_per_req: raw.max_pages_per_req,
            eps: spec.norm_eps,
            rope_scale: rope.scale,
            qkv: qkv.ptr(0, 0).cast(),
            q_norm: norms.map_or(null(), |(q_norm, _)| q_norm.ptr().cast()),
            k_norm: norms.map_or(null(), |(_, k_norm)| k_norm.ptr().cast()),
            inv_freq: rope.inv_freq.ptr(0),
            positions: raw.positions,
            qo_indptr: raw.qo_indptr,
            seq_lens: raw.seq_lens,
            page_table: raw.page_table,
            q_out: null_mut(),
            k_cache: null_mut(),
            v_cache: null_mut(),
            k_out: null_mut(),
            v_out: null_mut(),
            stride_qkv_row: qkv.stride(),
            stride_q_out_row: (q_heads * head_dim) as i64,
            stride_kv_out_row: 0,
            stride_cache_page: 0,
            stride_cache_slot: 0,
            stride_cache_head: 0,
            kv_dtype: 0,
            reserved: 0,
            k_scale: null(),
            v_scale: null(),
        };
        if let Some(q_out) = q_out {
            expect("q_out.cols", num_q_heads * head_dim, q_out.cols())?;
            q_out.set_rows(qkv.rows())?;
            params.q_out = q_out.mut_ptr(0, 0).cast();
        }
        match sink {
            KvSink::Cache { kv, layer } => {
                kv.check(spec, layer)?;
                rows.check_pages(kv.geometry(), Reach::Append)?;
                params.page_size = int("page_size", kv.geometry().page_size)?;
                let (page, slot, head) = kv.strides();
                params.stride_cache_page = page;
                params.stride_cache_slot = slot;
                params.stride_cache_head = head;
                params.kv_dtype = kv.dtype();
                (params.k_scale, params.v_scale) = kv.scales(layer);
                (params.k_cache, params.v_cache) = kv.layer_mut(layer);
            }
            KvSink::Block(block) => {
                expect("block.cols", 2 * num_kv_heads * head_dim, block.cols())?;
                block.set_rows(qkv.rows())?;
                params.stride_kv_out_row = block.stride();
                params.k_out = block.mut_ptr(0, 0).cast();
                params.v_out = block.mut_ptr(0, num_kv_heads * head_dim).cast();
            }
        }
        if qkv.rows() == 0 {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: every operand is a live device matrix of the shape checked above, outputs distinct from inputs by
        // Rust's borrows; the row map is consistent (checked when set) and names only pages of the pool.
        check("qk_norm_rope", unsafe {
            sys::launch::dspark_qk_norm_rope_append_cu(&raw const params, self.stream())
        })
    }
}
