//! Family verify: target law, acceptance and commit.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use half::{bf16, f16};

use super::arguments::{Arguments, Filters, Offset, Optional};
use super::{Cuda, Logits, check, expect, int, struct_size};
use crate::error::{Error, Result};
use crate::ops::{
    AcceptBatch, Accepted, DraftLaw, Matrix, Rule, SamplingParams, TokenEdit, TokenEdits,
    TokenLogprobs, W2,
};
use crate::sys;

/// Where the arrays of a call lie in its upload.
struct Uploaded {
    seeds: Offset,
    qo_indptr: Offset,
    draft_tokens: Offset,
    positions: Offset,
    temperature: Offset,
    filters: Filters,
    rules: Optional,
    repetition: Optional,
    presence: Optional,
    frequency: Optional,
    parents: Optional,
    candidate_tokens: Optional,
    candidate_logits: Optional,
    latents: Optional,
    log_normalizers: Optional,
    draft_mask: Optional,
    mask: Optional,
    edit_indptr: Optional,
    edit_tokens: Optional,
    edit_counts: Optional,
    edit_biases: Optional,
    stop_indptr: Optional,
    stop_tokens: Optional,
}

impl Uploaded {
    /// Packs a checked batch; what every request leaves off is not uploaded, and costs the kernels nothing.
    fn pack(batch: &AcceptBatch<'_, Cuda>, arguments: &mut Arguments) -> Self {
        let (sampling, extras) = (batch.sampling, &batch.extras);
        let filters = Filters::pack(sampling, arguments);
        let repetition = arguments.push_unless(sampling, 1.0, |s| s.repetition_penalty);
        let presence = arguments.push_unless(sampling, 0.0, |s| s.presence_penalty);
        let frequency = arguments.push_unless(sampling, 0.0, |s| s.frequency_penalty);
        let sampled = |s: &SamplingParams| s.temperature > 0.0 && s.rule != Rule::Token;
        let rules = sampling.iter().any(sampled);
        let rules = rules.then(|| arguments.push(sampling.iter().map(|s| s.rule as u32)));
        let mut optional = |values: Option<&[u32]>| {
            Optional(values.map(|values| arguments.push(values.iter().copied())))
        };
        let parents = optional(extras.parents);
        let mask = optional(extras.mask);
        let sparse = match batch.law {
            DraftLaw::Sparse(sparse) => Some(sparse),
            DraftLaw::PointMass | DraftLaw::Logits(_) | DraftLaw::LowRank { .. } => None,
        };
        let candidate_tokens = optional(sparse.map(|sparse| &sparse.tokens[..]));
        let low_rank = match &batch.law {
            DraftLaw::LowRank { law, .. } => Some(*law),
            _ => None,
        };
        let draft_mask = optional(low_rank.and_then(|law| law.mask.as_deref()));
        let latents = match &batch.law {
            DraftLaw::LowRank {
                w2: Some(w2), law, ..
            } => Some(packed_latents(w2, &law.latents)),
            _ => None,
        };
        let latents = optional(latents.as_deref());
        let stops = extras.stop_tokens.unwrap_or_default();
        let has_stops = stops.iter().any(|stops| !stops.is_empty());
        let stop_indptr = prefix_sums(stops.iter().map(|stops| stops.len()));
        let stop_indptr = optional(has_stops.then_some(&stop_indptr[..]));
        let stop_tokens = optional(has_stops.then_some(&stops.concat()[..]));
        let edits = extras.edits.unwrap_or_default();
        let lens = edits.iter().map(|edits| edits.as_slice().len());
        let all: Vec<TokenEdit> = edits
            .iter()
            .flat_map(TokenEdits::as_slice)
            .copied()
            .collect();
        let has_edits = !all.is_empty();
        let column = |value: fn(&TokenEdit) -> u32| -> Vec<u32> { all.iter().map(value).collect() };
        let edit_indptr = optional(has_edits.then_some(&prefix_sums(lens)[..]));
        let edit_tokens = optional(has_edits.then_some(&column(|edit| edit.token)[..]));
        let counts = column(|edit| edit.count.map_or(-1, |count| count as i32) as u32);
        let edit_counts = optional(has_edits.then_some(&counts[..]));
        let edit_biases = optional(has_edits.then_some(&column(|edit| edit.bias.to_bits())[..]));
        Self {
            seeds: arguments.push_u64(sampling.iter().map(|s| s.seed)),
            qo_indptr: arguments.push(batch.qo_indptr.iter().map(|&v| v as u32)),
            draft_tokens: arguments.push(batch.draft_tokens.iter().copied()),
            positions: arguments.push(batch.anchor_positions.iter().copied()),
            temperature: arguments.push_f32(sampling.iter().map(|s| s.temperature)),
            candidate_logits: Optional(
                sparse.map(|sparse| arguments.push_f32(sparse.logits.iter().copied())),
            ),
            log_normalizers: Optional(
                low_rank.map(|law| arguments.push_f32(law.log_normalizers.iter().copied())),
            ),
            filters,
            rules: Optional(rules),
            repetition,
            presence,
            frequency,
            parents,
            candidate_tokens,
            latents,
            draft_mask,
            mask,
            edit_indptr,
            edit_tokens,
            edit_counts,
            edit_biases,
            stop_indptr,
            stop_tokens,
        }
    }
}

