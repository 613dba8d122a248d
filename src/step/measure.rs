//! What a step costs here: target passes and drafts timed once at start-up.

use std::time::{Duration, Instant};

use super::{DecodeStep, PrefillChunk, Proposal, Sequence};
use crate::error::Result;
use crate::kv::PagePool;
use crate::ops::{Matrix as _, Ops, SamplingParams};
use crate::schedule::{CostTable, StepCost};

/// Passes timed per point, after one that is not; the median counts.
const REPEATS: usize = 3;

/// Cache entries of a scratch sequence before its anchor.
const CONTEXT: usize = 1;

/// The longest context a pass is timed behind, and the time that may be spent on making it.
const LONG_CONTEXT: usize = 2048;
const FILL_TIME: Duration = Duration::from_secs(2);

impl<O: Ops> DecodeStep<O> {
    /// Times verify passes of 1 to `max_num_reqs * (1 + draft_len)` rows and the drafts before them, on scratch
    /// sequences in free pages of `pool`.
    ///
    /// No trace is left: all pages go back, the sequences used slots that every later request starts afresh, and the
    /// phase times are reset. Call it while no sequence is alive. If the pool is too small for `max_num_reqs` scratch
    /// sequences, fewer are timed and the table's last line goes on from there. `on_point` hears of every point to come
    /// and of all there are.
    ///
    /// # Errors
    /// Those of the phases; not even one scratch sequence fits.
    pub fn measure_cost(
        &mut self,
        ops: &mut O,
        pool: &mut PagePool,
        max_num_reqs: usize,
        on_point: &mut dyn FnMut(usize, usize),
    ) -> Result<StepCost> {
        let mut scratch = Vec::new();
        let room = CONTEXT + 1 + self.draft_len();
        let cost = self
            .make_scratch(ops, pool, (max_num_reqs, room), &mut scratch)
            .and_then(|()| self.time_steps(ops, &mut scratch, on_point));
        for seq in &mut scratch {
            pool.release(&mut seq.pages);
        }
        let cost = cost.and_then(|cost| {
            let [verify, draft] = self.time_context(ops, pool, max_num_reqs)?;
            cost.with_context(verify)?.with_draft_context(draft)
        });
        self.reset_times();
        cost
    }

    /// Runs steps of 1 to `max_num_reqs * (1 + draft_len)` rows once, with drafts and without, on scratch sequences like those
    /// of [`DecodeStep::measure_cost`], and prompts of as many tokens as a pass may have rows. No trace is left.
    ///
    /// # Errors
    /// Those of the phases; not even one scratch sequence fits.
    pub fn warm_up(&mut self, ops: &mut O, pool: &mut PagePool, max_num_reqs: usize) -> Result<()> {
        let mut scratch = Vec::new();
        let room = CONTEXT + 1 + self.draft_len();
        let warmed = self
            .make_scratch(ops, pool, (max_num_reqs, room), &mut scratch)
            .and_then(|()| self.run_steps_once(ops, &mut scratch));
        for seq in &mut scratch {
            pool.release(&mut seq.pages);
        }
        let warmed = warmed.and_then(|()| self.run_prompts_once(ops, pool));
        self.reset_times();
        warmed
    }

    /// Runs prompts of as many tokens as a pass may have rows, in the sizes of [`grid`]: a drafter looks at as many rows after
    /// steps that drafted nothing.
    fn run_prompts_once(&mut self, ops: &mut O, pool: &mut PagePool) -> Result<()> {
        let room = pool.num_free() * pool.page_size();
        let most = self.target().features().hidden.max_rows();
        let most = most.min(room).min(self.target().max_position());
        let mut scratch = Vec::new();
        let done = self
            .make_scratch(ops, pool, (1, most), &mut scratch)
            .and_then(|()| {
                grid(1, most - 1).into_iter().try_for_each(|num_tokens| {
                    let sequence = &mut scratch[0];
                    sequence.pages.rollback(0);
                    sequence.anchor = None;
                    let chunk = PrefillChunk {
                        sequence,
                        tokens: &vec![0; num_tokens],
                        next: None,
                    };
                    self.prefill(ops, &mut [chunk]).map(|_| ())
                })
            });
        for seq in &mut scratch {
            pool.release(&mut seq.pages);
        }
        done.and_then(|()| ops.synchronize())
    }

