//! Top-k, top-p and min-p against the logits processors of Hugging Face's transformers (tests/goldens/filters), and the
//! log-probabilities that acceptance reports against the law they make.

mod model_support;

use dspark::ops::{AcceptBatch, AcceptExtras, DraftLaw, Ops, SamplingParams};
use dspark::reference::{Reference, law};
use model_support::{Golden, goldens};

const VOCAB_SIZE: usize = 257;

struct Case {
    name: String,
    logits: Vec<f32>,
    probs: Vec<f32>,
    params: SamplingParams,
}

fn cases() -> Vec<Case> {
    let golden = Golden::read(&goldens().join("filters"));
    let row = |name: &str, i: usize| golden.tensor(name)[i * VOCAB_SIZE..][..VOCAB_SIZE].to_vec();
    let cases = golden.list("cases").iter().enumerate();
    let cases = cases.map(|(i, case)| {
        let float = |key: &str| case[key].as_f64().unwrap() as f32;
        Case {
            name: case.to_string(),
            logits: row("logits", case["row"].as_u64().unwrap() as usize),
            probs: row("probs", i),
            params: SamplingParams {
                temperature: float("temperature"),
                top_k: case["top_k"].as_u64().unwrap() as u32,
                top_p: float("top_p"),
                min_p: float("min_p"),
                ..SamplingParams::default()
            },
        }
    });
    cases.collect()
}

/// Our law is the golden one. Where ours keeps more tokens they must be tied with the least likely one of the golden's:
/// transformers cuts ties at the top-p threshold by sorting order, we keep them all.
fn check(case: &Case, law: &[f64]) {
    let kept = |v: &usize| case.probs[*v] > 0.0;
    let least = (0..VOCAB_SIZE).filter(kept).map(|v| case.logits[v]);
    let least = least.fold(f32::INFINITY, f32::min);
    let mut tied = false;
    for (v, &ours) in law.iter().enumerate() {
        if kept(&v) {
            assert!(ours > 0.0, "{}: token {v} is out", case.name);
        } else if ours > 0.0 {
            assert_eq!(case.logits[v], least, "{}: token {v} is in", case.name);
            tied = true;
        }
    }
    for (v, (ours, &theirs)) in law.iter().zip(&case.probs).enumerate() {
        let close = (ours - f64::from(theirs)).abs() < 1e-6;
        assert!(tied || close, "{}: token {v}: {ours} {theirs}", case.name);
    }
}

#[test]
fn filters_agree_with_transformers() {
    let cases = cases();
    assert!(cases.len() > 40);
    for case in &cases {
        check(case, &law::target_law(&case.logits, &case.params));
    }
}

#[test]
fn the_comparison_fails_on_another_filter() {
    let case = cases().into_iter().find(|c| c.params.top_k == 20).unwrap();
    let other = SamplingParams {
        top_k: 21,
        ..case.params
    };
    let found = law::target_law(&case.logits, &other);
    assert!(std::panic::catch_unwind(|| check(&case, &found)).is_err());
}

/// Log-probabilities of the likeliest 20 tokens, all cases in one call.
fn logprobs_agree(ops: &mut impl Ops) {
    let cases = cases();
    let rows: Vec<f32> = cases.iter().flat_map(|c| c.logits.clone()).collect();
    let mut target = ops.logits(cases.len(), VOCAB_SIZE).unwrap();
    ops.write_logits(&rows, &mut target).unwrap();
    let sampling: Vec<SamplingParams> = cases.iter().map(|c| c.params).collect();
    let qo_indptr: Vec<i32> = (0..=cases.len() as i32).collect();
    let accepted = ops
        .accept(&AcceptBatch {
            target: &target,
            qo_indptr: &qo_indptr,
            draft_tokens: &[],
            draft_len: 0,
            law: DraftLaw::PointMass,
            anchor_positions: &vec![5; cases.len()],
            sampling: &sampling,
            extras: AcceptExtras {
                logprobs: Some(20),
                ..AcceptExtras::default()
            },
        })
        .unwrap();
    for (r, case) in cases.iter().enumerate() {
        let law = law::target_law(&case.logits, &case.params);
        let found = &accepted.logprobs[r][0];
        let close = |logprob: f32, token: u32| {
            let wanted = law[token as usize].ln();
            let off = (f64::from(logprob) - wanted).abs();
            assert!(
                off < 1e-4,
                "{}: token {token}: {logprob} {wanted}",
                case.name
            );
        };
        close(found.logprob, accepted.next_tokens[r]);
        let num_kept = law.iter().filter(|&&p| p > 0.0).count();
        assert_eq!(found.top.len(), num_kept.min(20), "{}", case.name);
        for &(token, logprob) in &found.top {
            close(logprob, token);
        }
        let in_order = |a: &(u32, f32), b: &(u32, f32)| {
            let logit = |token: u32| case.logits[token as usize];
            logit(a.0) > logit(b.0) || (logit(a.0) == logit(b.0) && a.0 < b.0)
        };
        assert!(found.top.is_sorted_by(in_order), "{}", case.name);
    }
}

#[test]
fn logprobs_are_the_logarithm_of_the_law() {
    logprobs_agree(&mut Reference::new(Some(1)).unwrap());
}

#[cfg(feature = "cuda")]
#[test]
fn logprobs_are_the_logarithm_of_the_law_on_the_gpu() {
    match dspark::ops::cuda::Cuda::open(0) {
        Ok(mut cuda) => logprobs_agree(&mut cuda),
        Err(error) => {
            let required = std::env::var("DSPARK_REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(!required, "DSPARK_REQUIRE_GPU=1, but: {error}");
            println!("skipped: no CUDA device ({error})");
        }
    }
}
