//! `oven sweep`.

use super::answer;
use crate::cli::{self, Global};
use crate::cloud::RunId;
use crate::error::{Kind, SUCCESS};
use crate::report::Report;
use crate::root::step::egress;
use crate::site::Site;
use anyhow::{Context, Result};
use serde_json::json;

pub async fn run(global: &Global, args: &cli::Sweep, report: &Report) -> Result<u8> {
    let site = Site::of(global, &[], report.clone())?;
    if !args.dry_run {
        // Empty directories, of no run: nothing to tell, and nothing to fail for where there is no cgroup v2.
        _ = egress::sweep();
    }
    let mut stale = site.cloud.stale_runs(args.older_than).await?;
    if let Some(wanted) = &args.run {
        stale.retain(|run| run.run.0.starts_with(wanted.as_str()));
        // A run whose process is alive is not stale; named in full, it is the user's word that counts.
        if stale.is_empty() && wanted.len() != 32 {
            let hint = "`oven sweep --dry-run` lists the runs; give all 32 digits of one that is not known to be gone.";
            return Err(Kind::NotFound.failure(format!("no run {wanted} left anything")).hint(hint).into());
        }
    }
    let mut failed = 0;
    let mut swept = Vec::new();
    for run in stale.iter().filter(|run| !run.kept || args.kept) {
        let verb = if args.dry_run { "would remove" } else { "removed" };
        if !args.dry_run
            && let Err(error) = remove(&site, &run.run).await
        {
            report.failure(&error);
            failed += 1;
            continue;
        }
        if !global.json {
            answer(format!("{verb} {} of run {} ({})", run.resources.join(", "), run.run.short(), run.owner));
        }
        swept.push(run);
    }
    if let (Some(wanted), true, false) = (&args.run, stale.is_empty(), args.dry_run) {
        remove(&site, &RunId(wanted.clone())).await?;
    }
    let kept = stale.iter().filter(|run| run.kept && !args.kept).count();
    if kept > 0 {
        report.note(format!("{kept} kept by --keep-on-failure: --kept removes them, too"));
    }
    report.event(json!({"event": "result", "swept": swept, "dry_run": args.dry_run, "failed": failed}));
    Ok(if failed == 0 { SUCCESS } else { Kind::LeftBehind as u8 })
}

async fn remove(site: &Site, run: &RunId) -> Result<()> {
    site.disks.forget(run).await.with_context(|| format!("sweeping run {}", run.short()))
}
