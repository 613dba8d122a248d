//! Family draft: what the forms of the head share.

use std::ptr::null;

use bytemuck::Zeroable;
use cudarc::driver::DeviceRepr;
use half::bf16;

use super::arguments::{Arguments, Offset, Optional};
use super::{Cuda, DeviceMatrix, Norm, expect};
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

/// What a walk without rows drafts.
pub(super) fn nothing(head: &DraftHead<Cuda>) -> Drafted {
    Drafted {
        tokens: Vec::new(),
        confidence: head.confidence.as_ref().map(|_| Vec::new()),
    }
}

/// Checks the operands of a walk against each other.
pub(super) fn check_walk(
    head: &DraftHead<Cuda>,
    logits: &impl Matrix,
    hidden: &DeviceMatrix<bf16>,
    batch: &DraftBatch<'_>,
) -> Result<()> {
    let num_rows = batch.anchors.len() * batch.draft_len;
    check_head(head, logits.cols(), hidden.cols())?;
    batch.check(logits.cols())?;
    expect("logits.rows", num_rows, logits.rows())?;
    expect("hidden.rows", num_rows, hidden.rows())
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
