//! Replays recorded rounds through a scheduler against a step cost: policies compared without a device, and at loads
//! larger than one holds. Deterministic by seed.
//!
//! The model: a simulated request takes the recorded rounds of one recorded request, from a drawn place on and around
//! its end, one a step. With `verify_len` drafts verified it commits `min(num_accepted, verify_len) + 1` tokens, and the
//! recording's next round comes next, however many were committed: text is taken to be as hard a few tokens earlier or
//! later. A step without drafts commits one token a request and passes over no round (but for the oracle, which has
//! looked at it). A request leaves when it has its number of tokens. Steps take what the cost says; prompts are free.
//!
//! Where loads change ([`Arrivals::Waves`], [`Arrivals::Tides`]) a run ends with a whole number of pairs of phases, and
//! where requests arrive by themselves ([`Arrivals::Poisson`], [`Arrivals::Bursts`]) with the last of a fixed number of
//! requests, whose arrivals, texts and lengths are the same under every rule: rules are then compared on the same work.

mod arrivals;

pub use arrivals::Arrivals;

use serde::Serialize;

use arrivals::{Draws, Phase};

use crate::error::{Error, Result};
use crate::schedule::cost::{StepCost, StepShape};
use crate::schedule::policy::Policy;
use crate::schedule::scheduler::{Adapt, Batch, Graded, Scheduler};
use crate::schedule::sts::{RecordedRound, check};

/// One recorded request.
#[derive(Clone, Debug, Default, serde::Deserialize, serde::Serialize)]
pub struct RecordedRequest {
    /// Its rounds, all drafts verified.
    pub rounds: Vec<RecordedRound>,
}

/// What decides how much is drafted and verified.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Plain decoding.
    None,
    /// This many drafts are verified, always.
    Length(usize),
    /// A scheduler.
    Policy(Policy),
    /// For each step the best choice of all, made with the outcomes known: no rule can beat it.
    Oracle,
}

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Simulation<'a> {
    /// Recorded requests to draw from.
    pub requests: &'a [RecordedRequest],
    /// What a step costs.
    pub cost: &'a StepCost,
    /// Tokens drafted a round; recorded confidences beyond are not used.
    pub draft_len: usize,
    /// STS temperatures.
    pub temperatures: Option<&'a [f32]>,
    /// What the scheduler learns on the way.
    pub adapt: Adapt,
    /// Most requests at once.
    pub num_reqs: usize,
    /// How they come.
    pub arrivals: Arrivals,
    /// Cache entries of a request when it starts.
    pub prompt_len: usize,
    /// Tokens of a request.
    pub num_tokens: usize,
    /// Steps to run at least; with [`Arrivals::Poisson`] and [`Arrivals::Bursts`] instead as many requests as full
    /// batches would serve in this many steps of two tokens.
    pub num_steps: usize,
    /// Of all draws.
    pub seed: u64,
}

/// What a run amounted to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SimReport {
    /// Committed tokens of all requests.
    pub num_tokens: u64,
    /// Time that passed.
    pub seconds: f64,
    /// Rounds of all requests.
    pub num_rounds: u64,
    /// Of them, those that had drafts.
    pub num_drafted: u64,
    /// Drafts verified.
    pub num_verified: u64,
    /// Drafts accepted.
    pub num_accepted: u64,
    /// Time that requests spent in the batch, all together.
    pub request_seconds: f64,
    /// Time that requests spent waiting for it.
    pub wait_seconds: f64,
}

impl SimReport {
    /// Tokens per second of all requests together.
    pub fn tokens_per_second(&self) -> f64 {
        self.num_tokens as f64 / self.seconds
    }

    /// Tokens per second of one request in the batch.
    pub fn tokens_per_second_per_user(&self) -> f64 {
        self.num_tokens as f64 / self.request_seconds
    }

    /// The same as who has sent the request sees it, waiting included.
    pub fn tokens_per_second_served(&self) -> f64 {
        self.num_tokens as f64 / (self.request_seconds + self.wait_seconds)
    }
}

/// A request in the batch.
#[derive(Clone, Debug)]
struct Live {
    slot: usize,
    request: usize,
    next_round: usize,
    tokens_left: usize,
    context: usize,
}

/// The state of a run.
struct World {
    draws: Draws,
    live: Vec<Live>,
    free: Vec<usize>,
    next_arrival: f64,
    /// Requests that have not come yet.
    to_come: usize,
    phase: Phase,
    report: SimReport,
}

