//! `--trace`: every request and round as JSON.

use std::path::Path;

use dspark::engine::Completion;
use dspark::step::Round;
use dspark::{Error, Result};
use serde::Serialize;

use crate::report::Figures;

/// The file's root.
#[derive(Serialize)]
pub struct Trace<'a> {
    pub requests: Vec<TraceRequest<'a>>,
    pub stats: &'a Figures,
}

/// One request. The first token comes from the prefill and belongs to no round.
#[derive(Serialize)]
pub struct TraceRequest<'a> {
    pub prompt_ids: &'a [u32],
    /// What was generated, at most `--max-new-tokens`.
    pub tokens: &'a [u32],
    pub rounds: &'a [Round],
}

impl<'a> TraceRequest<'a> {
    pub fn new(completion: &'a Completion) -> Self {
        Self {
            prompt_ids: &completion.prompt_ids,
            tokens: &completion.tokens,
            rounds: &completion.rounds,
        }
    }
}

impl Trace<'_> {
    /// Writes the file.
    pub fn write(&self, file: &Path) -> Result<()> {
        let json =
            serde_json::to_vec(self).map_err(|e| Error::io(file, std::io::Error::other(e)))?;
        std::fs::write(file, json).map_err(|source| Error::io(file, source))
    }
}
