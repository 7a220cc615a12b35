//! Reports files that look like keys, ids or secrets, and that a package's script made in this bake. All instances of
//! the image share them. The closed list of [`super::identities`] has the files that oven can handle by itself. For all
//! others, this module only warns, because oven cannot know whether a program makes a new one.

#[cfg(test)]
mod tests;

use super::identities::IDENTITIES;
use super::lint::bake_period::{BakeMoment, BakePeriod};
use super::lint::credentials::{PUBLIC_CODE, SIZE_MAX, credential_in, start_of};
use super::rules::is_excluded;
use super::secret_scan::shorten;
use crate::error::Kind;
use crate::image::file_version::FileVersion;
use crate::image::limits::StoredPaths;
use crate::image::tree::ImageTree;
use crate::image::walk::{Walk, WalkEntry};
use crate::provision::command::{CommandRunner, ImageCommand};
use crate::provision::package_cache::CacheAccess;
use crate::text::{escape_name, list_first};
use anyhow::{Context, Result};
use rustix::fs::FileType;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The directories that are searched. Scripts of packages rarely make other files of this kind.
const SEARCHED: [&str; 7] = ["/etc", "/var", "/opt", "/srv", "/root", "/home", "/usr/local"];
/// Paths that are not searched: databases of package managers, public keys, caches, and data that the clean-up removes.
const SKIPPED: &[&str] = &[
    "/etc/apt",
    "/etc/fstab",
    "/etc/machine-id",
    "/etc/pam.d",
    "/etc/pki/ca-trust",
    "/etc/pki/rpm-gpg",
    "/etc/selinux",
    "/etc/ssl/certs",
    "/var/cache",
    "/var/lib/apt",
    "/var/lib/ca-certificates",
    "/var/lib/dnf",
    "/var/lib/dpkg",
    "/var/lib/pam",
    "/var/lib/rpm",
    "/var/lib/selinux",
    "/var/lib/systemd",
    "/var/lib/ucf",
    "/var/lib/yum",
    "/var/lib/zypp",
    "/var/log",
    "/var/tmp",
];
/// debconf stores the answers to questions for passwords here.
const DEBCONF_PASSWORDS: &str = "/var/cache/debconf/passwords.dat";
/// The maximum number of files whose content is searched, and of files that are reported.
const FILES_MAX: usize = 20_000;
const FOUND_MAX: usize = 1000;
const NAMED_MAX: usize = 20;
/// The maximum number of paths in one query of the package manager.
const QUERY_MAX: usize = 200;
const QUERY_TIMEOUT: Duration = Duration::from_secs(120);
const QUERY: &str = "listing the files of packages";
const DPKG_QUERY: &str = "/usr/bin/dpkg-query";
const RPM: &str = "/usr/bin/rpm";

/// Words in the names of files with keys, ids and secrets.
const NAME_WORDS: [&str; 15] = [
    "cookie",
    "credential",
    "credentials",
    "hostid",
    "hostkey",
    "key",
    "keyfile",
    "keys",
    "keytab",
    "passphrase",
    "password",
    "passwords",
    "secret",
    "secrets",
    "token",
];
/// Ends of names of public files.
const PUBLIC_ENDS: [&str; 6] = [".asc", ".cer", ".crt", ".gpg", ".pub", ".service"];
/// Parts of the names of settings with secrets and ids, without `_` and `-`.
const SETTING_NAMES: [&str; 13] = [
    "password",
    "passwd",
    "passphrase",
    "dbpass",
    "secret",
    "token",
    "apikey",
    "hostid",
    "initiatorname",
    "cookie",
    "deskey",
    "authkey",
    "encryptionkey",
];

/// A file that looks like a key, an id or a secret.
#[derive(Debug)]
struct SuspiciousFile {
    what: &'static str,
    version: FileVersion,
}

/// The files that scripts of packages made, and that look like keys, ids or secrets. This includes all known secrets
/// that machines may share.
#[derive(Debug, Default)]
pub struct PackageMadeFiles {
    files: BTreeMap<String, SuspiciousFile>,
    /// Whether the search ended early, because there are too many files.
    is_incomplete: bool,
}

