//! Figures of a run, for people: accepted length, acceptance by position, speed.

use std::fmt::Write as _;
use std::time::Duration;

use dspark::step::Round;
use serde::Serialize;

/// What a set of finished requests adds up to.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Requests.
    pub num_requests: usize,
    /// Tokens generated, the first of each request (from its prefill) included.
    pub num_tokens: usize,
    /// Rounds of all requests.
    pub num_rounds: usize,
    /// Committed tokens per round, the recovered or bonus token included; 0 without rounds.
    pub accepted_length: f64,
    /// Drafts verified per round.
    pub verify_len: f64,
    /// Of the rounds that verified position k and accepted everything before it, the share that accepted k.
    pub acceptance: Vec<f64>,
    /// Mean confidence at position k over the same rounds; empty without a confidence head.
    pub confidence: Vec<f64>,
    /// Seconds from the first pass after the prompts to the last token, all requests together.
    pub decode_seconds: f64,
    /// Generated tokens per second of all requests together, prefill left out.
    pub tokens_per_second: f64,
}

impl Figures {
    /// Adds up the rounds of every request; `decode` is the time spent outside prefill.
    pub fn new<'a>(
        requests: impl Iterator<Item = (&'a [Round], usize)>,
        decode: Duration,
    ) -> Self {
        let (mut num_requests, mut num_tokens) = (0, 0);
        let mut rounds: Vec<&Round> = Vec::new();
        for (request_rounds, tokens) in requests {
            num_requests += 1;
            num_tokens += tokens;
            rounds.extend(request_rounds);
        }
        let num_rounds = rounds.len();
        let draft_len = rounds.iter().map(|r| r.draft_tokens.len()).max().unwrap_or(0);
        let reached = |k: usize| {
            rounds.iter().filter(move |r| r.verify_len > k && r.num_accepted >= k).copied()
        };
        let acceptance = (0..draft_len)
            .map(|k| ratio(reached(k).filter(|r| r.num_accepted > k).count(), reached(k).count()))
            .collect();
        let confident = |k: usize| reached(k).filter_map(move |r| r.confidence.get(k));
        let confidence = (0..draft_len)
            .take_while(|&k| confident(k).next().is_some())
            .map(|k| {
                let sum: f64 = confident(k).map(|&c| f64::from(c)).sum();
                sum / confident(k).count() as f64
            })
            .collect();
        let seconds = decode.as_secs_f64();
        let decoded = num_tokens.saturating_sub(num_requests);
        Self {
            num_requests,
            num_tokens,
            num_rounds,
            accepted_length: ratio(rounds.iter().map(|r| r.committed.len()).sum(), num_rounds),
            verify_len: ratio(rounds.iter().map(|r| r.verify_len).sum(), num_rounds),
            acceptance,
            confidence,
            decode_seconds: seconds,
            tokens_per_second: if seconds > 0.0 { decoded as f64 / seconds } else { 0.0 },
        }
    }

    /// Several lines for `--stats`.
    pub fn describe(&self) -> String {
        let mut text = format!(
            "{} tokens of {} requests in {} rounds, {:.1} tokens/s without prefill\n\
             accepted length {:.2} (bonus or recovered token included), {:.2} drafts verified a round\n",
            self.num_tokens,
            self.num_requests,
            self.num_rounds,
            self.tokens_per_second,
            self.accepted_length,
            self.verify_len
        );
        if !self.acceptance.is_empty() {
            let _ = writeln!(text, "acceptance by position, given those before it: {}", list(&self.acceptance));
        }
        if !self.confidence.is_empty() {
            let _ = writeln!(text, "mean confidence at the same positions:         {}", list(&self.confidence));
        }
        text
    }
}

/// One row of figures for each named run; the first is the base of the speed-up.
pub fn table(rows: &[(String, Figures)]) -> String {
    let mut text = format!(
        "{:<8} {:>9} {:>9} {:>16} {:>14}  {}\n",
        "mode", "tokens/s", "speed-up", "accepted length", "verified/round", "acceptance by position"
    );
    let base = rows.first().map_or(0.0, |(_, figures)| figures.tokens_per_second);
    for (name, figures) in rows {
        let _ = writeln!(
            text,
            "{:<8} {:>9.1} {:>8.2}x {:>16.2} {:>14.2}  {}",
            name,
            figures.tokens_per_second,
            if base > 0.0 { figures.tokens_per_second / base } else { 0.0 },
            figures.accepted_length,
            figures.verify_len,
            list(&figures.acceptance)
        );
    }
    text
}

fn list(values: &[f64]) -> String {
    values.iter().map(|v| format!("{v:.2}")).collect::<Vec<_>>().join(" ")
}

fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(verify_len: usize, num_accepted: usize) -> Round {
        Round {
            draft_tokens: vec![0; 3],
            confidence: vec![0.5; 3],
            verify_len,
            num_accepted,
            committed: vec![0; num_accepted + 1],
        }
    }

    #[test]
    fn positions_count_only_where_they_were_reached_and_verified() {
        let rounds = [round(3, 1), round(1, 1), round(3, 3), round(0, 0)];
        let figures = Figures::new([(&rounds[..], 9)].into_iter(), Duration::from_secs(2));
        assert_eq!(figures.acceptance, [1.0, 0.5, 1.0]);
        assert_eq!(figures.accepted_length, 9.0 / 4.0);
        assert_eq!(figures.verify_len, 7.0 / 4.0);
        assert_eq!(figures.tokens_per_second, 4.0);
        assert_eq!(figures.confidence, [0.5; 3]);
    }
}
