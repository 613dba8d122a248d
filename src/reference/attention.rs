//! Attention over paged keys and values, in the target's causal form and the drafter's block form.
//!
//! A task is one row and one key/value head with its group of query heads. It walks the row's visible keys in order of
//! slot (then the block's rows), so that a row's result depends neither on the other rows nor on where the pages lie.
//! Scores and values are f32, the sum of the softmax f64.

#![allow(
    clippy::inline_always,
    reason = "vector code must be inlined into the function that has the machine's features"
)]

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use super::exp::exp;
use super::pool::Pool;
use super::tensor::{F32Matrix, KvCache, KvLayer, expect_cols, expect_shape};
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, MAX_TREE_ROWS, Matrix, RowMap};

/// Arguments of [`crate::ops::Ops::verify_attention`] and [`crate::ops::Ops::draft_attention`].
pub(super) struct Attention<'a> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) q: &'a F32Matrix,
    pub(super) kv: &'a KvCache,
    pub(super) layer: usize,
    /// `[k | v]` of the draft block; `None` is the causal form.
    pub(super) block: Option<&'a F32Matrix>,
    pub(super) rows: &'a RowMap,
}

impl Attention<'_> {
    pub(super) fn run(&self, pool: &Pool, out: &mut F32Matrix) -> Result<()> {
        self.check(out)?;
        out.set_rows(self.rows.num_rows())?;
        let AttentionSpec {
            num_q_heads,
            num_kv_heads,
            head_dim,
            ..
        } = *self.spec;
        if num_kv_heads == 0 || head_dim == 0 {
            return Ok(());
        }
        let group_cols = num_q_heads / num_kv_heads * head_dim;
        let mut work = 0;
        let mut tasks = Vec::with_capacity(self.rows.num_rows() * num_kv_heads);
        let mut out_rows = out.values_mut().chunks_exact_mut(num_kv_heads * group_cols);
        for r in 0..self.rows.num_reqs() {
            for (i, row) in self.rows.rows_of(r).enumerate() {
                let Some(out_row) = out_rows.next() else {
                    break;
                };
                let q_groups = self.q.row(row).chunks_exact(group_cols);
                for (kv_head, (out, q)) in out_row
                    .chunks_exact_mut(group_cols)
                    .zip(q_groups)
                    .enumerate()
                {
                    let runs = self.visible(r, i, kv_head);
                    work += runs.iter().map(|run| run.len).sum::<usize>() * 2 * group_cols;
                    tasks.push(GroupTask {
                        spec: self.spec,
                        q,
                        runs,
                        out,
                    });
                }
            }
        }
        let arch = Arch::new();
        pool.for_each(work, tasks, Vec::new, |scores, task| {
            arch.dispatch(WithScores { task, scores });
        });
        Ok(())
    }

    fn check(&self, out: &F32Matrix) -> Result<()> {
        let spec = self.spec;
        if spec.num_kv_heads == 0 || !spec.num_q_heads.is_multiple_of(spec.num_kv_heads) {
            let expected = format!("a multiple of {} kv heads", spec.num_kv_heads);
            return Err(Error::argument("num_q_heads", expected, spec.num_q_heads));
        }
        let num_rows = self.rows.num_rows();
        expect_shape("q", self.q, num_rows, spec.num_q_heads * spec.head_dim)?;
        expect_cols("out", out, spec.num_q_heads * spec.head_dim)?;
        self.kv.expect_layer(self.layer)?;
        self.kv.expect_heads(spec)?;
        self.kv.expect_pages(self.rows)?;
        if let Some(masks) = &self.rows.tree {
            let most = self.rows.max_rows_per_req();
            if masks.len() != num_rows || most > MAX_TREE_ROWS {
                let expected = format!("{num_rows} masks, at most {MAX_TREE_ROWS} for a request");
                return Err(Error::argument("tree", expected, masks.len().max(most)));
            }
        }
        if let Some(block) = self.block {
            self.kv.expect_native()?;
            expect_shape(
                "block",
                block,
                num_rows,
                2 * spec.num_kv_heads * spec.head_dim,
            )?;
        }
        for r in 0..self.rows.num_reqs() {
            let num_rows = self.rows.rows_of(r).len();
            if num_rows > 0 {
                self.expect_visible_pages(r, self.num_cached(r, num_rows - 1))?;
            }
        }
        Ok(())
    }

    /// Cache slots that must be there for rows up to `i` of request `r`.
    fn num_cached(&self, r: usize, i: usize) -> usize {
        let own = if self.block.is_some() { 0 } else { i + 1 };
        self.rows.seq_lens[r] as usize + own
    }

    /// Ranges of cache slots that row `i` of request `r` sees, in order.
    fn seen_slots(&self, r: usize, i: usize) -> Vec<Range<usize>> {
        let committed = self.rows.seq_lens[r] as usize;
        let windowed = |place: usize| match self.spec.window {
            0 => 0,
            window => (committed + place + 1).saturating_sub(window),
        };
        let rows = self.rows.rows_of(r);
        let (run, own) = match &self.rows.tree {
            _ if self.block.is_some() => (windowed(i).min(committed)..committed, 0),
            None => (windowed(i)..committed + i + 1, 0),
            Some(masks) => {
                let mask = masks[rows.start + i] | 1 << i;
                let ancestors = mask.count_ones() as usize - 1;
                (windowed(ancestors).min(committed)..committed, mask)
            }
        };
        let own = (0..rows.len().min(MAX_TREE_ROWS)).filter(|&j| own >> j & 1 == 1);
        std::iter::once(run)
            .chain(own.map(|j| committed + j..committed + j + 1))
            .collect()
    }

    fn pages(&self, r: usize) -> &[i32] {
        let max_pages = self.rows.max_pages_per_req;
        &self.rows.page_table[r * max_pages..][..max_pages]
    }

    /// Checks that the first `num_slots` slots of request `r` have pages.
    fn expect_visible_pages(&self, r: usize, num_slots: usize) -> Result<()> {
        let needed = num_slots.div_ceil(self.kv.geometry.page_size);
        let found = self.pages(r).iter().take_while(|&&page| page >= 0).count();
        if found < needed {
            let field = format!("page_table of request {r}");
            let expected = format!("{needed} pages for {num_slots} slots");
            return Err(Error::argument(field, expected, found));
        }
        Ok(())
    }

    /// The keys and values of `kv_head` that row `i` of request `r` sees, in order.
    fn visible(&self, r: usize, i: usize, kv_head: usize) -> Vec<Run<'_>> {
        let page_size = self.kv.geometry.page_size;
        let head_dim = self.spec.head_dim;
        let kv_cols = self.spec.num_kv_heads * head_dim;
        let KvLayer { keys, values } = &self.kv.layers[self.layer];
        let mut runs = Vec::new();
        for Range { mut start, end } in self.seen_slots(r, i) {
            while start < end {
                let slot_in_page = start % page_size;
                let page = self.pages(r)[start / page_size] as usize;
                let at = (page * page_size + slot_in_page) * kv_cols + kv_head * head_dim;
                let len = (page_size - slot_in_page).min(end - start);
                runs.push(Run {
                    keys: &keys[at..],
                    values: &values[at..],
                    stride: kv_cols,
                    len,
                });
                start += len;
            }
        }
        if let Some(block) = self.block {
            let rows = self.rows.rows_of(r);
            let start = rows.start * 2 * kv_cols + kv_head * head_dim;
            runs.push(Run {
                keys: &block.values()[start..],
                values: &block.values()[start + kv_cols..],
                stride: 2 * kv_cols,
                len: rows.len(),
            });
        }
        runs
    }
}

