//! Lists an image's packages, and checks them.

use super::context::ProvisionContext;
use crate::error::Kind;
use crate::report::PackageChanges;
use crate::text::{escape_name, is_unprintable, list_first, match_wildcards};
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
/// The maximum number of characters of a line that an error message shows.
const SHOWN_MAX: usize = 200;

/// An installed package, as the fact `packages` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledPackage {
    pub name: String,
    pub version: String,
    pub architecture: String,
    state: String,
    provides: Vec<String>,
}

/// Parses the output of the fact `packages`. Skips empty lines, and packages that are not installed. Fails if any other
/// line does not describe a package.
pub fn parse(output: &str, expect: &Expect) -> Result<Vec<InstalledPackage>> {
    let has_states = !expect.sound.is_empty() || !expect.absent.is_empty();
    let mut packages = Vec::new();
    for line in rows(output)? {
        let package = parse_row(line, has_states).ok_or_else(|| not_a_row(line, "describe a package"))?;
        if !expect.absent.contains(&package.state) {
            packages.push(package);
        }
    }
    Ok(packages)
}

/// Parses the output of the fact `held`. Skips empty lines. Fails if any other line is not a package's name.
pub fn parse_held(output: &str) -> Result<Vec<String>> {
    let name_of = |line| {
        let name = str::trim(line);
        if is_name(name) { Ok(name.to_owned()) } else { Err(not_a_row(line, "name a package")) }
    };
    rows(output)?.map(name_of).collect()
}

/// Returns the lines that are not empty.
fn rows(output: &str) -> Result<impl Iterator<Item = &str>> {
    if output.lines().nth(PACKAGES_MAX).is_some() {
        return Err(Kind::Step.error(format!("the image reports more than {PACKAGES_MAX} packages")));
    }
    Ok(output.lines().filter(|line| !line.trim().is_empty()))
}

/// Parses a line of the fact `packages`. If `has_states` is true, the line has at least four columns.
fn parse_row(line: &str, has_states: bool) -> Option<InstalledPackage> {
    let columns: Vec<_> = line.split('\t').map(str::trim).collect();
    let (&[name, version, architecture], more) = columns.split_first_chunk()?;
    let state = more.first().copied().unwrap_or_default();
    // A package that is not installed, or only half, may have no version and no architecture.
    let is_row = is_name(name)
        && [version, architecture, state].into_iter().all(is_word)
        && !(has_states && state.is_empty());
    // An example of the column: `libssl3 (= 3.0.1), libcrypto3`.
    let provides = more.get(1).copied().unwrap_or_default().split(',');
    let provides = provides.filter_map(|p| p.split_whitespace().next().map(str::to_owned)).collect();
    let owned = str::to_owned;
    is_row.then(|| InstalledPackage {
        name: owned(name),
        version: owned(version),
        architecture: owned(architecture),
        state: owned(state),
        provides,
    })
}

/// A `:` ends the first word of many messages, such as `warning: …`.
fn is_name(text: &str) -> bool {
    !text.is_empty() && is_word(text) && !text.ends_with(':')
}

fn is_word(text: &str) -> bool {
    !text.contains(|c: char| c.is_whitespace() || is_unprintable(c))
}

fn not_a_row(line: &str, what: &str) -> anyhow::Error {
    let shown: String = line.chars().take(SHOWN_MAX).collect();
    let cut = if shown.len() < line.len() { "…" } else { "" };
    let line = escape_name(&shown);
    let hint = "oven reads only the program's standard output. Find out in the image why the program prints this line. \
                Perhaps a wrapper of the program, or a setting, prints it.";
    Kind::Step.failure(format!("a line of the output does not {what}: `{line}{cut}`")).hint(hint).into()
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
            return Err(Kind::Definition.failure(what).at(&place).hint(hint).into());
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
    fn a_line_that_does_not_describe_a_package_is_an_error_that_shows_it() {
        let long = format!("{}\tx", "long ".repeat(100_000));
        for line in [
            "dpkg-query: warning: parsing file '/var/lib/dpkg/status' near line 7 package 'nomaint':",
            " missing 'Maintainer' field",
            "ERROR: ld.so: object '/x.so' from /etc/ld.so.preload cannot be preloaded: ignored.",
            "warning:\tdatabase\tis\told\t",
            "perl: warning: Setting locale failed.\t\t\tinstalled\t",
            "name and version\t1\tall\tinstalled\t",
            "mawk\t1.3\tamd64",
            "mawk\t1.3\tamd64\t\t",
            "\t1.3\tamd64\tinstalled\t",
            "x\u{1b}[31m\t1.3\tamd64\tinstalled\t",
            &long,
        ] {
            for output in [format!("{line}\n{OUTPUT}"), format!("{OUTPUT}\n{line}")] {
                let error = parse(&output, &expect(&[])).unwrap_err();
                let shown: String = line.chars().take(20).collect();
                let text = error.to_string();
                assert!(text.contains(&*escape_name(&shown)) && text.len() < 1000, "{line}: {text}");
                assert_eq!(Kind::of(&error), Kind::Step);
                assert!(crate::error::hint_of(&error).is_some());
            }
        }
        let blank = format!("\n  \n{}\n\t\n", OUTPUT.replace('\n', "\r\n"));
        assert_eq!(parse(&blank, &expect(&[])).unwrap(), parse(OUTPUT, &expect(&[])).unwrap());
        assert!(parse("mawk\t1.3\tamd64\n", &Expect::default()).is_ok());
    }

    #[test]
    fn a_long_line_is_one_package() {
        // The packages of kernels provide thousands of modules.
        let provides: String = (0..50_000).map(|n| format!("kmod(m{n}.ko), ")).collect();
        let packages = parse(&format!("kernel\t6.1\tx86_64\tinstalled\t{provides}\n"), &expect(&[])).unwrap();
        assert_eq!((packages.len(), packages[0].provides.len()), (1, 50_000));
    }

    #[test]
    fn held_packages_are_names() {
        assert_eq!(parse_held("\nlinux-image\n libc6:i386\n").unwrap(), ["linux-image", "libc6:i386"]);
        for line in ["W: a warning", "awk:", "a\tb", "E: Could not open lock file"] {
            let error = parse_held(&format!("mawk\n{line}\n")).unwrap_err().to_string();
            assert!(error.contains("does not name a package"), "{error}");
        }
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
