//! Reads `packages`: names with or without a version, groups, and package files on this machine or by URL.

use super::PackageRequest;
use super::paths::Sources;
use crate::config::project::url;
use crate::config::toml_reader::{Element, Table, until_stopped};
use std::collections::BTreeMap;

/// The maximal number of entries. An installed system with a desktop has about 3000 packages.
const MAX_PACKAGES: usize = 10_000;

pub fn read(top: &Table, sources: &Sources) -> Vec<PackageRequest> {
    let mut lines = BTreeMap::new();
    let elements = top.elements("packages");
    if let Some(first) = elements.get(MAX_PACKAGES) {
        let line = match first {
            Element::Text(at) => at.line,
            Element::Table(table) => table.line,
        };
        let count = elements.len();
        let what = format!("has {count} entries, but at most {MAX_PACKAGES} are allowed: remove the others");
        top.wrong::<()>("packages", line, what);
    }
    // Each further package file would exceed the limit, too.
    let elements = until_stopped(elements.into_iter().take(MAX_PACKAGES))
        .take_while(|_| sources.budget.exceeded_by_packages().is_none());
    let asks = elements.filter_map(|element| {
        let (ask, line) = match element {
            Element::Text(at) => (top.check("packages", at.line, ask(at.value, sources))?, at.line),
            Element::Table(table) => (by_url(&table)?, table.line),
        };
        let name = match &ask {
            PackageRequest::Named { name, .. } => name.clone(),
            PackageRequest::Group { name } => format!("@{name}"),
            PackageRequest::File { package, .. } => package.name.clone(),
            PackageRequest::Url { url, .. } => url.clone(),
        };
        match lines.insert(name.clone(), line) {
            None => Some(ask),
            Some(first) => {
                top.wrong("packages", line, format!("has {name} twice (first on line {first}): remove one"))
            }
        }
    });
    asks.collect()
}

/// Reads `{ url = "https://…", sha256 = "…" }`. A file with another digest is never installed.
fn by_url(table: &Table) -> Option<PackageRequest> {
    let url = table.string("url").and_then(|at| table.check("url", at.line, package_url(at.value)));
    let sha256 = table.string("sha256").and_then(|at| {
        let good = at.value.len() == 64 && at.value.bytes().all(|b| b.is_ascii_hexdigit());
        if good { Some(at.value.to_ascii_lowercase()) } else { table.unexpected("sha256", &at) }
    });
    Some(PackageRequest::Url { url: url?, sha256: sha256?, file: None })
}

/// Checks a URL. The URL must not contain a user name or a password, because oven writes URLs to logs.
pub fn package_url(text: &str) -> Result<String, String> {
    let good = url(text, &["http", "https"])?;
    let host = good.split("://").nth(1).and_then(|rest| rest.split('/').next());
    match host {
        Some(host) if host.contains('@') => {
            Err("contains a user name or a password, which would appear in logs: remove it".into())
        }
        _ => Ok(good),
    }
}

fn ask(spelt: &str, sources: &Sources) -> Result<PackageRequest, String> {
    if spelt.contains("://") {
        return Err(format!(
            "has {spelt:?}: write a package from a URL as {{ url = \"…\", sha256 = \"…\" }}"
        ));
    }
    let file = spelt.starts_with('/')
        || spelt.starts_with("./")
        || spelt.starts_with("../")
        || spelt.contains('/') && (spelt.ends_with(".deb") || spelt.ends_with(".rpm"));
    if file {
        let source = sources.file(spelt)?.path;
        let package = sources.budget.package(sources.open(spelt, &source)?);
        let package = package.map_err(|e| match sources.budget.exceeded_by_packages() {
            Some(limit) => format!("names {spelt:?}, but {limit}"),
            None => format!("names {spelt:?}: {e:#}"),
        })?;
        return Ok(PackageRequest::File { source, package });
    }
    if let Some(name) = spelt.strip_prefix('@') {
        check_group(spelt, name)?;
        return Ok(PackageRequest::Group { name: name.into() });
    }
    if spelt.ends_with(".deb") || spelt.ends_with(".rpm") {
        return Err(format!(
            "has {spelt:?}: write a package file in the definition's directory as \"./{spelt}\""
        ));
    }
    let split = |text: &str, separator: char| match text.split_once(separator) {
        Some((before, after)) => (before.to_owned(), Some(after.to_owned())),
        None => (text.to_owned(), None),
    };
    let (name, version) = split(spelt, '=');
    let (name, suite) = split(&name, '/');
    check_name(spelt, &name)?;
    if let Some(suite) = &suite {
        check_suite(spelt, suite)?;
    }
    if let Some(version) = &version {
        check_version(spelt, version)?;
    }
    Ok(PackageRequest::Named { name, version, suite })
}

