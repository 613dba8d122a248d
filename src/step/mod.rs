//! The decode step, written once over the [`Ops`] trait: propose, schedule, verify, commit.
//!
//! A sequence whose anchor `x_0` stands at position `a` has `a` cache entries. [`DecodeStep::propose`] drafts
//! `x_1 ..`, [`DecodeStep::schedule`] chooses how many are verified, [`DecodeStep::verify`] runs the rows
//! `[x_0, x_1 .. x_l]` of every sequence in one ragged target pass (row k decides position `a + 1 + k`) and accepts a
//! prefix of n drafts without changing the target's law, and [`DecodeStep::commit`] moves the sequence on: n + 1 more
//! entries, the recovered or bonus token as anchor, and the drafter sees the rows that stayed. [`DecodeStep::round`]
//! is all four. Greedy and sampled sequences mix freely; with nothing to verify a round is plain decoding.

mod measure;
mod order;
mod prefill;
mod sequence;

pub use prefill::PrefillChunk;
pub use sequence::{PhaseTimes, Proposal, Round, Sequence};

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::model::{Drafter, ProposeBatch, Target};
use crate::ops::{
    AcceptBatch, AcceptExtras, DraftLaw, Ops, RowMap, Rule, SamplingParams, ScheduleInputs,
};
use crate::schedule::{
    Adapt, Batch, Decide, Evidence, Graded, Scheduler, StepCost, StepShape, decide,
};

/// A target, a drafter (or none: plain decoding) and a rule for how many drafts to verify.
pub struct DecodeStep<O: Ops> {
    target: Box<dyn Target<O>>,
    drafter: Option<Box<dyn Drafter<O>>>,
    scheduler: Scheduler,
    draft_len: usize,
    times: PhaseTimes,
    /// Calibrated confidences of the last schedule, until its round is committed.
    predicted: Option<Vec<f32>>,
}

/// What a verify pass decided; the sequences' tables hold all its rows until [`DecodeStep::commit`].
#[derive(Debug)]
pub struct Verified {
    /// The pass.
    pub map: RowMap,
    /// `[num_reqs]` drafts accepted.
    pub num_accepted: Vec<usize>,
    /// `[num_reqs]` recovered or bonus tokens.
    pub next_tokens: Vec<u32>,
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
            times: PhaseTimes::default(),
            predicted: None,
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

