//! Errors about damaged file systems. If the kernel found wrong metadata, the base image is at fault, or a step that
//! wrote to the disk below the file system. If the storage failed, this machine is at fault.

use super::partitions::DiskPart;
use crate::error::{Kind, hint_of};
use crate::formats::superblock::ErrorCodes;
use rustix::io::Errno;
use std::io;

/// The hint for damage that the base image has.
pub const BASE_HINT: &str = "Use another base image, or repair this one: run `e2fsck -f` or `xfs_repair` on this partition of a \
                    copy of its disk. The kernel's log (dmesg) may say more.";
const STORAGE: &str =
    "The base image's file system or this machine's storage is damaged. See the kernel's log (dmesg).";
/// The hint for damage by a step. Steps can write to the device only if the definition has `[disk] writable = true`.
pub const STEP_HINT: &str = "Find the script that writes to the block device instead of to files.";

/// What damaged a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DamageCause {
    BaseImage,
    /// A step that may write to the disk below the file system.
    Step,
    Storage,
}

/// An error about a damaged file system. `what` says what was found.
pub fn error(what: &str, cause: DamageCause) -> anyhow::Error {
    let (kind, hint) = match cause {
        DamageCause::BaseImage => (Kind::Definition, BASE_HINT),
        DamageCause::Step => (Kind::Step, STEP_HINT),
        DamageCause::Storage => (Kind::Machine, STORAGE),
    };
    kind.failure(what).hint(hint).into()
}

/// Returns whether an error is about a damaged file system, and not about the storage. Such an error has one of the two
/// hints.
pub fn is_damage(error: &anyhow::Error) -> bool {
    hint_of(error).is_some_and(|hint| hint == BASE_HINT || hint == STEP_HINT)
}

/// If an error came from wrong metadata in the file system of this partition, returns an error that says so. Otherwise
/// returns the same error.
pub fn explain(error: anyhow::Error, part: &DiskPart) -> anyhow::Error {
    let is_damage = error.chain().any(|cause| {
        let errno = cause.downcast_ref::<Errno>().copied();
        let errno = errno.or_else(|| Errno::from_io_error(cause.downcast_ref::<io::Error>()?));
        matches!(errno, Some(Errno::UCLEAN | Errno::BADMSG))
    });
    if !is_damage {
        return error;
    }
    self::error(&format!("{} is damaged: {error:#}", part.describe()), DamageCause::BaseImage)
}

/// Returns the codes of the errors that the kernel recorded in a mounted ext file system.
pub fn recorded_codes(name: &str) -> ErrorCodes {
    let code = |which: &str| {
        let text = std::fs::read_to_string(format!("/sys/fs/ext4/{name}/{which}_error_errcode")).ok()?;
        text.trim().parse().ok()
    };
    ErrorCodes { first: code("first").unwrap_or(0), last: code("last").unwrap_or(0) }
}
