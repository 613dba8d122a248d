//! The plain Rust backend: oracle of every test and the backend where there is no GPU.
//!
//! Activations, logits, keys and values are f32, bf16 weights stay bf16 ([`Weight`]), products and sums are f32; norms
//! and softmax sum in f64, and laws over the vocabulary are f64 throughout ([`law`]).
//!
//! What a row holds after any operation depends only on that row's inputs and, in attention, on the keys it sees: not on
//! the other rows of the call, their number, the pages, or the number of threads. So greedy decoding is bitwise the same
//! token by token, in verify windows and in batches. Results may differ between machines with and without fused
//! multiply-add, and between widths of vectors (the dot products of attention).

mod accept;
mod attention;
pub mod choices;
mod draft;
mod exp;
mod gemm;
pub mod law;
mod low_rank;
mod norm;
pub mod philox;
mod pool;
mod rope;
mod shape;
mod tensor;
mod verify;
mod weight;

#[cfg(test)]
mod tests;

pub use draft::TokenTable;
pub use low_rank::Quantized;
pub use tensor::{F32Matrix, KvCache};
pub use verify::NO_TOKEN;
pub use weight::Weight;

use attention::Attention;
use choices::{Choices, Philox};
use draft::DraftPass;
use pool::Pool;
use rope::QkNormRope;
use tensor::{expect_cols, expect_shape};

use crate::error::{Error, Result};
use crate::ops::{
    AcceptBatch, Accepted, AttentionSpec, DraftBatch, DraftHead, Drafted, HostTensor, KvGeometry,
    KvScales, KvSink, LowRankLaw, Matrix, Ops, RopeSpec, RowMap, SparseLaw, check_token_table,
};

/// The backend. See the module's documentation for what its results depend on.
pub struct Reference {
    pool: Pool,
    choices: Box<dyn Choices>,
}

impl Reference {
    /// A backend on `num_threads` threads, the caller's included; `None` takes one for each available core.
    ///
    /// # Errors
    /// 0 threads, or threads the system does not give.
    pub fn new(num_threads: Option<usize>) -> Result<Self> {
        Ok(Self {
            pool: Pool::new(num_threads)?,
            choices: Box::new(Philox),
        })
    }

    /// The same backend with random decisions from `choices`; the default is [`Philox`].
    #[must_use]
    pub fn with_choices(mut self, choices: Box<dyn Choices>) -> Self {
        self.choices = choices;
        self
    }
}

impl Ops for Reference {
    type Mat = F32Matrix;
    type Logits = F32Matrix;
    type Weight = Weight;
    type Quantized = Quantized;
    /// Every row is read.
    type RowBounds = ();
    type TokenTable = TokenTable;
    type Norm = Vec<f32>;
    type KvCache = KvCache;
    type Rows = RowMap;
    type Rope = RopeSpec;

