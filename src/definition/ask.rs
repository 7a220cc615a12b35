//! `packages`: names, pins, and package files.

use super::Ask;
use super::source::Sources;
use crate::document::Table;
use crate::package;
use std::collections::BTreeMap;

const EXPECTED: &str =
    "an array of packages, such as [\"nginx-light\", \"redis-server=5:7.0.*\", \"./site.deb\"]";

pub fn read(top: &Table, sources: &Sources) -> Vec<Ask> {
    let mut lines = BTreeMap::new();
    let asks = top.strings("packages", EXPECTED).into_iter().filter_map(|at| {
        let ask = top.check("packages", at.line, ask(at.value, sources))?;
        let name = match &ask {
            Ask::Named { name, .. } => name,
            Ask::File { package, .. } => &package.name,
        };
        match lines.insert(name.clone(), at.line) {
            None => Some(ask),
            Some(first) => top.wrong(
                "packages",
                at.line,
                format!("asks for {name} twice (first on line {first}): leave one out"),
            ),
        }
    });
    asks.collect()
}

fn ask(spelt: &str, sources: &Sources) -> Result<Ask, String> {
    let file = spelt.starts_with("./")
        || spelt.starts_with("../")
        || spelt.contains('/') && (spelt.ends_with(".deb") || spelt.ends_with(".rpm"));
    if file {
        let source = sources.file(spelt)?.path;
        let package = package::open(&source).map_err(|e| format!("names {spelt:?}: {e:#}"))?;
        return Ok(Ask::File { source, package });
    }
    if spelt.ends_with(".deb") || spelt.ends_with(".rpm") {
        return Err(format!("has {spelt:?}: a package file beside image.toml is spelt \"./{spelt}\""));
    }
    let (name, version) = match spelt.split_once('=') {
        Some((name, version)) => (name, Some(version)),
        None => (spelt, None),
    };
    check_name(spelt, name)?;
    if let Some(version) = version {
        check_version(spelt, version)?;
    }
    Ok(Ask::Named { name: name.into(), version: version.map(Into::into) })
}

fn check_name(spelt: &str, name: &str) -> Result<(), String> {
    // A name and, for multiarch, `:` and an architecture.
    let (bare, architecture) = name.split_once(':').map_or((name, None), |(bare, arch)| (bare, Some(arch)));
    let allowed = |c: char| c.is_ascii_alphanumeric() || "+-._".contains(c);
    if spelt.is_empty() {
        return Err(format!("has an empty string: it should be {EXPECTED}"));
    }
    if name.is_empty() {
        return Err(format!("has {spelt:?}: a name goes before `=`"));
    }
    if name.starts_with('-') {
        return Err(format!(
            "has {spelt:?}: a package's name does not begin with `-`, options are not taken"
        ));
    }
    if name.contains(|c: char| c.is_whitespace() || c == ',') {
        return Err(format!("has {spelt:?}: each package is a string of its own, without spaces"));
    }
    if name.contains(['<', '>', '~', '!']) || spelt.contains("==") {
        return Err(format!("has {spelt:?}: a version is pinned as \"name=1.2.3\" or \"name=1.2.*\""));
    }
    if name.contains('/') {
        return Err(format!("has {spelt:?}: a name has no `/` (a package file is spelt \"./name.deb\")"));
    }
    if let Some(bad) = bare.chars().find(|c| !allowed(*c)) {
        return Err(format!("has {spelt:?}: a package's name cannot have the character {bad:?}"));
    }
    if !bare.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(format!("has {spelt:?}: a package's name begins with a letter or digit"));
    }
    // apt reads `name-` as "remove name".
    if bare.ends_with('-') {
        return Err(format!("has {spelt:?}: a package's name does not end with `-`, oven removes none"));
    }
    let good = |arch: &str| {
        arch.starts_with(|c: char| c.is_ascii_alphanumeric())
            && arch.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    match architecture {
        Some(arch) if !good(arch) => {
            Err(format!("has {spelt:?}: after `:` goes an architecture, such as \"libc6:i386\""))
        }
        _ => Ok(()),
    }
}

fn check_version(spelt: &str, version: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".+-~:^_*".contains(c);
    if version.is_empty() {
        return Err(format!("has {spelt:?}: a version goes behind `=`, such as \"1.2.3\" or \"1.2.*\""));
    }
    if let Some(bad) = version.chars().find(|c| !allowed(*c)) {
        return Err(format!("has {spelt:?}: a version cannot have the character {bad:?}"));
    }
    if !version.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '*') {
        return Err(format!("has {spelt:?}: a version begins with a letter or digit"));
    }
    Ok(())
}
