//! Block devices: a whole disk that is held open, and nodes of it.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// A whole disk, verified and open. Dropping it releases the disk: a loop device detaches itself.
#[derive(Debug)]
pub struct Device {
    /// Open for reading and writing. Code that needs a path uses `/proc/self/fd/N`.
    pub node: OwnedFd,
    /// For messages only.
    pub path: PathBuf,
    /// The device number of the node.
    pub rdev: u64,
    /// The volume that the device was verified to be: its serial on NVMe, its id in the local region.
    pub serial: String,
    /// Set if the disk's server has to distinguish discarded free space from ranges to be zeroed.
    pub trimming: Option<Arc<dyn Trimming>>,
}

/// Tells whoever serves a disk that what is discarded for now is free space of a file system, so that nothing of the
/// base has to change for it. (A discard and a range that has to become zeros are the same request by the time they
/// arrive there: the loop device punches a hole for both.)
pub trait Trimming: fmt::Debug + Send + Sync {
    /// Only where nothing else zeroes ranges at the same time: no step runs, and the kernel zeroes no inode tables.
    fn begin(&self) -> io::Result<()>;

    fn end(&self) -> io::Result<()>;
}

/// A trim, until it is dropped.
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
            eprintln!("oven: finishing the discard of free space failed: {error}");
        }
    }
}

/// A block device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// In `/dev`: `loop0p1`.
    pub name: String,
    pub rdev: u64,
    /// Below `/dev`: `disk/by-uuid/…`.
    pub links: Vec<String>,
}

/// A name as udev spells it in a link: characters that are not safe in a name are escaped, as in `\x2f`.
pub fn link_name(id: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "#+-.:=@_".contains(c);
    let mut out = String::new();
    for (index, c) in id.chars().enumerate() {
        // `.` and `..` are no names, and udev makes no hidden ones.
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
