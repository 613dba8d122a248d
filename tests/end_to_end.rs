//! The whole engine on the golden checkpoints: greedy output is the plain model's with every drafter, draft length,
//! schedule and batch; the rounds are DeepSpec's own; sampled output depends on the seed alone and has the target's law.
//!
//! The reference backend computes a row the same way in every batch, so there tokens must be equal. On a GPU the order
//! of a sum may change with the shape of a pass: at the first difference the two tokens must be a near-tie of the same
//! backend's logits.

#[cfg(feature = "cuda")]
mod common;
mod end_to_end_support;
mod fakes;
mod model_support;

use std::collections::HashMap;

use dspark::ops::{Ops, SamplingParams};
use dspark::schedule::Policy;
use end_to_end_support::*;
use fakes::{chi_square_ratio, exact_law};
use model_support::{DRAFTERS, Golden, TARGETS, drafter_dir, ids, reference};
use serde_json::Value;

const NUM_TOKENS: usize = 24;
const SCHEDULES: [Policy; 4] = [
    Policy::Fixed,
    Policy::Threshold(0.3),
    Policy::Threshold(0.6),
    Policy::Algorithm1,
];

/// Plain decoding gives transformers' tokens; alone, and in every batch.
fn check_plain<O: Ops + 'static>(open: &dyn Fn() -> O, judge: Judge, target: &'static str) {
    let prompts = golden_prompts(target);
    let asks: Vec<Ask> = prompts
        .iter()
        .map(|(prompt, _)| Ask::greedy(prompt.clone(), NUM_TOKENS))
        .collect();
    for batch in BATCHES {
        let setting = Setting {
            batch,
            ..Setting::plain(target)
        };
        let found = tokens(&setting.run(open(), &asks));
        for ((prompt, expected), found) in prompts.iter().zip(&found) {
            let context = format!("{setting:?}");
            judge.check(open, &context, target, prompt, [found, expected]);
        }
    }
}

/// Greedy tokens with `drafter` are those of mode none: every draft length, schedule and batch.
fn check_drafter<O: Ops + 'static>(open: &dyn Fn() -> O, judge: Judge, drafter: &'static str) {
    let models = Models::of_drafter(drafter);
    let prompts = golden_prompts(models.target);
    let asks: Vec<Ask> = prompts
        .iter()
        .map(|(prompt, _)| Ask::greedy(prompt.clone(), NUM_TOKENS))
        .collect();
    let expected = tokens(&Setting::plain(models.target).run(open(), &asks));
    let (mut num_accepted, mut cut) = (0, 0);
    for draft_len in models.draft_lens() {
        for policy in SCHEDULES {
            if policy.needs_confidence() && !models.has_confidence() {
                continue;
            }
            for batch in BATCHES {
                let setting = Setting {
                    models,
                    draft_len,
                    policy,
                    batch,
                };
                let completions = setting.run(open(), &asks);
                for (i, done) in completions.iter().enumerate() {
                    let context = format!("prompt {i}, {setting:?}");
                    let pair = [&done.tokens[..], &expected[i]];
                    judge.check(open, &context, models.target, &asks[i].prompt, pair);
                    for round in &done.rounds {
                        num_accepted += round.num_accepted;
                        cut += usize::from(round.verify_len < draft_len);
                    }
                }
            }
        }
    }
    // Else nothing was tried. The weights of the MTP module are random ones that nothing was fitted to.
    assert!(
        num_accepted > 0 || drafter == "qwen3_mtp",
        "no draft was ever accepted"
    );
    assert_eq!(cut > 0, models.has_confidence(), "schedules cut drafts");
}

/// One test per drafter, so that they run side by side.
macro_rules! drafter_tests {
    ($($name:ident),*) => {
        mod greedy_is_the_plain_models {
            use super::*;
            $(#[test]
            fn $name() {
                check_drafter(&reference, Judge::Exact, stringify!($name));
            })*
        }

        #[test]
        fn every_drafter_is_tested() {
            let tested = [$(stringify!($name)),*];
            assert!(DRAFTERS.iter().all(|name| tested.contains(name)));
        }
    };
}

drafter_tests!(
    qwen3_vanilla,
    qwen3_gated,
    qwen3_rnn,
    qwen3_dflash,
    qwen3_mtp,
    llama_vanilla
);

#[test]
fn plain_decoding_is_that_of_transformers() {
    for target in TARGETS {
        check_plain(&reference, Judge::Exact, target);
    }
}

/// Drafts, confidences, accepted lengths and committed tokens of DeepSpec's own loop.
#[test]
fn greedy_rounds_are_deepspecs() {
    for drafter in DRAFTERS {
        let models = Models::of_drafter(drafter);
        let golden = Golden::read(&drafter_dir(drafter));
        let thresholds = golden.list("generations").iter().filter(|generation| {
            let generation = *generation;
            check_generation(models, generation);
            generation["confidence_threshold"].as_f64() > Some(0.0)
        });
        assert_eq!(thresholds.count() > 0, models.has_confidence(), "{drafter}");
    }
}

