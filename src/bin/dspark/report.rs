//! Figures of a run, for people: accepted length, acceptance by position, speed.

use dspark::engine::{Completion, RoundStats};
use dspark::step::PhaseTimes;
use serde::Serialize;
use std::fmt::Write as _;

/// What a set of finished requests adds up to.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Requests.
    pub num_requests: usize,
    /// Tokens generated, the first of each request (from its prefill) included.
    pub num_tokens: usize,
    /// Committed tokens per round, the recovered or bonus token included; 0 without rounds.
    pub accepted_length: f64,
    /// Drafts verified per round.
    pub verify_len: f64,
    /// Of the rounds that verified position k and accepted everything before it, the share that accepted k.
    pub acceptance: Vec<f64>,
    /// Mean confidence at position k over the same rounds; empty without a confidence head.
    pub confidence: Vec<f64>,
    /// Counts by position.
    pub rounds: RoundStats,
    /// Seconds spent on rounds, all requests together.
    pub decode_seconds: f64,
    /// Seconds spent on prompts.
    pub prefill_seconds: f64,
    /// Generated tokens per second of all requests together, prefill left out.
    pub tokens_per_second: f64,
}

impl Figures {
    /// Adds up every request and the engine's times.
    pub fn new(completions: &[Completion], times: PhaseTimes) -> Self {
        let mut rounds = RoundStats::default();
        for completion in completions {
            rounds.merge(&completion.stats.rounds);
        }
        let num_tokens: usize = completions.iter().map(|c| c.tokens.len()).sum();
        let decode = times.propose + times.schedule + times.verify + times.commit;
        let decoded = num_tokens.saturating_sub(completions.len()) as f64;
        let num_verified: u64 = rounds.verified.iter().sum();
        Self {
            num_requests: completions.len(),
            num_tokens,
            accepted_length: ratio(rounds.num_committed as f64, rounds.num_rounds as f64),
            verify_len: ratio(num_verified as f64, rounds.num_rounds as f64),
            acceptance: rounds.acceptance_rates(),
            confidence: mean_confidence(completions),
            decode_seconds: decode.as_secs_f64(),
            prefill_seconds: times.prefill.as_secs_f64(),
            tokens_per_second: ratio(decoded, decode.as_secs_f64()),
            rounds,
        }
    }

    /// Several lines for `--stats`.
    pub fn describe(&self) -> String {
        let mut text = format!(
            "{} tokens of {} requests in {} rounds, {:.1} tokens/s without prefill\n\
             accepted length {:.2} (bonus or recovered token included), {:.2} drafts verified a round\n",
            self.num_tokens,
            self.num_requests,
            self.rounds.num_rounds,
            self.tokens_per_second,
            self.accepted_length,
            self.verify_len
        );
        for (name, counts) in [
            ("proposed", &self.rounds.proposed),
            ("verified", &self.rounds.verified),
            ("accepted", &self.rounds.accepted),
        ] {
            if !self.rounds.proposed.is_empty() {
                let mut counts = counts.clone();
                counts.resize(self.rounds.proposed.len(), 0);
                let counts: Vec<String> = counts.iter().map(u64::to_string).collect();
                let _ = writeln!(text, "drafts {name} by position: {}", counts.join(" "));
            }
        }
        if !self.acceptance.is_empty() {
            let _ = writeln!(
                text,
                "acceptance by position, given those before it: {}",
                list(&self.acceptance)
            );
        }
        if !self.confidence.is_empty() {
            let _ = writeln!(
                text,
                "mean confidence at the same positions:         {}",
                list(&self.confidence)
            );
            let _ = writeln!(
                text,
                "predicted, after calibration:                  {}",
                list(&self.rounds.predicted_rates())
            );
        }
        text
    }
}

/// Requests that `--stats` has a line for.
const MAX_REQUEST_LINES: usize = 32;

