//! Loads a target and its drafter and streams the answer to one question.
//!
//! ```sh
//! cargo run --release --example generate -- Qwen3-4B dspark_qwen3_4b_block7 "Why is the sky blue?"
//! ```
use std::io::Write;
use std::path::PathBuf;

use dspark::engine::text::Tokenizer;
use dspark::engine::{Engine, EngineConfig, Event, Request};
use dspark::model::{DrafterConfig, GenerationConfig, Limits, Pair};
use dspark::ops::SamplingParams;
use dspark::reference::Reference;
use dspark::schedule::Policy;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [target, draft, question] = std::env::args()
        .skip(1)
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| "usage: generate TARGET DRAFT QUESTION")?;
    let (target, draft) = (PathBuf::from(target), PathBuf::from(draft));

    // One request at a time, up to 1024 tokens with its prompt; everything is allocated once, for these sizes.
    let draft_len = DrafterConfig::read(&draft)?.max_draft_len();
    let config = EngineConfig {
        max_num_reqs: 1,
        num_pages: 64,
        page_size: 16,
        prefill_chunk: 256,
        draft_len: Some(draft_len),
        policy: Policy::Fixed,
        sts_temperatures: None,
        cost: None,
    };
    let limits = Limits {
        max_num_reqs: config.max_num_reqs,
        max_rows: config.max_rows(draft_len),
        max_logit_rows: config.max_num_reqs * (1 + draft_len),
        max_draft_len: draft_len,
        num_pages: config.num_pages,
        page_size: config.page_size,
    };

    // The backend: plain Rust here, `dspark::ops::cuda::Cuda::open(0)?` on a GPU.
    let mut ops = Reference::new(None)?;
    let pair = Pair::load(&mut ops, &target, Some(&draft), &limits)?;
    let mut engine = Engine::new(ops, Box::new(pair.target), pair.drafter, config)?;

    let tokenizer = Tokenizer::load(&target)?;
    let prompt = tokenizer.encode_prompt(&question, false)?;
    let sampling = SamplingParams {
        temperature: 0.7,
        seed: 1,
        ..SamplingParams::default()
    };
    engine.submit(Request {
        stop_tokens: GenerationConfig::read(&target)?.eos_token_ids,
        text: Some(Box::new(tokenizer.stream())),
        ..Request::new(prompt, sampling, 256)
    })?;

    let mut out = std::io::stdout().lock();
    while !engine.is_idle() {
        for event in engine.advance()? {
            match event {
                Event::Tokens { pieces, .. } => {
                    for piece in pieces {
                        write!(out, "{}", piece.text)?;
                    }
                    out.flush()?;
                }
                Event::Finished { completion, .. } => {
                    let length = completion.stats.rounds.accepted_length();
                    writeln!(out, "\n({length:.2} tokens per round)")?;
                }
            }
        }
    }
    Ok(())
}
