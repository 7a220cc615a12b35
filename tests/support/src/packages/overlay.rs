//! A root directory over a base that many tests share. A test's changes are removed when the test ends.

use crate::disk::unmount::unmount;
use crate::ring;
use oven::image::tree::ImageTree;
use oven::sys::namespaces::private_mounts;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A directory with `image`, an overlay over a base. Only the test's thread sees the mounts.
pub struct Overlay {
    temp: TempDir,
    base: PathBuf,
    /// Options of the overlay in addition to its directories.
    options: &'static str,
    _ring: ring::Shared,
}

impl Overlay {
    /// `changes` has the mount options of the file system for the image's changes.
    pub fn new(base: PathBuf, changes: &str, options: &'static str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let ring = ring::shared();
        private_mounts().unwrap();
        let temp = tempfile::Builder::new().prefix("oven-lab-").tempdir().unwrap();
        fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for dir in ["web", "image", "changes"] {
            fs::create_dir(temp.path().join(dir)).unwrap();
        }
        let overlay = Self { temp, base, options, _ring: ring };
        overlay.mount("tmpfs", changes, "changes");
        overlay.mount_image();
        overlay
    }

    fn mount(&self, kind: &str, options: &str, at: &str) {
        let mut mount = Command::new("mount");
        let done = mount.args(["-t", kind, "-o", options, kind]).arg(self.path(at)).status();
        assert!(done.unwrap().success(), "mounting {kind} with {options}");
    }

    fn mount_image(&self) {
        for dir in ["changes/upper", "changes/work"] {
            fs::create_dir_all(self.path(dir)).unwrap();
        }
        let [upper, work] = ["upper", "work"].map(|dir| self.path("changes").join(dir).display().to_string());
        let (lower, more) = (self.base.display(), self.options);
        self.mount("overlay", &format!("lowerdir={lower},upperdir={upper},workdir={work}{more}"), "image");
    }

    /// Discards all changes of the image.
    pub fn renew(&self) {
        unmount(&self.path("image"));
        for dir in ["upper", "work"] {
            ImageTree::open_dir(&self.path("changes")).unwrap().remove_tree_content(dir, &|_| false).unwrap();
        }
        self.mount_image();
    }

    pub fn base(&self) -> &Path {
        &self.base
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.temp.path().join(path)
    }

    /// Returns the path on this machine of a path in the image.
    pub fn image(&self, path: &str) -> PathBuf {
        self.path("image").join(path)
    }

    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.image(path)).unwrap_or_else(|error| panic!("{path} in the image: {error}"))
    }

    /// Fails if something is mounted below the image. Call this after a bake.
    pub fn assert_nothing_is_mounted(&self) {
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let below = format!("{}/", self.path("image").display());
        assert!(!mounts.contains(&below), "a mount stays:\n{mounts}");
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // A directory cannot be removed while something is mounted on it.
        for at in ["image", "changes"] {
            _ = Command::new("umount").arg(self.path(at)).status();
        }
    }
}
