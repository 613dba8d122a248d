//! The append into a cache of 8 bits through its launcher, to the bit: what a cache of 16 bits gets in the same pass, over
//! the head's factor, rounded once more.
#![cfg(feature = "cuda")]

mod common;

use std::ptr::null;

use common::Rng;
use common::raw::{check, device, download, upload};
use dspark::device::{Buffer, Device};
use dspark::ops::e4m3;
use dspark::sys;
use half::{bf16, f16};

/// What slots that nothing was appended to hold.
const UNTOUCHED: u8 = 0xa5;

/// A pass of ragged requests, some of whose slots have no page.
struct Pass {
    dtype: sys::dspark_dtype,
    head_dim: usize,
    num_q_heads: usize,
    num_kv_heads: usize,
    page_size: usize,
    /// Rows and committed slots of each request.
    requests: Vec<(usize, usize)>,
    with_norms: bool,
}

/// Everything a launch wrote.
#[derive(PartialEq)]
struct Written {
    k_cache: Vec<u8>,
    v_cache: Vec<u8>,
    k_out: Vec<u16>,
    v_out: Vec<u16>,
    q_out: Vec<u16>,
}

/// How the cache is described to the launcher.
#[derive(Clone, Copy, PartialEq)]
enum Keys {
    /// `kv_dtype` 0, in the struct of a caller that ends before it.
    Old,
    /// `kv_dtype` as `dtype`.
    Same,
    E4m3,
}

impl Keys {
    fn size(self) -> usize {
        if self == Self::E4m3 { 1 } else { 2 }
    }
}

/// The device's copies of what a pass reads.
struct Inputs {
    qkv: Buffer<u16>,
    norm: Buffer<u16>,
    inv_freq: Buffer<f32>,
    positions: Buffer<i32>,
    qo_indptr: Buffer<i32>,
    seq_lens: Buffer<i32>,
    page_table: Buffer<i32>,
    k_scale: Buffer<f32>,
    v_scale: Buffer<f32>,
}

impl Pass {
    fn num_rows(&self) -> usize {
        self.requests.iter().map(|&(rows, _)| rows).sum()
    }

    fn max_pages(&self) -> usize {
        let slots = self.requests.iter().map(|&(rows, len)| rows + len).max();
        slots.unwrap_or(0).div_ceil(self.page_size)
    }

    fn num_pages(&self) -> usize {
        self.max_pages() * self.requests.len()
    }

