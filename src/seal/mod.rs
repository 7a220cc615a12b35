//! Turns a provisioned root into an image: cleans the root, and checks that it is clean and can boot.

pub mod bootable;
pub mod clean;
pub mod first_boot;
pub mod lint;
pub mod rules;
pub mod secret_scan;
pub mod selinux;

use crate::image::accounts::Accounts;
use crate::provision::command::CommandRunner;
use crate::provision::plan_steps;
use crate::provision::space::ImageSpace;
use anyhow::{Context, Result};
use std::time::SystemTime;

/// The state of the image before the bake. The lint, the search for secrets and the boot check compare the finished
/// image with it.
pub struct Baseline {
    begun: SystemTime,
    space: ImageSpace,
    bake_start: secret_scan::BakeStart,
    lint: lint::LintBaseline,
    boot: bootable::BootBaseline,
}

impl Baseline {
    pub fn take(runner: &CommandRunner<'_>) -> Result<Self> {
        let (place, work) = (&runner.place, &runner.work);
        let _timer = place.inside.meter().start();
        // The clean-up needs the accounts. If the base's cannot be read, the bake fails before its first step.
        Accounts::read(place.inside)?;
        Ok(Self {
            begun: SystemTime::now(),
            space: ImageSpace::of(place.root)?,
            bake_start: secret_scan::BakeStart::now(),
            lint: lint::LintBaseline::of(place.inside, work)?,
            boot: bootable::BootBaseline::of(place.inside)?,
        })
    }

    /// Records whether a package copied this machine's name servers to `/etc/resolv.conf`. Call this after the packages
    /// are installed and before the definition's scripts run, because changes by scripts are intended.
    pub fn note_packages(&mut self, runner: &CommandRunner<'_>) -> Result<()> {
        self.lint.record_resolv_conf(runner.place.inside)
    }
}

/// The phase and the title of the step that removes machine-specific data.
pub const CLEAN: (&str, &str) = ("clean", "cleaning (machine-id, host keys, logs)");

/// Runs the plan's clean-up steps, removes machine-specific data, and checks the image. The image must be able to boot,
/// must contain no secret and no data that only the bake needed, and must have free space on its disk.
///
/// Errors: `Step` if a check fails.
pub async fn image(runner: &CommandRunner<'_>, baseline: Baseline) -> Result<()> {
    let (place, work) = (&runner.place, &runner.work);
    for step in plan_steps::cleaning(work.plan) {
        plan_steps::run_step(runner, step).await?;
    }
    if let Err(error) = bootable::check_bootable(place, &baseline.boot, work.report).await {
        // A kernel or an initramfs may be incomplete, because there was no space for it.
        baseline.space.ensure_available(place.root)?;
        return Err(error);
    }
    let step = work.report.step(CLEAN.0, CLEAN.1);
    let timer = place.inside.meter().start();
    for note in clean::clean(place.inside, &work.image.keep).context("cleaning the image")? {
        work.report.note(note);
    }
    lint::lint(place.inside, work, &baseline.lint)?;
    secret_scan::ensure_no_secrets(place.inside, work.secrets, baseline.bake_start)?;
    drop(timer);
    step.done();
    selinux::label(runner, place.inside, work.image.selinux, baseline.begun).await?;
    baseline.space.ensure_not_full(place.root)
}
