//! `dspark invariance`: whether the text is a function of seed and target alone, as it must be under the coupled rule and at
//! temperature 0. Each way to decode is held against plain decoding of the same prompts.
//!
//! Two passes of other shapes may round a logit differently, and then a token that won by less than that can lose. How much
//! is rounding is measured, not assumed: by the largest difference between the log-probabilities that two runs give to
//! tokens on which they agree, after the same text. A token that won can have lost as much, and the other one gained as
//! much: where two outputs part by no more than twice that, it is a near-tie, and else they are different.

use std::fmt;
use std::io::{self, Write as _};

use anyhow::Result;
use dspark::engine::Completion;
use dspark::model::DrafterConfig;
use dspark::ops::{HeadForm, MAX_TOP_LOGPROBS, Ops, Purpose, SamplingParams};
use dspark::reference::philox::token_exponential;
use dspark::schedule::Policy;

use crate::args::{DraftArgs, InvarianceArgs, Mode, RunArgs};
use crate::report::Figures;
use crate::session::{self, Drafting, Job, Texts};
use crate::{note, prompts};

/// Outputs that differ by more than rounding explains.
#[derive(Debug)]
pub struct Differ(usize);

impl fmt::Display for Differ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} outputs differ by more than rounding", self.0)
    }
}

impl std::error::Error for Differ {}

/// A way to decode.
struct Way {
    drafting: Drafting,
    max_num_reqs: usize,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Drafting {
            mode, draft_len, ..
        } = &self.drafting;
        f.write_str(mode.name())?;
        if *mode != Mode::None {
            write!(f, " {draft_len} {}", self.drafting.policy)?;
        }
        if self.drafting.head_form != HeadForm::Full {
            write!(f, " {}", self.drafting.head_form)?;
        }
        if self.drafting.alternates > 0 {
            write!(f, " +{}", self.drafting.alternates)?;
        }
        write!(f, ", {} at once", self.max_num_reqs)
    }
}

/// What came out of it.
struct Outcome {
    completions: Vec<Completion>,
    figures: Figures,
}

pub fn run(args: &InvarianceArgs) -> Result<()> {
    let texts = Texts::load(&args.pairs.run.target)?;
    let prompts = prompts::load_first(&args.pairs, texts.tokenizer.as_ref())?;
    let ways = ways(args)?;
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{:<42} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "way", "identical", "near-tie", "different", "margin", "rounding", "accepted", "tokens/s"
    )?;
    let mut plain: Option<Outcome> = None;
    let mut num_different = 0;
    for way in &ways {
        note(format_args!("running {way} on {} prompts", prompts.len()));
        let job = Run {
            args,
            texts: &texts,
            prompts: &prompts,
            way,
        };
        let outcome = session::on_device_of(&args.pairs.run, job)?;
        let base = plain.as_ref().unwrap_or(&outcome);
        let params: Vec<SamplingParams> = (0..prompts.len())
            .map(|i| Texts::sampling(i, &args.pairs.sampling))
            .collect();
        let tally = Tally::new(&base.completions, &outcome.completions, &params);
        num_different += tally.different;
        writeln!(
            out,
            "{:<42} {:>9} {:>9} {:>9} {:>9.4} {:>9.4} {:>9.2} {:>9.1}",
            way.to_string(),
            tally.identical,
            tally.near_ties,
            tally.different,
            tally.margin,
            tally.rounding,
            outcome.figures.accepted_length,
            outcome.figures.tokens_per_second
        )?;
        plain.get_or_insert(outcome);
    }
    match num_different {
        0 => Ok(()),
        n => Err(Differ(n).into()),
    }
}

