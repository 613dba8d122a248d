//! What a step costs here: target passes and drafts timed once at start-up.

use std::time::{Duration, Instant};

use super::{DecodeStep, PrefillChunk, Proposal, Sequence};
use crate::error::Result;
use crate::kv::PagePool;
use crate::ops::{Ops, SamplingParams};
use crate::schedule::{CostTable, StepCost};

/// Passes timed per point, after one that is not; the median counts.
const REPEATS: usize = 3;

/// Cache entries of a scratch sequence before its anchor.
const CONTEXT: usize = 1;

/// The longest context a pass is timed behind.
const LONG_CONTEXT: usize = 512;

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
        let cost = self
            .make_scratch(ops, pool, max_num_reqs, &mut scratch)
            .and_then(|()| self.time_steps(ops, &mut scratch, on_point));
        for seq in &mut scratch {
            pool.release(&mut seq.pages);
        }
        let cost = cost.and_then(|cost| {
            let slope = self.time_context(ops, pool, max_num_reqs)?;
            cost.with_context(slope)
        });
        self.reset_times();
        cost
    }

    /// Seconds for each cache entry: passes of one row behind a short and a long context. 0 where the pool or the model
    /// has no room for a long one, or no difference can be seen.
    fn time_context(
        &mut self,
        ops: &mut O,
        pool: &mut PagePool,
        max_num_reqs: usize,
    ) -> Result<f64> {
        let room = pool.num_free() * pool.page_size();
        let longest = room.min(self.target().max_position()).min(LONG_CONTEXT);
        let rows = 1 + self.draft_len();
        if longest < 2 * (rows + CONTEXT) {
            return Ok(0.0);
        }
        let mut pages = pool.table();
        pool.reserve(&mut pages, longest)?;
        let mut seq = Sequence::new(0, pages, SamplingParams::default());
        let mut points = Vec::new();
        let slope = (|| {
            for context in [CONTEXT, longest - rows] {
                self.fill_context(ops, &mut seq, context, max_num_reqs * rows)?;
                points.push((context, self.time_pass(ops, &mut seq, context)?));
            }
            let ((short, low), (long, high)) = (points[0], points[1]);
            Ok((high - low).max(0.0) / (long - short) as f64)
        })();
        pool.release(&mut seq.pages);
        slope
    }

    /// Prefills a scratch sequence up to `context` entries, `chunk` at a time: as many as a verify pass may have rows.
    fn fill_context(
        &mut self,
        ops: &mut O,
        seq: &mut Sequence,
        context: usize,
        chunk: usize,
    ) -> Result<()> {
        while seq.seq_len() < context {
            let left = context - seq.seq_len();
            let mut tokens = vec![0; left.min(chunk)];
            tokens[0] = seq.anchor.take().unwrap_or(0);
            let chunk = PrefillChunk {
                sequence: seq,
                tokens: &tokens,
                next: (tokens.len() < left).then_some(0),
            };
            self.prefill(ops, &mut [chunk])?;
        }
        Ok(())
    }

    /// Median seconds of a verify pass of one row, which is then forgotten.
    fn time_pass(&mut self, ops: &mut O, seq: &mut Sequence, context: usize) -> Result<f64> {
        let mut times = Vec::with_capacity(REPEATS);
        for repeat in 0..=REPEATS {
            ops.synchronize()?;
            let start = Instant::now();
            self.verify(ops, &mut [&mut *seq], &Proposal::default(), &[0])?;
            ops.synchronize()?;
            if repeat > 0 {
                times.push(start.elapsed());
            }
            seq.pages.rollback(context);
        }
        Ok(median(times))
    }

    /// Prefilled sequences, as many as fit.
    fn make_scratch(
        &mut self,
        ops: &mut O,
        pool: &mut PagePool,
        max_num_reqs: usize,
        scratch: &mut Vec<Sequence>,
    ) -> Result<()> {
        for slot in 0..max_num_reqs {
            let mut pages = pool.table();
            match pool.reserve(&mut pages, CONTEXT + 1 + self.draft_len()) {
                Err(_) if slot > 0 => break,
                result => result?,
            }
            scratch.push(Sequence::new(slot, pages, SamplingParams::default()));
            let chunk = PrefillChunk {
                sequence: &mut scratch[slot],
                tokens: &[0; CONTEXT],
                next: None,
            };
            self.prefill(ops, &mut [chunk])?;
        }
        Ok(())
    }

    fn time_steps(
        &mut self,
        ops: &mut O,
        scratch: &mut [Sequence],
        on_point: &mut dyn FnMut(usize, usize),
    ) -> Result<StepCost> {
        let context_room = self.target().max_position().saturating_sub(CONTEXT + 1);
        let verify_len = self.draft_len().min(context_room);
        let mut verify = Vec::new();
        let mut draft = Vec::new();
        let grid = grid(scratch.len(), verify_len);
        for (done, &num_tokens) in grid.iter().enumerate() {
            on_point(done, grid.len());
            let num_reqs = num_tokens.min(scratch.len());
            let mut seqs: Vec<&mut Sequence> = scratch[..num_reqs].iter_mut().collect();
            let verify_lens: Vec<usize> = (0..num_reqs)
                .map(|r| (num_tokens - num_reqs + r) / num_reqs)
                .collect();
            let mut times = Vec::with_capacity(REPEATS);
            for repeat in 0..=REPEATS {
                let pair = self.time_step(ops, &mut seqs, &verify_lens)?;
                if repeat > 0 {
                    times.push(pair);
                }
            }
            draft.push((num_reqs, median(times.iter().map(|t| t.0).collect())));
            verify.push((num_tokens, median(times.iter().map(|t| t.1).collect())));
        }
        let draft = match self.draft_len() {
            0 => None,
            _ => Some(CostTable::new(draft)?),
        };
        Ok(StepCost::new(CostTable::new(verify)?, draft))
    }

    /// Times of one draft and one verify pass, which is then forgotten.
    fn time_step(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        verify_lens: &[usize],
    ) -> Result<(Duration, Duration)> {
        ops.synchronize()?;
        let start = Instant::now();
        let proposal = self.draft(ops, seqs)?;
        ops.synchronize()?;
        let drafted = start.elapsed();
        let start = Instant::now();
        self.verify(ops, seqs, &proposal, verify_lens)?;
        ops.synchronize()?;
        let verified = start.elapsed();
        for seq in seqs {
            seq.pages.rollback(CONTEXT);
        }
        Ok((drafted, verified))
    }
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
