//! What turns a provisioned root into an image: it is cleaned, checked and made bootable.

pub mod bootable;
pub mod clean;
pub mod first_boot;
pub mod lint;
pub mod rules;
pub mod secret_scan;
pub mod selinux;

use crate::provision::command::CommandRunner;
use crate::provision::plan_steps;
use crate::provision::space::DiskSpace;
use anyhow::{Context, Result};
use std::time::SystemTime;

/// What an image is before a bake changes anything in it: what the lint, the search for secrets and the look at the
/// boot loader compare with.
pub struct Baseline {
    begun: SystemTime,
    space: DiskSpace,
    since: secret_scan::BakeStart,
    lint: lint::LintBaseline,
    boot: bootable::BootBaseline,
}

impl Baseline {
    pub fn take(runner: &CommandRunner<'_>) -> Result<Self> {
        let (place, work) = (&runner.place, &runner.work);
        Ok(Self {
            begun: SystemTime::now(),
            space: DiskSpace::of(place.root)?,
            since: secret_scan::BakeStart::now(),
            lint: lint::LintBaseline::of(place.inside, work)?,
            boot: bootable::BootBaseline::of(place.inside)?,
        })
    }

    /// To be called when the packages are installed: what a definition's own script changes after that is meant.
    pub fn note_packages(&mut self, runner: &CommandRunner<'_>) -> Result<()> {
        self.lint.record_resolv_conf(runner.place.inside)
    }
}

/// Runs the plan's steps that clean, removes machine-specific data, and checks the image: that it boots, that nothing
/// is left in it that only the bake needed, that no secret is in it, and that its disk has room left.
///
/// Errors: `Step` where the image is not as it should be.
pub async fn image(runner: &CommandRunner<'_>, baseline: Baseline) -> Result<()> {
    let (place, work) = (&runner.place, &runner.work);
    for step in plan_steps::cleaning(work.plan) {
        plan_steps::run_step(runner, step).await?;
    }
    bootable::check_bootable(place, &baseline.boot, work.report).await?;
    let step = work.report.step("clean", "cleaning (machine-id, host keys, logs)");
    for note in clean::clean(place.inside, &work.image.keep).context("cleaning the image")? {
        work.report.note(note);
    }
    lint::lint(place.inside, work, &baseline.lint)?;
    secret_scan::ensure_no_secrets(place.inside, work.secrets, baseline.since)?;
    step.done();
    selinux::label(runner, place.inside, work.image.selinux, baseline.begun).await?;
    baseline.space.ensure_not_full(place.root)
}
