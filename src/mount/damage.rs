//! Errors about damaged file systems. The base image is at fault if the kernel found wrong metadata; this machine is at
//! fault if its storage failed.

use super::partitions::DiskPart;
use crate::error::Kind;
use crate::formats::superblock::ErrorCodes;
use rustix::io::Errno;
use std::io;

const BASE: &str = "Use another base image, or repair this one: run `e2fsck -f` or `xfs_repair` on this partition of a \
                    copy of its disk. The kernel's log (dmesg) may say more.";
const STORAGE: &str =
    "The base image's file system or this machine's storage is damaged. See the kernel's log (dmesg).";

/// An error about a damaged file system. `what` says what was found. `is_base` is true if the kernel found wrong
/// metadata, so that the base image is at fault.
pub fn error(what: &str, is_base: bool) -> anyhow::Error {
    let (kind, hint) = if is_base { (Kind::Definition, BASE) } else { (Kind::Machine, STORAGE) };
    kind.failure(what).hint(hint).into()
}

/// If an error came from wrong metadata in the file system of this partition, returns an error that says so. Otherwise
/// returns the same error.
pub fn explain(error: anyhow::Error, part: &DiskPart) -> anyhow::Error {
    let is_damage = error.chain().any(|cause| {
        let errno = cause.downcast_ref::<Errno>().copied();
        let errno = errno.or_else(|| Errno::from_io_error(cause.downcast_ref::<io::Error>()?));
        matches!(errno, Some(Errno::UCLEAN | Errno::BADMSG))
    });
    if is_damage { self::error(&format!("{} is damaged: {error:#}", part.describe()), true) } else { error }
}

/// Returns the codes of the errors that the kernel recorded in a mounted ext file system.
pub fn recorded_codes(name: &str) -> ErrorCodes {
    let code = |which: &str| {
        let text = std::fs::read_to_string(format!("/sys/fs/ext4/{name}/{which}_error_errcode")).ok()?;
        text.trim().parse().ok()
    };
    ErrorCodes { first: code("first").unwrap_or(0), last: code("last").unwrap_or(0) }
}
