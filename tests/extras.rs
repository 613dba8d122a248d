//! What acceptance can do beyond sampling, through the whole engine: grammars, log-probabilities and stop tokens, with and
//! without drafts.

#[cfg(feature = "cuda")]
mod common;
mod end_to_end_support;
mod fakes;
mod model_support;

use std::cell::RefCell;
use std::rc::Rc;

use dspark::engine::{Completion, EngineConfig, FinishReason, Request};
use dspark::ops::grammar::mask_allows;
use dspark::ops::{Ops, Rule, SamplingParams, TokenLogprobs};
use dspark::reference::law;
use dspark::schedule::Policy;
use end_to_end_support::{Ask, BATCHES, Batch, Models, Setting, golden_prompts, next_logits};
use fakes::{
    DraftSpec, LogitsOf, Outcome, Sizes, agreeing_draft, engine, engine_config, exact_law,
    is_argument, random_logits, reference,
};

const VOCAB_SIZE: usize = 37;
const NUM_TOKENS: usize = 14;
const NUM_REQUESTS: usize = 12;
/// Tokens of an output of [`thirds`].
const WHOLE: usize = 10;

/// The token at place i is i modulo 3, and the tenth completes the output.
fn thirds(committed: &[u32], drafts: &[u32], mask: &mut [u32]) {
    let tokens = [committed, drafts].concat();
    let good = |(i, &token): (usize, &u32)| token as usize % 3 == i % 3;
    if tokens.len() < WHOLE && tokens.iter().enumerate().all(good) {
        for v in (tokens.len() % 3..32 * mask.len()).step_by(3) {
            mask[v / 32] |= 1 << (v % 32);
        }
    }
}

fn target_law() -> LogitsOf {
    random_logits(VOCAB_SIZE, 3, 3.0)
}

/// The target's law under [`thirds`], for the request of [`prompt`].
fn law_in_thirds(i: usize) -> LogitsOf {
    let (law, prompt_len) = (target_law(), prompt(i).len());
    Rc::new(move |history| {
        let mut mask = [0; 2];
        thirds(&history[prompt_len..], &[], &mut mask);
        let logits = (0..).zip(law(history));
        logits
            .map(|(v, logit)| {
                if mask_allows(&mask, v) {
                    logit
                } else {
                    f32::NEG_INFINITY
                }
            })
            .collect()
    })
}

fn prompt(i: usize) -> Vec<u32> {
    (0..=i % 4)
        .map(|k| ((5 * i + k) % VOCAB_SIZE) as u32)
        .collect()
}

/// Every other request is constrained.
fn constrained(i: usize) -> bool {
    i.is_multiple_of(2)
}

fn drafts() -> [Option<DraftSpec>; 3] {
    [
        None,
        Some(DraftSpec::random(VOCAB_SIZE, 9, 3)),
        Some(agreeing_draft(&target_law(), VOCAB_SIZE, 3)),
    ]
}

/// All requests, each after `change`.
fn run(
    draft: Option<&DraftSpec>,
    policy: Policy,
    change: impl Fn(usize, &mut Request),
) -> Vec<Completion> {
    let sizes = Sizes::new(VOCAB_SIZE);
    let config = EngineConfig {
        max_num_reqs: 5,
        ..engine_config(&sizes, policy)
    };
    let mut engine = engine(reference(), sizes, &target_law(), draft, config).unwrap();
    for i in 0..NUM_REQUESTS {
        let mut request = Request::new(prompt(i), SamplingParams::default(), NUM_TOKENS);
        change(i, &mut request);
        engine.submit(request).unwrap();
    }
    let mut outcome = Outcome::default();
    engine.run(|event| outcome.take(event)).unwrap();
    (0..NUM_REQUESTS)
        .map(|i| outcome.completions.remove(&i).unwrap())
        .collect()
}

const POLICIES: [Policy; 3] = [Policy::Fixed, Policy::Threshold(0.5), Policy::Algorithm1];

#[test]
fn greedy_output_under_a_grammar_is_the_one_by_hand() {
    for draft in drafts() {
        for policy in POLICIES {
            if draft.is_none() && policy.needs_confidence() {
                continue;
            }
            let done = run(draft.as_ref(), policy, |i, request| {
                if constrained(i) {
                    request.grammar = Some(Box::new(thirds));
                }
            });
            for (i, done) in done.iter().enumerate() {
                let (wanted, reason) = if constrained(i) {
                    let law = law_in_thirds(i);
                    let wanted = fakes::greedy(&law, &prompt(i), WHOLE);
                    (wanted, FinishReason::GrammarComplete)
                } else {
                    let wanted = fakes::greedy(&target_law(), &prompt(i), NUM_TOKENS);
                    (wanted, FinishReason::MaxNewTokens)
                };
                assert_eq!(
                    (&done.tokens, done.reason),
                    (&wanted, reason),
                    "{i} {policy}"
                );
            }
        }
    }
}

