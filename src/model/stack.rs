//! A stack of decoder layers with its cache and buffers: the body of a target, of a draft backbone and of an MTP module.
//!
//! The caller fills [`DecoderStack::residual`], [`DecoderStack::run`] leaves the final-normed states in
//! [`DecoderStack::normed`]. A layer's output is not added to the residual stream by the layer itself but by the norm that
//! follows (`add_rms_norm`), so the stream after layer `i` stands there once layer `i + 1` has been entered: that is
//! where taps are taken.

use std::sync::atomic::{AtomicU64, Ordering};

use super::checkpoint::Checkpoint;
use super::config::DecoderConfig;
use super::kv_scales;
use crate::error::Result;
use crate::ops::{AttentionSpec, KvDtype, KvSink, Matrix, Ops, RowMap};

/// Sizes of the buffers and caches of a model, fixed when it is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests of one pass, and slots of [`super::ProposeBatch`].
    pub max_num_reqs: usize,
    /// Rows of one target pass.
    pub max_rows: usize,
    /// Rows of one target pass whose logits are asked for.
    pub max_logit_rows: usize,
    /// Tokens of the longest draft asked for; drafters that cannot make as many say so.
    pub max_draft_len: usize,
    /// Pages of each cache.
    pub num_pages: usize,
    /// Token slots of a page.
    pub page_size: usize,
}

/// Which keys a row sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Visibility {
    /// The cache up to and including itself; keys are appended.
    Causal,
    /// The cache and all rows of its block, both directions; the block's keys stay out of the cache.
    Block,
}

/// Where taps are taken: layer ids (-1 is the embedding) and `[rows, ids.len() * hidden_size]`.
pub(super) struct Taps<O: Ops> {
    pub ids: Vec<i32>,
    pub out: O::Mat,
    /// Room to put the rows in another order, made when that is first asked for.
    pub spare: Option<O::Mat>,
    /// The pass with these taps, by number.
    pub work: u64,
}

/// A number for work that is the same whenever it is done: no other has it in this process.
pub(super) fn new_work() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Norms of q and of k, `[head_dim]` each.
type QkNorms<O> = (<O as Ops>::Norm, <O as Ops>::Norm);

struct DecoderLayer<O: Ops> {
    input_norm: O::Norm,
    /// `[(Hq + 2 Hkv) D, d]`.
    qkv: O::Weight,
    qk_norms: Option<QkNorms<O>>,
    /// `[d, Hq D]`.
    o_proj: O::Weight,
    post_attention_norm: O::Norm,
    /// `[2 * intermediate, d]`.
    gate_up: O::Weight,
    /// `[d, intermediate]`.
    down: O::Weight,
}

impl<O: Ops> DecoderLayer<O> {
    fn load(
        ops: &mut O,
        weights: &Checkpoint,
        prefix: &str,
        config: &DecoderConfig,
    ) -> Result<Self> {
        let name = |tensor: &str| format!("{prefix}{tensor}.weight");
        let (d, ffn) = (config.hidden_size, config.intermediate_size);
        let (q_size, kv_size) = (config.q_size(), config.kv_size());
        let (q_norm, k_norm) = (name("self_attn.q_norm"), name("self_attn.k_norm"));
        let qk_norms = if weights.contains(&q_norm) || weights.contains(&k_norm) {
            Some((
                weights.norm(ops, &q_norm, config.head_dim)?,
                weights.norm(ops, &k_norm, config.head_dim)?,
            ))
        } else {
            None
        };
        let qkv = [
            (&*name("self_attn.q_proj"), q_size),
            (&*name("self_attn.k_proj"), kv_size),
            (&*name("self_attn.v_proj"), kv_size),
        ];
        let gate_up = [(&*name("mlp.gate_proj"), ffn), (&*name("mlp.up_proj"), ffn)];
        Ok(Self {
            input_norm: weights.norm(ops, &name("input_layernorm"), d)?,
            qkv: weights.weight(ops, &qkv, d)?,
            qk_norms,
            o_proj: weights.weight(ops, &[(&name("self_attn.o_proj"), d)], q_size)?,
            post_attention_norm: weights.norm(ops, &name("post_attention_layernorm"), d)?,
            gate_up: weights.weight(ops, &gate_up, d)?,
            down: weights.weight(ops, &[(&name("mlp.down_proj"), d)], ffn)?,
        })
    }
}

