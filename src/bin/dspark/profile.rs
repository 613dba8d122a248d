//! `dspark profile`: what a step costs on this machine with these models.

use anyhow::Result;
use dspark::engine::Request;
use dspark::model::TargetConfig;
use dspark::ops::{Ops, SamplingParams};
use dspark::schedule::{CostFile, CostIdentity};

use crate::args::{DraftArgs, ProfileArgs};
use crate::progress;
use crate::session::{self, Drafting, Job};

pub fn run(args: &ProfileArgs) -> Result<()> {
    let mut draft_args = DraftArgs::fixed();
    draft_args.draft_len = args.draft_len;
    let drafting = match &args.draft {
        None => Drafting::none(),
        Some(dir) => Drafting::new(None, Some(dir), &args.run.target, &draft_args)?,
    };
    session::on_device(
        args.run.device,
        args.run.threads,
        Profile { args, drafting },
    )
}

struct Profile<'a> {
    args: &'a ProfileArgs,
    drafting: Drafting,
}

impl Job for Profile<'_> {
    type Output = ();

    fn run<O: Ops + 'static>(self, ops: O) -> Result<()> {
        let run = &self.args.run;
        // Requests that fill the pool the points are timed in; they are never submitted.
        let max_position = TargetConfig::read(&run.target)?.decoder.max_position;
        let context = self.args.context.clamp(1, max_position - 1);
        let request = || Request::new(vec![0; context], SamplingParams::default(), 1);
        let requests: Vec<Request> = (0..run.max_num_reqs).map(|_| request()).collect();
        let mut engine = session::build(ops, run, &self.drafting, &requests)?;
        let bar = progress::bar("points", 1);
        let cost = engine.profile(&mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        let draft_len = engine.step().draft_len();
        let pair = self.drafting.identity(&run.target)?;
        let device = session::device_of(engine.ops(), run);
        let identity = CostIdentity::of_this_build(pair, device, draft_len);
        println!("{}, {} drafts a round", identity.device, draft_len);
        for &(tokens, seconds) in cost.verify().points() {
            println!("verify {tokens:>5} rows      {:>10.3} ms", 1e3 * seconds);
        }
        for &(reqs, seconds) in cost.draft().map_or(&[][..], |draft| draft.points()) {
            println!("draft  {reqs:>5} requests  {:>10.3} ms", 1e3 * seconds);
        }
        let per_thousand = [
            ("verify", cost.seconds_per_context_token()),
            ("draft ", cost.draft_seconds_per_context_token()),
        ];
        for (term, seconds) in per_thousand {
            println!("{term}  1000 context   {:>10.3} ms", 1e6 * seconds);
        }
        CostFile::new(&cost, identity, "measured").write(&self.args.out)?;
        Ok(())
    }
}
