//! File descriptors.

use crate::error::Kind;
use anyhow::{Context, Result};
use rustix::fs::{CWD, Mode, OFlags};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Closes all descriptors from `first` on.
#[allow(unsafe_code)]
pub(crate) fn close_from(first: i32) -> Result<()> {
    // SAFETY: after this call, no thread that shares this thread's descriptor table uses or drops a value that owns a
    // descriptor from `first` on.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).context("closing inherited descriptors");
    }
    Ok(())
}

/// Opens a file or directory of this machine. If `within` is given, it is the canonical path of a directory, and the
/// opened file must be in that directory. oven checks the open file instead of the path, so nobody can exchange the
/// file after the check.
pub(crate) fn open_within(path: &Path, within: Option<&Path>, flags: OFlags) -> Result<OwnedFd> {
    let opening = || format!("opening {}", path.display());
    let fd = rustix::fs::openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty());
    let fd = fd.with_context(opening)?;
    let Some(within) = within else { return Ok(fd) };
    let real = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).with_context(opening)?;
    if !real.starts_with(within) {
        let (path, real, within) = (path.display(), real.display(), within.display());
        return Err(Kind::Definition
            .failure(format!("{path} resolves to {real}, which is outside the project {within}"))
            .hint("The path led into the project when the definition was read. Do not change it during the bake.")
            .into());
    }
    Ok(fd)
}

/// Opens a directory that is used for mounts. Fails if the path is a symbolic link.
pub fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(CWD, path, flags, Mode::empty());
    opened.with_context(|| format!("opening {}", path.display()))
}
