//! One step of a schedule.

use dspark::schedule::{Batch, Scheduler};

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
