//! The DSpark drafter, and DFlash as its form without a sequential head.
//!
//! A committed position is seen through its taps alone: `hidden_norm(fc . taps)` gives one context feature, from which every
//! draft layer makes a key and a value ([`Drafter::observe`]). A draft is one pass of a block `[anchor, mask, ...]` whose rows
//! see that context and each other in both directions ([`Drafter::propose`]); the head then walks the rows left to right.

use std::path::Path;

use super::checkpoint::Checkpoint;
use super::config::config_error;
use super::decoder::{DecoderTarget, EMBEDDING, Vocabulary};
use super::drafter_config::{DSparkConfig, DrafterConfig};
use super::head::{BlockHead, BlockStates};
use super::head_weights::load_head;
use super::stack::{DecoderStack, Limits, QkNorm, StackShape, Visibility};
use super::{Drafter, Features, ProposeBatch};
use crate::error::{Error, Result};
use crate::ops::{DraftLaw, Drafted, HeadForm, KvDtype, Ops, RowMap};

/// How a block is laid out. Anything but the default is wrong for a sound checkpoint: the variations are the slips that
/// checkpoints and their converters are known for (see [`super::selfcheck`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Added to the positions of all block rows.
    pub position_shift: i32,
    /// The anchor's row predicts nothing: one more mask row, and row `k` (from 0) predicts position `anchor + k`.
    pub anchor_drop: bool,
    /// The bias of a draft reads the token before the previous one (the anchor, where there is none before it).
    pub markov_lag: bool,
}

/// A DSpark or DFlash drafter on its target's embedding and head.
pub struct DSparkDrafter<O: Ops> {
    config: DSparkConfig,
    layout: Layout,
    vocabulary: Vocabulary<O>,
    context: ContextEncoder<O>,
    stack: DecoderStack<O>,
    head: BlockHead<O>,
    /// `[num_reqs * draft_len, d]`: the states that predict.
    selected: O::Mat,
    max_num_reqs: usize,
    max_draft_len: usize,
}

/// From taps to the context keys and values of every draft layer.
struct ContextEncoder<O: Ops> {
    /// `[d, m d]`.
    fc: O::Weight,
    hidden_norm: O::Norm,
    /// `[2 Hkv D, d]` for each layer: k and v of the layer's fused qkv weight once more. The context needs no q, which is the
    /// larger part; the copy is some 10 MB a layer for Qwen3-4B.
    kv_of: Vec<O::Weight>,
    /// `[rows, m d]`.
    taps: O::Mat,
    /// `[rows, d]`.
    projected: O::Mat,
    /// `[rows, d]`.
    features: O::Mat,
    /// `[rows, 2 Hkv D]`.
    kv: O::Mat,
}

impl<O: Ops> ContextEncoder<O> {
    fn load(
        ops: &mut O,
        weights: &Checkpoint,
        config: &DSparkConfig,
        max_rows: usize,
    ) -> Result<Self> {
        let (d, kv_size) = (config.decoder.hidden_size, config.decoder.kv_size());
        let taps = config.target_layer_ids.len() * d;
        let kv_of = (0..config.decoder.num_layers)
            .map(|i| {
                let parts = [
                    (&*format!("layers.{i}.self_attn.k_proj.weight"), kv_size),
                    (&*format!("layers.{i}.self_attn.v_proj.weight"), kv_size),
                ];
                weights.weight(ops, &parts, d)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            fc: weights.weight(ops, &[("fc.weight", d)], taps)?,
            hidden_norm: weights.norm(ops, "hidden_norm.weight", d)?,
            kv_of,
            taps: ops.mat(max_rows, taps)?,
            projected: ops.mat(max_rows, d)?,
            features: ops.mat(max_rows, d)?,
            kv: ops.mat(max_rows, 2 * kv_size)?,
        })
    }

    /// Encodes the flat rows `index` of a pass's taps.
    fn encode(&mut self, ops: &mut O, taps: &O::Mat, index: &[u32], eps: f32) -> Result<()> {
        ops.gather_rows(taps, index, &mut self.taps)?;
        ops.linear(&self.taps, &self.fc, &mut self.projected)?;
        ops.rms_norm(&self.projected, &self.hidden_norm, eps, &mut self.features)
    }
}

