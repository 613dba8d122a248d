//! The demo pair's recorded rounds on the measured cost of Qwen3-8B's shape on an H100: the schedule against no drafts,
//! every fixed length and an oracle; calibration before and after.

use std::path::Path;

use dspark::schedule::metrics::ece;
use dspark::schedule::simulate::{Arrivals, RecordedRequest, Rule, SimReport, Simulation};
use dspark::schedule::sts::{self, RecordedRound};
use dspark::schedule::{
    Adapt, Batch, Calibration, CostFile, CostTable, Graded, Policy, Scheduler, StepCost,
};

const DRAFT_LEN: usize = 7;

fn path(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

#[derive(serde::Deserialize)]
struct Trace {
    requests: Vec<RecordedRequest>,
}

/// Recorded requests of these domains.
fn traces(domains: &[&str]) -> Vec<RecordedRequest> {
    let read = |domain: &&str| {
        let file = path(&format!("tests/traces/{domain}.json"));
        let trace: Trace = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        trace.requests
    };
    domains.iter().flat_map(read).collect()
}

/// The step as it was first measured, and with later kernels and the drafter's look counted as part of drafting.
const COSTS: [&str; 2] = ["h100-qwen3-8b-cost.json", "h100-qwen3-8b-cost-2.json"];

fn h100(name: &str) -> StepCost {
    let file = path("tests/traces").join(name);
    CostFile::read(&file).unwrap().cost(&file).unwrap()
}

fn temperatures() -> Vec<f32> {
    let file = path("tools/demo/dspark/calibration.json");
    Calibration::read(&file).unwrap().temperatures
}

/// Everything a run needs but the load.
struct Bench {
    requests: Vec<RecordedRequest>,
    cost: StepCost,
    temperatures: Vec<f32>,
}

impl Bench {
    fn new(domains: &[&str]) -> Self {
        Self::at_cost(domains, COSTS[0])
    }

    fn at_cost(domains: &[&str], cost: &str) -> Self {
        Self {
            requests: traces(domains),
            cost: h100(cost),
            temperatures: temperatures(),
        }
    }

    fn simulation(&self, num_reqs: usize, arrivals: Arrivals) -> Simulation<'_> {
        Simulation {
            requests: &self.requests,
            cost: &self.cost,
            draft_len: DRAFT_LEN,
            temperatures: Some(&self.temperatures),
            adapt: Adapt::ON,
            num_reqs,
            arrivals,
            prompt_len: 512,
            num_tokens: 512,
            num_steps: (16_000 / num_reqs).clamp(600, 6000),
            seed: 1,
        }
    }

    fn rate(&self, num_reqs: usize, arrivals: Arrivals, rule: Rule) -> f64 {
        let report = self.simulation(num_reqs, arrivals).run(rule).unwrap();
        report.tokens_per_second()
    }

    /// The best of no drafts and every fixed length.
    fn best_fixed(&self, num_reqs: usize, arrivals: Arrivals) -> f64 {
        (1..=DRAFT_LEN)
            .map(Rule::Length)
            .chain([Rule::None])
            .map(|rule| self.rate(num_reqs, arrivals, rule))
            .fold(0.0, f64::max)
    }
}

#[test]
fn never_below_the_best_fixed_length_at_any_load() {
    COSTS.into_iter().for_each(check_every_load);
}

fn check_every_load(cost: &str) {
    for domains in [
        &["math"][..],
        &["code"],
        &["chat"],
        &["math", "code", "chat"],
    ] {
        let bench = Bench::at_cost(domains, cost);
        for num_reqs in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] {
            let best = bench.best_fixed(num_reqs, Arrivals::Closed);
            let oracle = bench.rate(num_reqs, Arrivals::Closed, Rule::Oracle);
            for policy in [Policy::Delayed, Policy::Algorithm1] {
                let rate = bench.rate(num_reqs, Arrivals::Closed, Rule::Policy(policy));
                let (share, regret) = (rate / best, 1.0 - rate / oracle);
                println!(
                    "{cost} {domains:?} {num_reqs:>3} {policy}: {share:.3} of best, regret {regret:.3}"
                );
                let least = if policy == Policy::Delayed {
                    0.99
                } else {
                    0.98
                };
                assert!(
                    share >= least,
                    "{domains:?} at {num_reqs}, {policy}: {share}"
                );
                assert!(
                    regret > -0.01,
                    "{domains:?} at {num_reqs}: the oracle was beaten"
                );
            }
        }
    }
}

