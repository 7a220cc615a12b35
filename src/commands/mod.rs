//! What each verb of the command line does.

mod bake;
mod checksum;
mod doctor;
mod images;
mod import;
mod plan;
mod shell;
mod sweep;

use crate::cli::{Cli, Global, Verb};
use crate::error::{Kind, SUCCESS};
use crate::report::{Level, Report, Style};
use crate::{scratch, stop};
use anyhow::Result;
use clap::CommandFactory;
use std::fmt::Display;
use std::io::Write;

/// Runs a verb and answers with the exit code. Failures are told here, once.
pub fn run(cli: Cli) -> u8 {
    let report = report(&cli.global);
    let result = prepare(&cli.verb).and_then(|()| {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(dispatch(&cli, &report))
    });
    result.unwrap_or_else(|error| {
        report.failure(&error);
        Kind::of(&error) as u8
    })
}

/// What has to happen before the runtime exists: namespaces belong to threads.
fn prepare(verb: &Verb) -> Result<()> {
    if matches!(verb, Verb::Bake(_) | Verb::Shell(_)) {
        crate::machine::ensure_fit()?;
        crate::root::step::private_mounts()?;
        scratch::make()?;
    }
    Ok(())
}

async fn dispatch(cli: &Cli, report: &Report) -> Result<u8> {
    let global = &cli.global;
    // The others have nothing to clean up: a signal ends them as it ends every program.
    match &cli.verb {
        Verb::Bake(args) => bake::run(global, args, report, stop::signals()?).await,
        Verb::Plan(args) => plan::run(global, args, report).await,
        Verb::Checksum(args) => checksum::run(global, args, report),
        Verb::Images(args) => images::run(global, args, report).await,
        Verb::Import(args) => import::run(global, args, report, stop::signals()?).await,
        Verb::Shell(args) => shell::run(global, args, report, stop::signals()?).await,
        Verb::Sweep(args) => sweep::run(global, args, report).await,
        Verb::Doctor => doctor::run(global, report),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "oven", &mut script);
            _ = std::io::stdout().write_all(&script);
            Ok(SUCCESS)
        }
    }
}

fn report(global: &Global) -> Report {
    let style = if global.json { Style::Json } else { Style::Human };
    let level = match (global.quiet, global.verbose) {
        (true, _) => Level::Quiet,
        (_, true) => Level::Verbose,
        _ => Level::Normal,
    };
    Report::new(style, level)
}

/// A line of a verb's answer. A reader that went away is no failure.
fn answer(line: impl Display) {
    _ = writeln!(std::io::stdout().lock(), "{line}");
}
