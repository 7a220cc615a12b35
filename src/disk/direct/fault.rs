//! What went wrong beneath a file system, which itself only learns that something did.

use super::overlay::lock;
use crate::error::Kind;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

/// The first cause; what follows from it says less. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Trouble(Arc<Mutex<Option<anyhow::Error>>>);

impl Trouble {
    pub fn add(&self, error: anyhow::Error) {
        lock(&self.0).get_or_insert(error);
    }

    /// Once: who has it tells it.
    pub fn take(&self) -> Option<anyhow::Error> {
        lock(&self.0).take()
    }
}

/// An error of this machine's own disk, while doing something (a gerund, which names the place).
pub fn full(error: io::Error, doing: &str) -> anyhow::Error {
    let hint = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "Free space there. Nothing was kept of the bake.",
        _ => "The kernel's log (dmesg) may say more.",
    };
    anyhow::Error::from(Kind::Machine.failure(&error).hint(hint)).context(doing.to_owned())
}

/// Fails if something that was written to this open file did not reach its disk: what is read of it may be something
/// else by now. It waits for nothing.
#[allow(unsafe_code)]
pub fn ensure_kept(file: &File) -> io::Result<()> {
    let end = file.metadata()?.len().try_into().unwrap_or(i64::MAX - 1);
    // Of a range in which nothing is: what went wrong is told of all of the file.
    // SAFETY: the call takes numbers, and the descriptor is open.
    let told = unsafe { libc::sync_file_range(file.as_raw_fd(), end, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE) };
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EIO | libc::ENOSPC | libc::EDQUOT) if told != 0 => Err(error),
        // It cannot be asked here.
        _ => Ok(()),
    }
}
