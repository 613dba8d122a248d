//! Accepted lengths of two runs over the same prompts, compared prompt by prompt.

use dspark::engine::RoundStats;
use serde::Serialize;

/// How the accepted length of a run differs from another's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Committed tokens per round of all requests: this run's less the other's.
    pub accepted_length: f64,
    /// Its standard error, over prompts.
    pub standard_error: f64,
}

impl Difference {
    /// Of `run` to `base`, request i of both being of one prompt. What the prompts have in common cancels out, so that the
    /// error is smaller than that of either length. `None` with fewer than two prompts or without rounds.
    pub fn of<'a>(
        run: impl Iterator<Item = &'a RoundStats>,
        base: impl Iterator<Item = &'a RoundStats>,
    ) -> Option<Self> {
        let (length, run) = linearised(run)?;
        let (base_length, base) = linearised(base)?;
        let differences: Vec<f64> = run.iter().zip(&base).map(|(a, b)| a - b).collect();
        let n = differences.len() as f64;
        // They sum to zero, since either side does.
        let squares: f64 = differences.iter().map(|d| d * d).sum();
        (run.len() == base.len() && n > 1.0).then(|| Self {
            accepted_length: length - base_length,
            standard_error: (squares / (n * (n - 1.0))).sqrt(),
        })
    }
}

/// The ratio of all committed tokens to all rounds, and what each request moves it by: its tokens beyond that ratio, in
/// units of a request's mean number of rounds.
fn linearised<'a>(requests: impl Iterator<Item = &'a RoundStats>) -> Option<(f64, Vec<f64>)> {
    let counts: Vec<(f64, f64)> = requests
        .map(|stats| (stats.num_committed as f64, stats.num_rounds as f64))
        .collect();
    let committed: f64 = counts.iter().map(|(committed, _)| committed).sum();
    let rounds: f64 = counts.iter().map(|(_, rounds)| rounds).sum();
    if rounds == 0.0 {
        return None;
    }
    let (ratio, mean) = (committed / rounds, rounds / counts.len() as f64);
    let moves = counts.iter().map(|(c, n)| (c - ratio * n) / mean);
    Some((ratio, moves.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(counts: &[(u64, u64)]) -> Vec<RoundStats> {
        let stats = |&(num_committed, num_rounds)| RoundStats {
            num_committed,
            num_rounds,
            ..RoundStats::default()
        };
        counts.iter().map(stats).collect()
    }

    fn of(run: &[(u64, u64)], base: &[(u64, u64)]) -> Option<Difference> {
        Difference::of(requests(run).iter(), requests(base).iter())
    }

    #[test]
    fn what_prompts_have_in_common_cancels_out() {
        // Prompts differ by far more than the runs do: 2, 4 and 6 tokens a round, and 0.5 more of each.
        let base = [(20, 10), (40, 10), (60, 10)];
        let run = [(25, 10), (45, 10), (65, 10)];
        let difference = of(&run, &base).unwrap();
        assert!((difference.accepted_length - 0.5).abs() < 1e-12);
        assert!(difference.standard_error < 1e-12, "{difference:?}");
        // Of equal rounds it is the error of the mean of the differences: -1, 0, 1 have one of 1 / sqrt(3).
        let run = [(10, 10), (40, 10), (70, 10)];
        let difference = of(&run, &base).unwrap();
        assert!(difference.accepted_length.abs() < 1e-12);
        assert!((difference.standard_error - 1.0 / 3.0_f64.sqrt()).abs() < 1e-12);
        // Not paired they would have this one.
        let shuffled = of(&[(70, 10), (10, 10), (40, 10)], &base).unwrap();
        assert!(shuffled.standard_error > 2.0 * difference.standard_error);
    }

    #[test]
    fn the_length_is_that_of_all_rounds_together() {
        // A long and a short answer: 100 tokens in 50 rounds and 8 in 2; 100 in 25 and 8 in 4.
        let difference = of(&[(100, 50), (8, 2)], &[(100, 25), (8, 4)]).unwrap();
        let expected = 108.0 / 52.0 - 108.0 / 29.0;
        assert!((difference.accepted_length - expected).abs() < 1e-12);
        assert!(difference.standard_error > 0.0);
    }

    #[test]
    fn nothing_is_said_of_one_prompt_or_of_no_rounds() {
        assert_eq!(of(&[(20, 10)], &[(30, 10)]), None);
        assert_eq!(of(&[(0, 0), (0, 0)], &[(3, 1), (3, 1)]), None);
        assert_eq!(of(&[], &[]), None);
        assert_eq!(of(&[(2, 1), (3, 1)], &[(2, 1)]), None);
    }
}