/// Whether layers have norms of q and k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QkNorm {
    /// They must be there.
    Required,
    /// The family has none: a checkpoint with one is another model.
    Absent,
    /// Used where the checkpoint has them.
    Optional,
}

/// The layers, the final norm, the cache and every buffer of a pass.
pub(super) struct DecoderStack<O: Ops> {
    layers: Vec<DecoderLayer<O>>,
    final_norm: O::Norm,
    spec: AttentionSpec,
    rope: O::Rope,
    kv: O::KvCache,
    rows: O::Rows,
    /// `[rows, d]`: the residual stream, filled by the caller.
    pub residual: O::Mat,
    /// `[rows, d]`: input of each part of a layer, and in the end the final-normed states.
    pub normed: O::Mat,
    /// Room to put the rows of `normed` in another order, made when that is first asked for.
    spare: Option<O::Mat>,
    delta: O::Mat,
    qkv: O::Mat,
    q: O::Mat,
    attended: O::Mat,
    gate_up: O::Mat,
    activated: O::Mat,
    /// `[rows, 2 Hkv D]`: a block's own keys and values; `None` in a causal stack.
    block: Option<O::Mat>,
    /// The pass without taps and the append of context, by number.
    work: [u64; 2],
}

impl<O: Ops> DecoderStack<O> {
    /// Loads `{prefix}layers.*` and `{prefix}norm`, with buffers for `max_rows` rows.
    pub fn load(
        ops: &mut O,
        weights: &Checkpoint,
        prefix: &str,
        config: &DecoderConfig,
        shape: StackShape,
        limits: &Limits,
    ) -> Result<Self> {
        let layers = (0..config.num_layers)
            .map(|i| {
                let prefix = format!("{prefix}layers.{i}.");
                shape.qk_norm.check(weights, &prefix, config.head_dim)?;
                DecoderLayer::load(ops, weights, &prefix, config)
            })
            .collect::<Result<_>>()?;
        let (d, ffn, rows) = (config.hidden_size, config.intermediate_size, shape.max_rows);
        let (q_size, kv_size) = (config.q_size(), config.kv_size());
        let geometry = config.kv_geometry(limits.num_pages, limits.page_size);
        let kv = match shape.kv_dtype {
            KvDtype::Native => ops.kv_cache(&geometry)?,
            KvDtype::Fp8 => {
                let scales = kv_scales::find_or_ones(weights, prefix, &geometry)?;
                ops.kv_cache_e4m3(&geometry, &scales)?
            }
        };
        Ok(Self {
            layers,
            final_norm: weights.norm(ops, &format!("{prefix}norm.weight"), d)?,
            spec: config.attention(),
            rope: ops.rope(&config.rope)?,
            kv,
            rows: ops.rows()?,
            residual: ops.mat(rows, d)?,
            normed: ops.mat(rows, d)?,
            spare: None,
            delta: ops.mat(rows, d)?,
            qkv: ops.mat(rows, q_size + 2 * kv_size)?,
            q: ops.mat(rows, q_size)?,
            attended: ops.mat(rows, q_size)?,
            gate_up: ops.mat(rows, 2 * ffn)?,
            activated: ops.mat(rows, ffn)?,
            block: match shape.visibility {
                Visibility::Causal => None,
                Visibility::Block => Some(ops.mat(rows, 2 * kv_size)?),
            },
            work: [new_work(), new_work()],
        })
    }

