//! A project's settings. They are read from the `oven.toml` in the definition's directory, or else in the nearest
//! directory above that has one. Environment variables override the file, and flags override both.

pub mod keys;
#[cfg(test)]
mod tests;

use super::overrides::Overrides;
use crate::config::toml_reader;
use crate::config::toml_reader::Table;
use crate::config::within::resolve_within;
use crate::error::Kind;
use crate::sys::fds::{GIT, PathRefusal};
use crate::sys::state_files::foreign_owner;
use crate::text::escape_name;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The file's name.
pub const FILE: &str = "oven.toml";
const LOCAL: &str = "local";
const CERTIFICATES: &str = "it must be a file with certificates";
/// EC2.
pub const AWS: &str = "aws";
const CLOUDS: &[&str] = if cfg!(feature = "aws") { &[AWS, LOCAL] } else { &[LOCAL] };
/// The values of the setting `disks`.
const DISKS: &[(&str, Strategy)] = &[("attached", Strategy::Attached), ("direct", Strategy::Direct)];
/// The default of `cache_gib`. The used blocks of a usual base image have 1 to 2 GiB. So the cache holds about a dozen
/// images, and is much smaller than a builder's disk.
const CACHE_GIB: u64 = 20;
/// The maximum of `cache_gib`: the size of EBS's largest volume. A larger number is probably a mistake.
const CACHE_MOST: u64 = 64 << 10;

/// The maximum of `memory_gib`. A larger number is probably a mistake.
const MEMORY_MOST: u64 = 64 << 10;
/// The default of `pids`. Package managers and compilers need a few hundred.
const PIDS: u64 = 4096;
/// The minimum of `pids`. With fewer processes, package managers may fail. The kernel cannot limit the numbers of
/// processes below 301.
const PIDS_LEAST: u64 = 512;
/// The maximum of `pids`, which is that of the kernel's own limit.
const PIDS_MOST: u64 = 1 << 22;

/// How a bake accesses its disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Strategy {
    /// A volume is created and attached to this machine.
    #[default]
    Attached,
    /// No volume is created. Blocks are read and written with the cloud's block API.
    Direct,
}

impl Strategy {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Direct => "direct",
        }
    }
}

/// Network settings for fetch steps, which are the steps that download packages. These settings do not stay in the
/// image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkSettings {
    /// A URL, such as `http://proxy.example:3128`.
    pub proxy: Option<String>,
    /// Hosts that are reached without the proxy, separated by commas.
    pub no_proxy: Option<String>,
    /// A file on this machine with certificates (PEM) that are trusted in addition to the image's own.
    pub ca_file: Option<PathBuf>,
    /// The URL of the mirror that replaces the image's package archive while packages are fetched.
    pub mirror: Option<String>,
}

impl NetworkSettings {
    /// Checks files that are outside the checkout of oven.toml, which were not examined when the settings were read.
    /// Errors: [`Kind::Definition`].
    pub fn check(&self) -> Result<()> {
        let Some(file) = &self.ca_file else { return Ok(()) };
        let wrong = |what: String| {
            Kind::Definition
                .error(format!("{FILE}: `ca_file` of [network] names {}, {what}", escape_name(file)))
        };
        let metadata = file.metadata().map_err(|e| wrong(format!("which cannot be read: {e}")))?;
        match metadata.is_file() {
            true => Ok(()),
            false => Err(wrong(format!("which is {}: {CERTIFICATES}", toml_reader::kind_of(&metadata)))),
        }
    }
}

/// `[limits]`: the limits of each step. A step is one command that runs in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepLimits {
    /// `None` means half of the machine's memory, but at least 1 GiB.
    pub memory_gib: Option<u64>,
    /// The number of processes and threads.
    pub pids: u64,
}

impl Default for StepLimits {
    fn default() -> Self {
        Self { memory_gib: None, pids: PIDS }
    }
}

/// Settings for every image of a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The oven.toml that was read, if there is one.
    pub file: Option<PathBuf>,
    /// The cloud where images are baked: one of `CLOUDS`.
    pub cloud: String,
    pub region: Option<String>,
    /// The directory of the local region, relative to the working directory.
    pub region_dir: Option<PathBuf>,
    /// The builder's instance id. It is needed if the metadata service is not reachable.
    pub instance_id: Option<String>,
    /// The builder's availability zone. It is needed if the metadata service is not reachable.
    pub zone: Option<String>,
    /// `None` if it is not set. [`Settings::disks`] applies the default.
    pub disks: Option<Strategy>,
    /// The maximal size of the cache for blocks of base images, in GiB.
    pub cache_gib: u64,
    pub network: NetworkSettings,
    pub limits: StepLimits,
}