/// What `delayed` reaches of the best that no drafts and every fixed length reach, by `figure` of the report.
fn share_of_best_fixed(simulation: &Simulation<'_>, figure: fn(&SimReport) -> f64) -> f64 {
    let rate = |rule| figure(&simulation.run(rule).unwrap());
    let lengths = (1..=DRAFT_LEN).map(Rule::Length);
    let best = lengths.chain([Rule::None]).map(rate).fold(0.0, f64::max);
    rate(Rule::Policy(Policy::Delayed)) / best
}

/// Phases of equal work or of equal time. How much there is to gain depends on the loads: with 512 and 4 the time of one
/// phase, or the tokens of the other, are nearly all there is, and the fixed length that suits it cannot be beaten much.
#[test]
fn a_tenth_above_the_best_fixed_length_where_loads_mix() {
    let work = |low| Arrivals::Waves {
        tokens: 100_000,
        low,
    };
    let time = |low| Arrivals::Tides { seconds: 10.0, low };
    // The later kernels made short passes faster, and with them long drafts at low load.
    for (num_reqs, arrivals, least) in [
        (512, work(64), [1.10, 1.10]),
        (512, work(16), [1.10, 1.08]),
        (256, time(64), [1.10, 1.05]),
        (512, work(4), [1.02, 1.02]),
        (512, time(16), [1.04, 1.03]),
        (512, time(4), [1.0, 1.0]),
    ] {
        for (cost, least) in COSTS.into_iter().zip(least) {
            let bench = Bench::at_cost(&["math", "code", "chat"], cost);
            let mut simulation = bench.simulation(num_reqs, arrivals);
            simulation.num_steps = 12_000;
            let share = share_of_best_fixed(&simulation, SimReport::tokens_per_second);
            println!("{cost} {num_reqs} and {arrivals:?}: {share:.3} of the best fixed length");
            assert!(
                share >= least,
                "{cost} {num_reqs} and {arrivals:?}: {share}"
            );
        }
    }
}

/// Arrivals that the machine keeps up with: throughput is what arrives, and what differs is how fast a request is.
#[test]
fn arriving_requests_are_served_faster() {
    let bench = Bench::new(&["math", "code", "chat"]);
    for (arrivals, least) in [
        (Arrivals::Poisson(15.0), 1.05),
        (
            Arrivals::Bursts {
                calm: 2.0,
                busy: 30.0,
                seconds: 20.0,
            },
            1.02,
        ),
    ] {
        let mut simulation = bench.simulation(512, arrivals);
        simulation.num_steps = 4000;
        let throughput = share_of_best_fixed(&simulation, SimReport::tokens_per_second);
        let served = share_of_best_fixed(&simulation, SimReport::tokens_per_second_served);
        println!(
            "{arrivals:?}: throughput {throughput:.3}, tokens/s as seen by a user {served:.3}"
        );
        assert!(throughput >= 0.99, "{arrivals:?}: {throughput}");
        assert!(served >= least, "{arrivals:?}: {served}");
    }
}