    fn run_steps_once(&mut self, ops: &mut O, scratch: &mut [Sequence]) -> Result<()> {
        for num_tokens in grid(scratch.len(), self.most_verified()) {
            let num_reqs = num_tokens.min(scratch.len());
            let mut seqs: Vec<&mut Sequence> = scratch[..num_reqs].iter_mut().collect();
            let verify_lens = spread(num_tokens, num_reqs);
            self.time_step(ops, &mut seqs, &verify_lens, true)?;
            if num_tokens == num_reqs {
                let plain = Proposal::default();
                let pass = self.verify(ops, &mut seqs, &plain, &vec![0; num_reqs])?;
                self.commit(ops, &mut seqs, &plain, &pass)?;
                self.catch_up(ops, &seqs)?;
                self.restart(ops, &mut seqs)?;
            }
        }
        Ok(())
    }

    /// The most drafts of a scratch sequence that are verified.
    fn most_verified(&self) -> usize {
        let context_room = self.target().max_position().saturating_sub(CONTEXT + 1);
        self.draft_len().min(context_room)
    }

    /// Seconds for each cache entry of a verify pass and of a draft: both timed for as many requests as find room for a
    /// long context, before it is there and after. 0 where the pool or the model has no room for a long one, or no
    /// difference can be seen.
    fn time_context(
        &mut self,
        ops: &mut O,
        pool: &mut PagePool,
        max_num_reqs: usize,
    ) -> Result<[f64; 2]> {
        let rows = 1 + self.draft_len();
        let least = 2 * (rows + CONTEXT);
        let mut num_reqs = max_num_reqs.min(pool.num_free() / pool.pages_for(least));
        let most = self.target().max_position().min(LONG_CONTEXT);
        if num_reqs == 0 || most < least {
            return Ok([0.0; 2]);
        }
        // Long contexts of a few requests are more like those of real ones than short ones of many.
        while num_reqs > 1 && pool.num_free() / num_reqs * pool.page_size() < most / 2 {
            num_reqs = num_reqs.div_ceil(2);
        }
        let longest = most.min(pool.num_free() / num_reqs * pool.page_size());
        let mut scratch = Vec::with_capacity(num_reqs);
        let slopes = self
            .make_scratch(ops, pool, (num_reqs, longest), &mut scratch)
            .and_then(|()| {
                let mut seqs: Vec<&mut Sequence> = scratch.iter_mut().collect();
                let lens = vec![0; seqs.len()];
                let short = self.time_points(ops, &mut seqs, &lens, false)?;
                let chunk = (max_num_reqs * rows / seqs.len()).max(1);
                let context = self.fill_context(ops, &mut seqs, longest - rows, chunk)?;
                let long = self.time_points(ops, &mut seqs, &lens, false)?;
                let entries = (seqs.len() * (context - CONTEXT)).max(1) as f64;
                let slope = |low: f64, high: f64| (high - low).max(0.0) / entries;
                Ok([slope(short.1, long.1), slope(short.0, long.0)])
            });
        for seq in &mut scratch {
            pool.release(&mut seq.pages);
        }
        slopes
    }

    /// Prefills scratch sequences together, `chunk` tokens of each at a time, up to `context` entries or as far as
    /// [`FILL_TIME`] reaches; how far that was.
    fn fill_context(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        context: usize,
        chunk: usize,
    ) -> Result<usize> {
        let start = Instant::now();
        let mut filled = CONTEXT;
        while filled < context && start.elapsed() < FILL_TIME {
            let len = chunk.min(context - filled);
            let tokens: Vec<Vec<u32>> = seqs
                .iter_mut()
                .map(|seq| {
                    let mut tokens = vec![0; len];
                    tokens[0] = seq.anchor.take().unwrap_or(0);
                    tokens
                })
                .collect();
            let mut chunks: Vec<PrefillChunk<'_>> = seqs
                .iter_mut()
                .zip(&tokens)
                .map(|(sequence, tokens)| PrefillChunk {
                    sequence,
                    tokens,
                    next: None,
                })
                .collect();
            self.prefill(ops, &mut chunks)?;
            ops.synchronize()?;
            filled += len;
        }
        Ok(filled)
    }

    /// Prefilled sequences with room for so many entries each, as many of so many as fit.
    fn make_scratch(
        &mut self,
        ops: &mut O,
        pool: &mut PagePool,
        (num_reqs, num_entries): (usize, usize),
        scratch: &mut Vec<Sequence>,
    ) -> Result<()> {
        for slot in 0..num_reqs {
            let mut pages = pool.table();
            match pool.reserve(&mut pages, num_entries) {
                Err(_) if slot > 0 => break,
                result => result?,
            }
            scratch.push(Sequence::new(slot, pages, SamplingParams::default()));
        }
        self.restart(ops, &mut scratch.iter_mut().collect::<Vec<_>>())
    }

