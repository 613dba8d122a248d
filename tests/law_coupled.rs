//! Under the coupled rule the text is a function of seed and target alone: the same for any drafter, draft length, schedule
//! and batch as for plain decoding. And what comes before the temperature (penalties, biases) reaches every row of a
//! round, so that greedy decoding with penalties is the one written out by hand.

mod fakes;

use dspark::engine::{EngineConfig, Request};
use dspark::ops::{Rule, SamplingParams};
use dspark::schedule::Policy;
use fakes::{
    DraftSpec, LogitsOf, Outcome, Sizes, agreeing_draft, engine, engine_config, random_logits,
    reference,
};

const VOCAB_SIZE: usize = 7;
const NUM_TOKENS: usize = 12;
const NUM_REQUESTS: usize = 40;

fn target() -> LogitsOf {
    random_logits(VOCAB_SIZE, 21, 2.0)
}

fn prompt(i: usize) -> Vec<u32> {
    (0..=i % 5)
        .map(|k| ((i * 3 + k * k) % VOCAB_SIZE) as u32)
        .collect()
}

fn params(i: usize, rule: Rule) -> SamplingParams {
    SamplingParams {
        temperature: 0.7,
        top_k: [0, 4][i % 2],
        top_p: [1.0, 0.9, 1.0][i % 3],
        seed: 1000 + i as u64,
        rule,
        presence_penalty: [0.0, 0.6][i / 2 % 2],
        frequency_penalty: [0.0, 0.0, 0.3][i / 4 % 3],
        ..SamplingParams::default()
    }
}

/// The outputs of all requests, and how many drafts were accepted.
fn outputs(
    draft: Option<&DraftSpec>,
    config: EngineConfig,
    params: impl Fn(usize) -> SamplingParams,
) -> (Vec<Vec<u32>>, usize) {
    let sizes = Sizes::new(VOCAB_SIZE);
    let mut engine = engine(reference(), sizes, &target(), draft, config).unwrap();
    for i in 0..NUM_REQUESTS {
        let mut request = Request::new(prompt(i), params(i), NUM_TOKENS);
        request.logit_bias = vec![(3, -1.0); i % 2];
        engine.submit(request).unwrap();
    }
    let mut outcome = Outcome::default();
    engine.run(|event| outcome.take(event)).unwrap();
    let accepted = outcome.completions.values().flat_map(|c| &c.rounds);
    let accepted = accepted.map(|round| round.num_accepted).sum();
    let tokens = (0..NUM_REQUESTS).map(|i| outcome.tokens(i).to_vec());
    (tokens.collect(), accepted)
}

#[test]
fn coupled_output_is_plain_decodings() {
    let sizes = Sizes::new(VOCAB_SIZE);
    let plain_config = engine_config(&sizes, Policy::Fixed);
    let coupled = |i| params(i, Rule::Coupled);
    let (plain, _) = outputs(None, plain_config.clone(), coupled);
    // Plain decoding draws the same under the rules that share no noise with drafts.
    let unshared = [Rule::Token, Rule::Block]
        .map(|rule| outputs(None, plain_config.clone(), |i| params(i, rule)).0);
    assert_eq!(unshared[0], unshared[1]);
    assert_ne!(unshared[0], plain);
    let drafts = [
        DraftSpec::random(VOCAB_SIZE, 5, 3),
        agreeing_draft(&target(), VOCAB_SIZE, 3),
    ];
    let mut most = 0;
    for draft in &drafts {
        for policy in [Policy::Fixed, Policy::Threshold(0.5), Policy::Algorithm1] {
            for (draft_len, max_num_reqs) in [(1, 1), (2, 4), (3, 3)] {
                let config = EngineConfig {
                    draft_len: Some(draft_len),
                    max_num_reqs,
                    ..engine_config(&sizes, policy)
                };
                let (found, accepted) = outputs(Some(draft), config, coupled);
                assert_eq!(found, plain, "{policy} draft_len {draft_len}");
                most = most.max(accepted);
            }
        }
    }
    assert!(
        most > NUM_REQUESTS,
        "drafts were hardly ever accepted: {most}"
    );
    // The other rules keep the law, not the text.
    let config = engine_config(&sizes, Policy::Fixed);
    let (token, _) = outputs(Some(&drafts[0]), config, |i| params(i, Rule::Token));
    assert_ne!(token, plain);
}

#[test]
fn greedy_output_with_penalties_is_the_one_by_hand() {
    let greedy = |i: usize| SamplingParams {
        temperature: 0.0,
        repetition_penalty: [1.0, 1.3][i % 2],
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..SamplingParams::default()
    };
    let by_hand = |i: usize| {
        let (mut history, params) = (prompt(i), greedy(i));
        let prompt_len = history.len();
        for _ in 0..NUM_TOKENS {
            let mut logits = target()(&history);
            for (v, logit) in logits.iter_mut().enumerate() {
                let is_v = |&&t: &&u32| t as usize == v;
                if history.iter().any(|t| is_v(&t)) {
                    *logit = if *logit > 0.0 {
                        *logit / params.repetition_penalty
                    } else {
                        *logit * params.repetition_penalty
                    };
                }
                let count = history[prompt_len..].iter().filter(is_v).count();
                if count > 0 {
                    *logit -= params.frequency_penalty * count as f32;
                    *logit -= params.presence_penalty;
                }
                if v == 3 && i % 2 == 1 {
                    *logit -= 1.0;
                }
            }
            let best = (0..VOCAB_SIZE)
                .rev()
                .max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            history.push(best.unwrap() as u32);
        }
        history.split_off(prompt_len)
    };
    let wanted: Vec<Vec<u32>> = (0..NUM_REQUESTS).map(by_hand).collect();
    let sizes = Sizes::new(VOCAB_SIZE);
    let draft = agreeing_draft(&target(), VOCAB_SIZE, 3);
    let config = engine_config(&sizes, Policy::Fixed);
    assert_eq!(outputs(None, config.clone(), greedy).0, wanted);
    let (found, accepted) = outputs(Some(&draft), config, greedy);
    assert_eq!(found, wanted);
    assert!(accepted > 0);
}