/// Latents in the type that they are multiplied in, two to a word.
fn packed_latents(w2: &W2<'_, Cuda>, latents: &[f32]) -> Vec<u32> {
    let bits = |value: f32| {
        u32::from(match w2 {
            W2::Stored(_) => bf16::from_f32(value).to_bits(),
            W2::Quantized(_) => f16::from_f32(value).to_bits(),
        })
    };
    let pairs = latents.chunks(2);
    pairs
        .map(|pair| bits(pair[0]) | pair.get(1).map_or(0, |&high| bits(high)) << 16)
        .collect()
}

/// Where the answers of a call lie in its results, in words.
struct Answers {
    num_reqs: usize,
    draft_len: usize,
    /// The likeliest tokens reported at each place; `None`: no log-probabilities.
    num_top: Option<usize>,
}

impl Answers {
    const STATUS: usize = 0;

    fn num_accepted(&self) -> usize {
        self.num_reqs
    }

    fn next_tokens(&self) -> usize {
        2 * self.num_reqs
    }

    fn flags(&self) -> usize {
        3 * self.num_reqs
    }

    fn logprobs(&self) -> usize {
        self.flags() + self.num_reqs * self.draft_len
    }

    fn places(&self) -> usize {
        self.num_reqs * (self.draft_len + 1)
    }

    fn top_tokens(&self) -> usize {
        self.logprobs() + self.places()
    }

    fn top_logprobs(&self) -> usize {
        self.top_tokens() + self.places() * self.num_top.unwrap_or(0)
    }

    fn len(&self) -> usize {
        match self.num_top {
            None => self.logprobs(),
            Some(num_top) => self.top_logprobs() + self.places() * num_top,
        }
    }

    fn read(&self, words: &[u32]) -> Result<Accepted> {
        let status = &words[Self::STATUS..][..self.num_reqs];
        if let Some(request) = status.iter().position(|&status| status != 0) {
            return Err(Error::BadLogits {
                request,
                found: "NaN, +inf or only -inf".into(),
            });
        }
        let num_accepted = words[self.num_accepted()..][..self.num_reqs].to_vec();
        let logprobs = match self.num_top {
            None => Vec::new(),
            Some(num_top) => (0..self.num_reqs)
                .map(|r| self.logprobs_of(words, r, num_accepted[r] as usize, num_top))
                .collect(),
        };
        Ok(Accepted {
            next_tokens: words[self.next_tokens()..][..self.num_reqs].to_vec(),
            flags: words[self.flags()..self.logprobs()]
                .iter()
                .map(|&flag| flag != 0)
                .collect(),
            num_accepted,
            logprobs,
        })
    }

