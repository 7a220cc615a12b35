//! `oven doctor`.

use super::{End, answer};
use crate::cli::Global;
use crate::error::{Kind, SUCCESS};
use crate::machine;
use crate::report::Report;
use crate::site::{Site, Use};
use anyhow::Result;
use serde_json::json;

pub async fn run(global: &Global, report: &Report) -> Result<End> {
    let site = Site::of(global, &[], report.clone(), Use::Builds).await;
    let mut checks = machine::checks();
    checks.push(machine::growing());
    checks.extend(machine::egress());
    checks.push(machine::region(&site));
    // What lacks something would fail for that reason, which is said.
    if let (Ok(site), false) = (&site, checks.iter().any(|check| check.lacks())) {
        checks.extend(machine::trial(site).await);
    }
    let lacking = checks.iter().filter(|check| check.lacks()).count();
    if !global.json {
        for check in checks.iter().filter(|check| !global.quiet || check.lacks()) {
            answer(check);
        }
        match lacking {
            0 => report.note("This machine can bake."),
            1 => report.note("This machine cannot bake: it lacks one thing."),
            n => report.note(format!("This machine cannot bake: it lacks {n} things.")),
        }
    }
    let code = if lacking == 0 { SUCCESS } else { Kind::Machine as u8 };
    Ok(End { code, result: json!({"fit": lacking == 0, "checks": checks}) })
}
