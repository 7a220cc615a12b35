//! `oven doctor`.

use super::{End, answer};
use crate::cli::args::GlobalArgs;
use crate::cloud::{Permission, PermissionVerdict};
use crate::config::project::{Settings, Strategy};
use crate::doctor::checks;
use crate::doctor::checks::{Check, Needs};
use crate::doctor::probes::{self, Probe};
use crate::error::{Kind, SUCCESS};
use crate::provision::context::EgressGuard;
use crate::report::Report;
use crate::site::{self, Findings, Site};
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
    checks.push(checks::panic_settings(Path::new("/proc/sys")));
    checks.extend(checks::credential_blocking(needs.role));
    checks.extend(checks::step_limits());
    let without_region = match &site {
        Ok(site) if site.cloud.is_on_this_machine() => {
            checks.push(checks::region(&site.state, true));
            None
        }
        Ok(site) => {
            checks.push(checks::state_directory(&site.state));
            None
        }
        // A machine can bake before it has a region, because `oven import` makes one.
        Err(error) if !needs.role && Kind::of(error) == Kind::NotFound => {
            let settings = Settings::resolve(Path::new("."), &overrides)?;
            checks.push(checks::region(site::region_dir(&settings), false));
            Some(settings)
        }
        Err(_) => {
            checks.push(Check::from_result("region", &site, "Choose another --region-dir."));
            None
        }
    };
    // If the checks found that something is missing, the probes are skipped, because they would fail for the same
    // reason.
    if !checks.iter().any(Check::lacks) {
        let helper = site::helper()?;
        let probe = match (&site, &without_region) {
            (Ok(site), _) => Some(Probe {
                helper: &site.helper,
                region: site.cloud.is_on_this_machine().then_some(&site.state),
                in_region: site.cloud.is_on_this_machine(),
                direct: site.settings.disks() == Strategy::Direct,
                egress: site.egress_guard(),
            }),
            (Err(_), Some(settings)) => Some(Probe {
                helper: &helper,
                region: None,
                in_region: true,
                direct: settings.disks() == Strategy::Direct,
                egress: EgressGuard::Wanted,
            }),
            (Err(_), None) => None,
        };
        if let Some(probe) = probe {
            checks.extend(probes::run(&probe).await);
        }
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