impl Default for Settings {
    fn default() -> Self {
        let network = NetworkSettings::default();
        Self {
            file: None,
            cloud: LOCAL.into(),
            region: None,
            region_dir: None,
            instance_id: None,
            zone: None,
            disks: None,
            cache_gib: CACHE_GIB,
            network,
            limits: StepLimits::default(),
        }
    }
}

impl Settings {
    /// How a bake accesses its disk.
    pub fn disks(&self) -> Strategy {
        self.disks.unwrap_or_default()
    }

    /// Returns the settings for a directory. They are read from the oven.toml in this directory, or else in the nearest
    /// directory above that has one. If there is no oven.toml, the defaults apply.
    pub fn for_definition(dir: &Path) -> Result<Self> {
        match find(dir)? {
            Some(file) => Self::load(&file),
            None => Ok(Self::default()),
        }
    }

    /// The settings for a definition or a directory, overridden by the command line and the environment.
    pub fn resolve(dir: &Path, overrides: &Overrides) -> Result<Self> {
        Self::for_definition(dir)?.merge(overrides)
    }

    /// Reads an oven.toml. An error lists every mistake, each with file, line and key.
    pub fn load(file: &Path) -> Result<Self> {
        let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = std::fs::canonicalize(dir)
            .map_err(|e| Kind::Definition.error(format!("{}: cannot be read: {e}", escape_name(file))))?;
        let text = toml_reader::read_text(file, checkout(&dir))?;
        toml_reader::read(file, &text, &keys::OVEN_TOML, |top| Self::read(file, top))
    }

    fn read(file: &Path, top: &Table) -> Self {
        let dir = file.parent().unwrap_or(Path::new("."));
        let cloud = top.string("cloud");
        let cloud = cloud.and_then(|at| top.check("cloud", at.line, known_cloud(at.value)));
        let region = top.string("region");
        let region = region.and_then(|at| top.check("region", at.line, region_name(at.value)));
        let region_dir = top.string("region_dir");
        let region_dir = region_dir.and_then(|at| top.check("region_dir", at.line, path(dir, at.value)));
        let instance_id = top.string("instance_id");
        let instance_id = instance_id.and_then(|at| top.check("instance_id", at.line, instance(at.value)));
        let zone = top.string("zone");
        let zone = zone.and_then(|at| top.check("zone", at.line, zone_name(at.value)));
        let disks = top.string("disks");
        let disks = disks.and_then(|at| top.check("disks", at.line, strategy(at.value)));
        let (network, limits) = (top.table("network"), top.table("limits"));
        Self {
            file: Some(file.to_owned()),
            cloud: cloud.unwrap_or_else(|| LOCAL.into()),
            region,
            region_dir,
            instance_id,
            zone,
            disks,
            cache_gib: top.number("cache_gib"),
            network: network.map(|table| network_settings(&table, dir)).unwrap_or_default(),
            limits: limits.map(|table| read_limits(&table)).unwrap_or_default(),
        }
    }

    /// These settings, overridden by the command line and the environment.
    pub fn merge(mut self, overrides: &Overrides) -> Result<Self> {
        let usage = |flag: &str, what: String| Kind::Usage.error(format!("`{flag}` {what}"));
        if let Some(cloud) = &overrides.cloud {
            self.cloud = known_cloud(cloud).map_err(|what| usage("--cloud", what))?;
        }
        if let Some(region) = &overrides.region {
            self.region = Some(region_name(region).map_err(|what| usage("--region", what))?);
        }
        if let Some(id) = &overrides.instance_id {
            self.instance_id = Some(instance(id).map_err(|what| usage("--instance-id", what))?);
        }
        if let Some(zone) = &overrides.zone {
            self.zone = Some(zone_name(zone).map_err(|what| usage("--zone", what))?);
        }
        if let Some(disks) = &overrides.disks {
            self.disks = Some(strategy(disks).map_err(|what| usage("--disks", what))?);
        }
        if let Some(dir) = &overrides.region_dir {
            if dir.as_os_str().is_empty() {
                return Err(usage("--region-dir", "is empty: it should be a directory".to_owned()));
            }
            self.region_dir = Some(dir.clone());
        }
        Ok(self)
    }
}

/// Returns whether a directory is the top of a git checkout. In a worktree and in a submodule, `.git` is a file.
pub(crate) fn is_checkout(dir: &Path) -> bool {
    dir.join(GIT).symlink_metadata().is_ok()
}

