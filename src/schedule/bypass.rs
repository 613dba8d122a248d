//! Which requests drafting pays for.
//!
//! Drafting costs time before any confidence is known, so that it is decided from the past: every request keeps a
//! running mean of its survivals (half predicted, half what came true; predictions count for less where fewer than half
//! of them come true), and the step is planned on these means: with a draft for all requests, for those alone that are worth their
//! share of the draft, and for none. Where drafting does not promise 1 % more, the step drafts nothing. From time to time
//! the others draft all the same, to see whether their text has changed. Probes come so seldom that they cost about half a
//! percent, and ever more seldom while they find nothing. As long as nothing at all is known, a few requests try.

use super::cost::{StepCost, StepShape};
use super::rank::{GUARD, Ranking, Ticks};

/// Rounds that a request's mean reaches back.
const MEMORY: f32 = 16.0;

/// Rounds that a new request is believed to have had, like the mean of all before it.
const PRIOR_ROUNDS: f32 = 4.0;

/// Rounds that the mean of all requests reaches back.
const POOLED_MEMORY: f32 = 256.0;

/// Survival from one position to the next before anything was seen: hopeful, so that drafting is tried.
const HOPE: f32 = 0.8;

/// Rounds that this hope weighs for each request there is, fewest and most: a step that drafts costs about as much for one
/// as for many, and of one request a step tells a single round.
const HOPE_ROUNDS_PER_REQUEST: f32 = 1.0 / 16.0;
const HOPE_ROUNDS: (f32, f32) = (0.5, 4.0);

/// Rounds that the trust in a request's predictions reaches back.
const TRUST_MEMORY: f32 = 64.0;

/// Predicted tokens that are believed to have come true as often as everyone's, before a request's own count; everyone's
/// first are believed to.
const TRUST_PRIOR: f32 = 2.0;
const POOLED_TRUST_PRIOR: f32 = 2.0;

/// Requests that draft in a step while fewer rounds than [`FIRST_ROUNDS`] have been seen of all.
const SCOUTS: usize = 8;
const FIRST_ROUNDS: f32 = 16.0;

/// Steps that a plan is kept for while the requests are the same: once the mean of all has its whole memory, and while no
/// round is drafted, so that only the context grows.
const PLAN_STEPS: u32 = 4;
const IDLE_PLAN_STEPS: u32 = 16;

/// The share of time that probing may take, with requests of which fewer than [`KNOWN_ROUNDS`] rounds were seen and without.
const NEW_SHARE: f64 = 0.005;
const PROBE_SHARE: f64 = 0.003;
const KNOWN_ROUNDS: f32 = 3.0;

/// Fewest and most steps between probes, and how often the distance may double.
const PROBE_STEPS: u32 = 16;
const MOST_PROBE_STEPS: u32 = 1 << 20;
const MOST_DOUBLINGS: u32 = 4;

/// Mean survivals.
#[derive(Clone, Debug)]
struct Means {
    survival: Vec<f32>,
    rounds: f32,
}

impl Means {
    fn add(&mut self, sample: &[f32], memory: f32) {
        self.rounds = (self.rounds + 1.0).min(memory);
        for (mean, x) in self.survival.iter_mut().zip(sample) {
            *mean += (x - *mean) / self.rounds;
        }
    }
}

/// How predictions came true, in tokens; the past fades.
#[derive(Clone, Copy, Debug, Default)]
struct Trust {
    predicted: f32,
    came_true: f32,
}

impl Trust {
    fn add(&mut self, predicted: f32, came_true: f32, memory: f32) {
        let keep = 1.0 - 1.0 / memory;
        self.predicted = self.predicted * keep + predicted;
        self.came_true = self.came_true * keep + came_true;
    }

    /// Tokens that come true for each predicted one, on top of `predicted` ones of which `share` did.
    fn factor(self, predicted: f32, share: f32) -> f32 {
        (self.came_true + predicted * share) / (self.predicted + predicted)
    }
}

