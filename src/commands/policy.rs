//! `oven policy`.

use super::{End, answer};
use crate::cli::{self, Global};
use crate::cloud::policy::{self, Ways};
use crate::settings::{Overrides, Settings, Strategy};
use anyhow::Result;
use serde_json::json;

/// `--disks` says what for; without it, for all.
pub fn run(global: &Global, args: &cli::Policy) -> Result<End> {
    let asked = Overrides { disks: global.disks.clone(), ..Overrides::default() };
    let ways = match Settings::default().merge(&asked)?.disks {
        None => Ways::Both,
        Some(Strategy::Attached) => Ways::Attached,
        Some(Strategy::Direct) => Ways::Direct,
    };
    let policy = policy::policy(ways, global.region.as_deref(), &args.kms_keys);
    if !global.json {
        answer(policy::text(&policy));
    }
    Ok(End::well(json!({"policy": policy})))
}
