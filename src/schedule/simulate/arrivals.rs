//! When requests come, and the draws behind it.

use serde::Serialize;

use super::{Simulation, World};
use crate::error::{Error, Result};

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrivals {
    /// The batch is always full: a request that leaves is replaced.
    Closed,
    /// Poisson arrivals of this many requests a second; at most the load run at once, the others wait.
    Poisson(f64),
    /// Poisson arrivals whose rate jumps between two, each phase of exponentially distributed length.
    Bursts {
        /// Requests a second between bursts.
        calm: f64,
        /// Requests a second in a burst.
        busy: f64,
        /// Mean length of either phase.
        seconds: f64,
    },
    /// The batch is full until this many tokens were committed, then down to this many requests for as many tokens, in
    /// turn: the same work in both phases.
    Waves {
        /// Tokens of each phase.
        tokens: u64,
        /// Requests of the quiet phase.
        low: usize,
    },
    /// The same in turns of equal time, however much is done in it.
    Tides {
        /// Length of each phase.
        seconds: f64,
        /// Requests of the quiet phase.
        low: usize,
    },
}

impl Arrivals {
    /// Whether requests come by themselves, not when others leave.
    pub(super) fn is_open(self) -> bool {
        matches!(self, Self::Poisson(_) | Self::Bursts { .. })
    }

    /// Refuses numbers that make no process.
    pub(super) fn validate(self) -> Result<()> {
        let numbers = match self {
            Self::Closed | Self::Waves { .. } => [1.0; 3],
            Self::Poisson(rate) => [rate; 3],
            Self::Bursts {
                calm,
                busy,
                seconds,
            } => [calm, busy, seconds],
            Self::Tides { seconds, .. } => [seconds; 3],
        };
        match numbers.iter().find(|x| !(x.is_finite() && **x > 0.0)) {
            Some(x) => Err(Error::argument("arrivals", "finite numbers > 0", x)),
            None => Ok(()),
        }
    }
}

/// A phase of a load that changes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Phase {
    /// Whether it is the quieter one.
    pub(super) quiet: bool,
    /// The tokens or the time at which it ends; of bursts, the time of arrivals.
    pub(super) end: f64,
}

/// Uniform draws from a 64-bit linear congruential generator.
pub(super) struct Draws(pub(super) u64);

impl Draws {
    pub(super) fn uniform(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }
}

impl Simulation<'_> {
    /// Turns to the next phase where this one is over; whether a pair of phases is complete, or there are none.
    pub(super) fn turn(&self, world: &mut World) -> bool {
        let (now, length) = match self.arrivals {
            Arrivals::Waves { tokens, .. } => (world.report.num_tokens as f64, tokens as f64),
            Arrivals::Tides { seconds, .. } => (world.report.seconds, seconds),
            _ => return true,
        };
        if now < world.phase.end {
            return false;
        }
        world.phase.quiet = !world.phase.quiet;
        world.phase.end = now + length;
        !world.phase.quiet
    }

    /// Draws when the next request comes.
    pub(super) fn next_arrival(&self, world: &mut World) {
        let World {
            draws,
            next_arrival,
            phase,
            ..
        } = world;
        let mut wait = |mean: f64| -(1.0 - draws.uniform()).ln() * mean;
        match self.arrivals {
            Arrivals::Poisson(rate) => *next_arrival += wait(1.0 / rate),
            Arrivals::Bursts {
                calm,
                busy,
                seconds,
            } => loop {
                // What was drawn beyond the end of a phase is drawn again at the other rate: the process has no memory.
                let rate = if phase.quiet { calm } else { busy };
                let next = *next_arrival + wait(1.0 / rate);
                if next <= phase.end {
                    *next_arrival = next;
                    break;
                }
                *next_arrival = phase.end;
                phase.quiet = !phase.quiet;
                phase.end += wait(seconds);
            },
            Arrivals::Closed | Arrivals::Waves { .. } | Arrivals::Tides { .. } => {}
        }
    }
}