impl Simulation<'_> {
    /// Runs one rule.
    ///
    /// # Errors
    /// No recorded rounds; rounds that contradict themselves, that have fewer confidences than `draft_len` or were not
    /// verified in full; zero requests, steps or tokens; those of the scheduler.
    pub fn run(&self, rule: Rule) -> Result<SimReport> {
        self.validate()?;
        let mut scheduler = match rule {
            Rule::Policy(policy) => {
                let temperatures = self.temperatures.map(<[f32]>::to_vec);
                let mut scheduler = Scheduler::new(policy, temperatures)?;
                scheduler.set_cost(self.cost.clone());
                scheduler.set_adapt(self.adapt);
                Some(scheduler)
            }
            _ => None,
        };
        let mut world = World {
            draws: Draws(self.seed),
            live: Vec::new(),
            free: (0..self.num_reqs).rev().collect(),
            next_arrival: 0.0,
            to_come: usize::MAX,
            phase: Phase {
                quiet: false,
                end: match self.arrivals {
                    Arrivals::Waves { tokens, .. } => tokens as f64,
                    Arrivals::Tides { seconds, .. } => seconds,
                    _ => 0.0,
                },
            },
            report: SimReport::default(),
        };
        if self.arrivals.is_open() {
            world.to_come = (2 * self.num_steps * self.num_reqs).div_ceil(self.num_tokens);
            self.next_arrival(&mut world);
        }
        for step in 0.. {
            let cycle_over = self.turn(&mut world);
            if step >= self.num_steps && cycle_over && !self.arrivals.is_open() {
                break;
            }
            self.arrive(&mut world, scheduler.as_mut());
            if world.live.is_empty() {
                if world.to_come == 0 {
                    break;
                }
                world.report.seconds = world.next_arrival;
                continue;
            }
            self.step(rule, scheduler.as_mut(), &mut world)?;
            let free = &mut world.free;
            world.live.retain(|request| {
                let stays = request.tokens_left > 0;
                if !stays {
                    free.push(request.slot);
                }
                stays
            });
        }
        Ok(world.report)
    }

    fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("num_reqs", self.num_reqs),
            ("num_steps", self.num_steps),
            ("num_tokens", self.num_tokens),
            ("requests", self.requests.len()),
        ] {
            if value == 0 {
                return Err(Error::argument(field, "at least 1", 0));
            }
        }
        self.arrivals.validate()?;
        for request in self.requests {
            check(&request.rounds)?;
            if request.rounds.is_empty() {
                return Err(Error::argument("requests", "recorded rounds", "none"));
            }
            let whole = |round: &RecordedRound| round.verify_len >= self.draft_len;
            if let Some(round) = request.rounds.iter().find(|round| !whole(round)) {
                let expected = format!("rounds that verified {} drafts", self.draft_len);
                return Err(Error::argument("rounds", expected, round.verify_len));
            }
        }
        Ok(())
    }

    /// Lets requests in.
    fn arrive(&self, world: &mut World, mut scheduler: Option<&mut Scheduler>) {
        let most = match self.arrivals {
            Arrivals::Waves { low, .. } | Arrivals::Tides { low, .. } if world.phase.quiet => {
                low.clamp(1, self.num_reqs)
            }
            _ => self.num_reqs,
        };
        while world.live.len() > most {
            // The quiet phase begins: the newest requests are taken elsewhere.
            let gone = world.live.pop().map(|request| request.slot);
            world.free.extend(gone);
        }
        while world.live.len() < most && world.to_come > 0 {
            if self.arrivals.is_open() && world.next_arrival > world.report.seconds {
                break;
            }
            let Some(slot) = world.free.pop() else { break };
            if let Some(scheduler) = &mut scheduler {
                scheduler.forget(slot);
            }
            let draws = &mut world.draws;
            let request = draws.below(self.requests.len());
            world.live.push(Live {
                slot,
                request,
                next_round: draws.below(self.requests[request].rounds.len()),
                // Lengths differ, so that requests do not leave in step.
                tokens_left: 1 + self.num_tokens / 2 + draws.below(self.num_tokens),
                context: self.prompt_len,
            });
            if self.arrivals.is_open() {
                world.report.wait_seconds += world.report.seconds - world.next_arrival;
                world.to_come -= 1;
                self.next_arrival(world);
            }
        }
    }

    fn step(&self, rule: Rule, scheduler: Option<&mut Scheduler>, world: &mut World) -> Result<()> {
        let World { live, report, .. } = world;
        let rounds: Vec<&RecordedRound> = live
            .iter()
            .map(|live| &self.requests[live.request].rounds[live.next_round])
            .collect();
        let context_tokens = live.iter().map(|live| live.context).sum();
        // For each request the drafts that are verified; `None` where nothing is drafted.
        let choice: Vec<Option<usize>> = match (rule, scheduler) {
            (Rule::Policy(_), Some(scheduler)) => {
                self.scheduled(scheduler, live, &rounds, context_tokens)?
            }
            (Rule::Length(len), _) => vec![Some(len.min(self.draft_len)); live.len()],
            (Rule::Oracle, _) => self.oracle(&rounds, context_tokens),
            _ => vec![None; live.len()],
        };
        let num_drafts: usize = choice.iter().flatten().sum();
        let num_drafted = choice.iter().flatten().count();
        let seconds = self.cost.seconds(StepShape {
            num_drafted,
            num_tokens: live.len() + num_drafts,
            context_tokens,
            drafted_context_tokens: context_tokens * num_drafted / live.len(),
        });
        report.seconds += seconds;
        report.request_seconds += seconds * live.len() as f64;
        report.num_rounds += live.len() as u64;
        report.num_drafted += num_drafted as u64;
        report.num_verified += num_drafts as u64;
        for (r, live) in live.iter_mut().enumerate() {
            let accepted = choice[r].map_or(0, |len| len.min(rounds[r].num_accepted));
            // The oracle has looked at the round also where it drafts nothing.
            if choice[r].is_some() || rule == Rule::Oracle {
                live.next_round = (live.next_round + 1) % self.requests[live.request].rounds.len();
            }
            let committed = 1 + accepted;
            live.tokens_left = live.tokens_left.saturating_sub(committed);
            live.context += committed;
            report.num_tokens += committed as u64;
            report.num_accepted += accepted as u64;
        }
        Ok(())
    }

    /// The scheduler's choice.
    fn scheduled(
        &self,
        scheduler: &mut Scheduler,
        live: &[Live],
        rounds: &[&RecordedRound],
        context_tokens: usize,
    ) -> Result<Vec<Option<usize>>> {
        let slots: Vec<usize> = live.iter().map(|live| live.slot).collect();
        let drafts = scheduler.drafts(&slots, self.draft_len, context_tokens);
        if !drafts.contains(&true) {
            return Ok(vec![None; live.len()]);
        }
        // As in the real step, requests without a draft take part with nothing to verify.
        let limits: Vec<usize> = drafts
            .iter()
            .map(|&drafts| if drafts { self.draft_len } else { 0 })
            .collect();
        let confidence: Vec<f32> = rounds
            .iter()
            .zip(&drafts)
            .flat_map(|(round, &drafts)| {
                let row = round.confidence[..self.draft_len].iter();
                row.map(move |&c| if drafts { c } else { 0.0 })
            })
            .collect();
        let plan = scheduler.plan(&Batch {
            slots: &slots,
            limits: &limits,
            draft_len: self.draft_len,
            confidence: Some(&confidence),
            context_tokens,
        })?;
        let grade = |(&verify_len, round): (&usize, &&RecordedRound)| Graded {
            verify_len,
            num_accepted: verify_len.min(round.num_accepted),
            excluded: false,
        };
        let outcomes: Vec<Graded> = plan.verify_lens.iter().zip(rounds).map(grade).collect();
        scheduler.grade(&outcomes);
        let lens = plan.verify_lens.into_iter().zip(drafts);
        Ok(lens.map(|(len, drafts)| drafts.then_some(len)).collect())
    }

    /// The choice of the most tokens a second, outcomes known: only drafts that will be accepted, made for the requests
    /// that have the most of them, if any pay.
    fn oracle(&self, rounds: &[&RecordedRound], context_tokens: usize) -> Vec<Option<usize>> {
        let num_reqs = rounds.len();
        let accepted = |r: usize| rounds[r].num_accepted.min(self.draft_len);
        let mut order: Vec<usize> = (0..num_reqs).collect();
        order.sort_by_key(|&r| std::cmp::Reverse(accepted(r)));
        let rate = |num_drafted: usize, num_drafts: usize| {
            let shape = StepShape {
                num_drafted,
                num_tokens: num_reqs + num_drafts,
                context_tokens,
                drafted_context_tokens: context_tokens * num_drafted / num_reqs,
            };
            (num_reqs + num_drafts) as f64 / self.cost.seconds(shape)
        };
        let (mut best, mut best_rate, mut num_drafts) = ((0, 0), rate(0, 0), 0);
        for (i, &r) in order.iter().enumerate() {
            num_drafts += accepted(r);
            if rate(i + 1, num_drafts) > best_rate {
                (best, best_rate) = ((i + 1, num_drafts), rate(i + 1, num_drafts));
            }
        }
        // A row may cost more than its token is worth.
        let (num_drafted, most) = best;
        let better = |&a: &usize, &b: &usize| rate(num_drafted, a).total_cmp(&rate(num_drafted, b));
        let mut left = (0..=most).max_by(better).unwrap_or(0);
        let mut choice = vec![None; num_reqs];
        for &r in &order[..num_drafted] {
            let len = accepted(r).min(left);
            left -= len;
            choice[r] = Some(len);
        }
        choice
    }
}
