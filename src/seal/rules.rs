//! The clean-up rules: the paths of machine-specific data, and a description of each. [`super::clean`] removes the
//! data, [`super::lint`] searches for them.

use crate::image::accounts::Accounts;
use crate::image::tree::ImageTree;
use crate::text::match_wildcards;
use anyhow::Result;
use rustix::fs::FileType;

/// Files that are removed. `*` matches any characters within one name.
pub const FILES: &[(&str, &str)] = &[
    ("/var/lib/dbus/machine-id", "a machine id"),
    ("/var/lib/systemd/random-seed", "a random seed"),
    ("/var/lib/urandom/random-seed", "a random seed"),
    ("/var/lib/random-seed", "a random seed"),
    ("/boot/loader/random-seed", "a random seed"),
    ("/var/lib/systemd/credential.secret", "a key for credentials"),
    ("/var/lib/dhcp/*.leases", "a lease of an address"),
    ("/var/lib/dhclient/*.lease*", "a lease of an address"),
    ("/var/lib/dhcpcd/*.lease*", "a lease of an address"),
    ("/var/lib/dhcpcd5/*.lease*", "a lease of an address"),
    ("/var/lib/dhcpcd/duid", "a machine's id for leases"),
    ("/var/lib/dhcpcd/secret", "a machine's secret for addresses"),
    ("/etc/dhcpcd.duid", "a machine's id for leases"),
    ("/etc/dhcpcd.secret", "a machine's secret for addresses"),
    ("/var/lib/NetworkManager/*.lease", "a lease of an address"),
    ("/var/lib/NetworkManager/secret_key", "a machine's secret for addresses"),
    ("/var/lib/NetworkManager/timestamps", "a machine's past connections"),
    // This is a symlink to the instance's directory. If it is a directory, it is emptied instead (see `DIRECTORIES`).
    ("/var/lib/cloud/instance", "the state of an instance"),
];

/// Directories that are emptied. The directories themselves remain, with their owner and mode.
pub const DIRECTORIES: &[(&str, &str)] = &[
    ("/tmp", "a temporary file"),
    ("/var/tmp", "a temporary file"),
    ("/root/.cache", "a cache"),
    // cloud-init's seed and scripts are not removed, because they belong to the image. A missing directory is not
    // created, because cloud-init of Amazon Linux 2023 fails if `instance` is a directory.
    ("/var/lib/cloud/data", "the state of an instance"),
    ("/var/lib/cloud/instance", "the state of an instance"),
    ("/var/lib/cloud/instances", "the state of an instance"),
    ("/var/lib/cloud/sem", "the state of an instance"),
    ("/var/lib/systemd/coredump", "a crashed program's memory"),
    ("/var/crash", "a crashed program's memory"),
    ("/var/log/journal", "a journal"),
];

/// Caches of package managers. A distribution's plan removes them, and the lint checks that.
pub const CACHES: &[(&str, &str)] = &[
    ("/var/lib/apt/lists", "a package index"),
    ("/var/cache/apt", "a package or an index"),
    ("/var/cache/dnf", "a package or an index"),
    ("/var/cache/yum", "a package or an index"),
];

pub const LOGS: &str = "/var/log";
pub const MACHINE_ID: &str = "/etc/machine-id";
pub const HOST_KEYS: &str = "/etc/ssh/ssh_host_*_key";
pub const SNAKEOIL: &str = "/etc/ssl/private/ssl-cert-snakeoil.key";

/// Histories of shells and clients in a home directory.
const HISTORIES: [&str; 4] = [".*history", ".lesshst", ".viminfo", ".wget-hsts"];

/// Returns whether `[clean] keep` contains a path, or a directory above it.
pub fn is_excluded(keep: &[String], path: &str) -> bool {
    keep.iter().any(|entry| {
        let mut entry = entry.trim_end_matches('/').split('/');
        let mut path = path.split('/');
        entry.all(|pattern| path.next().is_some_and(|name| match_wildcards(pattern, name).is_some()))
    })
}

/// Returns the type of the object itself, if it exists and no directory in its path is a symlink. Directories reached
/// through a symlink are not cleaned, because the symlink may lead to `/`.
pub fn kind_of(inside: &ImageTree, path: &str) -> Result<Option<FileType>> {
    let parents = path.match_indices('/').map(|(at, _)| &path[..at]).skip(1);
    for parent in parents {
        if own_kind(inside, parent)? != Some(FileType::Directory) {
            return Ok(None);
        }
    }
    own_kind(inside, path)
}

