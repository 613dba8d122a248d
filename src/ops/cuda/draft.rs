//! Family draft: the semi-autoregressive head.

use std::ptr::{null, null_mut};

use half::bf16;

use super::arguments::{Arguments, Offset};
use super::{Cuda, DeviceMatrix, Logits, Norm, check, expect, int, struct_size};
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
    pub mask: Option<Offset>,
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
            mask: batch.mask.map(|mask| arguments.push(mask.iter().copied())),
        }
    }
}

impl Cuda {
    /// The method of the trait; see there.
    pub(super) fn run_head(
        &mut self,
        head: &DraftHead<Self>,
        logits: &mut Logits,
        hidden: &DeviceMatrix<bf16>,
        requests: &DraftBatch<'_>,
    ) -> Result<Drafted> {
        let logits = logits.writable()?;
        let num_reqs = requests.anchors.len();
        let num_rows = num_reqs * requests.draft_len;
        check_walk(head, logits, hidden, requests)?;
        if num_rows == 0 {
            return Ok(nothing(head));
        }

        let mut arguments = Arguments::default();
        let uploaded = Uploaded::pack(requests, &mut arguments);
        let words = arguments.upload(&mut self.arguments)?;
        // Tokens, then confidences.
        let results = self.results.at_least(2 * num_rows)?;
        let confidence = head.confidence.as_ref();
        let mut params = sys::dspark_draft_head_params {
            struct_size: struct_size::<sys::dspark_draft_head_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            head: head_number(head.kind),
            num_reqs: int("requests", num_reqs)?,
            draft_len: int("draft_len", requests.draft_len)?,
            vocab_size: int("vocab_size", logits.cols())?,
            hidden_size: int("hidden_size", hidden.cols())?,
            markov_rank: int("markov_rank", head.rank)?,
            confidence_with_markov: confidence.map_or(0, |c| i32::from(c.with_markov)),
            confidence_bias: confidence.map_or(0.0, |c| c.bias),
            logits: logits.mut_ptr(0, 0),
            hidden: hidden.ptr(0, 0).cast(),
            markov_w1: matrix(head.markov_w1.as_ref()),
            markov_w2: matrix(head.markov_w2.as_ref()),
            proj_weight: matrix(head.proj_weight.as_ref()),
            proj_bias: vector(head.proj_bias.as_ref()),
            confidence_weight: matrix(confidence.map(|c| &c.weight)),
            anchors: uploaded.anchors.of(words),
            anchor_positions: uploaded.positions.of(words),
            temperature: uploaded.temperature.of(words),
            seeds: uploaded.seeds.of(words),
            draft_tokens: results.mut_ptr(0).cast(),
            confidence: confidence.map_or(null_mut(), |_| results.mut_ptr(num_rows).cast()),
            workspace: null_mut(),
            workspace_bytes: 0,
            stride_logits_row: logits.stride(),
            rules: uploaded.rules.of(words),
            mask: uploaded.mask.map_or(null(), |mask| mask.of(words)),
        };
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check("draft_head_workspace_size", unsafe {
            sys::launch::dspark_draft_head_workspace_size_cu(
                &raw const params,
                &raw mut params.workspace_bytes,
            )
        })?;
        params.workspace = self.workspace(params.workspace_bytes)?;
        self.device.bind()?;
        // SAFETY: every operand is a live device matrix of the shape checked above; the per-request arrays hold
        // num_reqs entries uploaded on this stream; tokens and confidences have room for num_rows words each; anchors
        // are below the vocabulary, and the mask has the words of num_rows rows.
        check("draft_head", unsafe {
            sys::launch::dspark_draft_head_cu(&raw const params, self.stream())
        })?;
        let wanted = if confidence.is_some() { 2 } else { 1 };
        let mut tokens = self.download_results(wanted * num_rows)?;
        let confidences = tokens.split_off(num_rows);
        Ok(Drafted {
            tokens,
            confidence: confidence.map(|_| confidences.into_iter().map(f32::from_bits).collect()),
        })
    }
}

/// The device address of a weight; null where there is none.
pub(super) fn matrix<T>(weight: Option<&DeviceMatrix<bf16>>) -> *const T {
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
