//! Attention that the layers have no place for yet: keys of 8 bits, rows and keys in f16.
#![cfg(feature = "cuda")]

mod common;

use std::ptr::null;

use common::raw::{check, device, download, upload};
use common::{Rng, Tolerance, assert_close};
use dspark::device::{Buffer, Device};
use dspark::ops::e4m3::decode;
use dspark::sys;
use half::{bf16, f16};

/// The e4m3 number that NaN-poisoned slots hold.
const NAN: u8 = 0x7f;

/// Which keys a row sees beside the committed ones.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// The rows of its request up to itself.
    Chain,
    /// Those above it in a tree in which row i hangs below row (i - 1) / 2.
    Tree,
    /// All rows of its block.
    Block,
}

impl Form {
    /// Whether row `i` sees row `j` of its request.
    fn sees(self, i: usize, j: usize) -> bool {
        match self {
            Self::Chain => j <= i,
            Self::Block => true,
            Self::Tree if j < i => i > 0 && self.sees((i - 1) / 2, j),
            Self::Tree => j == i,
        }
    }
}

/// Numbers of an ABI type, as bytes.
#[derive(Clone, Copy, Debug)]
struct Numbers(sys::dspark_dtype);

impl Numbers {
    fn size(self) -> usize {
        if self.0 == sys::DSPARK_DTYPE_E4M3 {
            1
        } else {
            2
        }
    }

    fn encode(self, values: &[f32]) -> Vec<u8> {
        let bytes = |value: &f32| match self.0 {
            sys::DSPARK_DTYPE_F16 => f16::from_f32(*value).to_le_bytes(),
            _ => bf16::from_f32(*value).to_le_bytes(),
        };
        values.iter().flat_map(bytes).collect()
    }

    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let pair = |pair: &[u8]| [pair[0], pair[1]];
        match self.0 {
            sys::DSPARK_DTYPE_E4M3 => bytes.iter().copied().map(decode).collect(),
            sys::DSPARK_DTYPE_F16 => bytes
                .chunks_exact(2)
                .map(|bytes| f16::from_le_bytes(pair(bytes)).to_f32())
                .collect(),
            _ => bytes
                .chunks_exact(2)
                .map(|bytes| bf16::from_le_bytes(pair(bytes)).to_f32())
                .collect(),
        }
    }

    /// Random finite numbers.
    fn random(self, rng: &mut Rng, len: usize) -> Vec<u8> {
        if self.0 == sys::DSPARK_DTYPE_E4M3 {
            // Magnitudes up to 3.75, of either sign.
            return (0..len)
                .map(|_| (rng.below(0x48) | rng.below(2) << 7) as u8)
                .collect();
        }
        self.encode(&rng.normals(len, 1.0))
    }

    /// What the comparison of attention allows: half a unit of these on the largest value, where the probabilities meet it.
    fn tolerance(self) -> Tolerance {
        match self.0 {
            sys::DSPARK_DTYPE_F16 => Tolerance::f16(1.0 / 1024.0),
            _ => Tolerance::bf16(1.0 / 256.0),
        }
    }
}

/// A pass over a cache that is NaN wherever no key is.
#[derive(Clone, Debug)]
struct Pass {
    head_dim: usize,
    group_size: usize,
    page_size: usize,
    /// Rows, and slots that they end at, of every request.
    requests: Vec<(usize, usize)>,
    softcap: f32,
    /// 0: none. Pages that lie before the windows of all rows are holes.
    window: usize,
    /// Requests that have no page at all: their rows see nothing of the cache.
    unmapped: Vec<usize>,
    form: Form,
    rows: Numbers,
    keys: Numbers,
}

const NUM_KV_HEADS: usize = 2;

/// Keys and values, and what they are multiplied by.
struct Keys {
    table: Vec<i32>,
    /// K and V in the cache, as bytes and as numbers; of the draft block, behind each other by row.
    caches: [Vec<u8>; 2],
    blocks: [Vec<u8>; 2],
    scales: [[f32; NUM_KV_HEADS]; 2],
}

impl Pass {
    fn q_cols(&self) -> usize {
        NUM_KV_HEADS * self.group_size * self.head_dim
    }

    fn slot_len(&self) -> usize {
        NUM_KV_HEADS * self.head_dim
    }

    fn num_rows(&self) -> usize {
        self.requests.iter().map(|&(rows, _)| rows).sum()
    }

    fn max_pages(&self) -> usize {
        let pages = self
            .requests
            .iter()
            .map(|r| r.1.div_ceil(self.page_size) + 1);
        pages.max().unwrap()
    }

