//! What the kernels take on this machine's GPU, beside what its memory could give. See benches/README.md.
//!
//! Criterion measures host time; kernels are timed by CUDA events around captured graphs instead ([`lab`]). The host's
//! own schedule is measured with criterion in `benches/schedule.rs`.

mod acceptance;
mod attention;
mod candidates;
mod commit;
mod draft_head;
mod lab;
mod layers;
mod linear;
mod random;
mod report;
mod schedule;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use dspark::device::Device;

use lab::Lab;
use report::Report;

/// Times dspark's kernels on one GPU.
#[derive(Parser)]
struct Options {
    /// Families to run (attention, draft_head, candidates, acceptance, layers, linear, schedule); all when none is named.
    families: Vec<String>,
    /// Only the cases whose name contains this text.
    #[arg(long)]
    case: Option<String>,
    /// Writes the rows and the header as JSON.
    #[arg(long)]
    record: Option<PathBuf>,
    /// Timed replays of each graph.
    #[arg(long, default_value_t = 31, value_parser = clap::value_parser!(u32).range(30..=1000))]
    replays: u32,
    /// Runs each case once and times nothing: for a profiler or a sanitizer.
    #[arg(long)]
    once: bool,
    /// CUDA device.
    #[arg(long, default_value_t = 0)]
    device: usize,
    /// Passed by `cargo bench`; means nothing here.
    #[arg(long, hide = true)]
    bench: bool,
}

type Family = fn(&mut Lab) -> anyhow::Result<()>;

const FAMILIES: [(&str, Family); 7] = [
    ("attention", attention::run),
    ("draft_head", draft_head::run),
    ("candidates", candidates::run),
    ("acceptance", acceptance::run),
    ("layers", layers::run),
    ("linear", linear::run),
    ("schedule", schedule::run),
];

fn main() -> ExitCode {
    let options = Options::parse();
    let unknown = |name: &&String| !FAMILIES.iter().any(|(family, _)| family == name);
    if let Some(name) = options.families.iter().find(unknown) {
        let known = FAMILIES.map(|(family, _)| family).join(", ");
        eprintln!("error: families: expected some of {known}, found {name}");
        return ExitCode::from(2);
    }
    if Device::count() == 0 {
        println!("skipped: no CUDA device");
        return ExitCode::SUCCESS;
    }
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the families asked for; false when one of them failed.
fn run(options: &Options) -> anyhow::Result<bool> {
    let device = Device::open(options.device)?;
    let mut lab = Lab::new(device, options)?;
    println!("{}", lab.report.header());
    let mut all_ran = true;
    for (name, family) in FAMILIES {
        let asked = options.families.is_empty() || options.families.iter().any(|f| f == name);
        if !asked {
            continue;
        }
        lab.report.begin(name);
        if let Err(error) = family(&mut lab) {
            all_ran = false;
            eprintln!("error: {name}: {error:#}");
        }
    }
    if let Some(file) = &options.record {
        lab.report.write(file)?;
    }
    Ok(all_ran)
}
