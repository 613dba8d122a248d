//! MTP-1: one decoder layer that predicts the token after the next one from the target's last hidden state.
//!
//! Slot `s` of its cache belongs to (final-normed target state at `s`, token at `s + 1`), at RoPE position `s`; its output
//! predicts the token at `s + 2`. With the anchor at position `a`, slot `a - 1` is the last that can be filled, and gives the
//! first draft. Later drafts chain: the module's own output stands in for the target's state in slots `a, a + 1, ...`, which
//! the next [`Drafter::observe`] overwrites.

use std::path::Path;

use super::checkpoint::Checkpoint;
use super::config::config_error;
use super::decoder::{DecoderTarget, Vocabulary};
use super::drafter_config::{DrafterConfig, MTP_FC};
use super::dspark::{anchor_positions, check_proposal};
use super::head::interleave;
use super::stack::{DecoderStack, Limits, QkNorm, StackShape, Visibility};
use super::{Drafter, Features, ProposeBatch};
use crate::error::{Error, Result};
use crate::ops::{
    DraftBatch, DraftHead, DraftLaw, Drafted, KvDtype, LowRankLaw, Matrix, Ops, RowMap,
};

/// The longest chain: with its anchor it fills the 16 rows a request may bring to a verify pass.
pub(super) const MAX_DRAFT_LEN: usize = 15;

/// An MTP-1 drafter on its target's embedding and head.
pub struct MtpDrafter<O: Ops> {
    vocabulary: Vocabulary<O>,
    input: MtpInput<O>,
    stack: DecoderStack<O>,
    /// `[rows, d]`: the target states of the rows kept.
    states: O::Mat,
    /// Rows `0 .. max_num_reqs`: each slot's latest output state; the rest is room for a pass's outputs.
    outputs: O::Mat,
    /// `[max_num_reqs, d]`.
    latest: O::Mat,
    /// `[num_reqs, d]`: the states the current draft comes from.
    hidden: O::Mat,
    step_logits: O::Logits,
    /// `[num_reqs * draft_len, vocab]`.
    logits: O::Logits,
    /// Its normalisers.
    law: LowRankLaw,
    head: DraftHead<O>,
    norm_eps: f32,
    max_num_reqs: usize,
    max_draft_len: usize,
}

/// `fc . [pre_fc_norm_hidden(hidden) ; pre_fc_norm_embedding(embedding)]`.
struct MtpInput<O: Ops> {
    /// `[d, 2 d]`, hidden first.
    fc: O::Weight,
    hidden_norm: O::Norm,
    embedding_norm: O::Norm,
    embedded: O::Mat,
    normed: O::Mat,
    /// `[rows, 2 d]`.
    joined: O::Mat,
}

impl<O: Ops> MtpInput<O> {
    /// Joins `hidden` with the embeddings of `ids` row by row into `out`, the residual stream of the layer.
    fn join(
        &mut self,
        ops: &mut O,
        vocabulary: &Vocabulary<O>,
        hidden: &O::Mat,
        ids: &[u32],
        eps: f32,
        out: &mut O::Mat,
    ) -> Result<()> {
        self.joined.set_rows(ids.len())?;
        ops.rms_norm(hidden, &self.hidden_norm, eps, &mut self.normed)?;
        ops.copy_into(&self.normed, &mut self.joined, 0, 0)?;
        ops.embed(&vocabulary.embedding, ids, &mut self.embedded)?;
        ops.rms_norm(&self.embedded, &self.embedding_norm, eps, &mut self.normed)?;
        ops.copy_into(&self.normed, &mut self.joined, 0, self.normed.cols())?;
        ops.linear(&self.joined, &self.fc, out)
    }
}