    /// Runs the rows of `map`, whose embeddings stand in `residual`, through all layers and the final norm.
    pub fn run(&mut self, ops: &mut O, map: &RowMap, taps: Option<&mut Taps<O>>) -> Result<()> {
        ops.set_row_map(&mut self.rows, map)?;
        let mut taps = taps;
        let work = taps.as_ref().map_or(self.work[0], |taps| taps.work);
        let key = ops.pass_key(&self.rows, work);
        let rows = map.num_rows();
        let replayed = ops.recorded(key, &mut |ops| {
            self.run_layers(ops, rows, taps.as_deref_mut())
        })?;
        if replayed {
            self.set_rows(rows, taps)?;
        }
        Ok(())
    }

    /// What a pass that was replayed leaves on the host.
    fn set_rows(&mut self, rows: usize, taps: Option<&mut Taps<O>>) -> Result<()> {
        let outputs = [
            &mut self.normed,
            &mut self.delta,
            &mut self.qkv,
            &mut self.q,
            &mut self.attended,
            &mut self.gate_up,
            &mut self.activated,
        ];
        let more = self.block.iter_mut().chain(taps.map(|taps| &mut taps.out));
        for mat in outputs.into_iter().chain(more) {
            mat.set_rows(rows)?;
        }
        Ok(())
    }

    /// All layers over the rows in `residual`, and the final norm.
    fn run_layers(
        &mut self,
        ops: &mut O,
        rows: usize,
        mut taps: Option<&mut Taps<O>>,
    ) -> Result<()> {
        if let Some(taps) = &mut taps {
            taps.out.set_rows(rows)?;
        }
        for layer in 0..self.layers.len() {
            self.enter(ops, layer, taps.as_deref_mut())?;
            self.attend(ops, layer)?;
            self.feed_forward(ops, layer)?;
        }
        let eps = self.spec.norm_eps;
        ops.add_rms_norm(
            &self.delta,
            &mut self.residual,
            &self.final_norm,
            eps,
            &mut self.normed,
            None,
        )
    }

    /// Adds what the layer before left, which may be tapped, and norms the stream for `layer`.
    fn enter(&mut self, ops: &mut O, layer: usize, taps: Option<&mut Taps<O>>) -> Result<()> {
        let norm = &self.layers[layer].input_norm;
        let eps = self.spec.norm_eps;
        let tap = taps.and_then(|taps| {
            let before = layer as i32 - 1;
            let place = taps.ids.iter().position(|&id| id == before)?;
            Some((&mut taps.out, place * self.residual.cols()))
        });
        let (residual, normed) = (&mut self.residual, &mut self.normed);
        if layer > 0 {
            return ops.add_rms_norm(&self.delta, residual, norm, eps, normed, tap);
        }
        if let Some((out, column)) = tap {
            ops.copy_into(residual, out, 0, column)?;
        }
        ops.rms_norm(residual, norm, eps, normed)
    }

    /// `delta = o_proj(attention(normed))`.
    fn attend(&mut self, ops: &mut O, layer: usize) -> Result<()> {
        let weights = &self.layers[layer];
        let norms = weights.qk_norms.as_ref().map(|(q, k)| (q, k));
        ops.linear(&self.normed, &weights.qkv, &mut self.qkv)?;
        let sink = match &mut self.block {
            Some(block) => KvSink::Block(block),
            None => KvSink::Cache {
                kv: &mut self.kv,
                layer,
            },
        };
        let (spec, rows) = (&self.spec, &self.rows);
        let q_out = Some(&mut self.q);
        ops.qk_norm_rope(spec, &self.qkv, norms, &self.rope, rows, q_out, sink)?;
        let (q, kv, out) = (&self.q, &self.kv, &mut self.attended);
        match &self.block {
            Some(block) => ops.draft_attention(spec, q, kv, layer, block, rows, out)?,
            None => ops.verify_attention(spec, q, kv, layer, rows, out)?,
        }
        ops.linear(&self.attended, &weights.o_proj, &mut self.delta)
    }

