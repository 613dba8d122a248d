//! The schedule: Algorithm 1 against brute force, policies, costs, calibration.

use dspark::schedule::{
    CostTable, Policy, Scheduler, StepCost, calibrate, schedule_prefixes, survival,
};

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

fn throughput(
    survival: &[f32],
    draft_len: usize,
    lens: &[usize],
    sps: &dyn Fn(usize) -> f64,
) -> f64 {
    let admitted = lens
        .iter()
        .enumerate()
        .flat_map(|(r, &len)| &survival[r * draft_len..][..len]);
    let tau = lens.len() as f64 + admitted.map(|&a| f64::from(a)).sum::<f64>();
    tau * sps(lens.len() + lens.iter().sum::<usize>())
}

/// Every combination of lengths up to the limits.
fn all_lens(limits: &[usize]) -> Vec<Vec<usize>> {
    limits.iter().fold(vec![vec![]], |all, &limit| {
        all.iter()
            .flat_map(|lens| (0..=limit).map(move |l| [&lens[..], &[l]].concat()))
            .collect()
    })
}

/// Throughput by number of admitted drafts, best first: what Algorithm 1 walks along.
fn greedy_path(
    survival: &[f32],
    draft_len: usize,
    limits: &[usize],
    sps: &dyn Fn(usize) -> f64,
) -> Vec<f64> {
    let open = limits
        .iter()
        .enumerate()
        .flat_map(|(r, &l)| &survival[r * draft_len..][..l]);
    let mut open: Vec<f64> = open.map(|&a| f64::from(a)).collect();
    open.sort_by(|a, b| b.total_cmp(a));
    let mut tau = limits.len() as f64;
    let mut path = vec![tau * sps(limits.len())];
    for (i, a) in open.iter().enumerate() {
        tau += a;
        path.push(tau * sps(limits.len() + i + 1));
    }
    path
}

#[test]
fn algorithm_1_is_the_best_choice_where_throughput_is_unimodal() {
    let mut next = random(7);
    let (mut unimodal, mut inner) = (0, 0);
    for _ in 0..400 {
        let (num_reqs, draft_len) = (1 + (next() * 3.0) as usize, 1 + (next() * 4.0) as usize);
        let survival = random_survival(&mut next, num_reqs, draft_len);
        let limits: Vec<usize> = (0..num_reqs)
            .map(|_| (next() * (draft_len as f64 + 1.0)) as usize)
            .collect();
        let slope = next() * 0.4;
        let sps = move |b: usize| 1.0 / (1.0 + slope * b as f64);
        let lens = schedule_prefixes(&survival, draft_len, &limits, sps);
        assert!(lens.iter().zip(&limits).all(|(len, limit)| len <= limit));

        let path = greedy_path(&survival, draft_len, &limits, &sps);
        let peak = path.windows(2).take_while(|w| w[1] > w[0]).count();
        if path[peak..].windows(2).all(|w| w[1] <= w[0]) {
            let best = all_lens(&limits)
                .iter()
                .map(|lens| throughput(&survival, draft_len, lens, &sps))
                .fold(0.0, f64::max);
            let got = throughput(&survival, draft_len, &lens, &sps);
            assert!((got - best).abs() < 1e-9, "{got} of {best}");
            unimodal += 1;
            inner += usize::from(peak > 0 && peak + 1 < path.len());
        }
    }
    assert!(
        unimodal > 300 && inner > 50,
        "{unimodal} cases, {inner} with an inner peak"
    );
}

#[test]
fn a_cliff_stops_algorithm_1_before_a_higher_peak() {
    // Sure drafts; three tokens are slow, four as fast as two.
    let sps = |b: usize| [0.0, 1.0, 0.9, 0.1, 0.9][b];
    assert_eq!(schedule_prefixes(&[1.0, 1.0, 1.0], 3, &[3], sps), [1]);
}

