//! The schedule: the ranking against brute force, every policy's promises, calibration.

mod schedule_support;

use dspark::schedule::{
    Batch, CostTable, Graded, Policy, Ranking, Scheduler, StepCost, Ticks, calibrate, survival,
};
use schedule_support::{jagged, plan};

/// Uniform numbers in [0, 1).
fn random(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Survivals of random confidences, `[num_reqs, draft_len]`.
fn random_survival(next: &mut impl FnMut() -> f64, num_reqs: usize, draft_len: usize) -> Vec<f32> {
    let confidence: Vec<f32> = (0..num_reqs * draft_len).map(|_| next() as f32).collect();
    survival(&confidence, draft_len)
}

/// Expected tokens a second of `lens`, `seconds(n)` being the step's with n drafts.
fn throughput(
    survival: &[f32],
    draft_len: usize,
    lens: &[usize],
    seconds: &dyn Fn(usize) -> f64,
) -> f64 {
    let admitted = lens
        .iter()
        .enumerate()
        .flat_map(|(r, &len)| &survival[r * draft_len..][..len]);
    let tau = lens.len() as f64 + admitted.map(|&a| f64::from(a)).sum::<f64>();
    tau / seconds(lens.iter().sum::<usize>())
}

/// Every combination of lengths up to the limits.
fn all_lens(limits: &[usize]) -> Vec<Vec<usize>> {
    limits.iter().fold(vec![vec![]], |all, &limit| {
        all.iter()
            .flat_map(|lens| (0..=limit).map(move |l| [&lens[..], &[l]].concat()))
            .collect()
    })
}

/// The best of all choices.
fn brute_force(
    survival: &[f32],
    draft_len: usize,
    limits: &[usize],
    seconds: &dyn Fn(usize) -> f64,
) -> f64 {
    all_lens(limits)
        .iter()
        .map(|lens| throughput(survival, draft_len, lens, seconds))
        .fold(0.0, f64::max)
}

/// Whether `a` is `b` but for the guard and the resolution of survivals.
fn nearly(a: f64, b: f64) -> bool {
    a <= b * (1.0 + 1e-4) && a >= b * 0.98
}

#[test]
fn algorithm_1_is_the_best_choice_where_throughput_is_unimodal() {
    let mut next = random(7);
    let mut inner = 0;
    for _ in 0..400 {
        let (num_reqs, draft_len) = (1 + (next() * 3.0) as usize, 1 + (next() * 4.0) as usize);
        let survival = random_survival(&mut next, num_reqs, draft_len);
        let limits: Vec<usize> = (0..num_reqs)
            .map(|_| (next() * (draft_len as f64 + 1.0)) as usize)
            .collect();
        // Straight costs and falling survivals make throughput unimodal.
        let slope = next() * 0.4;
        let seconds = move |n: usize| 1.0 + slope * (num_reqs + n) as f64;
        let ranking = Ranking::new(&survival, draft_len, &limits);
        let ticks = Ticks::new(ranking.len(), seconds);
        let num_drafts = ranking.first_fall(&ticks);
        let lens = ranking.verify_lens(num_drafts);
        assert!(lens.iter().zip(&limits).all(|(len, limit)| len <= limit));
        assert_eq!(lens.iter().sum::<usize>(), num_drafts);
        let got = throughput(&survival, draft_len, &lens, &seconds);
        let best = brute_force(&survival, draft_len, &limits, &seconds);
        assert!(nearly(got, best), "{got} of {best}");
        inner += usize::from(num_drafts > 0 && num_drafts < ranking.len());
    }
    assert!(inner > 50, "{inner} cases with an inner peak");
}

#[test]
fn the_global_search_is_the_best_choice_on_any_table() {
    let mut next = random(13);
    let mut jumped = 0;
    for _ in 0..400 {
        let (num_reqs, draft_len) = (1 + (next() * 3.0) as usize, 1 + (next() * 4.0) as usize);
        let survival = random_survival(&mut next, num_reqs, draft_len);
        let limits = vec![draft_len; num_reqs];
        let most = num_reqs * draft_len;
        let mut cost = 1.0;
        let costs: Vec<f64> = (0..=most)
            .map(|_| {
                cost += if next() < 0.3 { next() } else { 0.0 };
                cost
            })
            .collect();
        let seconds = move |n: usize| costs[n];
        let ranking = Ranking::new(&survival, draft_len, &limits);
        let ticks = Ticks::new(ranking.len(), &seconds);
        let got = ranking.best(&ticks);
        let lens = ranking.verify_lens(got);
        let best = brute_force(&survival, draft_len, &limits, &seconds);
        let got_rate = throughput(&survival, draft_len, &lens, &seconds);
        assert!(nearly(got_rate, best), "{got_rate} of {best}");
        jumped += usize::from(got > ranking.first_fall(&ticks));
    }
    assert!(jumped > 20, "{jumped} cases where a cliff was crossed");
}

#[test]
fn a_cliff_stops_algorithm_1_before_a_higher_peak() {
    // Sure drafts; three tokens are slow, four cost nothing more.
    let ranking = Ranking::new(&[1.0, 1.0, 1.0], 3, &[3]);
    let ticks = Ticks::new(3, |n| [1.0, 1.0, 1.9, 1.9][n]);
    assert_eq!(ranking.verify_lens(ranking.first_fall(&ticks)), [1]);
    assert_eq!(ranking.verify_lens(ranking.best(&ticks)), [3]);
}

#[test]
fn ties_go_to_the_first_request_then_the_first_position() {
    // Room for exactly three drafts among equals.
    let ranking = Ranking::new(&[1.0; 4], 2, &[2, 2]);
    let ticks = Ticks::new(4, |n| if n <= 3 { 1.0 } else { 10.0 });
    assert_eq!(ranking.verify_lens(ranking.first_fall(&ticks)), [2, 1]);
    assert_eq!(ranking.verify_lens(ranking.best(&ticks)), [2, 1]);
    // A worthless draft is not verified, even for free; nor is one worth less than the guard.
    assert!(Ranking::new(&[0.0; 2], 2, &[2]).is_empty());
    let ranking = Ranking::new(&[0.009, 0.0], 2, &[2]);
    let free = Ticks::new(1, |_| 1.0);
    assert_eq!((ranking.first_fall(&free), ranking.best(&free)), (0, 0));
    let ranking = Ranking::new(&[0.011, 0.0], 2, &[2]);
    assert_eq!((ranking.first_fall(&free), ranking.best(&free)), (1, 1));
}

const POLICIES: [Policy; 4] = [
    Policy::Fixed,
    Policy::Threshold(0.5),
    Policy::Algorithm1,
    Policy::Delayed,
];

fn scheduler(policy: Policy) -> Scheduler {
    let mut scheduler = Scheduler::new(policy, None).unwrap();
    scheduler.set_cost(jagged());
    scheduler
}

/// Draws confidences and lets every policy plan a few steps on them.
fn earlier_steps(scheduler: &mut Scheduler, steps: usize, num_reqs: usize, draft_len: usize) {
    let mut next = random(steps as u64 + 5);
    for _ in 0..steps {
        let confidence: Vec<f32> = (0..num_reqs * draft_len)
            .map(|_| next().sqrt() as f32)
            .collect();
        plan(scheduler, &confidence, &vec![draft_len; num_reqs]);
    }
}

/// Cases where admitting draft j of request r changed with the confidences of r after j, which depend on the draft.
fn anticipations(policy: Policy) -> usize {
    let mut next = random(17);
    let (num_reqs, draft_len) = (3, 3);
    let limits = vec![draft_len; num_reqs];
    let mut found = 0;
    for case in 0..300 {
        let mut base = scheduler(policy);
        earlier_steps(&mut base, case % 4, num_reqs, draft_len);
        let confidence: Vec<f32> = (0..num_reqs * draft_len).map(|_| next() as f32).collect();
        let lens = plan(&mut base.clone(), &confidence, &limits);
        for (r, &len) in lens.iter().enumerate() {
            for j in 0..draft_len {
                let mut changed = confidence.clone();
                let later = r * draft_len + j + 1..(r + 1) * draft_len;
                changed[later].fill_with(|| next() as f32);
                let other = plan(&mut base.clone(), &changed, &limits)[r];
                found += usize::from((other > j) != (len > j));
            }
        }
    }
    found
}

#[test]
fn no_policy_looks_at_what_depends_on_the_draft_and_a_cheat_is_caught() {
    for policy in POLICIES {
        assert_eq!(anticipations(policy), 0, "{policy}");
    }
    let caught = anticipations(Policy::Global);
    assert!(
        caught > 10,
        "a peeking policy was caught {caught} times only"
    );
}

#[test]
fn decisions_do_not_depend_on_the_order_of_requests() {
    let mut next = random(11);
    for policy in POLICIES {
        for case in 0..100 {
            let mut base = scheduler(policy);
            earlier_steps(&mut base, case % 4, 3, 3);
            let confidence: Vec<f32> = (0..9).map(|_| next() as f32).collect();
            let lens = plan(&mut base.clone(), &confidence, &[3, 2, 3]);
            let turned = [&confidence[3..], &confidence[..3]].concat();
            let turned = plan(&mut base, &turned, &[2, 3, 3]);
            assert_eq!(turned, [lens[1], lens[2], lens[0]], "{policy}");
        }
    }
}

#[test]
fn more_load_never_means_more_drafts_for_a_request() {
    let verify = CostTable::new(vec![(1, 1.0), (101, 3.0)]).unwrap();
    for policy in [Policy::Algorithm1, Policy::Delayed] {
        let mut last = f64::INFINITY;
        for num_reqs in [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144] {
            let mut scheduler = Scheduler::new(policy, None).unwrap();
            scheduler.set_cost(StepCost::new(verify.clone(), None));
            let confidence = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4].repeat(num_reqs);
            let mut lens = Vec::new();
            for _ in 0..4 {
                lens = plan(&mut scheduler, &confidence, &vec![6; num_reqs]);
            }
            let mean = lens.iter().sum::<usize>() as f64 / num_reqs as f64;
            assert!(mean <= last + 1e-9, "{policy}: {mean} after {last}");
            last = mean;
        }
        assert!(last < 6.0, "{policy}: the load never mattered");
    }
}

