//! Whether drafting pays at all.
//!
//! Drafting costs time before any confidence is known, so that it is decided from the past: every request keeps a
//! running mean of its survivals (half predicted, half what came true), and the step is planned on these means with and
//! without the draft. Where drafting does not promise 1 % more, the step drafts nothing; from time to time it drafts all
//! the same, to see whether the text has changed. Probes come so seldom that they cost about half a percent, and ever
//! more seldom while they find nothing.

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

/// The share of time that probing may take.
const PROBE_SHARE: f64 = 0.005;

/// Fewest steps between probes, and how often the distance may double.
const PROBE_STEPS: u32 = 16;
const MOST_DOUBLINGS: u32 = 4;

/// Mean survivals of one request.
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

/// The past of every slot.
#[derive(Clone, Debug)]
pub(super) struct Bypass {
    draft_len: usize,
    slots: Vec<Option<Means>>,
    pooled: Means,
    /// Steps without drafts since the last one with them.
    idle_steps: u32,
    /// Probes in a row that found nothing.
    failures: u32,
}

impl Bypass {
    pub(super) fn new(draft_len: usize) -> Self {
        let hope = (1..=draft_len as i32).map(|k| HOPE.powi(k)).collect();
        Self {
            draft_len,
            slots: Vec::new(),
            pooled: Means {
                survival: hope,
                rounds: PRIOR_ROUNDS,
            },
            idle_steps: 0,
            failures: 0,
        }
    }

    pub(super) fn draft_len(&self) -> usize {
        self.draft_len
    }

    /// Forgets the request that had the slot.
    pub(super) fn forget(&mut self, slot: usize) {
        if let Some(means) = self.slots.get_mut(slot) {
            *means = None;
        }
    }

    /// Whether the step should draft. Says so once a step.
    pub(super) fn drafts(
        &mut self,
        slots: &[usize],
        context_tokens: usize,
        cost: &StepCost,
    ) -> bool {
        let (pays, extra) = self.outlook(slots, context_tokens, cost);
        let distance = (extra / PROBE_SHARE) as u32;
        let distance = distance.max(PROBE_STEPS) << self.failures;
        if pays {
            self.failures = 0;
        } else if self.idle_steps < distance {
            self.idle_steps += 1;
            return false;
        } else {
            self.failures = (self.failures + 1).min(MOST_DOUBLINGS);
        }
        self.idle_steps = 0;
        true
    }

    /// Whether drafting promises 1 % more tokens a second, and the share of a plain step that the draft takes.
    fn outlook(&self, slots: &[usize], context_tokens: usize, cost: &StepCost) -> (bool, f64) {
        let num_reqs = slots.len();
        let means = |slot: usize| match self.slots.get(slot) {
            Some(Some(means)) => &means.survival,
            _ => &self.pooled.survival,
        };
        let survival: Vec<f32> = slots.iter().flat_map(|&s| means(s)).copied().collect();
        let ranking = Ranking::new(&survival, self.draft_len, &vec![self.draft_len; num_reqs]);
        let seconds = |num_drafted: usize, num_drafts: usize| {
            cost.seconds(StepShape {
                num_drafted,
                num_tokens: num_reqs + num_drafts,
                context_tokens,
            })
        };
        let ticks = Ticks::new(ranking.len(), |n| seconds(num_reqs, n));
        let best = ranking.best(&ticks);
        let plain = seconds(0, 0);
        let with = ranking.expected_tokens(best) / seconds(num_reqs, best);
        let without = num_reqs as f64 / plain;
        let pays = with > without * (1.0 + 1.0 / GUARD as f64);
        (pays, seconds(num_reqs, 0) / plain - 1.0)
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
        let rejected = num_accepted < verify_len;
        let sample: Vec<f32> = survival
            .iter()
            .enumerate()
            .map(|(k, &a)| {
                let came_true = f32::from(u8::from(k < num_accepted));
                if k < verify_len || rejected {
                    f32::midpoint(a, came_true)
                } else {
                    a
                }
            })
            .collect();
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, None);
        }
        let means = self.slots[slot].get_or_insert_with(|| Means {
            survival: self.pooled.survival.clone(),
            rounds: PRIOR_ROUNDS,
        });
        means.add(&sample, MEMORY);
        self.pooled.add(&sample, POOLED_MEMORY);
    }
}
