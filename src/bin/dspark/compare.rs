//! `dspark compare`: the same prompts without a drafter and with each of several, side by side.

use anyhow::Result;
use dspark::engine::{Completion, Event, Piece};
use dspark::model::TargetConfig;
use dspark::ops::Ops;
use serde::Serialize;

use crate::args::{CompareArgs, Mode};
use crate::generate::paint;
use crate::report::{Figures, table};
use crate::session::{self, Drafting, Job, Texts};
use crate::{colour, prompts};

/// One mode's outputs.
struct Outcome {
    name: &'static str,
    device: String,
    completions: Vec<Completion>,
    /// Of the first prompt.
    pieces: Vec<Piece>,
    figures: Figures,
}

/// The JSON form of a comparison.
#[derive(Serialize)]
struct Row<'a> {
    mode: &'a str,
    device: &'a str,
    #[serde(flatten)]
    figures: &'a Figures,
    /// Requests whose tokens are those of mode none; meaningful at temperature 0.
    same_as_none: usize,
}

pub fn run(args: &CompareArgs) -> Result<()> {
    let texts = Texts::load(&args.run.target)?;
    let mut prompts = prompts::load(&args.prompts, texts.tokenizer.as_ref(), args.sampling.raw)?;
    prompts.truncate(args.limit.unwrap_or(prompts.len()).max(1));
    let mut runs = vec![Drafting::none()];
    for (mode, dir) in &args.draft {
        let mut draft_args = args.drafting.clone();
        if *mode == Mode::Mtp {
            draft_args.draft_len = Some(1);
        }
        runs.push(Drafting::new(
            Some(*mode),
            Some(dir),
            &args.run.target,
            &draft_args,
        )?);
    }
    let mut outcomes = Vec::new();
    for drafting in &runs {
        eprintln!(
            "running {} on {} prompts",
            drafting.mode.name(),
            prompts.len()
        );
        let job = Compare {
            args,
            texts: &texts,
            prompts: &prompts,
            drafting,
        };
        outcomes.push(session::on_device(args.run.device, args.run.threads, job)?);
    }
    if args.json {
        let rows: Vec<Row> = outcomes
            .iter()
            .map(|outcome| row(outcome, &outcomes[0]))
            .collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print(&outcomes, args.sampling.temperature == 0.0);
    }
    Ok(())
}

struct Compare<'a> {
    args: &'a CompareArgs,
    texts: &'a Texts,
    prompts: &'a [Vec<u32>],
    drafting: &'a Drafting,
}

impl Job for Compare<'_> {
    type Output = Outcome;

    fn run<O: Ops + 'static>(self, ops: O) -> Result<Outcome> {
        let Self {
            args,
            texts,
            prompts,
            drafting,
        } = self;
        let context = TargetConfig::read(&args.run.target)?.decoder.max_position;
        let longest = session::longest(prompts, args.sampling.max_new_tokens, context);
        let mut engine = session::start(ops, &args.run, drafting, prompts.len(), longest)?;
        for (index, prompt) in prompts.iter().enumerate() {
            engine.submit(texts.request(prompt.clone(), index, &args.sampling))?;
        }
        let mut first = Vec::new();
        let completions = session::finish(&mut engine, |event| {
            if let Event::Tokens { request: 0, pieces } = event {
                first.extend_from_slice(pieces);
            }
        })?;
        let figures = Figures::new(&completions, engine.times());
        let device = engine.ops().describe();
        Ok(Outcome {
            name: drafting.mode.name(),
            device,
            completions,
            pieces: first,
            figures,
        })
    }
}

fn row<'a>(outcome: &'a Outcome, base: &Outcome) -> Row<'a> {
    Row {
        mode: outcome.name,
        device: &outcome.device,
        figures: &outcome.figures,
        same_as_none: num_same(outcome, base),
    }
}

fn num_same(outcome: &Outcome, base: &Outcome) -> usize {
    let pairs = outcome.completions.iter().zip(&base.completions);
    pairs.filter(|(a, b)| a.tokens == b.tokens).count()
}

fn print(outcomes: &[Outcome], greedy: bool) {
    let colour = colour();
    if outcomes[0].completions.len() == 1 {
        for outcome in outcomes {
            println!(
                "--- {}\n{}\n",
                outcome.name,
                paint(&outcome.pieces, colour).trim_end()
            );
        }
        if colour {
            println!("(drafted and accepted tokens are green)\n");
        }
    }
    println!("{}", outcomes[0].device);
    let rows: Vec<_> = outcomes
        .iter()
        .map(|o| (o.name.to_owned(), o.figures.clone()))
        .collect();
    print!("{}", table(&rows));
    if greedy {
        for outcome in &outcomes[1..] {
            let (same, all) = (num_same(outcome, &outcomes[0]), outcome.completions.len());
            println!(
                "{}: {same} of {all} outputs are token for token those of none",
                outcome.name
            );
        }
    }
}
