//! The target: a Qwen3 or Llama model, run in ragged passes over its own paged cache.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::checkpoint::Checkpoint;
use super::config::{TargetConfig, TargetFamily};
use super::kv_scales::TARGET_PREFIX;
use super::stack::{DecoderStack, Limits, QkNorm, StackShape, Taps, Visibility, new_work};
use super::{Features, Target};
use crate::error::{Error, Result};
use crate::ops::{KvDtype, Matrix, Ops, RowMap};

/// The embedding's name in a target.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The head's name in a target that does not share it with the embedding.
const LM_HEAD: &str = "lm_head.weight";

/// A dense decoder-only target.
pub struct DecoderTarget<O: Ops> {
    dir: PathBuf,
    config: TargetConfig,
    vocabulary: Vocabulary<O>,
    stack: DecoderStack<O>,
    taps: Option<Taps<O>>,
    /// `[logit rows, d]`: the final-normed states of the rows whose logits were asked for.
    selected: O::Mat,
    logits: O::Logits,
}

/// Embedding and head, which drafters share with their target.
pub(super) struct Vocabulary<O: Ops> {
    /// `[vocab, d]`.
    pub embedding: Arc<O::Weight>,
    /// `[vocab, d]`; the embedding itself when tied.
    pub lm_head: Arc<O::Weight>,
}

impl<O: Ops> Clone for Vocabulary<O> {
    fn clone(&self) -> Self {
        Self {
            embedding: Arc::clone(&self.embedding),
            lm_head: Arc::clone(&self.lm_head),
        }
    }
}

impl<O: Ops> DecoderTarget<O> {
    /// Loads the target in `dir`, tapping the residual stream after the layers `tap_ids` (-1 is the embedding), for passes
    /// within `limits`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for what does not fit in `dir`, [`Error::Argument`] for a tap that does not exist.
    pub fn load(ops: &mut O, dir: &Path, limits: &Limits, tap_ids: &[i32]) -> Result<Self> {
        Self::load_with_kv(ops, dir, limits, tap_ids, KvDtype::Native)
    }

    /// [`DecoderTarget::load`] with a cache of `kv_dtype`. In fp8 its factors are those that the checkpoint brings
    /// ([`super::kv_scales`]), or 1.
    ///
    /// # Errors
    /// As [`DecoderTarget::load`]; factors that cannot be used.
    pub fn load_with_kv(
        ops: &mut O,
        dir: &Path,
        limits: &Limits,
        tap_ids: &[i32],
        kv_dtype: KvDtype,
    ) -> Result<Self> {
        let config = TargetConfig::read(dir)?;
        let weights = Checkpoint::open(dir)?;
        check_tap_ids(tap_ids, config.decoder.num_layers)?;
        let sizes = &config.decoder;
        let (d, vocab) = (sizes.hidden_size, sizes.vocab_size);
        let embedding = Arc::new(weights.weight(ops, &[(EMBEDDING, vocab)], d)?);
        let lm_head = if config.tie_word_embeddings {
            Arc::clone(&embedding)
        } else {
            Arc::new(weights.weight(ops, &[(LM_HEAD, vocab)], d)?)
        };
        let shape = StackShape {
            max_rows: limits.max_rows,
            visibility: Visibility::Causal,
            qk_norm: match config.family {
                TargetFamily::Qwen3 => QkNorm::Required,
                TargetFamily::Llama => QkNorm::Absent,
            },
            kv_dtype,
        };
        let taps = match tap_ids {
            [] => None,
            ids => Some(Taps {
                ids: ids.to_vec(),
                out: ops.mat(limits.max_rows, ids.len() * d)?,
                spare: None,
                work: new_work(),
            }),
        };
        Ok(Self {
            vocabulary: Vocabulary { embedding, lm_head },
            stack: DecoderStack::load(ops, &weights, TARGET_PREFIX, sizes, shape, limits)?,
            taps,
            selected: ops.mat(limits.max_logit_rows, d)?,
            logits: ops.fixed_logits(limits.max_logit_rows, vocab)?,
            dir: dir.to_owned(),
            config,
        })
    }

    /// What `config.json` said.
    pub fn config(&self) -> &TargetConfig {
        &self.config
    }

    /// The directory it was loaded from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Taps other layers from now on, as many as before (see [`super::selfcheck`]).
    ///
    /// # Errors
    /// [`Error::Argument`] for a tap that does not exist or another number of taps.
    pub fn set_tap_ids(&mut self, tap_ids: &[i32]) -> Result<()> {
        check_tap_ids(tap_ids, self.config.decoder.num_layers)?;
        let current = self.taps.as_ref().map_or(0, |taps| taps.ids.len());
        if tap_ids.len() != current {
            let expected = format!("{current} layer ids");
            return Err(Error::argument("tap_ids", expected, tap_ids.len()));
        }
        if let Some(taps) = &mut self.taps {
            taps.ids = tap_ids.to_vec();
            taps.work = new_work();
        }
        Ok(())
    }

    pub(super) fn vocabulary(&self) -> Vocabulary<O> {
        self.vocabulary.clone()
    }

    /// The head's name in this target's checkpoint.
    pub(super) fn lm_head_name(&self) -> &'static str {
        if self.config.tie_word_embeddings {
            EMBEDDING
        } else {
            LM_HEAD
        }
    }
}

/// Checks that the streams `tap_ids` exist: the last layer's is only seen normed.
fn check_tap_ids(tap_ids: &[i32], num_layers: usize) -> Result<()> {
    let last = num_layers as i32 - 2;
    for (i, &id) in tap_ids.iter().enumerate() {
        if id < -1 || id > last || tap_ids[..i].contains(&id) {
            let expected = format!("different layer ids from -1 (the embedding) to {last}");
            return Err(Error::argument("tap_ids", expected, id));
        }
    }
    Ok(())
}

impl<O: Ops> Target<O> for DecoderTarget<O> {
    fn vocab_size(&self) -> usize {
        self.config.decoder.vocab_size
    }

    fn max_position(&self) -> usize {
        self.config.decoder.max_position
    }

    fn forward(
        &mut self,
        ops: &mut O,
        ids: &[u32],
        map: &RowMap,
        logit_rows: Option<&[u32]>,
    ) -> Result<()> {
        if ids.len() != map.num_rows() {
            let expected = format!("one per row of the pass ({})", map.num_rows());
            return Err(Error::argument("ids", expected, ids.len()));
        }
        ops.embed(&self.vocabulary.embedding, ids, &mut self.stack.residual)?;
        self.stack.run(ops, map, self.taps.as_mut())?;
        let lm_head = &self.vocabulary.lm_head;
        match logit_rows {
            Some([]) => self.logits.set_rows(0),
            Some(rows) => {
                ops.gather_rows(&self.stack.normed, rows, &mut self.selected)?;
                ops.linear_logits(&self.selected, lm_head, &mut self.logits)
            }
            None => ops.linear_logits(&self.stack.normed, lm_head, &mut self.logits),
        }
    }

    fn keep(&mut self, ops: &mut O, map: &RowMap, kept: &[u64]) -> Result<()> {
        self.stack.keep_rows(ops, map, kept, self.taps.as_mut())
    }

    fn logits(&self) -> &O::Logits {
        &self.logits
    }

    fn features(&self) -> Features<'_, O> {
        Features {
            taps: self.taps.as_ref().map(|taps| &taps.out),
            hidden: &self.stack.normed,
            places: None,
        }
    }
}
