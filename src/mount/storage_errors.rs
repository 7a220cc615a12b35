//! Finds out from the kernel's log whether a disk had I/O errors.
//!
//! If xfs or vfat meets wrong metadata or a failed read, the result is the same: the kernel shuts the file system down,
//! or makes it read-only. Only the kernel's log says which one it was. Steps cannot write to this log. The kernel logs at
//! most ten failed requests of all disks in five seconds, so a single one may be missing if other disks fail, too.

use rustix::fs::{CWD, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::cell::Cell;
use std::os::fd::OwnedFd;

/// The maximum size of a record in bytes (`PRINTK_MESSAGE_MAX` of the kernel).
const RECORD_MAX: usize = 8192;

/// Watches the kernel's log for I/O errors of one disk.
pub struct StorageErrors {
    /// `None` if this process cannot read the log.
    log: Option<OwnedFd>,
    /// The kernel's name of the whole disk, such as `nvme1n1`.
    disk: String,
    found: Cell<bool>,
}

impl StorageErrors {
    /// Starts to watch. Earlier errors do not count.
    pub fn watch(disk: &str) -> Self {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let log = rustix::fs::openat(CWD, "/dev/kmsg", flags, Mode::empty());
        let log = log.and_then(|log| rustix::fs::seek(&log, SeekFrom::End(0)).map(|_| log));
        Self { log: log.ok(), disk: disk.to_owned(), found: Cell::new(false) }
    }

    /// Returns whether the disk has had an I/O error. If this process cannot read the log, returns false.
    pub fn found(&self) -> bool {
        let mut record = [0; RECORD_MAX];
        while let Some(log) = self.log.as_ref().filter(|_| !self.found.get()) {
            match rustix::io::read(log, &mut record[..]) {
                Ok(length @ 1..) => {
                    self.found.set(is_storage_error(&String::from_utf8_lossy(&record[..length]), &self.disk));
                }
                // The kernel has overwritten the next records, or the read was interrupted.
                Err(Errno::PIPE | Errno::INTR) => {}
                _ => break,
            }
        }
        self.found.get()
    }
}

/// Returns whether a record says that a request to this disk failed. The format is `…;I/O error, dev loop0, sector 8 …`.
/// Other words than `I/O` are possible, and older kernels put the name of a function before them. A text with other
/// characters before ` error` is not from the block layer, but may contain names from the image.
fn is_storage_error(record: &str, disk: &str) -> bool {
    let message = record.split_once(';').map_or("", |(_, message)| message);
    let Some((words, rest)) = message.split_once(" error, dev ") else { return false };
    words.chars().all(|c| c.is_ascii_alphabetic() || "/ :_".contains(c))
        && rest.strip_prefix(disk).is_some_and(|rest| rest.starts_with(", sector "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failed_requests_to_the_disk_count() {
        for (message, expected) in [
            ("I/O error, dev loop0, sector 8 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2", true),
            ("blk_update_request: I/O error, dev loop0, sector 8 op 0x0:(READ) flags 0x0", true),
            ("critical medium error, dev loop0, sector 8 op 0x0:(READ) flags 0x0", true),
            ("I/O error, dev loop01, sector 8 op 0x0:(READ) flags 0x0", false),
            (
                "XFS (loop0): metadata I/O error in \"xfs_btree_read_buf_block\" at daddr 0x20 len 8 error 74",
                false,
            ),
            ("EXT4-fs error (device loop0): name=I/O error, dev loop0, sector 8", false),
        ] {
            assert_eq!(
                is_storage_error(&format!("3,901,123456,-;{message}\n"), "loop0"),
                expected,
                "{message}"
            );
        }
        assert!(!is_storage_error("I/O error, dev loop0, sector 8", "loop0"));
    }
}
