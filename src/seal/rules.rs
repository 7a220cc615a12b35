//! The clean-up rules: the paths of machine-specific data, each with a description. [`super::clean`] removes the data,
//! and [`super::lint`] checks that no such data remains. The caches of package managers are not listed here. A
//! distribution's plan lists them, and the plan's clean-up steps empty them.

use crate::image::accounts::{Accounts, HOMES_MAX};
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
    // cloud-init makes this a symlink to the instance's directory. If it is a directory, it is emptied instead (see
    // `DIRECTORIES`).
    ("/var/lib/cloud/instance", "the state of an instance"),
];

/// Directories that are emptied. The directories themselves remain, with their owner and mode.
pub const DIRECTORIES: &[(&str, &str)] = &[
    ("/tmp", "a temporary file"),
    ("/var/tmp", "a temporary file"),
    ("/root/.cache", "a cache"),
    // cloud-init's seed and scripts are not removed, because they belong to the image. A directory that is missing is
    // not created, because cloud-init of Amazon Linux 2023 fails if `instance` is a directory.
    ("/var/lib/cloud/data", "the state of an instance"),
    ("/var/lib/cloud/instance", "the state of an instance"),
    ("/var/lib/cloud/instances", "the state of an instance"),
    ("/var/lib/cloud/sem", "the state of an instance"),
    ("/var/lib/systemd/coredump", "a crashed program's memory"),
    ("/var/crash", "a crashed program's memory"),
    ("/var/log/journal", "a journal"),
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

/// Returns the history files in the home directories of all accounts, of root, and below /home.
pub fn histories(inside: &ImageTree) -> Result<Vec<String>> {
    let too_many =
        || inside.meter().exceeded(format!("the image has more than {HOMES_MAX} home directories"));
    let mut homes = Accounts::read(inside)?.homes().ok_or_else(too_many)?;
    homes.push("/root".to_owned());
    homes.extend(inside.expand("/home/*")?.into_iter().map(|(path, _)| path));
    homes.sort_unstable();
    homes.dedup();
    if homes.len() > HOMES_MAX {
        return Err(too_many());
    }
    let mut all = Vec::new();
    for home in homes {
        for pattern in HISTORIES {
            let found = inside.expand(&format!("{}/{pattern}", home.trim_end_matches('/')))?;
            all.extend(
                found.into_iter().filter(|(_, kind)| *kind != FileType::Directory).map(|(path, _)| path),
            );
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Returns whether a log's name is that of a rotated log, such as `syslog.1`. Rotated logs are removed. Current logs
/// are emptied.
pub fn is_rotated(name: &str) -> bool {
    let compressed = [".gz", ".xz", ".bz2", ".zst", ".old"].iter().any(|end| name.ends_with(end));
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    compressed
        || name.rsplit_once('.').is_some_and(|(_, end)| number(end) && end.len() < 4)
        || name.rsplit_once('-').is_some_and(|(_, end)| number(end) && end.len() == 8)
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