impl<O: Ops> MtpDrafter<O> {
    /// Loads the MTP module in `dir`, which may be the target's own directory.
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
        let DrafterConfig::Mtp(config) = drafter else {
            return Err(config_error(
                dir,
                "architectures",
                "an MTP module",
                "Qwen3DSparkModel",
            ));
        };
        let weights = Checkpoint::open(dir)?;
        let sizes = &config.decoder;
        let (d, vocab, reqs) = (sizes.hidden_size, sizes.vocab_size, limits.max_num_reqs);
        let rows = limits.max_rows.max(reqs);
        let max_draft_len = limits.max_draft_len.min(MAX_DRAFT_LEN);
        let shape = StackShape {
            max_rows: rows,
            visibility: Visibility::Causal,
            qk_norm: QkNorm::Optional,
            kv_dtype: KvDtype::Native,
        };
        let mut outputs = ops.mat(reqs + rows, d)?;
        outputs.set_rows(reqs + rows)?;
        Ok(Self {
            vocabulary: target.vocabulary(),
            input: MtpInput {
                fc: weights.weight(ops, &[(MTP_FC, d)], 2 * d)?,
                hidden_norm: weights.norm(ops, "mtp.pre_fc_norm_hidden.weight", d)?,
                embedding_norm: weights.norm(ops, "mtp.pre_fc_norm_embedding.weight", d)?,
                embedded: ops.mat(rows, d)?,
                normed: ops.mat(rows, d)?,
                joined: ops.mat(rows, 2 * d)?,
            },
            stack: DecoderStack::load(ops, &weights, "mtp.", sizes, shape, limits)?,
            states: ops.mat(rows, d)?,
            outputs,
            latest: ops.mat(reqs, d)?,
            hidden: ops.mat(reqs, d)?,
            step_logits: ops.fixed_logits(reqs, vocab)?,
            logits: ops.fixed_logits(reqs * max_draft_len, vocab)?,
            law: LowRankLaw::default(),
            head: DraftHead::none(),
            norm_eps: sizes.norm_eps,
            max_num_reqs: reqs,
            max_draft_len,
        })
    }

    /// `[rows, hidden_size]`: the module's normed outputs for the rows last run.
    pub fn hidden(&self) -> &O::Mat {
        &self.stack.normed
    }

    /// Makes each slot's latest output that of its last kept row.
    fn keep_latest(&mut self, ops: &mut O, map: &RowMap, slots: &[usize]) -> Result<()> {
        let mut index: Vec<u32> = (0..self.max_num_reqs as u32).collect();
        for (r, &slot) in slots.iter().enumerate() {
            if let Some(last) = map.rows_of(r).next_back() {
                index[slot] = (self.max_num_reqs + last) as u32;
            }
        }
        let first = self.max_num_reqs;
        ops.copy_into(&self.stack.normed, &mut self.outputs, first, 0)?;
        ops.gather_rows(&self.outputs, &index, &mut self.latest)?;
        ops.copy_into(&self.latest, &mut self.outputs, 0, 0)
    }

    /// Runs `tokens`, each after its request's state in `hidden`, at the slots `map`; the outputs become `hidden`.
    fn chain(&mut self, ops: &mut O, map: &RowMap, tokens: &[u32]) -> Result<()> {
        let eps = self.norm_eps;
        let residual = &mut self.stack.residual;
        self.input
            .join(ops, &self.vocabulary, &self.hidden, tokens, eps, residual)?;
        self.stack.run(ops, map, None)?;
        let rows: Vec<u32> = (0..tokens.len() as u32).collect();
        ops.gather_rows(&self.stack.normed, &rows, &mut self.hidden)
    }

    fn check_slots(&self, slots: &[usize]) -> Result<()> {
        match slots.iter().find(|&&slot| slot >= self.max_num_reqs) {
            None => Ok(()),
            Some(slot) => {
                let expected = format!("slots below {}", self.max_num_reqs);
                Err(Error::argument("slots", expected, slot))
            }
        }
    }
}

impl<O: Ops> Drafter<O> for MtpDrafter<O> {
    fn max_draft_len(&self) -> usize {
        self.max_draft_len
    }

    fn has_confidence(&self) -> bool {
        false
    }

    fn observe(
        &mut self,
        ops: &mut O,
        features: &Features<'_, O>,
        map: &RowMap,
        slots: &[usize],
        kept: &[usize],
        next_tokens: &[u32],
    ) -> Result<()> {
        self.check_slots(slots)?;
        if next_tokens.len() != map.num_rows() {
            let expected = format!("one per row of the pass ({})", map.num_rows());
            return Err(Error::argument("next_tokens", expected, next_tokens.len()));
        }
        let (map, index) = map.keep(kept);
        if index.is_empty() {
            return Ok(());
        }
        let ids: Vec<u32> = index.iter().map(|&row| next_tokens[row as usize]).collect();
        let places = features.places_of(&index);
        ops.gather_rows(features.hidden, &places, &mut self.states)?;
        let (eps, residual) = (self.norm_eps, &mut self.stack.residual);
        self.input
            .join(ops, &self.vocabulary, &self.states, &ids, eps, residual)?;
        self.stack.run(ops, &map, None)?;
        self.keep_latest(ops, &map, slots)
    }

    fn propose(
        &mut self,
        ops: &mut O,
        batch: &ProposeBatch<'_>,
        draft_len: usize,
    ) -> Result<Drafted> {
        check_proposal(batch, draft_len, self.max_draft_len, self.max_num_reqs)?;
        self.check_slots(batch.slots)?;
        let num_reqs = batch.anchors.len();
        let slots: Vec<u32> = batch.slots.iter().map(|&slot| slot as u32).collect();
        ops.gather_rows(&self.outputs, &slots, &mut self.hidden)?;
        self.logits.set_rows(num_reqs * draft_len)?;
        let mut steps: Vec<Drafted> = Vec::with_capacity(draft_len);
        let mut laws = Vec::with_capacity(draft_len);
        for k in 0..draft_len {
            if let Some(last) = steps.last() {
                // The first chained slot is the anchor's own.
                self.chain(ops, &advanced(batch.map, k - 1), &last.tokens)?;
            }
            let positions = anchor_positions(&advanced(batch.map, k));
            ops.linear_logits(
                &self.hidden,
                &self.vocabulary.lm_head,
                &mut self.step_logits,
            )?;
            let mask = batch.masks_after(&steps, self.logits.cols());
            let step = DraftBatch {
                anchors: batch.anchors,
                anchor_positions: &positions,
                sampling: batch.sampling,
                draft_len: 1,
                mask: mask.as_deref(),
            };
            let (head, logits) = (&self.head, &self.step_logits);
            let (drafted, law) = ops.draft_full(head, logits, &self.hidden, &step)?;
            ops.copy_logits(logits, &mut self.logits, k, draft_len)?;
            steps.push(drafted);
            laws.push(law);
        }
        self.law = LowRankLaw::interleave(&laws, num_reqs);
        Ok(interleave(&steps, num_reqs))
    }

    fn law(&self) -> DraftLaw<'_, O> {
        DraftLaw::LowRank {
            base: &self.logits,
            w2: None,
            law: &self.law,
        }
    }
}

/// The one-row requests of `map`, `slots` slots on.
fn advanced(map: &RowMap, slots: usize) -> RowMap {
    let by = slots as i32;
    RowMap {
        seq_lens: map.seq_lens.iter().map(|len| len + by).collect(),
        positions: map.positions.iter().map(|p| p + by).collect(),
        ..map.clone()
    }
}
