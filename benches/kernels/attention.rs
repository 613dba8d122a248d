//! Verification attention: requests x context, 8 rows each or 1 to 8, 32 query and 8 KV heads, pages of 16;
//! the same as trees, batch-invariant, and over keys of 8 bits; one long request among many short; the commit of trees.

use std::ffi::c_void;
use std::ptr::null;

use dspark::device::Buffer;
use dspark::sys;
use half::bf16;

use crate::commit;
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

/// What the requests of a pass look like.
struct Batch {
    /// Slots that the rows of each request end at.
    contexts: Vec<usize>,
    /// Rows of each request.
    rows: Vec<usize>,
    /// Whether row `i` hangs below row `(i - 1) / 2` instead of row `i - 1`.
    is_tree: bool,
    is_invariant: bool,
    /// Whether keys and values are e4m3, with a factor for each head.
    is_e4m3: bool,
}

impl Batch {
    fn chains(contexts: Vec<usize>, raggedness: Raggedness) -> Self {
        Self {
            rows: raggedness.rows(contexts.len()),
            contexts,
            is_tree: false,
            is_invariant: false,
            is_e4m3: false,
        }
    }

    fn run(&self, lab: &mut Lab, name: &str, head_dim: usize) -> anyhow::Result<()> {
        let num_rows: usize = self.rows.iter().sum();
        let slots: usize = self.contexts.iter().sum();
        let key_bytes = if self.is_e4m3 { 1 } else { size_of::<bf16>() };
        let cache = slots * 2 * NUM_KV_HEADS * head_dim * key_bytes;
        let q_and_out = 2 * num_rows * NUM_Q_HEADS * head_dim * size_of::<bf16>();
        let traffic = Traffic::once(cache + q_and_out);
        lab.case(name, traffic, |lab, copies| {
            VerifyAttention::new(lab, copies, head_dim, self)
        })
    }

    fn tree_masks(&self) -> Vec<u32> {
        let mut words = Vec::new();
        for &rows in &self.rows {
            let mut masks: Vec<u64> = Vec::new();
            for i in 0..rows {
                let parent = i.saturating_sub(1) / 2;
                masks.push(masks.get(parent).map_or(0, |mask| mask | 1 << parent));
            }
            words.extend(masks.iter().flat_map(|&m| [m as u32, (m >> 32) as u32]));
        }
        words
    }
}

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for head_dim in [128, 64, 256] {
        for (num_reqs, context) in SHAPES {
            let contexts = vec![context; num_reqs];
            for raggedness in [Raggedness::Full, Raggedness::Ragged] {
                let q = raggedness.name();
                let name = format!("D={head_dim} reqs={num_reqs} context={context} q={q}");
                Batch::chains(contexts.clone(), raggedness).run(lab, &name, head_dim)?;
            }
            if head_dim != 128 {
                continue;
            }
            let chains = Batch::chains(contexts, Raggedness::Full);
            let name = format!("D={head_dim} reqs={num_reqs} context={context} q=8");
            let tree = Batch {
                is_tree: true,
                contexts: chains.contexts.clone(),
                rows: chains.rows.clone(),
                ..chains
            };
            tree.run(lab, &format!("{name} tree"), head_dim)?;
            let invariant = Batch {
                is_invariant: true,
                ..chains
            };
            invariant.run(lab, &format!("{name} invariant"), head_dim)?;
            let e4m3 = Batch {
                is_invariant: false,
                is_e4m3: true,
                ..invariant
            };
            e4m3.run(lab, &format!("{name} e4m3"), head_dim)?;
        }
        let mut skewed = vec![512; 64];
        skewed[17] = 65_536;
        let name = format!("D={head_dim} reqs=64 context=512,one=65536 q=8");
        Batch::chains(skewed, Raggedness::Full).run(lab, &name, head_dim)?;
    }
    commit::run(lab)
}

/// Keys or values.
enum Cache {
    Bf16(Buffer<bf16>),
    E4m3(Buffer<u8>),
}

impl Cache {
    fn new(lab: &mut Lab, len: usize, is_e4m3: bool) -> anyhow::Result<Self> {
        /// Repeated; no multiple of a slot.
        const PATTERN_LEN: usize = (1 << 20) + 4096 + 16;
        if !is_e4m3 {
            return Ok(Self::Bf16(lab.normal_bf16(len, 1.0)?));
        }
        // Magnitudes up to 3.75, of either sign.
        let mut byte = || (lab.random.below(0x48) | lab.random.below(2) << 7) as u8;
        let pattern: Vec<u8> = (0..PATTERN_LEN).map(|_| byte()).collect();
        Ok(Self::E4m3(lab.tiled(len, &pattern)?))
    }

    fn ptr(&self, element: usize) -> *const c_void {
        match self {
            Self::Bf16(keys) => keys.ptr(element).cast(),
            Self::E4m3(keys) => keys.ptr(element).cast(),
        }
    }