/// The directory that an oven.toml in `dir` must not leave by a symbolic link: the git checkout that contains `dir`, or
/// else `dir` itself.
fn checkout(dir: &Path) -> &Path {
    dir.ancestors().find(|dir| is_checkout(dir)).unwrap_or(dir)
}

/// Finds the oven.toml in a directory, or else in the nearest directory above it. Returns the file's canonical path.
fn find(dir: &Path) -> Result<Option<PathBuf>> {
    let real = std::fs::canonicalize(dir)
        .map_err(|e| Kind::Definition.failure(format!("{}: cannot be read: {e}", escape_name(dir))))
        .with_context(|| format!("looking for {FILE}"))?;
    let Some(file) = real.ancestors().map(|dir| dir.join(FILE)).find(|file| file.symlink_metadata().is_ok())
    else {
        return Ok(None);
    };
    // A directory above the definition, such as /tmp, may be writable for other users. If oven used their oven.toml,
    // they could choose the region directory and the mirror for root.
    let owner_of_dir = real.metadata().ok().map(|metadata| metadata.uid());
    let dir = file.parent().unwrap_or(Path::new("/"));
    // `load` refuses a link out of the checkout. Its target is not looked at.
    let target = match resolve_within(dir, Path::new(FILE), checkout(dir)) {
        Err(PathRefusal::Outside(_)) => None,
        _ => Some(file.metadata()),
    };
    for metadata in std::iter::once(file.symlink_metadata()).chain(target) {
        let metadata = metadata
            .map_err(|e| Kind::Definition.error(format!("{}: cannot be read: {e}", escape_name(&file))))?;
        if let Some(owned) = foreign_owner(&metadata).filter(|owner| Some(*owner) != owner_of_dir) {
            return Err(Kind::Definition
                .failure(format!("{} belongs to user {owned}, who is neither you nor root", escape_name(&file)))
                .hint(
                    "oven does not use the settings of other users. Remove the file, or make it yours with chown.",
                )
                .into());
        }
    }
    Ok(Some(file))
}

fn read_limits(table: &Table) -> StepLimits {
    StepLimits { memory_gib: table.integer("memory_gib"), pids: table.number("pids") }
}

fn network_settings(table: &Table, dir: &Path) -> NetworkSettings {
    let text = |key: &str, check: &dyn Fn(&str) -> Result<String, String>| {
        let at = table.string(key)?;
        table.check(key, at.line, check(at.value))
    };
    let address = |key: &str, schemes: &[&str]| {
        let expected = table.key(key).expected();
        text(key, &|value| url(value, schemes).map_err(|what| format!("{what}: it should be {expected}")))
    };
    NetworkSettings {
        proxy: address("proxy", &["http", "https", "socks5h"]),
        no_proxy: text("no_proxy", &hosts),
        mirror: address("mirror", &["http", "https"]).and_then(|mirror| {
            // Commands and files of steps contain the mirror, and so do logs.
            let has_user = mirror.split('/').nth(2).is_some_and(|host| host.contains('@'));
            let what = "contains a user name or a password, which would appear in logs: remove it";
            let mirror = if has_user { Err(what.to_owned()) } else { Ok(mirror) };
            table.check("mirror", table.string("mirror")?.line, mirror)
        }),
        ca_file: table.string("ca_file").and_then(|at| {
            let file = path(dir, at.value).and_then(|file| ca_file(dir, at.value, &file).map(|()| file));
            table.check("ca_file", at.line, file)
        }),
    }
}

/// Checks that `ca_file` is a file. A file outside the checkout is checked by a bake ([`NetworkSettings::check`]), and
/// not here: oven.toml may come from a stranger, so `oven plan` must not tell which files this machine has.
fn ca_file(dir: &Path, spelt: &str, file: &Path) -> Result<(), String> {
    let unread =
        |e: std::io::Error| format!("names {spelt:?}, but {} cannot be read: {e}", escape_name(file));
    let dir = dir.canonicalize().map_err(unread)?;
    match resolve_within(&dir, Path::new(spelt), checkout(&dir)) {
        Err(PathRefusal::Outside(_)) => Ok(()),
        Err(PathRefusal::Io(error)) => Err(unread(error)),
        Err(refused) => Err(format!("is {spelt:?}, which {refused}")),
        Ok(real) => match real.metadata().map_err(unread)? {
            metadata if metadata.is_file() => Ok(()),
            metadata => Err(format!("is {}: {CERTIFICATES}", toml_reader::kind_of(&metadata))),
        },
    }
}

