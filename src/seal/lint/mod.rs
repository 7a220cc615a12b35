//! Checks that an image has no machine-specific data and no leftovers of the bake. [`super::clean`] should have removed
//! both, and these checks find what it missed. They report only what is certainly wrong, because each finding fails the
//! bake.

pub(super) mod bake_period;
pub(super) mod credentials;
mod findings;
#[cfg(test)]
mod tests;

use super::first_boot;
use super::repositories::UncleanRepository;
use super::rules;
use crate::error::Kind;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::provision::context::ProvisionContext;
use anyhow::Result;
use credentials::CredentialBaseline;
use findings::LintFindings;
use oven_distro::Cache;
use rustix::fs::FileType;
use std::collections::BTreeSet;
use std::path::Path;

const RESOLV_CONF: &str = "/etc/resolv.conf";
const RUN: &str = "/run/oven";
const LINK: &str = "a symlink in place of a directory that has to be cleaned; its target was not cleaned";

/// Files in which a proxy or a mirror may be configured. `*` means every file in a directory.
const SETTINGS: [&str; 8] = [
    "/etc/apt/apt.conf",
    "/etc/apt/apt.conf.d/*",
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/*",
    "/etc/dnf/dnf.conf",
    "/etc/environment",
    "/etc/yum.conf",
    "/etc/yum.repos.d/*",
];

/// The state of the image before the bake. Leftovers that the base image already had are not reported.
pub struct LintBaseline {
    resolv_conf: Resolv,
    /// Whether a package copied this machine's name servers to `/etc/resolv.conf`. This is determined before the
    /// definition's scripts run, because changes by scripts are intended.
    has_builders_resolv_conf: bool,
    /// A shim is a file that replaces a file of the image while a step runs. This set has the paths of the shims that
    /// have the same content as the base image's own file at that path.
    own_shims: BTreeSet<String>,
    /// Files of the base image that already name the proxy or the mirror.
    settings: BTreeSet<String>,
    credentials: CredentialBaseline,
    had_run: bool,
}

/// The kind of `/etc/resolv.conf`, and its content.
#[derive(Debug, PartialEq, Eq)]
enum Resolv {
    Nothing,
    Link,
    File(Vec<u8>),
}

impl Resolv {
    fn of(inside: &ImageTree) -> Result<Self> {
        Ok(match inside.kind_of(RESOLV_CONF)? {
            Some(FileType::RegularFile) => Self::File(inside.read(RESOLV_CONF)?.unwrap_or_default()),
            Some(_) => Self::Link,
            None => Self::Nothing,
        })
    }
}

impl LintBaseline {
    pub fn of(inside: &ImageTree, work: &ProvisionContext<'_>) -> Result<Self> {
        let mut own_shims = BTreeSet::new();
        for shim in &work.plan.shims {
            if inside.read_text(&shim.path)? == shim.content {
                own_shims.insert(shim.path.clone());
            }
        }
        Ok(Self {
            resolv_conf: Resolv::of(inside)?,
            has_builders_resolv_conf: false,
            own_shims,
            settings: settings(inside, &needles(work))?.into_iter().collect(),
            credentials: CredentialBaseline::of(inside)?,
            had_run: inside.exists(RUN)?,
        })
    }

    /// Records whether a package copied this machine's name servers to `/etc/resolv.conf`. Other changes are permitted.
    /// For example, systemd-resolved replaces the file. Call this after the packages are installed.
    pub fn record_resolv_conf(&mut self, inside: &ImageTree) -> Result<()> {
        self.compare(inside, &std::fs::read_to_string(RESOLV_CONF).unwrap_or_default())
    }

    fn compare(&mut self, inside: &ImageTree, builders: &str) -> Result<()> {
        let now = Resolv::of(inside)?;
        if now == self.resolv_conf {
            return Ok(());
        }
        if let Resolv::File(now) = now {
            let old = match &self.resolv_conf {
                Resolv::File(old) => String::from_utf8_lossy(old).into_owned(),
                _ => String::new(),
            };
            let now = String::from_utf8_lossy(&now).into_owned();
            self.has_builders_resolv_conf = servers(builders)
                .any(|server| servers(&now).any(|s| s == server) && !servers(&old).any(|s| s == server));
        }
        Ok(())
    }
}

/// Returns the name servers in a resolv.conf, except loopback addresses, which are the same on every machine.
fn servers(resolv_conf: &str) -> impl Iterator<Item = &str> {
    let server = |line: &'_ str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then_some(())
    };
    resolv_conf
        .lines()
        .filter(move |line| server(line).is_some())
        .filter_map(|line| line.split_whitespace().nth(1))
        .filter(|address| !address.starts_with("127.") && *address != "::1")
}

/// Checks the image. `unclean` has the repositories whose history holds removed data. The error lists the first findings.
pub fn lint(
    inside: &ImageTree,
    work: &ProvisionContext<'_>,
    before: &LintBaseline,
    unclean: &[UncleanRepository],
) -> Result<()> {
    let mut findings = LintFindings::new(&work.image.keep, work.secrets);
    find_machine_data(inside, &work.plan.caches, &mut findings)?;
    unclean.iter().for_each(|repository| findings.add(&repository.path, &repository.what));
    findings.sort();
    find_leftovers(inside, work, before, &mut findings)?;
    if !before.credentials.find(inside, &mut findings)? {
        work.report.warn("the bake added so many files that not all were searched for private keys");
    }
    let Some((first, list)) = findings.list() else { return Ok(()) };
    let hint = format!(
        "Remove them in a script, or with `[clean] remove` in image.toml. If every instance should have one of them, \
         accept it in image.toml: [clean] keep = [\"{first}\"]."
    );
    Err(Kind::Step
        .failure(format!(
            "the image contains machine-specific data, credentials or leftovers of the bake:\n    {list}"
        ))
        .hint(hint)
        .into())
}

/// Finds data that is specific to one machine, and files that remain in the package manager's caches.
fn find_machine_data(inside: &ImageTree, caches: &[Cache], findings: &mut LintFindings<'_>) -> Result<()> {
    let machine_id = inside.metadata(rules::MACHINE_ID)?;
    if machine_id.is_some_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_size != 0
    }) {
        findings.add(rules::MACHINE_ID, "not an empty file");
    }
    for (pattern, what) in rules::FILES {
        for (path, kind) in inside.expand(pattern)? {
            if kind != FileType::Directory {
                findings.add(&path, what);
            }
        }
    }
    for path in first_boot::remaining_host_keys(inside)? {
        findings.add(&path, "a private SSH host key, and nothing creates new ones at the first boot");
    }
    if inside.kind_of(rules::SNAKEOIL)?.is_some() {
        findings.add(rules::SNAKEOIL, "a private key, and nothing creates a new one at the first boot");
    }
    rules::visit_histories(inside, &mut |path| {
        findings.add(path, "a history of typed commands");
        Ok(())
    })?;
    let in_cache = |path: &str| format!("a file in the package manager's cache {path}");
    let caches = caches.iter().map(|cache| (cache.path.as_str(), in_cache(&cache.path)));
    let directories = rules::DIRECTORIES.iter().map(|(path, what)| (*path, (*what).to_owned()));
    for (path, what) in directories.chain(caches) {
        if let Some(link) = leads_elsewhere(inside, path)? {
            findings.add(&link, LINK);
        } else if inside.is_directory(path)? {
            inside.walk(path, &mut |path, stat| {
                if findings.is_kept(path) {
                    return Ok(Walk::Past);
                }
                if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                    findings.add(path, &what);
                }
                Ok(Walk::On)
            })?;
        }
    }
    if let Some(link) = leads_elsewhere(inside, rules::LOGS)? {
        findings.add(&link, LINK);
    } else if inside.is_directory(rules::LOGS)? {
        inside.walk(rules::LOGS, &mut |path, stat| {
            let journal = path.starts_with("/var/log/journal/");
            if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size > 0 && !journal
            {
                findings.add(path, "a log");
            }
            Ok(Walk::On)
        })?;
    }
    Ok(())
}

/// If the path leads through a symlink to a directory with content, returns the path of the symlink.
fn leads_elsewhere(inside: &ImageTree, path: &str) -> Result<Option<String>> {
    let ends = path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]);
    for end in ends {
        let so_far = &path[..end];
        let Some(stat) = inside.metadata(so_far)? else { return Ok(None) };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            let has_content = inside.list(path).map(|names| !names.is_empty()).unwrap_or(false);
            return Ok(has_content.then(|| so_far.to_owned()));
        }
    }
    Ok(None)
}

/// Finds files that only the bake needed.
fn find_leftovers(
    inside: &ImageTree,
    work: &ProvisionContext<'_>,
    before: &LintBaseline,
    findings: &mut LintFindings<'_>,
) -> Result<()> {
    for shim in &work.plan.shims {
        if !before.own_shims.contains(&shim.path) && inside.read_text(&shim.path)? == shim.content {
            findings.add(&shim.path, "a file that should exist only during the bake");
        }
    }
    if !before.had_run && inside.exists(RUN)? {
        findings.add(RUN, "a directory that should exist only during the bake");
    }
    // A file that the definition places is not a leftover.
    let placed = |path: &str| {
        let targets = work.image.files.iter().map(|file| file.target.as_str());
        targets.into_iter().any(|target| Path::new(path).starts_with(target.trim_end_matches('/')))
    };
    for path in settings(inside, &needles(work))? {
        if !before.settings.contains(&path) && !placed(&path) {
            findings.add(&path, "it names the proxy or the mirror of oven.toml");
        }
    }
    if before.has_builders_resolv_conf && !placed(RESOLV_CONF) {
        findings.add(RESOLV_CONF, "a package copied this machine's name servers to it");
    }
    Ok(())
}

/// The URLs of the proxy and the mirror, which the image's settings must not contain.
fn needles(work: &ProvisionContext<'_>) -> Vec<String> {
    let network = work.network;
    let all = [&network.proxy, &network.mirror].into_iter().flatten();
    all.map(|text| text.trim_end_matches('/').to_owned()).filter(|text| !text.is_empty()).collect()
}

fn settings(inside: &ImageTree, needles: &[String]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    if needles.is_empty() {
        return Ok(found);
    }
    for pattern in SETTINGS {
        for (path, kind) in inside.expand(pattern)? {
            if kind != FileType::RegularFile {
                continue;
            }
            let text = inside.read_text(&path)?;
            if needles.iter().any(|needle| text.contains(needle)) {
                found.push(path);
            }
        }
    }
    Ok(found)
}
