//! The engine: greedy output that depends on the prompt alone, order and pages of admission, ends of outputs, streams
//! of text, and counts.

mod fakes;

use dspark::engine::{EngineConfig, FinishReason, Request, TextStream};
use dspark::ops::SamplingParams;
use dspark::schedule::Policy;
use fakes::{
    DraftSpec, LogitsOf, Outcome, Sizes, agreeing_draft, engine, engine_config, greedy,
    is_argument, random_logits, reference, run,
};

const VOCAB_SIZE: usize = 5;

const POLICIES: [Policy; 3] = [Policy::Fixed, Policy::Threshold(0.5), Policy::Algorithm1];

fn law() -> LogitsOf {
    random_logits(VOCAB_SIZE, 77, 2.0)
}

fn random_draft(draft_len: usize) -> DraftSpec {
    DraftSpec::random(VOCAB_SIZE, 78, draft_len)
}

/// Prompts of many lengths with outputs of many lengths.
fn prompts() -> Vec<(Vec<u32>, usize)> {
    [
        (1, 9),
        (7, 1),
        (2, 2),
        (12, 5),
        (4, 16),
        (1, 3),
        (9, 8),
        (5, 11),
        (3, 4),
    ]
    .iter()
    .enumerate()
    .map(|(i, &(len, new))| {
        (
            (0..len)
                .map(|j| ((i * 3 + j * j) % VOCAB_SIZE) as u32)
                .collect(),
            new,
        )
    })
    .collect()
}

/// Runs all prompts, half of them joining later, and compares with plain greedy decoding.
fn check_greedy(draft: Option<&DraftSpec>, sizes: Sizes, config: &EngineConfig, seed: u64) {
    let context = format!("{config:?}");
    let mut engine = engine(reference(), sizes, &law(), draft, config.clone()).unwrap();
    let mut outcome = Outcome::default();
    let params = SamplingParams {
        seed,
        ..SamplingParams::default()
    };
    for (i, (prompt, new)) in prompts().into_iter().enumerate() {
        assert_eq!(engine.submit(Request::new(prompt, params, new)).unwrap(), i);
        if i > 3 {
            let events = engine.advance().unwrap();
            for event in events {
                outcome.take(event);
            }
        }
    }
    engine.run(|event| outcome.take(event)).unwrap();
    assert_eq!(engine.pool().num_free(), config.num_pages, "{context}");
    for (i, (prompt, new)) in prompts().iter().enumerate() {
        assert_eq!(
            outcome.tokens(i),
            greedy(&law(), prompt, *new),
            "request {i}, {context}"
        );
        assert_eq!(outcome.completions[&i].reason, FinishReason::MaxNewTokens);
    }
    let order: Vec<usize> = (0..prompts().len()).collect();
    assert_eq!(outcome.first_tokens, order, "someone overtook, {context}");
}

#[test]
fn greedy_output_depends_on_the_prompt_alone() {
    for page_size in [1, 3, 16] {
        for (max_num_reqs, prefill_chunk) in [(1, 16), (2, 1), (3, 3), (9, 5)] {
            for tiny in [false, true] {
                let mut sizes = Sizes::new(VOCAB_SIZE);
                sizes.page_size = page_size;
                // The largest request needs 4 + 16 entries and a draft of 3 and the anchor.
                sizes.num_pages = if tiny {
                    24_usize.div_ceil(page_size)
                } else {
                    300
                };
                let mut config = EngineConfig {
                    max_num_reqs,
                    prefill_chunk,
                    ..engine_config(&sizes, Policy::Fixed)
                };
                sizes.max_rows = config.max_rows(0);
                check_greedy(None, sizes, &config, 0);
                for policy in POLICIES {
                    for draft_len in 1..=3 {
                        config.policy = policy;
                        config.draft_len = Some(draft_len);
                        sizes.max_rows = config.max_rows(draft_len);
                        check_greedy(Some(&random_draft(3)), sizes, &config, 9);
                    }
                }
                check_greedy(
                    Some(&agreeing_draft(&law(), VOCAB_SIZE, 3)),
                    sizes,
                    &config,
                    1,
                );
            }
        }
    }
}

