//! `dspark simulate`: recorded rounds against a step cost, for any load and rule.

use anyhow::Result;
use dspark::schedule::simulate::{Arrivals, RecordedRequest, Rule, SimReport, Simulation};
use dspark::schedule::{Adapt, Calibration, CostFile};
use serde::Serialize;

use crate::args::SimulateArgs;
use crate::{progress, trace};

/// One rule at one load.
#[derive(Serialize)]
struct Row {
    load: usize,
    rule: String,
    tokens_per_second: f64,
    tokens_per_second_per_user: f64,
    /// The same with the time before the request was let in.
    tokens_per_second_served: f64,
    verified_per_round: f64,
    /// Of the verified drafts, those accepted; none where nothing was verified.
    accepted_share: Option<f64>,
    drafted_share: f64,
    /// Against the best of no drafts and every fixed length at this load.
    of_best_fixed: f64,
    /// What is missing to the oracle.
    regret: f64,
    #[serde(flatten)]
    report: SimReport,
}

pub fn run(args: &SimulateArgs) -> Result<()> {
    let requests: Vec<RecordedRequest> = trace::read_requests(&args.traces)?;
    let cost = CostFile::read(&args.cost)?.cost(&args.cost)?;
    let calibration = args
        .calibration
        .as_deref()
        .map(Calibration::read)
        .transpose()?;
    let rounds = requests.iter().flat_map(|request| &request.rounds);
    let longest = rounds
        .map(|round| round.confidence.len())
        .min()
        .unwrap_or(0);
    let draft_len = args.draft_len.unwrap_or(longest);
    let rules: Vec<Rule> = std::iter::once(Rule::None)
        .chain((1..=draft_len).map(Rule::Length))
        .chain(args.rules.iter().map(|&policy| Rule::Policy(policy)))
        .chain([Rule::Oracle])
        .collect();
    let bar = progress::bar("runs", rules.len() * args.loads.len());
    let mut rows = Vec::new();
    for &load in &args.loads {
        let simulation = Simulation {
            requests: &requests,
            cost: &cost,
            draft_len,
            temperatures: calibration.as_ref().map(|c| &*c.temperatures),
            adapt: if args.adapt { Adapt::ON } else { Adapt::OFF },
            num_reqs: load,
            arrivals: args.arrivals,
            prompt_len: args.prompt_len,
            num_tokens: args.num_tokens,
            num_steps: args.steps,
            seed: args.seed,
        };
        let mut reports = Vec::new();
        for &rule in &rules {
            reports.push((rule, simulation.run(rule)?));
            bar.inc(1);
        }
        rows.extend(compare(load, &reports));
    }
    bar.finish_and_clear();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print(&rows);
    }
    Ok(())
}

fn compare(load: usize, reports: &[(Rule, SimReport)]) -> Vec<Row> {
    let rate_of = |wanted: &dyn Fn(Rule) -> bool| {
        let rates = reports.iter().filter(|(rule, _)| wanted(*rule));
        rates
            .map(|(_, r)| r.tokens_per_second())
            .fold(0.0, f64::max)
    };
    let best_fixed = rate_of(&|rule| matches!(rule, Rule::None | Rule::Length(_)));
    let oracle = rate_of(&|rule| rule == Rule::Oracle);
    reports
        .iter()
        .map(|&(rule, report)| {
            let rate = report.tokens_per_second();
            let rounds = report.num_rounds.max(1) as f64;
            Row {
                load,
                rule: name(rule),
                tokens_per_second: rate,
                tokens_per_second_per_user: report.tokens_per_second_per_user(),
                tokens_per_second_served: report.tokens_per_second_served(),
                verified_per_round: report.num_verified as f64 / rounds,
                accepted_share: (report.num_verified > 0)
                    .then(|| report.num_accepted as f64 / report.num_verified as f64),
                drafted_share: report.num_drafted as f64 / rounds,
                of_best_fixed: rate / best_fixed,
                regret: 1.0 - rate / oracle,
                report,
            }
        })
        .collect()
}

fn name(rule: Rule) -> String {
    match rule {
        Rule::None => "none".into(),
        Rule::Length(len) => format!("fixed {len}"),
        Rule::Policy(policy) => policy.to_string(),
        Rule::Oracle => "oracle".into(),
    }
}

fn print(rows: &[Row]) {
    println!(
        "load  rule             tok/s  tok/s/user  with waiting  verified/round  accepted  drafted  of best fixed  regret"
    );
    for row in rows {
        let accepted = row
            .accepted_share
            .map_or("-".into(), |share| format!("{:.1}%", 100.0 * share));
        println!(
            "{:>4}  {:<14} {:>8.0} {:>11.1} {:>13.1} {:>15.2} {accepted:>9} {:>7.0}% {:>14.3} {:>6.1}%",
            row.load,
            row.rule,
            row.tokens_per_second,
            row.tokens_per_second_per_user,
            row.tokens_per_second_served,
            row.verified_per_round,
            100.0 * row.drafted_share,
            row.of_best_fixed,
            100.0 * row.regret
        );
    }
}

/// `closed`, `poisson:RATE`, `bursts:CALM:BUSY:SECONDS`, `waves:TOKENS:LOW` or `tides:SECONDS:LOW`.
pub fn parse_arrivals(text: &str) -> Result<Arrivals, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let positive = |text: &str| {
        let number = text.parse().ok();
        number.filter(|x: &f64| x.is_finite() && *x > 0.0)
    };
    let count = |text: &str| text.parse().ok().filter(|&n: &usize| n > 0);
    let arrivals = match parts.as_slice() {
        ["closed"] => Some(Arrivals::Closed),
        ["poisson", rate] => positive(rate).map(Arrivals::Poisson),
        ["bursts", calm, busy, seconds] => (|| {
            Some(Arrivals::Bursts {
                calm: positive(calm)?,
                busy: positive(busy)?,
                seconds: positive(seconds)?,
            })
        })(),
        ["waves", tokens, low] => count(tokens).zip(count(low)).map(|(tokens, low)| {
            let tokens = tokens as u64;
            Arrivals::Waves { tokens, low }
        }),
        ["tides", seconds, low] => positive(seconds)
            .zip(count(low))
            .map(|(seconds, low)| Arrivals::Tides { seconds, low }),
        _ => None,
    };
    arrivals.ok_or_else(|| {
        "expected closed, poisson:RATE (requests a second), bursts:CALM:BUSY:SECONDS, waves:TOKENS:LOW or \
         tides:SECONDS:LOW"
            .to_owned()
    })
}
