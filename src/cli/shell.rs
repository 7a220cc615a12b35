//! `oven shell`: a sandboxed shell in a temporary copy of an image, or on the disk that was preserved when a run
//! failed. With `--rerun`, runs the failed step again.

use super::{End, print_raw};
use crate::bake::secrets::read_named;
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::BaseRef;
use crate::config::overrides::Overrides;
use crate::config::project::{NetworkSettings, Settings};
use crate::disk::step_record::{RecordedDefinition, StepRecord};
use crate::disk::strategy::stale_runs;
use crate::disk::{Disk, DiskSpec};
use crate::error::Kind;
use crate::identity::checksum::config_checksum_within;
use crate::ids::{ImageId, RunId};
use crate::mount::{MountOptions, Root};
use crate::provision::package_cache::{self, CacheStore};
use crate::provision::shell::{ReopenedStep, RerunRequest, ShellRequest, StepContext, rerun, shell};
use crate::report::{Report, Style};
use crate::site::{Site, Use};
use crate::sys::signals;
use crate::text::escape_name;
use crate::undo;
use crate::undo::Undo;
use anyhow::{Context, Result};
use oven_distro::{Job, Shim};
use serde_json::json;
use std::path::PathBuf;
use std::rc::Rc;
use tokio::sync::watch;

/// The phase of the step in the JSON events of `--rerun`.
const PHASE: &str = "rerun";

/// The disk that a shell opens.
enum ShellTarget {
    Image(ImageId),
    /// A run that preserved its disk, and the step that failed, if this machine has a record of it.
    Run(RunId, Option<Box<FailedStep>>),
}

struct FailedStep {
    step: ReopenedStep,
    /// The settings of the project of the definition.
    network: NetworkSettings,
    /// What the step did and where image.toml requests it.
    title: String,
}

pub async fn run(
    global: &GlobalArgs,
    args: &args::ShellArgs,
    report: &Report,
    mut stop: watch::Receiver<bool>,
) -> Result<End> {
    args.secrets.permitted()?;
    let of_a_run = [("--rerun", args.rerun), ("--secret", args.secrets.are_given())];
    if let Some((flag, _)) = of_a_run.into_iter().find(|(_, given)| *given && is_image(&args.what)) {
        let failure =
            Kind::Usage.failure(format!("{flag} needs the id of a run, but {} is an image", args.what));
        return Err(failure
            .hint("The id of a run is printed when a bake with --keep-on-failure fails.")
            .into());
    }
    let site =
        signals::run_until_stopped(&stop, Site::of(&global.overrides(), &[], report.clone(), Use::Builds))
            .await?;
    let run = RunId::new();
    let policy = site.undo_policy(false);
    let stopped = async move { _ = stop.wait_for(|stop| *stop).await };
    let ended = undo::scope(policy, stopped, async |undo| {
        let target = target(&site, global, args).await?;
        let disk = open(&site, &target, &run, &undo).await?;
        let failed = if let ShellTarget::Run(_, failed) = &target { failed.as_deref() } else { None };
        let options = MountOptions {
            // Only the step itself may write to the disk, and not a shell.
            disk_writable: args.rerun && failed.is_some_and(|failed| failed.step.can_write_disk()),
            ..MountOptions::default()
        };
        let root = Root::mount(disk.device(), &site.scratch(&run)?, &options, report).await?;
        let code = match failed {
            Some(failed) if args.rerun => run_again(&site, &root, failed).await?,
            _ => run_shell(&site, &root, args, failed).await?,
        };
        root.close().await?;
        Ok(code)
    })
    .await;
    super::warn_of_leftovers(&site, &ended.leftovers);
    Ok(match ended.result {
        Ok(code) => End { code, result: json!({}) },
        // The error was already reported.
        Err(error) => End::failure(&error),
    })
}

fn is_image(what: &str) -> bool {
    what.starts_with("ami-")
}