/// Keys and values of one head at a constant stride; the slices start at the first and may go past the last.
struct Run<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    stride: usize,
    len: usize,
}

/// One row and one key/value head.
struct GroupTask<'a, 'o> {
    spec: &'a AttentionSpec,
    /// `[group, head_dim]`.
    q: &'a [f32],
    runs: Vec<Run<'a>>,
    /// `[group, head_dim]`.
    out: &'o mut [f32],
}

struct WithScores<'s, 'a, 'o> {
    task: GroupTask<'a, 'o>,
    scores: &'s mut Vec<f32>,
}

impl WithSimd for WithScores<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { task, scores } = self;
        let head_dim = task.spec.head_dim;
        let heads = task.q.chunks_exact(head_dim);
        for (q, out) in heads.zip(task.out.chunks_exact_mut(head_dim)) {
            scores.clear();
            for run in &task.runs {
                for i in 0..run.len {
                    let key = &run.keys[i * run.stride..][..head_dim];
                    scores.push(capped(
                        dot(simd, q, key) * task.spec.scale,
                        task.spec.softcap,
                    ));
                }
            }
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for score in scores.iter_mut() {
                *score = exp(*score - max);
            }
            let total: f64 = scores.iter().map(|&score| f64::from(score)).sum();
            #[allow(clippy::cast_possible_truncation, reason = "f64 is for the sum alone")]
            let scale = total.recip() as f32;
            weighted_sum(simd, &task.runs, scores, out);
            for out in out.iter_mut() {
                *out *= scale;
            }
        }
    }
}