    fn logprobs_of(
        &self,
        words: &[u32],
        r: usize,
        num_accepted: usize,
        num_top: usize,
    ) -> Vec<TokenLogprobs> {
        if words[self.next_tokens() + r] == u32::MAX {
            return Vec::new();
        }
        (0..=num_accepted)
            .map(|i| {
                let place = r * (self.draft_len + 1) + i;
                let tokens = &words[self.top_tokens() + place * num_top..][..num_top];
                let logprobs = &words[self.top_logprobs() + place * num_top..][..num_top];
                TokenLogprobs {
                    logprob: f32::from_bits(words[self.logprobs() + place]),
                    top: tokens
                        .iter()
                        .zip(logprobs)
                        .filter(|&(&token, _)| token != u32::MAX)
                        .map(|(&token, &bits)| (token, f32::from_bits(bits)))
                        .collect(),
                }
            })
            .collect()
    }
}

/// `[0, a, a + b, ..]`.
fn prefix_sums(lens: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut sums = vec![0];
    for len in lens {
        sums.push(sums[sums.len() - 1] + len as u32);
    }
    sums
}

/// What of a draft law is on the device before the call.
struct OnDevice<'a> {
    logits: Option<&'a Logits>,
    num_candidates: usize,
    w2: *const c_void,
    w2_scales: *const f32,
    w2_dtype: sys::dspark_dtype,
    rank: usize,
}

impl<'a> OnDevice<'a> {
    /// The parts of `law`, which must fit `batch`.
    fn of(law: &DraftLaw<'a, Cuda>, batch: &AcceptBatch<'_, Cuda>) -> Result<Self> {
        let (num_drafts, vocab_size) = (batch.draft_tokens.len(), batch.target.cols());
        let mut parts = Self {
            logits: None,
            num_candidates: 0,
            w2: null(),
            w2_scales: null(),
            w2_dtype: sys::DSPARK_DTYPE_BF16,
            rank: 0,
        };
        match *law {
            DraftLaw::PointMass => {}
            DraftLaw::Logits(logits) => parts.logits = Some(logits),
            DraftLaw::Sparse(sparse) => {
                sparse.check(num_drafts, vocab_size)?;
                parts.num_candidates = sparse.num_candidates;
            }
            DraftLaw::LowRank {
                base, ref w2, law, ..
            } => {
                law.check(num_drafts, vocab_size)?;
                parts.logits = Some(base);
                parts.rank = law.rank;
                let shape = match w2 {
                    None => [vocab_size, 0],
                    Some(W2::Stored(weight)) => {
                        parts.w2 = weight.ptr(0, 0).cast();
                        [weight.rows(), weight.cols()]
                    }
                    Some(W2::Quantized(copy)) => {
                        parts.w2 = copy.numbers.ptr(0, 0).cast();
                        parts.w2_scales = copy.scales.ptr(0);
                        parts.w2_dtype = sys::DSPARK_DTYPE_E4M3;
                        [copy.numbers.rows(), copy.numbers.cols()]
                    }
                };
                expect("markov_w2.rows", vocab_size, shape[0])?;
                expect("markov_w2.cols", law.rank, shape[1])?;
            }
        }
        if let Some(logits) = parts.logits {
            // Rows that are not in use are read and not looked at.
            if logits.rows() < batch.least_law_rows() || logits.max_rows() < num_drafts {
                expect("draft_logits.rows", num_drafts, logits.rows())?;
            }
            expect("draft_logits.cols", vocab_size, logits.cols())?;
        }
        Ok(parts)
    }
}

/// What [`Cuda::commit`] leaves, one entry (or row) for each request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// `[num_reqs, draft_len + 1]` accepted drafts and the next token, then -1.
    pub tokens: Vec<i32>,
    /// `[num_reqs]`.
    pub num_committed: Vec<i32>,
    /// `[num_reqs]` after the commit.
    pub seq_lens: Vec<i32>,
    /// `[num_reqs]` after the commit.
    pub anchors: Vec<i32>,
}

