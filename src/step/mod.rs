//! The decode step, written once over the [`Ops`] trait: propose, schedule, verify, commit.
//!
//! A sequence whose anchor `x_0` stands at position `a` has `a` cache entries. [`DecodeStep::propose`] drafts
//! `x_1 ..`, [`DecodeStep::schedule`] chooses how many are verified, [`DecodeStep::verify`] runs the rows
//! `[x_0, x_1 .. x_l]` of every sequence in one ragged target pass (row k decides position `a + 1 + k`) and accepts a
//! prefix of n drafts without changing the target's law, and [`DecodeStep::commit`] moves the sequence on: n + 1 more
//! entries, the recovered or bonus token as anchor, and the drafter sees the rows that stayed. [`DecodeStep::round`]
//! is all four. A chain of drafts may have second choices beside it ([`DecodeStep::set_alternates`]). Greedy and sampled sequences mix freely; with nothing to verify a round is plain decoding.

mod backlog;
mod extras;
mod measure;
mod order;
mod prefill;
mod rows;
mod sequence;
mod verify;

pub use prefill::{FirstToken, PrefillChunk};
pub use sequence::{PhaseTimes, Proposal, Round, Sequence, StepRecord};
pub use verify::{Run, Verified};

use std::time::{Duration, Instant};

use backlog::Backlog;

use crate::error::{Error, Result};
use crate::model::{Drafter, ProposeBatch, Target};
use crate::ops::{
    Constraint, DraftLaw, MAX_TREE_ROWS, Ops, RowMap, Rule, SamplingParams, ScheduleInputs,
};
use crate::schedule::{Adapt, Batch, Decide, Evidence, Scheduler, StepCost, StepShape, decide};

/// A target, a drafter (or none: plain decoding) and a rule for how many drafts to verify.
pub struct DecodeStep<O: Ops> {
    target: Box<dyn Target<O>>,
    drafter: Option<Box<dyn Drafter<O>>>,
    scheduler: Scheduler,
    draft_len: usize,
    /// See [`DecodeStep::set_alternates`].
    alternates: usize,
    times: PhaseTimes,
    /// Calibrated confidences of the last schedule, until its round is committed.
    predicted: Option<Vec<f32>>,
    backlog: Backlog<O>,
    /// Rows that the drafter looked at since the last step.
    num_looked_at: usize,
    /// Of every step, where they are recorded.
    records: Option<Vec<StepRecord>>,
}

impl<O: Ops> DecodeStep<O> {
    /// `draft_len` tokens are drafted per request and round; it must be 0 without a drafter.
    ///
    /// # Errors
    /// A draft length the drafter cannot make; a policy that needs confidences without a drafter. Of a drafter without
    /// a confidence head they are estimated from the probability of its likeliest token.
    pub fn new(
        target: Box<dyn Target<O>>,
        drafter: Option<Box<dyn Drafter<O>>>,
        mut scheduler: Scheduler,
        draft_len: usize,
    ) -> Result<Self> {
        let longest = drafter.as_ref().map_or(0, |d| d.max_draft_len());
        if draft_len > longest || (draft_len == 0 && drafter.is_some()) {
            let expected = match drafter {
                Some(_) => format!("1 to {longest} (the drafter's block size)"),
                None => "0 without a drafter".into(),
            };
            return Err(Error::argument("draft_len", expected, draft_len));
        }
        let policy = scheduler.policy();
        if policy.needs_confidence() {
            let Some(drafter) = &drafter else {
                let expected = format!("a drafter for `{policy}`");
                return Err(Error::argument("schedule", expected, "none"));
            };
            if !drafter.has_confidence() {
                scheduler.set_evidence(Evidence::TopProbability);
            }
        }
        Ok(Self {
            target,
            drafter,
            scheduler,
            draft_len,
            alternates: 0,
            times: PhaseTimes::default(),
            predicted: None,
            backlog: Backlog::default(),
            num_looked_at: 0,
            records: None,
        })
    }

    /// The target.
    pub fn target(&self) -> &dyn Target<O> {
        &*self.target
    }

    /// Tokens drafted per request and round.
    pub fn draft_len(&self) -> usize {
        self.draft_len
    }

