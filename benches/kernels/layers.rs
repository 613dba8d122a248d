//! The elementwise layers at Qwen3-8B's sizes. In a decode step their inputs come warm from the kernel before; cold is
//! what can be compared.

use std::ptr::null;

use cudarc::driver::DeviceRepr;
use dspark::device::Buffer;
use dspark::sys;
use half::bf16;

use crate::lab::{Lab, Traffic, Work, check, inspect_output, struct_size};

const NUM_ROWS: [usize; 4] = [1, 8, 64, 512];
const HIDDEN_SIZE: usize = 4096;
const FFN_SIZE: usize = 12_288;
const NUM_Q_HEADS: usize = 32;
const NUM_KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const Q_SIZE: usize = NUM_Q_HEADS * HEAD_DIM;
const KV_SIZE: usize = NUM_KV_HEADS * HEAD_DIM;
const QKV_SIZE: usize = Q_SIZE + 2 * KV_SIZE;
const EPS: f32 = 1e-6;
/// Rows of a request in the pass that appends.
const ROWS_PER_REQ: usize = 8;
const PAGE_SIZE: usize = 16;
/// Leaves room for a request's rows on the page.
const SEQ_LEN: i32 = 5;

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for rows in NUM_ROWS {
        let traffic = elements((2 * rows + 1) * HIDDEN_SIZE);
        lab.case(&format!("rms_norm rows={rows}"), traffic, |lab, copies| {
            RmsNorm::new(lab, copies, rows, false)
        })?;
    }
    for rows in NUM_ROWS {
        let traffic = elements((4 * rows + 1) * HIDDEN_SIZE);
        lab.case(
            &format!("add_rms_norm rows={rows}"),
            traffic,
            |lab, copies| RmsNorm::new(lab, copies, rows, true),
        )?;
    }
    for rows in NUM_ROWS {
        let traffic = elements(2 * rows * QKV_SIZE);
        lab.case(
            &format!("qk_norm_rope_append rows={rows}"),
            traffic,
            |lab, copies| RopeAppend::<bf16>::new(lab, copies, rows, None),
        )?;
    }
    for rows in NUM_ROWS {
        let keys = 2 * rows * KV_SIZE;
        let traffic = elements(2 * rows * QKV_SIZE - keys);
        let scales = Some([0.02, 0.01]);
        lab.case(
            &format!("qk_norm_rope_append rows={rows} e4m3"),
            Traffic::once(traffic.bytes + keys),
            |lab, copies| RopeAppend::<u8>::new(lab, copies, rows, scales),
        )?;
    }
    for rows in NUM_ROWS {
        let traffic = elements(3 * rows * FFN_SIZE);
        lab.case(&format!("silu_mul rows={rows}"), traffic, |lab, copies| {
            SiluMul::new(lab, copies, rows)
        })?;
    }
    Ok(())
}

fn elements(count: usize) -> Traffic {
    Traffic::once(count * size_of::<bf16>())
}

struct RmsNorm {
    stream: sys::dspark_stream,
    rows: usize,
    x: Buffer<bf16>,
    delta: Option<Buffer<bf16>>,
    weight: Buffer<bf16>,
    out: Buffer<bf16>,
}

impl RmsNorm {
    fn new(lab: &mut Lab, copies: usize, rows: usize, with_delta: bool) -> anyhow::Result<Self> {
        let len = copies * rows * HIDDEN_SIZE;
        let delta = with_delta.then(|| lab.normal_bf16(len, 0.1)).transpose()?;
        Ok(Self {
            stream: lab.stream(),
            rows,
            x: lab.normal_bf16(len, 1.0)?,
            delta,
            weight: lab.normal_bf16(copies * HIDDEN_SIZE, 1.0)?,
            out: lab.empty(len)?,
        })
    }
}