    /// Pages in random order; -1 where a request has none.
    fn page_table(&self, rng: &mut Rng) -> (Vec<i32>, usize) {
        let mut table = Vec::new();
        let mut num_pages = 0;
        for (req, &(rows, slots)) in self.requests.iter().enumerate() {
            let own = if self.unmapped.contains(&req) {
                0
            } else {
                slots.div_ceil(self.page_size)
            };
            let hidden = match self.window {
                0 => 0,
                window => (slots - rows + 1).saturating_sub(window),
            };
            table.extend((0..self.max_pages()).map(|page| {
                if page < own && (page + 1) * self.page_size > hidden {
                    (num_pages + page) as i32
                } else {
                    -1
                }
            }));
            num_pages += own;
        }
        let mut order: Vec<i32> = (0..num_pages as i32).collect();
        rng.shuffle(&mut order);
        let shuffled = table.iter().map(|&page| match page {
            -1 => -1,
            page => order[page as usize],
        });
        (shuffled.collect(), num_pages)
    }

    /// Elements before a slot's first head.
    fn slot(&self, table: &[i32], req: usize, slot: usize) -> usize {
        let page = table[req * self.max_pages() + slot / self.page_size] as usize;
        (page * self.page_size + slot % self.page_size) * self.slot_len()
    }

    /// Slots of the cache that a request may look at.
    fn cached(&self, (rows, slots): (usize, usize)) -> usize {
        if self.form == Form::Block {
            slots - rows
        } else {
            slots
        }
    }

    fn keys(&self, rng: &mut Rng) -> Keys {
        let (table, num_pages) = self.page_table(rng);
        let size = self.keys.size();
        let len = num_pages.max(1) * self.page_size * self.slot_len();
        let nan = match self.keys.0 {
            sys::DSPARK_DTYPE_E4M3 => vec![NAN; len],
            _ => self.keys.encode(&vec![f32::NAN; len]),
        };
        let caches = [(); 2].map(|()| {
            let mut cache = nan.clone();
            for (req, &request) in self.requests.iter().enumerate() {
                for slot in 0..self.cached(request) {
                    if table[req * self.max_pages() + slot / self.page_size] < 0 {
                        continue;
                    }
                    let at = self.slot(&table, req, slot) * size;
                    let values = self.keys.random(rng, self.slot_len());
                    cache[at..at + values.len()].copy_from_slice(&values);
                }
            }
            cache
        });
        let blocks = [(); 2].map(|()| self.rows.random(rng, self.num_rows() * self.slot_len()));
        let scales = match self.keys.0 {
            sys::DSPARK_DTYPE_E4M3 => [[0.25, 0.5], [2.0, 0.125]],
            _ => [[1.0; NUM_KV_HEADS]; 2],
        };
        Keys {
            table,
            caches,
            blocks,
            scales,
        }
    }

    /// The answer in f64.
    fn expected(&self, q: &[f32], keys: &Keys) -> Vec<f32> {
        let caches = keys.caches.each_ref().map(|cache| self.keys.decode(cache));
        let blocks = keys.blocks.each_ref().map(|block| self.rows.decode(block));
        let mut out = vec![0.0; q.len()];
        let mut first = 0;
        for (req, &(rows, slots)) in self.requests.iter().enumerate() {
            // K or V of the head at `place`, a slot of the request or, past the cached ones, a row of its block.
            let head = |side: usize, slot: usize, kv_head: usize| {
                let in_slot = kv_head * self.head_dim;
                if slot < self.cached((rows, slots)) {
                    let at = self.slot(&keys.table, req, slot) + in_slot;
                    (
                        &caches[side][at..][..self.head_dim],
                        keys.scales[side][kv_head],
                    )
                } else {
                    let at = (first + slot - (slots - rows)) * self.slot_len() + in_slot;
                    (&blocks[side][at..][..self.head_dim], 1.0)
                }
            };
            for i in 0..rows {
                let committed = slots - rows;
                let visible: Vec<usize> = (0..slots)
                    .filter(|&slot| slot < committed || self.form.sees(i, slot - committed))
                    .filter(|&slot| self.is_within(i, committed, slot))
                    .filter(|&slot| {
                        slot >= self.cached((rows, slots)) || !self.unmapped.contains(&req)
                    })
                    .collect();
                for q_head in 0..NUM_KV_HEADS * self.group_size {
                    let kv_head = q_head / self.group_size;
                    let at = (first + i) * self.q_cols() + q_head * self.head_dim;
                    let scores: Vec<f64> = visible
                        .iter()
                        .map(|&slot| self.score(&q[at..][..self.head_dim], head(0, slot, kv_head)))
                        .collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                    let mut sums = vec![0.0; self.head_dim];
                    for (&slot, score) in visible.iter().zip(&scores) {
                        let (values, scale) = head(1, slot, kv_head);
                        let weight = (score - max).exp() / total * f64::from(scale);
                        for (sum, &value) in sums.iter_mut().zip(values) {
                            *sum += weight * f64::from(value);
                        }
                    }
                    for (out, sum) in out[at..].iter_mut().zip(sums) {
                        *out = sum as f32;
                    }
                }
            }
            first += rows;
        }
        out
    }

