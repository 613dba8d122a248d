//! Family draft: what the forms of the head share.

use std::ptr::{null, null_mut};

use bytemuck::Zeroable;
use cudarc::driver::DeviceRepr;
use half::bf16;

use super::arguments::{Arguments, Offset, Optional};
use super::{Cuda, DeviceMatrix, Logits, Norm, expect};
use crate::device::Buffer;
use crate::error::{Error, Result};
use crate::ops::{DraftBatch, DraftHead, Drafted, HeadKind, Matrix};
use crate::sys;

/// Where the arrays of a call lie in its upload.
pub(super) struct Uploaded {
    pub seeds: Offset,
    pub anchors: Offset,
    pub positions: Offset,
    pub temperature: Offset,
    pub rules: Offset,
    pub mask: Optional,
}

impl Uploaded {
    pub fn pack(batch: &DraftBatch<'_>, arguments: &mut Arguments) -> Self {
        let sampling = batch.sampling;
        Self {
            seeds: arguments.push_u64(sampling.iter().map(|s| s.seed)),
            anchors: arguments.push(batch.anchors.iter().copied()),
            positions: arguments.push(batch.anchor_positions.iter().copied()),
            temperature: arguments.push_f32(sampling.iter().map(|s| s.temperature)),
            rules: arguments.push(sampling.iter().map(|s| s.rule as u32)),
            mask: Optional(batch.mask.map(|mask| arguments.push(mask.iter().copied()))),
        }
    }
}

/// Where the drafts of a call lie in its results, in words: tokens, then confidences. What hands the law on follows.
#[derive(Clone, Copy)]
pub(super) struct DraftWords {
    pub num_rows: usize,
    has_confidence: bool,
}

impl DraftWords {
    pub fn new(head: &DraftHead<Cuda>, num_rows: usize) -> Self {
        Self {
            num_rows,
            has_confidence: head.confidence.is_some(),
        }
    }

    pub fn len(self) -> usize {
        self.num_rows * if self.has_confidence { 2 } else { 1 }
    }

    /// The device addresses of tokens and confidences in `results`.
    pub fn pointers(self, results: &mut Buffer<u32>) -> (*mut i32, *mut f32) {
        let confidence = if self.has_confidence {
            results.mut_ptr(self.num_rows).cast()
        } else {
            null_mut()
        };
        (results.mut_ptr(0).cast(), confidence)
    }

    pub fn read(self, words: &[u32]) -> Drafted {
        let (tokens, confidence) = words[..self.len()].split_at(self.num_rows);
        Drafted {
            tokens: tokens.to_vec(),
            confidence: self.has_confidence.then(|| floats(confidence)),
        }
    }
}

/// Words as the f32 they are.
pub(super) fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().copied().map(f32::from_bits).collect()
}

/// What every form of a walk is given, and where its drafts go.
pub(super) struct Walk<'a> {
    pub head: &'a DraftHead<Cuda>,
    pub logits: &'a Logits,
    pub hidden: &'a DeviceMatrix<bf16>,
    pub batch: &'a DraftBatch<'a>,
}

impl Walk<'_> {
    /// Checks the operands against each other.
    pub fn check(&self) -> Result<()> {
        let (logits, hidden, batch) = (self.logits, self.hidden, self.batch);
        let num_rows = batch.anchors.len() * batch.draft_len;
        check_head(self.head, logits.cols(), hidden.cols())?;
        batch.check(logits.cols())?;
        expect("logits.rows", num_rows, logits.rows())?;
        expect("hidden.rows", num_rows, hidden.rows())
    }
}