#[test]
fn sampled_output_obeys_its_grammar_under_every_rule() {
    let sampling = |i: usize, rule| SamplingParams {
        temperature: 0.9,
        top_k: [0, 5][i / 2 % 2],
        seed: i as u64,
        rule,
        ..SamplingParams::default()
    };
    for rule in [Rule::Token, Rule::Block, Rule::Coupled] {
        let mut texts = Vec::new();
        for draft in drafts() {
            let done = run(draft.as_ref(), Policy::Fixed, |i, request| {
                request.sampling = sampling(i, rule);
                request.grammar = Some(Box::new(thirds));
            });
            for done in &done {
                let good = done.tokens.iter().enumerate();
                assert!(
                    good.clone().all(|(i, &t)| t as usize % 3 == i % 3),
                    "{done:?}"
                );
                assert_eq!(done.tokens.len(), WHOLE);
                assert_eq!(done.reason, FinishReason::GrammarComplete);
            }
            texts.push(done.into_iter().map(|done| done.tokens).collect::<Vec<_>>());
        }
        let all_equal = texts.iter().all(|text| *text == texts[0]);
        assert_eq!(all_equal, rule == Rule::Coupled, "{rule}");
    }
}

#[test]
fn the_maximum_and_stop_tokens_end_an_output_before_its_grammar_does() {
    for draft in drafts() {
        let done = run(draft.as_ref(), Policy::Fixed, |i, request| {
            request.grammar = Some(Box::new(thirds));
            request.max_new_tokens = [4, WHOLE][i % 2];
            request.stop_tokens = [vec![], (1..37).step_by(3).collect()][i / 2 % 2].clone();
        });
        for (i, done) in done.iter().enumerate() {
            let (len, reason) = match (i % 2, i / 2 % 2) {
                (_, 1) => (2, FinishReason::StopToken),
                (0, _) => (4, FinishReason::MaxNewTokens),
                // Both at once: the length is what the caller asked for.
                _ => (WHOLE, FinishReason::MaxNewTokens),
            };
            assert_eq!((done.tokens.len(), done.reason), (len, reason), "{i}");
        }
    }
}

/// Nothing is drafted or verified past the token that ends an output, and it counts as an accepted draft.
#[test]
fn a_drafted_stop_token_ends_the_run() {
    let draft = agreeing_draft(&target_law(), VOCAB_SIZE, 3);
    for at in 1..8 {
        let stop = |i: usize| fakes::greedy(&target_law(), &prompt(i), NUM_TOKENS)[at];
        let done = run(Some(&draft), Policy::Fixed, |i, request| {
            request.stop_tokens = vec![stop(i)];
        });
        for (i, done) in done.iter().enumerate() {
            let wanted = fakes::greedy(&target_law(), &prompt(i), NUM_TOKENS);
            let end = wanted.iter().position(|&token| token == stop(i)).unwrap() + 1;
            assert_eq!(done.tokens, wanted[..end]);
            let committed: usize = done.rounds.iter().map(|round| round.committed.len()).sum();
            assert_eq!(1 + committed, end, "tokens past the end");
            let rates = done.stats.rounds.acceptance_rates();
            assert!(rates.iter().all(|&rate| rate == 1.0), "{rates:?}");
        }
    }
}

/// How likely `token` was, by the law alone.
fn logprobs_by_hand(law: &[f64], token: u32, num_top: usize) -> TokenLogprobs {
    let mut order: Vec<u32> = (0..law.len() as u32)
        .filter(|&v| law[v as usize] > 0.0)
        .collect();
    order.sort_by(|&a, &b| law[b as usize].total_cmp(&law[a as usize]));
    let ln = |v: u32| law[v as usize].ln() as f32;
    TokenLogprobs {
        logprob: ln(token),
        top: order
            .into_iter()
            .take(num_top)
            .map(|v| (v, ln(v)))
            .collect(),
    }
}