    /// Verifies up to `alternates` second choices beside the drafts of each request from now on, one for each of the first
    /// tokens, where the drafter's law is over candidates, pages, buffers and context have room for their rows, and the
    /// request decodes by the token or coupled rule, or greedily, without a grammar.
    pub fn set_alternates(&mut self, alternates: usize) {
        self.alternates = alternates.min(MAX_TREE_ROWS - 1 - self.draft_len);
    }

    /// The most rows of a request in a verify pass.
    pub fn max_rows_per_req(&self) -> usize {
        1 + self.draft_len + self.alternates
    }

    /// The rule for how many drafts to verify.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// What the rule believes a step to cost.
    pub fn set_cost(&mut self, cost: StepCost) {
        self.scheduler.set_cost(cost);
    }

    /// What of the rule follows live outcomes from now on.
    pub fn set_adapt(&mut self, adapt: Adapt) {
        self.scheduler.set_adapt(adapt);
    }

    /// Time spent so far.
    pub fn times(&self) -> PhaseTimes {
        self.times
    }

    /// Keeps a record of every round from now on.
    pub fn record_steps(&mut self) {
        self.records.get_or_insert_default();
    }

    /// The records kept; none where [`DecodeStep::record_steps`] was not asked for.
    pub fn records(&self) -> &[StepRecord] {
        self.records.as_deref().unwrap_or_default()
    }

    /// One round of every sequence: propose where the schedule expects a gain, schedule, verify, commit.
    ///
    /// # Errors
    /// Those of the phases. The sequences are then as they were before the round, unless `commit` failed.
    pub fn round(&mut self, ops: &mut O, seqs: &mut [&mut Sequence]) -> Result<Vec<Round>> {
        let drafts = self.pays(seqs);
        self.round_with(ops, seqs, &drafts)
    }

    /// A round that drafts for the sequences with `drafts [num_seqs]`; the others are decoded plainly in the same pass.
    ///
    /// # Errors
    /// As [`DecodeStep::round`].
    pub fn round_with(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        drafts: &[bool],
    ) -> Result<Vec<Round>> {
        let start = Instant::now();
        let order = order::drafting_first(drafts);
        let num_drafted = drafts.iter().filter(|&&drafts| drafts).count();
        let rounds = self
            .ordered_round(ops, &mut order::reordered(seqs, &order), num_drafted, start)
            .map_err(|error| error.in_batch(|r| order[r]))?;
        Ok(order::in_order(rounds, &order))
    }

    /// For which sequences the next round should draft. To be asked once a round.
    fn pays(&mut self, seqs: &[&mut Sequence]) -> Vec<bool> {
        let slots: Vec<usize> = seqs.iter().map(|seq| seq.slot).collect();
        self.scheduler
            .drafts(&slots, self.draft_len, context_tokens(seqs))
    }

