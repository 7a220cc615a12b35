//! A root directory in which steps run. It has busybox, and the directories of a system.

use crate::programs::copy_program;
use crate::ring;
use oven::sandbox::spec::StepSpec;
use std::collections::BTreeMap;
use std::fs;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const APPLETS: [&str; 28] = [
    "sh", "true", "false", "sleep", "cat", "ls", "echo", "id", "mkdir", "rm", "ln", "mv", "kill", "ps", "dd",
    "yes", "env", "readlink", "stat", "touch", "ifconfig", "hostname", "setsid", "nohup", "test", "head",
    "mount", "find",
];

/// An image's root in a plain directory, so that tests need no mount.
pub struct BusyboxImage {
    dir: TempDir,
    _ring: ring::Shared,
}

impl BusyboxImage {
    #[allow(clippy::new_without_default, reason = "it makes files")]
    pub fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let ring = ring::shared();
        let dir = tempfile::Builder::new().prefix("oven-step-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let image = Self { dir, _ring: ring };
        for name in ["bin", "etc", "var/log", "usr/sbin", "dev", "proc", "sys", "run", "tmp", "root", "mnt"] {
            fs::create_dir_all(image.path(name)).unwrap();
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
        let busybox = busybox.expect("these tests need busybox-static");
        copy_program(Path::new(busybox), &image.path("bin/busybox"));
        for applet in APPLETS {
            symlink("busybox", image.path("bin").join(applet)).unwrap();
        }
        image
    }

    /// Creates an image with a C program as `/bin/NAME`.
    pub fn with_program(source: &Path, options: &[&str], name: &str) -> Self {
        let image = Self::new();
        let mut cc = Command::new("cc");
        cc.args(["-static", "-O1"]).args(options).arg("-o").arg(image.path("bin").join(name)).arg(source);
        assert!(cc.status().expect("these tests need a C compiler").success());
        image
    }

    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns a step in this image, without a network.
    pub fn spec(&self, argv: &[&str]) -> StepSpec {
        spec_in(self.root(), argv)
    }

    pub fn shell(&self, script: &str) -> StepSpec {
        self.spec(&["sh", "-c", script])
    }

    /// Returns all objects in the image: path, mode with the type, inode, and link target or content.
    pub fn listing(&self) -> Vec<(PathBuf, u32, u64, Vec<u8>)> {
        fn walk(dir: &Path, found: &mut Vec<(PathBuf, u32, u64, Vec<u8>)>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let meta = fs::symlink_metadata(&path).unwrap();
                let content = if meta.is_symlink() {
                    fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
                } else if meta.is_file() {
                    fs::read(&path).unwrap()
                } else {
                    Vec::new()
                };
                found.push((path.clone(), meta.st_mode(), meta.st_ino(), content));
                if meta.is_dir() {
                    walk(&path, found);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.root(), &mut found);
        found.sort();
        found
    }
}

/// Returns a step in any root directory.
pub fn spec_in(root: &Path, argv: &[&str]) -> StepSpec {
    StepSpec {
        root: root.to_owned(),
        argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
        env: BTreeMap::new(),
        cwd: "/".into(),
        network: false,
        fenced: false,
        resolv_conf: None,
        shims: Vec::new(),
        binds: Vec::new(),
        caches: Vec::new(),
        nodes: Vec::new(),
        disk_writable: false,
        limits: oven::config::project::StepLimits::default(),
        audit_socket: false,
        status: false,
        throwaway: false,
        interactive: false,
    }
}