/// One request.
#[derive(Clone, Debug, Default)]
struct Slot {
    /// `None` before its first round.
    means: Option<Means>,
    trust: Trust,
    probing: Probing,
}

/// Of a request that drafting does not pay for.
#[derive(Clone, Copy, Debug, Default)]
struct Probing {
    /// Steps since the last draft.
    idle_steps: u32,
    /// Probes in a row that found nothing.
    failures: u32,
}

impl Slot {
    /// Whether its mean is mostly that of others.
    fn is_unknown(&self) -> bool {
        let rounds = self.means.as_ref().map_or(0.0, |means| means.rounds);
        rounds < PRIOR_ROUNDS + KNOWN_ROUNDS
    }
}

/// A set of requests to draft for, and what that promises.
#[derive(Clone, Debug)]
struct Choice {
    drafts: Vec<bool>,
    /// Expected tokens a second.
    rate: f64,
    /// Seconds of the step with the best number of drafts.
    seconds: f64,
    num_drafts: usize,
}

/// What was planned, before probes.
#[derive(Clone, Debug)]
struct Plan {
    slots: Vec<usize>,
    drafts: Vec<bool>,
    age: u32,
    /// Whether something was learnt since.
    is_dated: bool,
}

/// The past of every slot.
#[derive(Clone, Debug)]
pub(super) struct Bypass {
    draft_len: usize,
    /// Rounds that the hope weighed in the mean of all.
    hope_rounds: f32,
    slots: Vec<Slot>,
    pooled: Means,
    pooled_trust: Trust,
    plan: Option<Plan>,
    steps_since_probe: u32,
}

impl Bypass {
    /// For a first step of `num_reqs` requests.
    pub(super) fn new(draft_len: usize, num_reqs: usize) -> Self {
        let (fewest, most) = HOPE_ROUNDS;
        let hope_rounds = (num_reqs as f32 * HOPE_ROUNDS_PER_REQUEST).clamp(fewest, most);
        Self {
            draft_len,
            hope_rounds,
            slots: Vec::new(),
            pooled: Means {
                survival: hope(draft_len).collect(),
                rounds: hope_rounds,
            },
            pooled_trust: Trust::default(),
            plan: None,
            steps_since_probe: 0,
        }
    }

    pub(super) fn draft_len(&self) -> usize {
        self.draft_len
    }

    /// Forgets the request that had the slot.
    pub(super) fn forget(&mut self, slot: usize) {
        if let Some(slot) = self.slots.get_mut(slot) {
            *slot = Slot::default();
        }
        self.plan = None;
    }

    fn means(&self, slot: usize) -> &[f32] {
        match self.slots.get(slot) {
            Some(Slot {
                means: Some(means), ..
            }) => &means.survival,
            _ => &self.pooled.survival,
        }
    }

