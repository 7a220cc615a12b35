//! `oven policy`.

use super::{End, answer};
use crate::cli::{self, Global};
use crate::cloud::policy;
use serde_json::json;

pub fn run(global: &Global, args: &cli::Policy) -> End {
    let policy = policy::policy(global.region.as_deref(), &args.kms_keys);
    if !global.json {
        answer(policy::text(&policy));
    }
    End::well(json!({"policy": policy}))
}