#[test]
fn the_delayed_capacity_is_that_of_two_steps_before() {
    let mut scheduler = Scheduler::new(Policy::Delayed, None).unwrap();
    let verify = CostTable::new(vec![(1, 1.0), (9, 1.8)]).unwrap();
    scheduler.set_cost(StepCost::new(verify, None));
    let mut step = |confidence: f32| plan(&mut scheduler, &[confidence; 4], &[4])[0];
    // Two steps by Algorithm 1, then the capacities of sure drafts although these ones are hopeless but not worthless.
    assert_eq!((step(1.0), step(1.0)), (4, 4));
    assert_eq!((step(0.1), step(0.1)), (4, 4));
    assert_eq!((step(1.0), step(1.0)), (0, 0));
    assert_eq!(step(1.0), 4);
}

#[test]
fn a_graph_bucket_is_filled_with_drafts() {
    let verify = CostTable::new(vec![(1, 1.0), (8, 1.0), (16, 9.0)]).unwrap();
    let cost = StepCost::new(verify, None)
        .with_buckets(vec![2, 8, 16])
        .unwrap();
    let mut scheduler = Scheduler::new(Policy::Delayed, None).unwrap();
    scheduler.set_cost(cost);
    for _ in 0..4 {
        assert_eq!(plan(&mut scheduler, &[0.5; 12], &[6, 6]), [3, 3]);
    }
    // One request fewer: 8 rows are still one bucket.
    for _ in 0..2 {
        assert_eq!(plan(&mut scheduler, &[0.5; 6], &[6]), [6]);
    }
}