/// The params of a form: what all forms have from a [`Walk`], an [`Uploaded`] in its words and [`DraftWords`] in the
/// results; then the form's own fields.
macro_rules! walk_params {
    ($params:ident, $walk:ident, ($uploaded:expr, $words:expr), ($drafts:expr, $results:expr), {
        $($field:ident: $value:expr,)*
    }) => {{
        let (head, uploaded, words) = ($walk.head, $uploaded, $words);
        let confidence = head.confidence.as_ref();
        let (draft_tokens, draft_confidence) = $drafts.pointers($results);
        sys::$params {
            struct_size: struct_size::<sys::$params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            logits_dtype: $walk.logits.dtype(),
            head: head_number(head.kind),
            num_reqs: int("requests", $walk.batch.anchors.len())?,
            draft_len: int("draft_len", $walk.batch.draft_len)?,
            vocab_size: int("vocab_size", $walk.logits.cols())?,
            hidden_size: int("hidden_size", $walk.hidden.cols())?,
            markov_rank: int("markov_rank", head.rank)?,
            confidence_with_markov: confidence.map_or(0, |c| i32::from(c.with_markov)),
            confidence_bias: confidence.map_or(0.0, |c| c.bias),
            logits: $walk.logits.ptr(),
            hidden: $walk.hidden.ptr(0, 0).cast(),
            markov_w1: matrix(head.markov_w1.as_ref()),
            proj_weight: matrix(head.proj_weight.as_ref()),
            proj_bias: vector(head.proj_bias.as_ref()),
            confidence_weight: matrix(confidence.map(|c| &c.weight)),
            anchors: uploaded.anchors.of(words),
            anchor_positions: uploaded.positions.of(words),
            temperature: uploaded.temperature.of(words),
            seeds: uploaded.seeds.of(words),
            rules: uploaded.rules.of(words),
            mask: uploaded.mask.of(words),
            draft_tokens,
            confidence: draft_confidence,
            workspace: null_mut(),
            workspace_bytes: 0,
            stride_logits_row: $walk.logits.stride(),
            $($field: $value,)*
        }
    }};
}
pub(super) use walk_params;

/// The device address of a weight; null where there is none.
pub(super) fn matrix<W: DeviceRepr + Copy + Zeroable, T>(
    weight: Option<&DeviceMatrix<W>>,
) -> *const T {
    weight.map_or(null(), |weight| weight.ptr(0, 0).cast())
}

/// The device address of a vector; null where there is none.
pub(super) fn vector<T>(vector: Option<&Norm>) -> *const T {
    vector.map_or(null(), |vector| vector.ptr().cast())
}

pub(super) fn head_number(kind: HeadKind) -> sys::dspark_head_kind {
    match kind {
        HeadKind::None => sys::DSPARK_HEAD_NONE,
        HeadKind::Vanilla => sys::DSPARK_HEAD_VANILLA,
        HeadKind::Gated => sys::DSPARK_HEAD_GATED,
        HeadKind::Rnn => sys::DSPARK_HEAD_RNN,
    }
}

/// Refuses weights that are missing or do not fit the vocabulary and the hidden size.
fn check_head(head: &DraftHead<Cuda>, vocab_size: usize, hidden_size: usize) -> Result<()> {
    let rank = head.rank;
    if head.kind != HeadKind::None {
        check_weight("markov_w1", head.markov_w1.as_ref(), [vocab_size, rank])?;
        check_weight("markov_w2", head.markov_w2.as_ref(), [vocab_size, rank])?;
    }
    let projection = match head.kind {
        HeadKind::None | HeadKind::Vanilla => None,
        HeadKind::Gated => Some([rank, hidden_size + rank]),
        HeadKind::Rnn => Some([3 * rank, 2 * rank + hidden_size]),
    };
    if let Some(shape) = projection {
        check_weight("proj_weight", head.proj_weight.as_ref(), shape)?;
        expect(
            "proj_bias",
            shape[0],
            head.proj_bias.as_ref().map_or(0, Norm::len),
        )?;
    }
    if let Some(confidence) = &head.confidence {
        let markov = if confidence.with_markov { rank } else { 0 };
        if confidence.with_markov && head.kind == HeadKind::None {
            return Err(Error::argument(
                "confidence",
                "no Markov part without a Markov head",
                "one with it",
            ));
        }
        let shape = [1, hidden_size + markov];
        check_weight("confidence.weight", Some(&confidence.weight), shape)?;
    }
    Ok(())
}

fn check_weight(field: &str, weight: Option<&DeviceMatrix<bf16>>, shape: [usize; 2]) -> Result<()> {
    let found = weight.map(|weight| [weight.rows(), weight.cols()]);
    if found == Some(shape) {
        return Ok(());
    }
    let found = found.map_or("none".into(), |found| format!("{found:?}"));
    Err(Error::argument(field, format!("{shape:?}"), found))
}
