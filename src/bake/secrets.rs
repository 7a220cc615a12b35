//! The secrets that a definition's scripts name, collected from oven's environment.

use super::Bake;
use crate::definition::{Definition, FILE};
use crate::error::Kind;
use crate::secrets::{Secrets, check_value};
use anyhow::Result;
use std::collections::BTreeMap;
use std::ffi::OsString;

/// Collects them, and masks them in everything that is reported from now on.
pub fn collect(bake: &Bake<'_>) -> Result<Secrets> {
    let secrets = from_environment(bake.image, |name| std::env::var_os(name))?;
    bake.site.report.hide(&secrets);
    Ok(secrets)
}

/// A failure tells every name that is missing, and where it is asked for.
pub fn from_environment(
    image: &Definition,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Secrets> {
    let (mut values, mut wrong) = (BTreeMap::new(), Vec::new());
    for script in image.runs.iter().chain(&image.tests) {
        for name in &script.secrets {
            if values.contains_key(name) {
                continue;
            }
            match check_value(environment(name)) {
                Ok(value) => _ = values.insert(name.clone(), value),
                Err(what) => wrong.push(format!(
                    "{}:{}: `secrets` of [[{}]] names {name}, which {what}",
                    image.dir.join(FILE).display(),
                    script.line,
                    script.kind.key(),
                )),
            }
        }
    }
    if wrong.is_empty() {
        return Ok(Secrets::new(values));
    }
    let hint = "Pass secrets in oven's environment: `NAME=… oven bake …`; sudo only passes variables on with --preserve-env.";
    Err(Kind::Definition.failure(wrong.join("\n")).hint(hint).into())
}
