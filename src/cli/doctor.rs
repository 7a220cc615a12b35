//! `oven doctor`.

use super::{End, answer};
use crate::cli::args::GlobalArgs;
use crate::cloud::{Permission, PermissionVerdict};
use crate::config::project::{Settings, Strategy};
use crate::doctor::checks;
use crate::doctor::checks::{Check, Needs};
use crate::doctor::probes::{self, Probe};
use crate::error::{Kind, SUCCESS};
use crate::report::Report;
use crate::site::{Findings, Site};
use anyhow::Result;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

pub async fn run(global: &GlobalArgs, report: &Report) -> Result<End> {
    let overrides = global.overrides();
    // Errors in the settings are ignored here, because `Site::examine` reports them.
    let needs = Needs::of(&Settings::resolve(Path::new("."), &overrides).unwrap_or_default());
    let (findings, site) = Site::examine(&overrides, report).await;
    let mut checks = checks::checks(needs);
    checks.push(checks::disk_growth());
    checks.extend(checks::credential_blocking(needs.role));
    checks.extend(checks::step_limits());
    match &site {
        Ok(site) if site.cloud.is_on_this_machine() => checks.push(checks::region(&site.state)),
        Ok(site) => checks.push(checks::state_directory(&site.state)),
        Err(_) => checks.push(Check::from_result("region", &site, "Choose another --region-dir.")),
    }
    // If the checks found that something is missing, the probes are skipped, because they would fail for the same
    // reason.
    if let (Ok(site), false) = (&site, checks.iter().any(Check::lacks)) {
        let probe = Probe {
            helper: &site.helper,
            state: &site.state,
            in_region: site.cloud.is_on_this_machine(),
            direct: site.settings.disks() == Strategy::Direct,
            egress: site.egress_guard(),
        };
        checks.extend(probes::run(&probe).await);
    }
    let mut permissions = Vec::new();
    checks.extend(findings.iter().map(check));
    checks.extend(checks::nvme_timeout(Path::new("/sys")).filter(|_| needs.nvme));
    if let Ok(site) = &site {
        checks.extend(cloud(site, &mut permissions).await?);
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
    let mut result = json!({"fit": lacking == 0, "checks": checks});
    if needs.role {
        result["permissions"] = json!(permissions);
    }
    Ok(End { code, result })
}

fn check((what, result): &(String, Result<()>)) -> Check {
    Check::from_result(what, result, "")
}

/// Checks the connection to the cloud. If it works, also checks the role's permissions.
async fn cloud(site: &Site, permissions: &mut Vec<Permission>) -> Result<Vec<Check>> {
    let connection: Findings = site.cloud.connection().await;
    let mut checks: Vec<Check> = connection.iter().map(check).collect();
    if checks.iter().any(Check::lacks) {
        checks.push(Check::optional(
            "permissions",
            false,
            "they are not checked without a connection to EC2",
        ));
    } else {
        *permissions = site.cloud.permissions().await?;
        checks.extend(summarize(permissions));
    }
    Ok(checks)
}

/// Summarizes permissions in a few lines: one line for all granted permissions, one line for all missing permissions,
/// and for each reason one line for the permissions that could not be checked.
fn summarize(permissions: &[Permission]) -> Vec<Check> {
    let (mut granted, mut missing, mut unknown) = (Vec::new(), Vec::new(), BTreeMap::<_, Vec<&str>>::new());
    for Permission { action, verdict } in permissions {
        match verdict {
            PermissionVerdict::Granted => granted.push(action.as_str()),
            PermissionVerdict::Missing => missing.push(action.as_str()),
            PermissionVerdict::Unknown(why) => unknown.entry(why).or_default().push(action),
        }
    }
    let mut checks = Vec::new();
    if !granted.is_empty() {
        checks.push(Check::new(&format!("permitted: {}", granted.join(", ")), true, "", ""));
    }
    if !missing.is_empty() {
        let why = format!("the role lacks {}", missing.join(", "));
        checks.push(Check::new("permissions", false, why, "`oven policy` prints the minimal policy."));
    }
    let unchecked = |(why, actions): (&String, Vec<&str>)| {
        Check::optional(&format!("perhaps permitted: {}", actions.join(", ")), false, why)
    };
    checks.extend(unknown.into_iter().map(unchecked));
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_missing_and_unknown_permissions_are_reported_at_once() {
        let permission = |action: &str, verdict| Permission { action: action.to_owned(), verdict };
        let why = || PermissionVerdict::Unknown("no such thing".to_owned());
        let checks = summarize(&[
            permission("ec2:A", PermissionVerdict::Granted),
            permission("ec2:B", PermissionVerdict::Missing),
            permission("ec2:C", why()),
            permission("ec2:D", PermissionVerdict::Missing),
            permission("ec2:E", why()),
        ]);
        let lines: Vec<String> = checks.iter().map(ToString::to_string).collect();
        assert_eq!(
            lines,
            [
                "ok     permitted: ec2:A",
                "lacks  permissions: the role lacks ec2:B, ec2:D. `oven policy` prints the minimal policy.",
                "note   perhaps permitted: ec2:C, ec2:E: no such thing",
            ]
        );
        assert_eq!(checks.iter().filter(|check| check.lacks()).count(), 1);
    }
}
