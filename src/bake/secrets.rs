//! Collects the secrets that a definition's scripts name. Their values are in oven's environment.

use super::Bake;
use crate::definition::{Definition, Script, free_name, variable_name};
use crate::error::{Failure, Kind, Mistake};
use crate::secrets::{Secrets, check_value};
use crate::text::ShortList;
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};

/// The maximal number of secrets that an error lists. A definition of a stranger may name any number.
const MAX_LISTED: usize = 20;

/// The secrets that may be passed to the scripts of definitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PermittedSecrets {
    /// Every secret that a definition names.
    All,
    /// Only these (`--secret`).
    Only(BTreeSet<String>),
    /// None, because oven runs in CI without `--secret`. In CI, a pull request of a stranger may name any secret.
    NoneInCi,
}

impl PermittedSecrets {
    /// `given` has the names of the command line. `ci` is the value of the environment variable `CI`, which CI systems
    /// set. Errors: [`Kind::Usage`].
    pub fn new(given: &[String], ci: Option<&OsStr>) -> Result<Self> {
        if let Some(bad) = given.iter().find(|name| variable_name(name).is_err()) {
            // The text is not shown, because somebody may have written the secret's value.
            let what = if bad.contains('=') { "has a value" } else { "is not a valid variable name" };
            return Err(Kind::Usage
                .failure(format!("an argument of --secret {what}"))
                .hint("Give only the secret's name: --secret NAME. Its value comes from the environment variable NAME.")
                .into());
        }
        let in_ci = ci.is_some_and(|ci| !ci.is_empty() && ci != "false" && ci != "0");
        Ok(match given.is_empty() {
            false => Self::Only(given.iter().cloned().collect()),
            true if in_ci => Self::NoneInCi,
            true => Self::All,
        })
    }

    pub fn permits(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(name),
            Self::NoneInCi => false,
        }
    }

    /// The definitions that name a secret that is not permitted.
    pub fn refused<'a>(&'a self, images: &'a [Definition]) -> impl Iterator<Item = &'a Definition> {
        images.iter().filter(|image| named_secrets(image).any(|(.., name)| !self.permits(name)))
    }

    /// Fails with [`Kind::Definition`] if a definition names a secret that is not permitted. The error lists the first
    /// of them, with their places in image.toml.
    pub fn ensure_permitted(&self, images: &[Definition]) -> Result<()> {
        let (mut refused, mut names) = (WrongSecrets::default(), BTreeSet::new());
        for (image, script, name) in images.iter().flat_map(named_secrets) {
            if !self.permits(name) {
                refused.add(image, script, name, &format!("names {name}, which is not permitted"));
                names.insert(name);
            }
        }
        if names.is_empty() {
            return Ok(());
        }
        let mut flags = ShortList::new(MAX_LISTED);
        names.iter().for_each(|name| flags.add(|| format!("--secret {name}")));
        let flags = flags.join(" ");
        let why = match self {
            Self::NoneInCi => {
                "In CI (the environment variable CI is set), oven passes on only the secrets of --secret"
            }
            Self::All | Self::Only(_) => {
                "With --secret, oven passes on only the secrets that this flag names"
            }
        };
        let hint = format!("{why}. If you trust the definition, add {flags}.");
        Err(refused.failure().hint(hint).into())
    }
}

/// The secrets that the scripts of a definition name, each with its script.
fn named_secrets(image: &Definition) -> impl Iterator<Item = (&Definition, &Script, &str)> {
    let scripts = image.runs.iter().chain(&image.tests);
    scripts.flat_map(move |script| script.secrets.iter().map(move |name| (image, script, name.as_str())))
}

/// The first secrets that are wrong, and the number of the others.
#[derive(Default)]
struct WrongSecrets {
    first: Vec<Mistake>,
    more: usize,
}

impl WrongSecrets {
    /// `what` completes a sentence that begins with the place of the secret.
    fn add(&mut self, image: &Definition, script: &Script, name: &str, what: &str) {
        if self.first.len() == MAX_LISTED {
            self.more += 1;
            return;
        }
        let place = image.place_of_script(script, "secrets", Some(name));
        self.first.push(Mistake { message: format!("{place} {what}"), place: Some(place), hint: None });
    }

    fn failure(self) -> Failure {
        Kind::Definition.failure_of(self.first, self.more)
    }
}

/// Collects the secrets, and masks their values in all later reports.
pub fn collect(bake: &Bake<'_>) -> Result<Secrets> {
    let secrets = from_environment(bake.image, |name| std::env::var_os(name))?;
    bake.site.report.mask_secrets(&secrets);
    Ok(secrets)
}