#[test]
fn sampled_output_does_not_depend_on_the_neighbours() {
    let sizes = Sizes::new(VOCAB_SIZE);
    for policy in [Policy::Fixed, Policy::Threshold(0.5)] {
        let generate = |members: &[usize], max_num_reqs: usize| {
            let config = EngineConfig {
                max_num_reqs,
                ..engine_config(&sizes, policy)
            };
            let mut engine =
                engine(reference(), sizes, &law(), Some(&random_draft(3)), config).unwrap();
            for &i in members {
                let (prompt, new) = prompts()[i].clone();
                let params = SamplingParams {
                    temperature: 0.5 * (i % 3) as f32,
                    seed: i as u64,
                    ..SamplingParams::default()
                };
                engine.submit(Request::new(prompt, params, new)).unwrap();
            }
            let outcome = run(&mut engine);
            let tokens = (0..members.len()).map(|i| outcome.tokens(i).to_vec());
            tokens.collect::<Vec<_>>()
        };
        let all: Vec<usize> = (0..prompts().len()).collect();
        let together = generate(&all, 4);
        for &i in &all {
            assert_eq!(generate(&[i], 1)[0], together[i], "request {i}, {policy}");
        }
    }
}

#[test]
fn seeds_give_different_samples() {
    let sizes = Sizes::new(VOCAB_SIZE);
    let config = engine_config(&sizes, Policy::Fixed);
    let mut engine = engine(reference(), sizes, &law(), Some(&random_draft(3)), config).unwrap();
    for seed in [4, 4, 5] {
        let params = SamplingParams {
            temperature: 1.0,
            seed,
            ..SamplingParams::default()
        };
        engine.submit(Request::new(vec![0, 1], params, 30)).unwrap();
    }
    let outcome = run(&mut engine);
    assert_eq!(outcome.tokens(0), outcome.tokens(1));
    assert_ne!(outcome.tokens(0), outcome.tokens(2));
}

#[test]
fn a_sure_drafter_commits_whole_blocks() {
    let sizes = Sizes::new(VOCAB_SIZE);
    let config = engine_config(&sizes, Policy::Fixed);
    let draft = agreeing_draft(&law(), VOCAB_SIZE, 3);
    let mut engine = engine(reference(), sizes, &law(), Some(&draft), config).unwrap();
    let request = Request::new(vec![2], SamplingParams::default(), 10);
    engine.submit(request).unwrap();
    let outcome = run(&mut engine);
    // 1 from the prefill, then 4 + 4 + 4, of which the last 3 are cut.
    let stats = &outcome.completions[&0].stats;
    assert_eq!(stats.rounds.num_rounds, 3);
    assert_eq!(stats.rounds.accepted_length(), 4.0);
    assert_eq!(stats.rounds.verify_budget(), 4.0);
    assert_eq!(stats.rounds.accepted, [3, 3, 3]);
    assert_eq!(stats.rounds.acceptance_rates(), [1.0; 3]);
    assert_eq!(engine.totals(), &stats.rounds);
}

/// A letter per token, each shown one token late.
#[derive(Default)]
struct Letters(Option<char>);

impl TextStream for Letters {
    fn push(&mut self, token: u32) -> String {
        let letter = char::from(b'a' + token as u8);
        self.0.replace(letter).map(String::from).unwrap_or_default()
    }

    fn finish(&mut self) -> String {
        self.0.take().map(String::from).unwrap_or_default()
    }
}

fn letters(tokens: &[u32]) -> String {
    tokens.iter().map(|&t| char::from(b'a' + t as u8)).collect()
}

/// Runs one prompt with stop conditions, by a drafter whose blocks are all accepted.
fn run_stops(stop_tokens: Vec<u32>, stop_strings: Vec<String>, new: usize) -> Outcome {
    let sizes = Sizes::new(VOCAB_SIZE);
    let config = engine_config(&sizes, Policy::Fixed);
    let draft = agreeing_draft(&law(), VOCAB_SIZE, 3);
    let mut engine = engine(reference(), sizes, &law(), Some(&draft), config).unwrap();
    engine
        .submit(Request {
            stop_tokens,
            stop_strings,
            text: Some(Box::new(Letters::default())),
            ..Request::new(vec![2, 4], SamplingParams::default(), new)
        })
        .unwrap();
    run(&mut engine)
}

