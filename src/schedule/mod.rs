//! How many drafts of each request are verified: pure CPU, no device type.
//!
//! The mental model: a drafter's *confidence* `c_k` (draft k is accepted, given that the ones before it were) is
//! *calibrated* per position ([`sts`] offline, outcomes online), and its running product is the *survival* `a_k`
//! ([`survival`]). All drafts of all requests are *ranked* by survival ([`Ranking`]), and a [`Policy`] admits the first n
//! of the ranking: with n drafts the step is expected to commit `tau = R + sum of a` tokens in [`StepCost`] seconds, and
//! n makes `tau / seconds` large. What is admitted is a prefix of each request's draft, since survivals do not rise.
//!
//! What keeps the output law the target's: whether draft x_k is verified never depends on x_k or on anything computed
//! from it. `c_1 ..= c_k` depend on the drafts before x_k only, so that the *rank* of x_k may be looked at; the number n
//! may not look further, since survivals of later ranks may depend on x_k (the paper's appendix A). Algorithm 1 stops at
//! the first fall; the delayed form takes n from the confidences of two steps before, all of whose tokens are decided.
//! [`Policy::Global`] looks at everything and is refused where that matters.
//!
//! [`Scheduler`] holds the state that policies keep between steps; [`simulate`] runs it on recorded rounds.

mod bypass;
mod calibration;
mod cost;
mod cost_file;
mod estimator;
pub mod metrics;
mod online;
mod outcomes;
mod policy;
mod rank;
mod refit;
mod scheduler;
pub mod simulate;
pub mod sts;
mod survival;

pub use calibration::{CALIBRATION_FILE, Calibration, PairIdentity};
pub use cost::{CostTable, StepCost, StepShape};
pub use cost_file::{CostFile, CostIdentity};
pub use policy::Policy;
pub use rank::{Ranking, Ticks, decide};
pub use scheduler::{Adapt, Batch, Decide, Evidence, Graded, Plan, Scheduler};
pub use survival::{calibrate, calibrate_one, survival, validate_temperatures};
