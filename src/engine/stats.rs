//! Counts and times of requests.

use crate::step::Round;

/// What the rounds of one or more requests amounted to.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct RoundStats {
    /// Rounds.
    pub num_rounds: u64,
    /// Tokens committed by them, recovered and bonus tokens included, cut outputs in full.
    pub num_committed: u64,
    /// Rows of the verify passes, anchors included; without those past the end of an output.
    pub num_verify_tokens: u64,
    /// `[k]` rounds that drafted position k.
    pub proposed: Vec<u64>,
    /// `[k]` rounds that verified position k.
    pub verified: Vec<u64>,
    /// `[k]` rounds that verified position k and accepted all before it.
    pub reached: Vec<u64>,
    /// `[k]` rounds that accepted position k.
    pub accepted: Vec<u64>,
    /// `[k]` sum of the calibrated confidences of position k over the rounds that reached it: acceptances that were
    /// predicted. Empty where there were no confidences.
    pub predicted: Vec<f64>,
}

impl RoundStats {
    /// Counts one more round.
    pub fn add(&mut self, round: &Round) {
        self.num_rounds += 1;
        self.num_committed += round.committed.len() as u64;
        self.num_verify_tokens += 1 + round.verify_len as u64;
        let reached = round.verify_len.min(round.num_accepted + 1);
        count(&mut self.proposed, round.draft_tokens.len());
        count(&mut self.verified, round.verify_len);
        count(&mut self.reached, reached);
        count(&mut self.accepted, round.num_accepted);
        let predicted = round.predicted.iter().take(reached);
        sum(
            &mut self.predicted,
            &predicted.map(|&c| f64::from(c)).collect::<Vec<_>>(),
        );
    }

    /// Counts the rounds of `other` too.
    pub fn merge(&mut self, other: &Self) {
        self.num_rounds += other.num_rounds;
        self.num_committed += other.num_committed;
        self.num_verify_tokens += other.num_verify_tokens;
        sum(&mut self.proposed, &other.proposed);
        sum(&mut self.verified, &other.verified);
        sum(&mut self.reached, &other.reached);
        sum(&mut self.accepted, &other.accepted);
        sum(&mut self.predicted, &other.predicted);
    }

    /// Accepted length: committed tokens per round; NaN without rounds.
    pub fn accepted_length(&self) -> f64 {
        self.num_committed as f64 / self.num_rounds as f64
    }

    /// Verification budget: rows per request and round; NaN without rounds.
    pub fn verify_budget(&self) -> f64 {
        self.num_verify_tokens as f64 / self.num_rounds as f64
    }

    /// Conditional acceptance of every position: accepted there, of the rounds that verified it and accepted all
    /// before it; NaN where there was none.
    pub fn acceptance_rates(&self) -> Vec<f64> {
        let accepted = |k| self.accepted.get(k).copied().unwrap_or(0) as f64;
        let reached = self.reached.iter().enumerate();
        reached.map(|(k, &n)| accepted(k) / n as f64).collect()
    }

    /// Mean calibrated confidence of every position over the rounds that reached it: what
    /// [`RoundStats::acceptance_rates`] was predicted to be.
    pub fn predicted_rates(&self) -> Vec<f64> {
        let pairs = self.predicted.iter().zip(&self.reached);
        pairs.map(|(sum, &n)| sum / n as f64).collect()
    }
}

/// Counts and times of one request.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct RequestStats {
    /// Its rounds.
    pub rounds: RoundStats,
    /// Tokens in the output.
    pub num_generated: usize,
    /// Seconds from submission to admission.
    pub wait_seconds: f64,
    /// Seconds from admission to the first token.
    pub prefill_seconds: f64,
    /// Seconds from the first token to the last.
    pub decode_seconds: f64,
}

impl RequestStats {
    /// Generated tokens per second after the first one (tok/s/user); NaN for an output of one token.
    pub fn tokens_per_second(&self) -> f64 {
        if self.num_generated < 2 {
            return f64::NAN;
        }
        (self.num_generated - 1) as f64 / self.decode_seconds
    }
}

/// Adds 1 to the first `len` counters.
fn count(counters: &mut Vec<u64>, len: usize) {
    counters.resize(counters.len().max(len), 0);
    counters[..len].iter_mut().for_each(|n| *n += 1);
}

fn sum<T: Copy + Default + std::ops::AddAssign>(counters: &mut Vec<T>, other: &[T]) {
    counters.resize(counters.len().max(other.len()), T::default());
    counters.iter_mut().zip(other).for_each(|(n, m)| *n += *m);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(verify_len: usize, num_accepted: usize) -> Round {
        Round {
            draft_tokens: vec![0; 3],
            confidence: Vec::new(),
            predicted: vec![0.5; 3],
            verify_len,
            num_accepted,
            alternate: None,
            committed: vec![0; num_accepted + 1],
            logprobs: Vec::new(),
        }
    }

    #[test]
    fn positions_count_only_where_they_were_reached() {
        let mut stats = RoundStats::default();
        for (verify_len, num_accepted) in [(3, 3), (3, 0), (2, 1), (0, 0)] {
            stats.add(&round(verify_len, num_accepted));
        }
        assert_eq!(stats.proposed, [4, 4, 4]);
        assert_eq!(stats.verified, [3, 3, 2]);
        assert_eq!(stats.reached, [3, 2, 1]);
        assert_eq!(stats.accepted, [2, 1, 1]);
        assert_eq!(stats.acceptance_rates(), [2.0 / 3.0, 0.5, 1.0]);
        assert_eq!(stats.predicted, [1.5, 1.0, 0.5]);
        assert_eq!(stats.predicted_rates(), [0.5; 3]);
        assert_eq!(stats.accepted_length(), 2.0);
        assert_eq!(stats.verify_budget(), 3.0);
        let mut twice = stats.clone();
        twice.merge(&stats);
        assert_eq!(twice.accepted, [4, 2, 2]);
        assert_eq!(twice.accepted_length(), 2.0);
    }
}