/// A line for each of several requests: what was proposed for it, verified and accepted, and predicted to be.
pub fn by_request(completions: &[Completion]) -> String {
    let mut text = String::new();
    if completions.len() < 2 {
        return text;
    }
    text += "request  tokens  rounds  proposed  verified  accepted  predicted  accepted length  tokens/s\n";
    for (i, completion) in completions.iter().enumerate().take(MAX_REQUEST_LINES) {
        let (stats, rounds) = (&completion.stats, &completion.stats.rounds);
        let sum = |counts: &[u64]| counts.iter().sum::<u64>();
        let _ = writeln!(
            text,
            "{:>7} {:>7} {:>7} {:>9} {:>9} {:>9} {:>10.1} {:>16.2} {:>9.1}",
            i + 1,
            stats.num_generated,
            rounds.num_rounds,
            sum(&rounds.proposed),
            sum(&rounds.verified),
            sum(&rounds.accepted),
            rounds.predicted.iter().sum::<f64>(),
            ratio(rounds.num_committed as f64, rounds.num_rounds as f64),
            if stats.decode_seconds > 0.0 {
                stats.tokens_per_second()
            } else {
                0.0
            }
        );
    }
    if completions.len() > MAX_REQUEST_LINES {
        let more = completions.len() - MAX_REQUEST_LINES;
        let _ = writeln!(text, "and {more} more, which --trace has");
    }
    text
}

/// One row of figures for each named run; the first is the base of the speed-up.
pub fn table(rows: &[(String, Figures)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).fold(8, usize::max);
    let mut text = format!(
        "{:<width$} {:>9} {:>9} {:>16} {:>14}  {}\n",
        "mode",
        "tokens/s",
        "speed-up",
        "accepted length",
        "verified/round",
        "acceptance by position"
    );
    let base = rows
        .first()
        .map_or(0.0, |(_, figures)| figures.tokens_per_second);
    for (name, figures) in rows {
        let _ = writeln!(
            text,
            "{:<width$} {:>9.1} {:>8.2}x {:>16.2} {:>14.2}  {}",
            name,
            figures.tokens_per_second,
            if base > 0.0 {
                figures.tokens_per_second / base
            } else {
                0.0
            },
            figures.accepted_length,
            figures.verify_len,
            list(&figures.acceptance)
        );
    }
    text
}

fn list(values: &[f64]) -> String {
    values
        .iter()
        .map(|v| format!("{v:.2}"))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Mean confidence at each position over the rounds that verified it and accepted all before it.
fn mean_confidence(completions: &[Completion]) -> Vec<f64> {
    let mut sums: Vec<(f64, f64)> = Vec::new();
    for round in completions.iter().flat_map(|c| &c.rounds) {
        let reached = round
            .verify_len
            .min(round.num_accepted + 1)
            .min(round.confidence.len());
        sums.resize(sums.len().max(reached), (0.0, 0.0));
        for (sum, &confidence) in sums.iter_mut().zip(&round.confidence[..reached]) {
            *sum = (sum.0 + f64::from(confidence), sum.1 + 1.0);
        }
    }
    sums.into_iter()
        .map(|(sum, count)| ratio(sum, count))
        .collect()
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole == 0.0 { 0.0 } else { part / whole }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dspark::engine::{FinishReason, RequestStats};
    use dspark::step::Round;
    use std::time::Duration;

    #[test]
    fn figures_add_up() {
        let round = |verify_len, num_accepted, confidence: [f32; 2]| Round {
            draft_tokens: vec![0; 2],
            confidence: confidence.to_vec(),
            predicted: confidence.to_vec(),
            verify_len,
            num_accepted,
            alternate: None,
            committed: vec![0; num_accepted + 1],
            logprobs: Vec::new(),
        };
        let rounds = vec![
            round(2, 2, [0.9, 0.6]),
            round(1, 0, [0.1, 0.2]),
            round(2, 1, [0.5, 0.8]),
        ];
        let mut stats = RequestStats::default();
        for round in &rounds {
            stats.rounds.add(round);
        }
        let completion = Completion {
            prompt_ids: vec![1],
            tokens: vec![0; 7],
            logprobs: Vec::new(),
            text: String::new(),
            reason: FinishReason::MaxNewTokens,
            rounds,
            stats,
        };
        let times = PhaseTimes {
            verify: Duration::from_secs(3),
            ..PhaseTimes::default()
        };
        let figures = Figures::new(&[completion], times);
        assert_eq!(figures.accepted_length, 2.0);
        assert_eq!(figures.verify_len, 5.0 / 3.0);
        assert_eq!(figures.acceptance, [2.0 / 3.0, 0.5]);
        assert_eq!(figures.tokens_per_second, 2.0);
        assert!((figures.confidence[0] - 0.5).abs() < 1e-6);
        assert!((figures.confidence[1] - 0.7).abs() < 1e-6);
    }
}
