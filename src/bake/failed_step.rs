//! What a bake does if one of its steps failed. With `--keep-on-failure`, it records the step for `oven shell`. Without
//! this flag, the first failure on a machine names the flag.

use super::Bake;
use super::target::Target;
use crate::disk::step_record::{RecordedDefinition, RecordedStep, StepRecord};
use crate::error::{Kind, with_more_hint};
use crate::provision::command::CommandRunner;
use crate::sys::signals::is_stop_requested;
use crate::sys::state_files;
use crate::text::shell_command;
use anyhow::{Context, Error, Result};

/// The name of the file that records that the hint was shown.
const HINT: &str = "keep-on-failure";

/// Records the failed step, or adds the hint to the error. Does nothing if the work succeeded, or if no step failed.
pub fn handle<T>(
    bake: &Bake<'_>,
    target: &Target,
    runner: &CommandRunner<'_>,
    result: Result<T>,
) -> Result<T> {
    result.map_err(|error| match runner.failed_step() {
        // An interrupted bake preserves nothing.
        Some(step) if !is_stop_requested() => handle_failure(bake, target, runner, (step, error)),
        _ => error,
    })
}

fn handle_failure(
    bake: &Bake<'_>,
    target: &Target,
    runner: &CommandRunner<'_>,
    (step, error): (RecordedStep, Error),
) -> Error {
    let (site, state) = (bake.site, &bake.site.state);
    if bake.options.keep_on_failure {
        let recorded = record(bake, target, step).and_then(|record| record.save(state, runner.work.secrets));
        if let Err(why) = recorded {
            let what = "`oven shell` will not know the failed step, because it cannot be recorded";
            site.report.warn(format!("{what}: {why:#}"));
        }
        return error;
    }
    if Kind::of(&error) != Kind::Step || !state_files::is_first_time(state, HINT) {
        return error;
    }
    let sentence = format!("To open a shell on the disk after the failure, preserve it: {}", command(bake));
    with_more_hint(error, &runner.work.secrets.mask(&sentence))
}

/// The command that bakes the same definition and preserves the disk.
fn command(bake: &Bake<'_>) -> String {
    let mut words = vec!["oven".to_owned(), "bake".to_owned(), "--keep-on-failure".to_owned()];
    let flags = [("--force", bake.options.force), ("--replace-failed", bake.options.replace_failed)];
    words.extend(flags.into_iter().filter(|(_, is_set)| *is_set).map(|(flag, _)| flag.to_owned()));
    for (name, value) in &bake.image.vars.given {
        words.extend(["--var".to_owned(), format!("{name}={value}")]);
    }
    words.push(bake.image.dir.to_string_lossy().into_owned());
    bake.site.command_for_site(&shell_command(&words))
}

fn record(bake: &Bake<'_>, target: &Target, step: RecordedStep) -> Result<StepRecord> {
    let absolute = |dir: std::path::PathBuf| {
        std::path::absolute(&dir).with_context(|| format!("resolving {}", dir.display()))
    };
    let definition = RecordedDefinition {
        directories: bake.image.directories().into_iter().map(absolute).collect::<Result<_>>()?,
        project: bake.image.project.clone(),
        checksum: target.inputs.checksum().to_owned(),
    };
    Ok(StepRecord::new(bake.run, definition, step))
}
