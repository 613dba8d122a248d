//! Family draft: the head over the whole vocabulary.

use std::ptr::{null, null_mut};

use half::{bf16, f16};

use super::arguments::Arguments;
use super::draft::{Uploaded, check_walk, head_number, matrix, nothing, vector};
use super::{Cuda, DeviceMatrix, Logits, check, int, struct_size};
use crate::error::Result;
use crate::ops::{DraftBatch, DraftHead, Drafted, HeadKind, LowRankLaw, Matrix};
use crate::sys;

/// Where the answers of a call lie in its results, in words.
struct Answers {
    num_rows: usize,
    rank: usize,
    /// Whether latents are in f16, not bf16.
    is_f16: bool,
    has_confidence: bool,
}

impl Answers {
    fn log_normalizers(&self) -> usize {
        self.num_rows
    }

    /// Two in a word; at 16 bytes.
    fn latents(&self) -> usize {
        (2 * self.num_rows).next_multiple_of(4)
    }

    fn confidence(&self) -> usize {
        self.latents() + self.num_rows * self.rank / 2
    }

    fn len(&self) -> usize {
        self.confidence()
            + if self.has_confidence {
                self.num_rows
            } else {
                0
            }
    }

    fn read(&self, words: &[u32], mask: Option<&[u32]>) -> (Drafted, LowRankLaw) {
        let floats = |words: &[u32]| words.iter().copied().map(f32::from_bits).collect();
        let drafted = Drafted {
            tokens: words[..self.num_rows].to_vec(),
            confidence: (self.has_confidence)
                .then(|| floats(&words[self.confidence()..][..self.num_rows])),
        };
        let halves = words[self.latents()..self.confidence()]
            .iter()
            .flat_map(|word| [*word as u16, (word >> 16) as u16]);
        let law = LowRankLaw {
            rank: self.rank,
            latents: halves
                .map(|bits| {
                    if self.is_f16 {
                        f16::from_bits(bits).to_f32()
                    } else {
                        bf16::from_bits(bits).to_f32()
                    }
                })
                .collect(),
            log_normalizers: floats(&words[self.log_normalizers()..][..self.num_rows]),
            mask: mask.map(<[u32]>::to_vec),
        };
        (drafted, law)
    }
}

impl Cuda {
    /// The method of the trait; see there.
    pub(super) fn run_full(
        &mut self,
        head: &DraftHead<Self>,
        logits: &Logits,
        hidden: &DeviceMatrix<bf16>,
        batch: &DraftBatch<'_>,
    ) -> Result<(Drafted, LowRankLaw)> {
        check_walk(head, logits, hidden, batch)?;
        let confidence = head.confidence.as_ref();
        let answers = Answers {
            num_rows: logits.rows(),
            rank: head.rank,
            is_f16: head.w2_fp8.is_some(),
            has_confidence: confidence.is_some(),
        };
        if answers.num_rows == 0 {
            return Ok((nothing(head), LowRankLaw::default()));
        }

        let mut arguments = Arguments::default();
        let uploaded = Uploaded::pack(batch, &mut arguments);
        let words = arguments.upload(&mut self.arguments)?;
        let results = self.results.at_least(answers.len())?;
        let mut params = sys::dspark_draft_full_params {
            struct_size: struct_size::<sys::dspark_draft_full_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            logits_dtype: logits.dtype(),
            w2_dtype: match head.w2_fp8 {
                Some(_) => sys::DSPARK_DTYPE_E4M3,
                None => sys::DSPARK_DTYPE_BF16,
            },
            head: head_number(head.kind),
            num_reqs: int("requests", batch.anchors.len())?,
            draft_len: int("draft_len", batch.draft_len)?,
            vocab_size: int("vocab_size", logits.cols())?,
            hidden_size: int("hidden_size", hidden.cols())?,
            markov_rank: int("markov_rank", head.rank)?,
            confidence_with_markov: confidence.map_or(0, |c| i32::from(c.with_markov)),
            confidence_bias: confidence.map_or(0.0, |c| c.bias),
            logits: logits.ptr(),
            hidden: hidden.ptr(0, 0).cast(),
            markov_w1: matrix(head.markov_w1.as_ref()),
            markov_w2: match &head.w2_fp8 {
                Some(copy) => copy.numbers.ptr(0, 0).cast(),
                None => matrix(head.markov_w2.as_ref()),
            },
            w2_scales: head
                .w2_fp8
                .as_ref()
                .map_or(null(), |copy| copy.scales.ptr(0)),
            proj_weight: matrix(head.proj_weight.as_ref()),
            proj_bias: vector(head.proj_bias.as_ref()),
            confidence_weight: matrix(confidence.map(|c| &c.weight)),
            anchors: uploaded.anchors.of(words),
            anchor_positions: uploaded.positions.of(words),
            draft_lens: null(),
            temperature: uploaded.temperature.of(words),
            seeds: uploaded.seeds.of(words),
            rules: uploaded.rules.of(words),
            mask: uploaded.mask.of(words),
            draft_tokens: results.mut_ptr(0).cast(),
            log_normalizers: results.mut_ptr(answers.log_normalizers()).cast(),
            latents: match head.kind {
                HeadKind::None => null_mut(),
                _ => results.mut_ptr(answers.latents()).cast(),
            },
            confidence: confidence
                .map_or(null_mut(), |_| results.mut_ptr(answers.confidence()).cast()),
            confidence_logits: null_mut(),
            workspace: null_mut(),
            workspace_bytes: 0,
            stride_logits_row: logits.stride(),
        };
        self.device.bind()?;
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check("draft_full_workspace_size", unsafe {
            sys::launch::dspark_draft_full_workspace_size_cu(
                &raw const params,
                &raw mut params.workspace_bytes,
            )
        })?;
        params.workspace = self.workspace(params.workspace_bytes)?;
        // SAFETY: every operand is a live device matrix of the shape checked above; the per-request arrays hold one
        // entry for each request, uploaded on this stream; the results have room for what `answers` lays out; anchors
        // are below the vocabulary, and the mask has the words of num_rows rows.
        check("draft_full", unsafe {
            sys::launch::dspark_draft_full_cu(&raw const params, self.stream())
        })?;
        let words = self.download_results(answers.len())?;
        Ok(answers.read(&words, batch.mask))
    }
}