#[test]
fn the_threshold_cuts_before_the_first_low_confidence() {
    let mut scheduler = Scheduler::new(Policy::Threshold(0.5), None).unwrap();
    let confidence = [0.9, 0.5, 0.4, 0.9, 0.9, 0.9, f32::NAN, 0.9, 0.9];
    assert_eq!(plan(&mut scheduler, &confidence, &[3, 2, 3]), [2, 2, 0]);
}

#[test]
fn confidences_that_are_none_are_neutralised() {
    for policy in POLICIES {
        let mut scheduler = scheduler(policy);
        let odd = [f32::NAN, f32::INFINITY, -3.0, 7.0, f32::NEG_INFINITY, 0.5];
        let lens = plan(&mut scheduler, &odd, &[3, 3]);
        assert!(lens.iter().all(|&len| len <= 3));
        assert!(
            policy == Policy::Fixed || lens[0] == 0,
            "{policy}: a NaN was believed"
        );
        assert_eq!(scheduler.bad_confidences(), 5, "{policy}");
        scheduler.grade(&[Graded::default(); 2]);
    }
}

#[test]
fn fixed_verifies_what_the_limits_leave() {
    let mut scheduler = Scheduler::new(Policy::Fixed, None).unwrap();
    let mut plan = |draft_len, limits: &[usize]| {
        let slots = [0, 1, 2];
        let batch = Batch {
            slots: &slots[..limits.len()],
            limits,
            draft_len,
            ..Batch::default()
        };
        scheduler.plan(&batch).unwrap().verify_lens
    };
    assert_eq!(plan(3, &[9, 0, 2]), [3, 0, 2]);
    assert_eq!(plan(0, &[9, 0]), [0, 0]);
}