#[track_caller]
fn assert_logprobs(found: &TokenLogprobs, wanted: &TokenLogprobs) {
    let close = |a: f32, b: f32| (a - b).abs() < 1e-4;
    let pairs = found.top.iter().zip(&wanted.top);
    let same = pairs.clone().all(|(a, b)| a.0 == b.0 && close(a.1, b.1));
    let len = found.top.len() == wanted.top.len();
    assert!(
        same && len && close(found.logprob, wanted.logprob),
        "{found:?} {wanted:?}"
    );
}

#[test]
fn logprobs_are_those_of_the_law_that_was_drawn_from() {
    let sampling = |i: usize| SamplingParams {
        temperature: [0.0, 0.7, 1.3][i % 3],
        top_p: [1.0, 0.9][i % 2],
        seed: i as u64,
        ..SamplingParams::default()
    };
    let asked = |i: usize| [None, Some(0), Some(3), Some(20)][i % 4];
    for draft in drafts() {
        let done = run(draft.as_ref(), Policy::Fixed, |i, request| {
            request.sampling = sampling(i);
            request.logprobs = asked(i);
            if i % 5 == 1 {
                request.grammar = Some(Box::new(thirds));
            }
        });
        for (i, done) in done.iter().enumerate() {
            let Some(num_top) = asked(i) else {
                assert!(done.logprobs.is_empty());
                continue;
            };
            assert_eq!(done.logprobs.len(), done.tokens.len());
            let law = if i % 5 == 1 {
                law_in_thirds(i)
            } else {
                target_law()
            };
            // At temperature 0 the law of temperature 1, without filters.
            let params = match sampling(i) {
                params if params.temperature > 0.0 => params,
                _ => SamplingParams {
                    temperature: 1.0,
                    ..SamplingParams::default()
                },
            };
            for (at, (&token, found)) in done.tokens.iter().zip(&done.logprobs).enumerate() {
                let history = [&prompt(i)[..], &done.tokens[..at]].concat();
                let law = exact_law(&law(&history), &params);
                assert_logprobs(found, &logprobs_by_hand(&law, token, num_top));
            }
            let of_rounds: Vec<&TokenLogprobs> = done
                .rounds
                .iter()
                .flat_map(|round| &round.logprobs)
                .collect();
            let kept = done.logprobs.len() - 1;
            assert!(of_rounds.iter().take(kept).copied().eq(&done.logprobs[1..]));
        }
    }
}

#[test]
fn what_cannot_be_had_is_refused_by_name() {
    let sizes = Sizes::new(VOCAB_SIZE);
    let config = engine_config(&sizes, Policy::Fixed);
    let mut engine = engine(reference(), sizes, &target_law(), None, config).unwrap();
    let request = || Request::new(vec![1], SamplingParams::default(), 4);
    let nothing = |_: &[u32], _: &[u32], _: &mut [u32]| ();
    // Bits past the vocabulary are no tokens.
    let beyond = |_: &[u32], _: &[u32], mask: &mut [u32]| mask[1] = u32::MAX << 5;
    let bad: [(&str, Request); 3] = [
        (
            "logprobs",
            Request {
                logprobs: Some(21),
                ..request()
            },
        ),
        (
            "grammar",
            Request {
                grammar: Some(Box::new(nothing)),
                ..request()
            },
        ),
        (
            "grammar",
            Request {
                grammar: Some(Box::new(beyond)),
                ..request()
            },
        ),
    ];
    for (field, request) in bad {
        assert!(is_argument(engine.submit(request), field), "{field}");
    }
}

/// The real models: greedy text under a grammar is that of plain decoding with every drafter, and drafts that are made under
/// the grammar are accepted more often than those made without.
#[test]
fn drafters_draft_what_the_grammar_allows() {
    for drafter in [
        "qwen3_vanilla",
        "qwen3_gated",
        "qwen3_rnn",
        "qwen3_dflash",
        "qwen3_mtp",
    ] {
        let models = Models::of_drafter(drafter);
        let asks: Vec<Ask> = golden_prompts(models.target)
            .into_iter()
            .map(|(prompt, _)| Ask::greedy(prompt, 24))
            .collect();
        let grammar = |_: usize, request: &mut Request| request.grammar = Some(Box::new(thirds));
        let plain = Setting::plain(models.target).run_with(reference(), &asks, grammar);
        for batch in [Batch::Alone, Batch::Together] {
            let setting = Setting {
                models,
                draft_len: 3,
                policy: Policy::Fixed,
                batch,
            };
            let done = setting.run_with(reference(), &asks, grammar);
            let mut forbidden = 0;
            for (done, plain) in done.iter().zip(&plain) {
                assert_eq!(done.tokens, plain.tokens, "{drafter}");
                let mut len = 1;
                for round in &done.rounds {
                    let places = round.draft_tokens.iter().zip(len..).take(WHOLE - len);
                    let bad = |&(&token, place): &(&u32, usize)| token as usize % 3 != place % 3;
                    forbidden += places.filter(bad).count();
                    len += round.committed.len();
                }
            }
            // The state of an rnn head lives within one walk, so only its first draft is made under the grammar.
            assert_eq!(
                forbidden > 0,
                drafter == "qwen3_rnn",
                "{drafter}: {forbidden}"
            );
        }
    }
}

