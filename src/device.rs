//! Block devices: an open disk, and the device nodes of a disk.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// A whole disk, opened and verified. Dropping this value closes the disk. A loop device is then detached by the
/// kernel.
#[derive(Debug)]
pub struct Device {
    /// Open for reading and writing. Code that needs a path uses `/proc/self/fd/N`.
    pub node: OwnedFd,
    /// For messages only.
    pub path: PathBuf,
    /// The device number of the node.
    pub rdev: u64,
    /// Identifies the volume: its serial number on NVMe, or its id in the local region.
    pub serial: String,
    /// Set only if oven itself serves the disk. Then the process that serves the disk must know which discards are
    /// trims.
    pub trimming: Option<Arc<dyn Trimming>>,
}

/// Marks a period in which all discards of a disk are trims. A trim discards only the free space of a file system. For
/// a trim, the process that serves the disk (the server) does not have to overwrite the base snapshot's blocks with
/// zeros. The server cannot recognize a trim by itself: the loop device punches a hole for a discard, but also for a
/// range that has to become zeros.
pub trait Trimming: fmt::Debug + Send + Sync {
    /// Begins the period. Before [`Self::end`] is called, nothing must write zeros to the disk: no step must run, and
    /// the kernel must not be zeroing inode tables.
    fn begin(&self) -> io::Result<()>;

    fn end(&self) -> io::Result<()>;
}

/// A trim in progress. Dropping it ends the trim.
#[derive(Debug)]
pub struct Trim(Arc<dyn Trimming>);

impl Trim {
    pub fn begin(trimming: Arc<dyn Trimming>) -> io::Result<Self> {
        trimming.begin()?;
        Ok(Self(trimming))
    }
}

impl Drop for Trim {
    fn drop(&mut self) {
        if let Err(error) = self.0.end() {
            eprintln!("oven: cannot end the discard of free space: {error}");
        }
    }
}

/// A block device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Relative to `/dev`, such as `loop0p1`.
    pub name: String,
    pub rdev: u64,
    /// Symbolic links to the node, relative to `/dev`, such as `disk/by-uuid/…`.
    pub links: Vec<String>,
}

/// Escapes unsafe characters of a name as udev does in a link. For example, `/` becomes `\x2f`.
pub fn link_name(id: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "#+-.:=@_".contains(c);
    let mut out = String::new();
    for (index, c) in id.chars().enumerate() {
        // A leading `.` is escaped, because `.` and `..` are not valid names, and udev makes no hidden links.
        if plain(c) && !(index == 0 && c == '.') {
            out.push(c);
        } else {
            let mut bytes = [0; 4];
            c.encode_utf8(&mut bytes).bytes().for_each(|b| out += &format!("\\x{b:02x}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_links_are_names() {
        assert_eq!(link_name("cloudimg-rootfs"), "cloudimg-rootfs");
        assert_eq!(link_name("EFI System"), "EFI\\x20System");
        assert_eq!(link_name("../../etc"), "\\x2e.\\x2f..\\x2fetc");
        assert_eq!(link_name("ü"), "ü");
        assert_eq!(link_name("a\\b\u{fffd}"), "a\\x5cb\\xef\\xbf\\xbd");
    }
}
