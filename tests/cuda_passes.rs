//! Passes that are replayed as graphs give bit for bit what they give launch by launch: tokens and log-probabilities of whole
//! outputs, while requests join, leave and grow past the bounds of a recording.
#![cfg(feature = "cuda")]

mod common;
mod end_to_end_support;
mod model_support;

use common::gpu;
use dspark::engine::Completion;
use dspark::ops::cuda::Cuda;
use dspark::schedule::Policy;
use end_to_end_support::{Ask, BATCHES, Batch, Models, Setting, golden_prompts};

/// Every prompt greedily and sampled, long enough for hundreds of cache entries.
fn asks(models: Models, num_tokens: usize) -> Vec<Ask> {
    let prompts = golden_prompts(models.target).into_iter().enumerate();
    let both = prompts.flat_map(|(i, (prompt, _))| {
        let sampled = Ask::sampled(prompt.clone(), num_tokens, 0.8, i as u64);
        [Ask::greedy(prompt, num_tokens + i), sampled]
    });
    both.collect()
}

fn run(setting: &Setting, asks: &[Ask], mut cuda: Cuda, recording: bool) -> Vec<Completion> {
    cuda.set_recording(recording);
    setting.run_with(cuda, asks, |_, request| request.logprobs = Some(2))
}

#[test]
fn replayed_passes_are_the_same_to_the_bit() {
    let Some(gpu) = gpu() else { return };
    let device = gpu.device().clone();
    let open = || Cuda::new(device.clone()).unwrap();
    for (drafter, draft_len) in [
        (None, 0),
        (Some("qwen3_vanilla"), 7),
        (Some("qwen3_rnn"), 3),
        (Some("qwen3_mtp"), 2),
    ] {
        let models = drafter.map_or(Models::alone("qwen3_bf16"), Models::of_drafter);
        for batch in BATCHES {
            // Past 256 entries, where launches get another bound; the context holds it.
            let num_tokens = if matches!(batch, Batch::Together) {
                300
            } else {
                40
            };
            let policies = if models.has_confidence() {
                &[Policy::Fixed, Policy::Threshold(0.5)][..]
            } else {
                &[Policy::Fixed]
            };
            for &policy in policies {
                let setting = Setting {
                    models,
                    draft_len,
                    policy,
                    batch,
                };
                let asks = asks(models, num_tokens);
                let eager = run(&setting, &asks, open(), false);
                let replayed = run(&setting, &asks, open(), true);
                for (eager, replayed) in eager.iter().zip(&replayed) {
                    assert_eq!(eager.tokens, replayed.tokens, "{setting:?}");
                    assert_eq!(eager.logprobs, replayed.logprobs, "{setting:?}");
                }
            }
        }
    }
}