/// Finds what the user named. Reports what of the failed step is not as it was.
async fn target(site: &Site, global: &GlobalArgs, args: &args::ShellArgs) -> Result<ShellTarget> {
    let what = &args.what;
    if is_image(what) {
        return Ok(ShellTarget::Image(ImageId(what.clone())));
    }
    let stale = stale_runs(&*site.cloud, &site.state, None).await?;
    let mut kept = stale.into_iter().filter(|run| run.kept && run.run.0.starts_with(what));
    let run = match (kept.next(), kept.next()) {
        (Some(one), None) => one.run,
        (None, _) => {
            return Err(Kind::NotFound
                .failure(format!(
                    "{what} is neither the id of an image, nor the id of an ended run with a preserved disk"
                ))
                .hint(
                    "Give the id of an image (`oven images list` prints them), or of a run that failed with \
                     --keep-on-failure.",
                )
                .into());
        }
        (Some(_), Some(_)) => {
            return Err(Kind::NotFound.error(format!("several runs begin with {what}: give more digits")));
        }
    };
    let failed = match StepRecord::load(&site.state, &run)? {
        Some(record) => Some(reopen_step(site, &global.overrides(), args, record)?),
        None if args.rerun => {
            let shell = site.command_for_site(&format!("oven shell {}", run.short()));
            return Err(Kind::NotFound
                .failure(format!("this machine has no record of a failed step of run {}", run.short()))
                .hint(format!(
                    "oven records a step that fails, on the machine that bakes. This command opens a shell on the \
                     disk: {shell}"
                ))
                .into());
        }
        None => None,
    };
    Ok(ShellTarget::Run(run, failed.map(Box::new)))
}

/// Prepares a recorded step. Warns if the step cannot be exactly as it was. With `--rerun`, files and secrets that are
/// missing are an error.
fn reopen_step(
    site: &Site,
    overrides: &Overrides,
    args: &args::ShellArgs,
    record: StepRecord,
) -> Result<FailedStep> {
    let StepRecord { definition, step, .. } = record;
    let dir = definition.directories.first().map(escape_name).unwrap_or_default();
    let place = match (&step.table, step.line) {
        (Some(table), Some(line)) => format!("the [[{table}]] in line {line} of {dir}/image.toml"),
        _ => format!("a step of the plan for {dir}"),
    };
    let title = format!("{} ({place})", step.why);
    let permitted = args.secrets.permitted()?;
    let (secrets, mut missing) = read_named(&step.secrets, &permitted, |name| std::env::var_os(name));
    site.report.mask_secrets(&secrets);
    let (step, gone) = ReopenedStep::new(step, secrets)?;
    missing.extend(gone);
    if let Some(change) = change_of(&definition) {
        site.report.warn(change);
    }
    if args.rerun && !missing.is_empty() {
        let hint = "Pass secrets in oven's environment: `NAME=… oven shell --rerun …`. Put files back where they were, \
                    or bake again.";
        return Err(Kind::Definition
            .failure(format!("the step cannot run again: {}", missing.join("; ")))
            .hint(hint)
            .into());
    }
    for what in missing {
        site.report.warn(format!("{what}, so the shell does not have it"));
    }
    let is_needed = args.rerun && step.has_network_settings();
    let network = if is_needed { network_settings(site, overrides, &definition) } else { None };
    Ok(FailedStep { step, network: network.unwrap_or_default(), title })
}

/// Returns the settings of the definition's project, which need not be the project of the working directory. Warns if
/// they cannot be read.
fn network_settings(
    site: &Site,
    overrides: &Overrides,
    definition: &RecordedDefinition,
) -> Option<NetworkSettings> {
    let read = |dir: &PathBuf| match Settings::resolve(dir, overrides) {
        Ok(settings) => Some(settings.network),
        Err(error) => {
            let what = "the step does not get the settings of [network], because oven.toml cannot be read";
            site.report.warn(format!("{what}: {error:#}"));
            None
        }
    };
    definition.directories.first().and_then(read)
}

