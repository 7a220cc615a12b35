//! Removes machine-specific data from an image. All changes are made through descriptors of the image's own
//! directories, and no symlink is followed. For example, if `/var/log` is a symlink to `/`, nothing is removed from
//! `/`, and the lint reports the symlink.

use super::first_boot;
use super::rules;
use super::rules::is_excluded;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::text::list_first;
use anyhow::{Context, Result};
use rustix::fs::FileType;
use std::collections::BTreeSet;

/// Cleans the image, except for the paths in `keep`. Returns notes for the user.
pub fn clean(inside: &ImageTree, keep: &[String]) -> Result<Vec<String>> {
    let is_kept = |path: &str| is_excluded(keep, path);
    let mut notes = Vec::new();
    for (pattern, _) in rules::FILES {
        inside.remove_matching(pattern, &is_kept)?;
    }
    rules::visit_histories(inside, &mut |path| {
        if !is_kept(path) {
            inside.remove(path)?;
        }
        Ok(())
    })?;
    for (path, _) in rules::DIRECTORIES {
        if inside.is_directory(path)? && !is_kept(path) {
            inside.remove_tree_content(path, &is_kept)?;
        }
    }
    clean_logs(inside, keep).context("emptying logs")?;
    empty_machine_id(inside, keep).context("emptying the machine id")?;
    notes.extend(first_boot::replace_host_keys(inside, keep).context("removing SSH host keys")?);
    notes.extend(first_boot::replace_snakeoil_key(inside, keep).context("removing the snakeoil key")?);
    Ok(notes)
}

/// Returns the patterns that match nothing.
pub fn unmatched(inside: &ImageTree, patterns: &[String]) -> Result<BTreeSet<String>> {
    let mut missing = BTreeSet::new();
    for pattern in patterns {
        if inside.expand(pattern)?.is_empty() {
            missing.insert(pattern.clone());
        }
    }
    Ok(missing)
}

/// Removes the objects that match the patterns, with their content, except for the paths in `keep`. Returns the patterns
/// that match nothing. The clean-up may have removed what they matched before.
pub fn remove(inside: &ImageTree, patterns: &[String], keep: &[String]) -> Result<Vec<String>> {
    let is_kept = |path: &str| is_excluded(keep, path);
    let mut missing = Vec::new();
    for pattern in patterns {
        let found = inside.expand(pattern)?;
        if found.is_empty() {
            missing.push(pattern.clone());
        }
        for (path, kind) in found {
            if is_kept(&path) {
                continue;
            }
            if kind == FileType::Directory {
                inside.remove_tree(&path, &is_kept)?;
            } else {
                inside.remove(&path)?;
            }
        }
    }
    Ok(missing)
}

/// Returns a note about the append-only and immutable objects that were changed.
pub fn protected_note(inside: &ImageTree) -> Option<String> {
    const NAMED_MAX: usize = 10;
    let paths = &inside.changed_protected_paths();
    let is_machine_id =
        |path: &String| path.strip_prefix(rules::MACHINE_ID).is_some_and(|rest| rest.starts_with(' '));
    let effect = match paths.iter().any(is_machine_id) {
        true => "; an instance cannot store its machine id, so it gets a new one at each boot",
        false => "",
    };
    let list = list_first(paths, NAMED_MAX, ", ");
    (!paths.is_empty())
        .then(|| format!("changed these protected paths, and protected them again: {list}{effect}"))
}

/// Removes rotated logs. Current logs are only emptied, so that their owners and modes do not change.
fn clean_logs(inside: &ImageTree, keep: &[String]) -> Result<()> {
    if !inside.is_directory(rules::LOGS)? {
        return Ok(());
    }
    inside.walk_entries(rules::LOGS, &mut |entry| {
        if is_excluded(keep, entry.path) {
            return Ok(Walk::Past);
        }
        if entry.kind() != FileType::RegularFile {
            return Ok(Walk::On);
        }
        let name = String::from_utf8_lossy(entry.name());
        // If a log has several hard links, the same file may have another name outside of `/var/log`. Emptying the file
        // would destroy the content under both names. So only the name in `/var/log` is removed.
        if rules::is_rotated(&name) || entry.stat.st_nlink > 1 {
            entry.remove()?;
        } else if entry.stat.st_size > 0 {
            entry.truncate()?;
        }
        Ok(Walk::On)
    })
}