    /// Whether a slot that row `i` sees is in its window, if that slot is one of the cache's.
    fn is_within(&self, i: usize, committed: usize, slot: usize) -> bool {
        let above = match self.form {
            Form::Tree => (0..i).filter(|&j| self.form.sees(i, j)).count(),
            _ => i,
        };
        let of_block = self.form == Form::Block && slot >= committed;
        self.window == 0 || of_block || slot + self.window > committed + above
    }

    fn score(&self, q: &[f32], (key, scale): (&[f32], f32)) -> f64 {
        let products = q
            .iter()
            .zip(key)
            .map(|(&q, &k)| f64::from(q) * f64::from(k));
        let dot = products.sum::<f64>() * f64::from(scale);
        let score = dot / (self.head_dim as f64).sqrt();
        match f64::from(self.softcap) {
            0.0 => score,
            cap => cap * (score / cap).tanh(),
        }
    }

    fn tree_mask(&self) -> Vec<u32> {
        let rows = self.requests.iter().flat_map(|&(rows, _)| 0..rows);
        rows.flat_map(|i| {
            let above = (0..i).filter(|&j| self.form.sees(i, j));
            let mask = above.fold(0_u64, |mask, j| mask | 1 << j);
            [mask as u32, (mask >> 32) as u32]
        })
        .collect()
    }

    fn run(&self, device: &Device) {
        let mut rng = Rng::new(self.page_size as u64);
        let keys = self.keys(&mut rng);
        let q = self.rows.random(&mut rng, self.num_rows() * self.q_cols());
        let mut indptr = vec![0];
        for &(rows, _) in &self.requests {
            indptr.push(indptr.last().unwrap() + rows as i32);
        }
        let seq_lens: Vec<i32> = self.requests.iter().map(|r| (r.1 - r.0) as i32).collect();
        let max_rows = self.requests.iter().map(|r| r.0).max().unwrap();
        let max_slots = self.requests.iter().map(|r| r.1).max().unwrap();

        let gpu_q = upload(device, &q);
        let caches = keys.caches.each_ref().map(|cache| upload(device, cache));
        let blocks = keys.blocks.each_ref().map(|block| upload(device, block));
        let scales = keys.scales.each_ref().map(|scales| upload(device, scales));
        let lists = [&indptr, &seq_lens, &keys.table].map(|list| upload(device, list));
        let tree_mask = upload(device, &self.tree_mask());
        let poison = self.rows.encode(&vec![f32::NAN; q.len() / 2]);
        let mut out = upload(device, &poison);
        let block = |side: usize| match self.form {
            Form::Block => blocks[side].ptr(0).cast(),
            _ => null(),
        };
        let slot_len = self.slot_len() as i64;
        let mut params = sys::dspark_attention_params {
            struct_size: size_of::<sys::dspark_attention_params>() as u32,
            dtype: self.rows.0,
            num_rows: self.num_rows() as i32,
            num_reqs: self.requests.len() as i32,
            max_rows_per_req: max_rows as i32,
            max_seq_len: max_slots as i32,
            num_q_heads: (NUM_KV_HEADS * self.group_size) as i32,
            num_kv_heads: NUM_KV_HEADS as i32,
            head_dim: self.head_dim as i32,
            page_size: self.page_size as i32,
            max_pages_per_req: self.max_pages() as i32,
            scale: (self.head_dim as f32).sqrt().recip(),
            q: gpu_q.ptr(0).cast(),
            k_cache: caches[0].ptr(0).cast(),
            v_cache: caches[1].ptr(0).cast(),
            k_block: block(0),
            v_block: block(1),
            qo_indptr: lists[0].ptr(0),
            seq_lens: lists[1].ptr(0),
            page_table: lists[2].ptr(0),
            out: out.mut_ptr(0).cast(),
            workspace: std::ptr::null_mut(),
            workspace_bytes: 0,
            stride_q_row: self.q_cols() as i64,
            stride_out_row: self.q_cols() as i64,
            stride_cache_page: slot_len * self.page_size as i64,
            stride_cache_slot: slot_len,
            stride_cache_head: self.head_dim as i64,
            stride_block_row: slot_len,
            tree_mask: match self.form {
                Form::Tree => tree_mask.ptr(0),
                _ => null(),
            },
            window: self.window as i32,
            softcap: self.softcap,
            batch_invariant: 0,
            kv_dtype: self.keys.0,
            k_scale: scales[0].ptr(0),
            v_scale: scales[1].ptr(0),
        };
        if self.keys.0 != sys::DSPARK_DTYPE_E4M3 {
            (params.k_scale, params.v_scale) = (null(), null());
        }
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_attention_workspace_size_cu(
                &raw const params,
                &raw mut params.workspace_bytes,
            )
        });
        let mut workspace: Buffer<u8> =
            Buffer::zeros(device, params.workspace_bytes.max(1)).unwrap();
        params.workspace = workspace.mut_ptr(0).cast();
        let stream = device.raw_stream().cast();
        // SAFETY: every pointer is a live buffer with the shape the params say.
        check(unsafe {
            if self.form == Form::Block {
                sys::launch::dspark_draft_attention_cu(&raw const params, stream)
            } else {
                sys::launch::dspark_verify_attention_cu(&raw const params, stream)
            }
        });
        device.synchronize().unwrap();
        let got = self.rows.decode(&download(&out));
        let want = self.expected(&self.rows.decode(&q), &keys);
        let label = format!("{self:?}");
        assert_close(&label, &got, &want, self.q_cols(), self.rows.tolerance());
    }
}

