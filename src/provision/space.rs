//! Checks the free space on the image's disk.

use crate::error::{Kind, errno_of};
use crate::mount::damage::STEP_HINT;
use anyhow::{Context, Error, Result};
use rustix::io::Errno;
use std::path::Path;

/// The hint for a full disk.
pub const LARGER_DISK_HINT: &str = "Use a larger disk: set `size_gib` of `[disk]` in image.toml.";

/// The hint for a full file system of a step that is in memory.
pub const LARGER_MEMORY_HINT: &str =
    "Write less to this place, or use a builder with more memory: the limit grows with it.";

/// The hint for damage that the kernel finds if steps cannot write to the mounted device. Then the base has the damage.
const BASE_DAMAGE_HINT: &str =
    "The base image's file system is damaged. The kernel's log (dmesg) says where.";

/// The disk counts as full if at most 1/1024 of it is free. Then a write may have failed, even if no program reported
/// an error.
const MIN_FREE_SHARE: u64 = 1024;

/// ext4 reports its reserved blocks as free. It reserves 1/50 of all blocks, but at most 4096 blocks
/// (ext4_calculate_resv_clusters).
const EXT4_RESERVE: (u64, u64) = (50, 4096);

/// The space of a file system. Each pair has the number of free units and the total number.
#[derive(Debug, Clone, Copy)]
pub struct DiskSpace {
    blocks: (u64, u64),
    /// The numbers of inodes. Both are zero if the file system creates inodes as needed.
    files: (u64, u64),
}

impl DiskSpace {
    pub fn of(root: &Path) -> Result<Self> {
        let measure =
            || -> rustix::io::Result<_> { Ok((rustix::fs::statvfs(root)?, rustix::fs::statfs(root)?)) };
        let (stat, of_type) = measure().with_context(|| format!("measuring {}", root.display()))?;
        let ext4 = of_type.f_type as u64 == libc::EXT4_SUPER_MAGIC as u64;
        let reserved = if ext4 { (stat.f_blocks / EXT4_RESERVE.0).min(EXT4_RESERVE.1) } else { 0 };
        Ok(Self {
            blocks: (stat.f_bfree.saturating_sub(reserved), stat.f_blocks),
            files: (stat.f_ffree, stat.f_files),
        })
    }

    pub fn is_full(&self) -> bool {
        let low = |(free, all): (u64, u64)| all > 0 && free <= all / MIN_FREE_SHARE;
        low(self.blocks) || low(self.files)
    }

    /// Fails if the disk became full after this value was measured.
    pub fn ensure_not_full(&self, root: &Path) -> Result<()> {
        let now = Self::of(root)?;
        if self.is_full() || !now.is_full() {
            return Ok(());
        }
        let what =
            if now.blocks.0 <= now.blocks.1 / MIN_FREE_SHARE { "space" } else { "room for files (inodes)" };
        Err(Kind::Step
            .failure(format!(
                "no {what} is left on the image's disk, so a step may not have written all of its files"
            ))
            .hint(LARGER_DISK_HINT)
            .into())
    }
}

/// Explains a failure of oven's own writes to the image if the disk is full or broken. `step_wrote` says whether a step
/// may have written to the disk below its file systems.
pub fn explain_full_disk(error: Error, step_wrote: bool) -> Error {
    let (damage, hint) =
        if step_wrote { (Kind::Step, STEP_HINT) } else { (Kind::Definition, BASE_DAMAGE_HINT) };
    match errno_of(&error) {
        Some(Errno::NOSPC | Errno::DQUOT) => {
            Kind::Step.failure(format!("the image's disk is full: {error:#}")).hint(LARGER_DISK_HINT).into()
        }
        // This error means that the kernel found damage and made the file system read-only.
        Some(Errno::ROFS) => {
            damage.failure(format!("the image's file system became read-only: {error:#}")).hint(hint).into()
        }
        Some(Errno::UCLEAN | Errno::BADMSG) => {
            damage.failure(format!("the image's file system is damaged: {error:#}")).hint(hint).into()
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::hint_of;

    #[test]
    fn a_full_disk_is_explained_whoever_says_it() {
        let io = Error::from(std::io::Error::from_raw_os_error(libc::ENOSPC)).context("writing /x");
        for error in [io, Error::from(Errno::NOSPC).context("writing /x")] {
            let error = explain_full_disk(error, false);
            assert!(error.to_string().starts_with("the image's disk is full: writing /x: "), "{error}");
            assert_eq!((Kind::of(&error), hint_of(&error).as_deref()), (Kind::Step, Some(LARGER_DISK_HINT)));
        }
        for (errno, words) in [(Errno::ROFS, "became read-only"), (Errno::UCLEAN, "is damaged")] {
            for (step_wrote, kind) in [(false, Kind::Definition), (true, Kind::Step)] {
                let error = explain_full_disk(errno.into(), step_wrote);
                assert!(error.to_string().contains(words), "{error}");
                assert_eq!(Kind::of(&error), kind);
            }
        }
        assert_eq!(
            explain_full_disk(Error::from(Errno::ACCESS).context("writing /x"), true).to_string(),
            "writing /x"
        );
    }

    #[test]
    fn full_is_the_last_thousandth() {
        let space = |blocks, files| DiskSpace { blocks, files }.is_full();
        assert!(!space((100, 1000), (0, 0)), "files made as needed are never short");
        assert!(space((0, 1000), (0, 0)) && space((5, 100_000), (9, 10)));
        assert!(space((500, 1000), (0, 65536)));
        assert!(!DiskSpace::of(Path::new("/")).unwrap().is_full());
    }
}
