//! `oven policy`.

use super::{End, print_raw};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::iam_policy;
use crate::cloud::iam_policy::DiskAccess;
use crate::config::overrides::Overrides;
use crate::config::project::{Settings, Strategy};
use anyhow::Result;
use serde_json::json;

/// Prints the policy for the kind of disks that `--disks` names. Without `--disks`, prints the policy for all kinds of
/// disks.
pub fn run(global: &GlobalArgs, args: &args::PolicyArgs) -> Result<End> {
    let asked = Overrides { disks: global.disks.clone(), ..Overrides::default() };
    let disks = match Settings::default().merge(&asked)?.disks {
        None => DiskAccess::Both,
        Some(Strategy::Attached) => DiskAccess::Attached,
        Some(Strategy::Direct) => DiskAccess::Direct,
    };
    let policy = iam_policy::policy(disks, global.region.as_deref(), &args.kms_keys);
    if !global.json {
        print_raw(iam_policy::text(&policy));
    }
    Ok(End::success(json!({"policy": policy})))
}