#[test]
fn stop_tokens_end_the_output_inside_a_round() {
    let plain = greedy(&law(), &[2, 4], 20);
    for stop in 0..VOCAB_SIZE as u32 {
        let outcome = run_stops(vec![stop, 99], vec![], 20);
        let done = &outcome.completions[&0];
        let at = plain.iter().position(|&t| t == stop);
        let end = at.map_or(20, |at| at + 1);
        assert_eq!(
            done.tokens,
            plain[..end],
            "the stop token is the last token"
        );
        assert_eq!(
            done.text,
            letters(&plain[..at.unwrap_or(20)]),
            "and no text"
        );
        let reason = at.map_or(FinishReason::MaxNewTokens, |_| FinishReason::StopToken);
        assert_eq!(done.reason, reason);
    }
}

#[test]
fn stop_strings_cut_the_text() {
    let plain = greedy(&law(), &[2, 4], 20);
    let text = letters(&plain);
    for at in 0..18 {
        let stop = &text[at..at + 2];
        let outcome = run_stops(vec![], vec!["zz".into(), stop.into()], 20);
        let done = &outcome.completions[&0];
        let found = text.find(stop).unwrap();
        assert_eq!(done.text, text[..found], "before `{stop}`");
        assert_eq!(done.reason, FinishReason::StopString);
        // The stream shows a letter one token late, so the string is complete one token later.
        assert_eq!(done.tokens, plain[..found + 3]);
    }
    // The last letter comes with the end of the stream only; a string completed by it still cuts the text.
    let done = &run_stops(vec![], vec![text[3..5].into()], 5).completions[&0];
    assert_eq!((done.text.as_str(), done.tokens.len()), (&text[..3], 5));
    // A possible beginning of a stop string is text after all at the end.
    let done = &run_stops(vec![], vec![format!("{}z", &text[3..5])], 5).completions[&0];
    assert_eq!(
        (done.text.as_str(), done.reason),
        (&text[..5], FinishReason::MaxNewTokens)
    );
}

#[test]
fn a_full_context_ends_the_output() {
    for draft_len in 1..=3 {
        for prompt_len in [1, 5, 11] {
            let mut sizes = Sizes::new(VOCAB_SIZE);
            sizes.max_position = 12;
            let config = EngineConfig {
                draft_len: Some(draft_len),
                ..engine_config(&sizes, Policy::Fixed)
            };
            let draft = agreeing_draft(&law(), VOCAB_SIZE, 3);
            let mut engine = engine(reference(), sizes, &law(), Some(&draft), config).unwrap();
            let prompt = vec![1; prompt_len];
            let request = Request::new(prompt.clone(), SamplingParams::default(), 100);
            engine.submit(request).unwrap();
            let outcome = run(&mut engine);
            assert_eq!(outcome.tokens(0), greedy(&law(), &prompt, 12 - prompt_len));
            assert_eq!(outcome.completions[&0].reason, FinishReason::Context);
        }
    }
}

#[test]
fn measuring_the_cost_leaves_no_trace() {
    let sizes = Sizes::new(VOCAB_SIZE);
    for num_pages in [64, 4] {
        let sizes = Sizes { num_pages, ..sizes };
        let config = EngineConfig {
            cost: None,
            ..engine_config(&sizes, Policy::Algorithm1)
        };
        let mut engine =
            engine(reference(), sizes, &law(), Some(&random_draft(3)), config).unwrap();
        assert_eq!(engine.pool().num_free(), num_pages);
        let cost = engine.step().scheduler().cost().unwrap().clone();
        // With 4 pages of 3 slots, two scratch sequences of 1 + 1 + 3 entries fit.
        let most = if num_pages == 64 { 16 } else { 8 };
        let points = cost.verify().points();
        assert_eq!((points[0].0, points.last().unwrap().0), (1, most));
        assert!(cost.draft().is_some());
        assert_eq!(engine.times(), dspark::step::PhaseTimes::default());
        for prompt in [vec![0, 1], vec![3]] {
            engine
                .submit(Request::new(prompt, SamplingParams::default(), 6))
                .unwrap();
        }
        let outcome = run(&mut engine);
        assert_eq!(outcome.tokens(0), greedy(&law(), &[0, 1], 6));
        assert_eq!(outcome.tokens(1), greedy(&law(), &[3], 6));
    }
}

