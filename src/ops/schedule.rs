//! How many drafts of each request are verified: what the decision is made from, wherever it is made.

/// What a schedule decides by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScheduleRule {
    /// Algorithm 1: until throughput first falls.
    FirstFall,
    /// This many drafts, made for this many requests.
    Capacity(usize, usize),
    /// The best number of drafts by this step's confidences, which is a peek.
    Best,
}

/// The operands of [`super::Ops::schedule`].
#[derive(Clone, Copy, Debug)]
pub struct ScheduleInputs<'a> {
    /// The rule.
    pub rule: ScheduleRule,
    /// `[num_reqs * draft_len]` before calibration.
    pub confidence: &'a [f32],
    /// `[draft_len]`; `None` for all 1.
    pub temperature: Option<&'a [f32]>,
    /// `[num_reqs]` the most drafts of each.
    pub limits: &'a [usize],
    /// `[num_reqs * draft_len + 1]` costs of the step by number of drafts (`dspark::schedule::Ticks`).
    pub ticks: &'a [u32],
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// `[num_reqs]`.
    pub verify_lens: Vec<usize>,
    /// The best number of drafts by this step's confidences: the capacity of the step after the next.
    pub best: usize,
}
