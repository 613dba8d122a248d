//! A policy with everything it decides from: calibration, costs, and what became of earlier rounds.

use std::collections::VecDeque;

use super::bypass::Bypass;
use super::cost::{StepCost, StepShape};
use super::estimator::Estimator;
use super::online::OnlineSts;
use super::policy::Policy;
use super::rank::{Ticks, decide};
use super::survival::{calibrate, survival, validate_temperatures};
use crate::error::{Error, Result};
use crate::ops::{ScheduleInputs, ScheduleRule, Scheduled};

/// What follows live outcomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adapt {
    /// Temperatures: online STS.
    pub calibration: bool,
    /// Factors of the cost's terms: recursive least squares.
    pub cost: bool,
    /// Whether to draft at all.
    pub bypass: bool,
}

impl Adapt {
    /// Nothing: every decision follows from the step's own confidences and the profiled cost.
    pub const OFF: Self = Self {
        calibration: false,
        cost: false,
        bypass: false,
    };
    /// Everything.
    pub const ON: Self = Self {
        calibration: true,
        cost: true,
        bypass: true,
    };
}

/// Where a step's confidences come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Evidence {
    /// The drafter's confidence head.
    #[default]
    Head,
    /// The probability of the drafter's likeliest token, from which confidences are estimated.
    TopProbability,
}

/// The requests of a step, one entry each.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch<'a> {
    /// Stable slots.
    pub slots: &'a [usize],
    /// The most drafts of each that may be verified: what the context and the reserved pages leave; 0 of a request that
    /// was not drafted for.
    pub limits: &'a [usize],
    /// Tokens drafted for each.
    pub draft_len: usize,
    /// `[num_reqs * draft_len]` as the drafter gave it ([`Evidence`]).
    pub confidence: Option<&'a [f32]>,
    /// Cache entries of all requests together.
    pub context_tokens: usize,
}

/// What was decided.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// `[num_reqs]`.
    pub verify_lens: Vec<usize>,
    /// `[num_reqs * draft_len]`: calibrated confidences; `None` without confidences.
    pub predicted: Option<Vec<f32>>,
}

/// What became of one request of the last plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Graded {
    /// Drafts that were verified.
    pub verify_len: usize,
    /// Drafts that were accepted.
    pub num_accepted: usize,
    /// The request's law is not the one the drafter was trained on (penalties, a grammar mask): it teaches nothing.
    pub excluded: bool,
}

/// In the place of a slot whose round teaches nothing about its request.
const NO_SLOT: usize = usize::MAX;

/// The confidences of the last plan, until the round is graded.
#[derive(Clone, Debug)]
struct Pending {
    slots: Vec<usize>,
    draft_len: usize,
    raw: Vec<f32>,
    calibrated: Vec<f32>,
}