fn known_cloud(name: &str) -> Result<String, String> {
    if CLOUDS.contains(&name) {
        Ok(name.into())
    } else if name == AWS {
        Err(format!("is {name:?}, but this oven was built without EC2: build it with the feature `aws`"))
    } else {
        Err(format!("is {name:?}: it must be {}", alternatives(CLOUDS)))
    }
}

fn strategy(name: &str) -> Result<Strategy, String> {
    let known = DISKS.iter().find(|(known, _)| *known == name);
    known.map(|(_, strategy)| *strategy).ok_or_else(|| {
        format!("is {name:?}: it must be {}", alternatives(DISKS.iter().map(|(name, _)| name)))
    })
}

/// The clouds that this oven was built with.
pub fn cloud_names() -> impl Iterator<Item = &'static str> {
    CLOUDS.iter().copied()
}

/// The kinds of disks.
pub fn disk_names() -> impl Iterator<Item = &'static str> {
    DISKS.iter().map(|(name, _)| *name)
}

/// Joins words: `a` or `b`.
fn alternatives(words: impl IntoIterator<Item = impl std::fmt::Display>) -> String {
    let quoted: Vec<_> = words.into_iter().map(|word| format!("`{word}`")).collect();
    quoted.join(" or ")
}

fn instance(id: &str) -> Result<String, String> {
    let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    match id.strip_prefix("i-") {
        Some(digits) if matches!(digits.len(), 8 | 17) && digits.bytes().all(hex) => Ok(id.into()),
        _ => Err(format!("is {id:?}: an instance's id is `i-`, followed by 17 (or 8) digits of 0-9a-f")),
    }
}

/// Checks the name of an availability zone, a local zone or a wavelength zone, such as `us-west-2-lax-1a`.
fn zone_name(name: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let letter = name.ends_with(|c: char| c.is_ascii_lowercase());
    if letter && name.contains('-') && name.len() <= 64 && name.chars().all(good) {
        return Ok(name.into());
    }
    let region = name.ends_with(|c: char| c.is_ascii_digit()) && name.contains('-');
    let advice = if region { " (a region, and the zone's letter)" } else { "" };
    Err(format!("is {name:?}: it should be an availability zone, such as \"eu-central-1a\"{advice}"))
}

fn region_name(name: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.len() <= 64 && name.chars().all(good) {
        Ok(name.into())
    } else {
        Err(format!("is {name:?}: it should be a region's name, such as \"eu-central-1\""))
    }
}

fn path(dir: &Path, spelt: &str) -> Result<PathBuf, String> {
    if spelt.is_empty() || spelt.contains('\0') {
        return Err(format!("is {spelt:?}: it should be a path, relative to the directory of {FILE}"));
    }
    // Messages show the path, so it has no `./` inside.
    Ok(dir.join(spelt).components().collect())
}

/// Checks a URL. Environment variables and apt's configuration contain the URL, so it must not contain spaces, quotes
/// or escapes.
pub(crate) fn url(text: &str, schemes: &[&str]) -> Result<String, String> {
    let shown = without_secret(text);
    let Some((_, rest)) = text.split_once("://").filter(|(scheme, _)| schemes.contains(scheme)) else {
        let schemes = alternatives(schemes.iter().map(|scheme| format!("{scheme}://")));
        return Err(format!("is {shown:?}, which does not begin with {schemes}"));
    };
    let host = rest.split('/').next().unwrap_or_default();
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    if host.is_empty() || host.starts_with(':') {
        return Err(format!("is {shown:?}, which has no host"));
    }
    match text.chars().find(|c| !c.is_ascii_graphic() || "\"'\\`$;{}<>|^".contains(*c)) {
        Some(bad) => Err(format!("is {shown:?}, which contains the invalid character {bad:?}")),
        None => Ok(text.trim_end_matches('/').into()),
    }
}

/// The URL without user name and password, for messages.
fn without_secret(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((before, after)) => {
            let scheme = before.split_once("://").map_or(String::new(), |(scheme, _)| format!("{scheme}://"));
            format!("{scheme}…@{after}")
        }
        None => url.to_owned(),
    }
}

fn hosts(text: &str) -> Result<String, String> {
    let hosts: Vec<&str> = text.split(',').map(str::trim).filter(|host| !host.is_empty()).collect();
    let good = |c: char| c.is_ascii_alphanumeric() || ".-_:*/[]".contains(c);
    match hosts.iter().find(|host| !host.chars().all(good)) {
        Some(bad) => Err(format!("has {bad:?}: it must be hosts, separated by commas")),
        None => Ok(hosts.join(",")),
    }
}