    fn kv_cols(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    fn number(&self, value: f32) -> u16 {
        match self.dtype {
            sys::DSPARK_DTYPE_F16 => f16::from_f32(value).to_bits(),
            _ => bf16::from_f32(value).to_bits(),
        }
    }

    fn value(&self, bits: u16) -> f32 {
        match self.dtype {
            sys::DSPARK_DTYPE_F16 => f16::from_bits(bits).to_f32(),
            _ => bf16::from_bits(bits).to_f32(),
        }
    }

    /// A page for each place of each request, in no order; the last place of the first request has none.
    fn pages(&self) -> Vec<i32> {
        let mut pages: Vec<i32> = (0..self.num_pages() as i32).collect();
        Rng::new(17).shuffle(&mut pages);
        if let Some(last) = pages.get_mut(self.max_pages().saturating_sub(1)) {
            *last = -1;
        }
        pages
    }

    /// Numbers of every size that 16 bits have, and in every third row those that no e4m3 number stands for: a head with
    /// one of these has nothing else after its norm.
    fn qkv(&self) -> Vec<u16> {
        let mut rng = Rng::new(29);
        let specials = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let cols = self.num_q_heads * self.head_dim + 2 * self.kv_cols();
        let mut number = |is_special: bool| match rng.below(40) {
            i if is_special && i < specials.len() => specials[i],
            _ => rng.normal() * 2_f32.powi(rng.below(24) as i32 - 14),
        };
        (0..self.num_rows() * cols)
            .map(|i| self.number(number(i / cols % 3 == 0)))
            .collect()
    }

    fn scales(&self, first: f32) -> Vec<f32> {
        (0..self.num_kv_heads)
            .map(|head| first * (1.0 + 0.37 * head as f32))
            .collect()
    }

    fn inputs(&self, device: &Device) -> Inputs {
        let mut sums = vec![0];
        let (mut positions, mut seq_lens) = (Vec::new(), Vec::new());
        for &(rows, len) in &self.requests {
            sums.push(sums[sums.len() - 1] + rows as i32);
            positions.extend((len..len + rows).map(|position| position as i32));
            seq_lens.push(len as i32);
        }
        let inv_freq: Vec<f32> = (0..self.head_dim / 2)
            .map(|i| 1e4_f32.powf(-2.0 * i as f32 / self.head_dim as f32))
            .collect();
        let norm: Vec<u16> = (0..self.head_dim)
            .map(|i| self.number(0.5 + (i % 7) as f32))
            .collect();
        Inputs {
            qkv: upload(device, &self.qkv()),
            norm: upload(device, &norm),
            inv_freq: upload(device, &inv_freq),
            positions: upload(device, &positions),
            qo_indptr: upload(device, &sums),
            seq_lens: upload(device, &seq_lens),
            page_table: upload(device, &self.pages()),
            k_scale: upload(device, &self.scales(0.019)),
            v_scale: upload(device, &self.scales(0.25)),
        }
    }

    fn run(&self, device: &Device, keys: Keys) -> Written {
        let inputs = self.inputs(device);
        let (rows, cols) = (self.num_rows(), self.kv_cols());
        let cache_len = self.num_pages() * self.page_size * cols * keys.size();
        let mut caches = [(); 2].map(|()| upload(device, &vec![UNTOUCHED; cache_len]));
        let mut outs = [cols, cols, self.num_q_heads * self.head_dim]
            .map(|cols| Buffer::<u16>::zeros(device, rows * cols).expect("memory"));
        let [k_cache, v_cache] = &mut caches;
        let [k_out, v_out, q_out] = &mut outs;
        let norm = if self.with_norms {
            inputs.norm.ptr(0).cast()
        } else {
            null()
        };
        let mut params = sys::dspark_qk_norm_rope_append_params {
            struct_size: size_of::<sys::dspark_qk_norm_rope_append_params>() as u32,
            dtype: self.dtype,
            num_rows: rows as i32,
            num_reqs: self.requests.len() as i32,
            num_q_heads: self.num_q_heads as i32,
            num_kv_heads: self.num_kv_heads as i32,
            head_dim: self.head_dim as i32,
            page_size: self.page_size as i32,
            max_pages_per_req: self.max_pages() as i32,
            eps: 1e-6,
            rope_scale: 1.0,
            qkv: inputs.qkv.ptr(0).cast(),
            q_norm: norm,
            k_norm: norm,
            inv_freq: inputs.inv_freq.ptr(0),
            positions: inputs.positions.ptr(0),
            qo_indptr: inputs.qo_indptr.ptr(0),
            seq_lens: inputs.seq_lens.ptr(0),
            page_table: inputs.page_table.ptr(0),
            q_out: q_out.mut_ptr(0).cast(),
            k_cache: k_cache.mut_ptr(0).cast(),
            v_cache: v_cache.mut_ptr(0).cast(),
            k_out: k_out.mut_ptr(0).cast(),
            v_out: v_out.mut_ptr(0).cast(),
            stride_qkv_row: (self.num_q_heads * self.head_dim + 2 * cols) as i64,
            stride_q_out_row: (self.num_q_heads * self.head_dim) as i64,
            stride_kv_out_row: cols as i64,
            stride_cache_page: (self.page_size * cols) as i64,
            stride_cache_slot: cols as i64,
            stride_cache_head: self.head_dim as i64,
            kv_dtype: 0,
            reserved: 0,
            k_scale: null(),
            v_scale: null(),
        };
        match keys {
            Keys::Old => {
                let end = std::mem::offset_of!(sys::dspark_qk_norm_rope_append_params, kv_dtype);
                params.struct_size = end as u32;
                // Beyond the struct, as far as the launcher knows.
                params.kv_dtype = 77;
            }
            Keys::Same => params.kv_dtype = self.dtype,
            Keys::E4m3 => {
                params.kv_dtype = sys::DSPARK_DTYPE_E4M3;
                params.k_scale = inputs.k_scale.ptr(0);
                params.v_scale = inputs.v_scale.ptr(0);
            }
        }
        // SAFETY: every pointer is a live buffer of the shape that the params say, and the page table names pages of
        // the caches.
        check(unsafe {
            sys::launch::dspark_qk_norm_rope_append_cu(
                &raw const params,
                device.raw_stream().cast(),
            )
        });
        device.synchronize().expect("the launch went well");
        Written {
            k_cache: download(k_cache),
            v_cache: download(v_cache),
            k_out: download(k_out),
            v_out: download(v_out),
            q_out: download(q_out),
        }
    }

    /// The cache of 8 bits that belongs to `out [num_rows, kv_cols]`.
    fn want(&self, out: &[u16], scales: &[f32]) -> Vec<u8> {
        let cols = self.kv_cols();
        let mut cache = vec![UNTOUCHED; self.num_pages() * self.page_size * cols];
        let pages = self.pages();
        let mut rows = out.chunks_exact(cols);
        for (r, &(num_rows, len)) in self.requests.iter().enumerate() {
            for slot in len..len + num_rows {
                let row = rows.next().expect("as many rows");
                let page = pages[r * self.max_pages() + slot / self.page_size];
                let Ok(page) = usize::try_from(page) else {
                    continue;
                };
                let at = (page * self.page_size + slot % self.page_size) * cols;
                for (i, &bits) in row.iter().enumerate() {
                    cache[at + i] = e4m3::encode(self.value(bits) / scales[i / self.head_dim]);
                }
            }
        }
        cache
    }
}

/// The same but for the sign of what is no number.
fn assert_same(label: &str, got: &[u8], want: &[u8]) {
    let is_nan = |byte: u8| byte & 0x7f == 0x7f;
    assert_eq!(got.len(), want.len(), "{label}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        assert!(
            got == want || (is_nan(got) && is_nan(want)),
            "{label}: byte {i}: got {got:#04x}, want {want:#04x}"
        );
    }
}

