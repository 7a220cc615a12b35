//! The host, as far as a step could reach it: it is the same before and after.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// What every machine has, and what programs that other people run meanwhile leave alone.
const FILES: [&str; 14] = [
    "/etc/fstab",
    "/etc/group",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/machine-id",
    "/etc/passwd",
    "/etc/resolv.conf",
    "/etc/shadow",
    "/etc/ssh",
    "/proc/sys/fs/binfmt_misc/status",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/modprobe",
    "/usr/sbin/policy-rc.d",
];
const MOUNTS: [&str; 7] = ["/", "/dev", "/dev/pts", "/proc", "/run", "/sys", "/tmp"];

pub struct Host {
    canary: tempfile::TempDir,
    before: BTreeMap<String, String>,
}

impl Host {
    /// As it is now, with a few files more that would be worth a thief's while.
    pub fn new() -> Self {
        // Not in /tmp: a link from there to here would lead round in a circle.
        let dir = tempfile::Builder::new().prefix("oven-canary.").tempdir_in("/var/tmp").unwrap();
        let canary = dir.path();
        for (file, mode) in [
            ("resolv.conf", 0o644),
            ("machine-id", 0o444),
            ("history", 0o600),
            ("log/syslog", 0o640),
            ("log/old.1.gz", 0o640),
            ("log/journal/x/system.journal", 0o640),
            ("ssh/ssh_host_rsa_key", 0o600),
            ("tmp/file", 0o644),
            ("secret", 0o600),
        ] {
            let path = canary.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, format!("nameserver 192.0.2.1\nthe host's {file}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("secret", canary.join("link")).unwrap();
        Self { before: state(canary), canary: dir }
    }

    pub fn canary(&self) -> PathBuf {
        self.canary.path().to_owned()
    }

    pub fn assert_unchanged(&self, what: &str) {
        let after = state(self.canary.path());
        for (name, before) in &self.before {
            assert_eq!(after.get(name), Some(before), "{name} of the host changed\n{what}");
        }
        let new: Vec<_> = after.keys().filter(|name| !self.before.contains_key(*name)).collect();
        assert!(new.is_empty(), "the host has {new:?}\n{what}");
    }
}

fn state(canary: &Path) -> BTreeMap<String, String> {
    let mut state = BTreeMap::new();
    for file in FILES {
        tree(Path::new(file), &mut state);
    }
    tree(canary, &mut state);
    // Other tests mount things meanwhile, in places of their own.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for line in mounts.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        if MOUNTS.contains(&fields[4]) || fields[4].starts_with("/proc/") || fields[4].starts_with("/sys/") {
            state.insert(format!("mount {} {}", fields[0], fields[4]), line.to_owned());
        }
    }
    state
}

/// Each file's mode, owner, times and content.
fn tree(path: &Path, state: &mut BTreeMap<String, String>) {
    let Ok(stat) = fs::symlink_metadata(path) else { return };
    let content = if stat.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            tree(&entry.unwrap().path(), state);
        }
        String::new()
    } else if stat.is_symlink() {
        fs::read_link(path).unwrap().display().to_string()
    } else {
        String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()
    };
    // A file of /proc is made when it is looked at.
    let changed = if path.starts_with("/proc") { 0 } else { stat.ctime_nsec() };
    let text = format!("{:o} {}:{} {} {changed} {content}", stat.mode(), stat.uid(), stat.gid(), stat.size());
    state.insert(path.display().to_string(), text);
}