#[test]
fn algorithm_1_does_not_depend_on_the_order_of_requests() {
    let mut next = random(11);
    for _ in 0..200 {
        let draft_len = 3;
        let survival = random_survival(&mut next, 3, draft_len);
        let sps = |b: usize| 1.0 / (1.0 + 0.15 * b as f64);
        let lens = schedule_prefixes(&survival, draft_len, &[3, 2, 3], sps);
        let turned = [&survival[3..], &survival[..3]].concat();
        let turned = schedule_prefixes(&turned, draft_len, &[2, 3, 3], sps);
        assert_eq!(turned, [lens[1], lens[2], lens[0]]);
    }
}

#[test]
fn ties_go_to_the_first_request_then_the_first_position() {
    // Room for exactly three drafts among equals.
    let sps = |b: usize| if b <= 5 { 1.0 } else { 0.1 };
    assert_eq!(schedule_prefixes(&[1.0; 4], 2, &[2, 2], sps), [2, 1]);
    // No rise is a stop: a worthless draft is not verified, even for free.
    assert_eq!(schedule_prefixes(&[0.0; 2], 2, &[2], |_| 1.0), [0]);
}

#[test]
fn the_threshold_cuts_before_the_first_low_confidence() {
    let scheduler = Scheduler::new(Policy::Threshold(0.5), None).unwrap();
    let confidence = [0.9, 0.5, 0.4, 0.9, 0.9, 0.9, f32::NAN, 0.9, 0.9];
    let lens = scheduler.plan(Some(&confidence), 3, &[3, 2, 3]).unwrap();
    assert_eq!(lens, [2, 2, 0]);
}

#[test]
fn fixed_verifies_what_the_limits_leave() {
    let scheduler = Scheduler::new(Policy::Fixed, None).unwrap();
    assert_eq!(scheduler.plan(None, 3, &[9, 0, 2]).unwrap(), [3, 0, 2]);
    assert_eq!(scheduler.plan(None, 0, &[9, 0]).unwrap(), [0, 0]);
}

#[test]
fn adaptive_follows_the_cost() {
    let mut scheduler = Scheduler::new(Policy::Adaptive, None).unwrap();
    assert!(
        scheduler.plan(Some(&[0.9; 2]), 2, &[2]).is_err(),
        "no cost yet"
    );
    assert!(scheduler.plan(None, 2, &[2]).is_err(), "no confidences");
    assert!(
        scheduler.plan(Some(&[0.9; 3]), 2, &[2]).is_err(),
        "a confidence too many"
    );
    let table =
        |per_token: f64| CostTable::new(vec![(1, 1.0), (9, 1.0 + 8.0 * per_token)]).unwrap();
    for (per_token, draft, expected) in [
        (0.01, None, 2),
        (0.85, None, 1),
        (2.0, None, 0),
        (2.0, Some(9.0), 2),
    ] {
        scheduler.set_cost(StepCost {
            verify: table(per_token),
            draft: draft.map(|seconds| CostTable::new(vec![(1, seconds)]).unwrap()),
        });
        assert_eq!(
            scheduler.plan(Some(&[0.9; 2]), 2, &[2]).unwrap(),
            [expected]
        );
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
        ("adaptive", Policy::Adaptive),
    ] {
        assert_eq!(text.parse::<Policy>().unwrap(), policy);
        assert_eq!(policy.to_string(), text);
    }
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

#[test]
fn costs_are_cleaned_and_interpolated() {
    let table = CostTable::new(vec![(8, 4.0), (2, 2.0), (4, 1.5), (2, 3.0)]).unwrap();
    assert_eq!(table.points(), [(2, 2.0), (4, 2.0), (8, 4.0)]);
    for (tokens, seconds) in [
        (1, 2.0),
        (2, 2.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.5),
        (8, 4.0),
        (10, 5.0),
    ] {
        assert_eq!(table.seconds(tokens), seconds, "{tokens} tokens");
    }
    assert_eq!(CostTable::new(vec![(3, 0.5)]).unwrap().seconds(100), 0.5);
    let bad: [&[(usize, f64)]; 6] = [
        &[],
        &[(1, f64::NAN)],
        &[(1, 1.0), (2, 0.0)],
        &[(1, -1.0)],
        &[(1, f64::INFINITY)],
        &[(0, 1.0)],
    ];
    for points in bad {
        assert!(CostTable::new(points.to_vec()).is_err(), "{points:?}");
    }
}
