//! Single calls of acceptance: log-probabilities of what is committed, and arguments that are refused.

use super::laws::sampling;
use super::*;
use crate::ops::{AcceptExtras, Rule, SparseLaw};

const VOCAB: usize = 4;

#[test]
fn logprobs_are_those_of_the_targets_law() {
    let mut ops = ops();
    let rows = noise(40, 2 * VOCAB);
    let target = mat(&mut ops, VOCAB, &rows);
    for (temperature, top_k) in [(1.0, 0), (0.7, 3), (0.0, 0)] {
        let params = SamplingParams {
            top_k,
            ..sampling(temperature)
        };
        let best = law::argmax(&rows[..VOCAB]) as u32;
        let accepted = ops
            .accept(&AcceptBatch {
                target: &target,
                qo_indptr: &[0, 2],
                draft_tokens: &[best],
                draft_len: 1,
                law: DraftLaw::PointMass,
                anchor_positions: &[0],
                sampling: &[params],
                extras: AcceptExtras {
                    logprobs: Some(2),
                    ..AcceptExtras::default()
                },
            })
            .unwrap();
        let logprobs = &accepted.logprobs[0];
        assert_eq!(logprobs.len(), 1 + accepted.num_accepted[0] as usize);
        let probs = if temperature == 0.0 {
            law::softmax(&rows[..VOCAB], 1.0)
        } else {
            law::target_law(&rows[..VOCAB], &params)
        };
        let top = &logprobs[0].top;
        assert_eq!((top.len(), top[0].0), (2, best));
        assert!(top[0].1 > top[1].1);
        for &(token, logprob) in top {
            assert!((f64::from(logprob).exp() - probs[token as usize]).abs() < 1e-6);
        }
    }
}

#[test]
fn arguments_that_no_rule_can_take_are_refused() {
    let mut ops = ops();
    let target = mat(&mut ops, VOCAB, &noise(1, 3 * VOCAB));
    let mut accept = |rule, extras: AcceptExtras<'_>, law: DraftLaw<'_, Reference>| {
        let params = SamplingParams {
            rule,
            ..sampling(1.0)
        };
        ops.accept(&AcceptBatch {
            target: &target,
            qo_indptr: &[0, 3],
            draft_tokens: &[0, 1],
            draft_len: 2,
            law,
            anchor_positions: &[0],
            sampling: &[params],
            extras,
        })
    };
    let extras = AcceptExtras::default;
    let with = |change: fn(&mut AcceptExtras<'_>)| {
        let mut extras = extras();
        change(&mut extras);
        extras
    };
    let point = || DraftLaw::PointMass;
    let tree = with(|e| e.parents = Some(&[0, 0]));
    assert_argument(accept(Rule::Block, tree, point()), "rule");
    let late = with(|e| e.parents = Some(&[1, 0]));
    assert_argument(accept(Rule::Token, late, point()), "parents");
    let mask = with(|e| e.mask = Some(&[1, 1]));
    assert_argument(accept(Rule::Token, mask, point()), "mask");
    let top = with(|e| e.logprobs = Some(21));
    assert_argument(accept(Rule::Token, top, point()), "logprobs");
    let sparse = SparseLaw {
        num_candidates: 1,
        tokens: vec![0, VOCAB as u32],
        logits: vec![0.0; 2],
    };
    let law = DraftLaw::Sparse(&sparse);
    assert_argument(accept(Rule::Token, extras(), law), "candidate tokens");
    // A mask that allows nothing leaves no law.
    let none = with(|e| e.mask = Some(&[0, 0, 0]));
    let result = accept(Rule::Token, none, point());
    assert!(matches!(result, Err(Error::BadLogits { request: 0, .. })));
}