    /// One round of every sequence: propose where the schedule expects a gain, schedule, verify, commit.
    ///
    /// # Errors
    /// Those of the phases. The sequences are then as they were before the round, unless `commit` failed.
    pub fn round(&mut self, ops: &mut O, seqs: &mut [&mut Sequence]) -> Result<Vec<Round>> {
        let drafts = self.drafts(seqs);
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
    fn drafts(&mut self, seqs: &[&mut Sequence]) -> Vec<bool> {
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
        self.scheduler
            .observe_step(shape, start.elapsed().as_secs_f64());
        Ok(rounds)
    }

    /// Drafts for every sequence, or for none where the schedule expects no gain from drafting for any. The draft is
    /// shorter than `draft_len` where the reserved pages of a sequence end earlier, and empty without a drafter. Drafts
    /// past the model's context are made and never verified.
    ///
    /// # Errors
    /// A sequence that was not prefilled; what the drafter refuses.
    pub fn propose(&mut self, ops: &mut O, seqs: &[&mut Sequence]) -> Result<Proposal> {
        let pays = self.drafts(seqs).contains(&true);
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
        let (num_reqs, seqs) = (seqs.len(), &seqs[..num_drafted]);
        let room = |seq: &&mut Sequence| seq.pages.capacity().saturating_sub(seq.seq_len() + 1);
        let draft_len = seqs.iter().map(room).min().unwrap_or(0).min(self.draft_len);
        let Some(drafter) = self.drafter.as_mut().filter(|_| draft_len > 0) else {
            return Ok(Proposal::default());
        };
        let slots: Vec<usize> = seqs.iter().map(|seq| seq.slot).collect();
        let anchors = anchors(seqs)?;
        let sampling = sampling(seqs);
        let map = row_map(seqs, |_| 1)?;
        let batch = ProposeBatch {
            slots: &slots,
            anchors: &anchors,
            map: &map,
            sampling: &sampling,
        };
        let drafted = drafter.propose(ops, &batch, draft_len)?;
        let confidence = match (self.scheduler.evidence(), drafter.law()) {
            (Evidence::TopProbability, DraftLaw::Logits(logits)) => {
                let temperature = sampling
                    .iter()
                    .flat_map(|params| std::iter::repeat_n(params.temperature, draft_len));
                Some(ops.top_probabilities(logits, &temperature.collect::<Vec<f32>>())?)
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
        let limit = |(r, seq): (usize, &&mut Sequence)| match r < proposal.num_drafted {
            true => max_position.saturating_sub(seq.seq_len() + 1),
            false => 0,
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

    /// Runs anchor and first `verify_lens[r]` drafts of every sequence through the target and accepts a prefix.
    ///
    /// # Errors
    /// A `verify_len` beyond the draft, rows that pass the reserved pages or the model's context, logits that are no
    /// law. The sequences are then as they were.
    pub fn verify(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        proposal: &Proposal,
        verify_lens: &[usize],
    ) -> Result<Verified> {
        let start = Instant::now();
        let lens: Vec<usize> = seqs.iter().map(|seq| seq.seq_len()).collect();
        let verified = self.verify_rows(ops, seqs, proposal, verify_lens);
        if verified.is_err() {
            for (seq, &len) in seqs.iter_mut().zip(&lens) {
                seq.pages.rollback(len);
            }
        }
        self.times.verify += start.elapsed();
        verified
    }

    fn verify_rows(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        proposal: &Proposal,
        verify_lens: &[usize],
    ) -> Result<Verified> {
        let max_position = self.target.max_position();
        let anchors = anchors(seqs)?;
        let anchor_positions: Vec<u32> = seqs.iter().map(|seq| seq.seq_len() as u32).collect();
        let map = row_map(seqs, |r| 1 + verify_lens[r])?;
        let mut ids = Vec::with_capacity(map.num_rows());
        for (r, seq) in seqs.iter_mut().enumerate() {
            if verify_lens[r] > proposal.draft_len {
                let expected = format!("at most {} (the draft)", proposal.draft_len);
                return Err(Error::argument("verify_len", expected, verify_lens[r]));
            }
            ids.push(anchors[r]);
            ids.extend(&proposal.tokens_of(r)[..verify_lens[r]]);
            seq.pages.append(1 + verify_lens[r])?;
            check_context(seq.seq_len(), max_position)?;
        }
        self.target.forward(ops, &ids, &map, None)?;
        let law = match &self.drafter {
            Some(drafter) if proposal.draft_len > 0 => drafter.law(),
            _ => DraftLaw::PointMass,
        };
        let padded;
        let law = match law {
            DraftLaw::Sparse(law) if proposal.num_drafted < seqs.len() => {
                padded = law.padded(proposal.tokens.len());
                DraftLaw::Sparse(&padded)
            }
            law => law,
        };
        let edits = sequence::edits(seqs.iter().map(|seq| &**seq));
        let accepted = ops.accept(&AcceptBatch {
            target: self.target.logits(),
            qo_indptr: &map.qo_indptr,
            draft_tokens: &proposal.tokens,
            draft_len: proposal.draft_len,
            law,
            anchor_positions: &anchor_positions,
            sampling: &sampling(seqs),
            extras: AcceptExtras {
                edits: edits.as_deref(),
                ..AcceptExtras::default()
            },
        })?;
        Ok(Verified {
            map,
            num_accepted: accepted.num_accepted.iter().map(|&n| n as usize).collect(),
            next_tokens: accepted.next_tokens,
        })
    }

    /// Keeps the accepted rows of the last verify pass, makes the next token the anchor, and shows the drafter the
    /// rows that stayed.
    ///
    /// # Errors
    /// What the drafter refuses; the sequences have moved on by then.
    pub fn commit(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        proposal: &Proposal,
        verified: &Verified,
    ) -> Result<Vec<Round>> {
        let start = Instant::now();
        let predicted = self.predicted.take().unwrap_or_default();
        let mut next_tokens = vec![0; verified.map.num_rows()];
        let mut rounds = Vec::with_capacity(seqs.len());
        for (r, seq) in seqs.iter_mut().enumerate() {
            let (num_accepted, next) = (verified.num_accepted[r], verified.next_tokens[r]);
            let mut committed = proposal.tokens_of(r)[..num_accepted].to_vec();
            committed.push(next);
            let rows = verified.map.rows_of(r);
            next_tokens[rows.start..][..committed.len()].copy_from_slice(&committed);
            seq.pages
                .rollback(verified.map.seq_lens[r] as usize + committed.len());
            seq.anchor = Some(next);
            seq.output.extend(&committed);
            rounds.push(Round {
                draft_tokens: proposal.tokens_of(r).to_vec(),
                confidence: proposal.confidence_of(r).to_vec(),
                predicted: proposal.row_of(&predicted, r).to_vec(),
                verify_len: rows.len() - 1,
                num_accepted,
                committed,
            });
        }
        let graded = seqs.iter().zip(&rounds).map(|(seq, round)| Graded {
            verify_len: round.verify_len,
            num_accepted: round.num_accepted,
            excluded: !seq.calibrates,
        });
        self.scheduler.grade(&graded.collect::<Vec<_>>());
        let kept: Vec<usize> = rounds.iter().map(|round| round.committed.len()).collect();
        self.observe(ops, seqs, &verified.map, &kept, &next_tokens)?;
        self.times.commit += start.elapsed();
        Ok(rounds)
    }

    /// Shows the drafter the first `kept[r]` rows of each request of the target's last pass.
    fn observe(
        &mut self,
        ops: &mut O,
        seqs: &[&mut Sequence],
        map: &RowMap,
        kept: &[usize],
        next_tokens: &[u32],
    ) -> Result<()> {
        let Some(drafter) = &mut self.drafter else {
            return Ok(());
        };
        let slots: Vec<usize> = seqs.iter().map(|seq| seq.slot).collect();
        let features = self.target.features();
        drafter.observe(ops, &features, map, &slots, kept, next_tokens)
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