/// Checks a group's name. dnf also accepts a group's title, which can have spaces, and the name of an environment
/// group, which begins with `^`.
fn check_group(spelt: &str, name: &str) -> Result<(), String> {
    let rest = name.strip_prefix('^').unwrap_or(name);
    let allowed = |c: char| c.is_ascii_alphanumeric() || "+-._:() ".contains(c);
    if let Some(bad) = rest.chars().find(|c| !allowed(*c)) {
        return Err(format!("has {spelt:?}: a group name cannot contain the character {bad:?}"));
    }
    if !rest.starts_with(|c: char| c.is_ascii_alphanumeric()) || rest.ends_with(' ') {
        return Err(format!("has {spelt:?}: write a group name after `@`, such as \"@development-tools\""));
    }
    Ok(())
}

pub fn check_name(spelt: &str, name: &str) -> Result<(), String> {
    // On a multiarch system, the name can end with `:` and an architecture.
    let (bare, architecture) = name.split_once(':').map_or((name, None), |(bare, arch)| (bare, Some(arch)));
    let allowed = |c: char| c.is_ascii_alphanumeric() || "+-._".contains(c);
    if spelt.is_empty() {
        return Err("has an empty string: write a package name, such as \"nginx-light\"".into());
    }
    if name.is_empty() {
        return Err(format!("has {spelt:?}: write a package name before `=` or `/`"));
    }
    if name.starts_with('-') {
        return Err(format!(
            "has {spelt:?}: a package name cannot begin with `-`, because the package manager would read it as an \
             option"
        ));
    }
    if name.contains(|c: char| c.is_whitespace() || c == ',') {
        return Err(format!("has {spelt:?}: write each package as a separate string, without spaces"));
    }
    if name.contains(['<', '>', '~', '!']) || spelt.contains("==") {
        return Err(format!("has {spelt:?}: pin a version as \"name=1.2.3\" or \"name=1.2.*\""));
    }
    if name.contains('/') {
        return Err(format!(
            "has {spelt:?}: a package name cannot contain `/` (write a package file as \"./name.deb\")"
        ));
    }
    if let Some(bad) = bare.chars().find(|c| !allowed(*c)) {
        return Err(format!("has {spelt:?}: a package name cannot contain the character {bad:?}"));
    }
    if !bare.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(format!("has {spelt:?}: a package name must begin with a letter or a digit"));
    }
    if bare.ends_with('-') {
        return Err(format!(
            "has {spelt:?}: a package name cannot end with `-`, because apt reads a trailing `-` as \"remove\"; oven \
             cannot remove packages"
        ));
    }
    let good = |arch: &str| {
        arch.starts_with(|c: char| c.is_ascii_alphanumeric())
            && arch.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    match architecture {
        Some(arch) if !good(arch) => {
            Err(format!("has {spelt:?}: write an architecture after `:`, such as \"libc6:i386\""))
        }
        _ => Ok(()),
    }
}

/// Checks the suite of a package. apt accepts no suite with a `/` here.
fn check_suite(spelt: &str, suite: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._+~-".contains(c);
    if let Some(bad) = suite.chars().find(|c| !allowed(*c)) {
        return Err(format!("has {spelt:?}: a suite cannot contain the character {bad:?}"));
    }
    if !suite.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Err(format!(
            "has {spelt:?}: write a suite after `/`, such as \"golang-go/bookworm-backports\", or a package file as \
             \"./name.deb\""
        ));
    }
    Ok(())
}

fn check_version(spelt: &str, version: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".+-~:^_*".contains(c);
    if version.is_empty() {
        return Err(format!("has {spelt:?}: write a version after `=`, such as \"1.2.3\" or \"1.2.*\""));
    }
    if let Some(bad) = version.chars().find(|c| !allowed(*c)) {
        return Err(format!("has {spelt:?}: a version cannot contain the character {bad:?}"));
    }
    if !version.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '*') {
        return Err(format!("has {spelt:?}: a version must begin with a letter or a digit"));
    }
    Ok(())
}