impl Work for RmsNorm {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let at = copy * self.rows * HIDDEN_SIZE;
        let stride = HIDDEN_SIZE as i64;
        let params = sys::dspark_rms_norm_params {
            struct_size: struct_size::<sys::dspark_rms_norm_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            num_rows: self.rows as i32,
            hidden_size: HIDDEN_SIZE as i32,
            eps: EPS,
            x: self.x.mut_ptr(at).cast(),
            delta: self
                .delta
                .as_ref()
                .map_or(std::ptr::null(), |delta| delta.ptr(at).cast()),
            weight: self.weight.ptr(copy * HIDDEN_SIZE).cast(),
            out: self.out.mut_ptr(at).cast(),
            stride_x_row: stride,
            stride_delta_row: stride,
            stride_out_row: stride,
            tap: std::ptr::null_mut(),
            stride_tap_row: 0,
        };
        // SAFETY: every pointer is a window of a live buffer with the shape the params say, each its own.
        check(unsafe { sys::launch::dspark_rms_norm_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        inspect_output(&self.out, self.rows * HIDDEN_SIZE)?;
        Ok(None)
    }
}

/// `K` is the cache's element: u8 is an e4m3 number.
struct RopeAppend<K> {
    stream: sys::dspark_stream,
    rows: usize,
    num_reqs: usize,
    qkv: Buffer<bf16>,
    q_norm: Buffer<bf16>,
    k_norm: Buffer<bf16>,
    inv_freq: Buffer<f32>,
    positions: Buffer<i32>,
    qo_indptr: Buffer<i32>,
    seq_lens: Buffer<i32>,
    page_table: Buffer<i32>,
    q_out: Buffer<bf16>,
    k_cache: Buffer<K>,
    v_cache: Buffer<K>,
    /// Of keys and of values in e4m3.
    scales: Option<[Buffer<f32>; 2]>,
}

impl<K: DeviceRepr + Copy> RopeAppend<K> {
    /// Requests of eight rows (the last may have fewer), one page each.
    fn new(
        lab: &mut Lab,
        copies: usize,
        rows: usize,
        scales: Option<[f32; 2]>,
    ) -> anyhow::Result<Self> {
        let num_reqs = rows.div_ceil(ROWS_PER_REQ);
        let qo_indptr: Vec<i32> = (0..=num_reqs)
            .map(|r| (r * ROWS_PER_REQ).min(rows) as i32)
            .collect();
        let positions: Vec<i32> = (0..rows)
            .map(|row| SEQ_LEN + (row % ROWS_PER_REQ) as i32)
            .collect();
        let inv_freq: Vec<f32> = (0..HEAD_DIM / 2)
            .map(|i| 1e6_f32.powf(-2.0 * i as f32 / HEAD_DIM as f32))
            .collect();
        let page_table = lab.random.permutation(num_reqs);
        let cache_len = copies * num_reqs * PAGE_SIZE * KV_SIZE;
        let scales = match scales {
            Some([k, v]) => Some([
                lab.upload(&[k; NUM_KV_HEADS])?,
                lab.upload(&[v; NUM_KV_HEADS])?,
            ]),
            None => None,
        };
        Ok(Self {
            scales,
            stream: lab.stream(),
            rows,
            num_reqs,
            qkv: lab.normal_bf16(copies * rows * QKV_SIZE, 1.0)?,
            q_norm: lab.normal_bf16(HEAD_DIM, 1.0)?,
            k_norm: lab.normal_bf16(HEAD_DIM, 1.0)?,
            inv_freq: lab.upload(&inv_freq)?,
            positions: lab.upload(&positions)?,
            qo_indptr: lab.upload(&qo_indptr)?,
            seq_lens: lab.upload(&vec![SEQ_LEN; num_reqs])?,
            page_table: lab.upload(&page_table)?,
            q_out: lab.empty(copies * rows * Q_SIZE)?,
            k_cache: lab.empty(cache_len)?,
            v_cache: lab.empty(cache_len)?,
        })
    }
}

impl<K: DeviceRepr + Copy + Default + Into<f32>> Work for RopeAppend<K> {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let cache = copy * self.num_reqs * PAGE_SIZE * KV_SIZE;
        let scales = self.scales.as_ref();
        let [k_scale, v_scale] =
            scales.map_or([null(); 2], |scales| scales.each_ref().map(|s| s.ptr(0)));
        let params = sys::dspark_qk_norm_rope_append_params {
            struct_size: struct_size::<sys::dspark_qk_norm_rope_append_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            num_rows: self.rows as i32,
            num_reqs: self.num_reqs as i32,
            num_q_heads: NUM_Q_HEADS as i32,
            num_kv_heads: NUM_KV_HEADS as i32,
            head_dim: HEAD_DIM as i32,
            page_size: PAGE_SIZE as i32,
            max_pages_per_req: 1,
            eps: EPS,
            rope_scale: 1.0,
            qkv: self.qkv.ptr(copy * self.rows * QKV_SIZE).cast(),
            q_norm: self.q_norm.ptr(0).cast(),
            k_norm: self.k_norm.ptr(0).cast(),
            inv_freq: self.inv_freq.ptr(0),
            positions: self.positions.ptr(0),
            qo_indptr: self.qo_indptr.ptr(0),
            seq_lens: self.seq_lens.ptr(0),
            page_table: self.page_table.ptr(0),
            q_out: self.q_out.mut_ptr(copy * self.rows * Q_SIZE).cast(),
            k_cache: self.k_cache.mut_ptr(cache).cast(),
            v_cache: self.v_cache.mut_ptr(cache).cast(),
            k_out: std::ptr::null_mut(),
            v_out: std::ptr::null_mut(),
            stride_qkv_row: QKV_SIZE as i64,
            stride_q_out_row: Q_SIZE as i64,
            stride_kv_out_row: 0,
            stride_cache_page: (PAGE_SIZE * KV_SIZE) as i64,
            stride_cache_slot: KV_SIZE as i64,
            stride_cache_head: HEAD_DIM as i64,
            kv_dtype: scales.map_or(sys::DSPARK_DTYPE_BF16, |_| sys::DSPARK_DTYPE_E4M3),
            reserved: 0,
            k_scale,
            v_scale,
        };
        // SAFETY: every pointer is a window of a live buffer with the shape the params say; a request's rows fit its
        // page, and the page table names pages of the copy's own cache.
        check(unsafe { sys::launch::dspark_qk_norm_rope_append_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        inspect_output(&self.q_out, self.rows * Q_SIZE)?;
        inspect_output(&self.k_cache, PAGE_SIZE * KV_SIZE)?;
        Ok(None)
    }
}

struct SiluMul {
    stream: sys::dspark_stream,
    rows: usize,
    gate_up: Buffer<bf16>,
    out: Buffer<bf16>,
}

impl SiluMul {
    fn new(lab: &mut Lab, copies: usize, rows: usize) -> anyhow::Result<Self> {
        Ok(Self {
            stream: lab.stream(),
            rows,
            gate_up: lab.normal_bf16(copies * rows * 2 * FFN_SIZE, 1.0)?,
            out: lab.empty(copies * rows * FFN_SIZE)?,
        })
    }
}

impl Work for SiluMul {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let params = sys::dspark_silu_mul_params {
            struct_size: struct_size::<sys::dspark_silu_mul_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            num_rows: self.rows as i32,
            ffn_size: FFN_SIZE as i32,
            gate_up: self.gate_up.ptr(copy * self.rows * 2 * FFN_SIZE).cast(),
            out: self.out.mut_ptr(copy * self.rows * FFN_SIZE).cast(),
            stride_gate_up_row: 2 * FFN_SIZE as i64,
            stride_out_row: FFN_SIZE as i64,
        };
        // SAFETY: both pointers are windows of live buffers with the shapes the params say.
        check(unsafe { sys::launch::dspark_silu_mul_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        inspect_output(&self.out, self.rows * FFN_SIZE)?;
        Ok(None)
    }
}