#[test]
fn algorithm_1_follows_the_cost() {
    let mut scheduler = Scheduler::new(Policy::Algorithm1, None).unwrap();
    let refused = |scheduler: &mut Scheduler, confidence: Option<&[f32]>| {
        let batch = Batch {
            slots: &[0],
            limits: &[2],
            draft_len: 2,
            confidence,
            context_tokens: 0,
        };
        scheduler.plan(&batch).is_err()
    };
    assert!(refused(&mut scheduler, Some(&[0.9; 2])), "no cost yet");
    assert!(refused(&mut scheduler, None), "no confidences");
    assert!(refused(&mut scheduler, Some(&[0.9; 3])), "one too many");
    let table =
        |per_token: f64| CostTable::new(vec![(1, 1.0), (9, 1.0 + 8.0 * per_token)]).unwrap();
    for (per_token, draft, expected) in [
        (0.01, None, 2),
        (0.85, None, 1),
        (2.0, None, 0),
        (2.0, Some(9.0), 2),
    ] {
        let draft = draft.map(|seconds| CostTable::new(vec![(1, seconds)]).unwrap());
        scheduler.set_cost(StepCost::new(table(per_token), draft));
        assert_eq!(plan(&mut scheduler, &[0.9; 2], &[2]), [expected]);
    }
}

#[test]
fn temperatures_calibrate_each_position() {
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
    let confidence = [0.8, 0.8, 0.0, 1.0];
    let calibrated = calibrate(&confidence, 2, Some(&[1.0, 2.0, 9.0])).unwrap();
    // logit 0.8 = ln 4; halved it is ln 2.
    assert!(
        near(&calibrated, &[0.8, 2.0 / 3.0, 0.0, 1.0]),
        "{calibrated:?}"
    );
    assert!(near(&survival(&calibrated, 2), &[0.8, 1.6 / 3.0, 0.0, 0.0]));
    assert_eq!(
        calibrate(&[f32::NAN, 2.0, -1.0], 3, None).unwrap(),
        [0.0, 1.0, 0.0]
    );
    assert!(calibrate(&confidence, 2, Some(&[1.0])).is_err());
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        assert!(Scheduler::new(Policy::Fixed, Some(vec![1.0, bad])).is_err());
    }
}

#[test]
fn policies_are_parsed_and_written() {
    for (text, policy) in [
        ("fixed", Policy::Fixed),
        ("threshold:0.5", Policy::Threshold(0.5)),
        ("threshold:1", Policy::Threshold(1.0)),
        ("algorithm1", Policy::Algorithm1),
        ("delayed", Policy::Delayed),
        ("global", Policy::Global),
    ] {
        assert_eq!(text.parse::<Policy>().unwrap(), policy);
        assert_eq!(policy.to_string(), text);
    }
    assert_eq!("adaptive".parse::<Policy>().unwrap(), Policy::Algorithm1);
    for text in [
        "",
        "Fixed",
        "threshold",
        "threshold:",
        "threshold:0",
        "threshold:1.5",
        "threshold:-1",
        "threshold:NaN",
        "adaptive:1",
    ] {
        let error = text.parse::<Policy>().unwrap_err().to_string();
        assert!(
            error.contains("threshold:X") && error.contains(&format!("`{text}`")),
            "{error}"
        );
    }
    assert!(Scheduler::new(Policy::Threshold(0.0), None).is_err());
}