impl<O: Ops> DSparkDrafter<O> {
    /// Loads the drafter in `dir` for `target`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming what does not fit: in `dir`, or between the two.
    pub fn load(
        ops: &mut O,
        target: &DecoderTarget<O>,
        dir: &Path,
        limits: &Limits,
    ) -> Result<Self> {
        let drafter = DrafterConfig::read(dir)?;
        drafter.check_pair(dir, target.config())?;
        let DrafterConfig::DSpark(config) = drafter else {
            return Err(config_error(
                dir,
                "architectures",
                "Qwen3DSparkModel",
                "an MTP module",
            ));
        };
        let weights = Checkpoint::open(dir)?;
        check_vocabulary(&weights, target, &config)?;
        let shape = StackShape {
            max_rows: limits.max_num_reqs * (config.block_size + 1),
            visibility: Visibility::Block,
            qk_norm: QkNorm::Required,
            kv_dtype: KvDtype::Native,
        };
        let max_draft_len = limits.max_draft_len.min(config.block_size);
        let drafts = limits.max_num_reqs * max_draft_len;
        let sizes = &config.decoder;
        let head = load_head(ops, &weights, &config)?;
        Ok(Self {
            layout: Layout::default(),
            vocabulary: target.vocabulary(),
            context: ContextEncoder::load(ops, &weights, &config, limits.max_rows)?,
            stack: DecoderStack::load(ops, &weights, "", sizes, shape, limits)?,
            head: BlockHead::new(ops, head, drafts, sizes.vocab_size)?,
            selected: ops.mat(drafts, sizes.hidden_size)?,
            max_num_reqs: limits.max_num_reqs,
            max_draft_len,
            config,
        })
    }

    /// What `config.json` said.
    pub fn config(&self) -> &DSparkConfig {
        &self.config
    }

    /// Lays blocks out differently from now on.
    pub fn set_layout(&mut self, layout: Layout) {
        self.layout = layout;
    }

    /// `[num_reqs * draft_len, hidden_size]`: the final-normed states behind the last proposal.
    pub fn hidden(&self) -> &O::Mat {
        &self.selected
    }

    /// `[rows, hidden_size]`: the context features of the rows last observed.
    pub fn context(&self) -> &O::Mat {
        &self.context.features
    }

    /// Runs the blocks and leaves the states of the first `draft_len` predicting rows in `selected`. All `block_size` rows are
    /// run whatever `draft_len` is: rows see each other both ways, and the drafter was trained on whole blocks.
    fn run_blocks(
        &mut self,
        ops: &mut O,
        batch: &ProposeBatch<'_>,
        draft_len: usize,
    ) -> Result<()> {
        let skipped = usize::from(self.layout.anchor_drop);
        let rows = self.config.block_size + skipped;
        let mut ids = vec![self.config.mask_token_id; batch.anchors.len() * rows];
        for (first, &anchor) in ids.iter_mut().step_by(rows).zip(batch.anchors) {
            *first = anchor;
        }
        let map = block_map(batch.map, rows, self.layout.position_shift)?;
        ops.embed(&self.vocabulary.embedding, &ids, &mut self.stack.residual)?;
        self.stack.run(ops, &map, None)?;
        let predicting: Vec<u32> = (0..batch.anchors.len())
            .flat_map(|r| (0..draft_len).map(move |k| (r * rows + skipped + k) as u32))
            .collect();
        ops.gather_rows(&self.stack.normed, &predicting, &mut self.selected)
    }
}

impl<O: Ops> Drafter<O> for DSparkDrafter<O> {
    fn max_draft_len(&self) -> usize {
        self.max_draft_len
    }

    fn has_confidence(&self) -> bool {
        self.config.confidence.is_some()
    }

