//! `dspark compare`: the same prompts without a drafter and with each of several, side by side.

use std::io::{self, Write as _};

use anyhow::Result;
use dspark::engine::{Completion, Event, Piece};
use dspark::ops::{HeadForm, Ops};
use serde::Serialize;

use crate::args::{CompareArgs, DraftArgs, Mode};
use crate::generate::paint;
use crate::paired::Difference;
use crate::report::{Figures, table};
use crate::session::{self, Drafting, Job, Texts};
use crate::{colour, note, prompts};

/// One mode's outputs.
struct Outcome {
    name: String,
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
    /// Of drafters after the first: the accepted length against the first's, paired by prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    to_first_drafter: Option<Difference>,
}

pub fn run(args: &CompareArgs) -> Result<()> {
    let texts = Texts::load(&args.pairs.run.target)?;
    let prompts = prompts::load_first(&args.pairs, texts.tokenizer.as_ref())?;
    let mut runs = vec![Drafting::none()];
    for (mode, dir) in &args.pairs.draft {
        for draft_args in draft_args(*mode, &args.drafting, &args.head_forms) {
            let target = &args.pairs.run.target;
            runs.push(Drafting::new(Some(*mode), Some(dir), target, &draft_args)?);
        }
    }
    let mut outcomes = Vec::new();
    for drafting in &runs {
        let (name, count) = (name(drafting), prompts.len());
        note(format_args!("running {name} on {count} prompts"));
        let job = Compare {
            args,
            texts: &texts,
            prompts: &prompts,
            drafting,
        };
        outcomes.push(session::on_device_of(&args.pairs.run, job)?);
    }
    let mut out = io::stdout().lock();
    if args.json {
        let rows: Vec<Row> = outcomes
            .iter()
            .enumerate()
            .map(|(i, outcome)| row(outcome, &outcomes[0], difference(&outcomes, i)))
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
    } else {
        print(&mut out, &outcomes, args.pairs.sampling.temperature == 0.0)?;
    }
    Ok(())
}

/// The options as far as a mode has them, once for each form of its head: an MTP-1 module drafts one token in one form, and
/// only DSpark's drafters are scheduled.
fn draft_args(mode: Mode, args: &DraftArgs, forms: &[HeadForm]) -> Vec<DraftArgs> {
    let of_mode = match mode {
        Mode::Dspark | Mode::None => args.clone(),
        Mode::Dflash => DraftArgs {
            draft_len: args.draft_len,
            head_form: args.head_form,
            ..DraftArgs::fixed()
        },
        Mode::Mtp => {
            return vec![DraftArgs {
                draft_len: Some(1),
                ..DraftArgs::fixed()
            }];
        }
    };
    let others = forms.iter().filter(|&&form| form != of_mode.head_form);
    let forms = std::iter::once(&of_mode.head_form).chain(others);
    let with = |&head_form: &HeadForm| DraftArgs {
        head_form,
        ..of_mode.clone()
    };
    forms.map(with).collect()
}

/// The mode, and the form of the head where it is not the usual one.
fn name(drafting: &Drafting) -> String {
    match drafting.head_form {
        HeadForm::Full => drafting.mode.name().to_owned(),
        form => format!("{} {form}", drafting.mode.name()),
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
        let requests = texts.requests(prompts, &args.pairs.sampling);
        let mut engine = session::start(ops, &args.pairs.run, drafting, requests)?;
        let mut first = Vec::new();
        let completions = session::finish(&mut engine, |event| {
            if let Event::Tokens { request: 0, pieces } = event {
                first.extend_from_slice(pieces);
            }
            Ok(())
        })?;
        let figures = Figures::new(&completions, engine.times());
        let device = session::device_of(engine.ops(), &args.pairs.run);
        Ok(Outcome {
            name: name(drafting),
            device,
            completions,
            pieces: first,
            figures,
        })
    }
}

fn row<'a>(outcome: &'a Outcome, base: &Outcome, to_first_drafter: Option<Difference>) -> Row<'a> {
    Row {
        mode: &outcome.name,
        device: &outcome.device,
        figures: &outcome.figures,
        same_as_none: num_same(outcome, base),
        to_first_drafter,
    }
}

/// The accepted length of drafter `i` against that of the first, number 1.
fn difference(outcomes: &[Outcome], i: usize) -> Option<Difference> {
    let of = |outcome: usize| {
        outcomes[outcome]
            .completions
            .iter()
            .map(|c| &c.stats.rounds)
    };
    (i > 1).then(|| Difference::of(of(i), of(1)))?
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
        .map(|o| (o.name.clone(), o.figures.clone()))
        .collect();
    write!(out, "{}\n{}", outcomes[0].device, table(&rows))?;
    for (i, outcome) in outcomes.iter().enumerate() {
        if let Some(difference) = difference(outcomes, i) {
            writeln!(
                out,
                "{}: accepted length {:+.3} against {} (standard error {:.3}, paired by prompt)",
                outcome.name,
                difference.accepted_length,
                outcomes[1].name,
                difference.standard_error
            )?;
        }
    }
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