    /// A round in which the first `num_drafted` sequences are drafted for.
    fn ordered_round(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        num_drafted: usize,
        start: Instant,
    ) -> Result<Vec<Round>> {
        let context_tokens = context_tokens(seqs);
        let drafted_context_tokens = seqs[..num_drafted].iter().map(|seq| seq.seq_len()).sum();
        let times = self.times;
        self.num_looked_at = 0;
        let proposal = self.draft(ops, seqs, num_drafted)?;
        let mut by = |inputs: &ScheduleInputs<'_>| match ops.schedule(inputs)? {
            Some(scheduled) => Ok(scheduled),
            None => decide(inputs),
        };
        let verify_lens = self.schedule_by(seqs, &proposal, &mut by)?;
        let verified = self.verify(ops, seqs, &proposal, &verify_lens)?;
        let rounds = self.commit(ops, seqs, &proposal, &verified)?;
        let shape = StepShape {
            num_drafted: proposal.num_drafted,
            num_tokens: verified.map.num_rows(),
            context_tokens,
            drafted_context_tokens,
        };
        let seconds = start.elapsed().as_secs_f64();
        self.record(seqs.len(), shape, seconds, times);
        self.scheduler.observe_step(shape, seconds);
        Ok(rounds)
    }

    /// Adds to the records, where they are kept, a step that began at the phase times `before`.
    fn record(&mut self, num_reqs: usize, shape: StepShape, seconds: f64, before: PhaseTimes) {
        let Some(records) = &mut self.records else {
            return;
        };
        let now = self.times;
        let spent =
            |of: fn(&PhaseTimes) -> Duration| of(&now).saturating_sub(of(&before)).as_secs_f64();
        records.push(StepRecord {
            num_reqs,
            shape,
            num_looked_at: self.num_looked_at,
            expected_seconds: self.scheduler.cost().map(|cost| cost.seconds(shape)),
            seconds,
            propose_seconds: spent(|times| times.propose),
            schedule_seconds: spent(|times| times.schedule),
            verify_seconds: spent(|times| times.verify),
            commit_seconds: spent(|times| times.commit),
        });
    }

    /// Drafts for every sequence, or for none where the schedule expects no gain from drafting for any. The draft is
    /// shorter than `draft_len` where the reserved pages of a sequence end earlier, and empty without a drafter. Drafts
    /// past the model's context are made and never verified.
    ///
    /// # Errors
    /// A sequence that was not prefilled; what the drafter refuses.
    pub fn propose(&mut self, ops: &mut O, seqs: &[&mut Sequence]) -> Result<Proposal> {
        let pays = self.pays(seqs).contains(&true);
        self.draft(ops, seqs, if pays { seqs.len() } else { 0 })
    }

    /// Drafts for the first `num_drafted` sequences, whether it pays or not.
    fn draft(
        &mut self,
        ops: &mut O,
        seqs: &[&mut Sequence],
        num_drafted: usize,
    ) -> Result<Proposal> {
        let start = Instant::now();
        if num_drafted > 0 {
            self.catch_up(ops, seqs)?;
        }
        let (num_reqs, seqs) = (seqs.len(), &seqs[..num_drafted]);
        let room = |seq: &&mut Sequence| seq.pages.capacity().saturating_sub(seq.seq_len() + 1);
        let draft_len = seqs.iter().map(room).min().unwrap_or(0).min(self.draft_len);
        let Some(drafter) = self.drafter.as_mut().filter(|_| draft_len > 0) else {
            return Ok(Proposal::default());
        };
        let slots: Vec<usize> = seqs.iter().map(|seq| seq.slot).collect();
        let anchors = anchors(seqs)?;
        let sampling = sampling(seqs);
        let constraints: Vec<Option<Constraint<'_>>> =
            seqs.iter().map(|seq| seq.constraint()).collect();
        let map = row_map(seqs, |_| 1)?;
        let batch = ProposeBatch {
            slots: &slots,
            anchors: &anchors,
            map: &map,
            sampling: &sampling,
            constraints: &constraints,
        };
        let drafted = drafter.propose(ops, &batch, draft_len)?;
        let temperature: Vec<f32> = sampling
            .iter()
            .flat_map(|params| std::iter::repeat_n(params.temperature, draft_len))
            .collect();
        let confidence = match (self.scheduler.evidence(), drafter.law()) {
            // Of a head with a bias the base logits alone: they depend on no draft.
            (
                Evidence::TopProbability,
                DraftLaw::Logits(logits) | DraftLaw::LowRank { base: logits, .. },
            ) => Some(ops.top_probabilities(logits, &temperature)?),
            (Evidence::TopProbability, DraftLaw::Sparse(law)) => {
                Some(law.top_probabilities(&temperature))
            }
            _ => drafted.confidence,
        };
        self.times.propose += start.elapsed();
        let mut proposal = Proposal {
            draft_len,
            num_drafted,
            tokens: drafted.tokens,
            confidence,
        };
        proposal.tokens.resize(num_reqs * draft_len, 0);
        if let Some(confidence) = &mut proposal.confidence {
            confidence.resize(num_reqs * draft_len, 0.0);
        }
        Ok(proposal)
    }

    /// How many drafts of each sequence are verified: the scheduler's choice, never past the model's context.
    ///
    /// # Errors
    /// Those of [`Scheduler::plan`]; a policy that peeks with a request whose output depends on what is verified.
    pub fn schedule(&mut self, seqs: &[&mut Sequence], proposal: &Proposal) -> Result<Vec<usize>> {
        self.schedule_by(seqs, proposal, &mut decide)
    }

    /// [`DecodeStep::schedule`] with the decision made by `decide`.
    fn schedule_by(
        &mut self,
        seqs: &[&mut Sequence],
        proposal: &Proposal,
        decide: Decide<'_>,
    ) -> Result<Vec<usize>> {
        let start = Instant::now();
        let max_position = self.target.max_position();
        let limit = |(r, seq): (usize, &&mut Sequence)| {
            if r < proposal.num_drafted {
                max_position.saturating_sub(seq.seq_len() + 1)
            } else {
                0
            }
        };
        let limits: Vec<usize> = seqs.iter().enumerate().map(limit).collect();
        let slots: Vec<usize> = seqs.iter().map(|seq| seq.slot).collect();
        seqs.iter()
            .try_for_each(|seq| self.check_sampling(&seq.sampling))?;
        let batch = Batch {
            slots: &slots,
            limits: &limits,
            draft_len: proposal.draft_len,
            confidence: proposal.confidence.as_deref(),
            context_tokens: context_tokens(seqs),
        };
        let plan = self.scheduler.plan_by(&batch, decide)?;
        self.predicted = plan.predicted;
        self.times.schedule += start.elapsed();
        Ok(plan.verify_lens)
    }

    /// Refuses sampling whose law a policy that peeks would change.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the policy.
    pub fn check_sampling(&self, sampling: &SamplingParams) -> Result<()> {
        let policy = self.scheduler.policy();
        if policy.peeks() && sampling.temperature > 0.0 && sampling.rule != Rule::Coupled {
            let expected = format!(
                "the coupled rule or greedy requests under `{policy}`, which peeks at the drafts"
            );
            let found = format!(
                "the {} rule at temperature {}",
                sampling.rule, sampling.temperature
            );
            return Err(Error::argument("schedule", expected, found));
        }
        Ok(())
    }

    /// A request has ended, and its pages may become another's: nothing of the slot is looked at any more.
    pub fn forget(&mut self, slot: usize) {
        self.scheduler.forget(slot);
        self.backlog.forget(slot);
    }

    /// Rows of plain steps that the drafter has yet to look at.
    pub fn num_put_aside(&self) -> usize {
        self.backlog.len()
    }

    /// Forgets the time spent so far.
    fn reset_times(&mut self) {
        self.times = PhaseTimes::default();
    }

    fn add_prefill_time(&mut self, time: Duration) {
        self.times.prefill += time;
    }
}