impl Cuda {
    /// The method of the trait; see there.
    pub(super) fn accept_drafts(&mut self, batch: &AcceptBatch<'_, Self>) -> Result<Accepted> {
        let target = batch.target;
        batch.check(target.rows(), target.cols())?;
        let law = OnDevice::of(&batch.law, batch)?;
        let answers = Answers {
            num_reqs: batch.num_reqs(),
            draft_len: batch.draft_len,
            num_top: batch.extras.logprobs,
        };
        if answers.num_reqs == 0 {
            return Ok(Accepted::default());
        }

        let mut arguments = Arguments::default();
        let uploaded = Uploaded::pack(batch, &mut arguments);
        let words = arguments.upload(&mut self.arguments)?;
        let results = self.results.at_least(answers.len())?;
        let wants_logprobs = answers.num_top.is_some();
        let mut params = sys::dspark_accept_params {
            struct_size: struct_size::<sys::dspark_accept_params>(),
            target_dtype: target.dtype(),
            draft_dtype: law.logits.map_or(sys::DSPARK_DTYPE_F32, Logits::dtype),
            num_rows: int("target.rows", target.rows())?,
            num_reqs: int("requests", answers.num_reqs)?,
            draft_len: int("draft_len", batch.draft_len)?,
            vocab_size: int("vocab_size", target.cols())?,
            num_candidates: int("num_candidates", law.num_candidates)?,
            num_top_logprobs: int("logprobs", answers.num_top.unwrap_or(0))?,
            target_logits: target.ptr(),
            draft_logits: law.logits.map_or(null(), Logits::ptr),
            draft_log_normalizers: uploaded.log_normalizers.of(words),
            candidate_tokens: uploaded.candidate_tokens.of(words),
            candidate_logits: uploaded.candidate_logits.of(words),
            draft_tokens: uploaded.draft_tokens.of(words),
            parents: uploaded.parents.of(words),
            qo_indptr: uploaded.qo_indptr.of(words),
            anchor_positions: uploaded.positions.of(words),
            temperature: uploaded.temperature.of(words),
            top_k: uploaded.filters.top_k.of(words),
            top_p: uploaded.filters.top_p.of(words),
            min_p: uploaded.filters.min_p.of(words),
            rules: uploaded.rules.of(words),
            seeds: uploaded.seeds.of(words),
            repetition_penalty: uploaded.repetition.of(words),
            presence_penalty: uploaded.presence.of(words),
            frequency_penalty: uploaded.frequency.of(words),
            edit_indptr: uploaded.edit_indptr.of(words),
            edit_tokens: uploaded.edit_tokens.of(words),
            edit_counts: uploaded.edit_counts.of(words),
            edit_biases: uploaded.edit_biases.of(words),
            mask: uploaded.mask.of(words),
            stop_indptr: uploaded.stop_indptr.of(words),
            stop_tokens: uploaded.stop_tokens.of(words),
            num_accepted: results.mut_ptr(answers.num_accepted()).cast(),
            next_tokens: results.mut_ptr(answers.next_tokens()).cast(),
            status: results.mut_ptr(Answers::STATUS).cast(),
            accept_flags: results.mut_ptr(answers.flags()).cast(),
            logprobs: null_mut(),
            top_tokens: null_mut(),
            top_logprobs: null_mut(),
            workspace: null_mut(),
            workspace_bytes: 0,
            stride_target_row: target.stride(),
            stride_draft_row: law.logits.map_or(0, Logits::stride),
            draft_markov_w2: law.w2,
            draft_w2_scales: law.w2_scales,
            draft_latents: uploaded.latents.of(words),
            draft_mask: uploaded.draft_mask.of(words),
            draft_w2_dtype: law.w2_dtype,
            draft_markov_rank: int("markov_rank", law.rank)?,
        };
        if wants_logprobs {
            params.logprobs = results.mut_ptr(answers.logprobs()).cast();
            params.top_tokens = results.mut_ptr(answers.top_tokens()).cast();
            params.top_logprobs = results.mut_ptr(answers.top_logprobs()).cast();
        }
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check("accept_workspace_size", unsafe {
            sys::launch::dspark_accept_workspace_size_cu(
                &raw const params,
                &raw mut params.workspace_bytes,
            )
        })?;
        params.workspace = self.workspace(params.workspace_bytes)?;
        self.device.bind()?;
        // SAFETY: the logits are live device matrices of the shapes checked above; the per-request arrays were uploaded
        // on this stream; qo_indptr stays within target's rows, parents before their rows, and drafts, edits and
        // candidates below the vocabulary; the results have room for what `answers` lays out.
        check("accept", unsafe {
            sys::launch::dspark_accept_cu(&raw const params, self.stream())
        })?;
        answers.read(&self.download_results(answers.len())?)
    }