/// `cap * tanh(score / cap)`; the score itself without a cap.
#[inline(always)]
fn capped(score: f32, cap: f32) -> f32 {
    if cap == 0.0 {
        return score;
    }
    cap * (score / cap).tanh()
}

/// `a . b`.
#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = S::as_simd_f32s(a);
    let (b, b_rest) = S::as_simd_f32s(b);
    let mut sum = simd.splat_f32s(0.0);
    for (&a, &b) in a.iter().zip(b) {
        sum = simd.mul_add_e_f32s(a, b, sum);
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    simd.reduce_sum_f32s(sum) + rest
}

/// `out = scores . values`, key by key in order; the sums of up to four vectors stay in registers.
#[inline(always)]
fn weighted_sum<S: Simd>(simd: S, runs: &[Run<'_>], scores: &[f32], out: &mut [f32]) {
    let lanes = S::F32_LANES;
    let mut at = 0;
    while at + 4 * lanes <= out.len() {
        weighted_vectors::<S, 4>(simd, runs, scores, at, out);
        at += 4 * lanes;
    }
    while at + lanes <= out.len() {
        weighted_vectors::<S, 1>(simd, runs, scores, at, out);
        at += lanes;
    }
    for (at, out) in out.iter_mut().enumerate().skip(at) {
        *out = keys_of(runs)
            .zip(scores)
            .map(|((run, i), score)| score * run.values[i * run.stride + at])
            .sum();
    }
}

/// Columns `at ..` of [`weighted_sum`], `VECTORS` vectors of them.
#[inline(always)]
fn weighted_vectors<S: Simd, const VECTORS: usize>(
    simd: S,
    runs: &[Run<'_>],
    scores: &[f32],
    at: usize,
    out: &mut [f32],
) {
    let width = VECTORS * S::F32_LANES;
    let mut sums = [simd.splat_f32s(0.0); VECTORS];
    let mut scores = scores;
    for run in runs {
        let (own, rest) = scores.split_at(run.len);
        scores = rest;
        for (i, &score) in own.iter().enumerate() {
            let (values, _) = S::as_simd_f32s(&run.values[i * run.stride + at..][..width]);
            let score = simd.splat_f32s(score);
            for (sum, &value) in sums.iter_mut().zip(values) {
                *sum = simd.mul_add_e_f32s(score, value, *sum);
            }
        }
    }
    let (out, _) = S::as_mut_simd_f32s(&mut out[at..at + width]);
    out.copy_from_slice(&sums);
}

/// Every key of `runs`, in order.
fn keys_of<'a>(runs: &'a [Run<'a>]) -> impl Iterator<Item = (&'a Run<'a>, usize)> {
    runs.iter()
        .flat_map(|run| (0..run.len).map(move |i| (run, i)))
}