    /// `residual += delta; delta = mlp(norm(residual))`.
    fn feed_forward(&mut self, ops: &mut O, layer: usize) -> Result<()> {
        let weights = &self.layers[layer];
        let (norm, eps) = (&weights.post_attention_norm, self.spec.norm_eps);
        let (residual, normed) = (&mut self.residual, &mut self.normed);
        ops.add_rms_norm(&self.delta, residual, norm, eps, normed, None)?;
        ops.linear(&self.normed, &weights.gate_up, &mut self.gate_up)?;
        ops.silu_mul(&self.gate_up, &mut self.activated)?;
        ops.linear(&self.activated, &weights.down, &mut self.delta)
    }

    /// Makes the rows that stay of the last pass, `map`, the first of their requests ([`Ops::commit_tree`]): their keys and
    /// values, final-normed states and taps.
    pub fn keep_rows(
        &mut self,
        ops: &mut O,
        map: &RowMap,
        kept: &[u64],
        taps: Option<&mut Taps<O>>,
    ) -> Result<()> {
        ops.commit_tree(&mut self.kv, &self.rows, kept)?;
        let index = map.gathered(kept);
        reorder(ops, &mut self.normed, &mut self.spare, &index)?;
        match taps {
            Some(taps) => reorder(ops, &mut taps.out, &mut taps.spare, &index),
            None => Ok(()),
        }
    }

    /// Appends context keys and values to every layer's cache without running any row: `kv_of` are the layers'
    /// `[2 Hkv D, d]` weights, `context [rows, d]` their input, `kv` the buffer between.
    pub fn append_context(
        &mut self,
        ops: &mut O,
        map: &RowMap,
        kv_of: &[O::Weight],
        context: &O::Mat,
        kv: &mut O::Mat,
    ) -> Result<()> {
        ops.set_row_map(&mut self.rows, map)?;
        let key = ops.pass_key(&self.rows, self.work[1]);
        let append = &mut |ops: &mut O| self.append_layers(ops, kv_of, context, kv);
        if ops.recorded(key, append)? {
            kv.set_rows(map.num_rows())?;
        }
        Ok(())
    }

    /// The context's keys and values of every layer.
    fn append_layers(
        &mut self,
        ops: &mut O,
        kv_of: &[O::Weight],
        context: &O::Mat,
        kv: &mut O::Mat,
    ) -> Result<()> {
        for (layer, (weights, kv_weight)) in self.layers.iter().zip(kv_of).enumerate() {
            let norms = weights.qk_norms.as_ref().map(|(q, k)| (q, k));
            ops.linear(context, kv_weight, kv)?;
            let sink = KvSink::Cache {
                kv: &mut self.kv,
                layer,
            };
            ops.qk_norm_rope(&self.spec, kv, norms, &self.rope, &self.rows, None, sink)?;
        }
        Ok(())
    }
}

/// `mat[i] = mat[index[i]]`, through `spare`; the matrix stays where it is.
fn reorder<O: Ops>(
    ops: &mut O,
    mat: &mut O::Mat,
    spare: &mut Option<O::Mat>,
    index: &[u32],
) -> Result<()> {
    let spare = match spare {
        Some(spare) => spare,
        None => spare.insert(ops.mat(mat.max_rows(), mat.cols())?),
    };
    ops.gather_rows(mat, index, spare)?;
    ops.copy_into(spare, mat, 0, 0)
}

/// How a stack differs from other stacks, beside its sizes.
#[derive(Clone, Copy, Debug)]
pub(super) struct StackShape {
    /// Most rows of a pass.
    pub max_rows: usize,
    /// What a row sees.
    pub visibility: Visibility,
    /// Whether q and k are normed.
    pub qk_norm: QkNorm,
    /// How its cache holds keys and values; a block stack's is native.
    pub kv_dtype: KvDtype,
}

impl QkNorm {
    /// Refuses a layer whose norms of q and k are not what the family computes.
    fn check(self, weights: &Checkpoint, prefix: &str, head_dim: usize) -> Result<()> {
        let name = format!("{prefix}self_attn.q_norm.weight");
        match self {
            Self::Required => weights.tensor(&name, &[head_dim]).map(|_| ()),
            Self::Absent => weights.refuse(&name, "the family has no q_norm"),
            Self::Optional => Ok(()),
        }
    }
}