    fn describe(&self) -> String {
        let threads = self.pool.num_threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("reference ({threads} thread{plural})")
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn weight(&mut self, parts: &[HostTensor<'_>]) -> Result<Weight> {
        Weight::new(parts)
    }

    fn norm(&mut self, tensor: &HostTensor<'_>) -> Result<Vec<f32>> {
        tensor::vector(tensor)
    }

    fn quantize(&mut self, weight: &Weight) -> Result<Quantized> {
        Quantized::new(weight)
    }

    fn row_bounds(&mut self, _w2: &Weight) -> Result<()> {
        Ok(())
    }

    fn token_table(&mut self, tokens: &[u32], cols: usize) -> Result<TokenTable> {
        check_token_table(tokens, cols)?;
        Ok(TokenTable {
            tokens: tokens.to_vec(),
            cols,
        })
    }

    fn rope(&mut self, spec: &RopeSpec) -> Result<RopeSpec> {
        Ok(spec.clone())
    }

    fn mat(&mut self, max_rows: usize, cols: usize) -> Result<F32Matrix> {
        Ok(F32Matrix::new(max_rows, cols))
    }

    fn logits(&mut self, max_rows: usize, vocab_size: usize) -> Result<F32Matrix> {
        Ok(F32Matrix::new(max_rows, vocab_size))
    }

    fn kv_cache(&mut self, geometry: &KvGeometry) -> Result<KvCache> {
        KvCache::new(geometry, None)
    }

    fn kv_cache_e4m3(&mut self, geometry: &KvGeometry, scales: &KvScales) -> Result<KvCache> {
        scales.check(geometry)?;
        KvCache::new(geometry, Some(scales.clone()))
    }

    fn rows(&mut self) -> Result<RowMap> {
        Ok(RowMap::new(0))
    }

    fn set_row_map(&mut self, rows: &mut RowMap, map: &RowMap) -> Result<()> {
        expect_row_map(map)?;
        rows.clone_from(map);
        Ok(())
    }

    fn read_mat(&mut self, mat: &F32Matrix) -> Result<Vec<f32>> {
        Ok(mat.values().to_vec())
    }

    fn read_logits(&mut self, logits: &F32Matrix) -> Result<Vec<f32>> {
        Ok(logits.values().to_vec())
    }

    fn write_mat(&mut self, values: &[f32], mat: &mut F32Matrix) -> Result<()> {
        mat.fill("values", values)
    }

    fn write_logits(&mut self, values: &[f32], logits: &mut F32Matrix) -> Result<()> {
        logits.fill("values", values)
    }

    fn embed(&mut self, table: &Weight, ids: &[u32], out: &mut F32Matrix) -> Result<()> {
        expect_cols("out", out, table.cols())?;
        expect_ids("token id", ids, table.rows())?;
        out.set_rows(ids.len())?;
        for (i, &id) in ids.iter().enumerate() {
            table.copy_row(id as usize, out.row_mut(i));
        }
        Ok(())
    }

    fn gather_rows(&mut self, src: &F32Matrix, index: &[u32], out: &mut F32Matrix) -> Result<()> {
        expect_cols("out", out, src.cols())?;
        expect_ids("row index", index, src.rows())?;
        out.set_rows(index.len())?;
        for (i, &row) in index.iter().enumerate() {
            out.row_mut(i).copy_from_slice(src.row(row as usize));
        }
        Ok(())
    }

    fn copy_into(
        &mut self,
        src: &F32Matrix,
        dst: &mut F32Matrix,
        dst_row: usize,
        dst_col: usize,
    ) -> Result<()> {
        if dst_row + src.rows() > dst.rows() || dst_col + src.cols() > dst.cols() {
            let expected = format!("a window inside [{}, {}]", dst.rows(), dst.cols());
            let found = format!("[{}, {}] at ({dst_row}, {dst_col})", src.rows(), src.cols());
            return Err(Error::argument("src", expected, found));
        }
        for i in 0..src.rows() {
            dst.row_mut(dst_row + i)[dst_col..dst_col + src.cols()].copy_from_slice(src.row(i));
        }
        Ok(())
    }

    fn copy_logits(
        &mut self,
        src: &F32Matrix,
        dst: &mut F32Matrix,
        first: usize,
        step: usize,
    ) -> Result<()> {
        expect_cols("dst", dst, src.cols())?;
        let last = src.rows().checked_sub(1).map(|last| first + last * step);
        if last.is_some_and(|last| last >= dst.rows()) {
            let expected = format!("rows below {}", dst.rows());
            let found = format!("{} rows from {first} by {step}", src.rows());
            return Err(Error::argument("src", expected, found));
        }
        for i in 0..src.rows() {
            dst.row_mut(first + i * step).copy_from_slice(src.row(i));
        }
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &F32Matrix,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut F32Matrix,
    ) -> Result<()> {
        expect_cols("x", x, weight.len())?;
        expect_cols("out", out, weight.len())?;
        out.set_rows(x.rows())?;
        norm::rms_norm(&self.pool, x.values(), weight, eps, out.values_mut());
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        delta: &F32Matrix,
        residual: &mut F32Matrix,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut F32Matrix,
        tap: Option<(&mut F32Matrix, usize)>,
    ) -> Result<()> {
        expect_shape("delta", delta, residual.rows(), residual.cols())?;
        norm::add(residual.values_mut(), delta.values());
        if let Some((tap, col)) = tap {
            self.copy_into(residual, tap, 0, col)?;
        }
        self.rms_norm(residual, weight, eps, out)
    }

    fn linear(&mut self, x: &F32Matrix, weight: &Weight, out: &mut F32Matrix) -> Result<()> {
        expect_cols("x", x, weight.cols())?;
        expect_cols("out", out, weight.rows())?;
        out.set_rows(x.rows())?;
        gemm::linear(&self.pool, x.values(), weight, out.values_mut());
        Ok(())
    }

    fn linear_logits(&mut self, x: &F32Matrix, weight: &Weight, out: &mut F32Matrix) -> Result<()> {
        self.linear(x, weight, out)
    }

    fn silu_mul(&mut self, gate_up: &F32Matrix, out: &mut F32Matrix) -> Result<()> {
        expect_cols("gate_up", gate_up, 2 * out.cols())?;
        out.set_rows(gate_up.rows())?;
        norm::silu_mul(&self.pool, gate_up.values(), out.cols(), out.values_mut());
        Ok(())
    }

    fn qk_norm_rope(
        &mut self,
        spec: &AttentionSpec,
        qkv: &F32Matrix,
        norms: Option<(&Vec<f32>, &Vec<f32>)>,
        rope: &RopeSpec,
        rows: &RowMap,
        q_out: Option<&mut F32Matrix>,
        sink: KvSink<'_, Self>,
    ) -> Result<()> {
        QkNormRope {
            spec,
            qkv,
            norms,
            rope,
            rows,
            q_out,
            sink,
        }
        .run()
    }

    fn verify_attention(
        &mut self,
        spec: &AttentionSpec,
        q: &F32Matrix,
        kv: &KvCache,
        layer: usize,
        rows: &RowMap,
        out: &mut F32Matrix,
    ) -> Result<()> {
        Attention {
            spec,
            q,
            kv,
            layer,
            block: None,
            rows,
        }
        .run(&self.pool, out)
    }

    fn draft_attention(
        &mut self,
        spec: &AttentionSpec,
        q: &F32Matrix,
        kv: &KvCache,
        layer: usize,
        block: &F32Matrix,
        rows: &RowMap,
        out: &mut F32Matrix,
    ) -> Result<()> {
        Attention {
            spec,
            q,
            kv,
            layer,
            block: Some(block),
            rows,
        }
        .run(&self.pool, out)
    }

    fn commit_tree(&mut self, kv: &mut KvCache, rows: &RowMap, kept: &[u64]) -> Result<()> {
        rows.check_kept(kept)?;
        kv.expect_pages(rows)?;
        let sources = rows.gathered(kept);
        for r in 0..rows.num_reqs() {
            let (own, seq_len) = (rows.rows_of(r), rows.seq_lens[r] as usize);
            // In order: what a row takes over stands behind it, and has not been written yet.
            for (to, &source) in sources[own.clone()].iter().enumerate() {
                let from = source as usize - own.start;
                if from != to {
                    kv.move_entry(rows, r, seq_len + from, seq_len + to)?;
                }
            }
        }
        Ok(())
    }

    fn draft_full(
        &mut self,
        head: &DraftHead<Self>,
        logits: &F32Matrix,
        hidden: &F32Matrix,
        batch: &DraftBatch<'_>,
    ) -> Result<(Drafted, LowRankLaw)> {
        let pass = DraftPass {
            head,
            logits: logits.clone(),
            hidden,
            batch: *batch,
            num_top: None,
        };
        draft::full(pass, &self.pool, &mut *self.choices)
    }

    fn draft_candidates(
        &mut self,
        head: &DraftHead<Self>,
        logits: &F32Matrix,
        hidden: &F32Matrix,
        batch: &DraftBatch<'_>,
        num_top: usize,
    ) -> Result<(Drafted, SparseLaw)> {
        let pass = DraftPass {
            head,
            logits: logits.clone(),
            hidden,
            batch: *batch,
            num_top: Some(num_top),
        };
        draft::candidates(pass, &self.pool, &mut *self.choices)
    }

    fn accept(&mut self, batch: &AcceptBatch<'_, Self>) -> Result<Accepted> {
        verify::accept(batch, &self.pool, &mut *self.choices)
    }
}

/// Checks that every id is below `bound`.
fn expect_ids(field: &str, ids: &[u32], bound: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= bound) {
        Some(id) => Err(Error::argument(field, format!("below {bound}"), id)),
        None => Ok(()),
    }
}

/// Checks that the parts of a map belong together.
fn expect_row_map(map: &RowMap) -> Result<()> {
    let num_reqs = map.seq_lens.len();
    tensor::expect_len("qo_indptr", map.qo_indptr.len(), num_reqs + 1)?;
    tensor::expect_len(
        "page_table",
        map.page_table.len(),
        num_reqs * map.max_pages_per_req,
    )?;
    let num_rows = map.qo_indptr[num_reqs];
    if map.qo_indptr[0] != 0 || !map.qo_indptr.is_sorted() || num_rows < 0 {
        let found = format!("{:?}", map.qo_indptr);
        return Err(Error::argument(
            "qo_indptr",
            "ascending numbers from 0",
            found,
        ));
    }
    tensor::expect_len("positions", map.positions.len(), num_rows as usize)?;
    for (field, values) in [("seq_lens", &map.seq_lens), ("positions", &map.positions)] {
        if let Some(value) = values.iter().find(|&&value| value < 0) {
            return Err(Error::argument(field, "numbers >= 0", value));
        }
    }
    Ok(())
}