fn check_generation(models: Models, golden: &Value) {
    let context = format!("{} {}", models.drafter.unwrap(), golden["name"]);
    let threshold = golden["confidence_threshold"].as_f64().unwrap() as f32;
    let setting = Setting {
        models,
        draft_len: models.config().unwrap().max_draft_len(),
        policy: if threshold > 0.0 {
            Policy::Threshold(threshold)
        } else {
            Policy::Fixed
        },
        batch: Batch::Alone,
    };
    let max_new_tokens = golden["max_new_tokens"].as_u64().unwrap() as usize;
    let ask = Ask {
        stop_tokens: golden["stop_token_ids"]
            .as_array()
            .map_or(Vec::new(), |_| ids(&golden["stop_token_ids"])),
        ..Ask::greedy(ids(&golden["prompt_ids"]), max_new_tokens)
    };
    let done = setting.run(reference(), &[ask]).remove(0);
    assert_eq!(done.tokens, ids(&golden["output"]), "{context}");
    assert_eq!(
        u64::from(done.tokens[0]),
        golden["first_token"],
        "{context}"
    );

    // DeepSpec runs one more round, all of it cut off, when the output is complete at the end of a round.
    let rounds = golden["rounds"].as_array().unwrap();
    let committed: usize = done.rounds.iter().map(|round| round.committed.len()).sum();
    let extra = usize::from(1 + committed == max_new_tokens && done.tokens.len() == max_new_tokens);
    assert_eq!(done.rounds.len() + extra, rounds.len(), "{context}: rounds");
    for (i, (round, golden)) in done.rounds.iter().zip(rounds).enumerate() {
        let context = format!("{context}, round {i}");
        let mut sent = ids(&golden["draft_tokens"]);
        if golden["terminated_by_stop_token"] == true {
            // Up to the draft that ended the output, where one did.
            sent.truncate(round.verify_len);
        }
        assert_eq!(round.draft_tokens[..round.verify_len], sent, "{context}");
        if let Some(logits) = golden["confidence_logits"].as_array() {
            assert!(logits.len() >= sent.len(), "{context}");
            for (found, logit) in round.confidence.iter().zip(logits) {
                let expected = 1.0 / (1.0 + (-logit.as_f64().unwrap()).exp());
                let error = (f64::from(*found) - expected).abs();
                assert!(error < 1e-3, "{context}: {found} against {expected}");
            }
        }
        let expected = ids(&golden["committed"]);
        if golden["terminated_by_stop_token"] == true {
            assert!(round.committed.starts_with(&expected), "{context}");
        } else {
            assert_eq!(round.committed, expected, "{context}");
            assert_eq!(
                round.num_accepted as u64, golden["num_accepted"],
                "{context}"
            );
        }
    }
}

fn sampled_asks(target: &str) -> Vec<Ask> {
    let prompts = golden_prompts(target).into_iter().enumerate();
    prompts
        .map(|(i, (prompt, _))| Ask::sampled(prompt, NUM_TOKENS, 0.6 + 0.2 * i as f32, i as u64))
        .collect()
}

#[test]
fn sampled_tokens_depend_on_the_seed_alone() {
    for drafter in [
        "qwen3_vanilla",
        "qwen3_dflash",
        "qwen3_mtp",
        "llama_vanilla",
    ] {
        let models = Models::of_drafter(drafter);
        let asks = sampled_asks(models.target);
        let policies = if models.has_confidence() {
            &[Policy::Fixed, Policy::Threshold(0.6)][..]
        } else {
            &[Policy::Fixed]
        };
        for &policy in policies {
            let run = |batch, asks: &[Ask]| {
                let setting = Setting {
                    models,
                    draft_len: 2,
                    policy,
                    batch,
                };
                tokens(&setting.run(reference(), asks))
            };
            let alone = run(Batch::Alone, &asks);
            for batch in BATCHES {
                assert_eq!(run(batch, &asks), alone, "{drafter}, {policy}, {batch:?}");
            }
            let mut others = asks.clone();
            for ask in &mut others {
                ask.sampling.seed += 100;
            }
            assert_ne!(run(Batch::Alone, &others), alone, "{drafter}, {policy}");
        }
    }
}

/// The tokens that get a class of their own in the chi-square tests; all others share the last one.
const NUM_CLASSES: u32 = 3;

/// Class of every token: the likeliest of `law` first.
fn classes(law: &[f64]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..law.len()).collect();
    order.sort_by(|&a, &b| law[b].total_cmp(&law[a]));
    let mut classes = vec![0; law.len()];
    for (rank, token) in order.into_iter().enumerate() {
        classes[token] = (rank as u32).min(NUM_CLASSES);
    }
    classes
}

