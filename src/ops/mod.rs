//! Every operation the decode step needs, on typed values with checked shapes.
//!
//! The mental model: a pass works on *rows*, the flattened tokens of all requests. A [`RowMap`] says which rows belong
//! to which request, where their keys and values live (pages) and at what position they stand. Activations are
//! matrices `[rows, cols]` in the backend's own type ([`Ops::Mat`]), logits are f32 or of that type ([`Ops::Logits`]).
//! Buffers are made once with a largest row count and used with the current one ([`Matrix::set_rows`]).
//!
//! Two backends: `crate::reference::Reference` (plain Rust; oracle of every test and the backend without a GPU) and
//! `ops::cuda::Cuda`.

mod accept;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "cuda")]
mod directions;
mod draft;
pub mod e4m3;
pub mod grammar;
mod kv_scales;
mod mapped_file;
mod rows;
mod sampling;
mod schedule;
mod tensor;

pub use accept::{
    AcceptBatch, AcceptExtras, Accepted, DraftLaw, LowRankLaw, MAX_TOP_LOGPROBS, SparseLaw,
    TokenLogprobs, W2,
};
pub(crate) use draft::check_token_table;
pub use draft::{ConfidenceHead, DraftBatch, DraftHead, Drafted, HeadForm, HeadKind};
pub use grammar::{Constraint, Grammar};
pub use kv_scales::{KvDtype, KvScales};
pub use mapped_file::MappedFile;
pub use rows::{MAX_TREE_ROWS, RowMap};
pub use sampling::{Purpose, Rule, SamplingParams, TokenEdit, TokenEdits};
pub use schedule::{ScheduleInputs, ScheduleRule, Scheduled};
pub use tensor::{Dtype, HostTensor};

use crate::error::Result;

/// A row-major matrix whose row count changes from pass to pass below a fixed bound.
pub trait Matrix {
    /// Rows in use.
    fn rows(&self) -> usize;
    /// Columns, fixed.
    fn cols(&self) -> usize;
    /// The most rows it can hold.
    fn max_rows(&self) -> usize;
    /// Uses `rows` rows from now on; contents are kept where they were.
    ///
    /// # Errors
    /// `rows > max_rows`.
    fn set_rows(&mut self, rows: usize) -> Result<()>;
}

/// Refuses more rows than a matrix can hold.
pub(crate) fn expect_room(rows: usize, max_rows: usize) -> Result<()> {
    if rows <= max_rows {
        return Ok(());
    }
    let expected = format!("at most {max_rows}");
    Err(crate::Error::argument("rows", expected, rows))
}

/// Heads and scaling of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies scores, normally `head_dim^-0.5`.
    pub scale: f32,
    /// Epsilon of the per-head q/k norms.
    pub norm_eps: f32,
    /// Committed tokens further back than this many positions, the row's own included, are not seen; 0: all are.
    pub window: usize,
    /// Scores become `softcap * tanh(score / softcap)`; 0: they stay.
    pub softcap: f32,
}

/// Rotary embedding: angle of pair `i` at position `p` is `p * inv_freq[i]` (f32).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// `[head_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// Multiplies cos and sin; 1 unless the rope type scales attention.
    pub scale: f32,
}

/// Size of a paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGeometry {
    /// Layers that have keys and values.
    pub num_layers: usize,
    /// Pages in the pool.
    pub num_pages: usize,
    /// Token slots in a page.
    pub page_size: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// Where the q/k/v of [`Ops::qk_norm_rope`] go.
pub enum KvSink<'a, O: Ops> {
    /// Appended to the cache of `layer` at slots `seq_lens[r] + i` of the pass's requests.
    Cache {
        /// The cache.
        kv: &'a mut O::KvCache,
        /// Layer in it.
        layer: usize,
    },
    /// Written to `[rows, 2 * num_kv_heads * head_dim]` = `[k | v]`: the block of a drafter never enters its cache.
    Block(&'a mut O::Mat),
}

/// Names a pass: passes of one name are the same work but for what lies in device memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PassKey(Vec<u64>);