/// Plain decoding first; then every drafter at its longest draft and each length asked for, and under each schedule.
fn ways(args: &InvarianceArgs) -> Result<Vec<Way>> {
    let target = &args.pairs.run.target;
    let together = args.pairs.run.max_num_reqs;
    let mut batches = args.batches.clone();
    batches.retain(|&batch| batch != together);
    batches.push(together);
    let way = |drafting: &Drafting, max_num_reqs| Way {
        drafting: drafting.clone(),
        max_num_reqs,
    };
    let none = Drafting::none();
    let mut ways: Vec<Way> = batches.iter().map(|&batch| way(&none, batch)).collect();
    for (mode, dir) in &args.pairs.draft {
        let longest = DrafterConfig::read(dir)?.max_draft_len();
        let drafting = |draft_len, schedule, head_form, alternates| {
            let args = DraftArgs {
                alternates,
                draft_len: Some(draft_len),
                schedule,
                head_form,
                ..DraftArgs::fixed()
            };
            Drafting::new(Some(*mode), Some(dir), target, &args)
        };
        let (whole, schedules, forms) = match mode {
            Mode::Mtp => (1, &[][..], &[][..]),
            _ => (longest, &args.schedules[..], &args.head_forms[..]),
        };
        let full = HeadForm::Full;
        let fixed = drafting(whole, Policy::Fixed, full, 0)?;
        ways.extend(batches.iter().map(|&batch| way(&fixed, batch)));
        for &len in args.draft_lens.iter().filter(|&&len| len != whole) {
            ways.push(way(&drafting(len, Policy::Fixed, full, 0)?, together));
        }
        for &policy in schedules {
            ways.push(way(&drafting(whole, policy, full, 0)?, together));
        }
        for &form in forms {
            ways.push(way(&drafting(whole, Policy::Fixed, form, 0)?, together));
            if args.alternates > 0 && matches!(form, HeadForm::Candidates(2.., _)) {
                let tree = drafting(whole, Policy::Fixed, form, args.alternates)?;
                ways.push(way(&tree, together));
            }
        }
    }
    Ok(ways)
}

struct Run<'a> {
    args: &'a InvarianceArgs,
    texts: &'a Texts,
    prompts: &'a [Vec<u32>],
    way: &'a Way,
}

impl Job for Run<'_> {
    type Output = Outcome;

    fn run<O: Ops + 'static>(self, ops: O) -> Result<Outcome> {
        let mut requests = self.texts.requests(self.prompts, &self.args.pairs.sampling);
        for request in &mut requests {
            request.logprobs = Some(MAX_TOP_LOGPROBS);
        }
        let run = RunArgs {
            max_num_reqs: self.way.max_num_reqs,
            ..self.args.pairs.run.clone()
        };
        let mut engine = session::start(ops, &run, &self.way.drafting, requests)?;
        let completions = session::finish(&mut engine, |_| Ok(()))?;
        let figures = Figures::new(&completions, engine.times());
        Ok(Outcome {
            completions,
            figures,
        })
    }
}

/// How one way compares with plain decoding.
#[derive(Debug, Default, PartialEq)]
struct Tally {
    identical: usize,
    near_ties: usize,
    different: usize,
    /// The largest margin by which outputs part.
    margin: f64,
    /// The largest difference of log-probabilities on which they agree.
    rounding: f64,
}

impl Tally {
    fn new(plain: &[Completion], other: &[Completion], params: &[SamplingParams]) -> Self {
        let mut tally = Self::default();
        let mut margins = Vec::new();
        for ((plain, other), params) in plain.iter().zip(other).zip(params) {
            let pairs = plain.tokens.iter().zip(&other.tokens);
            let parting = pairs.take_while(|(a, b)| a == b).count();
            let agreed = plain.logprobs.iter().zip(&other.logprobs).take(parting);
            let rounding = agreed.map(|(a, b)| f64::from((a.logprob - b.logprob).abs()));
            tally.rounding = rounding.fold(tally.rounding, f64::max);
            if plain.tokens == other.tokens {
                tally.identical += 1;
            } else {
                margins.push(margin(plain, other, parting, params));
            }
        }
        for margin in margins {
            tally.margin = tally.margin.max(margin);
            if margin <= 2.0 * tally.rounding {
                tally.near_ties += 1;
            } else {
                tally.different += 1;
            }
        }
        tally
    }
}