    /// Takes scratch sequences back to [`CONTEXT`] entries, by way of the beginning: drafters remember where they are.
    fn restart(&mut self, ops: &mut O, seqs: &mut [&mut Sequence]) -> Result<()> {
        let chunks = seqs.iter_mut().map(|sequence| {
            sequence.pages.rollback(0);
            sequence.anchor = None;
            PrefillChunk {
                sequence,
                tokens: &[0; CONTEXT],
                next: None,
            }
        });
        let mut chunks: Vec<PrefillChunk<'_>> = chunks.collect();
        self.prefill(ops, &mut chunks).map(|_| ())
    }

    fn time_steps(
        &mut self,
        ops: &mut O,
        scratch: &mut [Sequence],
        on_point: &mut dyn FnMut(usize, usize),
    ) -> Result<StepCost> {
        let mut verify = Vec::new();
        let mut draft = Vec::new();
        let grid = grid(scratch.len(), self.most_verified());
        for (done, &num_tokens) in grid.iter().enumerate() {
            on_point(done, grid.len());
            let num_reqs = num_tokens.min(scratch.len());
            let mut seqs: Vec<&mut Sequence> = scratch[..num_reqs].iter_mut().collect();
            let verify_lens = spread(num_tokens, num_reqs);
            let (drafted, verified) = self.time_points(ops, &mut seqs, &verify_lens, true)?;
            draft.push((num_reqs, drafted));
            verify.push((num_tokens, verified));
        }
        let draft = match self.draft_len() {
            0 => None,
            _ => Some(CostTable::new(draft)?),
        };
        Ok(StepCost::new(CostTable::new(verify)?, draft))
    }

    /// Median seconds of a draft with the commit, and of the verify pass between them; with a context beyond [`CONTEXT`],
    /// to which no way leads back, of the draft and the pass alone.
    fn time_points(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        verify_lens: &[usize],
        commits: bool,
    ) -> Result<(f64, f64)> {
        let (mut drafted, mut verified) = (Vec::new(), Vec::new());
        for repeat in 0..=REPEATS {
            let (draft, verify) = self.time_step(ops, seqs, verify_lens, commits)?;
            if repeat > 0 {
                drafted.push(draft);
                verified.push(verify);
            }
        }
        Ok((median(drafted), median(verified)))
    }

    /// Times of one draft with the commit, where the drafter looks at what stayed, and of one verify pass; both are then
    /// forgotten. In steps that draft nothing the look is put off.
    fn time_step(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        verify_lens: &[usize],
        commits: bool,
    ) -> Result<(Duration, Duration)> {
        let lens: Vec<usize> = seqs.iter().map(|seq| seq.seq_len()).collect();
        ops.synchronize()?;
        let start = Instant::now();
        let proposal = self.draft(ops, seqs, seqs.len())?;
        ops.synchronize()?;
        let mut drafted = start.elapsed();
        let start = Instant::now();
        let pass = self.verify(ops, seqs, &proposal, verify_lens)?;
        ops.synchronize()?;
        let verified = start.elapsed();
        if commits {
            let start = Instant::now();
            self.commit(ops, seqs, &proposal, &pass)?;
            ops.synchronize()?;
            drafted += start.elapsed();
            self.restart(ops, seqs)?;
        }
        for (seq, len) in seqs.iter_mut().zip(lens) {
            seq.pages.rollback(len);
        }
        Ok((drafted, verified))
    }
}

/// Drafts of each of `num_reqs` requests in a pass of `num_tokens` rows, as even as can be.
fn spread(num_tokens: usize, num_reqs: usize) -> Vec<usize> {
    let of = |r| (num_tokens - num_reqs + r) / num_reqs;
    (0..num_reqs).map(of).collect()
}

/// Row counts to time: 1, 2, 3, 4, 6, 8, 12, … and the ends of the range a full batch can have.
fn grid(num_reqs: usize, verify_len: usize) -> Vec<usize> {
    let most = num_reqs * (1 + verify_len);
    let mut points: Vec<usize> = (0..usize::BITS - 2)
        .flat_map(|bit| [1 << bit, 3 << bit])
        .take_while(|&n| n <= 3 * most)
        .filter(|&n| n <= most)
        .chain([num_reqs, most])
        .collect();
    points.sort_unstable();
    points.dedup();
    points
}

/// Seconds; at least a nanosecond, so that a clock too coarse to see the pass is no error.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64().max(1e-9)
}

#[cfg(test)]
mod tests {
    use super::grid;

    #[test]
    fn the_grid_covers_one_row_to_a_full_batch() {
        assert_eq!(grid(1, 0), [1]);
        assert_eq!(grid(1, 7), [1, 2, 3, 4, 6, 8]);
        assert_eq!(grid(5, 2), [1, 2, 3, 4, 5, 6, 8, 12, 15]);
    }
}
