//! The order in which drafts are admitted, and how many of them pay. All of it is integer arithmetic, so that any
//! machine, in any order of summation, comes to the same decision.
//!
//! Survivals are counted in units of 1 / 65535 and step costs in ticks of at most 2^30 ([`Ticks`]); throughputs
//! `tau / ticks` are compared by cross-multiplying. Drafts are ranked by survival, largest first, ties by request, then
//! position: nothing but survivals and places enters. Survivals do not rise along a request, so the first n of the
//! ranking are prefixes.

use super::survival::{calibrate, survival};
use crate::error::{Error, Result};
use crate::ops::{ScheduleInputs, ScheduleRule, Scheduled};

/// A survival of 1: what 16 bits hold, so that a device can sort by them.
const ONE: u32 = 65_535;

/// The largest tick count.
const MAX_TICKS: f64 = (1_u32 << 30) as f64;

/// A gain below one part in this many is none: the cost of a step is not known better than that.
pub const GUARD: u64 = 100;

/// Costs of the step with 0, 1, 2, … admitted drafts, scaled to integers; never 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticks(Vec<u32>);

impl Ticks {
    /// From `seconds(n)`, finite and > 0, of a step with `n` drafts, for n up to `max_drafts`. More drafts never count
    /// as cheaper than fewer.
    pub fn new(max_drafts: usize, seconds: impl Fn(usize) -> f64) -> Self {
        let mut floor = 0.0_f64;
        let costs: Vec<f64> = (0..=max_drafts)
            .map(|n| {
                floor = floor.max(seconds(n));
                floor
            })
            .collect();
        let ticks = |cost: f64| ((cost / floor * MAX_TICKS).round() as u32).max(1);
        Self(costs.into_iter().map(ticks).collect())
    }

    /// Counts that were made before.
    fn from_slice(ticks: &[u32]) -> Self {
        Self(ticks.to_vec())
    }

    /// `[max_drafts + 1]`, as `dspark_schedule` of the C ABI takes them.
    pub fn as_slice(&self) -> &[u32] {
        &self.0
    }

    fn at(&self, num_drafts: usize) -> u128 {
        u128::from(self.0[num_drafts])
    }

    /// The most drafts that cost no more than `num_drafts`: the rest of a graph bucket.
    fn fill(&self, num_drafts: usize) -> usize {
        let costs = &self.0[num_drafts..];
        num_drafts + costs.iter().take_while(|&&c| c == costs[0]).count() - 1
    }
}

/// All drafts that could be verified, best first.
#[derive(Clone, Debug)]
pub struct Ranking {
    /// `(ONE - survival) << 32 | request * draft_len + position`, ascending.
    keys: Vec<u64>,
    num_reqs: usize,
    draft_len: usize,
}

impl Ranking {
    /// Ranks `survival [num_reqs, draft_len]`, non-rising along each request, below `limits [num_reqs]`. Survivals that
    /// round to 0 are left out.
    pub fn new(survival: &[f32], draft_len: usize, limits: &[usize]) -> Self {
        let mut keys = Vec::with_capacity(survival.len());
        for ((r, row), &limit) in survival.chunks(draft_len.max(1)).enumerate().zip(limits) {
            for (j, &a) in row.iter().take(limit).enumerate() {
                let units = (a * ONE as f32).round_ties_even() as u32;
                if units > 0 {
                    let index = (r * draft_len + j) as u64;
                    keys.push(u64::from(ONE - units.min(ONE)) << 32 | index);
                }
            }
        }
        keys.sort_unstable();
        Self {
            keys,
            num_reqs: limits.len(),
            draft_len,
        }
    }

