//! Family draft: the head over the whole vocabulary.

use std::ptr::{null, null_mut};

use half::{bf16, f16};

use super::arguments::Arguments;
use super::draft::{DraftWords, Uploaded, Walk, floats, head_number, matrix, vector, walk_params};
use super::{Cuda, check, int, struct_size};
use crate::error::Result;
use crate::ops::{Drafted, HeadKind, LowRankLaw, Matrix};
use crate::sys;

/// Where the answers of a call lie in its results, in words.
struct Answers {
    drafts: DraftWords,
    rank: usize,
    /// Whether latents are in f16, not bf16.
    is_f16: bool,
}

impl Answers {
    fn log_normalizers(&self) -> usize {
        self.drafts.len()
    }

    /// Two in a word; at 16 bytes.
    fn latents(&self) -> usize {
        (self.log_normalizers() + self.drafts.num_rows).next_multiple_of(4)
    }

    fn len(&self) -> usize {
        self.latents() + self.drafts.num_rows * self.rank / 2
    }

    fn read(&self, words: &[u32], mask: Option<&[u32]>) -> (Drafted, LowRankLaw) {
        let latents = words[self.latents()..]
            .iter()
            .flat_map(|word| [*word as u16, (word >> 16) as u16]);
        let number = |bits: u16| {
            if self.is_f16 {
                f16::from_bits(bits).to_f32()
            } else {
                bf16::from_bits(bits).to_f32()
            }
        };
        let law = LowRankLaw {
            rank: self.rank,
            latents: latents.map(number).collect(),
            log_normalizers: floats(&words[self.log_normalizers()..][..self.drafts.num_rows]),
            mask: mask.map(<[u32]>::to_vec),
        };
        (self.drafts.read(words), law)
    }
}

/// Whether a batch is drafted sooner where rows of W2 that cannot win are passed over: few requests, which want few rows
/// between them, and a W2 that does not stay on chip from step to step.
fn skipping_pays(walk: &Walk<'_>) -> bool {
    const MOST_REQS: usize = 8;
    const LEAST_W2_BYTES: usize = 32 << 20;
    let w2_bytes = walk.logits.cols() * walk.head.rank * size_of::<bf16>();
    walk.batch.wants_winners_alone()
        && walk.batch.anchors.len() <= MOST_REQS
        && w2_bytes > LEAST_W2_BYTES
}

impl Cuda {
    /// The method of the trait; see there.
    pub(super) fn run_full(&mut self, walk: &Walk<'_>) -> Result<(Drafted, LowRankLaw)> {
        walk.check()?;
        let head = walk.head;
        let copy = head.w2_fp8.as_ref();
        let bounds = head.row_bounds.as_ref();
        let bounds = bounds.filter(|_| copy.is_none() && skipping_pays(walk));
        let answers = Answers {
            drafts: DraftWords::new(head, walk.logits.rows()),
            rank: head.rank,
            is_f16: copy.is_some(),
        };
        if answers.drafts.num_rows == 0 {
            return Ok((answers.drafts.read(&[]), LowRankLaw::default()));
        }

        let mut arguments = Arguments::default();
        let uploaded = Uploaded::pack(walk.batch, &mut arguments);
        let words = arguments.upload(&mut self.arguments)?;
        let results = self.results.at_least(answers.len())?;
        let log_normalizers = results.mut_ptr(answers.log_normalizers()).cast();
        let latents = results.mut_ptr(answers.latents()).cast();
        let mut params = walk_params!(dspark_draft_full_params, walk, (uploaded, words), (answers.drafts, results), {
            w2_dtype: copy.map_or(sys::DSPARK_DTYPE_BF16, |_| sys::DSPARK_DTYPE_E4M3),
            markov_w2: match copy {
                Some(copy) => copy.numbers.ptr(0, 0).cast(),
                None => matrix(head.markov_w2.as_ref()),
            },
            w2_scales: copy.map_or(null(), |copy| copy.scales.ptr(0)),
            draft_lens: null(),
            log_normalizers: log_normalizers,
            latents: match head.kind {
                HeadKind::None => null_mut(),
                _ => latents,
            },
            confidence_logits: null_mut(),
            w2_bounds: bounds.map_or(null(), |rows| rows.bounds.ptr(0)),
            w2_basis: bounds.map_or(null(), |rows| rows.basis.ptr(0)),
            rows_read: null_mut(),
        });
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
        Ok(answers.read(&words, walk.batch.mask))
    }
}