/// The first two tokens of sampled generation with drafts have the target's law; the second one is accepted or
/// recovered. The drafts themselves do not have it, and neither does another temperature: the test can fail.
#[test]
fn sampled_generation_has_the_targets_law() {
    let models = Models::of_drafter("llama_vanilla");
    let (prompt, _) = golden_prompts(models.target)[1].clone();
    let logits_after =
        |tokens: &[u32]| next_logits(reference(), models.target, &[&prompt, tokens].concat());
    let params = |temperature| SamplingParams {
        temperature,
        ..SamplingParams::default()
    };
    let first_logits = logits_after(&[]);
    let second_logits: Vec<Vec<f32>> = (0..first_logits.len() as u32)
        .map(|token| logits_after(&[token]))
        .collect();
    let laws = |temperature| {
        let first = exact_law(&first_logits, &params(temperature));
        let second: Vec<Vec<f64>> = second_logits
            .iter()
            .map(|logits| exact_law(logits, &params(temperature)))
            .collect();
        (first, second)
    };
    let (first, second) = laws(0.9);
    let first_class = classes(&first);
    let second_class: Vec<Vec<u32>> = second.iter().map(|law| classes(law)).collect();
    let cells = |(first, second): &(Vec<f64>, Vec<Vec<f64>>)| {
        let mut cells = HashMap::new();
        for (a, p) in first.iter().enumerate() {
            for (b, q) in second[a].iter().enumerate() {
                *cells
                    .entry(vec![first_class[a], second_class[a][b]])
                    .or_insert(0.0) += p * q;
            }
        }
        cells
    };

    let setting = Setting {
        models,
        draft_len: 2,
        policy: Policy::Fixed,
        batch: Batch::Together,
    };
    let asks: Vec<Ask> = (0..4000)
        .map(|seed| Ask::sampled(prompt.clone(), 2, 0.9, seed))
        .collect();
    let (mut counts, mut drafted, mut accepted) = (HashMap::new(), HashMap::new(), 0);
    for done in setting.run(reference(), &asks) {
        let class = |second: u32| {
            vec![
                first_class[done.tokens[0] as usize],
                second_class[done.tokens[0] as usize][second as usize],
            ]
        };
        *counts.entry(class(done.tokens[1])).or_insert(0) += 1;
        *drafted
            .entry(class(done.rounds[0].draft_tokens[0]))
            .or_insert(0) += 1;
        accepted += usize::from(done.rounds[0].num_accepted > 0);
    }
    assert!(
        (200..3800).contains(&accepted),
        "{accepted} accepted drafts"
    );
    let law = cells(&laws(0.9));
    let ratio = chi_square_ratio(&counts, &law);
    assert!(ratio < 1.0, "{ratio}");
    let ratio = chi_square_ratio(&drafted, &law);
    assert!(ratio > 1.0, "drafts pass for the target's: {ratio}");
    let ratio = chi_square_ratio(&counts, &cells(&laws(1.2)));
    assert!(ratio > 1.0, "another temperature passes: {ratio}");
}

/// The same on a GPU, judged by regret.
#[cfg(feature = "cuda")]
mod on_cuda {
    use super::*;
    use dspark::ops::cuda::Cuda;

    const JUDGE: Judge = Judge::Regret(0.03);

    /// Opens the device as often as asked; `None` where there is none.
    fn opener() -> Option<impl Fn() -> Cuda> {
        let device = common::gpu()?.device().clone();
        Some(move || Cuda::new(device.clone()).unwrap())
    }

    #[test]
    fn plain_decoding_is_that_of_transformers() {
        let Some(open) = opener() else { return };
        for target in TARGETS {
            check_plain(&open, JUDGE, target);
        }
    }

    #[test]
    fn greedy_is_the_plain_models() {
        let Some(open) = opener() else { return };
        for drafter in DRAFTERS.into_iter().chain(["qwen3_mtp"]) {
            check_drafter(&open, JUDGE, drafter);
        }
    }

    #[test]
    fn seeds_give_the_same_tokens_again() {
        let Some(open) = opener() else { return };
        let models = Models::of_drafter("qwen3_vanilla");
        let setting = Setting {
            models,
            draft_len: 7,
            policy: Policy::Fixed,
            batch: Batch::Together,
        };
        let asks = sampled_asks(models.target);
        let first = tokens(&setting.run(open(), &asks));
        assert_eq!(tokens(&setting.run(open(), &asks)), first);
    }
}

/// Regret must be able to fail: tokens that are no near-tie are told apart.
#[test]
#[should_panic(expected = "regret")]
fn regret_tells_wrong_tokens() {
    let (prompt, greedy) = golden_prompts("qwen3_bf16")[1].clone();
    let mut wrong = greedy.clone();
    let logits = next_logits(
        reference(),
        "qwen3_bf16",
        &[&prompt[..], &greedy[..3]].concat(),
    );
    let worst = (0..logits.len()).min_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    wrong[3] = worst.unwrap() as u32;
    let judge = Judge::Regret(0.03);
    let context = "negative control";
    judge.check(
        &reference,
        context,
        "qwen3_bf16",
        &prompt,
        [&wrong, &greedy],
    );
}