/// Half the requests are hopeless: only the others are drafted for.
#[test]
fn requests_that_pay_are_told_from_those_that_do_not() {
    for (num_reqs, least) in [
        (8, [1.0, 1.0]),
        (32, [1.05, 1.05]),
        (64, [1.10, 1.08]),
        (128, [1.0, 1.0]),
        (512, [0.99, 0.99]),
    ] {
        for (cost, least) in COSTS.into_iter().zip(least) {
            let mut bench = Bench::at_cost(&["math"], cost);
            bench.requests.extend(vec![hopeless(); 72]);
            let simulation = bench.simulation(num_reqs, Arrivals::Closed);
            let share = share_of_best_fixed(&simulation, SimReport::tokens_per_second);
            println!("{cost} half hopeless at {num_reqs}: {share:.3} of the best fixed length");
            assert!(share >= least, "{cost} {num_reqs}: {share}");
        }
    }
}

/// A request of which no draft is ever accepted.
fn hopeless() -> RecordedRequest {
    let round = RecordedRound {
        confidence: vec![0.05; DRAFT_LEN],
        verify_len: DRAFT_LEN,
        num_accepted: 0,
    };
    RecordedRequest {
        rounds: vec![round; 10],
    }
}

#[test]
fn hard_text_costs_at_most_one_percent() {
    for cost in COSTS {
        let mut bench = Bench::at_cost(&["chat"], cost);
        bench.requests = vec![hopeless()];
        for num_reqs in [1, 2, 8, 32, 64, 128, 256, 512] {
            let none = bench.rate(num_reqs, Arrivals::Closed, Rule::None);
            let delayed = bench.rate(num_reqs, Arrivals::Closed, Rule::Policy(Policy::Delayed));
            let share = delayed / none;
            println!("{cost} hard text at {num_reqs}: {share:.4} of no drafts");
            assert!(share >= 0.99, "{cost} {num_reqs}: {delayed} of {none}");
        }
    }
}

/// From a start at which nothing is known, with confidences that are wrong and that no temperature can mend: what finding that
/// out costs is the same for a short text and for a long one.
#[test]
fn hard_text_costs_at_most_one_percent_from_the_start() {
    for cost in COSTS {
        for (num_reqs, num_steps) in [(1, 400), (1, 2000), (8, 500), (64, 500), (64, 1200)] {
            let mut bench = Bench::at_cost(&["chat"], cost);
            let mut request = hopeless();
            for round in &mut request.rounds {
                round.confidence = vec![0.48; DRAFT_LEN];
            }
            bench.requests = vec![request];
            let simulation = Simulation {
                num_steps,
                num_tokens: 1_000_000,
                prompt_len: 32,
                ..bench.simulation(num_reqs, Arrivals::Closed)
            };
            let none = simulation.run(Rule::None).unwrap();
            let delayed = Rule::Policy(Policy::Delayed);
            let delayed = simulation.run(delayed).unwrap();
            let lost = delayed.seconds - none.seconds;
            let share = lost / none.seconds;
            let drafted = delayed.num_drafted;
            println!(
                "{cost} {num_reqs} x {num_steps}: {:.1} ms, {:.2} % lost, {drafted} rounds drafted",
                1e3 * lost,
                100.0 * share
            );
            assert!(share <= 0.01, "{cost} {num_reqs} x {num_steps}: {share}");
        }
    }
}

#[test]
fn runs_repeat_by_seed_and_serve_arrivals() {
    let bench = Bench::new(&["chat"]);
    let delayed = Rule::Policy(Policy::Delayed);
    let run = |seed, arrivals| -> SimReport {
        let simulation = Simulation {
            seed,
            num_steps: 500,
            ..bench.simulation(32, arrivals)
        };
        simulation.run(delayed).unwrap()
    };
    assert_eq!(run(1, Arrivals::Closed), run(1, Arrivals::Closed));
    assert_ne!(run(1, Arrivals::Closed), run(2, Arrivals::Closed));
    // Few arrivals leave the batch nearly empty: a request is faster than in a full one.
    let few = run(1, Arrivals::Poisson(0.2));
    assert!(few.request_seconds < few.seconds * 8.0 && few.wait_seconds < few.seconds);
    let full = run(1, Arrivals::Closed);
    assert!(few.tokens_per_second_per_user() > full.tokens_per_second_per_user());
}

