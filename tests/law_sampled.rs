//! The law of sampled generation with the real random numbers, through the engine: chi-square against the exact law,
//! false alarm about 1e-9 per assert. Shared noise, which no enumeration can see, must be caught.

mod fakes;

use std::collections::HashMap;

use dspark::engine::Request;
use dspark::ops::{Purpose, SamplingParams};
use dspark::reference::choices::{Choices, Draw, Philox};
use dspark::schedule::Policy;
use fakes::{
    DraftSpec, LogitsOf, Outcome, Sizes, chi_square_ratio, engine, engine_config, random_logits,
    reference, sequence_law,
};

const VOCAB_SIZE: usize = 4;
const PROMPT: [u32; 2] = [3, 1];
const NUM_TOKENS: usize = 3;

/// Draws of one purpose with the noise of another.
struct SharedNoise {
    purpose: Purpose,
    noise_of: Purpose,
}

impl SharedNoise {
    fn turn(&self, mut draw: Draw) -> Draw {
        if draw.purpose == self.purpose {
            draw.purpose = self.noise_of;
        }
        draw
    }
}

impl Choices for SharedNoise {
    fn categorical(&mut self, draw: Draw, weights: &[f64]) -> usize {
        Philox.categorical(self.turn(draw), weights)
    }

    fn accept(&mut self, draw: Draw, target_prob: f64, draft_prob: f64) -> bool {
        Philox.accept(self.turn(draw), target_prob, draft_prob)
    }
}

fn target_law() -> LogitsOf {
    random_logits(VOCAB_SIZE, 21, 0.8)
}

fn params(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.8,
        seed,
        ..SamplingParams::default()
    }
}

/// How far 20000 sampled outputs are from the target's law; above 1 is a wrong law.
fn ratio(choices: Box<dyn Choices>, policy: Policy) -> f64 {
    let sizes = Sizes::new(VOCAB_SIZE);
    let law = target_law();
    let draft = DraftSpec::random(VOCAB_SIZE, 31, 2);
    let config = engine_config(&sizes, policy);
    let ops = reference().with_choices(choices);
    let mut engine = engine(ops, sizes, &law, Some(&draft), config).unwrap();
    for seed in 0..20_000 {
        let request = Request::new(PROMPT.to_vec(), params(seed), NUM_TOKENS);
        engine.submit(request).unwrap();
    }
    let mut outcome = Outcome::default();
    let mut counts = HashMap::new();
    engine.run(|event| outcome.take(event)).unwrap();
    for completion in outcome.completions.into_values() {
        *counts.entry(completion.tokens).or_insert(0) += 1;
    }
    chi_square_ratio(
        &counts,
        &sequence_law(&law, &PROMPT, &params(0), NUM_TOKENS),
    )
}

#[test]
fn sampled_outputs_have_the_targets_law() {
    for policy in [Policy::Fixed, Policy::Threshold(0.5), Policy::Algorithm1] {
        let ratio = ratio(Box::new(Philox), policy);
        assert!(ratio < 1.0, "{policy}: {ratio} times the limit");
    }
}

#[test]
fn a_residual_with_the_drafts_noise_is_caught() {
    let shared = SharedNoise {
        purpose: Purpose::Residual,
        noise_of: Purpose::Draft,
    };
    let ratio = ratio(Box::new(shared), Policy::Fixed);
    assert!(ratio > 1.0, "{ratio} times the limit only");
}

#[test]
fn acceptance_with_the_drafts_noise_is_caught() {
    let shared = SharedNoise {
        purpose: Purpose::Accept,
        noise_of: Purpose::Draft,
    };
    let ratio = ratio(Box::new(shared), Policy::Fixed);
    assert!(ratio > 1.0, "{ratio} times the limit only");
}
