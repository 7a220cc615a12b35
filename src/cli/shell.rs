//! `oven shell`: a sandboxed shell in a temporary copy of an image, or on the disk that was preserved when a run
//! failed.

use super::End;
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::BaseRef;
use crate::disk::strategy::stale_runs;
use crate::disk::{Disk, DiskSpec};
use crate::error::Kind;
use crate::ids::{ImageId, RunId};
use crate::mount::{MountOptions, Root};
use crate::provision::shell::{ShellRequest, shell};
use crate::report::Report;
use crate::site::{Site, Use};
use crate::sys::signals;
use crate::undo;
use crate::undo::Undo;
use anyhow::{Context, Result};
use oven_distro::Job;
use serde_json::json;
use std::rc::Rc;
use tokio::sync::watch;

pub async fn run(
    global: &GlobalArgs,
    args: &args::ShellArgs,
    report: &Report,
    mut stop: watch::Receiver<bool>,
) -> Result<End> {
    let site =
        signals::run_until_stopped(&stop, Site::of(&global.overrides(), &[], report.clone(), Use::Builds))
            .await?;
    let run = RunId::new();
    let policy = site.undo_policy(false);
    let stopped = async move { _ = stop.wait_for(|stop| *stop).await };
    let ended = undo::scope(policy, stopped, async |undo| {
        let disk = open(&site, &args.what, &run, &undo).await?;
        let root = Root::mount(disk.device(), &site.scratch(&run)?, &MountOptions::default(), report).await?;
        let code = run_shell(&site, &root, args).await?;
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

async fn open(site: &Site, what: &str, run: &RunId, undo: &Rc<Undo>) -> Result<Box<dyn Disk>> {
    if what.starts_with("ami-") {
        let base = site.cloud.base(&BaseRef::Id(ImageId(what.to_owned()))).await?;
        site.report.note(format!("this is a copy of {what}: your changes are discarded"));
        let _step = site.report.step("checkout", format!("checking out the disk of {what}"));
        return site.disks.checkout(&base, &DiskSpec::default(), run, undo).await;
    }
    let stale = stale_runs(&*site.cloud, &site.state, None).await?;
    let mut kept = stale.into_iter().filter(|run| run.kept && run.run.0.starts_with(what));
    match (kept.next(), kept.next()) {
        (Some(one), None) => {
            site.report.note(format!(
                "this is the preserved disk of run {}: your changes to it stay",
                one.run.short()
            ));
            site.disks.reopen(&one.run).await
        }
        (None, _) => Err(Kind::NotFound
            .failure(format!(
                "{what} is neither the id of an image, nor the id of an ended run with a preserved disk"
            ))
            .hint(
                "Give the id of an image (`oven images list` prints them), or of a run that failed with \
                 --keep-on-failure.",
            )
            .into()),
        (Some(_), Some(_)) => {
            Err(Kind::NotFound.error(format!("several runs begin with {what}: give more digits")))
        }
    }
}

/// Runs the shell with the shims of the image's plugin. Shims are files that exist only while commands run in the
/// image. Returns the shell's exit code.
async fn run_shell(site: &Site, root: &Root<'_>, args: &args::ShellArgs) -> Result<u8> {
    let os_release = root.os_release()?;
    let shims = match site.distros.detect(&os_release, None) {
        Ok((distro, _)) => {
            let job = Job { os_release, architecture: root.architecture()?.to_string(), ..Job::default() };
            distro.plan(&job).map(|plan| plan.shims).unwrap_or_default()
        }
        // If no plugin claims the image, there are no shims, but the shell works.
        Err(_) => Vec::new(),
    };
    let network = args.network.then(|| site.egress_guard());
    let request = ShellRequest {
        helper: &site.helper,
        shims,
        network,
        limits: site.settings.limits,
        command: &args.command,
    };
    shell(root, request, &site.report).await.context("running the shell")
}