/// Makes `/etc/machine-id` an empty file, so that each instance generates its own id. If the file were missing or
/// contained `uninitialized`, systemd would apply its presets at the first boot. Presets could enable units that the
/// definition disabled.
fn empty_machine_id(inside: &ImageTree, keep: &[String]) -> Result<()> {
    let path = rules::MACHINE_ID;
    let exists = match inside.kind_of(path)? {
        Some(FileType::Directory) => return Ok(()),
        found => found.is_some(),
    };
    if is_excluded(keep, path)
        || !inside.is_directory("/etc")?
        || !(exists || first_boot::has_systemd(inside)?)
    {
        return Ok(());
    }
    // The file is replaced instead of truncated, because it may be a symlink or have several hard links.
    inside.write(path, b"", 0o444, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;

    const OLD_LOG: &str = "Jan 1 00:00:00 host daemon: secret\n";

    fn image() -> Tree {
        let tree = Tree::new();
        for (path, content) in [
            ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
            ("etc/passwd", "root:x:0:0::/root:/bin/sh\npg:x:5:5::/var/lib/pg:/bin/sh\nd:x:1:1::/usr/sbin:\n"),
            ("var/lib/dbus/machine-id", "0123\n"),
            ("var/lib/systemd/random-seed", "seed"),
            ("var/lib/systemd/credential.secret", "key"),
            ("var/lib/dhcp/dhclient.eth0.leases", "lease"),
            ("var/lib/cloud/instances/i-1/user-data.txt", "password"),
            ("var/lib/cloud/seed/nocloud/meta-data", "seed stays"),
            ("var/lib/cloud/scripts/per-boot/mine.sh", "script stays"),
            ("var/lib/pg/.psql_history", "select"),
            ("root/.bash_history", "ls"),
            ("root/.cache/pip/x", "x"),
            ("root/.profile", "stays"),
            ("home/admin/.python_history", "import"),
            ("var/log/syslog", OLD_LOG),
            ("var/log/syslog.1", OLD_LOG),
            ("var/log/apt/history.log", OLD_LOG),
            ("var/log/journal/abc/system.journal", OLD_LOG),
            ("tmp/x/y", "y"),
            ("var/tmp/x", "x"),
            ("var/lib/important", "stays"),
        ] {
            tree.file(path, content);
        }
        tree.link("instances/i-1", "var/lib/cloud/instance");
        tree
    }

    fn run(tree: &Tree, keep: &[&str]) -> Vec<String> {
        let keep: Vec<_> = keep.iter().map(|k| (*k).to_owned()).collect();
        clean(&tree.tree(), &keep).unwrap()
    }

    #[test]
    fn machine_specific_data_is_removed_and_the_rest_stays() {
        let tree = image();
        run(&tree, &[]);
        assert_eq!(tree.read("etc/machine-id").as_deref(), Some(""));
        assert_eq!(tree.mode("etc/machine-id"), 0o444);
        for gone in [
            "var/lib/dbus/machine-id",
            "var/lib/systemd/random-seed",
            "var/lib/systemd/credential.secret",
            "var/lib/dhcp/dhclient.eth0.leases",
            "var/lib/cloud/instance",
            "var/lib/cloud/instances/i-1",
            "var/lib/pg/.psql_history",
            "root/.bash_history",
            "home/admin/.python_history",
            "var/log/syslog.1",
            "var/log/journal/abc",
            "tmp/x",
            "var/tmp/x",
            "root/.cache/pip",
        ] {
            assert!(!tree.has(gone), "{gone}");
        }
        for empty in ["var/log/syslog", "var/log/apt/history.log"] {
            assert_eq!(tree.read(empty).as_deref(), Some(""), "{empty}");
        }
        for stays in [
            "var/lib/important",
            "root/.profile",
            "var/lib/cloud/seed/nocloud/meta-data",
            "var/lib/cloud/scripts/per-boot/mine.sh",
            "var/log/journal",
            "tmp",
        ] {
            assert!(tree.has(stays), "{stays}");
        }
        let once = tree.listing();
        run(&tree, &[]);
        assert_eq!(tree.listing(), once, "cleaning a clean image changes nothing");
    }

    #[test]
    fn what_keep_names_stays() {
        let tree = image();
        run(&tree, &["/etc/machine-id", "/var/log/apt", "/root/.bash_history", "/tmp/x", "/var/log/journal"]);
        for (path, content) in [
            ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
            ("var/log/apt/history.log", OLD_LOG),
            ("root/.bash_history", "ls"),
            ("tmp/x/y", "y"),
            ("var/log/journal/abc/system.journal", OLD_LOG),
        ] {
            assert_eq!(tree.read(path).as_deref(), Some(content), "{path}");
        }
        assert_eq!(tree.read("var/log/syslog").as_deref(), Some(""));
    }

    /// Plants a symlink at every path that is cleaned. The symlink leads to files of this machine or to other files of
    /// the image.
    #[test]
    fn planted_symlinks_are_not_followed() {
        let dirs = [
            "var/log",
            "var/log/journal",
            "tmp",
            "var/tmp",
            "root",
            "home",
            "root/.cache",
            "var/lib/cloud/instances",
        ];
        let files = ["etc/machine-id", "root/.bash_history", "var/log/syslog", "var/lib/dbus/machine-id"];
        for planted in dirs.iter().chain(&files) {
            for target in ["HOST", "/", "/precious", "..", "loop"] {
                let tree = image();
                tree.file("precious/syslog", "precious");
                tree.file("precious/x.gz", "precious");
                let host = tempfile::tempdir().unwrap();
                for name in ["canary", "syslog", "x.gz", ".bash_history"] {
                    std::fs::write(host.path().join(name), "host").unwrap();
                }
                tree.remove(planted);
                let to = match target {
                    "HOST" if files.contains(planted) => {
                        host.path().join("canary").to_str().unwrap().to_owned()
                    }
                    "HOST" => host.path().to_str().unwrap().to_owned(),
                    "loop" => format!("/{planted}"),
                    other => other.to_owned(),
                };
                tree.link(&to, planted);
                run(&tree, &[]);
                for name in ["canary", "syslog", "x.gz", ".bash_history"] {
                    let left = std::fs::read_to_string(host.path().join(name)).unwrap_or_default();
                    assert_eq!(left, "host", "{name} through {planted} -> {to}");
                }
                for (path, content) in [
                    ("precious/syslog", "precious"),
                    ("precious/x.gz", "precious"),
                    ("var/lib/important", "stays"),
                ] {
                    assert_eq!(tree.read(path).as_deref(), Some(content), "{path} through {planted} -> {to}");
                }
                if *planted == "etc/machine-id" {
                    assert_eq!(tree.read("etc/machine-id").as_deref(), Some(""));
                }
            }
        }
    }

    #[test]
    fn what_remove_names_goes_with_its_content() {
        let tree = image();
        for path in ["srv/app/a/b", "srv/app/keep/c", "srv/app/d.key", "srv/app/e.key", "precious"] {
            tree.file(path, "x");
        }
        tree.link("/precious", "srv/app/link");
        tree.link("/srv", "other");
        let owned = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
        let patterns =
            owned(&["/srv/app/*.key", "/srv/app/a", "/srv/app/link", "/srv/none", "/other/app", "/srv/app"]);
        let keep = owned(&["/srv/app/keep", "/srv/app/e.key"]);
        let missing = remove(&tree.tree(), &patterns, &keep).unwrap();
        assert_eq!(missing, ["/srv/none", "/other/app"]);
        for stays in ["srv/app/keep/c", "srv/app/e.key", "precious", "other", "var/lib/important"] {
            assert!(tree.has(stays), "{stays}");
        }
        for gone in ["srv/app/a", "srv/app/d.key", "srv/app/link"] {
            assert!(!tree.has(gone), "{gone}");
        }
        let unmatched = unmatched(&tree.tree(), &owned(&["/srv/*", "/srv/none", "/precious", "/srv/no*"]));
        assert_eq!(unmatched.unwrap().into_iter().collect::<Vec<_>>(), ["/srv/no*", "/srv/none"]);
        remove(&tree.tree(), &owned(&["/srv/*"]), &[]).unwrap();
        assert!(!tree.has("srv/app") && tree.has("srv"));
    }

    #[test]
    fn odd_objects_block_nothing() {
        let tree = image();
        for path in ["root/.zsh_history", "var/log/pipe", "var/lib/dhcp/x.leases", "tmp/pipe"] {
            tree.fifo(path);
        }
        tree.file("precious", "precious");
        tree.hard_link("precious", "var/log/precious.log");
        tree.file("etc/deep/x", "x");
        run(&tree, &[]);
        assert!(
            !tree.has("root/.zsh_history") && !tree.has("var/lib/dhcp/x.leases") && !tree.has("tmp/pipe")
        );
        assert_eq!(
            tree.read("precious").as_deref(),
            Some("precious"),
            "a hard link in /var/log empties nothing"
        );
        assert!(!tree.has("var/log/precious.log"));
    }

    #[test]
    fn an_image_without_systemd_and_machine_id_gets_none() {
        let tree = Tree::new();
        tree.file("etc/hostname", "x");
        run(&tree, &[]);
        assert_eq!(tree.listing(), ["etc", "etc/hostname"]);
        tree.file("usr/lib/systemd/systemd", "elf");
        run(&tree, &[]);
        assert_eq!(tree.read("etc/machine-id").as_deref(), Some(""));
    }
}