    /// The kernel behind a commit on the device: `[x_1 .. x_n, next]` for each request, with its length and anchor moved on.
    /// A `next_tokens` of -1 leaves its request as it is.
    ///
    /// # Errors
    /// [`Error::Argument`] when lengths do not fit; [`Error::Cuda`].
    pub fn commit(
        &mut self,
        draft_tokens: &[u32],
        draft_len: usize,
        [num_accepted, next_tokens, seq_lens, anchors]: [&[i32]; 4],
    ) -> Result<Committed> {
        let num_reqs = num_accepted.len();
        expect("draft_tokens", num_reqs * draft_len, draft_tokens.len())?;
        for (field, values) in [
            ("next_tokens", next_tokens),
            ("seq_lens", seq_lens),
            ("anchors", anchors),
        ] {
            expect(field, num_reqs, values.len())?;
        }
        if let Some(n) = num_accepted
            .iter()
            .find(|&&n| n < 0 || n as usize > draft_len)
        {
            return Err(Error::argument(
                "num_accepted",
                format!("0 to {draft_len}"),
                n,
            ));
        }
        let words = |values: &[i32]| values.iter().map(|&v| v as u32).collect::<Vec<_>>();
        let mut arguments = Arguments::default();
        let drafts = arguments.push(draft_tokens.iter().copied());
        let accepted = arguments.push(words(num_accepted));
        let next = arguments.push(words(next_tokens));
        let input = arguments.upload(&mut self.arguments)?;
        // seq_lens, anchors, num_committed, committed: the first two are updated in place.
        let results = self.results.at_least((4 + draft_len) * num_reqs)?;
        results.upload(0, &words(seq_lens))?;
        results.upload(num_reqs, &words(anchors))?;
        let params = sys::dspark_commit_params {
            struct_size: struct_size::<sys::dspark_commit_params>(),
            num_reqs: int("requests", num_reqs)?,
            draft_len: int("draft_len", draft_len)?,
            draft_tokens: drafts.of(input),
            num_accepted: accepted.of(input),
            next_tokens: next.of(input),
            committed: results.mut_ptr(3 * num_reqs).cast(),
            num_committed: results.mut_ptr(2 * num_reqs).cast(),
            seq_lens: results.mut_ptr(0).cast(),
            anchors: results.mut_ptr(num_reqs).cast(),
        };
        self.device.bind()?;
        // SAFETY: inputs and outputs are windows of two live buffers with the lengths the params say.
        check("commit", unsafe {
            sys::launch::dspark_commit_cu(&raw const params, self.stream())
        })?;
        let out = self.download_results((4 + draft_len) * num_reqs)?;
        let ints = |words: &[u32]| words.iter().map(|&w| w as i32).collect::<Vec<_>>();
        Ok(Committed {
            seq_lens: ints(&out[..num_reqs]),
            anchors: ints(&out[num_reqs..2 * num_reqs]),
            num_committed: ints(&out[2 * num_reqs..3 * num_reqs]),
            tokens: ints(&out[3 * num_reqs..]),
        })
    }
}
