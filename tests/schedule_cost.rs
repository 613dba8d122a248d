//! What a step costs: tables cleaned and interpolated, terms added up, files refused where they are not sound.

mod schedule_support;

use dspark::schedule::{CostFile, CostIdentity, CostTable, PairIdentity, StepShape};
use schedule_support::jagged;

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

#[test]
fn a_step_is_priced_by_bucket_context_and_draft_and_never_falls() {
    let cost = jagged();
    let seconds = |num_drafted, num_tokens, context_tokens| {
        cost.seconds(StepShape {
            num_drafted,
            num_tokens,
            context_tokens,
            drafted_context_tokens: context_tokens,
        })
    };
    assert_eq!(seconds(0, 5, 0), seconds(0, 8, 0), "one bucket");
    assert!(seconds(0, 9, 0) > seconds(0, 8, 0));
    assert!((seconds(0, 4, 1000) - seconds(0, 4, 0) - 0.1).abs() < 1e-9);
    assert!((seconds(1, 4, 0) - seconds(0, 4, 0) - 0.1).abs() < 1e-9);
    for tokens in 1..100 {
        assert!(seconds(0, tokens + 1, 0) >= seconds(0, tokens, 0));
    }
    let refused = |buckets: Vec<usize>| jagged().with_buckets(buckets).is_err();
    assert!(refused(vec![4, 4]) && refused(vec![0, 4]) && refused(vec![8, 4]));
    assert!(jagged().with_context(f64::NAN).is_err());
    assert!(jagged().with_context(-1.0).is_err());
}

#[test]
fn bad_cost_files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cost.json");
    let identity = CostIdentity {
        pair: PairIdentity {
            target: "t".into(),
            drafter: "d".into(),
        },
        device: "GPU A".into(),
        build: "1".into(),
        draft_len: 7,
    };
    let good = CostFile::new(&jagged(), identity.clone(), "measured");
    good.write(&file).unwrap();
    let read = CostFile::read(&file).unwrap();
    assert_eq!((&read, read.cost(&file).unwrap()), (&good, jagged()));
    read.check(&file, &identity).unwrap();

    let refused = |change: &dyn Fn(&mut CostFile), name: &str| {
        let mut bad = good.clone();
        change(&mut bad);
        let error = bad.cost(&file).unwrap_err().to_string();
        assert!(
            error.contains("cost.json") && error.contains(name),
            "{error}"
        );
    };
    refused(&|f| f.verify.clear(), "cost table");
    refused(&|f| f.verify[1].1 = 0.5, "verify");
    refused(&|f| f.verify[1].1 = f64::NAN, "verify");
    refused(&|f| f.verify[0].1 = 0.0, "cost table");
    refused(&|f| f.draft.clear(), "cost table");
    refused(&|f| f.draft[0].0 = 0, "cost table");
    refused(
        &|f| f.seconds_per_context_token = -1.0,
        "seconds_per_context_token",
    );
    refused(&|f| f.buckets = vec![3, 2], "buckets");

    let other = |change: &dyn Fn(&mut CostIdentity), name: &str| {
        let mut wanted = identity.clone();
        change(&mut wanted);
        let error = good.check(&file, &wanted).unwrap_err().to_string();
        assert!(
            error.contains("cost.json") && error.contains(name),
            "{error}"
        );
    };
    other(&|i| i.device = "GPU B".into(), "device");
    other(&|i| i.draft_len = 5, "draft_len");
    other(&|i| i.build = "2".into(), "build");
    other(&|i| i.pair.target = "x".into(), "target");
    other(&|i| i.pair.drafter = "x".into(), "drafter");
    for text in ["", "{}", "{\"version\": 1}"] {
        std::fs::write(&file, text).unwrap();
        assert!(
            CostFile::read(&file)
                .unwrap_err()
                .to_string()
                .contains("cost.json")
        );
    }
}
