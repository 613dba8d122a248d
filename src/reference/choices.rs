//! Where the reference takes its random decisions from.
//!
//! [`Philox`] draws them as the CUDA kernels do. [`Enumerator`] takes every branch in turn and keeps its probability,
//! so that a test can compute the exact law of anything that runs on a reference with it: see [`enumerate`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::philox::{STRIP, ZONE, Zone, key, philox4x32, uniform, wide_uniform};
use crate::ops::Purpose;

/// Names one random decision. No two decisions of a request share all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Seed of the request.
    pub seed: u64,
    /// Position of the token that is decided.
    pub position: u32,
    /// What the draw is for.
    pub purpose: Purpose,
    /// Which of several decisions at that position (siblings of a tree, tries of a draw); else 0.
    pub ordinal: u32,
}

/// A source of random decisions.
pub trait Choices: Send {
    /// An index with probability proportional to `weights` (finite, >= 0, not all 0), by noise for each index: what drafts
    /// and the coupled rule share.
    fn categorical(&mut self, draw: Draw, weights: &[f64]) -> usize;

    /// The same law, for draws that share their noise with nobody.
    fn sample(&mut self, draw: Draw, weights: &[f64]) -> usize {
        self.categorical(draw, weights)
    }

    /// An index with probability proportional to `rest`, which is nowhere above `target`; to `target` when nothing is
    /// left. `tries` says how, not with which law.
    fn residual(&mut self, draw: Draw, _tries: u32, target: &[f64], rest: &[f64]) -> usize {
        self.sample(draw, what_is_left(target, rest))
    }

    /// Whether to accept a draft of probability `draft_prob` where the target has `target_prob`: true with probability
    /// `min(1, target_prob / draft_prob)`; where `draft_prob` is 0, whether `target_prob` is not.
    fn accept(&mut self, draw: Draw, target_prob: f64, draft_prob: f64) -> bool;
}

/// `rest`, or `target` where rounding has left nothing of it.
fn what_is_left<'w>(target: &'w [f64], rest: &'w [f64]) -> &'w [f64] {
    if rest.iter().any(|&weight| weight > 0.0) {
        rest
    } else {
        target
    }
}

/// Tries of a residual before it is drawn from its own weights.
pub const TRIES: u32 = 64;
/// The same where the draft law is low-rank, whose weights cost a pass over W2.
pub const TRIES_LOW_RANK: u32 = 1024;

/// A draw from `rest` by thinning draws from `target`: a draw v is kept with probability `rest[v] / target[v]`, and what is
/// kept has the law of `rest`. After `tries` that were not kept the draw is made from `rest` itself, so that the law is
/// exact for any number of tries.
fn thinned(
    choices: &mut (impl Choices + ?Sized),
    tries: u32,
    draw: Draw,
    target: &[f64],
    rest: &[f64],
) -> usize {
    for ordinal in 0..tries {
        let draw = Draw { ordinal, ..draw };
        let v = choices.sample(draw, target);
        if choices.accept(draw, rest[v], target[v]) {
            return v;
        }
    }
    let draw = Draw {
        ordinal: tries,
        ..draw
    };
    choices.sample(draw, what_is_left(target, rest))
}

/// The decisions of `dspark_accept` and of coupled drafts (cuda/include/dspark.h): Philox4x32-10 with the seed as key.
/// Draws that share noise race with that of [`Zone`]; others invert the distribution function, of strips of [`STRIP`]
/// tokens and then of the tokens in one, with the counter `(ordinal, position, purpose, 2)`; decisions take the first word of `(ordinal,
/// position, purpose, 0)`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Philox;

/// The first index at which the running sum of `weights` passes `fraction` of their sum.
fn invert(weights: &[f64], fraction: f64) -> usize {
    let target = fraction * weights.iter().sum::<f64>();
    let (mut running, mut last) = (0.0, 0);
    for (index, &weight) in weights.iter().enumerate().filter(|&(_, &w)| w > 0.0) {
        running += weight;
        last = index;
        if running > target {
            break;
        }
    }
    last
}