/// Describes how the definition differs from what the bake read. `None` if it is the same.
fn change_of(definition: &RecordedDefinition) -> Option<String> {
    let RecordedDefinition { directories, project, checksum } = definition;
    let dir = directories.first().map(escape_name).unwrap_or_default();
    if let Some(gone) = directories.iter().find(|dir| !dir.is_dir()) {
        return Some(format!("the definition {dir} is not complete: {} no longer exists", escape_name(gone)));
    }
    match config_checksum_within(directories, &|_| Some(project.clone())) {
        Ok(now) if now.hex == *checksum => None,
        Ok(_) => Some(format!(
            "the definition {dir} has changed since the run failed: the command is that of the run, but it sees the \
             files as they are now"
        )),
        Err(error) => Some(format!("whether the definition {dir} has changed is unknown: {error:#}")),
    }
}

async fn open(site: &Site, target: &ShellTarget, run: &RunId, undo: &Rc<Undo>) -> Result<Box<dyn Disk>> {
    match target {
        ShellTarget::Image(id) => {
            let base = site.cloud.base(&BaseRef::Id(id.clone())).await?;
            site.report.note(format!("this is a copy of {id}: your changes are discarded"));
            let _step = site.report.step("checkout", format!("checking out the disk of {id}"));
            site.disks.checkout(&base, &DiskSpec::default(), run, undo).await
        }
        ShellTarget::Run(failed, _) => {
            let text =
                format!("this is the preserved disk of run {}: your changes to it stay", failed.short());
            site.report.note(text);
            site.disks.reopen(failed).await
        }
    }
}

/// Runs the failed step again. Its output is the result, as if a shell had run the command.
async fn run_again(site: &Site, root: &Root<'_>, failed: &FailedStep) -> Result<u8> {
    let report = &site.report;
    report.note(format!("running again: {}\n    {}", failed.title, failed.step.command()));
    let store = package_cache(site);
    let request = RerunRequest {
        helper: &site.helper,
        failed: StepContext { step: &failed.step, store: &store },
        network: &failed.network,
        guard: site.egress_guard(),
    };
    if report.style() != Style::Json {
        return rerun(root, request, report, &mut |line| print_raw(line)).await.context("running the step");
    }
    let step = report.step(PHASE, failed.title.clone());
    let code =
        rerun(root, request, report, &mut |line| step.output(line)).await.context("running the step")?;
    step.done();
    Ok(code)
}

/// Runs the shell. On the disk of a run, it has the environment of the failed step, and the command of the step is
/// printed first. Returns the shell's exit code.
async fn run_shell(
    site: &Site,
    root: &Root<'_>,
    args: &args::ShellArgs,
    failed: Option<&FailedStep>,
) -> Result<u8> {
    if let Some(FailedStep { step, title, .. }) = failed {
        let again = site.command_for_site(&format!("oven shell --rerun {}", args.what));
        let network = match step.has_network() && !args.network {
            true => "\n    the step had the network, and this shell has it only with --network",
            false => "",
        };
        let command = step.command();
        site.report.note(format!(
            "the step that failed: {title}\n    {command}{network}\n    run it again as in the bake: {again}"
        ));
    }
    let network = args.network.then(|| site.egress_guard());
    let store = package_cache(site);
    let request = ShellRequest {
        helper: &site.helper,
        shims: shims(site, root)?,
        network,
        limits: site.settings.limits,
        failed: failed.map(|FailedStep { step, .. }| StepContext { step, store: &store }),
        command: &args.command,
    };
    shell(root, request, &site.report).await.context("running the shell")
}

fn package_cache(site: &Site) -> CacheStore {
    let dir = site.state.join(package_cache::DIR);
    CacheStore::new(&std::path::absolute(&dir).unwrap_or(dir), package_cache::LIMIT)
}

/// Returns the shims of the image's plugin. Shims are files that exist only while commands run in the image.
fn shims(site: &Site, root: &Root<'_>) -> Result<Vec<Shim>> {
    let os_release = root.os_release()?;
    Ok(match site.distros.detect(&os_release, None) {
        Ok((distro, _)) => {
            let job = Job { os_release, architecture: root.architecture()?.to_string(), ..Job::default() };
            distro.plan(&job).map(|plan| plan.shims).unwrap_or_default()
        }
        // If no plugin claims the image, there are no shims, but the shell works.
        Err(_) => Vec::new(),
    })
}