/// Reads the secrets from `environment`. The error lists the first secrets that are missing or invalid, with their
/// places in image.toml.
pub fn from_environment(
    image: &Definition,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<Secrets> {
    let (mut values, mut wrong) = (BTreeMap::new(), WrongSecrets::default());
    for (image, script, name) in named_secrets(image) {
        if values.contains_key(name) {
            continue;
        }
        match check_value(environment(name)) {
            Ok(value) => _ = values.insert(name.to_owned(), value),
            Err(what) => wrong.add(image, script, name, &format!("names {name}, which {what}")),
        }
    }
    if wrong.first.is_empty() {
        return Ok(Secrets::new(values));
    }
    let hint = "Pass secrets in oven's environment: `NAME=… oven bake …`. If you use sudo, add its option \
                --preserve-env.";
    Err(wrong.failure().hint(hint).into())
}

/// Reads the secrets with these names from `environment`, for a step that is not part of a bake. The second value has a
/// clause for each secret that is not permitted, missing or invalid.
pub fn read_named(
    names: &[String],
    permitted: &PermittedSecrets,
    environment: impl Fn(&str) -> Option<OsString>,
) -> (Secrets, Vec<String>) {
    let (mut values, mut missing) = (BTreeMap::new(), Vec::new());
    for name in names {
        let value = match free_name(name) {
            Err(what) => Err(what),
            Ok(()) if !permitted.permits(name) => {
                Err(format!("is not permitted (--secret {name} permits it)"))
            }
            Ok(()) => check_value(environment(name)),
        };
        match value {
            Ok(value) => _ = values.insert(name.clone(), value),
            Err(what) => missing.push(format!("the secret {name} {what}")),
        }
    }
    (Secrets::new(values), missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::Base;
    use crate::config::project::Settings;
    use crate::definition::FILE;
    use crate::identity::fingerprint::Inputs;
    use crate::ids::{Architecture, ImageId, SnapshotId};

    #[test]
    fn the_flag_and_ci_limit_the_secrets() {
        let new = |given: &[&str], ci: Option<&str>| {
            let given: Vec<_> = given.iter().map(|name| (*name).to_owned()).collect();
            PermittedSecrets::new(&given, ci.map(OsStr::new))
        };
        for ci in [None, Some(""), Some("false"), Some("0")] {
            assert_eq!(new(&[], ci).unwrap(), PermittedSecrets::All, "{ci:?}");
        }
        for ci in ["true", "1", "woodpecker"] {
            assert_eq!(new(&[], Some(ci)).unwrap(), PermittedSecrets::NoneInCi, "{ci}");
            assert!(new(&["TOKEN"], Some(ci)).unwrap().permits("TOKEN"));
        }
        assert!(!new(&["TOKEN"], None).unwrap().permits("OTHER"));
        for given in ["TOKEN=hunter2", "hunter2!", ""] {
            let error = new(&[given], None).unwrap_err();
            assert_eq!(Kind::of(&error), Kind::Usage);
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn an_error_lists_few_secrets_and_escapes_names() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("a\nerror: forged");
        std::fs::create_dir(&dir).unwrap();
        let names: String = (0..1000).map(|i| format!("\"S{i}\",")).collect();
        let toml = "name = \"a\"\nfrom = \"ami-0123456789abcdef0\"\n[[run]]\ncommand = [\"true\"]\n";
        std::fs::write(dir.join(FILE), format!("{toml}secrets = [{names}]\n")).unwrap();
        let image = Definition::load(&dir).unwrap();
        let missing = from_environment(&image, |_| None).unwrap_err().to_string();
        assert!(
            missing.contains("image.toml:5: `secrets` of [[run]] names S0, which is not set"),
            "{missing}"
        );
        let error = PermittedSecrets::NoneInCi.ensure_permitted(&[image]).unwrap_err();
        for text in [missing, error.to_string()] {
            assert!(text.contains("a\\nerror: forged/image.toml"), "{text}");
            assert!(text.ends_with("\nand 980 more") && text.lines().count() == 21, "{text}");
        }
        let hint = crate::error::hint_of(&error).unwrap();
        assert!(hint.ends_with(" and 980 more.") && hint.matches("--secret S").count() == 20, "{hint}");
    }

    #[test]
    fn secrets_of_a_record_are_read_by_name_if_permitted() {
        let names = ["TOKEN", "OTHER", "GONE", "AWS_SECRET_ACCESS_KEY"].map(str::to_owned);
        let environment = |name: &str| (name != "GONE").then(|| OsString::from("hunter2"));
        let (secrets, missing) = read_named(&names, &PermittedSecrets::All, environment);
        assert_eq!(secrets.environment(&names).into_keys().collect::<Vec<_>>(), ["OTHER", "TOKEN"]);
        assert_eq!(missing[0], "the secret GONE is not set in oven's environment");
        assert!(missing.len() == 2 && missing[1].starts_with("the secret AWS_SECRET_ACCESS_KEY cannot be"));
        let only = PermittedSecrets::Only(BTreeSet::from(["TOKEN".to_owned()]));
        let (secrets, missing) = read_named(&names[..2], &only, environment);
        assert_eq!(secrets.environment(&names).into_keys().collect::<Vec<_>>(), ["TOKEN"]);
        assert_eq!(missing, ["the secret OTHER is not permitted (--secret OTHER permits it)"]);
        assert!(read_named(&names, &PermittedSecrets::NoneInCi, environment).0.is_empty());
    }

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
                "image.toml:4: `secrets` of [[run]] names TOKEN, which is not set in oven's environment"
            ),
            "{text}"
        );
    }
}
