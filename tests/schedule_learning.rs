//! What a schedule learns from outcomes, and what it must not.

mod schedule_support;

use dspark::schedule::{
    Adapt, Batch, CostTable, Evidence, Graded, Plan, Policy, Scheduler, StepCost,
};
use schedule_support::plan;

/// A scheduler that learns, after rounds of these confidences and outcomes.
fn taught(excluded: bool, evidence: Evidence) -> Scheduler {
    let mut scheduler = Scheduler::new(Policy::Threshold(0.5), None).unwrap();
    scheduler.set_adapt(Adapt::ON);
    scheduler.set_evidence(evidence);
    for i in 0..3000 {
        plan(&mut scheduler, &[0.9, 0.9], &[2]);
        scheduler.grade(&[Graded {
            verify_len: 2,
            num_accepted: usize::from(i % 5 < 3),
            excluded,
        }]);
    }
    scheduler
}

#[test]
fn outcomes_teach_and_excluded_requests_do_not() {
    let first = |scheduler: &mut Scheduler| -> f32 {
        let batch = Batch {
            slots: &[0],
            limits: &[2],
            draft_len: 2,
            confidence: Some(&[0.9, 0.9]),
            context_tokens: 0,
        };
        let Plan { predicted, .. } = scheduler.plan(&batch).unwrap();
        predicted.unwrap()[0]
    };
    for evidence in [Evidence::Head, Evidence::TopProbability] {
        let learnt = first(&mut taught(false, evidence));
        assert!((learnt - 0.6).abs() < 0.06, "{learnt} of 0.6");
        let untaught = first(&mut taught(true, evidence));
        assert!((untaught - 0.9).abs() < 0.01, "{untaught}");
    }
}

#[test]
fn a_round_is_graded_by_its_own_confidences_or_not_at_all() {
    let mut scheduler = Scheduler::new(Policy::Threshold(0.5), None).unwrap();
    scheduler.set_adapt(Adapt::ON);
    for _ in 0..2000 {
        plan(&mut scheduler, &[0.9, 0.9], &[2]);
        // The round above is lost; only the one below was accepted throughout.
        plan(&mut scheduler, &[0.8, 0.8], &[2]);
        let kept = Graded {
            verify_len: 2,
            num_accepted: 2,
            excluded: false,
        };
        scheduler.grade(&[kept]);
        scheduler.grade(&[Graded {
            num_accepted: 0,
            ..kept
        }]);
    }
    let temperatures = scheduler.temperatures().unwrap();
    assert!(
        temperatures[0] < 0.5,
        "{temperatures:?}: a lost or second grade was counted"
    );
}

#[test]
fn hard_text_stops_drafting_and_a_reused_slot_forgets() {
    let verify = CostTable::new(vec![(1, 1.0), (9, 1.1)]).unwrap();
    let draft = CostTable::new(vec![(1, 0.25)]).unwrap();
    let mut scheduler = Scheduler::new(Policy::Delayed, None).unwrap();
    scheduler.set_cost(StepCost::new(verify, Some(draft)));
    scheduler.set_adapt(Adapt {
        bypass: true,
        ..Adapt::OFF
    });
    let run = |scheduler: &mut Scheduler, confidence: f32, accepted: usize, steps: usize| {
        let mut drafted = 0;
        for _ in 0..steps {
            if !scheduler.drafts(&[0], 2, 0)[0] {
                continue;
            }
            drafted += 1;
            let len = plan(scheduler, &[confidence; 2], &[2])[0];
            scheduler.grade(&[Graded {
                verify_len: len,
                num_accepted: accepted.min(len),
                excluded: false,
            }]);
        }
        drafted
    };
    let hard = run(&mut scheduler, 0.05, 0, 1000);
    assert!((2..30).contains(&hard), "{hard} of 1000 steps drafted");
    // Confidences that temperatures cannot mend, since they are even: outcomes count.
    scheduler.forget(0);
    let even = run(&mut scheduler, 0.48, 0, 1000);
    assert!(even < 40, "{even} of 1000 steps drafted");
    // The text becomes easy: a probe finds out.
    let easy = run(&mut scheduler, 0.95, 2, 2000);
    assert!(easy > 800, "{easy} of 2000 steps drafted");
    // Another request in the slot is not held to the last one's record.
    let easy = run(&mut scheduler, 0.95, 2, 200);
    run(&mut scheduler, 0.05, 0, 20);
    scheduler.forget(0);
    assert!(easy == 200 && run(&mut scheduler, 0.95, 2, 20) > 15);
}