/// By how much plain decoding prefers its own token at `at` to the other's; infinite where the other output has ended.
fn margin(plain: &Completion, other: &Completion, at: usize, params: &SamplingParams) -> f64 {
    let at_place = |of: &Completion| Some((*of.tokens.get(at)?, of.logprobs.get(at)?.clone()));
    let (Some((token, logprobs)), Some((rival, of_rival))) = (at_place(plain), at_place(other))
    else {
        return f64::INFINITY;
    };
    // The rival's as plain decoding sees it, where it is among the likeliest, else as its own run does.
    let known = logprobs.top.iter().find(|(token, _)| *token == rival);
    let rival_logprob = known.map_or(of_rival.logprob, |(_, logprob)| *logprob);
    let position = (plain.prompt_ids.len() + at) as u32;
    let score = |token: u32, logprob: f32| f64::from(logprob) + noise(token, position, params);
    (score(token, logprobs.logprob) - score(rival, rival_logprob)).abs()
}

/// What the coupled rule adds to the log-probability of a token: the largest sum wins.
fn noise(token: u32, position: u32, params: &SamplingParams) -> f64 {
    if params.temperature == 0.0 {
        return 0.0;
    }
    let purpose = Purpose::Bonus as u32;
    -token_exponential(params.seed, position, purpose, token as usize).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dspark::engine::{FinishReason, RequestStats};
    use dspark::ops::TokenLogprobs;

    fn completion(tokens: &[u32], logprobs: &[f32], top: &[(u32, f32)]) -> Completion {
        let logprobs = logprobs.iter().map(|&logprob| TokenLogprobs {
            logprob,
            top: top.to_vec(),
        });
        Completion {
            prompt_ids: vec![1],
            tokens: tokens.to_vec(),
            logprobs: logprobs.collect(),
            text: String::new(),
            reason: FinishReason::MaxNewTokens,
            rounds: Vec::new(),
            stats: RequestStats::default(),
        }
    }

    #[test]
    fn outputs_are_told_apart_by_what_rounding_explains() {
        let plain = completion(&[4, 5, 6], &[-0.5, -1.0, -1.0], &[(6, -1.0), (7, -1.01)]);
        let params = [SamplingParams::default()];
        let tally = |tokens: &[u32], logprobs: &[f32]| {
            let other = completion(tokens, logprobs, &[]);
            Tally::new(std::slice::from_ref(&plain), &[other], &params)
        };
        assert_eq!(tally(&[4, 5, 6], &[-0.5, -1.0, -1.0]).identical, 1);
        let near = tally(&[4, 5, 7], &[-0.51, -1.0, -0.99]);
        assert!(
            (near.near_ties, near.different) == (1, 0) && near.margin < 0.011,
            "{near:?}"
        );
        // The same margin with half the rounding is no near-tie, nor is an unlikely token, nor an earlier end.
        assert_eq!(tally(&[4, 5, 7], &[-0.504, -1.0, -0.99]).different, 1);
        assert_eq!(tally(&[4, 5, 8], &[-0.51, -1.0, -3.0]).different, 1);
        assert_eq!(tally(&[4, 5], &[-0.51, -1.0]).different, 1);
    }

    #[test]
    fn the_noise_of_the_coupled_rule_counts() {
        let params = SamplingParams {
            temperature: 0.7,
            seed: 3,
            ..SamplingParams::default()
        };
        // Position 2 of token 6 against 7; log-probabilities that make them equal with their noise.
        let gap = noise(6, 3, &params) - noise(7, 3, &params);
        let plain = completion(&[4, 5, 6], &[-0.5, -1.0, -1.0], &[(7, (-1.0 + gap) as f32)]);
        let other = completion(&[4, 5, 7], &[-0.5, -1.0, -1.0], &[]);
        assert!(margin(&plain, &other, 2, &params) < 1e-6);
    }
}