impl PackageMadeFiles {
    /// Finds the files. Call this after the packages are installed and before the definition's scripts run. `begun` is
    /// the moment before the first step, and `placed` has the paths of files that the plan places.
    pub fn find(inside: &ImageTree, begun: &BakeMoment, placed: &[&str]) -> Result<Self> {
        let (mut searched, mut is_incomplete, period) = (0, false, begun.until_now());
        let mut found = known_secrets(inside, &period, placed)?;
        for top in SEARCHED {
            if !inside.is_directory(top)? {
                continue;
            }
            let mut stored = StoredPaths::new(inside.meter(), top);
            inside.walk_entries(top, &mut |entry| {
                inside.meter().check()?;
                if is_incomplete {
                    return Ok(Walk::Past);
                }
                if entry.kind() == FileType::Directory {
                    let skips = SKIPPED.contains(&entry.path) && entry.path != "/var/cache";
                    let skips = skips || PUBLIC_CODE.contains(&entry.name());
                    return Ok(if skips || is_other_cache(entry.path) { Walk::Past } else { Walk::On });
                }
                let is_skipped = SKIPPED.contains(&entry.path) || placed.contains(&entry.path);
                let is_in_cache = entry.path.starts_with("/var/cache/") && entry.path != DEBCONF_PASSWORDS;
                if is_skipped || is_in_cache || !is_small_file(entry) {
                    return Ok(Walk::On);
                }
                let Some(version) = entry.version()?.filter(|version| is_made(version, &period)) else {
                    return Ok(Walk::On);
                };
                if searched >= FILES_MAX || found.len() >= FOUND_MAX {
                    is_incomplete = true;
                    return Ok(Walk::Past);
                }
                searched += 1;
                let Some(file) = entry.open_file()? else { return Ok(Walk::On) };
                let content = start_of(file).with_context(|| format!("reading {}", entry.shown_path()))?;
                if let Some(what) = suspicion(entry.path, &content) {
                    stored.count(entry.path)?;
                    found.insert(entry.path.to_owned(), SuspiciousFile { what, version });
                }
                Ok(Walk::On)
            })?;
        }
        Ok(Self { files: found, is_incomplete })
    }

    /// Returns a warning if the search ended early.
    pub fn limit_warning(&self) -> Option<&'static str> {
        self.is_incomplete.then_some(
            "scripts of packages made so many files that not all were searched for keys, ids and secrets",
        )
    }

    /// Returns whether a package's script made a file in this bake, and nothing changed it since.
    pub fn has_unchanged(&self, inside: &ImageTree, path: &str) -> Result<bool> {
        let Some(file) = self.files.get(path) else { return Ok(false) };
        Ok(inside.version(path)?.is_some_and(|now| now == file.version))
    }

    /// Leaves out the files that a package owns, such as a configuration file that its script filled in. The image's
    /// package manager lists them. If it fails, such files stay in the list, because the list is only for a warning and
    /// for the known secrets.
    ///
    /// Errors: `Interrupted`.
    pub async fn without_owned(mut self, runner: &CommandRunner<'_>) -> Result<Self> {
        let inside = runner.place.inside;
        let query: fn(&[String]) -> Vec<String> = if inside.exists(DPKG_QUERY)? {
            dpkg_query
        } else if inside.exists(RPM)? {
            rpm_query
        } else {
            return Ok(self);
        };
        let paths: Vec<_> = self.files.keys().cloned().collect();
        for paths in paths.chunks(QUERY_MAX) {
            let argv = query(paths);
            if argv.last().is_none_or(|last| last == "--") {
                continue;
            }
            let call = ImageCommand {
                why: QUERY.to_owned(),
                name: argv.first().cloned().unwrap_or_default(),
                argv,
                env: BTreeMap::from([("LC_ALL".to_owned(), "C.UTF-8".to_owned())]),
                trusted: true,
                caches: CacheAccess::None,
                throwaway: true,
                timeout: QUERY_TIMEOUT,
                // A package manager fails if no package owns a path.
                also_good: (1..=u8::MAX).collect(),
                ..ImageCommand::plan_defaults(runner)
            };
            let mut detail = |text: String| runner.work.report.detail(text);
            let Some(answer) = unless_failed(runner.ask(&call).await, &mut detail)? else { break };
            for owned in answer.lines().filter_map(owned_path) {
                self.files.remove(owned);
            }
        }
        Ok(self)
    }

    /// Returns a warning about the files that are still in the image as the packages' scripts made them. `remaining`
    /// has known identities that the clean-up did not remove.
    pub fn warning(
        self,
        inside: &ImageTree,
        exempt: &[String],
        remaining: &[(String, String)],
    ) -> Result<Option<String>> {
        let mut lines = Vec::new();
        for (path, what) in remaining {
            // `[clean] remove` may have removed it.
            if inside.exists(path)? {
                lines.push(format!("{path} ({what})"));
            }
        }
        let known: BTreeSet<_> = remaining.iter().map(|(path, _)| path.as_str()).collect();
        for (path, SuspiciousFile { what, version }) in &self.files {
            let is_known = known.contains(path.as_str()) || is_excluded(exempt, path);
            if !is_known && inside.version(path)?.is_some_and(|now| now == *version) {
                lines.push(format!("{} ({what})", shorten(&escape_name(path))));
            }
        }
        if lines.is_empty() {
            return Ok(None);
        }
        let list = list_first(&lines, NAMED_MAX, ", ");
        Ok(Some(format!(
            "all instances share these files, which look like keys, ids or secrets of one machine: {list}. Remove them \
             with `[clean] remove` in image.toml, or accept them with `[clean] keep`"
        )))
    }
}