    fn slot_mut(&mut self, slot: usize) -> &mut Slot {
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, Slot::default());
        }
        &mut self.slots[slot]
    }

    /// Which requests the step should draft for. Says so once a step.
    pub(super) fn drafts(
        &mut self,
        slots: &[usize],
        context_tokens: usize,
        cost: &StepCost,
    ) -> Vec<bool> {
        let mut drafts = match self.plan.take() {
            Some(mut plan) if plan.age < self.plan_steps(&plan) && plan.slots == slots => {
                plan.age += 1;
                self.plan.insert(plan).drafts.clone()
            }
            _ => {
                let drafts = self.planned(slots, context_tokens, cost);
                let plan = Plan {
                    slots: slots.to_vec(),
                    drafts: drafts.clone(),
                    age: 1,
                    is_dated: false,
                };
                self.plan = Some(plan);
                drafts
            }
        };
        self.probe(slots, &mut drafts, &|num_drafted| {
            let shape = shape(slots.len(), num_drafted, context_tokens);
            cost.seconds(shape)
        });
        drafts
    }

    /// How long a plan is kept.
    fn plan_steps(&self, plan: &Plan) -> u32 {
        if !plan.is_dated {
            IDLE_PLAN_STEPS
        } else if self.pooled.rounds < POOLED_MEMORY {
            1
        } else {
            PLAN_STEPS
        }
    }

    /// Which requests the step should draft for, apart from probes.
    fn planned(&self, slots: &[usize], context_tokens: usize, cost: &StepCost) -> Vec<bool> {
        let num_reqs = slots.len();
        let seconds = |num_drafted: usize, num_drafts: usize| {
            let shape = shape(num_reqs, num_drafted, context_tokens);
            cost.seconds_by_rows(shape)(num_reqs + num_drafts)
        };
        let choice = |drafts: Vec<bool>| {
            let num_drafted = drafts.iter().filter(|&&d| d).count();
            let shape = shape(num_reqs, num_drafted, context_tokens);
            let by_rows = cost.seconds_by_rows(shape);
            self.outlook(slots, drafts, &|n| by_rows(num_reqs + n))
        };
        let none = num_reqs as f64 / seconds(0, 0);
        if self.pooled.rounds < self.hope_rounds + FIRST_ROUNDS && num_reqs > SCOUTS {
            return (0..num_reqs).map(|r| r < SCOUTS).collect();
        }
        let all = choice(vec![true; num_reqs]);
        let some = choice(self.worthy(slots, &all, &seconds));
        // The fewer only where it is surely better: a request that drafts is one that is learnt from.
        let guard = 1.0 + 1.0 / GUARD as f64;
        let best = if some.rate > all.rate * guard {
            some
        } else {
            all
        };
        if best.rate <= none * guard {
            return vec![false; num_reqs];
        }
        best.drafts
    }

    /// The best that drafting for these requests promises, where a step with n drafts takes `seconds(n)`.
    fn outlook(
        &self,
        slots: &[usize],
        drafts: Vec<bool>,
        seconds: &dyn Fn(usize) -> f64,
    ) -> Choice {
        let survival: Vec<f32> = slots.iter().flat_map(|&s| self.means(s)).copied().collect();
        let limits = drafts.iter().map(|&d| usize::from(d) * self.draft_len);
        let limits: Vec<usize> = limits.collect();
        let ranking = Ranking::new(&survival, self.draft_len, &limits);
        let ticks = Ticks::new(ranking.len(), seconds);
        let num_drafts = ranking.best(&ticks);
        let seconds = seconds(num_drafts);
        Choice {
            drafts,
            rate: ranking.expected_tokens(num_drafts) / seconds,
            seconds,
            num_drafts,
        }
    }

    /// The requests whose drafts are worth what they cost: the survivals that pay for their rows, against a share of
    /// the draft, both at the rate that drafting for all promises.
    fn worthy(
        &self,
        slots: &[usize],
        all: &Choice,
        seconds: &dyn Fn(usize, usize) -> f64,
    ) -> Vec<bool> {
        let num_reqs = slots.len();
        let half = num_reqs / 2;
        let per_request = (seconds(num_reqs, all.num_drafts) - seconds(half, all.num_drafts))
            / (num_reqs - half) as f64;
        let per_row =
            (seconds(num_reqs, all.num_drafts + num_reqs) - all.seconds) / num_reqs as f64;
        let worth = |slot: &usize| {
            let gains = self.means(*slot).iter().map(|&a| f64::from(a));
            let gain: f64 = gains.map(|a| (a - all.rate * per_row).max(0.0)).sum();
            gain > all.rate * per_request
        };
        slots.iter().map(worth).collect()
    }

    /// Adds requests to be looked at: those that hardly anything is known about, and those that were not drafted for in
    /// a long time. They wait until a probe of all of them takes its share of the steps since the last, and until there
    /// are so many of them that drafting might pay if all were as good as hoped.
    fn probe(&mut self, slots: &[usize], drafts: &mut [bool], seconds: &dyn Fn(usize) -> f64) {
        let num_drafted = drafts.iter().filter(|&&d| d).count();
        let extra =
            |num_probed: usize| seconds(num_drafted + num_probed) / seconds(num_drafted) - 1.0;
        let distance =
            |extra: f64, share: f64| ((extra / share) as u32).clamp(PROBE_STEPS, MOST_PROBE_STEPS);
        let all = distance(extra(slots.len() - num_drafted), PROBE_SHARE);
        let mut due = Vec::new();
        let mut share = PROBE_SHARE;
        for (r, (&slot, &drafts)) in slots.iter().zip(drafts.iter()).enumerate() {
            let slot = self.slot_mut(slot);
            if drafts {
                slot.probing = Probing::default();
                continue;
            }
            slot.probing.idle_steps += 1;
            if slot.is_unknown() {
                share = NEW_SHARE;
                due.push(r);
            } else if slot.probing.idle_steps > all << slot.probing.failures {
                due.push(r);
            }
        }
        self.steps_since_probe += 1;
        let extra = extra(due.len());
        let most_gain: f32 = hope(self.draft_len).sum::<f32>() * due.len() as f32;
        if self.steps_since_probe <= distance(extra, share)
            || f64::from(most_gain) <= extra * slots.len() as f64
        {
            return;
        }
        self.steps_since_probe = 0;
        for r in due {
            drafts[r] = true;
            let probing = &mut self.slot_mut(slots[r]).probing;
            probing.idle_steps = 0;
            probing.failures = (probing.failures + 1).min(MOST_DOUBLINGS);
        }
    }

    /// Takes in a drafted round of a slot: its survivals, and how far it was verified and accepted.
    pub(super) fn add(
        &mut self,
        slot: usize,
        survival: &[f32],
        verify_len: usize,
        num_accepted: usize,
    ) {
        // A draft behind the last verified one is only predicted; behind a rejection it is known to be lost.
        let num_known = if num_accepted < verify_len {
            survival.len()
        } else {
            verify_len.min(survival.len())
        };
        if let Some(plan) = &mut self.plan {
            plan.is_dated = true;
        }
        let predicted = survival[..num_known].iter().sum();
        let came_true = num_accepted as f32;
        self.pooled_trust.add(predicted, came_true, POOLED_MEMORY);
        let pooled_trust = self.pooled_trust.factor(POOLED_TRUST_PRIOR, 1.0);
        let trust = &mut self.slot_mut(slot).trust;
        trust.add(predicted, came_true, TRUST_MEMORY);
        let trust = (2.0 * trust.factor(TRUST_PRIOR, pooled_trust)).min(1.0);
        let sample: Vec<f32> = survival
            .iter()
            .enumerate()
            .map(|(k, &a)| {
                let expected = (a * trust).min(1.0);
                if k < num_known {
                    f32::midpoint(expected, f32::from(u8::from(k < num_accepted)))
                } else {
                    expected
                }
            })
            .collect();
        let prior = Means {
            survival: self.pooled.survival.clone(),
            rounds: self.pooled.rounds.min(PRIOR_ROUNDS),
        };
        let means = self.slot_mut(slot).means.get_or_insert(prior);
        means.add(&sample, MEMORY);
        self.pooled.add(&sample, POOLED_MEMORY);
    }
}

/// Survivals before anything was seen.
fn hope(draft_len: usize) -> impl Iterator<Item = f32> {
    (1..=draft_len as i32).map(|k| HOPE.powi(k))
}

/// A step of `num_reqs` requests without verified drafts that drafts for some.
fn shape(num_reqs: usize, num_drafted: usize, context_tokens: usize) -> StepShape {
    StepShape {
        num_drafted,
        num_tokens: num_reqs,
        context_tokens,
        drafted_context_tokens: context_tokens * num_drafted / num_reqs,
    }
}
