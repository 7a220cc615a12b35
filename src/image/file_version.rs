//! Which file an object is, and when it was created and written.

use super::tree::{ImageTree, absent};
use crate::text::escape_name;
use anyhow::{Context, Result};
use rustix::fs::{AtFlags, OFlags, StatxFlags};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::AsFd;

/// A time in nanoseconds since 1970.
pub type Nanoseconds = i128;

/// The numbers of a file's device, and its inode.
pub type FileId = (u32, u32, u64);

/// A file with a certain content. It does not change if only the name, the owner, the mode or the number of links
/// changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileVersion {
    pub id: FileId,
    pub size: u64,
    /// The time at which the file was created. No call can change it. Some file systems do not record it.
    pub created: Option<Nanoseconds>,
    /// The time of the last change of the content. Every program can set it to any value.
    pub modified: Nanoseconds,
}

impl FileVersion {
    /// Returns the version of the object `name` in a directory. If `name` is empty, `dir` is the object itself.
    pub(crate) fn of(dir: impl AsFd, name: &CStr) -> rustix::io::Result<Self> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
        let found = rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME)?;
        let has_created = found.stx_mask & StatxFlags::BTIME.bits() != 0;
        let (created, modified) = (found.stx_btime, found.stx_mtime);
        Ok(Self {
            id: (found.stx_dev_major, found.stx_dev_minor, found.stx_ino),
            size: found.stx_size,
            created: has_created.then(|| nanoseconds(created.tv_sec, created.tv_nsec)),
            modified: nanoseconds(modified.tv_sec, modified.tv_nsec),
        })
    }
}

pub fn nanoseconds(seconds: impl Into<i128>, nanoseconds: impl Into<i128>) -> Nanoseconds {
    seconds.into() * 1_000_000_000 + nanoseconds.into()
}

impl ImageTree {
    /// Returns the version of the object itself. A symlink is not followed. Returns `None` if it does not exist.
    pub fn version(&self, path: &str) -> Result<Option<FileVersion>> {
        let doing = || format!("examining {} in the image", escape_name(path));
        self.count_object().with_context(doing)?;
        match self.open(path, OFlags::PATH | OFlags::NOFOLLOW) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => Ok(None),
            found => absent(FileVersion::of(found.with_context(doing)?, c"")).with_context(doing),
        }
    }
}
