//! `calibration.json`: the temperatures of a drafter on a target, and how good they are.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::sts::{PositionFit, RecordedRound, fit_temperatures, report};
use super::survival::validate_temperatures;
use crate::error::{Error, Result};

/// The file's name inside a drafter's directory.
pub const CALIBRATION_FILE: &str = "calibration.json";

/// The format written and read here.
const VERSION: u32 = 1;

/// Which models a file was made with. The strings are compared, not understood.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairIdentity {
    /// The target's shape.
    pub target: String,
    /// The drafter's shape and weights; empty without a drafter.
    pub drafter: String,
}

/// Temperatures fitted to recorded rounds of one pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// The format; 1.
    pub version: u32,
    /// The pair.
    pub pair: PairIdentity,
    /// Drafted tokens per round the fit covers.
    pub draft_len: usize,
    /// Rounds it was fitted to.
    pub num_rounds: usize,
    /// `[draft_len]`.
    pub temperatures: Vec<f32>,
    /// Errors by position before and after, on the rounds of the fit.
    pub positions: Vec<PositionFit>,
    /// The same on rounds that were held out; empty when none were.
    pub held_out: Vec<PositionFit>,
}

impl Calibration {
    /// Fits `rounds` and judges the fit on them and on `held_out`.
    ///
    /// # Errors
    /// Those of [`fit_temperatures`].
    pub fn fit(
        pair: PairIdentity,
        draft_len: usize,
        rounds: &[RecordedRound],
        held_out: &[RecordedRound],
    ) -> Result<Self> {
        let temperatures = fit_temperatures(rounds, draft_len)?;
        Ok(Self {
            version: VERSION,
            pair,
            draft_len,
            num_rounds: rounds.len(),
            positions: report(rounds, &temperatures),
            held_out: match held_out {
                [] => Vec::new(),
                _ => report(held_out, &temperatures),
            },
            temperatures,
        })
    }

    /// Reads a file and checks that it is one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Checkpoint`] naming the file and the field.
    pub fn read(file: &Path) -> Result<Self> {
        let calibration: Self = read_json(file)?;
        let bad = |field: &str, expected: String, found: String| {
            Err(Error::checkpoint(file, field, expected, found))
        };
        let (len, found) = (calibration.draft_len, calibration.temperatures.len());
        if calibration.version != VERSION {
            return bad(
                "version",
                VERSION.to_string(),
                calibration.version.to_string(),
            );
        }
        if len == 0 || found != len {
            return bad(
                "temperatures",
                format!("draft_len ({len}) of them"),
                found.to_string(),
            );
        }
        if let Err(Error::Argument {
            expected, found, ..
        }) = validate_temperatures(&calibration.temperatures)
        {
            return bad("temperatures", expected, found);
        }
        Ok(calibration)
    }

    /// Refuses a file of another pair or of fewer positions than are drafted.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming `file` and the field.
    pub fn check(&self, file: &Path, pair: &PairIdentity, draft_len: usize) -> Result<()> {
        check_pair(file, &self.pair, pair)?;
        if self.draft_len < draft_len {
            let expected = format!("at least {draft_len} positions");
            return Err(Error::checkpoint(
                file,
                "draft_len",
                expected,
                self.draft_len,
            ));
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

/// Refuses a file made with other models.
pub(super) fn check_pair(file: &Path, held: &PairIdentity, pair: &PairIdentity) -> Result<()> {
    for (field, held, wanted) in [
        ("pair.target", &held.target, &pair.target),
        ("pair.drafter", &held.drafter, &pair.drafter),
    ] {
        if held != wanted {
            return Err(Error::checkpoint(
                file,
                field,
                format!("`{wanted}`"),
                format!("`{held}`"),
            ));
        }
    }
    Ok(())
}

/// Parses a JSON file; errors name the file and the place.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(file: &Path) -> Result<T> {
    let bytes = std::fs::read(file).map_err(|source| Error::io(file, source))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let place = format!("line {}, column {}", error.line(), error.column());
        Error::checkpoint(file, place, "the file's format", error)
    })
}

/// Writes `value` as indented JSON with a newline at the end.
pub(super) fn write_json<T: Serialize>(file: &Path, value: &T) -> Result<()> {
    let io = |source| Error::io(file, source);
    let mut text =
        serde_json::to_string_pretty(value).map_err(|error| io(std::io::Error::other(error)))?;
    text.push('\n');
    std::fs::write(file, text).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Calibration {
        Calibration {
            version: VERSION,
            pair: PairIdentity {
                target: "t".into(),
                drafter: "d".into(),
            },
            draft_len: 2,
            num_rounds: 100,
            temperatures: vec![1.5, 0.8],
            positions: Vec::new(),
            held_out: Vec::new(),
        }
    }

    #[test]
    fn files_come_back_and_bad_ones_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.json");
        let good = sample();
        good.write(&file).unwrap();
        assert_eq!(Calibration::read(&file).unwrap(), good);
        good.check(&file, &good.pair, 2).unwrap();

        let refused = |calibration: &Calibration, name: &str| {
            calibration.write(&file).unwrap();
            let error = Calibration::read(&file).unwrap_err().to_string();
            assert!(error.contains("c.json") && error.contains(name), "{error}");
        };
        refused(
            &Calibration {
                version: 2,
                ..sample()
            },
            "version",
        );
        refused(
            &Calibration {
                draft_len: 3,
                ..sample()
            },
            "temperatures",
        );
        let cold = vec![1.0, 0.0];
        refused(
            &Calibration {
                temperatures: cold,
                ..sample()
            },
            "temperatures",
        );
        for text in ["", "{}", "[1]", "{\"version\": 1, \"surprise\": 2}"] {
            std::fs::write(&file, text).unwrap();
            let error = Calibration::read(&file).unwrap_err().to_string();
            assert!(error.contains("c.json"), "{error}");
        }
        assert!(matches!(
            Calibration::read(&dir.path().join("none")),
            Err(Error::Io { .. })
        ));
    }

    #[test]
    fn another_pair_or_too_few_positions_are_refused() {
        let calibration = sample();
        let refused = |pair: &PairIdentity, draft_len, name: &str| {
            let result = calibration.check(Path::new("c.json"), pair, draft_len);
            let error = result.unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        };
        let with = |target: &str, drafter: &str| PairIdentity {
            target: target.into(),
            drafter: drafter.into(),
        };
        refused(&with("x", "d"), 2, "pair.target");
        refused(&with("t", "x"), 2, "pair.drafter");
        refused(&with("t", "d"), 3, "draft_len");
    }
}