/// Head sizes, group sizes and page sizes that take every path.
const SHAPES: [(usize, usize, usize); 7] = [
    (64, 3, 16),
    (128, 4, 16),
    (128, 16, 64),
    (256, 2, 32),
    (64, 4, 7),
    (128, 4, 1),
    (256, 4, 24),
];

/// Every shape with and without a cap and a window, of these types.
fn run_all(device: &Device, form: Form, rows: sys::dspark_dtype, keys: sys::dspark_dtype) {
    let ragged = vec![(1, 1), (8, 135), (0, 40), (5, 133), (16, 19), (3, 1032)];
    for (head_dim, group_size, page_size) in SHAPES {
        for (softcap, window) in [(0.0, 0), (3.0, 0), (0.0, 64), (0.0, 101)] {
            let pass = Pass {
                head_dim,
                group_size,
                page_size,
                requests: ragged.clone(),
                softcap,
                window,
                unmapped: Vec::new(),
                form,
                rows: Numbers(rows),
                keys: Numbers(keys),
            };
            pass.run(device);
        }
    }
}

#[test]
fn keys_of_eight_bits_are_attended_to() {
    let Some(device) = device() else { return };
    for rows in [sys::DSPARK_DTYPE_BF16, sys::DSPARK_DTYPE_F16] {
        run_all(&device, Form::Chain, rows, sys::DSPARK_DTYPE_E4M3);
        run_all(&device, Form::Tree, rows, sys::DSPARK_DTYPE_E4M3);
    }
}

#[test]
fn rows_and_keys_in_f16_are_attended_to() {
    let Some(device) = device() else { return };
    let dtype = sys::DSPARK_DTYPE_F16;
    for form in [Form::Chain, Form::Tree, Form::Block] {
        run_all(&device, form, dtype, dtype);
    }
}

/// As the test above, so little that compute-sanitizer's racecheck ends.
#[test]
fn a_small_pass_in_f16_is_attended_to() {
    let Some(device) = device() else { return };
    for (head_dim, requests) in [(128, vec![(3, 70), (8, 135)]), (256, vec![(2, 90)])] {
        let pass = Pass {
            head_dim,
            group_size: 4,
            page_size: 16,
            requests,
            softcap: 0.0,
            window: 0,
            unmapped: Vec::new(),
            form: Form::Chain,
            rows: Numbers(sys::DSPARK_DTYPE_F16),
            keys: Numbers(sys::DSPARK_DTYPE_F16),
        };
        pass.run(&device);
    }
}

/// Rows that see no key at all are zeros, whatever the workspace and the output held before.
#[test]
fn rows_that_see_nothing_are_zeros() {
    let Some(device) = device() else { return };
    for (head_dim, group_size, page_size) in SHAPES {
        for (dtype, form) in [
            (sys::DSPARK_DTYPE_BF16, Form::Chain),
            (sys::DSPARK_DTYPE_BF16, Form::Tree),
            (sys::DSPARK_DTYPE_E4M3, Form::Chain),
        ] {
            // One alone, long and short; and some among others.
            for (requests, unmapped) in [
                (vec![(1, 1)], vec![0]),
                (vec![(7, 1100)], vec![0]),
                (vec![(2, 300), (8, 135), (5, 5), (3, 600)], vec![0, 2]),
            ] {
                let pass = Pass {
                    head_dim,
                    group_size,
                    page_size,
                    requests,
                    softcap: 0.0,
                    window: 0,
                    unmapped,
                    form,
                    rows: Numbers(sys::DSPARK_DTYPE_BF16),
                    keys: Numbers(dtype),
                };
                pass.run(&device);
            }
        }
    }
}
