//! Reads and writes SELinux labels, which are extended attributes.

use super::tree::ImageTree;
use crate::text::escape_name;
use anyhow::{Context, Result};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{OFlags, XattrFlags};
use rustix::io::Errno;
use std::time::{SystemTime, UNIX_EPOCH};

const ATTRIBUTE: &str = "security.selinux";
/// The maximum size of a label in bytes. The kernel's own limit is a page.
const MAX: usize = 4096;

impl ImageTree {
    /// Labels an object itself. A symlink is not followed. Returns false if the object does not exist.
    pub fn set_label(&self, path: &str, label: &str) -> Result<bool> {
        let doing = || format!("labelling {} in the image", escape_name(path));
        let Some((held, place)) = self.pinned_path(path).with_context(doing)? else { return Ok(false) };
        // The value ends with a zero byte, as libselinux writes it.
        let value = [label.as_bytes(), b"\0"].concat();
        let name = place.rsplit('/').next().unwrap_or(".");
        let mut set = || rustix::fs::lsetxattr(&place, ATTRIBUTE, &value, XattrFlags::empty());
        match self.change(&held, name, &escape_name(path), &mut set).with_context(doing)?.result {
            Err(Errno::NOENT) => Ok(false),
            set => set.with_context(doing).map(|()| true),
        }
    }

    /// Returns an object's label, if it has one.
    pub fn label(&self, path: &str) -> Result<Option<String>> {
        let doing = || format!("reading the label of {} in the image", escape_name(path));
        let Some((_held, place)) = self.pinned_path(path).with_context(doing)? else { return Ok(None) };
        let mut value = vec![0u8; MAX];
        match rustix::fs::lgetxattr(&place, ATTRIBUTE, &mut value) {
            Err(Errno::NODATA | Errno::NOENT) => Ok(None),
            length => {
                value.truncate(length.with_context(doing)?);
                Ok(Some(String::from_utf8_lossy(&value).trim_end_matches('\0').to_owned()))
            }
        }
    }

    /// Returns whether an object's content, owner, mode or attributes changed since `then`.
    pub fn changed_since(&self, path: &str, then: SystemTime) -> Result<bool> {
        let Some(stat) = self.metadata(path)? else { return Ok(false) };
        let then = then.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(i128::from(stat.st_ctime) >= i128::from(then.as_secs()))
    }

    /// Returns a path to an object, and the open directory that contains the object. The path consists of the
    /// directory's entry in `/proc/self/fd` and one name, so symlinks cannot redirect it. The path is valid while the
    /// directory is open.
    fn pinned_path(&self, path: &str) -> Result<Option<(OwnedFd, String)>> {
        let (parent, name) = path.trim_end_matches('/').rsplit_once('/').unwrap_or(("", ""));
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let held = match self.open(parent, flags) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            held => held?,
        };
        anyhow::ensure!(name != "..", "`..` is not a name");
        let name = if name.is_empty() { "." } else { name };
        let place = format!("/proc/self/fd/{}/{name}", held.as_raw_fd());
        Ok(Some((held, place)))
    }
}

#[cfg(test)]
mod tests {
    use crate::image::test::Tree;

    /// Setting labels needs root. Without root, the kernel's error is returned. The test checks in both cases that no
    /// other object is changed.
    #[test]
    fn a_label_is_the_objects_own() {
        let tree = Tree::new();
        tree.file("etc/passwd", "x");
        tree.link("/etc/passwd", "link");
        tree.link("/", "etc/up");
        let inside = tree.tree();
        if !rustix::process::geteuid().is_root() {
            assert!(
                inside.set_label("/etc/passwd", "a:b:c").unwrap_err().to_string().contains("/etc/passwd")
            );
            return;
        }
        for path in ["/link", "/", "/etc"] {
            assert!(inside.set_label(path, &format!("u:r:{}:s0", path.len())).unwrap(), "{path}");
            assert_eq!(inside.label(path).unwrap(), Some(format!("u:r:{}:s0", path.len())));
        }
        assert_eq!(inside.label("/etc/passwd").unwrap(), None, "a link is not followed");
        assert!(inside.set_label("/etc/up/etc/passwd", "u:r:t:s0").unwrap(), "links on the way lead inside");
        assert_eq!(inside.label("/etc/passwd").unwrap().as_deref(), Some("u:r:t:s0"));
        assert!(
            !inside.set_label("/nowhere/x", "a:b:c").unwrap() && !inside.set_label("/x", "a:b:c").unwrap()
        );
        assert!(inside.set_label("/etc/..", "a:b:c").is_err());
    }
}
