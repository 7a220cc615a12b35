//! Lists an image's packages, and checks them.

use super::context::ProvisionContext;
use crate::error::Kind;
use crate::report::PackageChanges;
use crate::text::{escape_name, list_first, match_wildcards};
use anyhow::Result;
use oven_distro::{Expect, Wanted};
use std::collections::BTreeMap;

/// The name of the fact that lists the installed packages. A fact is a command of the plan whose output describes the
/// image.
pub const FACT: &str = "packages";
/// The name of the fact that lists the held packages. Upgrades do not change held packages.
pub const HELD: &str = "held";
/// The maximum number of packages. Debian has fewer packages in total. Without this limit, a faulty image could fill
/// this machine's memory.
const PACKAGES_MAX: usize = 100_000;
/// The maximum number of packages that an error message names.
const NAMED_MAX: usize = 10;

/// An installed package, as the fact `packages` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledPackage {
    pub name: String,
    pub version: String,
    pub architecture: String,
    state: String,
    provides: Vec<String>,
}

/// Parses the output of the fact `packages`. Skips packages that are not installed.
pub fn parse(output: &str, expect: &Expect) -> Result<Vec<InstalledPackage>> {
    if output.lines().nth(PACKAGES_MAX).is_some() {
        return Err(Kind::Step.error(format!("the image reports more than {PACKAGES_MAX} packages")));
    }
    let package_of = |line: &str| {
        let mut columns = line.split('\t');
        let mut next = || columns.next().unwrap_or_default().trim().to_owned();
        let (name, version, architecture, state) = (next(), next(), next(), next());
        // An example of the field: `libssl3 (= 3.0.1), libcrypto3`.
        let provides =
            next().split(',').filter_map(|p| p.split_whitespace().next().map(str::to_owned)).collect();
        InstalledPackage { name, version, architecture, state, provides }
    };
    let lines = output.lines().filter(|line| !line.trim().is_empty());
    Ok(lines.map(package_of).filter(|package| !expect.absent.contains(&package.state)).collect())
}

/// Returns the list that is stored with the image: name, version and architecture, sorted.
pub fn document(packages: &[InstalledPackage]) -> String {
    let mut lines: Vec<_> =
        packages.iter().map(|p| format!("{}\t{}\t{}\n", p.name, p.version, p.architecture)).collect();
    lines.sort_unstable();
    lines.concat()
}

/// Fails if a package is in a wrong state. `where_` is the start of the error message.
pub fn ensure_sound(packages: &[InstalledPackage], expect: &Expect, where_: &str) -> Result<()> {
    if expect.sound.is_empty() {
        return Ok(());
    }
    let broken = packages.iter().filter(|p| !expect.sound.contains(&p.state));
    let broken: Vec<_> = broken.map(|p| escape_name(&format!("`{}` is {}", p.name, p.state))).collect();
    if broken.is_empty() {
        return Ok(());
    }
    Err(Kind::Step.error(format!("{where_}: {}", list_first(&broken, NAMED_MAX, ", "))))
}

/// Reports the base image's held packages, which no upgrade changes. Fails if the definition requests another version
/// of a held package.
pub fn ensure_not_held(
    held: &[String],
    packages: &[InstalledPackage],
    work: &ProvisionContext<'_>,
) -> Result<()> {
    if held.is_empty() {
        return Ok(());
    }
    work.report.note(format!(
        "the base image holds these packages, so they are not upgraded: {}",
        list_first(held, NAMED_MAX, ", ")
    ));
    for wanted in &work.plan.expect.packages {
        let Some(version) = &wanted.version else { continue };
        // dpkg adds the architecture to some names, as in `libc6:amd64`.
        let is_held = held.iter().any(|held| held.split(':').next() == Some(&wanted.name));
        let Some(has) = packages.iter().find(|package| package.name == wanted.name).filter(|_| is_held)
        else {
            continue;
        };
        if !matches_version(version, &has.version) {
            let place = work.image.place_of_package(Some(&wanted.name));
            let what = format!(
                "{place} requests `{}={version}`, but the base image holds the package at {}",
                wanted.name, has.version
            );
            let hint = "A held package keeps its version. Release the hold in the base image, or remove the package from \
                        `packages`.";
            return Err(Kind::Definition.failure(what).hint(hint).into());
        }
    }
    Ok(())
}

/// Fails if a requested package is missing or has another version.
pub fn ensure_installed(packages: &[InstalledPackage], expect: &Expect) -> Result<()> {
    let missing: Vec<_> = expect.packages.iter().filter_map(|wanted| lacks(packages, wanted)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Kind::Step.error(format!(
        "image.toml requests packages that are not installed: {}",
        list_first(&missing, NAMED_MAX, ", ")
    )))
}

