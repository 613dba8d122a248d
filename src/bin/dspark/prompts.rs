//! Prompts: from the command line or a JSONL file, to token ids.

use std::num::NonZeroUsize;
use std::path::Path;

use dspark::engine::text::Tokenizer;
use dspark::{Error, Result};
use serde::Deserialize;

use crate::args::{PairsArgs, PromptArgs};

/// One line of a prompts file.
#[derive(Deserialize)]
#[serde(untagged)]
enum PromptLine {
    Turns { turns: Vec<String> },
    Text { prompt: String },
    Ids { prompt_ids: Vec<u32> },
}

/// Token ids of every prompt, in order.
pub fn load(args: &PromptArgs, tokenizer: Option<&Tokenizer>, raw: bool) -> Result<Vec<Vec<u32>>> {
    if let Some(ids) = &args.prompt_ids {
        return Ok(vec![ids.0.clone()]);
    }
    if let Some(text) = &args.prompt {
        return Ok(vec![encode(tokenizer, text, raw)?]);
    }
    args.prompts
        .as_deref()
        .map_or_else(|| Ok(Vec::new()), |file| load_file(file, tokenizer, raw))
}

/// The first `--limit` prompts of `args`, or all.
pub fn load_first(args: &PairsArgs, tokenizer: Option<&Tokenizer>) -> Result<Vec<Vec<u32>>> {
    let mut prompts = load(&args.prompts, tokenizer, args.sampling.raw)?;
    prompts.truncate(args.limit.map_or(prompts.len(), NonZeroUsize::get));
    Ok(prompts)
}

fn load_file(file: &Path, tokenizer: Option<&Tokenizer>, raw: bool) -> Result<Vec<Vec<u32>>> {
    let text = std::fs::read_to_string(file).map_err(|source| Error::io(file, source))?;
    let mut prompts = Vec::new();
    for (number, line) in text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
    {
        let bad = |found: &str| {
            let expected =
                "{\"turns\": [text, ...]}, {\"prompt\": text} or {\"prompt_ids\": [id, ...]}";
            Error::checkpoint(file, format!("line {}", number + 1), expected, found)
        };
        prompts.push(
            match serde_json::from_str(line).map_err(|_| bad(&shorten(line)))? {
                PromptLine::Turns { turns } => encode(
                    tokenizer,
                    turns.first().ok_or_else(|| bad("no turns"))?,
                    raw,
                )?,
                PromptLine::Text { prompt } => encode(tokenizer, &prompt, raw)?,
                PromptLine::Ids { prompt_ids } => prompt_ids,
            },
        );
    }
    if prompts.is_empty() {
        return Err(Error::checkpoint(
            file,
            "prompts",
            "at least one line",
            "none",
        ));
    }
    Ok(prompts)
}

fn encode(tokenizer: Option<&Tokenizer>, text: &str, raw: bool) -> Result<Vec<u32>> {
    let expected = "token ids (--prompt-ids), as the target has no tokenizer.json";
    tokenizer
        .ok_or_else(|| Error::argument("prompt", expected, "text"))?
        .encode_prompt(text, raw)
}

fn shorten(line: &str) -> String {
    line.chars().take(60).collect()
}
