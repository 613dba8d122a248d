//! `dspark generate`.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::Result;
use dspark::engine::{Completion, Engine, Event, Piece};
use dspark::ops::Ops;

use crate::args::GenerateArgs;
use crate::report::{self, Figures};
use crate::session::{self, Drafting, Job, Texts};
use crate::trace::{Trace, TraceFile, TraceRequest};
use crate::{colour, note, prompts};

/// Green: drafted and accepted.
const DRAFTED: &str = "\x1b[32m";
const PLAIN: &str = "\x1b[0m";

/// Text of `pieces`, drafted ones in colour where wanted.
pub fn paint(pieces: &[Piece], colour: bool) -> String {
    let mut text = String::new();
    for piece in pieces.iter().filter(|piece| !piece.text.is_empty()) {
        if colour && piece.drafted {
            text.extend([DRAFTED, &piece.text, PLAIN]);
        } else {
            text += &piece.text;
        }
    }
    text
}

pub fn run(args: &GenerateArgs) -> Result<()> {
    let texts = Texts::load(&args.run.target)?;
    let prompts = prompts::load(&args.prompts, texts.tokenizer.as_ref(), args.sampling.raw)?;
    let drafting = Drafting::new(
        args.mode,
        args.draft.as_deref(),
        &args.run.target,
        &args.drafting,
    )?;
    let trace = args.trace.as_deref().map(TraceFile::create).transpose()?;
    let job = Generate {
        args,
        texts,
        prompts,
        drafting,
        trace,
    };
    session::on_device_of(&args.run, job)
}

struct Generate<'a> {
    args: &'a GenerateArgs,
    texts: Texts,
    prompts: Vec<Vec<u32>>,
    drafting: Drafting,
    trace: Option<TraceFile>,
}

impl Job for Generate<'_> {
    type Output = ();

    fn run<O: Ops + 'static>(self, ops: O) -> Result<()> {
        let args = self.args;
        let mut requests = self.texts.requests(&self.prompts, &args.sampling);
        for request in &mut requests {
            request.logprobs = args.logprobs;
        }
        let mut engine = session::start(ops, &args.run, &self.drafting, requests)?;
        if self.trace.is_some() {
            engine.record_steps();
        }
        if args.stats {
            let device = session::device_of(engine.ops(), &args.run);
            note(format_args!("{device}, mode {}", self.drafting.mode.name()));
        }
        let completions = self.print(&mut engine)?;
        let figures = Figures::new(&completions, engine.times());
        if let Some(file) = self.trace {
            file.write(&Trace {
                requests: completions.iter().map(TraceRequest::new).collect(),
                stats: &figures,
                steps: engine.step().records(),
            })?;
        }
        if args.stats {
            let text = figures.describe() + &report::by_request(&completions);
            note(format_args!("{}", text.trim_end()));
        }
        Ok(())
    }
}

impl Generate<'_> {
    /// Streams a single answer as it comes; prints several in order, each when its turn has come.
    fn print<O: Ops>(&self, engine: &mut Engine<O>) -> Result<Vec<Completion>> {
        let single = self.prompts.len() == 1;
        let (colour, has_text) = (colour(), self.texts.tokenizer.is_some());
        let mut next = Next {
            waiting: vec![None; self.prompts.len()],
            first: 0,
        };
        let mut out = std::io::stdout().lock();
        session::finish(engine, |event| {
            let text = match event {
                Event::Tokens { pieces, .. } if single && has_text => paint(pieces, colour),
                Event::Finished { completion, .. } if single && has_text => {
                    format!("\n{}", self.logprobs(completion))
                }
                Event::Finished {
                    request,
                    completion,
                } => {
                    let table = self.logprobs(completion);
                    let number = request + 1;
                    let body = if has_text {
                        completion.text.clone()
                    } else {
                        ids(completion)
                    };
                    let head = if single {
                        String::new()
                    } else {
                        format!("== {number}\n")
                    };
                    next.ready(*request, format!("{head}{body}\n{table}"))
                }
                Event::Tokens { .. } => String::new(),
            };
            out.write_all(text.as_bytes())?;
            Ok(out.flush()?)
        })
    }
}

impl Generate<'_> {
    /// A line for each token of an answer with log-probabilities; nothing where there are none.
    fn logprobs(&self, completion: &Completion) -> String {
        let mut text = String::new();
        for (token, logprobs) in completion.tokens.iter().zip(&completion.logprobs) {
            let _ = write!(text, "{:>9.4}  {}", logprobs.logprob, self.show(*token));
            for (i, (token, logprob)) in logprobs.top.iter().enumerate() {
                let separator = if i == 0 { "  |" } else { "," };
                let _ = write!(text, "{separator} {} {logprob:.4}", self.show(*token));
            }
            text.push('\n');
        }
        text
    }

    /// The text of a token in quotes, or its id.
    fn show(&self, token: u32) -> String {
        let tokenizer = self.texts.tokenizer.as_ref();
        let text = tokenizer.and_then(|tokenizer| tokenizer.decode(&[token]).ok());
        match text {
            Some(text) if !text.is_empty() => format!("{text:?}"),
            _ => token.to_string(),
        }
    }
}

/// Holds finished answers back until all before them are out.
struct Next {
    waiting: Vec<Option<String>>,
    first: usize,
}

impl Next {
    /// What can be printed now that answer `index` is there.
    fn ready(&mut self, index: usize, text: String) -> String {
        self.waiting[index] = Some(text);
        let mut out = String::new();
        while let Some(text) = self.waiting.get_mut(self.first).and_then(Option::take) {
            out += &text;
            self.first += 1;
        }
        out
    }
}

fn ids(completion: &Completion) -> String {
    completion
        .tokens
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_out_in_order() {
        let mut next = Next {
            waiting: vec![None; 3],
            first: 0,
        };
        assert_eq!(next.ready(1, "b".into()), "");
        assert_eq!(next.ready(0, "a".into()), "ab");
        assert_eq!(next.ready(2, "c".into()), "c");
    }

    #[test]
    fn only_drafted_pieces_are_painted() {
        let piece = |text: &str, drafted| Piece {
            token: 0,
            text: text.into(),
            drafted,
            logprobs: None,
        };
        let pieces = [piece("a", false), piece("b", true), piece("", true)];
        assert_eq!(paint(&pieces, false), "ab");
        assert_eq!(paint(&pieces, true), "a\x1b[32mb\x1b[0m");
    }
}