/// Finds the secrets that machines may share, and that a package's script made. Their names and their content may look
/// harmless.
fn known_secrets(
    inside: &ImageTree,
    period: &BakePeriod,
    placed: &[&str],
) -> Result<BTreeMap<String, SuspiciousFile>> {
    let mut found = BTreeMap::new();
    for identity in IDENTITIES.iter().filter(|identity| identity.may_be_shared) {
        for path in identity.files.iter().map(|file| file.path).filter(|path| !placed.contains(path)) {
            if inside.kind_of(path)? != Some(FileType::RegularFile) {
                continue;
            }
            if let Some(version) = inside.version(path)?.filter(|version| is_made(version, period)) {
                found.insert(path.to_owned(), SuspiciousFile { what: identity.what, version });
            }
        }
    }
    Ok(found)
}

/// Returns the answer of a query, or `None` if the query failed. Then `detail` is called with the reason.
///
/// Errors: `Interrupted`.
fn unless_failed(answer: Result<String>, detail: &mut dyn FnMut(String)) -> Result<Option<String>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if Kind::of(&error) == Kind::Interrupted => Err(error),
        Err(error) => {
            detail(format!("{QUERY} failed, so files of packages may be reported as well: {error:#}"));
            Ok(None)
        }
    }
}

fn is_other_cache(path: &str) -> bool {
    path.starts_with("/var/cache/") && path != "/var/cache/debconf"
}

fn is_small_file(entry: &WalkEntry<'_>) -> bool {
    let size = u64::try_from(entry.stat.st_size).unwrap_or_default();
    entry.kind() == FileType::RegularFile && (1..=SIZE_MAX).contains(&size)
}

/// Returns whether a script wrote a file. The files of packages themselves have old modification times.
fn is_made(version: &FileVersion, period: &BakePeriod) -> bool {
    period.includes(version.modified)
}

/// For each path, dpkg-query prints `PACKAGE: PATH`, and an error if no package owns it. It treats some characters as
/// patterns.
fn dpkg_query(paths: &[String]) -> Vec<String> {
    let plain = paths.iter().filter(|path| !path.contains(['*', '?', '[', '\\']));
    ["dpkg-query", "-S", "--"].map(str::to_owned).into_iter().chain(plain.cloned()).collect()
}

/// Prints each path that a package owns. A query of rpm for many paths would print all files of the packages, or lines
/// from which the path is missing.
fn rpm_query(paths: &[String]) -> Vec<String> {
    let each = "for path; do rpm -qf -- \"$path\" > /dev/null 2>&1 && printf '%s\\n' \"$path\"; done";
    let command = ["sh", "-c", each, "rpm"].map(str::to_owned);
    command.into_iter().chain(paths.iter().cloned()).collect()
}

/// Returns the path in a line of the package manager's answer. Lines of another form, such as `file /x is not owned by
/// any package`, have none.
fn owned_path(line: &str) -> Option<&str> {
    if line.starts_with('/') {
        return Some(line);
    }
    line.split_once(": ").map(|(_, path)| path).filter(|path| path.starts_with('/'))
}

