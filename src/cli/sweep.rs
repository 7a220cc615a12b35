//! `oven sweep`.

use super::{End, answer};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::StaleRun;
use crate::disk::direct::preserved_disk;
use crate::disk::strategy::stale_runs;
use crate::error::{Kind, SUCCESS};
use crate::ids::RunId;
use crate::owner::{Owner, OwnerEnded};
use crate::provision::package_cache::{self, CacheStore};
use crate::report::Report;
use crate::sandbox::cgroup;
use crate::site::{Site, Use};
use anyhow::{Context, Result};
use serde_json::json;
use std::time::Duration;

pub async fn run(global: &GlobalArgs, args: &args::SweepArgs, report: &Report) -> Result<End> {
    let site = Site::of(&global.overrides(), &[], report.clone(), Use::Sweeps).await?;
    if !args.dry_run {
        // Removes empty cgroup directories. They belong to no run and are not reported. An error is ignored, because
        // this machine may have no cgroup v2.
        _ = cgroup::sweep();
        _ = preserved_disk::remove_orphans(&site.state);
        site.cloud.tidy().await?;
    }
    let mut stale = stale_runs(&*site.cloud, &site.state, args.older_than).await?;
    if let Some(wanted) = &args.run {
        stale = named(&site, stale, wanted).await?;
    }
    let (kept, stale): (Vec<_>, Vec<_>) = stale.into_iter().partition(|run| run.kept && !args.kept);
    let verb = if args.dry_run { "would remove" } else { "removed" };
    let (mut failed, mut swept) = (0, Vec::new());
    for run in stale {
        // A progress line is shown, because the removal may have to wait for a shell that somebody opened on the disk.
        let what = || format!("removing the leftovers of run {}", run.run.short());
        let _step = (!args.dry_run).then(|| report.step("sweep", what()));
        if !args.dry_run
            && let Err(error) = remove(&site, &run.run).await
        {
            report.failure(&error);
            failed += 1;
            continue;
        }
        if !global.json {
            let (what, run_id) = (run.resources.join(", "), run.run.short());
            answer(format!("{verb} {what} of run {run_id} ({})", owner(&run)));
        }
        swept.push(run);
    }
    for run in &kept {
        report.note(format!(
            "run {} preserved {} (--keep-on-failure): `oven sweep --kept` also removes this",
            run.run.short(),
            run.resources.join(", ")
        ));
    }
    // The directories of the package cache belong to no run that can be named.
    let mut caches = Vec::new();
    if args.run.is_none() {
        let store = CacheStore::new(&site.state.join(package_cache::DIR), package_cache::LIMIT);
        let found = store.remove_leftovers(args.dry_run)?;
        for error in &found.failures {
            report.failure(error);
            failed += 1;
        }
        caches = found.found;
        for dir in caches.iter().filter(|_| !global.json) {
            answer(format!("{verb} {}, the downloads of a bake that was killed", dir.display()));
        }
    }
    if swept.is_empty() && caches.is_empty() && failed == 0 && kept.is_empty() {
        report.note("there are no leftovers of ended runs");
    }
    let code = if failed == 0 { SUCCESS } else { Kind::LeftBehind as u8 };
    let dirs: Vec<_> = caches.iter().map(|dir| dir.to_string_lossy()).collect();
    let result =
        json!({"swept": swept, "caches": dirs, "dry_run": args.dry_run, "failed": failed, "kept": kept});
    Ok(End { code, result })
}

/// Finds the run whose id begins with `wanted`. A run of another host may still be active, so it is found only if
/// `wanted` is its whole id. A run that is known to be active is never found.
async fn named(site: &Site, mut stale: Vec<StaleRun>, wanted: &str) -> Result<Vec<StaleRun>> {
    stale.retain(|run| run.run.0.starts_with(wanted));
    match stale.len() {
        0 => {}
        1 => return Ok(stale),
        _ => {
            let message = format!("several runs begin with {wanted}");
            return Err(Kind::NotFound.failure(message).hint("Give more digits.").into());
        }
    }
    let mut unsure = stale_runs(&*site.cloud, &site.state, Some(Duration::ZERO)).await?;
    unsure.retain(|run| run.run.0.starts_with(wanted));
    if unsure.iter().any(|run| run.run.0 == wanted) {
        return Ok(unsure);
    }
    let message = format!("no leftovers of run {wanted} were found; it may still be active");
    let failure = Kind::NotFound.failure(message);
    Err(match &unsure[..] {
        [] => failure.hint(
            "`oven sweep --dry-run` lists the leftovers that can be removed. A run that is active must end first.",
        ),
        [run, ..] => failure.hint(format!(
            "Run {} belongs to {}, and may still be active. If it has ended, give all digits of its id.",
            run.run,
            owner(run)
        )),
    }
    .into())
}

fn owner(run: &StaleRun) -> String {
    match run.owner.parse::<Owner>() {
        Ok(owner) if owner.is_gone() == OwnerEnded::Yes => format!("process {}, which has ended", owner.pid),
        Ok(owner) => format!("process {} of host {}", owner.pid, owner.host),
        Err(_) => "an unknown process".to_owned(),
    }
}

async fn remove(site: &Site, run: &RunId) -> Result<()> {
    site.disks.forget(run).await.with_context(|| format!("sweeping run {}", run.short()))
}
