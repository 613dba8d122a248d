//! Verification attention: requests x context, 8 rows each or 1 to 8, 32 query and 8 KV heads, pages of 16.

use dspark::device::Buffer;
use dspark::sys;
use half::bf16;

use crate::lab::{Lab, Traffic, Work, check, inspect_output, struct_size};

const SHAPES: [(usize, usize); 10] = [
    (1, 1024),
    (1, 4096),
    (1, 32_768),
    (8, 1024),
    (8, 4096),
    (32, 1024),
    (32, 4096),
    (128, 1024),
    (128, 4096),
    (256, 512),
];
const NUM_Q_HEADS: usize = 32;
const NUM_KV_HEADS: usize = 8;
const PAGE_SIZE: usize = 16;
const MAX_ROWS: usize = 8;

/// Rows of the requests of a pass.
#[derive(Clone, Copy)]
enum Raggedness {
    Full,
    Ragged,
}

impl Raggedness {
    fn rows(self, num_reqs: usize) -> Vec<usize> {
        (0..num_reqs)
            .map(|r| match self {
                Self::Full => MAX_ROWS,
                Self::Ragged => 1 + r * 5 % MAX_ROWS,
            })
            .collect()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Full => "8",
            Self::Ragged => "1-8",
        }
    }
}

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for head_dim in [128, 64] {
        for (num_reqs, context) in SHAPES {
            for raggedness in [Raggedness::Full, Raggedness::Ragged] {
                let rows = raggedness.rows(num_reqs);
                let num_rows: usize = rows.iter().sum();
                let cache = num_reqs * context * 2 * NUM_KV_HEADS * head_dim;
                let q_and_out = 2 * num_rows * NUM_Q_HEADS * head_dim;
                let traffic = Traffic::once((cache + q_and_out) * size_of::<bf16>());
                let q = raggedness.name();
                let name = format!("D={head_dim} reqs={num_reqs} context={context} q={q}");
                lab.case(&name, traffic, |lab, copies| {
                    VerifyAttention::new(lab, copies, head_dim, context, &rows)
                })?;
            }
        }
    }
    Ok(())
}

struct VerifyAttention {
    stream: sys::dspark_stream,
    num_reqs: usize,
    num_rows: usize,
    head_dim: usize,
    context: usize,
    q: Buffer<bf16>,
    k_cache: Buffer<bf16>,
    v_cache: Buffer<bf16>,
    out: Buffer<bf16>,
    qo_indptr: Buffer<i32>,
    seq_lens: Buffer<i32>,
    page_table: Buffer<i32>,
    workspace: Buffer<u8>,
}

impl VerifyAttention {
    /// Requests whose rows end at slot `context`, on pages in random order.
    fn new(
        lab: &mut Lab,
        copies: usize,
        head_dim: usize,
        context: usize,
        rows: &[usize],
    ) -> anyhow::Result<Self> {
        let num_reqs = rows.len();
        let num_rows: usize = rows.iter().sum();
        let cache_len = num_reqs * context * NUM_KV_HEADS * head_dim;
        let q_len = num_rows * NUM_Q_HEADS * head_dim;
        let mut qo_indptr = vec![0];
        let mut seq_lens = Vec::new();
        for &rows in rows {
            qo_indptr.push(qo_indptr[qo_indptr.len() - 1] + rows as i32);
            seq_lens.push((context - rows) as i32);
        }
        let page_table = lab.random.permutation(num_reqs * context / PAGE_SIZE);
        let mut work = Self {
            stream: lab.stream(),
            num_reqs,
            num_rows,
            head_dim,
            context,
            q: lab.normal_bf16(copies * q_len, 1.0)?,
            k_cache: lab.normal_bf16(copies * cache_len, 1.0)?,
            v_cache: lab.normal_bf16(copies * cache_len, 1.0)?,
            out: lab.empty(copies * q_len)?,
            qo_indptr: lab.upload(&qo_indptr)?,
            seq_lens: lab.upload(&seq_lens)?,
            page_table: lab.upload(&page_table)?,
            workspace: lab.empty(0)?,
        };
        let mut bytes = 0;
        let params = work.params(0);
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_attention_workspace_size_cu(&raw const params, &raw mut bytes)
        })?;
        work.workspace = lab.empty(bytes)?;
        Ok(work)
    }

    fn params(&mut self, copy: usize) -> sys::dspark_attention_params {
        let cache = copy * self.num_reqs * self.context * NUM_KV_HEADS * self.head_dim;
        let rows = copy * self.num_rows * NUM_Q_HEADS * self.head_dim;
        sys::dspark_attention_params {
            struct_size: struct_size::<sys::dspark_attention_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            num_rows: self.num_rows as i32,
            num_reqs: self.num_reqs as i32,
            max_rows_per_req: MAX_ROWS as i32,
            max_seq_len: self.context as i32,
            num_q_heads: NUM_Q_HEADS as i32,
            num_kv_heads: NUM_KV_HEADS as i32,
            head_dim: self.head_dim as i32,
            page_size: PAGE_SIZE as i32,
            max_pages_per_req: (self.context / PAGE_SIZE) as i32,
            scale: (self.head_dim as f32).sqrt().recip(),
            q: self.q.ptr(rows).cast(),
            k_cache: self.k_cache.ptr(cache).cast(),
            v_cache: self.v_cache.ptr(cache).cast(),
            k_block: std::ptr::null(),
            v_block: std::ptr::null(),
            qo_indptr: self.qo_indptr.ptr(0),
            seq_lens: self.seq_lens.ptr(0),
            page_table: self.page_table.ptr(0),
            out: self.out.mut_ptr(rows).cast(),
            workspace: self.workspace.mut_ptr(0).cast(),
            workspace_bytes: self.workspace.len(),
            stride_q_row: (NUM_Q_HEADS * self.head_dim) as i64,
            stride_out_row: (NUM_Q_HEADS * self.head_dim) as i64,
            stride_cache_page: (PAGE_SIZE * NUM_KV_HEADS * self.head_dim) as i64,
            stride_cache_slot: (NUM_KV_HEADS * self.head_dim) as i64,
            stride_cache_head: self.head_dim as i64,
            stride_block_row: 0,
        }
    }
}

impl Work for VerifyAttention {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let params = self.params(copy);
        // SAFETY: every pointer is a window of a live buffer with the shape the params say; the page table names pages
        // of the copy's own cache, and seq_lens and rows stay within `context` slots.
        check(unsafe { sys::launch::dspark_verify_attention_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        inspect_output(&self.out, self.num_rows * NUM_Q_HEADS * self.head_dim)?;
        Ok(None)
    }
}
