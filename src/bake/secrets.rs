//! Collects the secrets that a definition's scripts name. Their values are in oven's environment.

use super::Bake;
use crate::definition::{Definition, FILE};
use crate::error::Kind;
use crate::secrets::{Secrets, check_value};
use anyhow::Result;
use std::collections::BTreeMap;
use std::ffi::OsString;

/// Collects the secrets, and masks their values in all later reports.
pub fn collect(bake: &Bake<'_>) -> Result<Secrets> {
    let secrets = from_environment(bake.image, |name| std::env::var_os(name))?;
    bake.site.report.mask_secrets(&secrets);
    Ok(secrets)
}

/// Reads the secrets from `environment`. The error lists every secret that is missing or invalid, with its place in
/// image.toml.
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
    let hint = "Pass secrets in oven's environment: `NAME=… oven bake …`. If you use sudo, add its option \
                --preserve-env.";
    Err(Kind::Definition.failure(wrong.join("\n")).hint(hint).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::Base;
    use crate::config::project::Settings;
    use crate::identity::fingerprint::Inputs;
    use crate::ids::{Architecture, ImageId, SnapshotId};

    /// The fingerprint does not depend on the values of secrets, because it is computed without them.
    #[test]
    fn a_secrets_value_does_not_count() {
        let top = tempfile::tempdir().unwrap();
        let write = |_: &std::path::Path, path: &str, text: &str| {
            let path = top.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(top.path(), "web/a.sh", "#!/bin/sh\n");
        let inputs = |image: &Definition| {
            let base = Base {
                id: ImageId("ami-1".into()),
                name: "base".into(),
                snapshot: SnapshotId("snap-1".into()),
                architecture: Architecture::HOST,
                size_gib: 1,
                root_device: "/dev/xvda".into(),
                attributes: Default::default(),
            };
            Inputs::of(image, &base, &Settings::default()).unwrap()
        };
        let toml = "from = \"ami-0123456789abcdef0\"\n[[run]]\nscript = \"a.sh\"\nsecrets = [\"TOKEN\"]\n";
        write(top.path(), "web/image.toml", toml);
        let image = Definition::load(&top.path().join("web")).unwrap();
        let before = inputs(&image);
        for value in ["hunter2-one", "hunter2-two"] {
            let secrets = from_environment(&image, |_| Some(value.into())).unwrap();
            assert_eq!(secrets.environment(&image.runs[0].secrets)["TOKEN"], value);
            let now = inputs(&image);
            assert_eq!(now, before);
            assert!(!now.to_json().contains("hunter2") && !now.digest().contains("hunter2"));
        }
        let error = from_environment(&image, |_| None).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Definition);
        let text = error.to_string();
        assert!(
            text.ends_with(
                "image.toml:2: `secrets` of [[run]] names TOKEN, which is not set in oven's environment"
            ),
            "{text}"
        );
    }
}