/// A drafter without a confidence head is scheduled by estimates, also of sampled requests; peeking is for greedy ones.
#[test]
fn schedules_without_a_confidence_head_and_schedules_that_peek() {
    let sizes = Sizes::new(VOCAB_SIZE);
    let blind = DraftSpec {
        confidence: None,
        ..random_draft(3)
    };
    let sampled = SamplingParams {
        temperature: 1.0,
        ..SamplingParams::default()
    };
    for policy in [Policy::Threshold(0.5), Policy::Delayed, Policy::Global] {
        for draft in [&blind, &random_draft(3)] {
            let config = engine_config(&sizes, policy);
            let mut engine = engine(reference(), sizes, &law(), Some(draft), config).unwrap();
            engine.set_adapt(dspark::schedule::Adapt::ON);
            for (prompt, new) in prompts() {
                let request = Request::new(prompt, SamplingParams::default(), new);
                engine.submit(request).unwrap();
            }
            let refused = engine.submit(Request::new(vec![1], sampled, 4));
            assert_eq!(is_argument(refused, "schedule"), policy == Policy::Global);
            let outcome = run(&mut engine);
            for (i, (prompt, new)) in prompts().into_iter().enumerate() {
                assert_eq!(outcome.tokens(i), greedy(&law(), &prompt, new), "{policy}");
            }
            let rounds = &engine.totals();
            assert!(rounds.verified.iter().sum::<u64>() < rounds.proposed.iter().sum::<u64>());
            assert_eq!(rounds.predicted.len(), rounds.reached.len());
        }
    }
}

#[test]
fn counters_are_exposed_as_prometheus_text() {
    let sizes = Sizes::new(VOCAB_SIZE);
    let config = EngineConfig {
        sts_temperatures: Some(vec![2.0, 1.0, 0.5]),
        ..engine_config(&sizes, Policy::Delayed)
    };
    let mut engine = engine(reference(), sizes, &law(), Some(&random_draft(3)), config).unwrap();
    for (prompt, new) in prompts() {
        let request = Request::new(prompt, SamplingParams::default(), new);
        engine.submit(request).unwrap();
    }
    assert!(
        engine
            .prometheus()
            .contains("dspark_requests{state=\"waiting\"} 9\n")
    );
    run(&mut engine);
    let text = engine.prometheus();
    let sample = |name: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let totals = engine.totals();
    assert_eq!(sample("dspark_rounds_total "), totals.num_rounds as f64);
    for (name, counts) in [
        ("proposed", &totals.proposed),
        ("verified", &totals.verified),
        ("reached", &totals.reached),
        ("accepted", &totals.accepted),
    ] {
        let of_first = sample(&format!("dspark_drafts_{name}_total{{position=\"1\"}}"));
        assert_eq!(of_first, counts[0] as f64, "{name}");
    }
    let predicted = sample("dspark_drafts_predicted_total{position=\"1\"}");
    assert!((predicted - totals.predicted[0]).abs() < 1e-9);
    assert_eq!(sample("dspark_sts_temperature{position=\"3\"}"), 0.5);
    assert_eq!(sample("dspark_cost_factor{term=\"verify\"}"), 1.0);
    assert_eq!(sample("dspark_requests{state=\"running\"}"), 0.0);
    // Every sample belongs to a metric that was announced with its kind.
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        assert!(text.contains(&format!("# TYPE {name} ")), "{line}");
    }
}
