//! What a step costs, from measurements at start-up.

use crate::error::{Error, Result};

/// Seconds of a pass by its number of tokens: measured points, straight lines between them.
#[derive(Clone, Debug, PartialEq)]
pub struct CostTable {
    /// `(tokens, seconds)`, strictly rising in tokens, never falling in seconds.
    points: Vec<(usize, f64)>,
}

impl CostTable {
    /// From measured `(tokens, seconds)` in any order. More tokens never cost less in the table: a point below an
    /// earlier one is noise and is raised to it. Of several points with the same tokens the cheapest counts.
    ///
    /// # Errors
    /// No point, zero tokens, or seconds that are not a finite number above 0.
    pub fn new(mut points: Vec<(usize, f64)>) -> Result<Self> {
        if points.is_empty() {
            return Err(Error::argument("cost table", "at least one point", 0));
        }
        for &(tokens, seconds) in &points {
            if tokens == 0 {
                return Err(Error::argument("cost table", "at least 1 token", 0));
            }
            if !(seconds.is_finite() && seconds > 0.0) {
                let found = format!("{seconds} for {tokens} tokens");
                return Err(Error::argument("cost table", "finite seconds > 0", found));
            }
        }
        points.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        points.dedup_by_key(|point| point.0);
        let mut floor = 0.0_f64;
        for (_, seconds) in &mut points {
            floor = floor.max(*seconds);
            *seconds = floor;
        }
        Ok(Self { points })
    }

    /// The cleaned points, `(tokens, seconds)` in order of tokens.
    pub fn points(&self) -> &[(usize, f64)] {
        &self.points
    }

    /// Seconds of a pass of `tokens`: the first point's below it, the last line's continuation above the last.
    pub fn seconds(&self, tokens: usize) -> f64 {
        let after = self.points.partition_point(|point| point.0 < tokens);
        if after == 0 || self.points.len() == 1 {
            return self.points[0].1;
        }
        let high = after.min(self.points.len() - 1);
        let ((x0, y0), (x1, y1)) = (self.points[high - 1], self.points[high]);
        y0 + (y1 - y0) * (tokens - x0) as f64 / (x1 - x0) as f64
    }
}

/// Seconds of a whole step: the verify pass by its tokens and the draft by its requests.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCost {
    /// The target's pass by verified tokens B.
    pub verify: CostTable,
    /// Drafting by requests R; `None` counts it as free.
    pub draft: Option<CostTable>,
}

impl StepCost {
    /// Steps per second with `num_tokens` tokens of `num_reqs` requests in the verify pass.
    pub fn steps_per_second(&self, num_reqs: usize, num_tokens: usize) -> f64 {
        let draft = self.draft.as_ref().map_or(0.0, |d| d.seconds(num_reqs));
        1.0 / (self.verify.seconds(num_tokens) + draft)
    }
}
