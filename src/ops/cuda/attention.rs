//! Family attention: verification (causal over the cache) and draft (cache and the whole block).

use std::ptr::null;

use half::bf16;

use super::rows::Reach;
use super::{Cuda, DeviceMatrix, KvCache, Rows, check, expect, int, struct_size};
use crate::error::Result;
use crate::ops::{AttentionSpec, Matrix};
use crate::sys;

type Mat = DeviceMatrix<bf16>;

impl Cuda {
    /// Draft attention over `block` `[k | v]`, or verify attention without one.
    pub(super) fn attend(
        &mut self,
        spec: &AttentionSpec,
        q: &Mat,
        (kv, layer): (&KvCache, usize),
        block: Option<&Mat>,
        rows: &Rows,
        out: &mut Mat,
    ) -> Result<()> {
        let q_cols = spec.num_q_heads * spec.head_dim;
        let kv_cols = spec.num_kv_heads * spec.head_dim;
        expect("q.rows", rows.num_rows(), q.rows())?;
        expect("q.cols", q_cols, q.cols())?;
        expect("out.cols", q_cols, out.cols())?;
        kv.check(spec, layer)?;
        if let Some(block) = block {
            expect("block.rows", q.rows(), block.rows())?;
            expect("block.cols", 2 * kv_cols, block.cols())?;
            kv.expect_native()?;
        }
        let reach = if block.is_some() {
            Reach::Committed
        } else {
            Reach::CommittedAndRows
        };
        rows.check_pages(kv.geometry(), reach)?;
        out.set_rows(q.rows())?;
        if q.rows() == 0 {
            return Ok(());
        }
        let raw = rows.raw()?;
        let (k_cache, v_cache) = kv.layer(layer);
        let (k_scale, v_scale) = kv.scales(layer);
        let (page, slot, head) = kv.strides();
        let mut params = sys::dspark_attention_params {
            struct_size: struct_size::<sys::dspark_attention_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            num_rows: raw.num_rows,
            num_reqs: raw.num_reqs,
            max_rows_per_req: raw.max_rows_per_req,
            max_seq_len: raw.max_seq_len,
            num_q_heads: int("num_q_heads", spec.num_q_heads)?,
            num_kv_heads: int("num_kv_heads", spec.num_kv_heads)?,
            head_dim: int("head_dim", spec.head_dim)?,
            page_size: int("page_size", kv.geometry().page_size)?,
            max_pages_per_req: raw.max_pages_per_req,
            scale: spec.scale,
            q: q.ptr(0, 0).cast(),
            k_cache,
            v_cache,
            k_block: block.map_or(null(), |block| block.ptr(0, 0).cast()),
            v_block: block.map_or(null(), |block| block.ptr(0, kv_cols).cast()),
            qo_indptr: raw.qo_indptr,
            seq_lens: raw.seq_lens,
            page_table: raw.page_table,
            out: out.mut_ptr(0, 0).cast(),
            workspace: std::ptr::null_mut(),
            workspace_bytes: 0,
            stride_q_row: q.stride(),
            stride_out_row: out.stride(),
            stride_cache_page: page,
            stride_cache_slot: slot,
            stride_cache_head: head,
            stride_block_row: block.map_or(0, DeviceMatrix::stride),
            tree_mask: if block.is_some() {
                null()
            } else {
                raw.tree_mask
            },
            window: int("window", spec.window)?,
            softcap: spec.softcap,
            batch_invariant: i32::from(self.batch_invariant),
            kv_dtype: kv.dtype(),
            k_scale,
            v_scale,
        };
        // The size depends on the current device.
        self.device.bind()?;
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check("attention_workspace_size", unsafe {
            sys::launch::dspark_attention_workspace_size_cu(
                &raw const params,
                &raw mut params.workspace_bytes,
            )
        })?;
        params.workspace = self.workspace(params.workspace_bytes)?;
        // SAFETY: every operand is a live device matrix of the shape checked above, out distinct from the inputs by
        // Rust's borrows; the row map is consistent and has a page of the pool for every slot that will be read; the
        // workspace has the size asked for.
        let launched = unsafe {
            if block.is_some() {
                sys::launch::dspark_draft_attention_cu(&raw const params, self.stream())
            } else {
                sys::launch::dspark_verify_attention_cu(&raw const params, self.stream())
            }
        };
        check("attention", launched)
    }
}
