//! The rules that choose how many drafts are verified.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The rule that chooses `verify_len`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Policy {
    /// Every draft is verified.
    Fixed,
    /// Cut before the first calibrated confidence below this number in (0, 1].
    Threshold(f32),
    /// Algorithm 1 of the paper: drafts are admitted by survival until throughput first falls.
    Algorithm1,
    /// The number of drafts comes from the confidences of two steps before, where all of them may be looked at; which
    /// ones they are comes from this step's survivals.
    Delayed,
    /// The best number of drafts by this step's own confidences. It peeks: only where the output does not depend on
    /// what is verified (greedy, coupled rule) does it keep the target's law.
    Global,
}

impl Policy {
    /// Whether the rule reads confidences.
    pub fn needs_confidence(self) -> bool {
        self != Self::Fixed
    }

    /// Whether the rule reads step costs.
    pub fn needs_cost(self) -> bool {
        matches!(self, Self::Algorithm1 | Self::Delayed | Self::Global)
    }

    /// Whether admitting a draft may depend on the draft itself or on later ones.
    pub fn peeks(self) -> bool {
        self == Self::Global
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed => write!(f, "fixed"),
            Self::Threshold(x) => write!(f, "threshold:{x}"),
            Self::Algorithm1 => write!(f, "algorithm1"),
            Self::Delayed => write!(f, "delayed"),
            Self::Global => write!(f, "global"),
        }
    }
}

impl FromStr for Policy {
    type Err = Error;

    /// `adaptive` is another name of `algorithm1`.
    fn from_str(text: &str) -> Result<Self> {
        let refuse = || {
            let expected = "`fixed`, `threshold:X` with X in (0, 1], `algorithm1` (or `adaptive`), `delayed` or `global`";
            Error::argument("schedule", expected, format!("`{text}`"))
        };
        match text {
            "fixed" => Ok(Self::Fixed),
            "algorithm1" | "adaptive" => Ok(Self::Algorithm1),
            "delayed" => Ok(Self::Delayed),
            "global" => Ok(Self::Global),
            _ => {
                let value = text.strip_prefix("threshold:").ok_or_else(refuse)?;
                match value.parse::<f32>() {
                    Ok(x) if x > 0.0 && x <= 1.0 => Ok(Self::Threshold(x)),
                    _ => Err(refuse()),
                }
            }
        }
    }
}