impl Choices for Philox {
    /// An exponential race: the smallest of `E_v / weights[v]` wins; zones that cannot win are passed over.
    fn categorical(&mut self, draw: Draw, weights: &[f64]) -> usize {
        let (mut winner, mut best) = (0, f64::INFINITY);
        for (index, weights) in weights.chunks(ZONE).enumerate() {
            let zone = Zone::new(draw.seed, draw.position, draw.purpose as u32, index);
            let lost = |weights: &[f64], best: f64| {
                weights.iter().all(|&w| w <= 0.0 || zone.least >= best * w)
            };
            if lost(weights, best) {
                continue;
            }
            for (quad, weights) in weights.chunks(4).enumerate() {
                if lost(weights, best) {
                    continue;
                }
                for (lane, (&weight, e)) in weights.iter().zip(zone.quad(quad)).enumerate() {
                    let arrival = e / weight;
                    if weight > 0.0 && arrival < best {
                        (winner, best) = (index * ZONE + 4 * quad + lane, arrival);
                    }
                }
            }
        }
        winner
    }

    fn sample(&mut self, draw: Draw, weights: &[f64]) -> usize {
        let counter = [draw.ordinal, draw.position, draw.purpose as u32, 2];
        let [strip_high, strip_low, token_high, token_low] = philox4x32(key(draw.seed), counter);
        let strips = weights.chunks(STRIP);
        let masses: Vec<f64> = strips.map(|strip| strip.iter().sum()).collect();
        let first = invert(&masses, wide_uniform(strip_high, strip_low)) * STRIP;
        let strip = &weights[first..weights.len().min(first + STRIP)];
        first + invert(strip, wide_uniform(token_high, token_low))
    }

    fn residual(&mut self, draw: Draw, tries: u32, target: &[f64], rest: &[f64]) -> usize {
        thinned(self, tries, draw, target, rest)
    }

    fn accept(&mut self, draw: Draw, target_prob: f64, draft_prob: f64) -> bool {
        let counter = [draw.ordinal, draw.position, draw.purpose as u32, 0];
        uniform(philox4x32(key(draw.seed), counter)[0]) * draft_prob < target_prob
    }
}

/// Takes every branch of a program's random decisions, depth first, one branch a run. Clones share their state.
#[derive(Clone, Debug, Default)]
pub struct Enumerator {
    path: Arc<Mutex<Path>>,
}

/// The branch of the current run.
#[derive(Debug, Default)]
struct Path {
    decisions: Vec<Decision>,
    /// Decisions made so far in this run.
    made: usize,
}

/// A decision and the outcome taken.
#[derive(Debug)]
struct Decision {
    probabilities: Vec<f64>,
    outcome: usize,
}

impl Decision {
    /// The first possible outcome at or after `from`.
    fn possible(&self, from: usize) -> Option<usize> {
        (from..self.probabilities.len()).find(|&i| self.probabilities[i] > 0.0)
    }
}

impl Enumerator {
    fn path(&self) -> MutexGuard<'_, Path> {
        self.path.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The outcome of the next decision of this run.
    fn decide(&self, probabilities: Vec<f64>) -> usize {
        let mut path = self.path();
        let made = path.made;
        path.made += 1;
        if let Some(decision) = path.decisions.get(made) {
            assert_eq!(
                decision.probabilities, probabilities,
                "an enumerated program must be a function of its decisions"
            );
            return decision.outcome;
        }
        let mut decision = Decision {
            probabilities,
            outcome: 0,
        };
        decision.outcome = decision.possible(0).expect("a decision with an outcome");
        path.decisions.push(decision);
        path.decisions[made].outcome
    }

    /// Goes to the next branch; false when there is none.
    fn advance(&self) -> bool {
        let mut path = self.path();
        path.made = 0;
        while let Some(mut decision) = path.decisions.pop() {
            if let Some(outcome) = decision.possible(decision.outcome + 1) {
                decision.outcome = outcome;
                path.decisions.push(decision);
                return true;
            }
        }
        false
    }

    /// Probability of the current branch.
    fn probability(&self) -> f64 {
        let path = self.path();
        path.decisions
            .iter()
            .map(|decision| decision.probabilities[decision.outcome])
            .product()
    }
}

impl Choices for Enumerator {
    fn categorical(&mut self, _: Draw, weights: &[f64]) -> usize {
        let total: f64 = weights.iter().sum();
        self.decide(weights.iter().map(|weight| weight / total).collect())
    }

    fn accept(&mut self, _: Draw, target_prob: f64, draft_prob: f64) -> bool {
        let accept = if target_prob >= draft_prob {
            f64::from(target_prob > 0.0)
        } else {
            target_prob / draft_prob
        };
        self.decide(vec![1.0 - accept, accept]) == 1
    }
}

