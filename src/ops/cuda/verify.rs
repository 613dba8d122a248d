//! Family verify: target law, acceptance and commit.

use std::ptr::{null, null_mut};

use super::arguments::Arguments;
use super::{Cuda, DeviceMatrix, check, expect, int, struct_size};
use crate::error::{Error, Result};
use crate::ops::{Accepted, DraftLaw, Matrix, SamplingParams};
use crate::sys;

/// The requests of a call, one entry each.
pub(super) struct Requests<'a> {
    pub qo_indptr: &'a [i32],
    pub draft_tokens: &'a [u32],
    pub draft_len: usize,
    pub anchor_positions: &'a [u32],
    pub sampling: &'a [SamplingParams],
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
    pub(super) fn accept_drafts(
        &mut self,
        target: &DeviceMatrix<f32>,
        law: &DraftLaw<'_, Self>,
        requests: &Requests<'_>,
    ) -> Result<Accepted> {
        check_requests(requests, target)?;
        let num_reqs = requests.sampling.len();
        let draft_logits = match law {
            DraftLaw::PointMass => None,
            DraftLaw::Logits(logits) => Some(*logits),
        };
        if let Some(logits) = draft_logits {
            expect(
                "draft_logits.rows",
                num_reqs * requests.draft_len,
                logits.rows(),
            )?;
            expect("draft_logits.cols", target.cols(), logits.cols())?;
        }
        if num_reqs == 0 {
            return Ok(Accepted::default());
        }

        let mut arguments = Arguments::default();
        let sampling = requests.sampling;
        let seeds = arguments.push_u64(sampling.iter().map(|s| s.seed));
        let qo_indptr = arguments.push(requests.qo_indptr.iter().map(|&v| v as u32));
        let draft_tokens = arguments.push(requests.draft_tokens.iter().copied());
        let positions = arguments.push(requests.anchor_positions.iter().copied());
        let temperature = arguments.push_f32(sampling.iter().map(|s| s.temperature));
        let top_k = arguments.push(sampling.iter().map(|s| s.top_k.min(i32::MAX as u32)));
        let top_p = arguments.push_f32(sampling.iter().map(|s| s.top_p));
        let min_p = arguments.push_f32(sampling.iter().map(|s| s.min_p));
        let words = arguments.upload(&mut self.arguments)?;
        let results = self.results.at_least(3 * num_reqs)?;
        let mut params = sys::dspark_accept_params {
            struct_size: struct_size::<sys::dspark_accept_params>(),
            num_rows: int("target.rows", target.rows())?,
            num_reqs: int("requests", num_reqs)?,
            draft_len: int("draft_len", requests.draft_len)?,
            vocab_size: int("vocab_size", target.cols())?,
            target_logits: target.ptr(0, 0),
            draft_logits: draft_logits.map_or(null(), |logits| logits.ptr(0, 0)),
            draft_tokens: draft_tokens.of(words),
            qo_indptr: qo_indptr.of(words),
            anchor_positions: positions.of(words),
            temperature: temperature.of(words),
            top_k: top_k.of(words),
            top_p: top_p.of(words),
            min_p: min_p.of(words),
            seeds: seeds.of(words),
            num_accepted: results.mut_ptr(0).cast(),
            next_tokens: results.mut_ptr(num_reqs).cast(),
            status: results.mut_ptr(2 * num_reqs).cast(),
            workspace: null_mut(),
            workspace_bytes: 0,
            stride_target_row: target.stride(),
            stride_draft_row: draft_logits.map_or(0, DeviceMatrix::stride),
        };
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
        // on this stream; qo_indptr stays within target's rows and drafts below the vocabulary; the results have room
        // for three words a request.
        check("accept", unsafe {
            sys::launch::dspark_accept_cu(&raw const params, self.stream())
        })?;
        let mut num_accepted = self.download_results(3 * num_reqs)?;
        let status = num_accepted.split_off(2 * num_reqs);
        let next_tokens = num_accepted.split_off(num_reqs);
        if let Some(request) = status.iter().position(|&status| status != 0) {
            return Err(Error::BadLogits {
                request,
                found: "NaN, +inf or only -inf".into(),
            });
        }
        Ok(Accepted {
            num_accepted,
            next_tokens,
        })
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

fn check_requests(requests: &Requests<'_>, target: &DeviceMatrix<f32>) -> Result<()> {
    let num_reqs = requests.sampling.len();
    let draft_len = requests.draft_len;
    expect(
        "anchor_positions",
        num_reqs,
        requests.anchor_positions.len(),
    )?;
    expect("qo_indptr", num_reqs + 1, requests.qo_indptr.len())?;
    expect(
        "draft_tokens",
        num_reqs * draft_len,
        requests.draft_tokens.len(),
    )?;
    for sampling in requests.sampling {
        sampling.validate()?;
    }
    if requests.qo_indptr[0] != 0 {
        return Err(Error::argument(
            "qo_indptr",
            "a leading 0",
            requests.qo_indptr[0],
        ));
    }
    for pair in requests.qo_indptr.windows(2) {
        let rows = i64::from(pair[1]) - i64::from(pair[0]);
        if !(0..=draft_len as i64 + 1).contains(&rows) {
            let expected = format!("0 to {} rows a request", draft_len + 1);
            return Err(Error::argument("qo_indptr", expected, rows));
        }
    }
    expect(
        "target.rows",
        requests.qo_indptr[num_reqs] as usize,
        target.rows(),
    )?;
    let vocab_size = target.cols();
    if let Some(token) = requests
        .draft_tokens
        .iter()
        .find(|&&token| token as usize >= vocab_size)
    {
        return Err(Error::argument(
            "draft_tokens",
            format!("below {vocab_size}"),
            token,
        ));
    }
    Ok(())
}