/// The map of a pass with `num_rows(r)` rows of each sequence from its anchor's position on.
fn row_map(seqs: &[&mut Sequence], num_rows: impl Fn(usize) -> usize) -> Result<RowMap> {
    let max_pages = seqs.iter().map(|seq| seq.pages.pages().len()).max();
    let mut map = RowMap::new(max_pages.unwrap_or(0));
    for (r, seq) in seqs.iter().enumerate() {
        let len = seq.seq_len();
        map.push(num_rows(r), len, len, seq.pages.pages())?;
    }
    Ok(map)
}

/// Cache entries of all sequences together.
fn context_tokens(seqs: &[&mut Sequence]) -> usize {
    seqs.iter().map(|seq| seq.seq_len()).sum()
}

fn anchors(seqs: &[&mut Sequence]) -> Result<Vec<u32>> {
    let missing = || Error::argument("sequence", "a prefilled prompt", "no anchor");
    seqs.iter()
        .map(|seq| seq.anchor.ok_or_else(missing))
        .collect()
}

fn sampling(seqs: &[&mut Sequence]) -> Vec<SamplingParams> {
    seqs.iter().map(|seq| seq.sampling).collect()
}

/// Refuses caches longer than the positions the model was made for.
fn check_context(seq_len: usize, max_position: usize) -> Result<()> {
    if seq_len > max_position {
        let expected = format!("at most {max_position} positions (the model's context)");
        return Err(Error::argument("seq_len", expected, seq_len));
    }
    Ok(())
}
