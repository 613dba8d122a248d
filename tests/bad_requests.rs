//! The engine on bad input: requests, configurations, logits that are no law.

mod fakes;

use std::rc::Rc;

use dspark::Error;
use dspark::engine::{EngineConfig, Request};
use dspark::ops::SamplingParams;
use dspark::schedule::Policy;
use fakes::{
    DraftSpec, LogitsOf, Sizes, engine, engine_config, is_argument, random_logits, reference, run,
};

const VOCAB_SIZE: usize = 5;

fn law() -> LogitsOf {
    random_logits(VOCAB_SIZE, 77, 2.0)
}

fn random_draft(draft_len: usize) -> DraftSpec {
    DraftSpec::random(VOCAB_SIZE, 78, draft_len)
}

#[test]
fn bad_requests_are_refused() {
    let sizes = Sizes {
        num_pages: 10,
        ..Sizes::new(VOCAB_SIZE)
    };
    let config = engine_config(&sizes, Policy::Fixed);
    let mut engine = engine(reference(), sizes, &law(), Some(&random_draft(3)), config).unwrap();
    let good = || Request::new(vec![0], SamplingParams::default(), 4);
    let sampling = |change: fn(&mut SamplingParams)| {
        let mut request = good();
        change(&mut request.sampling);
        request
    };
    let bad = [
        (
            "prompt",
            Request {
                prompt_ids: vec![],
                ..good()
            },
        ),
        (
            "prompt",
            Request {
                prompt_ids: vec![0, 5],
                ..good()
            },
        ),
        (
            "prompt",
            Request {
                prompt_ids: vec![0; 64],
                ..good()
            },
        ),
        (
            "max_new_tokens",
            Request {
                max_new_tokens: 0,
                ..good()
            },
        ),
        (
            "stop_strings",
            Request {
                stop_strings: vec!["a".into()],
                ..good()
            },
        ),
        (
            "stop_strings",
            Request {
                stop_strings: vec![String::new()],
                ..good()
            },
        ),
        ("temperature", sampling(|s| s.temperature = -1.0)),
        ("temperature", sampling(|s| s.temperature = f32::NAN)),
        ("top_p", sampling(|s| s.top_p = 0.0)),
        ("min_p", sampling(|s| s.min_p = 1.0)),
        // 1 + 26 + 3 + 1 entries; the pool has 30.
        (
            "num_pages",
            Request {
                max_new_tokens: 26,
                ..good()
            },
        ),
        (
            "num_pages",
            Request {
                max_new_tokens: usize::MAX,
                ..good()
            },
        ),
    ];
    for (field, request) in bad {
        assert!(is_argument(engine.submit(request), field), "{field}");
    }
    assert!(engine.is_idle());
    engine
        .submit(Request {
            max_new_tokens: 25,
            ..good()
        })
        .unwrap();
    assert_eq!(run(&mut engine).tokens(0).len(), 25);
}

#[test]
fn bad_configurations_are_refused() {
    let sizes = Sizes::new(VOCAB_SIZE);
    let build = |draft: Option<DraftSpec>, change: &dyn Fn(&mut EngineConfig)| {
        let mut config = engine_config(&sizes, Policy::Fixed);
        change(&mut config);
        engine(reference(), sizes, &law(), draft.as_ref(), config)
    };
    let draft = || Some(random_draft(3));
    let blind = || {
        Some(DraftSpec {
            confidence: None,
            ..random_draft(3)
        })
    };
    assert!(is_argument(build(None, &|c| c.num_pages = 0), "num_pages"));
    assert!(is_argument(build(None, &|c| c.page_size = 0), "page_size"));
    assert!(is_argument(
        build(None, &|c| c.max_num_reqs = 0),
        "max_num_reqs"
    ));
    assert!(is_argument(
        build(None, &|c| c.prefill_chunk = 0),
        "prefill_chunk"
    ));
    assert!(is_argument(
        build(None, &|c| c.draft_len = Some(1)),
        "draft_len"
    ));
    assert!(is_argument(
        build(draft(), &|c| c.draft_len = Some(4)),
        "draft_len"
    ));
    assert!(is_argument(
        build(draft(), &|c| c.draft_len = Some(0)),
        "draft_len"
    ));
    for policy in [Policy::Threshold(0.5), Policy::Algorithm1] {
        assert!(
            build(blind(), &|c| c.policy = policy).is_ok(),
            "confidences are estimated"
        );
        let error = build(None, &|c| c.policy = policy)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("a drafter for"), "{error}");
    }
    assert!(is_argument(
        build(draft(), &|c| c.policy = Policy::Threshold(1.5)),
        "threshold"
    ));
    let cold = |c: &mut EngineConfig| c.sts_temperatures = Some(vec![0.0; 3]);
    assert!(is_argument(build(draft(), &cold), "sts_temperatures"));
}

#[test]
fn logits_that_are_no_law_name_their_request() {
    let sizes = Sizes::new(VOCAB_SIZE);
    for bad_len in [3, 5] {
        let law: LogitsOf = Rc::new(move |history| match history {
            [4, ..] if history.len() == bad_len => vec![f32::NAN; VOCAB_SIZE],
            _ => vec![0.0; VOCAB_SIZE],
        });
        let config = engine_config(&sizes, Policy::Fixed);
        let mut engine = engine(reference(), sizes, &law, Some(&random_draft(2)), config).unwrap();
        for prompt in [vec![0, 0], vec![1], vec![4, 0, 0]] {
            let params = SamplingParams {
                temperature: 1.0,
                ..SamplingParams::default()
            };
            engine.submit(Request::new(prompt, params, 8)).unwrap();
        }
        let error = engine.run(|_| ()).unwrap_err();
        assert!(
            matches!(error, Error::BadLogits { request: 2, .. }),
            "{error}"
        );
    }
}
