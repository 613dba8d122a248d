//! Family draft: the head over a candidate set.

use std::ptr::null_mut;

use super::arguments::{Arguments, Filters};
use super::draft::{DraftWords, Uploaded, Walk, floats, head_number, matrix, vector, walk_params};
use super::{Cuda, check, expect, int, struct_size};
use crate::error::Result;
use crate::ops::{Drafted, HeadForm, Matrix, SparseLaw};
use crate::sys;

/// Where the answers of a call lie in its results, in words.
struct Answers {
    drafts: DraftWords,
    num_candidates: usize,
}

impl Answers {
    fn num_pairs(&self) -> usize {
        self.drafts.num_rows * self.num_candidates
    }

    fn pair_tokens(&self) -> usize {
        self.drafts.len()
    }

    fn pair_logits(&self) -> usize {
        self.pair_tokens() + self.num_pairs()
    }

    fn len(&self) -> usize {
        self.pair_logits() + self.num_pairs()
    }

    fn read(&self, words: &[u32]) -> (Drafted, SparseLaw) {
        let law = SparseLaw {
            num_candidates: self.num_candidates,
            // A pair that is none has token -1: [`SparseLaw::NO_PAIR`].
            tokens: words[self.pair_tokens()..self.pair_logits()].to_vec(),
            logits: floats(&words[self.pair_logits()..]),
        };
        (self.drafts.read(words), law)
    }
}

impl Cuda {
    /// The method of the trait; see there.
    pub(super) fn run_candidates(
        &mut self,
        walk: &Walk<'_>,
        num_top: usize,
    ) -> Result<(Drafted, SparseLaw)> {
        walk.check()?;
        let (head, vocab_size) = (walk.head, walk.logits.cols());
        let num_bigram = head.bigrams.as_ref().map_or(0, Matrix::cols);
        HeadForm::Candidates(num_top, num_bigram).check(vocab_size)?;
        if let Some(table) = &head.bigrams {
            expect("bigrams.rows", vocab_size, table.rows())?;
        }
        let answers = Answers {
            drafts: DraftWords::new(head, walk.logits.rows()),
            num_candidates: num_top + num_bigram,
        };
        if answers.drafts.num_rows == 0 {
            return Ok((answers.drafts.read(&[]), SparseLaw::default()));
        }

        let mut arguments = Arguments::default();
        let uploaded = Uploaded::pack(walk.batch, &mut arguments);
        let filters = Filters::pack(walk.batch.sampling, &mut arguments);
        let words = arguments.upload(&mut self.arguments)?;
        let results = self.results.at_least(answers.len())?;
        let candidate_tokens = results.mut_ptr(answers.pair_tokens()).cast();
        let candidate_logits = results.mut_ptr(answers.pair_logits()).cast();
        let mut params = walk_params!(dspark_draft_candidates_params, walk, (uploaded, words), (answers.drafts, results), {
            num_top: int("candidates", num_top)?,
            num_bigram: int("bigrams", num_bigram)?,
            markov_w2: matrix(head.markov_w2.as_ref()),
            bigram_tokens: matrix(head.bigrams.as_ref()),
            candidate_tokens: candidate_tokens,
            candidate_logits: candidate_logits,
            top_k: filters.top_k.of(words),
            top_p: filters.top_p.of(words),
            min_p: filters.min_p.of(words),
        });
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
        // and bigrams are below the vocabulary or none, and the mask has the words of num_rows rows.
        check("draft_candidates", unsafe {
            sys::launch::dspark_draft_candidates_cu(&raw const params, self.stream())
        })?;
        Ok(answers.read(&self.download_results(answers.len())?))
    }
}
