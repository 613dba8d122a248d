//! Family draft: the head over a candidate set.

use std::ptr::null_mut;

use half::bf16;

use super::arguments::{Arguments, Filters};
use super::draft::{Uploaded, check_walk, head_number, matrix, nothing, vector};
use super::{Cuda, DeviceMatrix, Logits, check, expect, int, struct_size};
use crate::error::Result;
use crate::ops::{DraftBatch, DraftHead, Drafted, HeadForm, Matrix, SparseLaw};
use crate::sys;

/// Where the answers of a call lie in its results, in words.
struct Answers {
    num_rows: usize,
    num_pairs: usize,
    has_confidence: bool,
}

impl Answers {
    fn pair_tokens(&self) -> usize {
        self.num_rows
    }

    fn pair_logits(&self) -> usize {
        self.num_rows + self.num_pairs
    }

    fn confidence(&self) -> usize {
        self.num_rows + 2 * self.num_pairs
    }

    fn len(&self) -> usize {
        self.confidence()
            + if self.has_confidence {
                self.num_rows
            } else {
                0
            }
    }

    fn read(&self, words: &[u32], num_candidates: usize) -> (Drafted, SparseLaw) {
        let floats = |words: &[u32]| words.iter().copied().map(f32::from_bits).collect();
        let drafted = Drafted {
            tokens: words[..self.num_rows].to_vec(),
            confidence: (self.has_confidence)
                .then(|| floats(&words[self.confidence()..][..self.num_rows])),
        };
        let law = SparseLaw {
            num_candidates,
            // A pair that is none has token -1: [`SparseLaw::NO_PAIR`].
            tokens: words[self.pair_tokens()..][..self.num_pairs].to_vec(),
            logits: floats(&words[self.pair_logits()..][..self.num_pairs]),
        };
        (drafted, law)
    }
}

impl Cuda {
    /// The method of the trait; see there.
    pub(super) fn run_candidates(
        &mut self,
        head: &DraftHead<Self>,
        logits: &Logits,
        hidden: &DeviceMatrix<bf16>,
        batch: &DraftBatch<'_>,
        num_top: usize,
    ) -> Result<(Drafted, SparseLaw)> {
        check_walk(head, logits, hidden, batch)?;
        let num_bigram = head.bigrams.as_ref().map_or(0, Matrix::cols);
        HeadForm::Candidates(num_top, num_bigram).check(logits.cols())?;
        if let Some(table) = &head.bigrams {
            expect("bigrams.rows", logits.cols(), table.rows())?;
        }
        let num_rows = logits.rows();
        let confidence = head.confidence.as_ref();
        let answers = Answers {
            num_rows,
            num_pairs: num_rows * (num_top + num_bigram),
            has_confidence: confidence.is_some(),
        };
        if num_rows == 0 {
            return Ok((nothing(head), SparseLaw::default()));
        }

        let mut arguments = Arguments::default();
        let uploaded = Uploaded::pack(batch, &mut arguments);
        let filters = Filters::pack(batch.sampling, &mut arguments);
        let words = arguments.upload(&mut self.arguments)?;
        let results = self.results.at_least(answers.len())?;
        let mut params = sys::dspark_draft_candidates_params {
            struct_size: struct_size::<sys::dspark_draft_candidates_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            logits_dtype: logits.dtype(),
            head: head_number(head.kind),
            num_reqs: int("requests", batch.anchors.len())?,
            draft_len: int("draft_len", batch.draft_len)?,
            vocab_size: int("vocab_size", logits.cols())?,
            hidden_size: int("hidden_size", hidden.cols())?,
            markov_rank: int("markov_rank", head.rank)?,
            num_top: int("candidates", num_top)?,
            num_bigram: int("bigrams", num_bigram)?,
            confidence_with_markov: confidence.map_or(0, |c| i32::from(c.with_markov)),
            confidence_bias: confidence.map_or(0.0, |c| c.bias),
            logits: logits.ptr(),
            hidden: hidden.ptr(0, 0).cast(),
            markov_w1: matrix(head.markov_w1.as_ref()),
            markov_w2: matrix(head.markov_w2.as_ref()),
            proj_weight: matrix(head.proj_weight.as_ref()),
            proj_bias: vector(head.proj_bias.as_ref()),
            confidence_weight: matrix(confidence.map(|c| &c.weight)),
            bigram_tokens: matrix(head.bigrams.as_ref()),
            anchors: uploaded.anchors.of(words),
            anchor_positions: uploaded.positions.of(words),
            temperature: uploaded.temperature.of(words),
            seeds: uploaded.seeds.of(words),
            draft_tokens: results.mut_ptr(0).cast(),
            confidence: confidence
                .map_or(null_mut(), |_| results.mut_ptr(answers.confidence()).cast()),
            candidate_tokens: results.mut_ptr(answers.pair_tokens()).cast(),
            candidate_logits: results.mut_ptr(answers.pair_logits()).cast(),
            workspace: null_mut(),
            workspace_bytes: 0,
            stride_logits_row: logits.stride(),
            rules: uploaded.rules.of(words),
            mask: uploaded.mask.of(words),
            top_k: filters.top_k.of(words),
            top_p: filters.top_p.of(words),
            min_p: filters.min_p.of(words),
        };
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check("draft_candidates_workspace_size", unsafe {
            sys::launch::dspark_draft_candidates_workspace_size_cu(
                &raw const params,
                &raw mut params.workspace_bytes,
            )
        })?;
        params.workspace = self.workspace(params.workspace_bytes)?;
        self.device.bind()?;
        // SAFETY: every operand is a live device matrix of the shape checked above; the per-request arrays hold one
        // entry for each request, uploaded on this stream; the results have room for what `answers` lays out; anchors
        // are below the vocabulary, and the mask has the words of num_rows rows.
        check("draft_candidates", unsafe {
            sys::launch::dspark_draft_candidates_cu(&raw const params, self.stream())
        })?;
        let words = self.download_results(answers.len())?;
        Ok(answers.read(&words, num_top + num_bigram))
    }
}
