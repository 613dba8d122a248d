//! What of the attention family has no place in the layers yet: keys of 8 bits, and the commit of a token tree.
#![cfg(feature = "cuda")]

mod common;

use std::ptr::null;

use common::raw::{check, device, download, rounded, upload};
use common::{Rng, Tolerance, assert_close, round};
use dspark::device::{Buffer, Device};
use dspark::sys;
use half::bf16;

/// The e4m3 number that NaN-poisoned slots hold.
const NAN: u8 = 0x7f;

/// What an e4m3 number stands for.
fn decode(byte: u8) -> f32 {
    let exponent = i32::from(byte >> 3 & 15);
    let mantissa = f32::from(byte & 7) / 8.0;
    let size = match exponent {
        0 => mantissa * 2_f32.powi(-6),
        15 if byte & 7 == 7 => f32::NAN,
        _ => (1.0 + mantissa) * 2_f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

#[test]
fn the_decoder_knows_e4m3() {
    for (byte, value) in [
        (0x00, 0.0),
        (0x01, 2_f32.powi(-9)),
        (0x08, 2_f32.powi(-6)),
        (0x38, 1.0),
        (0x7e, 448.0),
        (0xb9, -1.125),
    ] {
        assert!((decode(byte) - value).abs() < 1e-9, "{byte:#x}");
    }
    assert!(decode(NAN).is_nan());
}

/// A pass of chains over a cache of e4m3 keys.
struct Pass {
    head_dim: usize,
    group_size: usize,
    page_size: usize,
    /// Rows, and slots that they end at, of every request.
    requests: Vec<(usize, usize)>,
    softcap: f32,
}

const NUM_KV_HEADS: usize = 2;

impl Pass {
    fn q_cols(&self) -> usize {
        NUM_KV_HEADS * self.group_size * self.head_dim
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
        for &(_, slots) in &self.requests {
            let own = slots.div_ceil(self.page_size);
            table.extend((0..self.max_pages()).map(|page| {
                if page < own {
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
        (page * self.page_size + slot % self.page_size) * NUM_KV_HEADS * self.head_dim
    }

    /// Random finite numbers in the slots that are in use, NaN elsewhere.
    fn cache(&self, rng: &mut Rng, table: &[i32], num_pages: usize) -> Vec<u8> {
        let slot_len = NUM_KV_HEADS * self.head_dim;
        let mut cache = vec![NAN; num_pages * self.page_size * slot_len];
        for (req, &(_, slots)) in self.requests.iter().enumerate() {
            for slot in 0..slots {
                let at = self.slot(table, req, slot);
                for byte in &mut cache[at..at + slot_len] {
                    // Magnitudes up to 3.75, of either sign.
                    *byte = (rng.below(0x48) | rng.below(2) << 7) as u8;
                }
            }
        }
        cache
    }

    /// The answer in f64.
    fn expected(
        &self,
        q: &[f32],
        table: &[i32],
        caches: [&[u8]; 2],
        scales: [&[f32]; 2],
    ) -> Vec<f32> {
        let mut out = vec![0.0; q.len()];
        let mut row = 0;
        for (req, &(rows, slots)) in self.requests.iter().enumerate() {
            for i in 0..rows {
                let visible = slots - rows + i + 1;
                for head in 0..NUM_KV_HEADS * self.group_size {
                    let kv_head = head / self.group_size;
                    let at = row * self.q_cols() + head * self.head_dim;
                    let value = |side: usize, slot: usize, d: usize| {
                        let place = self.slot(table, req, slot) + kv_head * self.head_dim + d;
                        f64::from(decode(caches[side][place])) * f64::from(scales[side][kv_head])
                    };
                    let scores: Vec<f64> = (0..visible)
                        .map(|slot| {
                            let dot: f64 = (0..self.head_dim)
                                .map(|d| f64::from(q[at + d]) * value(0, slot, d))
                                .sum();
                            let score = dot / (self.head_dim as f64).sqrt();
                            match f64::from(self.softcap) {
                                0.0 => score,
                                cap => cap * (score / cap).tanh(),
                            }
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::MIN, f64::max);
                    let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                    for d in 0..self.head_dim {
                        let sum: f64 = (0..visible)
                            .map(|slot| (scores[slot] - max).exp() * value(1, slot, d))
                            .sum();
                        out[at + d] = (sum / total) as f32;
                    }
                }
                row += 1;
            }
        }
        out
    }

    fn run(&self, device: &Device) {
        let mut rng = Rng::new(self.page_size as u64);
        let (table, num_pages) = self.page_table(&mut rng);
        let k = self.cache(&mut rng, &table, num_pages);
        let v = self.cache(&mut rng, &table, num_pages);
        let (k_scale, v_scale) = ([0.25_f32, 0.5], [2.0_f32, 0.125]);
        let q: Vec<f32> = rng.normals(self.num_rows() * self.q_cols(), 1.0);
        let q: Vec<f32> = q.into_iter().map(round).collect();
        let mut indptr = vec![0];
        for &(rows, _) in &self.requests {
            indptr.push(indptr.last().unwrap() + rows as i32);
        }
        let seq_lens: Vec<i32> = self.requests.iter().map(|r| (r.1 - r.0) as i32).collect();
        let max_rows = self.requests.iter().map(|r| r.0).max().unwrap();
        let max_slots = self.requests.iter().map(|r| r.1).max().unwrap();

        let gpu_q = upload(device, &rounded(&q));
        let (gpu_k, gpu_v) = (upload(device, &k), upload(device, &v));
        let scales = [upload(device, &k_scale), upload(device, &v_scale)];
        let lists = [&indptr, &seq_lens, &table].map(|list| upload(device, list));
        let mut out = upload(device, &vec![bf16::NAN; q.len()]);
        let slot_len = (NUM_KV_HEADS * self.head_dim) as i64;
        let mut params = sys::dspark_attention_params {
            struct_size: size_of::<sys::dspark_attention_params>() as u32,
            dtype: sys::DSPARK_DTYPE_BF16,
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
            k_cache: gpu_k.ptr(0).cast(),
            v_cache: gpu_v.ptr(0).cast(),
            k_block: null(),
            v_block: null(),
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
            stride_block_row: 0,
            tree_mask: null(),
            window: 0,
            softcap: self.softcap,
            batch_invariant: 0,
            kv_dtype: sys::DSPARK_DTYPE_E4M3,
            k_scale: scales[0].ptr(0),
            v_scale: scales[1].ptr(0),
        };
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
        check(unsafe { sys::launch::dspark_verify_attention_cu(&raw const params, stream) });
        device.synchronize().unwrap();
        let got: Vec<f32> = download(&out).into_iter().map(f32::from).collect();
        let want = self.expected(&q, &table, [&k, &v], [&k_scale, &v_scale]);
        let label = format!("{:?}", (self.head_dim, self.page_size, &self.requests));
        assert_close(
            &label,
            &got,
            &want,
            self.q_cols(),
            Tolerance::bf16(1.0 / 256.0),
        );
    }
}

#[test]
fn keys_of_eight_bits_are_attended_to() {
    let Some(device) = device() else { return };
    let ragged = vec![(1, 1), (8, 135), (0, 40), (5, 133), (16, 19), (3, 1032)];
    for (head_dim, group_size, page_size) in [
        (64, 3, 16),
        (128, 4, 16),
        (128, 16, 64),
        (256, 2, 32),
        (64, 4, 7),
        (128, 4, 1),
        (256, 4, 24),
    ] {
        for softcap in [0.0, 3.0] {
            let requests = ragged.clone();
            let pass = Pass {
                head_dim,
                group_size,
                page_size,
                requests,
                softcap,
            };
            pass.run(&device);
        }
    }
}

/// Slots of one request after a commit, by what is defined: slot `i` takes over the `i`-th accepted row.
fn committed(slots: &[u32], seq_len: usize, flags: &[i32]) -> Vec<u32> {
    let mut after = slots.to_vec();
    let accepted = flags.iter().enumerate().filter(|(_, flag)| **flag != 0);
    for (i, (draft, _)) in accepted.enumerate() {
        after[seq_len + 1 + i] = slots[seq_len + 1 + draft];
    }
    after
}

#[test]
fn accepted_rows_of_a_tree_move_together() {
    const LAYERS: usize = 3;
    const HEAD_DIM: usize = 64;
    const HEADS: usize = 3;
    const PAGES: usize = 12;
    let Some(device) = device() else { return };
    let mut rng = Rng::new(6);
    for (page_size, draft_len) in [(16, 9), (1, 2), (5, 30), (64, 63)] {
        let max_pages = (20 + 1 + draft_len as usize).div_ceil(page_size) + 1;
        let num_pages = PAGES.max(3 * max_pages);
        let mut order: Vec<i32> = (0..num_pages as i32).collect();
        rng.shuffle(&mut order);
        let table = &order[..3 * max_pages];
        let seq_lens = [0_i32, 20, 7];
        let mut flags: Vec<i32> = (0..3 * draft_len).map(|_| rng.below(2) as i32).collect();
        flags[..draft_len as usize].fill(1);
        let slot_len = HEADS * HEAD_DIM;
        let layer_len = num_pages * page_size * slot_len;
        // A slot's number in every element, so that a move of the wrong piece shows.
        let before: [Vec<u16>; 2] =
            [0, 1].map(|_| (0..LAYERS * layer_len).map(|_| rng.next() as u16).collect());
        let mut caches = before.each_ref().map(|cache| upload(&device, cache));
        let gpu_flags = upload(&device, &flags);
        let gpu_lens = upload(&device, &seq_lens);
        let gpu_table = upload(&device, table);
        let [k, v] = &mut caches;
        let params = sys::dspark_commit_tree_params {
            struct_size: size_of::<sys::dspark_commit_tree_params>() as u32,
            kv_dtype: sys::DSPARK_DTYPE_BF16,
            num_reqs: 3,
            num_layers: LAYERS as i32,
            draft_len,
            num_kv_heads: HEADS as i32,
            head_dim: HEAD_DIM as i32,
            page_size: page_size as i32,
            max_pages_per_req: max_pages as i32,
            reserved: 0,
            accept_flags: gpu_flags.ptr(0),
            seq_lens: gpu_lens.ptr(0),
            page_table: gpu_table.ptr(0),
            k_cache: k.mut_ptr(0).cast(),
            v_cache: v.mut_ptr(0).cast(),
            stride_cache_layer: layer_len as i64,
            stride_cache_page: (page_size * slot_len) as i64,
            stride_cache_slot: slot_len as i64,
            stride_cache_head: HEAD_DIM as i64,
        };
        let stream = device.raw_stream().cast();
        // SAFETY: every pointer is a live buffer with the shape the params say.
        check(unsafe { sys::launch::dspark_commit_tree_cu(&raw const params, stream) });
        device.synchronize().unwrap();
        for (cache, before) in caches.iter().zip(&before) {
            let after = download(cache);
            let mut want = before.clone();
            for (req, &seq_len) in seq_lens.iter().enumerate() {
                let num_slots = seq_len as usize + 1 + draft_len as usize;
                let place = |slot: usize| {
                    let page = table[req * max_pages + slot / page_size] as usize;
                    (page * page_size + slot % page_size) * slot_len
                };
                let slots: Vec<u32> = (0..num_slots as u32).collect();
                let own = &flags[req * draft_len as usize..][..draft_len as usize];
                for (slot, source) in committed(&slots, seq_len as usize, own)
                    .into_iter()
                    .enumerate()
                {
                    for layer in 0..LAYERS {
                        let from = layer * layer_len + place(source as usize);
                        let to = layer * layer_len + place(slot);
                        want[to..to + slot_len].copy_from_slice(&before[from..from + slot_len]);
                    }
                }
            }
            assert!(
                after == want,
                "page_size {page_size}, draft_len {draft_len}"
            );
        }
    }
}