/// A grammar over a real vocabulary, sampled and greedy, with every drafter; log-probabilities against a plain pass over
/// the same text, up to `tolerance`.
fn check_models<O: Ops + 'static>(open: &dyn Fn() -> O, tolerance: f32) {
    for drafter in ["qwen3_vanilla", "qwen3_rnn", "qwen3_mtp"] {
        let models = Models::of_drafter(drafter);
        let prompts = golden_prompts(models.target).into_iter().enumerate();
        let ask = |(i, (prompt, _)): (usize, (Vec<u32>, _))| {
            Ask::sampled(prompt, 24, [0.0, 0.8][i % 2], i as u64)
        };
        let asks: Vec<Ask> = prompts.map(ask).collect();
        let setting = Setting {
            models,
            draft_len: 3,
            policy: Policy::Fixed,
            batch: Batch::Together,
        };
        let done = setting.run_with(open(), &asks, |i, request| {
            request.logprobs = Some(5);
            if i != 1 {
                request.grammar = Some(Box::new(thirds));
            }
        });
        for (i, (done, ask)) in done.iter().zip(&asks).enumerate() {
            let in_thirds = |(at, &token): (usize, &u32)| token as usize % 3 == at % 3;
            let obeys = done.tokens.iter().enumerate().all(in_thirds);
            assert_eq!(
                (obeys, done.tokens.len() == WHOLE),
                (i != 1, i != 1),
                "{drafter} {i}"
            );
            for at in [0, 1, done.tokens.len() - 1] {
                let text = [&ask.prompt, &done.tokens[..at]].concat();
                let mut logits = next_logits(open(), models.target, &text);
                let mut mask = vec![0; logits.len().div_ceil(32)];
                thirds(&done.tokens[..at], &[], &mut mask);
                for (v, logit) in (0..).zip(&mut logits) {
                    if i != 1 && !mask_allows(&mask, v) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
                let temperature = match ask.sampling.temperature {
                    0.0 => 1.0,
                    temperature => temperature,
                };
                let law = law::softmax(&logits, temperature);
                let (token, found) = (done.tokens[at], &done.logprobs[at]);
                for &(v, logprob) in found.top.iter().chain([&(token, found.logprob)]) {
                    let wanted = law[v as usize].ln() as f32;
                    let close = (logprob - wanted).abs() <= tolerance;
                    assert!(close, "{drafter} {i} {at}: {logprob} for {wanted}");
                }
            }
        }
    }
}

#[test]
fn models_obey_and_say_how_sure_they_were() {
    check_models(&reference, 1e-4);
}

#[cfg(feature = "cuda")]
#[test]
fn models_obey_and_say_how_sure_they_were_on_cuda() {
    let Some(gpu) = common::gpu() else { return };
    let device = gpu.device().clone();
    let open = || dspark::ops::cuda::Cuda::new(device.clone()).unwrap();
    // The passes have other shapes, and logits of up to 16 are rounded to a sixteenth.
    check_models(&open, 0.3);
}

/// The committed tokens that a grammar is asked about only ever grow.
#[test]
fn a_grammar_sees_the_output_grow() {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let models = Models::of_drafter("qwen3_vanilla");
    let (prompt, _) = golden_prompts(models.target)[1].clone();
    for batch in BATCHES {
        let setting = Setting {
            models,
            draft_len: 2,
            policy: Policy::Fixed,
            batch,
        };
        let done = setting.run_with(
            reference(),
            &[Ask::greedy(prompt.clone(), 12)],
            |_, request| {
                let seen = seen.clone();
                seen.borrow_mut().clear();
                let grammar = move |committed: &[u32], _: &[u32], mask: &mut [u32]| {
                    let mut seen = seen.borrow_mut();
                    assert!(committed.starts_with(&seen));
                    *seen = committed.to_vec();
                    mask.fill(u32::MAX);
                };
                request.grammar = Some(Box::new(grammar));
            },
        );
        assert!(done[0].tokens.len() == 12 && seen.borrow().starts_with(&done[0].tokens));
    }
}