/// Runs `program` once for every branch of its random decisions and returns all outcomes with their probabilities, which
/// sum to 1. The program must take all randomness from the enumerator it is given (a clone of it in
/// `Reference::with_choices`) and start from the same state each time.
pub fn enumerate<T>(mut program: impl FnMut(&Enumerator) -> T) -> Vec<(f64, T)> {
    let choices = Enumerator::default();
    let mut outcomes = Vec::new();
    loop {
        let outcome = program(&choices);
        outcomes.push((choices.probability(), outcome));
        if !choices.advance() {
            return outcomes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::philox::token_exponential;

    fn draw(position: u32, purpose: Purpose) -> Draw {
        Draw {
            seed: 0x1234_5678_9abc_def0,
            position,
            purpose,
            ordinal: 0,
        }
    }

    /// The race without shortcuts.
    fn plain_race(draw: Draw, weights: &[f64]) -> usize {
        let mut best = (f64::INFINITY, 0);
        for (v, &weight) in weights.iter().enumerate() {
            let (position, purpose) = (draw.position, draw.purpose as u32);
            let arrival = token_exponential(draw.seed, position, purpose, v) / weight;
            if arrival < best.0 {
                best = (arrival, v);
            }
        }
        best.1
    }

    #[test]
    fn the_race_with_shortcuts_is_the_race() {
        for position in 0..300 {
            let draw = draw(position, Purpose::Draft);
            let n = 1 + (position as usize * 137) % 5001;
            let steep = f64::from(position % 7);
            let weights: Vec<f64> = (0..n)
                .map(|v| {
                    let noise = uniform(philox4x32([7, position], [v as u32, 0, 0, 0])[0]);
                    (-steep * 20.0 * noise).exp() * f64::from(u8::from(v % 5 != 1))
                })
                .collect();
            assert_eq!(
                Philox.categorical(draw, &weights),
                plain_race(draw, &weights)
            );
        }
    }

    /// 40000 draws against the weights: chi-square with 3 degrees of freedom, false alarm about 1e-9 at 44.
    #[test]
    fn the_race_has_the_law_of_its_weights() {
        let weights = [0.1, 0.0, 2.4, 0.5, 1.0];
        let statistic = |expected: &[f64; 5]| {
            let n = 40_000;
            let mut counts = [0.0; 5];
            for position in 0..n {
                counts[Philox.categorical(draw(position, Purpose::Bonus), &weights)] += 1.0;
            }
            assert_eq!(counts[1], 0.0);
            [0, 2, 3, 4]
                .map(|v| {
                    let mean = f64::from(n) * expected[v] / 4.0;
                    (counts[v] - mean).powi(2) / mean
                })
                .iter()
                .sum::<f64>()
        };
        assert!(statistic(&weights) < 44.0);
        assert!(statistic(&[0.2, 0.0, 2.3, 0.5, 1.0]) > 44.0);
    }

    /// Laws of four tokens in two strips: ordinary, with zeros, with nothing left, and with nearly nothing left.
    fn residuals() -> Vec<(Vec<f64>, Vec<f64>)> {
        let apart = |law: [f64; 4]| {
            let mut weights = vec![0.0; STRIP + 2];
            for (weight, at) in law.into_iter().zip([0, 3, STRIP, STRIP + 1]) {
                weights[at] = weight;
            }
            weights
        };
        [
            ([0.4, 0.1, 0.2, 0.3], [0.1, 0.0, 0.2, 0.05]),
            ([0.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.0, 0.0]),
            ([0.25; 4], [0.0; 4]),
            ([0.7, 0.1, 0.1, 0.1], [2e-12, 0.0, 1e-12, 0.0]),
        ]
        .map(|(target, rest)| (apart(target), apart(rest)))
        .to_vec()
    }

    #[test]
    fn thinning_has_the_law_of_the_rest_for_any_number_of_tries() {
        for (target, rest) in residuals() {
            let left = what_is_left(&target, &rest);
            let mass: f64 = left.iter().sum();
            for tries in 0..4 {
                let mut law = vec![0.0; target.len()];
                for (probability, v) in enumerate(|choices| {
                    let mut choices = choices.clone();
                    thinned(
                        &mut choices,
                        tries,
                        draw(0, Purpose::Residual),
                        &target,
                        &rest,
                    )
                }) {
                    law[v] += probability;
                }
                for (v, (&got, &weight)) in law.iter().zip(left).enumerate() {
                    let want = weight / mass;
                    assert!(
                        (got - want).abs() < 1e-12,
                        "{tries} tries, {v}: {got} {want}"
                    );
                }
            }
        }
    }

    /// Tries that look at the draft's probability alone keep too much where it is small against the target's.
    #[test]
    fn thinning_by_the_wrong_ratio_is_another_law() {
        let (target, rest) = residuals().swap_remove(0);
        let wrong: Vec<f64> = rest.iter().map(|&w| f64::from(u8::from(w > 0.0))).collect();
        let mut law = vec![0.0; target.len()];
        for (probability, v) in enumerate(|choices| {
            thinned(
                &mut choices.clone(),
                2,
                draw(0, Purpose::Residual),
                &target,
                &wrong,
            )
        }) {
            law[v] += probability;
        }
        let mass: f64 = rest.iter().sum();
        assert!((law[0] - rest[0] / mass).abs() > 1e-2);
    }

    /// 40000 draws each against the weights: chi-square with at most 3 degrees of freedom, false alarm about 1e-9 at 44.
    #[test]
    fn inversion_and_thinning_have_the_law_of_their_weights() {
        let statistic = |draw_one: &dyn Fn(u32) -> usize, weights: &[f64]| {
            let n = 40_000;
            let mut counts = vec![0.0; weights.len()];
            for position in 0..n {
                counts[draw_one(position)] += 1.0;
            }
            let mass: f64 = weights.iter().sum();
            let cells = counts.iter().zip(weights);
            cells
                .map(|(&count, &weight)| {
                    let mean = f64::from(n) * weight / mass;
                    if mean > 0.0 {
                        (count - mean).powi(2) / mean
                    } else {
                        count * 1e9
                    }
                })
                .sum::<f64>()
        };
        for (target, rest) in residuals() {
            let draw = |position| draw(position, Purpose::Residual);
            let inverted = |position| Philox.sample(draw(position), &target);
            assert!(statistic(&inverted, &target) < 44.0);
            let thinned = |position| Philox.residual(draw(position), TRIES, &target, &rest);
            let left = what_is_left(&target, &rest);
            assert!(statistic(&thinned, left) < 44.0);
        }
        let (target, rest) = residuals().swap_remove(0);
        let inverted = |position| Philox.sample(draw(position, Purpose::Bonus), &target);
        assert!(statistic(&inverted, &rest) > 44.0);
    }

    /// Noise that shares its zone's minimum is exponential of rate 1 and independent: first and second moments, within
    /// a zone and of its minimum.
    #[test]
    fn the_noise_of_a_zone_is_independent_exponentials() {
        let (n, tokens) = (20_000, [0, 1, 40, 63, 64]);
        let (mut sums, mut products, mut least) = ([0.0; 5], [[0.0; 5]; 5], 0.0);
        for position in 0..n {
            let e = tokens.map(|v| token_exponential(9, position, 3, v));
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum += e[i];
                for (product, other) in products[i].iter_mut().zip(e) {
                    *product += e[i] * other;
                }
            }
            least += Zone::new(9, position, 3, 0).least * ZONE as f64;
        }
        let n = f64::from(n);
        assert!((least / n - 1.0).abs() < 6.0 / n.sqrt());
        for (i, products) in products.iter().enumerate() {
            assert!((sums[i] / n - 1.0).abs() < 6.0 / n.sqrt(), "mean of {i}");
            for (j, product) in products.iter().enumerate() {
                let (moment, variance): (f64, f64) = if i == j { (2.0, 20.0) } else { (1.0, 3.0) };
                let off = (product / n - moment).abs();
                assert!(off < 6.0 * (variance / n).sqrt(), "{i} {j}: {off}");
            }
        }
    }

    #[test]
    fn acceptance_compares_the_uniform() {
        let d = draw(3, Purpose::Accept);
        let counter = [0, 3, Purpose::Accept as u32, 0];
        let u = uniform(philox4x32(key(d.seed), counter)[0]);
        assert!(Philox.accept(d, u * 0.5 * 1.000_001, 0.5));
        assert!(!Philox.accept(d, u * 0.5 * 0.999_999, 0.5));
        assert!(Philox.accept(d, 0.1, 0.0));
        assert!(!Philox.accept(d, 0.0, 0.0));
        assert!(Philox.accept(d, 1.0, 1.0));
    }

    #[test]
    fn enumeration_covers_every_branch_once() {
        let outcomes = enumerate(|choices| {
            let mut choices = choices.clone();
            let first = choices.categorical(draw(0, Purpose::Draft), &[1.0, 0.0, 3.0]);
            if first == 0 {
                return (first, None);
            }
            (
                first,
                Some(choices.accept(draw(0, Purpose::Accept), 0.2, 0.8)),
            )
        });
        assert_eq!(
            outcomes,
            [
                (0.25, (0, None)),
                (0.75 * 0.75, (2, Some(false))),
                (0.75 * 0.25, (2, Some(true))),
            ]
        );
    }
}