/// The operations. All shapes are checked; a mismatch is an [`crate::Error::Argument`].
///
/// Methods that return numbers to the host wait for the device; all others may only enqueue.
pub trait Ops: Sized {
    /// Activation matrix in the backend's activation type (reference f32, CUDA bf16).
    type Mat: Matrix;
    /// Matrix `[rows, vocab]`: f32, or of the activation type ([`Ops::fixed_logits`]).
    type Logits: Matrix;
    /// Weight matrix `[out, in]`, kept as stored where the backend can.
    type Weight: Matrix;
    /// A weight in e4m3, with a factor for each row.
    type Quantized;
    /// What the bias of each token is bounded by.
    type RowBounds;
    /// A few tokens for each token of the vocabulary.
    type TokenTable;
    /// A vector: norm weight or bias.
    type Norm;
    /// Paged keys and values of every layer of one model.
    type KvCache;
    /// An uploaded [`RowMap`].
    type Rows;
    /// Uploaded rotary frequencies.
    type Rope;

    /// One line for people: "reference (2 threads)", "CUDA:0 NVIDIA H100".
    fn describe(&self) -> String;
    /// Waits until everything enqueued has run.
    fn synchronize(&mut self) -> Result<()>;
    /// Whether operations of a size take longer the first time (kernels are loaded, algorithms chosen), so that it is worth
    /// running them once before anyone waits for them.
    fn is_slow_at_first(&self) -> bool {
        false
    }

    // Loading and buffers.

