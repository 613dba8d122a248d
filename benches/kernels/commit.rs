//! The commit of token trees: trees of 16 rows of which four drafts were accepted, none where it already stands, in all 36
//! layers of 8 KV heads of 128; pages of 16.

use dspark::device::Buffer;
use dspark::sys;
use half::bf16;

use crate::lab::{Lab, Traffic, Work, check, inspect_output, struct_size};

const NUM_LAYERS: usize = 36;
const NUM_KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const SLOT: usize = NUM_KV_HEADS * HEAD_DIM;
const PAGE_SIZE: usize = 16;
/// Of each request: its tree begins in the middle of the first.
const PAGES_PER_REQ: usize = 2;
const DRAFT_LEN: usize = 15;
/// Drafts that were accepted.
const ACCEPTED: [usize; 4] = [2, 5, 9, 14];

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for num_reqs in [1, 8, 32, 128] {
        // Keys and values, read and written.
        let moved = 2 * 2 * num_reqs * ACCEPTED.len() * NUM_LAYERS * SLOT;
        let traffic = Traffic::once(moved * size_of::<bf16>());
        let name = format!("commit_tree reqs={num_reqs} rows=16 accepted=4 layers={NUM_LAYERS}");
        lab.case(&name, traffic, |lab, copies| {
            CommitTree::new(lab, copies, num_reqs)
        })?;
    }
    Ok(())
}

struct CommitTree {
    stream: sys::dspark_stream,
    num_reqs: usize,
    accept_flags: Buffer<i32>,
    seq_lens: Buffer<i32>,
    page_table: Buffer<i32>,
    k_cache: Buffer<bf16>,
    v_cache: Buffer<bf16>,
}

impl CommitTree {
    fn new(lab: &mut Lab, copies: usize, num_reqs: usize) -> anyhow::Result<Self> {
        let flags: Vec<i32> = (0..DRAFT_LEN)
            .map(|draft| i32::from(ACCEPTED.contains(&draft)))
            .collect();
        let pages = lab.random.permutation(num_reqs * PAGES_PER_REQ);
        let len = copies * Self::layer_len(num_reqs) * NUM_LAYERS;
        Ok(Self {
            stream: lab.stream(),
            num_reqs,
            accept_flags: lab.upload(&flags.repeat(num_reqs))?,
            seq_lens: lab.upload(&vec![(PAGE_SIZE / 2) as i32; num_reqs])?,
            page_table: lab.upload(&pages)?,
            k_cache: lab.normal_bf16(len, 1.0)?,
            v_cache: lab.normal_bf16(len, 1.0)?,
        })
    }

    fn layer_len(num_reqs: usize) -> usize {
        num_reqs * PAGES_PER_REQ * PAGE_SIZE * SLOT
    }
}

impl Work for CommitTree {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let layer_len = Self::layer_len(self.num_reqs);
        let cache = copy * layer_len * NUM_LAYERS;
        let params = sys::dspark_commit_tree_params {
            struct_size: struct_size::<sys::dspark_commit_tree_params>(),
            kv_dtype: sys::DSPARK_DTYPE_BF16,
            num_reqs: self.num_reqs as i32,
            num_layers: NUM_LAYERS as i32,
            draft_len: DRAFT_LEN as i32,
            num_kv_heads: NUM_KV_HEADS as i32,
            head_dim: HEAD_DIM as i32,
            page_size: PAGE_SIZE as i32,
            max_pages_per_req: PAGES_PER_REQ as i32,
            reserved: 0,
            accept_flags: self.accept_flags.ptr(0),
            seq_lens: self.seq_lens.ptr(0),
            page_table: self.page_table.ptr(0),
            k_cache: self.k_cache.mut_ptr(cache).cast(),
            v_cache: self.v_cache.mut_ptr(cache).cast(),
            stride_cache_layer: layer_len as i64,
            stride_cache_page: (PAGE_SIZE * SLOT) as i64,
            stride_cache_slot: SLOT as i64,
            stride_cache_head: HEAD_DIM as i64,
        };
        // SAFETY: every pointer is a window of a live buffer with the shape the params say, and the page table names pages
        // of the copy's own cache for every slot of a request.
        check(unsafe { sys::launch::dspark_commit_tree_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        inspect_output(&self.k_cache, PAGE_SIZE * SLOT)?;
        Ok(None)
    }
}