fn lacks(packages: &[InstalledPackage], wanted: &Wanted) -> Option<String> {
    let spelt = |version: &str| format!("`{}{version}`", wanted.name);
    let fits = |p: &&InstalledPackage| {
        let architecture = wanted.architecture.as_deref();
        // A package for all architectures matches any architecture.
        architecture
            .is_none_or(|a| a == p.architecture || ["all", "noarch"].contains(&p.architecture.as_str()))
    };
    let named: Vec<_> = packages.iter().filter(|p| p.name == wanted.name).filter(fits).collect();
    let Some(version) = &wanted.version else {
        let provided = || packages.iter().filter(fits).any(|p| p.provides.contains(&wanted.name));
        return (named.is_empty() && !provided()).then(|| spelt(""));
    };
    if named.iter().any(|p| matches_version(version, &p.version)) {
        return None;
    }
    let have = named.first().map(|p| format!(" ({} is installed)", p.version)).unwrap_or_default();
    Some(format!("{}{have}", spelt(&format!("={version}"))))
}

/// Returns whether a version matches a pattern with `*`. Ignores case, as apt does.
fn matches_version(pattern: &str, version: &str) -> bool {
    match_wildcards(&pattern.to_ascii_lowercase(), &version.to_ascii_lowercase()).is_some()
}

/// Returns the packages that were installed, changed or removed.
pub fn difference(before: &[InstalledPackage], after: &[InstalledPackage]) -> PackageChanges {
    let versions = |packages: &[InstalledPackage]| -> BTreeMap<(String, String), String> {
        packages.iter().map(|p| ((p.name.clone(), p.architecture.clone()), p.version.clone())).collect()
    };
    let (before, after) = (versions(before), versions(after));
    let mut changes = PackageChanges::default();
    for (key, version) in &after {
        match before.get(key) {
            None => changes.installed.push(escape_name(&format!("{} {version}", key.0))),
            Some(old) if old != version => {
                changes.changed.push(escape_name(&format!("{} {old} -> {version}", key.0)));
            }
            Some(_) => {}
        }
    }
    let removed = before.iter().filter(|(key, _)| !after.contains_key(*key));
    changes.removed = removed.map(|(key, version)| escape_name(&format!("{} {version}", key.0))).collect();
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expect(packages: &[(&str, Option<&str>, Option<&str>)]) -> Expect {
        let wanted = |(name, architecture, version): &(&str, Option<&str>, Option<&str>)| Wanted {
            name: (*name).to_owned(),
            architecture: architecture.map(str::to_owned),
            version: version.map(str::to_owned),
        };
        Expect {
            sound: vec!["installed".into()],
            absent: vec!["config-files".into()],
            packages: packages.iter().map(wanted).collect(),
        }
    }

    const OUTPUT: &str = "redis-server\t5:7.0.15-1\tamd64\tinstalled\t\n\
        gone\t1\tall\tconfig-files\t\n\
        mawk\t1.3\tamd64\tinstalled\tawk, thing (= 2)\n";

    #[test]
    fn what_is_there_and_what_is_not() {
        let there = |asked: &[(&str, Option<&str>, Option<&str>)]| {
            let expect = expect(asked);
            ensure_installed(&parse(OUTPUT, &expect).unwrap(), &expect).map_err(|e| format!("{e:#}"))
        };
        assert!(
            there(&[("redis-server", None, Some("5:7.0.*")), ("awk", None, None), ("thing", None, None)])
                .is_ok()
        );
        assert!(there(&[("redis-server", Some("amd64"), Some("5:7.0.15-1"))]).is_ok());
        let error = there(&[("redis-server", None, Some("5:6.*")), ("gone", None, None)]).unwrap_err();
        assert!(error.contains("`redis-server=5:6.*` (5:7.0.15-1 is installed), `gone`"), "{error}");
        assert!(there(&[("redis-server", Some("arm64"), None)]).is_err());
        assert!(there(&[("awk", None, Some("1*"))]).is_err(), "what is provided has no version");
    }

    #[test]
    fn a_half_configured_package_is_named() {
        let expect = expect(&[]);
        assert!(ensure_sound(&parse(OUTPUT, &expect).unwrap(), &expect, "the base image").is_ok());
        let packages = parse("x\t1\tall\thalf-configured\n", &expect).unwrap();
        let error = format!("{:#}", ensure_sound(&packages, &expect, "the base image").unwrap_err());
        assert_eq!(error, "the base image: `x` is half-configured");
        assert!(
            ensure_sound(&packages, &Expect::default(), "").is_ok(),
            "without a list of sound states every state is right"
        );
    }

    #[test]
    fn the_document_has_three_columns() {
        let packages = parse(OUTPUT, &expect(&[])).unwrap();
        assert!(parse(&"a\n".repeat(PACKAGES_MAX + 1), &expect(&[])).is_err());
        assert_eq!(document(&packages), "mawk\t1.3\tamd64\nredis-server\t5:7.0.15-1\tamd64\n");
    }

    #[test]
    fn a_difference_is_counted() {
        let of = |text: &str| parse(text, &Expect::default()).unwrap();
        let (before, after) = (of("a\t1\tx\nb\t1\tx\nc\t1\tx\n"), of("a\t2\tx\nb\t1\tx\nd\t1\tx\ne\t1\tx\n"));
        let changes = difference(&before, &after);
        assert_eq!(changes.counts().unwrap(), "2 installed, 1 changed, 1 removed");
        assert_eq!(changes.installed, ["d 1", "e 1"]);
        assert_eq!((changes.changed, changes.removed), (vec!["a 1 -> 2".into()], vec!["c 1".into()]));
        assert_eq!(difference(&before, &before), PackageChanges::default());
    }
}