    fn dtype(&self) -> sys::dspark_dtype {
        match self {
            Self::Bf16(_) => sys::DSPARK_DTYPE_BF16,
            Self::E4m3(_) => sys::DSPARK_DTYPE_E4M3,
        }
    }
}

struct VerifyAttention {
    stream: sys::dspark_stream,
    num_reqs: usize,
    num_rows: usize,
    head_dim: usize,
    num_slots: usize,
    max_context: usize,
    batch_invariant: bool,
    q: Buffer<bf16>,
    k_cache: Cache,
    v_cache: Cache,
    /// Of keys and of values in e4m3.
    scales: Option<Buffer<f32>>,
    out: Buffer<bf16>,
    qo_indptr: Buffer<i32>,
    seq_lens: Buffer<i32>,
    page_table: Buffer<i32>,
    tree_mask: Option<Buffer<u32>>,
    workspace: Buffer<u8>,
}

impl VerifyAttention {
    /// Requests on pages in random order.
    fn new(lab: &mut Lab, copies: usize, head_dim: usize, batch: &Batch) -> anyhow::Result<Self> {
        let num_reqs = batch.rows.len();
        let num_rows: usize = batch.rows.iter().sum();
        let num_slots: usize = batch.contexts.iter().sum();
        let max_context = batch.contexts.iter().copied().max().unwrap_or(0);
        let cache_len = num_slots * NUM_KV_HEADS * head_dim;
        let q_len = num_rows * NUM_Q_HEADS * head_dim;
        let mut qo_indptr = vec![0];
        let mut seq_lens = Vec::new();
        let mut page_table = Vec::new();
        let pages: Vec<i32> = lab.random.permutation(num_slots / PAGE_SIZE);
        let mut pages = pages.into_iter();
        for (&rows, &context) in batch.rows.iter().zip(&batch.contexts) {
            qo_indptr.push(qo_indptr[qo_indptr.len() - 1] + rows as i32);
            seq_lens.push((context - rows) as i32);
            page_table.extend(pages.by_ref().take(context / PAGE_SIZE));
            page_table.resize(seq_lens.len() * max_context / PAGE_SIZE, -1);
        }
        let tree_mask = if batch.is_tree {
            Some(lab.upload(&batch.tree_masks())?)
        } else {
            None
        };
        let mut work = Self {
            stream: lab.stream(),
            num_reqs,
            num_rows,
            head_dim,
            num_slots,
            max_context,
            batch_invariant: batch.is_invariant,
            q: lab.normal_bf16(copies * q_len, 1.0)?,
            k_cache: Cache::new(lab, copies * cache_len, batch.is_e4m3)?,
            v_cache: Cache::new(lab, copies * cache_len, batch.is_e4m3)?,
            scales: if batch.is_e4m3 {
                Some(lab.upload(&[0.5; NUM_KV_HEADS])?)
            } else {
                None
            },
            out: lab.empty(copies * q_len)?,
            qo_indptr: lab.upload(&qo_indptr)?,
            seq_lens: lab.upload(&seq_lens)?,
            page_table: lab.upload(&page_table)?,
            tree_mask,
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
        let cache = copy * self.num_slots * NUM_KV_HEADS * self.head_dim;
        let rows = copy * self.num_rows * NUM_Q_HEADS * self.head_dim;
        sys::dspark_attention_params {
            struct_size: struct_size::<sys::dspark_attention_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            num_rows: self.num_rows as i32,
            num_reqs: self.num_reqs as i32,
            max_rows_per_req: MAX_ROWS as i32,
            max_seq_len: self.max_context as i32,
            num_q_heads: NUM_Q_HEADS as i32,
            num_kv_heads: NUM_KV_HEADS as i32,
            head_dim: self.head_dim as i32,
            page_size: PAGE_SIZE as i32,
            max_pages_per_req: (self.max_context / PAGE_SIZE) as i32,
            scale: (self.head_dim as f32).sqrt().recip(),
            q: self.q.ptr(rows).cast(),
            k_cache: self.k_cache.ptr(cache),
            v_cache: self.v_cache.ptr(cache),
            k_block: null(),
            v_block: null(),
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
            tree_mask: match &self.tree_mask {
                Some(masks) => masks.ptr(0),
                None => null(),
            },
            window: 0,
            softcap: 0.0,
            batch_invariant: i32::from(self.batch_invariant),
            kv_dtype: self.k_cache.dtype(),
            k_scale: self.scales.as_ref().map_or(null(), |scales| scales.ptr(0)),
            v_scale: self.scales.as_ref().map_or(null(), |scales| scales.ptr(0)),
        }
    }
}

impl Work for VerifyAttention {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let params = self.params(copy);
        // SAFETY: every pointer is a window of a live buffer with the shape the params say; the page table names pages
        // of the copy's own cache, and seq_lens and rows stay within its slots.
        check(unsafe { sys::launch::dspark_verify_attention_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        inspect_output(&self.out, self.num_rows * NUM_Q_HEADS * self.head_dim)?;
        Ok(None)
    }
}