    /// Drafts ranked.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there is nothing to verify.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    fn gain(&self, rank: usize) -> u128 {
        u128::from(ONE) - u128::from(self.keys[rank] >> 32)
    }

    /// Committed tokens to expect with nothing verified, in survival units.
    fn base(&self) -> u128 {
        self.num_reqs as u128 * u128::from(ONE)
    }

    /// Committed tokens to expect from the step with the first `num_drafts` of the ranking.
    pub fn expected_tokens(&self, num_drafts: usize) -> f64 {
        let tau = self.base() + (0..num_drafts).map(|i| self.gain(i)).sum::<u128>();
        tau as f64 / f64::from(ONE)
    }

    /// `verify_len` of each request when the first `num_drafts` of the ranking are admitted.
    pub fn verify_lens(&self, num_drafts: usize) -> Vec<usize> {
        let mut verify_lens = vec![0; self.num_reqs];
        for key in &self.keys[..num_drafts.min(self.keys.len())] {
            verify_lens[(key & 0xffff_ffff) as usize / self.draft_len] += 1;
        }
        verify_lens
    }

    /// Algorithm 1 of the paper: admits drafts in order while `tau / ticks` rises by at least a guard, 1 % of one
    /// request's share, and stops at the first that does not raise it that much, even if a later one would; then, unless
    /// nothing was admitted, fills the graph bucket it has come to.
    ///
    /// Stopping there is what keeps the step lossless: whether the draft of rank n is admitted follows from the
    /// survivals of ranks up to n alone, and those were computed from nothing that comes after it in its own request.
    pub fn first_fall(&self, ticks: &Ticks) -> usize {
        let mut tau = self.base();
        let mut admitted = 0;
        while admitted < self.len() {
            let next = tau + self.gain(admitted);
            let guarded = tau + tau / (u128::from(GUARD) * self.num_reqs as u128);
            if next * ticks.at(admitted) <= guarded * ticks.at(admitted + 1) {
                break;
            }
            tau = next;
            admitted += 1;
        }
        match admitted {
            0 => 0,
            _ => ticks.fill(admitted).min(self.len()),
        }
    }

    /// The number of drafts of the highest `tau / ticks` of all, the smallest of equals; 0 unless that is 1 % above
    /// verifying nothing. It may look at every confidence of the step, so that using it in the same step is a peek.
    pub fn best(&self, ticks: &Ticks) -> usize {
        let mut tau = self.base();
        let (mut best_tau, mut best) = (tau, 0);
        for rank in 0..self.len() {
            tau += self.gain(rank);
            if tau * ticks.at(best) > best_tau * ticks.at(rank + 1) {
                (best_tau, best) = (tau, rank + 1);
            }
        }
        let guarded = self.base() + self.base() / u128::from(GUARD);
        if best_tau * ticks.at(0) > guarded * ticks.at(best) {
            best
        } else {
            0
        }
    }

    /// `capacity` drafts made for `capacity_reqs` requests, scaled to the requests of this step and to the end of the
    /// graph bucket they reach.
    pub fn scaled_capacity(&self, capacity: usize, capacity_reqs: usize, ticks: &Ticks) -> usize {
        if capacity == 0 || self.is_empty() {
            return 0;
        }
        let scaled = (capacity * self.num_reqs + capacity_reqs / 2) / capacity_reqs.max(1);
        ticks.fill(scaled.min(self.len())).min(self.len())
    }
}

/// What `inputs` come to.
///
/// # Errors
/// Lengths that do not fit; fewer temperatures than positions.
pub fn decide(inputs: &ScheduleInputs<'_>) -> Result<Scheduled> {
    let num_reqs = inputs.limits.len();
    let draft_len = inputs.confidence.len().checked_div(num_reqs).unwrap_or(0);
    for (field, expected, found) in [
        ("confidence", num_reqs * draft_len, inputs.confidence.len()),
        ("ticks", num_reqs * draft_len + 1, inputs.ticks.len()),
    ] {
        if expected != found {
            return Err(Error::argument(field, expected.to_string(), found));
        }
    }
    let calibrated = calibrate(inputs.confidence, draft_len, inputs.temperature)?;
    let ranking = Ranking::new(&survival(&calibrated, draft_len), draft_len, inputs.limits);
    let ticks = Ticks::from_slice(inputs.ticks);
    let best = ranking.best(&ticks);
    let num_drafts = match inputs.rule {
        ScheduleRule::FirstFall => ranking.first_fall(&ticks),
        ScheduleRule::Best => best,
        ScheduleRule::Capacity(drafts, reqs) => ranking.scaled_capacity(drafts, reqs, &ticks),
    };
    Ok(Scheduled {
        verify_lens: ranking.verify_lens(num_drafts),
        best,
    })
}
