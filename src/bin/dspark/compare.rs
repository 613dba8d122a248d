//! `dspark compare`: the same prompts without a drafter and with each of several, side by side.

use std::io::{self, Write as _};
use std::num::NonZeroUsize;

use anyhow::Result;
use dspark::engine::{Completion, Event, Piece};
use dspark::ops::Ops;
use serde::Serialize;

use crate::args::{CompareArgs, DraftArgs, Mode};
use crate::generate::paint;
use crate::report::{Figures, table};
use crate::session::{self, Drafting, Job, Texts};
use crate::{colour, note, prompts};

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
    prompts.truncate(args.limit.map_or(prompts.len(), NonZeroUsize::get));
    let mut runs = vec![Drafting::none()];
    for (mode, dir) in &args.draft {
        let draft_args = draft_args(*mode, &args.drafting);
        let target = &args.run.target;
        runs.push(Drafting::new(Some(*mode), Some(dir), target, &draft_args)?);
    }
    let mut outcomes = Vec::new();
    for drafting in &runs {
        let (mode, count) = (drafting.mode.name(), prompts.len());
        note(format_args!("running {mode} on {count} prompts"));
        let job = Compare {
            args,
            texts: &texts,
            prompts: &prompts,
            drafting,
        };
        outcomes.push(session::on_device_of(&args.run, job)?);
    }
    let mut out = io::stdout().lock();
    if args.json {
        let rows: Vec<Row> = outcomes
            .iter()
            .map(|outcome| row(outcome, &outcomes[0]))
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
    } else {
        print(&mut out, &outcomes, args.sampling.temperature == 0.0)?;
    }
    Ok(())
}

/// The options as far as a mode has them: an MTP-1 module drafts one token, and only DSpark's drafters are scheduled.
fn draft_args(mode: Mode, args: &DraftArgs) -> DraftArgs {
    match mode {
        Mode::Dspark | Mode::None => args.clone(),
        Mode::Dflash => DraftArgs {
            draft_len: args.draft_len,
            head_form: args.head_form,
            ..DraftArgs::fixed()
        },
        Mode::Mtp => DraftArgs {
            draft_len: Some(1),
            ..DraftArgs::fixed()
        },
    }
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
        let requests = texts.requests(prompts, &args.sampling);
        let mut engine = session::start(ops, &args.run, drafting, requests)?;
        let mut first = Vec::new();
        let completions = session::finish(&mut engine, |event| {
            if let Event::Tokens { request: 0, pieces } = event {
                first.extend_from_slice(pieces);
            }
            Ok(())
        })?;
        let figures = Figures::new(&completions, engine.times());
        let device = session::device_of(engine.ops(), &args.run);
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

/// The texts (of a single prompt) and the table.
fn print(out: &mut impl io::Write, outcomes: &[Outcome], greedy: bool) -> io::Result<()> {
    let colour = colour();
    if outcomes[0].completions.len() == 1 {
        for outcome in outcomes {
            let answer = paint(&outcome.pieces, colour);
            writeln!(out, "--- {}\n{}\n", outcome.name, answer.trim_end())?;
        }
        if colour {
            writeln!(out, "(drafted and accepted tokens are green)\n")?;
        }
    }
    let rows: Vec<_> = outcomes
        .iter()
        .map(|o| (o.name.to_owned(), o.figures.clone()))
        .collect();
    write!(out, "{}\n{}", outcomes[0].device, table(&rows))?;
    if greedy {
        for outcome in &outcomes[1..] {
            let (same, all) = (num_same(outcome, &outcomes[0]), outcome.completions.len());
            writeln!(
                out,
                "{}: {same} of {all} outputs are token for token those of none",
                outcome.name
            )?;
        }
    }
    Ok(())
}