    /// One weight from one or more parts stacked along their rows (q, k, v; gate, up). All parts share the columns.
    fn weight(&mut self, parts: &[HostTensor<'_>]) -> Result<Self::Weight>;
    /// A copy of `weight` in e4m3 ([`e4m3::quantize_row`]).
    fn quantize(&mut self, weight: &Self::Weight) -> Result<Self::Quantized>;
    /// What rows of `w2`, `[vocab, rank]`, add to a logit at most, for [`DraftHead::row_bounds`].
    fn row_bounds(&mut self, w2: &Self::Weight) -> Result<Self::RowBounds>;
    /// `[vocab, cols]` tokens, [`SparseLaw::NO_PAIR`] for none; none twice in a row.
    fn token_table(&mut self, tokens: &[u32], cols: usize) -> Result<Self::TokenTable>;
    /// A vector `[n]`.
    fn norm(&mut self, tensor: &HostTensor<'_>) -> Result<Self::Norm>;
    /// Rotary frequencies.
    fn rope(&mut self, spec: &RopeSpec) -> Result<Self::Rope>;
    /// An activation buffer; `rows()` starts at 0.
    fn mat(&mut self, max_rows: usize, cols: usize) -> Result<Self::Mat>;
    /// A logits buffer in f32; `rows()` starts at 0.
    fn logits(&mut self, max_rows: usize, vocab_size: usize) -> Result<Self::Logits>;
    /// A logits buffer for what stays as [`Ops::linear_logits`] leaves it (a target's logits, the base logits of candidates):
    /// of the activation type where that saves memory traffic.
    fn fixed_logits(&mut self, max_rows: usize, vocab_size: usize) -> Result<Self::Logits> {
        self.logits(max_rows, vocab_size)
    }
    /// An empty cache.
    fn kv_cache(&mut self, geometry: &KvGeometry) -> Result<Self::KvCache>;
    /// An empty cache in e4m3. What [`Ops::qk_norm_rope`] appends is rounded to it ([`KvScales`], [`e4m3::encode`]), and
    /// only [`Ops::verify_attention`] reads it; [`Ops::draft_attention`] takes native caches alone.
    fn kv_cache_e4m3(&mut self, geometry: &KvGeometry, scales: &KvScales) -> Result<Self::KvCache>;
    /// An empty row map holder, to be filled by [`Ops::set_row_map`].
    fn rows(&mut self) -> Result<Self::Rows>;
    /// Uploads `map`.
    fn set_row_map(&mut self, rows: &mut Self::Rows, map: &RowMap) -> Result<()>;
    /// A host copy `[rows * cols]` (tests, traces, goldens).
    fn read_mat(&mut self, mat: &Self::Mat) -> Result<Vec<f32>>;
    /// A host copy `[rows * cols]`.
    fn read_logits(&mut self, logits: &Self::Logits) -> Result<Vec<f32>>;
    /// Fills from the host, `[rows * cols]`, setting `rows` (tests and tools).
    fn write_mat(&mut self, values: &[f32], mat: &mut Self::Mat) -> Result<()>;
    /// Fills from the host.
    fn write_logits(&mut self, values: &[f32], logits: &mut Self::Logits) -> Result<()>;

    // Rows.

    /// `out[i] = table[ids[i]]`; sets `out`'s rows. An id past the table is an error.
    fn embed(&mut self, table: &Self::Weight, ids: &[u32], out: &mut Self::Mat) -> Result<()>;
    /// `out[i] = src[index[i]]`; sets `out`'s rows.
    fn gather_rows(&mut self, src: &Self::Mat, index: &[u32], out: &mut Self::Mat) -> Result<()>;
    /// `dst[dst_row + i, dst_col..dst_col + src.cols] = src[i]` for all rows of `src`; `dst`'s rows are not changed.
    fn copy_into(
        &mut self,
        src: &Self::Mat,
        dst: &mut Self::Mat,
        dst_row: usize,
        dst_col: usize,
    ) -> Result<()>;
    /// `dst[first + i * step] = src[i]`; `dst`'s rows are not changed.
    fn copy_logits(
        &mut self,
        src: &Self::Logits,
        dst: &mut Self::Logits,
        first: usize,
        step: usize,
    ) -> Result<()>;

    // Layers. Each sets the rows of its output to the rows of its input.

    /// `out = x * rsqrt(mean(x^2) + eps) * w`.
    fn rms_norm(
        &mut self,
        x: &Self::Mat,
        weight: &Self::Norm,
        eps: f32,
        out: &mut Self::Mat,
    ) -> Result<()>;
    /// `residual += delta; out = rms_norm(residual)`; with a tap, the residual is also written to that matrix, from its first
    /// row and the given column on.
    fn add_rms_norm(
        &mut self,
        delta: &Self::Mat,
        residual: &mut Self::Mat,
        weight: &Self::Norm,
        eps: f32,
        out: &mut Self::Mat,
        tap: Option<(&mut Self::Mat, usize)>,
    ) -> Result<()>;
    /// `out = x W^T`.
    fn linear(&mut self, x: &Self::Mat, weight: &Self::Weight, out: &mut Self::Mat) -> Result<()>;
    /// `out = x W^T`, summed in f32 and rounded to what `out` holds.
    fn linear_logits(
        &mut self,
        x: &Self::Mat,
        weight: &Self::Weight,
        out: &mut Self::Logits,
    ) -> Result<()>;
    /// `out = silu(gate) * up` of `[gate | up]`.
    fn silu_mul(&mut self, gate_up: &Self::Mat, out: &mut Self::Mat) -> Result<()>;

    /// Per-head norms (where given: q's and k's weight `[head_dim]`) and RoPE of `qkv [rows, (Hq + 2 Hkv) D]`; q goes to
    /// `q_out [rows, Hq D]`, k and v to `sink`. With `q_out` `None`, `qkv` is `[k | v]` alone.
    #[allow(clippy::too_many_arguments)] // one operand each; the C ABI has the params struct
    fn qk_norm_rope(
        &mut self,
        spec: &AttentionSpec,
        qkv: &Self::Mat,
        norms: Option<(&Self::Norm, &Self::Norm)>,
        rope: &Self::Rope,
        rows: &Self::Rows,
        q_out: Option<&mut Self::Mat>,
        sink: KvSink<'_, Self>,
    ) -> Result<()>;
    /// Row i of request r sees cache slots `0 ..= seq_lens[r] + i` (its own key already appended); in a tree
    /// ([`RowMap::tree`]), the committed slots, itself and its ancestors.
    fn verify_attention(
        &mut self,
        spec: &AttentionSpec,
        q: &Self::Mat,
        kv: &Self::KvCache,
        layer: usize,
        rows: &Self::Rows,
        out: &mut Self::Mat,
    ) -> Result<()>;
    /// Every row of request r sees cache slots `0 .. seq_lens[r]` and all of the request's rows of `block` `[k | v]`.
    #[allow(clippy::too_many_arguments)] // one operand each; the C ABI has the params struct
    fn draft_attention(
        &mut self,
        spec: &AttentionSpec,
        q: &Self::Mat,
        kv: &Self::KvCache,
        layer: usize,
        block: &Self::Mat,
        rows: &Self::Rows,
        out: &mut Self::Mat,
    ) -> Result<()>;

    /// After a pass over trees, `rows`: the keys and values that stay move together, in every layer, as if the accepted path
    /// had been a chain. Bit `i` of `kept[r]` says that row i of request r stays, which the first always does; the n-th of
    /// them takes cache slot `seq_lens[r] + n`.
    fn commit_tree(
        &mut self,
        kv: &mut Self::KvCache,
        rows: &Self::Rows,
        kept: &[u64],
    ) -> Result<()>;

    // Passes.

    /// The name of a pass over `rows` that does `work`, a number that stands for the same calls on the same operands
    /// always. `None` where passes are not recorded.
    fn pass_key(&self, _rows: &Self::Rows, _work: u64) -> Option<PassKey> {
        None
    }
    /// Calls `work`, or does what it did under this name before without calling it: then true, and the rows of its
    /// outputs are still to be set. `work` only enqueues, and is called again where that fails.
    fn recorded(
        &mut self,
        _key: Option<PassKey>,
        work: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<bool> {
        work(self).map(|()| false)
    }

    // Laws.

    /// Runs the semi-autoregressive head over the steps of `batch`. `logits [num_reqs * draft_len, vocab]` holds the base
    /// logits U and stays as it is; `hidden [num_reqs * draft_len, d]`. Draft k of request r (k from 1) is the token at
    /// position `anchor_positions[r] + k`, drawn from `softmax((U + B) / temperature)` over what the mask allows, argmax
    /// (lowest index wins) at temperature 0; a row that is no law yields token 0. With [`DraftHead::w2_fp8`] the bias is
    /// that of the copy. The law is handed on as a latent and a normaliser for each draft ([`DraftLaw::LowRank`]). Draws
    /// of the coupled rule have the noise of its target ([`Rule::draft_purpose`]); the others' noise is the backend's own.
    /// With [`DraftHead::row_bounds`] and requests that are all greedy or coupled, whose drafts nobody asks a law for, the
    /// backend may pass over what cannot win: the same drafts, and normalisers of NaN.
    fn draft_full(
        &mut self,
        head: &DraftHead<Self>,
        logits: &Self::Logits,
        hidden: &Self::Mat,
        batch: &DraftBatch<'_>,
    ) -> Result<(Drafted, LowRankLaw)>;

    /// The same over candidates: for each draft the tokens of the `num_top` largest base logits (of those that the mask
    /// allows; ties: lowest token), joined with those that [`DraftHead::bigrams`] names for the token before. Above
    /// temperature 0 the law on them is cut down by the request's top-k, top-p and min-p, as the target's is. The pairs
    /// come by falling base logit, then the bigrams; a step without any yields token 0.
    fn draft_candidates(
        &mut self,
        head: &DraftHead<Self>,
        logits: &Self::Logits,
        hidden: &Self::Mat,
        batch: &DraftBatch<'_>,
        num_top: usize,
    ) -> Result<(Drafted, SparseLaw)>;

    /// The largest probability of `softmax(logits[i] / temperature[i])` for every row; at temperature 0 that of
    /// `softmax(logits[i])`, which says how sure the row is. 0 for a row that is no law.
    ///
    /// This default copies the logits to the host.
    fn top_probabilities(
        &mut self,
        logits: &Self::Logits,
        temperature: &[f32],
    ) -> Result<Vec<f32>> {
        if temperature.len() != logits.rows() {
            let expected = format!("one for each of {} rows", logits.rows());
            return Err(crate::Error::argument(
                "temperature",
                expected,
                temperature.len(),
            ));
        }
        let values = self.read_logits(logits)?;
        let rows = values.chunks_exact(logits.cols().max(1)).zip(temperature);
        Ok(rows.map(|(row, &t)| top_probability(row, t)).collect())
    }

    /// How many drafts of each request are verified, bit for bit as the host decides it (`dspark::schedule::decide`);
    /// `None` where the host is to do so.
    fn schedule(&mut self, inputs: &ScheduleInputs<'_>) -> Result<Option<Scheduled>> {
        let _ = inputs;
        Ok(None)
    }

    /// Target law and acceptance of the contract block of `dspark_accept` (cuda/include/dspark.h), which the reference
    /// follows in f64.
    ///
    /// # Errors
    /// [`crate::Error::BadLogits`] names the first request whose rows are no law.
    fn accept(&mut self, batch: &AcceptBatch<'_, Self>) -> Result<Accepted>;
}

/// The largest probability of one row; see [`Ops::top_probabilities`].
fn top_probability(logits: &[f32], temperature: f32) -> f32 {
    let temperature = if temperature == 0.0 { 1.0 } else { temperature };
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits
        .iter()
        .map(|l| ((l - largest) / temperature).exp())
        .sum();
    let top = 1.0 / sum;
    if top.is_finite() { top } else { 0.0 }
}
