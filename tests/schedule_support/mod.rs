//! One step of a schedule, and what it costs.

#![allow(dead_code)] // every test binary uses its own part

use dspark::schedule::{Batch, CostTable, Scheduler, StepCost};

/// The plan for confidences of requests in slots 0, 1, ….
pub fn plan(scheduler: &mut Scheduler, confidence: &[f32], limits: &[usize]) -> Vec<usize> {
    let slots: Vec<usize> = (0..limits.len()).collect();
    let batch = Batch {
        slots: &slots,
        limits,
        draft_len: confidence.len() / limits.len(),
        confidence: Some(confidence),
        context_tokens: 100,
    };
    scheduler.plan(&batch).unwrap().verify_lens
}

/// A cost that rises by a jump every four rows, and with the context.
pub fn jagged() -> StepCost {
    let verify = CostTable::new(vec![(1, 1.0), (64, 4.0)]).unwrap();
    let draft = CostTable::new(vec![(1, 0.1), (16, 0.2)]).unwrap();
    StepCost::new(verify, Some(draft))
        .with_context(1e-4)
        .and_then(|cost| cost.with_buckets((1..=16).map(|n| 4 * n).collect()))
        .unwrap()
}
