//! `dspark`: the command line. Errors are one line on standard error; exit status 2 means the input was at fault,
//! 1 that something else was.

mod args;
mod calibrate;
mod compare;
mod diagram;
mod doctor;
mod examples;
mod generate;
mod invariance;
mod paired;
mod profile;
mod progress;
mod prompts;
mod report;
mod session;
mod simulate;
mod trace;

use std::fmt;
use std::io::{self, IsTerminal, Write as _};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage_error(&error),
    };
    let result = match cli.command {
        Command::Generate(args) => generate::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Invariance(args) => invariance::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Profile(args) => profile::run(&args),
        Command::Simulate(args) => simulate::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // The library's errors name their causes themselves; of others the whole chain is shown.
            let text = match error.downcast_ref::<dspark::Error>() {
                Some(error) => error.to_string(),
                None => format!("{error:#}"),
            };
            note(format_args!("error: {}", one_line(&text)));
            ExitCode::from(exit_status(&error))
        }
    }
}

/// Help goes out as clap made it; everything else is cut to its first line.
fn usage_error(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // Nobody there to read it is no failure.
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { 2 } else { 0 })
        }
        _ => {
            // clap puts a list of missing arguments on lines of its own, then a blank line and the usage.
            let text = error.render().to_string();
            let message = text.split("\n\n").next().unwrap_or_default();
            note(format_args!("{} (see --help)", one_line(message)));
            ExitCode::from(2)
        }
    }
}

/// 2 where the caller can mend it, 1 where the machine or this program failed.
fn exit_status(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<dspark::Error>() {
        Some(dspark::Error::Cuda(_)) => 1,
        None if error.is::<invariance::Differ>() => 1,
        _ => 2,
    }
}

/// Whether the reader of standard output has gone away (`| head`), which is no failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// A line on standard error, for people; nobody there to read it is no failure.
fn note(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether standard output is a terminal that wants colour.
fn colour() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}
