//! How many drafts of each request are verified: pure CPU, no device type.
//!
//! The mental model: a drafter's *confidence* `c_k` (draft k is accepted, given that the ones before it were) is
//! *calibrated* per position, and its running product is the *survival* `a_k` ([`survival`]). A [`Policy`] turns
//! these into one `verify_len` per request. Every policy here decides on draft k from the confidences `c_1 ..= c_k`
//! alone, and those depend on the drafts before x_k only. That is what keeps the output law the target's: a rule that
//! looks further lets the choice of dropping x_k depend on x_k (the paper's appendix A).
//!
//! [`Scheduler::plan`] is the seam for delayed and global forms: they see the same survivals and limits, and may keep
//! state between steps.

mod cost;
mod prefix;
mod survival;

pub use cost::{CostTable, StepCost};
pub use prefix::schedule_prefixes;
pub use survival::{calibrate, survival, validate_temperatures};

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
    /// Algorithm 1 of the paper: [`schedule_prefixes`] with a measured cost.
    Adaptive,
}

impl Policy {
    /// Whether the rule reads confidences.
    pub fn needs_confidence(self) -> bool {
        self != Self::Fixed
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed => write!(f, "fixed"),
            Self::Threshold(x) => write!(f, "threshold:{x}"),
            Self::Adaptive => write!(f, "adaptive"),
        }
    }
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = || {
            let expected = "`fixed`, `threshold:X` with X in (0, 1], or `adaptive`";
            Error::argument("schedule", expected, format!("`{text}`"))
        };
        match text {
            "fixed" => Ok(Self::Fixed),
            "adaptive" => Ok(Self::Adaptive),
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

/// A policy with what it needs to decide.
#[derive(Clone, Debug)]
pub struct Scheduler {
    policy: Policy,
    temperatures: Option<Vec<f32>>,
    cost: Option<StepCost>,
}

impl Scheduler {
    /// `temperatures` are the STS temperatures of the positions (`None`: confidences are taken as they are). A cost,
    /// which [`Policy::Adaptive`] needs before its first plan, is given by [`Scheduler::set_cost`].
    ///
    /// # Errors
    /// A threshold outside (0, 1]; a temperature that is not a positive number.
    pub fn new(policy: Policy, temperatures: Option<Vec<f32>>) -> Result<Self> {
        if let Policy::Threshold(x) = policy
            && !(x > 0.0 && x <= 1.0)
        {
            return Err(Error::argument("threshold", "a number in (0, 1]", x));
        }
        validate_temperatures(temperatures.as_deref().unwrap_or(&[]))?;
        Ok(Self {
            policy,
            temperatures,
            cost: None,
        })
    }

    /// The rule.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// What a step costs; only [`Policy::Adaptive`] looks at it.
    pub fn set_cost(&mut self, cost: StepCost) {
        self.cost = Some(cost);
    }

    /// The cost in use.
    pub fn cost(&self) -> Option<&StepCost> {
        self.cost.as_ref()
    }

    /// `verify_len` of each request: at most `limits[r]` (what the context and the reserved pages leave) and at most
    /// `draft_len`. `confidence [num_reqs * draft_len]` as the drafter gave it.
    ///
    /// # Errors
    /// The policy needs confidences, temperatures or a cost that are not there.
    pub fn plan(
        &self,
        confidence: Option<&[f32]>,
        draft_len: usize,
        limits: &[usize],
    ) -> Result<Vec<usize>> {
        let limits: Vec<usize> = limits.iter().map(|&l| l.min(draft_len)).collect();
        if self.policy == Policy::Fixed || draft_len == 0 {
            return Ok(limits);
        }
        let calibrated = self.calibrated(confidence, draft_len, limits.len())?;
        match self.policy {
            Policy::Fixed => Ok(limits),
            Policy::Threshold(x) => Ok(calibrated
                .chunks_exact(draft_len)
                .zip(&limits)
                .map(|(row, &limit)| row[..limit].iter().take_while(|&&c| c >= x).count())
                .collect()),
            Policy::Adaptive => {
                let cost = self.cost.as_ref().ok_or_else(|| {
                    Error::argument("schedule", "a measured step cost for `adaptive`", "none")
                })?;
                let num_reqs = limits.len();
                let survival = survival(&calibrated, draft_len);
                Ok(schedule_prefixes(&survival, draft_len, &limits, |b| {
                    cost.steps_per_second(num_reqs, b)
                }))
            }
        }
    }

    /// Calibrated confidences `[num_reqs * draft_len]`.
    fn calibrated(
        &self,
        confidence: Option<&[f32]>,
        draft_len: usize,
        num_reqs: usize,
    ) -> Result<Vec<f32>> {
        let Some(confidence) = confidence else {
            let expected = format!("confidences for `{}`", self.policy);
            return Err(Error::argument(
                "schedule",
                expected,
                "a drafter without a confidence head",
            ));
        };
        if confidence.len() != num_reqs * draft_len {
            let expected = format!("{num_reqs} x {draft_len} values");
            return Err(Error::argument("confidence", expected, confidence.len()));
        }
        calibrate(confidence, draft_len, self.temperatures.as_deref())
    }
}