fn own_kind(inside: &ImageTree, path: &str) -> Result<Option<FileType>> {
    Ok(inside.metadata(path)?.map(|stat| FileType::from_raw_mode(stat.st_mode)))
}

pub fn is_directory(inside: &ImageTree, path: &str) -> Result<bool> {
    Ok(kind_of(inside, path)? == Some(FileType::Directory))
}

/// Returns the paths that match a pattern, each with its type.
pub fn expand(inside: &ImageTree, pattern: &str) -> Result<Vec<(String, FileType)>> {
    let mut found = vec![String::new()];
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        let mut next = Vec::new();
        for dir in found {
            if !part.contains('*') {
                next.push(format!("{dir}/{part}"));
            } else if is_directory(inside, &dir)? {
                let names = inside.list(&dir)?.into_iter().filter_map(|name| name.into_string().ok());
                next.extend(
                    names.filter(|n| match_wildcards(part, n).is_some()).map(|n| format!("{dir}/{n}")),
                );
            }
        }
        found = next;
    }
    let mut all = Vec::new();
    for path in found {
        if let Some(kind) = kind_of(inside, &path)? {
            all.push((path, kind));
        }
    }
    Ok(all)
}

/// Returns the histories in the homes of all accounts and below /home: all objects with such a name, except
/// directories.
pub fn histories(inside: &ImageTree) -> Result<Vec<String>> {
    let mut homes = Accounts::read(inside)?.homes();
    homes.push("/root".to_owned());
    homes.extend(expand(inside, "/home/*")?.into_iter().map(|(path, _)| path));
    homes.sort_unstable();
    homes.dedup();
    let mut all = Vec::new();
    for home in homes {
        for pattern in HISTORIES {
            let found = expand(inside, &format!("{}/{pattern}", home.trim_end_matches('/')))?;
            all.extend(
                found.into_iter().filter(|(_, kind)| *kind != FileType::Directory).map(|(path, _)| path),
            );
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Returns whether a log was rotated. A rotated log is removed, while a current one is emptied.
pub fn is_rotated(name: &str) -> bool {
    let compressed = [".gz", ".xz", ".bz2", ".zst", ".old"].iter().any(|end| name.ends_with(end));
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    compressed
        || name.rsplit_once('.').is_some_and(|(_, end)| number(end) && end.len() < 4)
        || name.rsplit_once('-').is_some_and(|(_, end)| number(end) && end.len() == 8)
}

/// Returns the text of a file, or an empty text if it does not exist or is not a regular file.
pub fn read_text(inside: &ImageTree, path: &str) -> String {
    let bytes = inside.read(path).ok().flatten().unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Removes the objects that match a pattern, except directories.
pub fn remove_matching(inside: &ImageTree, pattern: &str, keep: &[String]) -> Result<bool> {
    let mut any = false;
    for (path, kind) in expand(inside, pattern)? {
        if kind != FileType::Directory && !is_excluded(keep, &path) {
            any |= inside.remove(&path)?;
        }
    }
    Ok(any)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keep_covers_paths_and_patterns() {
        let keep = ["/var/log/app/".to_owned(), "/etc/ssh/ssh_host_*_key".to_owned()];
        for path in ["/var/log/app", "/var/log/app/x/y", "/etc/ssh/ssh_host_rsa_key"] {
            assert!(is_excluded(&keep, path), "{path}");
        }
        for path in ["/var/log", "/var/log/apparmor", "/etc/ssh/ssh_host_rsa_key.pub", "/"] {
            assert!(!is_excluded(&keep, path), "{path}");
        }
        assert!(!is_excluded(&[], "/"));
    }

    #[test]
    fn rotated_logs() {
        for name in ["syslog.1", "dpkg.log.2.gz", "x.old", "cron-20240101", "eipp.log.xz"] {
            assert!(is_rotated(name), "{name}");
        }
        for name in ["syslog", "auth.log", "postgresql-15-main.log", "2024", "app.2024", "wtmp", "a-1"] {
            assert!(!is_rotated(name), "{name}");
        }
    }
}
