//! `oven doctor`.

use super::answer;
use crate::cli::Global;
use crate::error::{Kind, SUCCESS};
use crate::machine;
use crate::report::Report;
use crate::site::Site;
use anyhow::Result;
use serde_json::json;

pub fn run(global: &Global, report: &Report) -> Result<u8> {
    let mut checks = machine::checks();
    checks.extend(machine::egress());
    checks.push(machine::region(Site::of(global, &[], report.clone())));
    let lacking = checks.iter().filter(|check| check.lacks()).count();
    report.event(json!({"event": "result", "fit": lacking == 0, "checks": checks}));
    if !global.json {
        for check in &checks {
            answer(check);
        }
    }
    Ok(if lacking == 0 { SUCCESS } else { Kind::Machine as u8 })
}
