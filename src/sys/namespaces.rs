//! Namespaces of the calling thread. Threads and processes that this thread starts later begin in the same namespaces.

use super::mount::api;
use crate::error::Kind;
use anyhow::{Context, Result};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, UnmountFlags, unmount};
use rustix::thread::UnshareFlags;
use std::io;
use std::os::fd::AsFd;

/// Moves this thread into new namespaces.
///
/// # Errors
/// EINVAL for [`UnshareFlags::FILES`]. With separate descriptor tables, a descriptor number could mean
/// different files in different threads.
#[allow(unsafe_code)]
pub fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    if flags.contains(UnshareFlags::FILES) {
        return Err(Errno::INVAL);
    }
    // SAFETY: only unsharing the descriptors is unsafe, and this is refused above.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Moves this process into a private mount namespace. Its later mounts are invisible to other processes, and the kernel
/// removes them when the process ends. Call this before a second thread exists, because it changes only the namespace
/// of the calling thread.
pub fn private_mounts() -> Result<()> {
    unshare(UnshareFlags::NEWNS).map_err(|error| {
        Kind::Machine
            .failure(format!("this process cannot create a private mount namespace ({error})"))
            .hint("Run oven as root.")
    })?;
    make_mounts_private().map_err(|error| {
        Kind::Machine
            .failure(format!("making the mounts private: {error}"))
            .hint("oven needs root with all its capabilities, and Linux 5.12 or later.")
            .into()
    })
}

/// Makes all mounts of this namespace private, so that mounts are propagated neither to other namespaces nor from them.
pub fn make_mounts_private() -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, "/", flags, Mode::empty())?;
    api::restrict(root, MountAttrFlags::empty(), true)
}

/// Makes `root` the root directory of this process, and detaches the old root lazily. This affects only this namespace,
/// in which nothing else uses the old root.
pub fn pivot_to(root: impl AsFd) -> Result<()> {
    rustix::process::fchdir(root).context("entering the new root")?;
    rustix::process::pivot_root(".", ".").map_err(|error| {
        Kind::Machine
            .failure(format!("pivot_root cannot leave this machine's root ({error})"))
            .hint("oven cannot run from an initial RAM disk. Start it from a system on a disk.")
    })?;
    unmount(".", UnmountFlags::DETACH).context("detaching this machine's root")?;
    rustix::process::chdir("/").context("entering the new root")
}