#[test]
fn senseless_simulations_are_refused_by_name() {
    let bench = Bench::new(&["chat"]);
    let good = bench.simulation(4, Arrivals::Closed);
    let refused = |simulation: Simulation<'_>, name: &str| {
        let error = simulation.run(Rule::None).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    };
    refused(
        Simulation {
            num_reqs: 0,
            ..good.clone()
        },
        "num_reqs",
    );
    refused(
        Simulation {
            num_tokens: 0,
            ..good.clone()
        },
        "num_tokens",
    );
    refused(
        Simulation {
            requests: &[],
            ..good.clone()
        },
        "requests",
    );
    refused(
        Simulation {
            draft_len: 9,
            ..good.clone()
        },
        "rounds",
    );
    let empty = [RecordedRequest::default()];
    refused(
        Simulation {
            requests: &empty,
            ..good
        },
        "requests",
    );
    // A cost without points cannot be made at all.
    assert!(CostTable::new(Vec::new()).is_err());
}

fn rounds(domains: &[&str]) -> Vec<RecordedRound> {
    let requests = traces(domains).into_iter();
    requests.flat_map(|request| request.rounds).collect()
}

#[test]
fn the_shipped_temperatures_calibrate_the_recorded_rounds() {
    let rounds = rounds(&["math", "code", "chat"]);
    for fit in sts::report(&rounds, &temperatures()) {
        println!("{fit:?}");
        assert!(fit.after.ece <= 0.02, "{fit:?}");
        // What is left is mostly chance: right predictions would show an error, too, on so few rounds.
        assert!(fit.after.ece <= fit.after.ece_floor + 0.008, "{fit:?}");
        assert!(fit.after.brier <= fit.before.brier + 1e-3, "{fit:?}");
    }
}

/// Errors of the predicted survivals while rounds pass by.
fn online_errors(scheduler: &mut Scheduler, rounds: &[RecordedRound]) -> Vec<f64> {
    let mut seen = vec![Vec::new(); DRAFT_LEN];
    for round in rounds {
        let plan = scheduler
            .plan(&Batch {
                slots: &[0],
                limits: &[DRAFT_LEN],
                draft_len: DRAFT_LEN,
                confidence: Some(&round.confidence),
                context_tokens: 0,
            })
            .unwrap();
        let mut survival = 1.0;
        for (k, c) in plan.predicted.unwrap().into_iter().enumerate() {
            survival *= f64::from(c);
            seen[k].push((survival, round.num_accepted > k));
        }
        scheduler.grade(&[Graded {
            verify_len: DRAFT_LEN,
            num_accepted: round.num_accepted,
            excluded: false,
        }]);
    }
    seen.iter().map(|predictions| ece(predictions)).collect()
}

#[test]
fn online_temperatures_follow_from_code_to_chat() {
    let run = |adapt: Adapt, offline: &[f32]| {
        let mut scheduler = Scheduler::new(Policy::Threshold(0.5), Some(offline.to_vec())).unwrap();
        scheduler.set_adapt(adapt);
        online_errors(&mut scheduler, &rounds(&["code"]));
        online_errors(&mut scheduler, &rounds(&["chat"]))
    };
    // Offline temperatures of the drafter's own, and ones that are far off: what is learnt must make up for them.
    let own = temperatures();
    for (offline, name) in [(own, "shipped"), (vec![0.4; DRAFT_LEN], "wrong")] {
        let (kept, learnt) = (run(Adapt::OFF, &offline), run(Adapt::ON, &offline));
        println!(
            "chat after code, {name} temperatures, ECE by position: kept {kept:.4?}, online {learnt:.4?}"
        );
        assert!(learnt.iter().all(|&ece| ece <= 0.02), "{name}: {learnt:?}");
        if name == "wrong" {
            assert!(learnt[0] < kept[0] / 5.0, "{kept:?}, {learnt:?}");
        }
    }
}