/// Returns a description if a file looks like a key, an id or a secret.
pub(super) fn suspicion(path: &str, content: &[u8]) -> Option<&'static str> {
    let text = String::from_utf8_lossy(content);
    if path == DEBCONF_PASSWORDS {
        let has_value = text
            .lines()
            .any(|line| line.strip_prefix("Value:").is_some_and(|value| !value.trim().is_empty()));
        return has_value.then_some("answers of debconf with a password");
    }
    if let Some(what) = credential_in(content) {
        return Some(what);
    }
    if is_public(&text) {
        return None;
    }
    let name = path.rsplit('/').next().unwrap_or_default().to_ascii_lowercase();
    let words = name.split(|c: char| !c.is_ascii_alphanumeric());
    if words.into_iter().any(|word| NAME_WORDS.contains(&word))
        && !PUBLIC_ENDS.iter().any(|end| name.ends_with(end))
    {
        return Some("its name looks like a key, an id or a secret");
    }
    if is_id(text.trim()) {
        return Some("its content looks like an id or a secret");
    }
    text.lines()
        .any(has_secret_setting)
        .then_some("it contains a setting that looks like a password, an id or a secret")
}

fn is_public(text: &str) -> bool {
    [
        "-----BEGIN CERTIFICATE",
        "-----BEGIN PUBLIC KEY",
        "-----BEGIN PGP PUBLIC KEY",
        "-----BEGIN DH PARAMETERS",
    ]
    .iter()
    .any(|start| text.trim_start().starts_with(start))
}

/// Returns whether a line assigns a value that looks random to a setting with a suspicious name, in the languages of
/// shells, INI files, YAML, JSON and PHP.
fn has_secret_setting(line: &str) -> bool {
    const NAME_LENGTH: usize = 80;
    let line = line.trim();
    if line.starts_with(['#', ';', '!']) || line.starts_with("//") || line.starts_with('*') {
        return false;
    }
    let Some((name, value)) = line.split_once(['=', ':']) else { return false };
    if name.len() > NAME_LENGTH {
        return false;
    }
    let name: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
    let name = name.to_ascii_lowercase();
    let value = value.trim_start_matches(['=', '>', ' ', '\t']).trim_end_matches([';', ',', ' ', ')']);
    let value = value.trim_matches(['"', '\'']);
    SETTING_NAMES.iter().any(|part| name.contains(part)) && is_random(value)
}

/// Returns whether a text is a hexadecimal number, a UUID, or random bytes in base64.
fn is_id(text: &str) -> bool {
    const HEX_MIN: usize = 16;
    const BASE64_MIN: usize = 20;
    const LONGEST: usize = 512;
    let has = |is: fn(&u8) -> bool| text.as_bytes().iter().any(is);
    let is_hex = text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    let is_base64 = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=_-".contains(&b));
    let (digits, lower, upper) =
        (has(u8::is_ascii_digit), has(u8::is_ascii_lowercase), has(u8::is_ascii_uppercase));
    let is_long_hex = is_hex && digits && (lower || upper) && text.len() >= HEX_MIN;
    let is_long_base64 = is_base64 && digits && lower && upper && text.len() >= BASE64_MIN;
    text.len() <= LONGEST && (is_long_hex || is_long_base64)
}

/// Returns whether a setting's value looks random.
fn is_random(text: &str) -> bool {
    const SHORTEST: usize = 8;
    const LONGEST: usize = 512;
    let is_word = text.bytes().all(|b| b.is_ascii_graphic()) && (SHORTEST..=LONGEST).contains(&text.len());
    // These begin and occur in paths, variables and placeholders.
    let is_reference = text.starts_with(['/', '.', '~'])
        || text.contains(['$', '{', '<', '(', '|', '\\'])
        || text.contains("://");
    let has = |is: fn(&u8) -> bool| text.as_bytes().iter().any(is);
    let (digits, lower, upper) =
        (has(u8::is_ascii_digit), has(u8::is_ascii_lowercase), has(u8::is_ascii_uppercase));
    let is_mixed = digits && (lower || upper) || lower && upper;
    let is_version = text.bytes().all(|b| b.is_ascii_digit() || b == b'.' || b == b'-' || b == b':');
    is_word && !is_reference && is_mixed && !is_version
}
