//! `--trace`: every request and round as JSON.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use dspark::engine::{Completion, RequestStats};
use dspark::ops::TokenLogprobs;
use dspark::schedule::simulate::RecordedRequest;
use dspark::schedule::sts::RecordedRound;
use dspark::step::{Round, StepRecord};
use dspark::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::report::Figures;

/// The file's root.
#[derive(Serialize)]
pub struct Trace<'a> {
    pub requests: Vec<TraceRequest<'a>>,
    pub stats: &'a Figures,
    /// Of all requests, in order of time.
    pub steps: &'a [StepRecord],
}

/// One request. The first token comes from the prefill and belongs to no round.
#[derive(Serialize)]
pub struct TraceRequest<'a> {
    pub prompt_ids: &'a [u32],
    /// What was generated, at most `--max-new-tokens`.
    pub tokens: &'a [u32],
    /// Of the tokens, with `--logprobs`.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub logprobs: &'a [TokenLogprobs],
    pub rounds: &'a [Round],
    /// Its counts and times.
    pub stats: &'a RequestStats,
}

impl<'a> TraceRequest<'a> {
    pub fn new(completion: &'a Completion) -> Self {
        Self {
            prompt_ids: &completion.prompt_ids,
            tokens: &completion.tokens,
            logprobs: &completion.logprobs,
            rounds: &completion.rounds,
            stats: &completion.stats,
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

/// The part of a trace that calibration and simulation read.
#[derive(Deserialize)]
struct Recorded {
    requests: Vec<RecordedRequest>,
}

/// The requests of traces that have rounds.
pub fn read_requests(files: &[PathBuf]) -> Result<Vec<RecordedRequest>> {
    let mut requests = Vec::new();
    for file in files {
        let bytes = std::fs::read(file).map_err(|source| Error::io(file, source))?;
        let recorded: Recorded = serde_json::from_slice(&bytes)
            .map_err(|error| Error::checkpoint(file, "trace", "what --trace writes", error))?;
        let with_rounds = recorded
            .requests
            .into_iter()
            .filter(|r| !r.rounds.is_empty());
        requests.extend(with_rounds);
    }
    Ok(requests)
}

/// The rounds of traces, one after the other.
pub fn read_rounds(files: &[PathBuf]) -> Result<Vec<RecordedRound>> {
    let requests = read_requests(files)?.into_iter();
    Ok(requests.flat_map(|request| request.rounds).collect())
}
