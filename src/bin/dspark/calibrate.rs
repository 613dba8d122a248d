//! `dspark calibrate`: temperatures for a drafter's confidences, from recorded rounds.

use std::fmt::Write as _;

use anyhow::Result;
use dspark::Error;
use dspark::engine::Event;
use dspark::ops::Ops;
use dspark::schedule::Calibration;
use dspark::schedule::sts::{self, PositionFit, RecordedRound};

use crate::args::{CalibrateArgs, DraftArgs, PromptArgs};
use crate::diagram::{self, Panel};
use crate::session::{self, Drafting, Job, Texts};
use crate::{progress, prompts, trace};

pub fn run(args: &CalibrateArgs) -> Result<()> {
    let all_verified = DraftArgs::fixed();
    let drafting = Drafting::new(None, Some(&args.draft), &args.run.target, &all_verified)?;
    let pair = drafting.identity(&args.run.target)?;
    let rounds = match args.traces.as_slice() {
        [] => record(args, drafting)?,
        files => trace::read_rounds(files)?,
    };
    let held_out = trace::read_rounds(&args.held_out)?;
    let draft_len = rounds.iter().map(|r| r.confidence.len()).max().unwrap_or(0);
    if draft_len == 0 {
        let expected = "a drafter with a confidence head";
        return Err(Error::argument("--draft", expected, "rounds without confidences").into());
    }
    let calibration = Calibration::fit(pair, draft_len, &rounds, &held_out)?;
    calibration.write(&args.out)?;
    let (judged, shown) = match held_out.as_slice() {
        [] => (&rounds, &calibration.positions),
        _ => (&held_out, &calibration.held_out),
    };
    diagram::write(
        &args.out.with_extension(""),
        &panels(judged, &calibration.temperatures, shown),
    )?;
    print!("{}", table(&calibration.temperatures, shown));
    Ok(())
}

fn panels(rounds: &[RecordedRound], temperatures: &[f32], fits: &[PositionFit]) -> Vec<Panel> {
    let diagrams = sts::diagrams(rounds, temperatures).into_iter().zip(fits);
    diagrams
        .map(|([before, after], fit)| Panel {
            heading: format!(
                "{}: ECE {:.1} -> {:.1} %",
                fit.position,
                100.0 * fit.before.ece,
                100.0 * fit.after.ece
            ),
            before,
            after,
        })
        .collect()
}

fn table(temperatures: &[f32], fits: &[PositionFit]) -> String {
    let mut text =
        "position  rounds  temperature   ECE %          (by chance)  AUC             Brier\n"
            .to_owned();
    for (fit, temperature) in fits.iter().zip(temperatures) {
        let auc = |auc: Option<f64>| auc.map_or("-".into(), |auc| format!("{auc:.3}"));
        let _ = writeln!(
            text,
            "{:>8} {:>7} {:>12.3}   {:>5.2} -> {:>5.2}       {:>5.2}  {:>5} -> {:>5}  {:.4} -> {:.4}",
            fit.position,
            fit.num_rounds,
            temperature,
            100.0 * fit.before.ece,
            100.0 * fit.after.ece,
            100.0 * fit.after.ece_floor,
            auc(fit.before.auc),
            auc(fit.after.auc),
            fit.before.brier,
            fit.after.brier
        );
    }
    text
}

/// Generates from the prompts with every draft verified.
fn record(args: &CalibrateArgs, drafting: Drafting) -> Result<Vec<RecordedRound>> {
    let texts = Texts::load(&args.run.target)?;
    let mut prompts = Vec::new();
    for file in &args.prompts {
        let from = PromptArgs {
            prompt: None,
            prompt_ids: None,
            prompts: Some(file.clone()),
        };
        prompts.extend(prompts::load(
            &from,
            texts.tokenizer.as_ref(),
            args.sampling.raw,
        )?);
    }
    let job = Record {
        args,
        texts,
        prompts,
        drafting,
    };
    session::on_device_of(&args.run, job)
}

struct Record<'a> {
    args: &'a CalibrateArgs,
    texts: Texts,
    prompts: Vec<Vec<u32>>,
    drafting: Drafting,
}

impl Job for Record<'_> {
    type Output = Vec<RecordedRound>;

    fn run<O: Ops + 'static>(self, ops: O) -> Result<Vec<RecordedRound>> {
        let requests = self.texts.requests(&self.prompts, &self.args.sampling);
        let mut engine = session::start(ops, &self.args.run, &self.drafting, requests)?;
        let bar = progress::bar("prompts", self.prompts.len());
        let completions = session::finish(&mut engine, |event| {
            if let Event::Finished { .. } = event {
                bar.inc(1);
            }
            Ok(())
        })?;
        bar.finish_and_clear();
        let rounds = completions.iter().flat_map(|c| &c.rounds);
        let recorded = rounds.map(|round| RecordedRound {
            confidence: round.confidence.clone(),
            verify_len: round.verify_len,
            num_accepted: round.num_accepted,
        });
        Ok(recorded.collect())
    }
}
