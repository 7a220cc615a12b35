//! Turns a provisioned root into an image: cleans the root, and checks that it is clean and can boot.

pub mod bootable;
pub mod clean;
pub mod first_boot;
pub mod identities;
pub mod lint;
pub mod package_made;
pub mod repositories;
pub mod rules;
pub mod secret_scan;
pub mod selinux;

use crate::error::Kind;
use crate::image::accounts::Accounts;
use crate::image::tree::ImageTree;
use crate::provision::command::CommandRunner;
use crate::provision::context::ProvisionContext;
use crate::provision::plan_steps;
use crate::provision::space::ImageSpace;
use crate::text::escape_name;
use anyhow::{Context, Result};
use bootable::BootBaseline;
use identities::{BaseSecrets, Exemptions};
use lint::bake_period::BakeMoment;
use package_made::PackageMadeFiles;
use repositories::{RemovedFiles, UncleanRepository};
use std::collections::BTreeSet;
use std::time::SystemTime;

/// The state of the image before the bake. The lint, the search for secrets and the boot check compare the finished
/// image with it.
pub struct Baseline {
    begun: SystemTime,
    space: ImageSpace,
    bake_start: secret_scan::BakeStart,
    lint: lint::LintBaseline,
    boot: bootable::BootBaseline,
    moment: BakeMoment,
    base_secrets: BaseSecrets,
    package_made: PackageMadeFiles,
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
            moment: BakeMoment::now()?,
            base_secrets: BaseSecrets::of(place.inside)?,
            package_made: PackageMadeFiles::default(),
        })
    }

    /// Records whether a package copied this machine's name servers to `/etc/resolv.conf`, and which keys, ids and
    /// secrets the packages' scripts made. Call this after the packages are installed and before the definition's
    /// scripts run, because changes by scripts are intended.
    pub fn note_packages(&mut self, runner: &CommandRunner<'_>) -> Result<()> {
        let inside = runner.place.inside;
        self.lint.record_resolv_conf(inside)?;
        if plan_steps::provisioning(runner.work.plan).next().is_some() {
            let placed: Vec<_> = runner.work.plan.files.iter().map(|file| file.path.as_str()).collect();
            self.package_made = PackageMadeFiles::find(inside, &self.moment, &placed)
                .context("searching for keys, ids and secrets that scripts of packages made")?;
            if let Some(warning) = self.package_made.limit_warning() {
                runner.work.report.warn(warning);
            }
        }
        Ok(())
    }
}

/// The phase and the title of the step that removes machine-specific data.
pub const CLEAN: (&str, &str) = ("clean", "cleaning (machine-id, host keys, logs)");

/// What the clean-up needs to know about the image before it.
struct CleanUp {
    base_secrets: BaseSecrets,
    package_made: PackageMadeFiles,
    /// The patterns of `[clean] remove` that matched nothing.
    unmatched: BTreeSet<String>,
}

/// Removes machine-specific data. Returns the repositories that hold some of it in their history.
fn clean_image(
    inside: &ImageTree,
    work: &ProvisionContext<'_>,
    before: CleanUp,
) -> Result<Vec<UncleanRepository>> {
    let (keep, remove, report) = (&work.image.keep, &work.image.remove, work.report);
    // The definition's own files are not clones of what a package made.
    let placed = work.image.files.iter().map(|file| file.target.clone());
    let exempt: Vec<_> = keep.iter().cloned().chain(placed).collect();
    let mut removed = RemovedFiles::read(inside, remove)?;
    let mut notes = clean::clean(inside, keep)?;
    let is_removed = |path: &str| -> Result<bool> {
        Ok(rules::is_excluded(remove, path) || before.package_made.has_unchanged(inside, path)?)
    };
    let exemptions = Exemptions { paths: &exempt, is_removed: &is_removed, base: &before.base_secrets };
    let identities = identities::replace(inside, &exemptions)?;
    notes.extend(identities.notes);
    let unmatched = clean::remove(inside, remove, keep).context("removing the paths of `[clean] remove`")?;
    for pattern in unmatched.iter().filter(|pattern| before.unmatched.contains(*pattern)) {
        report.warn(format!("`{}` of `[clean] remove` matches nothing in the image", escape_name(pattern)));
    }
    let mut unclean = removed.find_repositories(inside, keep)?;
    if let Some(warning) = removed.limit_warning() {
        report.warn(warning);
    }
    notes.extend(repositories::replace_etckeepers(inside, &mut unclean)?);
    notes.extend(clean::protected_note(inside));
    notes.iter().for_each(|note| report.note(note));
    if let Some(warning) = before.package_made.warning(inside, &exempt, &identities.remaining)? {
        report.warn(work.secrets.mask(&warning));
    }
    Ok(unclean)
}

/// Checks the boot files again after the removal of `[clean] remove`. `kernel` is a kernel that the image had before.
async fn check_removal(
    runner: &CommandRunner<'_>,
    before: &BootBaseline,
    kernel: Option<String>,
) -> Result<()> {
    let (place, hint) = (
        &runner.place,
        "`[clean] remove` of image.toml removed a file that the image needs: correct the pattern.",
    );
    if let (Some(path), None) = (kernel, bootable::find_kernel(place.inside)?) {
        let what = format!(
            "the image would not boot on an instance: {}: this kernel was removed, and there is no other kernel",
            escape_name(&path)
        );
        return Err(Kind::Step.failure(what).hint(hint).into());
    }
    let checked = bootable::check_bootable(place, before, runner.work.report).await;
    checked.map_err(|error| match Kind::of(&error) {
        Kind::Step => Kind::Step.failure(format!("{error:#}")).hint(hint).into(),
        _ => error,
    })
}

/// Runs the plan's clean-up steps, removes machine-specific data, and checks the image. The image must be able to boot,
/// must contain no secret and no data that only the bake needed, and must have free space on its disk.
///
/// Errors: `Step` if a check fails.
pub async fn image(runner: &CommandRunner<'_>, baseline: Baseline) -> Result<()> {
    let (place, work) = (&runner.place, &runner.work);
    // The plan's steps and the clean-up may remove what the patterns match.
    let unmatched = clean::unmatched(place.inside, &work.image.remove)
        .context("searching for the paths of `[clean] remove`")?;
    for step in plan_steps::cleaning(work.plan) {
        plan_steps::run_step(runner, step).await?;
    }
    if let Err(error) = bootable::check_bootable(place, &baseline.boot, work.report).await {
        // A kernel or an initramfs may be incomplete, because there was no space for it.
        baseline.space.ensure_available(place.root)?;
        return Err(error);
    }
    let package_made = baseline.package_made.without_owned(runner).await?;
    let step = work.report.step(CLEAN.0, CLEAN.1);
    let timer = place.inside.meter().start();
    let before = CleanUp { base_secrets: baseline.base_secrets, package_made, unmatched };
    let kernel = if work.image.remove.is_empty() { None } else { bootable::find_kernel(place.inside)? };
    let unclean = clean_image(place.inside, work, before).context("cleaning the image")?;
    lint::lint(place.inside, work, &baseline.lint, &unclean)?;
    secret_scan::ensure_no_secrets(place.inside, work.secrets, baseline.bake_start)?;
    drop(timer);
    step.done();
    if !work.image.remove.is_empty() {
        check_removal(runner, &baseline.boot, kernel).await?;
    }
    selinux::label(runner, place.inside, work.image.selinux, baseline.begun).await?;
    baseline.space.ensure_not_full(place.root)
}
