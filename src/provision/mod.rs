//! Provisions a mounted image: runs the plan's steps, places the definition's files, and runs its scripts and tests.

pub mod ansible;
pub mod command;
pub mod context;
pub mod definition_files;
pub mod diagnose;
pub mod network;
pub mod package_cache;
pub mod packages;
pub mod plan_files;
pub mod plan_steps;
pub mod programs;
pub mod progress;
pub mod script_mounts;
pub mod scripts;
pub mod shell;
pub mod space;
#[cfg(test)]
pub(crate) mod test;

use crate::error::Kind;
use anyhow::Result;
use command::CommandRunner;
pub use command::package_path;
pub use network::CA_FILE;
use packages::InstalledPackage;
use plan_steps::{held_packages, packages_of, run_step};
use std::collections::BTreeMap;

/// The start of the error message for broken packages of the base image.
const BASE: &str = "packages of the base image are not installed correctly";

/// Runs the plan's steps, except those that clean. Returns the packages that are installed afterwards. Returns `None`
/// if the plan changes nothing, or if it has no fact that lists the packages. A fact is a command whose output
/// describes the image.
///
/// Errors: `Step` if a step fails or the image's packages are not in the expected state afterwards; `Definition` if the
/// definition requests something impossible, such as a package that does not exist, or if the base's own packages
/// cannot be listed or are not in the expected state.
pub async fn packages(runner: &CommandRunner<'_>) -> Result<Option<Vec<InstalledPackage>>> {
    let (place, work) = (&runner.place, &runner.work);
    let changes = plan_steps::provisioning(work.plan).next().is_some();
    // No step has changed the image yet, so its package database is the base's.
    let base = if changes { packages_of(runner).await.map_err(Kind::of_base)? } else { None };
    if let Some(base) = &base {
        packages::ensure_sound(base, &work.plan.expect, BASE).map_err(Kind::of_base)?;
    }
    let held = if changes { held_packages(runner).await.map_err(Kind::of_base)? } else { Vec::new() };
    packages::ensure_not_held(&held, base.as_deref().unwrap_or_default(), work)?;
    plan_files::place_plan_files(place, work).map_err(|error| work.explain_base(place, error))?;
    for step in plan_steps::provisioning(work.plan) {
        run_step(runner, step).await?;
    }
    let installed = if changes { packages_of(runner).await? } else { None };
    if let Some(installed) = &installed {
        packages::ensure_sound(installed, &work.plan.expect, "packages are not installed correctly")?;
        packages::ensure_installed(installed, &work.plan.expect)?;
        work.report.packages(packages::difference(base.as_deref().unwrap_or_default(), installed));
    }
    if let Some(base) = base {
        _ = runner.base_packages.set(base);
    }
    Ok(installed)
}

/// Places the definition's files, runs its scripts, places the files with `after = "run"`, and then runs its tests.
pub async fn files_and_scripts(runner: &CommandRunner<'_>) -> Result<()> {
    place_files(runner, false)?;
    scripts::run(runner).await?;
    place_files(runner, true)?;
    scripts::test(runner).await
}

fn place_files(runner: &CommandRunner<'_>, after_run: bool) -> Result<()> {
    let (place, work) = (&runner.place, &runner.work);
    let files = work.image.files.iter().filter(|file| file.after_run == after_run).count();
    if files == 0 {
        return Ok(());
    }
    let step = work.report.step(definition_files::FILES_PHASE, definition_files::title(files, after_run));
    definition_files::place_files(place.inside, work.image, place.unmounted, after_run)?;
    step.done();
    Ok(())
}

/// Queries the plan's facts in the finished image. `installed` is the result of [`packages()`]. If the definition has
/// scripts, the packages are listed again, because the scripts may have changed them.
pub async fn facts(
    runner: &CommandRunner<'_>,
    mut installed: Option<Vec<InstalledPackage>>,
) -> Result<BTreeMap<String, String>> {
    let work = &runner.work;
    if installed.is_none() || !work.image.runs.is_empty() {
        let list = async |whose: &str| {
            let found = packages_of(runner).await?;
            packages::ensure_sound(found.as_deref().unwrap_or_default(), &work.plan.expect, whose)?;
            Ok(found)
        };
        installed = match work.image.runs[..] {
            [] => list(BASE).await.map_err(Kind::of_base)?,
            _ => list("packages are not installed correctly after the definition's scripts").await?,
        };
    }
    if let (Some(base), Some(installed), false) =
        (runner.base_packages.get(), &installed, work.image.runs.is_empty())
    {
        // The scripts may have changed packages.
        work.report.packages(packages::difference(base, installed));
    }
    plan_steps::facts(runner, installed).await
}
