//! Mounts `/proc` and `/sys` for a step. Covers every entry through which the step could change the host or read the
//! host's secrets. An entry is covered by another mount on it.

use super::paths::api_directory;
use crate::sys::mount::api::{PLAIN, READ_ONLY, attach, clone_mount, new_file_system, open_plain, restrict};
use anyhow::{Context, Result};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use std::io;

/// The entries of `/proc` that a step cannot even read. They show the host's memory, keys, hardware and kernel log.
const MASKED_IN_PROC: [&str; 13] = [
    "acpi",
    "kcore",
    "keys",
    "kmsg",
    "kpagecgroup",
    "kpagecount",
    "kpageflags",
    "latency_stats",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
    "vmcore",
];
/// The entries of `/sys` that a step cannot even read. Without `firmware`, a boot loader's scripts do not see how the
/// builder was booted.
const MASKED_IN_SYS: [&str; 3] = ["firmware", "devices/virtual/powercap", "kernel/debug"];

/// Mounts a `/proc` that shows only the step's processes. The entries that are not processes belong to the host. So
/// each of them that is a directory or a writable file is hidden or made read-only, even if oven does not know its
/// name.
pub fn mount_proc(root: BorrowedFd<'_>, dev: BorrowedFd<'_>) -> Result<()> {
    let proc = new_file_system("proc", &[], PLAIN | MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
    attach(&proc, api_directory(root, "proc")?).context("mounting /proc")?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listing = rustix::fs::openat(&proc, ".", flags, Mode::empty()).context("opening /proc")?;
    for entry in Dir::read_from(&listing).context("listing /proc")? {
        let entry = entry.context("listing /proc")?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        if name.starts_with('.') || name.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let stat = match rustix::fs::statat(&proc, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat.with_context(|| format!("examining /proc/{name}"))?,
        };
        let is_directory = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => true,
            FileType::RegularFile => false,
            _ => continue, // symlinks to entries of the reading process
        };
        let result = if MASKED_IN_PROC.contains(&name) {
            mask(proc.as_fd(), name, is_directory, dev)
        } else if is_directory || stat.st_mode & 0o222 != 0 {
            freeze(proc.as_fd(), name)
        } else {
            continue;
        };
        result.with_context(|| format!("covering /proc/{name}"))?;
    }
    Ok(())
}

/// Mounts a read-only `/sys` for the step's network namespace. The host's mounts below its `/sys` (control groups, EFI
/// variables, tracing) are not part of this new mount.
pub fn mount_sys(root: BorrowedFd<'_>, dev: BorrowedFd<'_>) -> Result<()> {
    let sys = new_file_system("sysfs", &[], READ_ONLY | MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
    attach(&sys, api_directory(root, "sys")?).context("mounting /sys")?;
    for name in MASKED_IN_SYS {
        match mask(sys.as_fd(), name, true, dev) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // this machine does not have it
            result => result.with_context(|| format!("covering /sys/{name}"))?,
        }
    }
    Ok(())
}

/// Makes an entry read-only with a bind mount on itself.
fn freeze(dir: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let cover = clone_mount(dir, name, false)?;
    restrict(&cover, READ_ONLY | MountAttrFlags::MOUNT_ATTR_NOEXEC, false)?;
    attach(cover, open_plain(dir, name)?)
}

/// Hides an entry under an empty directory or `/dev/null`.
fn mask(dir: BorrowedFd<'_>, name: &str, is_directory: bool, dev: BorrowedFd<'_>) -> io::Result<()> {
    let on = open_plain(dir, name)?;
    if is_directory {
        let empty = new_file_system("tmpfs", &[("mode", "0555"), ("nr_inodes", "2")], READ_ONLY)
            .map_err(io::Error::other)?;
        return attach(empty, on);
    }
    attach(clone_mount(dev, "null", false)?, on)
}
