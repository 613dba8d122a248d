//! What a step costs, from measurements at start-up and from the steps since.
//!
//! `seconds(R, B, C) = f_1 verify(B) + f_2 c C + f_3 (draft(R) + d C)`: a measured table over the B rows of the target's
//! pass (straight lines between the points, or a staircase where passes run in graph buckets), a slope c over the C cache
//! entries the rows attend to, and, in a step that drafts, a measured table over the R requests drafted for and a slope d
//! of the drafter over the same entries. The factors f start at 1 and follow measured step times by recursive least
//! squares ([`StepCost::observe`]).

use super::refit::Refit;
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

/// What the cost of a step depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct StepShape {
    /// Requests drafted for; 0 when the step drafts nothing.
    pub num_drafted: usize,
    /// Rows of the verify pass, B.
    pub num_tokens: usize,
    /// Cache entries of all requests together.
    pub context_tokens: usize,
    /// Cache entries of the requests drafted for.
    pub drafted_context_tokens: usize,
}

/// Seconds of a whole step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCost {
    verify: CostTable,
    draft: Option<CostTable>,
    seconds_per_context_token: f64,
    draft_seconds_per_context_token: f64,
    buckets: Vec<usize>,
    refit: Refit,
}

impl StepCost {
    /// The target's pass by verified tokens B, and drafting by requests R (`None`: free). The context is free until
    /// [`StepCost::with_context`].
    pub fn new(verify: CostTable, draft: Option<CostTable>) -> Self {
        Self {
            verify,
            draft,
            seconds_per_context_token: 0.0,
            draft_seconds_per_context_token: 0.0,
            buckets: Vec::new(),
            refit: Refit::default(),
        }
    }

    /// The same with seconds that a pass takes for each cache entry attended to.
    ///
    /// # Errors
    /// Not a finite number >= 0.
    pub fn with_context(mut self, seconds_per_token: f64) -> Result<Self> {
        self.seconds_per_context_token = slope("seconds_per_context_token", seconds_per_token)?;
        Ok(self)
    }

    /// The same with seconds that a draft takes for each cache entry.
    ///
    /// # Errors
    /// Not a finite number >= 0.
    pub fn with_draft_context(mut self, seconds_per_token: f64) -> Result<Self> {
        let field = "draft_seconds_per_context_token";
        self.draft_seconds_per_context_token = slope(field, seconds_per_token)?;
        Ok(self)
    }

    /// The same for passes that are padded to the next of these row counts; above the last they are not.
    ///
    /// # Errors
    /// A row count of 0, or one that is not above the one before it.
    pub fn with_buckets(mut self, buckets: Vec<usize>) -> Result<Self> {
        let rising = buckets.windows(2).all(|pair| pair[0] < pair[1]);
        if !rising || buckets.first() == Some(&0) {
            let found = format!("{buckets:?}");
            return Err(Error::argument(
                "buckets",
                "rising row counts from 1 on",
                found,
            ));
        }
        self.buckets = buckets;
        Ok(self)
    }

    /// The target's pass at no context.
    pub fn verify(&self) -> &CostTable {
        &self.verify
    }

    /// Drafting by requests.
    pub fn draft(&self) -> Option<&CostTable> {
        self.draft.as_ref()
    }

    /// Seconds of a pass for each cache entry, as profiled.
    pub fn seconds_per_context_token(&self) -> f64 {
        self.seconds_per_context_token
    }

    /// Seconds of a draft for each cache entry, as profiled.
    pub fn draft_seconds_per_context_token(&self) -> f64 {
        self.draft_seconds_per_context_token
    }

    /// Row counts that passes are padded to; empty when they are not.
    pub fn buckets(&self) -> &[usize] {
        &self.buckets
    }

    /// What measured steps have made of the profiled terms: factors of verify, context and draft.
    pub fn factors(&self) -> [f64; 3] {
        self.refit.factors()
    }

    /// The profiled terms of a step: verify, context, draft.
    fn terms(&self, shape: StepShape) -> [f64; 3] {
        let draft = match &self.draft {
            Some(draft) if shape.num_drafted > 0 => {
                let entries = shape.drafted_context_tokens as f64;
                draft.seconds(shape.num_drafted) + self.draft_seconds_per_context_token * entries
            }
            _ => 0.0,
        };
        let context = self.seconds_per_context_token * shape.context_tokens as f64;
        [self.verify_seconds(shape.num_tokens), context, draft]
    }

    /// Seconds of a step; never falling in any of its numbers.
    pub fn seconds(&self, shape: StepShape) -> f64 {
        let terms = self.terms(shape);
        terms.iter().zip(self.factors()).map(|(t, f)| t * f).sum()
    }

    /// [`StepCost::seconds`] of steps that differ from `shape` in their rows alone.
    pub fn seconds_by_rows(&self, shape: StepShape) -> impl Fn(usize) -> f64 {
        let [_, context, draft] = self.terms(shape);
        let [by_rows, by_context, by_draft] = self.factors();
        let rest = [context * by_context, draft * by_draft];
        move |num_tokens| self.verify_seconds(num_tokens) * by_rows + rest[0] + rest[1]
    }

    /// The target's pass at no context, as profiled.
    fn verify_seconds(&self, num_tokens: usize) -> f64 {
        let above = self.buckets.partition_point(|&b| b < num_tokens);
        self.verify
            .seconds(self.buckets.get(above).copied().unwrap_or(num_tokens))
    }

    /// Steps per second with `num_tokens` tokens of `num_reqs` requests in the verify pass, at no context.
    pub fn steps_per_second(&self, num_reqs: usize, num_tokens: usize) -> f64 {
        1.0 / self.seconds(StepShape {
            num_drafted: num_reqs,
            num_tokens,
            ..StepShape::default()
        })
    }

    /// Takes in what a step of this shape really took.
    pub fn observe(&mut self, shape: StepShape, seconds: f64) {
        let terms = self.terms(shape);
        self.refit.observe(terms, seconds);
    }
}

/// Refuses seconds per cache entry that are none.
fn slope(field: &str, seconds: f64) -> Result<f64> {
    if seconds.is_finite() && seconds >= 0.0 {
        return Ok(seconds);
    }
    Err(Error::argument(field, "a finite number >= 0", seconds))
}