/// Who makes the decision of a step: [`decide`] or a device that comes to the same.
pub type Decide<'a> = &'a mut dyn FnMut(&ScheduleInputs<'_>) -> Result<Scheduled>;

/// The best number of drafts of a step, for the step after the next.
#[derive(Clone, Copy, Debug)]
struct Capacity {
    num_drafts: usize,
    /// Requests that were drafted for.
    num_drafted: usize,
}

/// Steps between the confidences a [`Policy::Delayed`] capacity is computed from and the step it is used in.
const DELAY: usize = 2;

/// A policy and its state.
#[derive(Clone, Debug)]
pub struct Scheduler {
    policy: Policy,
    temperatures: Option<Vec<f32>>,
    adapt: Adapt,
    evidence: Evidence,
    cost: Option<StepCost>,
    online: Option<OnlineSts>,
    estimator: Option<Estimator>,
    bypass: Option<Bypass>,
    capacities: VecDeque<Capacity>,
    pending: Option<Pending>,
    /// The longest draft seen, which the state above is sized for.
    longest: usize,
    bad_confidences: u64,
}

impl Scheduler {
    /// `temperatures` are the STS temperatures of the positions (`None`: confidences are taken as they are). A cost,
    /// where [`Policy::needs_cost`], is given by [`Scheduler::set_cost`] before the first plan. Nothing adapts until
    /// [`Scheduler::set_adapt`].
    ///
    /// # Errors
    /// A threshold outside (0, 1]; a temperature that is not a positive number.
    pub fn new(policy: Policy, temperatures: Option<Vec<f32>>) -> Result<Self> {
        if let Policy::Threshold(x) = policy
            && !(x > 0.0 && x <= 1.0)
        {
            return Err(Error::argument("threshold", "a number in (0, 1]", x));
        }
        validate_temperatures(temperatures.as_deref().unwrap_or(&[]))?;
        Ok(Self {
            policy,
            temperatures,
            adapt: Adapt::OFF,
            evidence: Evidence::Head,
            cost: None,
            online: None,
            estimator: None,
            bypass: None,
            capacities: VecDeque::new(),
            pending: None,
            longest: 0,
            bad_confidences: 0,
        })
    }

    /// The rule.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// What follows live outcomes from now on. What was learnt before stays in use.
    pub fn set_adapt(&mut self, adapt: Adapt) {
        self.adapt = adapt;
    }

    /// Where confidences come from. Estimates are always learnt from outcomes, whatever adapts.
    pub fn set_evidence(&mut self, evidence: Evidence) {
        self.evidence = evidence;
    }

    /// Where confidences come from.
    pub fn evidence(&self) -> Evidence {
        self.evidence
    }

    /// What a step costs; only policies that need it look at it.
    pub fn set_cost(&mut self, cost: StepCost) {
        self.cost = Some(cost);
    }

    /// The cost in use.
    pub fn cost(&self) -> Option<&StepCost> {
        self.cost.as_ref()
    }

    /// The temperatures in use; `None` where confidences are taken as they are.
    pub fn temperatures(&self) -> Option<&[f32]> {
        match &self.online {
            Some(online) => Some(online.temperatures()),
            None => self.temperatures.as_deref(),
        }
    }

    /// Confidences so far that were no probabilities (NaN, or outside 0 to 1). They count as 0 or as the nearer end: a
    /// drafter or a kernel is broken, the output is not.
    pub fn bad_confidences(&self) -> u64 {
        self.bad_confidences
    }

    /// A new request has the slot: what its predecessor's rounds said about it is forgotten.
    pub fn forget(&mut self, slot: usize) {
        if let Some(bypass) = &mut self.bypass {
            bypass.forget(slot);
        }
        if let Some(pending) = &mut self.pending {
            let same = pending.slots.iter_mut().filter(|held| **held == slot);
            same.for_each(|held| *held = NO_SLOT);
        }
    }

    /// For which of these requests the next step should draft. To be asked once a step, before drafting.
    pub fn drafts(
        &mut self,
        slots: &[usize],
        draft_len: usize,
        context_tokens: usize,
    ) -> Vec<bool> {
        let all = vec![true; slots.len()];
        let Some(cost) = &self.cost else { return all };
        if !self.adapt.bypass || !self.policy.needs_cost() || draft_len == 0 || slots.is_empty() {
            return all;
        }
        let bypass = match &mut self.bypass {
            Some(bypass) if bypass.draft_len() >= draft_len => bypass,
            stale => stale.insert(Bypass::new(draft_len, slots.len())),
        };
        bypass.drafts(slots, context_tokens, cost)
    }

    /// How many drafts of each request are verified.
    ///
    /// A round that was planned before and not graded ([`Scheduler::grade`]) is dropped: its outcomes can no longer be
    /// told from this one's.
    ///
    /// # Errors
    /// The policy needs confidences, temperatures or a cost that are not there.
    pub fn plan(&mut self, batch: &Batch<'_>) -> Result<Plan> {
        self.plan_by(batch, &mut decide)
    }

    /// [`Scheduler::plan`] with the ranking and the search done by `decide`.
    ///
    /// # Errors
    /// As [`Scheduler::plan`], and those of `decide`.
    pub fn plan_by(&mut self, batch: &Batch<'_>, decide: Decide<'_>) -> Result<Plan> {
        self.pending = None;
        let draft_len = batch.draft_len;
        let limits: Vec<usize> = batch.limits.iter().map(|&l| l.min(draft_len)).collect();
        if draft_len == 0 || limits.is_empty() {
            return Ok(Plan {
                verify_lens: limits,
                predicted: None,
            });
        }
        let Some(raw) = batch.confidence else {
            if self.policy.needs_confidence() {
                let expected = format!("confidences for `{}`", self.policy);
                let found = "a drafter without a confidence head";
                return Err(Error::argument("schedule", expected, found));
            }
            return Ok(Plan {
                verify_lens: limits,
                predicted: None,
            });
        };
        if raw.len() != limits.len() * draft_len {
            let expected = format!("{} x {draft_len} values", limits.len());
            return Err(Error::argument("confidence", expected, raw.len()));
        }
        let bad = raw.iter().filter(|c| !(0.0..=1.0).contains(*c)).count();
        self.bad_confidences += bad as u64;
        let calibrated = self.calibrated(raw, draft_len)?;
        let verify_lens = self.choose(&calibrated, &limits, batch, decide)?;
        // Nothing is learnt about a request that was not drafted for.
        let slot_of = |(&slot, &limit): (&usize, &usize)| if limit > 0 { slot } else { NO_SLOT };
        self.pending = Some(Pending {
            slots: batch.slots.iter().zip(&limits).map(slot_of).collect(),
            draft_len,
            raw: raw.to_vec(),
            calibrated: calibrated.clone(),
        });
        Ok(Plan {
            verify_lens,
            predicted: Some(calibrated),
        })
    }

    /// Calibrated confidences `[num_reqs * draft_len]`.
    fn calibrated(&mut self, raw: &[f32], draft_len: usize) -> Result<Vec<f32>> {
        if self.longest < draft_len {
            self.longest = draft_len;
            self.online = None;
            self.estimator = None;
        }
        if self.evidence == Evidence::TopProbability {
            let estimator = self
                .estimator
                .get_or_insert_with(|| Estimator::new(draft_len));
            return Ok(estimator.confidence(raw, draft_len));
        }
        if self.adapt.calibration && self.online.is_none() {
            self.online = Some(OnlineSts::new(draft_len, self.temperatures.as_deref()));
        }
        calibrate(raw, draft_len, self.temperatures())
    }

    fn choose(
        &mut self,
        calibrated: &[f32],
        limits: &[usize],
        batch: &Batch<'_>,
        decide: Decide<'_>,
    ) -> Result<Vec<usize>> {
        let (draft_len, num_reqs) = (batch.draft_len, limits.len());
        let num_drafted = limits.iter().filter(|&&limit| limit > 0).count();
        let rule = match self.policy {
            Policy::Fixed => return Ok(limits.to_vec()),
            Policy::Threshold(x) => {
                let rows = calibrated.chunks_exact(draft_len).zip(limits);
                return Ok(rows
                    .map(|(row, &limit)| row[..limit].iter().take_while(|&&c| c >= x).count())
                    .collect());
            }
            Policy::Algorithm1 => ScheduleRule::FirstFall,
            Policy::Delayed => self.delayed(num_drafted, num_reqs),
            Policy::Global => ScheduleRule::Best,
        };
        let cost = self.cost.as_ref().ok_or_else(|| {
            let expected = format!("a measured step cost for `{}`", self.policy);
            Error::argument("schedule", expected, "none")
        })?;
        let seconds = cost.seconds_by_rows(StepShape {
            num_drafted,
            num_tokens: num_reqs,
            context_tokens: batch.context_tokens,
            drafted_context_tokens: batch.context_tokens * num_drafted / num_reqs,
        });
        let ticks = Ticks::new(num_reqs * draft_len, |n| seconds(num_reqs + n));
        let scheduled = decide(&ScheduleInputs {
            rule,
            confidence: calibrated,
            temperature: None,
            limits,
            ticks: ticks.as_slice(),
        })?;
        if self.policy == Policy::Delayed {
            self.capacities.push_back(Capacity {
                num_drafts: scheduled.best,
                num_drafted,
            });
        }
        Ok(scheduled.verify_lens)
    }

    /// The capacity of the drafted step before the last, for as many requests as are drafted for now; Algorithm 1 while
    /// there is none.
    fn delayed(&mut self, num_drafted: usize, num_reqs: usize) -> ScheduleRule {
        let held = match self.capacities.len() {
            DELAY => self.capacities.pop_front(),
            _ => None,
        };
        match held {
            None => ScheduleRule::FirstFall,
            Some(held) if num_drafted == num_reqs => {
                ScheduleRule::Capacity(held.num_drafts, held.num_drafted)
            }
            Some(held) => {
                let scaled = held.num_drafts * num_drafted + held.num_drafted / 2;
                ScheduleRule::Capacity(scaled / held.num_drafted.max(1), num_reqs)
            }
        }
    }

    /// Takes in what became of the last plan's requests, in its order; before the next plan, whose confidences would
    /// otherwise be taken for this one's. Without a plan to grade, nothing happens.
    pub fn grade(&mut self, outcomes: &[Graded]) {
        let Some(pending) = self.pending.take() else {
            return;
        };
        let rows = pending.raw.chunks_exact(pending.draft_len);
        let rows = rows.zip(pending.calibrated.chunks_exact(pending.draft_len));
        for ((outcome, &slot), (raw, calibrated)) in outcomes.iter().zip(&pending.slots).zip(rows) {
            let (verify_len, num_accepted) = (outcome.verify_len, outcome.num_accepted);
            if let Some(bypass) = &mut self.bypass
                && slot != NO_SLOT
            {
                let survival = survival(calibrated, pending.draft_len);
                bypass.add(slot, &survival, verify_len, num_accepted);
            }
            if outcome.excluded {
                continue;
            }
            if let Some(online) = &mut self.online {
                online.add(raw, verify_len, num_accepted);
            }
            if let Some(estimator) = &mut self.estimator {
                estimator.add(raw, verify_len, num_accepted);
            }
        }
        if self.adapt.calibration
            && let Some(online) = &mut self.online
        {
            online.refit_next();
        }
    }

    /// Takes in what a step took.
    pub fn observe_step(&mut self, shape: StepShape, seconds: f64) {
        if self.adapt.cost
            && let Some(cost) = &mut self.cost
        {
            cost.observe(shape, seconds);
        }
    }
}
