//! `cost.json`: a profiled step cost, with what it was profiled on.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::calibration::{PairIdentity, check_pair, read_json, write_json};
use super::cost::{CostTable, StepCost};
use crate::error::{Error, Result};

/// The format written and read here.
const VERSION: u32 = 1;

/// Where a cost holds. The strings are compared, not understood.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CostIdentity {
    /// The models.
    #[serde(flatten)]
    pub pair: PairIdentity,
    /// The backend and its device.
    pub device: String,
    /// The build of this crate.
    pub build: String,
    /// Tokens drafted per round; 0 without a drafter.
    pub draft_len: usize,
}

impl CostIdentity {
    /// Identity of what this build measures on `device`.
    pub fn of_this_build(pair: PairIdentity, device: String, draft_len: usize) -> Self {
        let profile = if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        };
        Self {
            pair,
            device,
            build: format!("dspark {} {profile}", env!("CARGO_PKG_VERSION")),
            draft_len,
        }
    }
}

/// The file's root.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostFile {
    /// The format; 1.
    pub version: u32,
    /// How the numbers came to be: "measured", or what they are derived from.
    pub source: String,
    /// Where they hold.
    pub identity: CostIdentity,
    /// `(rows, seconds)` of the target's pass at no context, rising in both.
    pub verify: Vec<(usize, f64)>,
    /// `(requests, seconds)` of drafting; empty without a drafter.
    pub draft: Vec<(usize, f64)>,
    /// Seconds of a pass for each cache entry attended to.
    pub seconds_per_context_token: f64,
    /// Seconds of a draft for each cache entry.
    #[serde(default)]
    pub draft_seconds_per_context_token: f64,
    /// Row counts that passes are padded to; empty when they are not.
    pub buckets: Vec<usize>,
}

impl CostFile {
    /// The file of `cost`.
    pub fn new(cost: &StepCost, identity: CostIdentity, source: impl Into<String>) -> Self {
        Self {
            version: VERSION,
            source: source.into(),
            identity,
            verify: cost.verify().points().to_vec(),
            draft: cost.draft().map_or(Vec::new(), |d| d.points().to_vec()),
            seconds_per_context_token: cost.seconds_per_context_token(),
            draft_seconds_per_context_token: cost.draft_seconds_per_context_token(),
            buckets: cost.buckets().to_vec(),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Checkpoint`] naming the file and the place.
    pub fn read(file: &Path) -> Result<Self> {
        let held: Self = read_json(file)?;
        if held.version != VERSION {
            return Err(Error::checkpoint(
                file,
                "version",
                VERSION.to_string(),
                held.version,
            ));
        }
        Ok(held)
    }

    /// The cost. `file` is named in errors.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a table that is empty, falls, or holds what is no cost.
    pub fn cost(&self, file: &Path) -> Result<StepCost> {
        let in_file = |error: Error| match error {
            Error::Argument {
                field,
                expected,
                found,
            } => Error::checkpoint(file, field, expected, found),
            other => other,
        };
        let table = |field: &str, points: &[(usize, f64)]| {
            let rises = |low: (usize, f64), high: (usize, f64)| low.0 < high.0 && low.1 <= high.1;
            let mut pairs = points.iter().zip(points.iter().skip(1));
            if let Some((low, high)) = pairs.find(|(low, high)| !rises(**low, **high)) {
                let found = format!("{high:?} after {low:?}");
                let expected = "rising counts and seconds that do not fall";
                return Err(Error::checkpoint(file, field, expected, found));
            }
            CostTable::new(points.to_vec()).map_err(in_file)
        };
        let verify = table("verify", &self.verify)?;
        let draft = match self.identity.draft_len {
            0 => None,
            _ => Some(table("draft", &self.draft)?),
        };
        StepCost::new(verify, draft)
            .with_context(self.seconds_per_context_token)
            .and_then(|cost| cost.with_draft_context(self.draft_seconds_per_context_token))
            .and_then(|cost| cost.with_buckets(self.buckets.clone()))
            .map_err(in_file)
    }

    /// Refuses a cost of other models, another device, build or draft length.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming `file` and the field.
    pub fn check(&self, file: &Path, wanted: &CostIdentity) -> Result<()> {
        let held = &self.identity;
        check_pair(file, &held.pair, &wanted.pair)?;
        let bad = |field: &str, wanted: &dyn ToString, held: &dyn ToString| {
            Err(Error::checkpoint(
                file,
                field,
                wanted.to_string(),
                held.to_string(),
            ))
        };
        if held.device != wanted.device {
            return bad("device", &wanted.device, &held.device);
        }
        if held.build != wanted.build {
            return bad("build", &wanted.build, &held.build);
        }
        if held.draft_len != wanted.draft_len {
            return bad("draft_len", &wanted.draft_len, &held.draft_len);
        }
        Ok(())
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, file: &Path) -> Result<()> {
        write_json(file, self)
    }
}
