//! `--trace`: every request and round as JSON.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

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

/// The file, opened before any work is done that would be lost without it.
pub struct TraceFile {
    path: PathBuf,
    file: File,
}

impl TraceFile {
    /// Makes or empties the file.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|source| Error::io(path, source))?;
        Ok(Self {
            path: path.into(),
            file,
        })
    }

    /// Writes the whole trace.
    pub fn write(mut self, trace: &Trace<'_>) -> Result<()> {
        let json = serde_json::to_vec(trace).map_err(std::io::Error::other);
        json.and_then(|json| self.file.write_all(&json))
            .map_err(|source| Error::io(&self.path, source))
    }
}
