//! Stores the first error of a disk. The file system on the disk only gets an I/O error, without the reason.

use crate::error::Kind;
use crate::sys::lock::lock_mutex;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

/// The first error of a disk, which is the cause of later errors. Clones share the error.
#[derive(Debug, Clone, Default)]
pub struct FirstFault(Arc<Mutex<Option<anyhow::Error>>>);

impl FirstFault {
    pub fn add(&self, error: anyhow::Error) {
        lock_mutex(&self.0).get_or_insert(error);
    }

    /// Removes and returns the error, so that it is reported only once.
    pub fn take(&self) -> Option<anyhow::Error> {
        lock_mutex(&self.0).take()
    }
}

/// Returns the failure for an I/O error on this machine's disk. `doing` is a gerund with the path, such as "writing …".
pub fn disk_error(error: io::Error, doing: &str) -> anyhow::Error {
    let hint = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "Free some space on that disk, and bake again.",
        _ => "The kernel's log (dmesg) may say more.",
    };
    anyhow::Error::from(Kind::Machine.failure(&error).hint(hint)).context(doing.to_owned())
}

/// Fails if the kernel could not store data that were written to this open file. After such a failure, a read may not
/// return the data that were written. Does not wait for writes in progress.
#[allow(unsafe_code)]
pub fn ensure_written(file: &File) -> io::Result<()> {
    let end = file.metadata()?.len().try_into().unwrap_or(i64::MAX - 1);
    // The range is beyond the end of the file, so the call does not wait. But it reports write errors of the whole
    // file.
    // SAFETY: the call takes only numbers, and the descriptor is open.
    let status =
        unsafe { libc::sync_file_range(file.as_raw_fd(), end, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE) };
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EIO | libc::ENOSPC | libc::EDQUOT) if status != 0 => Err(error),
        // The call succeeded, or the file system does not support it.
        _ => Ok(()),
    }
}