    fn observe(
        &mut self,
        ops: &mut O,
        features: &Features<'_, O>,
        map: &RowMap,
        _slots: &[usize],
        kept: &[usize],
        _next_tokens: &[u32],
    ) -> Result<()> {
        let Some(taps) = features.taps else {
            let expected = format!(
                "a target that taps layers {:?}",
                self.config.target_layer_ids
            );
            return Err(Error::argument("taps", expected, "a target without taps"));
        };
        let (map, index) = map.keep(kept);
        if index.is_empty() {
            return Ok(());
        }
        let context = &mut self.context;
        let places = features.places_of(&index);
        context.encode(ops, taps, &places, self.config.decoder.norm_eps)?;
        self.stack.append_context(
            ops,
            &map,
            &context.kv_of,
            &context.features,
            &mut context.kv,
        )
    }

    fn propose(
        &mut self,
        ops: &mut O,
        batch: &ProposeBatch<'_>,
        draft_len: usize,
    ) -> Result<Drafted> {
        check_proposal(batch, draft_len, self.max_draft_len, self.max_num_reqs)?;
        self.run_blocks(ops, batch, draft_len)?;
        let positions = anchor_positions(batch.map);
        let states = BlockStates {
            hidden: &self.selected,
            lm_head: &*self.vocabulary.lm_head,
            anchor_positions: &positions,
            draft_len,
        };
        if self.layout.markov_lag {
            return self.head.walk_stepwise(ops, &states, batch, 2);
        }
        self.head.walk(ops, &states, batch)
    }

    fn set_head_form(&mut self, ops: &mut O, form: HeadForm) -> Result<()> {
        self.head.set_form(ops, form)
    }

    fn law(&self) -> DraftLaw<'_, O> {
        self.head.law()
    }
}

/// Checks what every drafter asks of a proposal.
pub(super) fn check_proposal(
    batch: &ProposeBatch<'_>,
    draft_len: usize,
    max_draft_len: usize,
    max_num_reqs: usize,
) -> Result<()> {
    if !(1..=max_draft_len).contains(&draft_len) {
        let expected = format!("1 to {max_draft_len}");
        return Err(Error::argument("draft_len", expected, draft_len));
    }
    let num_reqs = batch.anchors.len();
    if num_reqs > max_num_reqs {
        let expected = format!("at most {max_num_reqs} requests");
        return Err(Error::argument("anchors", expected, num_reqs));
    }
    let counts = [
        ("slots", batch.slots.len()),
        ("sampling", batch.sampling.len()),
        ("map.requests", batch.map.num_reqs()),
        ("map.rows", batch.map.num_rows()),
    ];
    let constraints = Some(("constraints", batch.constraints.len())).filter(|(_, n)| *n > 0);
    for (field, count) in counts.into_iter().chain(constraints) {
        if count != num_reqs {
            let expected = format!("one per anchor ({num_reqs})");
            return Err(Error::argument(field, expected, count));
        }
    }
    Ok(())
}

/// Positions of the anchors of a proposal's map.
pub(super) fn anchor_positions(map: &RowMap) -> Vec<u32> {
    map.positions.iter().map(|&p| p as u32).collect()
}

/// The map of blocks of `rows` rows at the anchors of `anchors`.
fn block_map(anchors: &RowMap, rows: usize, position_shift: i32) -> Result<RowMap> {
    let mut map = RowMap::new(anchors.max_pages_per_req);
    for r in 0..anchors.num_reqs() {
        let position = (anchors.positions[r] + position_shift).max(0) as usize;
        let pages = &anchors.page_table[r * map.max_pages_per_req..][..map.max_pages_per_req];
        map.push(rows, anchors.seq_lens[r] as usize, position, pages)?;
    }
    Ok(map)
}

/// Checks that an embedding or head stored with the drafter is its target's, which is used in its place.
fn check_vocabulary<O: Ops>(
    weights: &Checkpoint,
    target: &DecoderTarget<O>,
    config: &DSparkConfig,
) -> Result<()> {
    let shape = [config.decoder.vocab_size, config.decoder.hidden_size];
    let pairs = [
        ("embed_tokens.weight", EMBEDDING),
        ("lm_head.weight", target.lm_head_name()),
    ];
    for (name, target_name) in pairs.into_iter().filter(|(name, _)| weights.contains(name)) {
        let of_target = Checkpoint::open(target.dir())?;
        let mask = config.mask_token_id as usize;
        weights.check_same_rows(name, &of_target, target_name, shape, mask)?;
    }
    Ok(())
}
