//! A position in a directory tree that is not trusted. It needs two open descriptors, however deep the tree is.

use super::tree::open_in;
use anyhow::{Context, Result, ensure};
use rustix::fs::{OFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

/// The device and the inode of a directory.
type DirectoryId = (u64, u64);

/// A directory at or below the top of a tree. Symlinks are never followed, and mounts are never entered.
pub(crate) struct DirectoryCursor {
    top: OwnedFd,
    /// The open directory, unless it is the top.
    current: Option<OwnedFd>,
    /// The directories on the way from the top to the current directory, both included. They show that `..` leads back
    /// to the directory from which the cursor came.
    ids: Vec<DirectoryId>,
}

impl DirectoryCursor {
    /// `top` is a descriptor of a directory that is open for reading.
    pub fn new(top: OwnedFd) -> Result<Self> {
        let ids = vec![id_of(&top)?];
        Ok(Self { top, current: None, ids })
    }

    /// Returns the current directory.
    pub fn dir(&self) -> &OwnedFd {
        self.current.as_ref().unwrap_or(&self.top)
    }

    /// Enters a directory of the current directory. Returns false and stays if `name` is not a directory any more, or if
    /// something is mounted on it.
    pub fn enter(&mut self, name: &CStr) -> Result<bool> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let inner = match open_in(self.dir().as_fd(), name, flags, resolve) {
            Err(Errno::XDEV | Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => return Ok(false),
            inner => inner?,
        };
        self.ids.push(id_of(&inner)?);
        self.current = Some(inner);
        Ok(true)
    }

    /// Returns to the parent of the current directory. The current directory must not be the top.
    pub fn leave(&mut self) -> Result<()> {
        self.ids.pop();
        if self.ids.len() == 1 {
            self.current = None;
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let parent = open_in(self.dir().as_fd(), c"..", flags, resolve).context("opening its parent")?;
        let is_known = self.ids.last() == Some(&id_of(&parent)?);
        ensure!(is_known, "another process moved the directory");
        self.current = Some(parent);
        Ok(())
    }
}

#[allow(clippy::unnecessary_cast, reason = "their types depend on the machine")]
fn id_of(dir: &OwnedFd) -> Result<DirectoryId> {
    let stat = rustix::fs::fstat(dir).context("examining a directory")?;
    Ok((stat.st_dev as u64, stat.st_ino as u64))
}
