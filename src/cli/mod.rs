//! The verbs of the command line.

pub mod args;
mod bake;
mod checksum;
mod completions;
mod doctor;
mod export;
mod images;
mod import;
mod plan;
mod plugin;
mod policy;
pub mod results;
mod shell;
mod sweep;
mod validate;

use crate::config::project::Settings;
use crate::doctor::checks::{self, Needs};
use crate::error::{Kind, SUCCESS, unlisted_mistakes_of};
use crate::report::events::{self, FORMAT};
use crate::report::{Level, Report, Style, stdout};
use crate::site::Site;
use crate::sys::signals::{self, Signal};
use crate::sys::{namespaces, private_tmpfs, state_files};
use crate::text::{indent_continuations, without_control_characters};
use crate::trace::Trace;
use crate::undo::Leftover;
use anyhow::{Error, Result};
use args::{Cli, GlobalArgs, Verb};
use clap::FromArgMatches;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use tokio::sync::watch;

/// How a verb ended: the exit code, and the last object of the JSON stream.
#[derive(Debug)]
struct End {
    code: u8,
    result: Value,
}

impl End {
    fn success(result: Value) -> Self {
        Self { code: SUCCESS, result }
    }

    fn failure(error: &Error) -> Self {
        Self::failures(std::slice::from_ref(error))
    }

    /// The end of a verb that found several errors. The first one decides the exit code.
    fn failures(errors: &[Error]) -> Self {
        let code = errors.first().map_or(SUCCESS, |error| Kind::of(error) as u8);
        let objects: Vec<_> = errors.iter().flat_map(events::errors).collect();
        let mut result = json!({"error": objects.first(), "errors": objects});
        let unlisted: usize = errors.iter().map(unlisted_mistakes_of).sum();
        if unlisted > 0 {
            result["more_errors"] = json!(unlisted);
        }
        Self { code, result }
    }

    fn report(mut self, report: &Report) -> u8 {
        self.fail_if_output_is_lost();
        self.result["event"] = json!("result");
        self.result["exit_code"] = json!(self.code);
        report.event(self.result.take());
        if let Some(error) = self.fail_if_output_is_lost() {
            report.failure_on_screen(&error);
        }
        self.code
    }

    /// If standard output could not be written, returns the error. Then a verb that made its result counts as failed,
    /// because the result is lost.
    fn fail_if_output_is_lost(&mut self) -> Option<Error> {
        let error = stdout::failure()?;
        if [SUCCESS, Kind::LeftBehind as u8].contains(&self.code) {
            self.code = Kind::of(&error) as u8;
        }
        Some(error)
    }
}

/// Runs a verb. Returns the exit code. A failure of a verb is reported here and nowhere else.
pub fn run(args: Vec<OsString>) -> u8 {
    let mut command = args::command();
    let parsed = command.try_get_matches_from_mut(&args).and_then(|matches| {
        let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
        Ok((cli, matches))
    });
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return usage(&args, &error),
    };
    if let Err(error) = args::refuse_empty_values(&command, &matches) {
        let report = Report::new(if cli.global.json { Style::Json } else { Style::Human }, Level::Normal);
        report.failure(&error);
        return End::failure(&error).report(&report);
    }
    let (report, trace) = report(&cli.global);
    let result = trace.and_then(|()| prepare(&cli)).and_then(|()| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(report.track().follow(dispatch(&cli, &report)))
    });
    report.end_trace();
    let end = result.unwrap_or_else(|error| {
        report.failure(&error);
        End::failure(&error)
    });
    end.report(&report)
}

/// Prints the requested help, or the error of an invalid command line. With `--json`, the error is also printed as
/// JSON.
fn usage(args: &[OsString], error: &clap::Error) -> u8 {
    let printed = error.print();
    if !error.use_stderr() {
        stdout::check(printed);
        return End::success(json!({})).report(&Report::silent());
    }
    if args.iter().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let line = text.lines().next().unwrap_or_default();
        let error = Kind::Usage.error(line.strip_prefix("error: ").unwrap_or(line));
        let report = Report::new(Style::Json, Level::Quiet);
        report.failure(&error);
        End::failure(&error).report(&report);
    }
    u8::try_from(error.exit_code()).unwrap_or(Kind::Usage as u8)
}