fn passes() -> Vec<Pass> {
    let shapes = [
        (64, 9, 3, 16),
        (128, 8, 2, 1),
        (256, 2, 1, 7),
        (128, 0, 5, 64),
    ];
    let mut passes = Vec::new();
    for dtype in [sys::DSPARK_DTYPE_BF16, sys::DSPARK_DTYPE_F16] {
        for (head_dim, num_q_heads, num_kv_heads, page_size) in shapes {
            for with_norms in [false, true] {
                passes.push(Pass {
                    dtype,
                    head_dim,
                    num_q_heads,
                    num_kv_heads,
                    page_size,
                    requests: vec![(3, 127), (0, 9), (1, 0), (8, 61), (5, 64)],
                    with_norms,
                });
            }
        }
    }
    passes
}

#[test]
fn an_e4m3_cache_holds_the_16_bit_cache_over_its_factors() {
    let Some(device) = device() else { return };
    for pass in passes() {
        let label = format!(
            "{} x {}, dtype {}",
            pass.num_kv_heads, pass.head_dim, pass.dtype
        );
        let native = pass.run(&device, Keys::Same);
        let got = pass.run(&device, Keys::E4m3);
        assert!(
            got.k_out == native.k_out && got.v_out == native.v_out,
            "{label}"
        );
        assert!(got.q_out == native.q_out, "{label}");
        let (k_scale, v_scale) = (pass.scales(0.019), pass.scales(0.25));
        assert_same(&label, &got.k_cache, &pass.want(&native.k_out, &k_scale));
        assert_same(&label, &got.v_cache, &pass.want(&native.v_out, &v_scale));
        // Keys and values do not share their factors, nor heads theirs.
        let swapped = pass.want(&native.k_out, &v_scale);
        assert!(
            got.k_cache != swapped,
            "{label}: the comparison tells nothing"
        );
    }
}

#[test]
fn callers_that_know_no_key_type_get_the_cache_they_had() {
    let Some(device) = device() else { return };
    for pass in passes() {
        assert!(pass.run(&device, Keys::Old) == pass.run(&device, Keys::Same));
    }
}