/// Prepares this process for a bake or a shell. This must happen before the runtime exists, because a new mount
/// namespace applies only to the calling thread and to threads that it starts later.
fn prepare(cli: &Cli) -> Result<()> {
    let definition = match &cli.verb {
        Verb::Bake(args) => args.definitions.first(),
        Verb::Shell(_) => None,
        Verb::Plan(args) if args.steps => args.definitions.first(),
        Verb::Plan(_)
        | Verb::Validate(_)
        | Verb::Plugin(_)
        | Verb::Checksum(_)
        | Verb::Images(_)
        | Verb::Export(_)
        | Verb::Import(_)
        | Verb::Sweep(_)
        | Verb::Doctor
        | Verb::Policy(_)
        | Verb::Completions { .. } => return Ok(()),
    };
    let dir = definition.map_or(Path::new("."), PathBuf::as_path);
    // Errors in the settings are ignored here, because they are reported later.
    let overrides = match &cli.verb {
        Verb::Plan(args) => plan::overrides(&cli.global, args),
        _ => cli.global.overrides(),
    };
    let settings = Settings::resolve(dir, &overrides).unwrap_or_default();
    checks::ensure_ready(Needs::of(&settings))?;
    namespaces::private_mounts()?;
    private_tmpfs::mount()
}

async fn dispatch(cli: &Cli, report: &Report) -> Result<End> {
    let global = &cli.global;
    // Verbs without `stop_at_signals` have nothing to clean up. So they do not handle signals, and a signal ends them
    // immediately.
    match &cli.verb {
        Verb::Bake(args) => bake::run(global, args, report, stop_at_signals(report)?).await,
        Verb::Plan(args) if args.os_release_plan.os_release.is_some() => plugin::plan(global, args, report),
        Verb::Plan(args) => {
            let stop = args.steps.then(|| stop_at_signals(report)).transpose()?;
            plan::run(global, args, report, stop).await
        }
        Verb::Validate(args) => validate::run(global, args, report),
        Verb::Plugin(args) => plugin::run(global, args, report),
        Verb::Checksum(args) => checksum::run(global, args, report),
        Verb::Images(args) => images::run(global, args, report).await,
        Verb::Export(args) => export::run(global, args, report, stop_at_signals(report)?).await,
        Verb::Import(args) => import::run(global, args, report, stop_at_signals(report)?).await,
        Verb::Shell(args) => shell::run(global, args, report, stop_at_signals(report)?).await,
        Verb::Sweep(args) => sweep::run(global, args, report).await,
        Verb::Doctor => doctor::run(global, report).await,
        Verb::Policy(args) => policy::run(global, args),
        Verb::Completions { shell } => Ok(completions::run(global, *shell)),
    }
}

/// Listens for signals that ask this process to end. The receiver's value becomes true at the first signal. Each signal
/// is reported to the user.
pub fn stop_at_signals(report: &Report) -> Result<watch::Receiver<bool>> {
    let (screen, style) = (report.screen().clone(), report.style());
    signals::listen(move |signal| match signal {
        Signal::First(why) => {
            screen.print(&format!("{why}: stopping and cleaning up (repeat to stop immediately)"))
        }
        Signal::Second(why) => {
            screen.print(&format!("{why}: stopped immediately; `oven sweep` removes leftovers"));
            if style == Style::Json {
                let mut end = End::failure(&Kind::Interrupted.error("stopped immediately")).result;
                end["event"] = json!("result");
                end["format"] = json!(FORMAT);
                end["exit_code"] = json!(Kind::Interrupted as u8);
                stdout::write_line(&end.to_string());
            }
        }
    })
}

/// Warns of leftovers that could not be removed. Returns whether there are any.
fn warn_of_leftovers(site: &Site, leftovers: &[Leftover]) -> bool {
    for leftover in leftovers {
        let command = site.command_for_site(&leftover.command);
        site.report.warn(Leftover { command, ..leftover.clone() }.to_string());
    }
    !leftovers.is_empty()
}

/// Makes the report that the flags describe. The second value is an error if the file of `--trace` cannot be created.
fn report(global: &GlobalArgs) -> (Report, Result<()>) {
    let style = if global.json { Style::Json } else { Style::Human };
    let level = match (global.quiet, global.verbose) {
        (true, _) => Level::Quiet,
        (_, true) => Level::Verbose,
        _ => Level::Normal,
    };
    let create = |path| Trace::create(path, state_files::foreign_owner);
    match global.trace.as_deref().map(create).transpose() {
        Ok(trace) => (Report::displayed(style, level, trace, global.display()), Ok(())),
        Err(error) => (Report::displayed(style, level, None, global.display()), Err(error)),
    }
}

/// Prints a line of a verb's result, without escape sequences and invisible characters. The lines after the first are
/// indented.
fn answer(line: impl Display) {
    let line = line.to_string();
    print_raw(indent_continuations(&without_control_characters(&line), "  "));
}

/// Prints a text of oven as a verb's result. If it cannot be written, the verb fails at its end.
fn print_raw(line: impl Display) {
    stdout::write_line(&line.to_string());
}
