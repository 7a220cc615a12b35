//! Walks directories of a tree that is not trusted. Directories are opened by descriptors, and symlinks are not
//! followed. A tree may have any depth.

use super::cursor::DirectoryCursor;
use super::tree::{ImageTree, NameList, absent, ensure_regular, os_string};
use crate::text::escape_name;
use anyhow::{Context, Result};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsString};
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

/// The maximum size in bytes of the names that a walk remembers: those in the directories at and above the current one.
/// A directory with a million names of usual lengths needs about 60 MiB.
const NAMES_MAX: usize = 96 << 20;

/// Whether a walk enters an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// The walk enters the object if it is a directory.
    On,
    /// The walk does not enter the object.
    Past,
}

/// An object that a walk visits.
pub struct WalkEntry<'a> {
    /// The path, which begins with the walk's path as it was given. A name that is not UTF-8 is not exact in it. And the
    /// path may be longer than the kernel permits, so methods of this type open the object by its directory.
    pub path: &'a str,
    /// The object's own metadata.
    pub stat: &'a Stat,
    dir: BorrowedFd<'a>,
    name: &'a CStr,
}

impl WalkEntry<'_> {
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// Returns the last name of the path.
    pub fn name(&self) -> &[u8] {
        self.name.to_bytes()
    }

    /// Opens a regular file for reading. Returns `None` if the file does not exist any more.
    pub fn open_file(&self) -> Result<Option<File>> {
        self.open(OFlags::RDONLY)
    }

    /// Returns the text of a symlink.
    pub fn read_link(&self) -> Result<OsString> {
        let target = rustix::fs::readlinkat(self.dir, self.name, Vec::new());
        let target = target.with_context(|| format!("reading the link {} in the image", self.path))?;
        Ok(OsString::from_vec(target.into_bytes()))
    }

    /// Removes an object that is not a directory.
    pub fn remove(&self) -> Result<()> {
        match rustix::fs::unlinkat(self.dir, self.name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            done => done.with_context(|| format!("removing {} in the image", self.path)),
        }
    }

    /// Empties a regular file.
    pub fn truncate(&self) -> Result<()> {
        match self.open(OFlags::WRONLY)? {
            Some(file) => file.set_len(0).with_context(|| format!("emptying {} in the image", self.path)),
            None => Ok(()),
        }
    }

    fn open(&self, flags: OFlags) -> Result<Option<File>> {
        if self.kind() != FileType::RegularFile {
            return Ok(None);
        }
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let opened = absent(rustix::fs::openat(self.dir, self.name, flags, Mode::empty()));
        let opened = opened.with_context(|| format!("opening {} in the image", self.path))?;
        let Some(file) = opened else { return Ok(None) };
        ensure_regular(&file, self.path)?;
        Ok(Some(File::from(file)))
    }
}

/// A directory at or above the current position of a walk.
struct WalkLevel {
    /// The names that were not visited yet, in reverse order.
    names: Vec<CString>,
    /// The size of all names of the directory.
    size: usize,
    /// The length of the directory's path.
    path_length: usize,
}

impl ImageTree {
    /// Visits everything below a directory. Each directory is visited before its content. The objects in a directory
    /// are visited in the order of their names. `path` itself may be a symlink. Symlinks below it are visited but not
    /// followed. Other mounts below the directory are not entered. The visitor gets each object's path, which begins
    /// with `path` as it was given, and the object's own metadata. If there is no directory at `path`, nothing is
    /// visited.
    pub fn walk(&self, path: &str, visit: &mut dyn FnMut(&str, &Stat) -> Result<Walk>) -> Result<()> {
        self.walk_entries(path, &mut |entry| visit(entry.path, entry.stat))
    }

    /// Like [`Self::walk`]. The visitor can also read, empty and remove the object.
    pub fn walk_entries(
        &self,
        path: &str,
        visit: &mut dyn FnMut(&WalkEntry<'_>) -> Result<Walk>,
    ) -> Result<()> {
        let doing = || format!("reading the directory {} in the image", escape_name(&path));
        let top = absent(self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)).with_context(doing)?;
        let Some(top) = top else { return Ok(()) };
        let _timer = self.meter().start();
        let mut path = path.trim_end_matches('/').to_owned();
        let mut cursor = DirectoryCursor::new(top).with_context(doing)?;
        let mut levels = vec![self.walk_level(cursor.dir(), &path, 0)?];
        while let Some(level) = levels.last_mut() {
            path.truncate(level.path_length);
            let Some(name) = level.names.pop() else {
                levels.pop();
                if !levels.is_empty() {
                    cursor.leave().with_context(|| format!("leaving {}", escape_name(&path)))?;
                }
                continue;
            };
            push_name(&mut path, &name);
            let stat = match rustix::fs::statat(cursor.dir(), &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                stat => stat.with_context(|| format!("examining {}", escape_name(&path)))?,
            };
            let entry = WalkEntry { path: &path, stat: &stat, dir: cursor.dir().as_fd(), name: &name };
            let is_directory = entry.kind() == FileType::Directory;
            if visit(&entry)? == Walk::On
                && is_directory
                && cursor.enter(&name).with_context(|| format!("opening {}", escape_name(&path)))?
            {
                let size = levels.iter().map(|level| level.size).sum();
                levels.push(self.walk_level(cursor.dir(), &path, size)?);
            }
        }
        Ok(())
    }

    /// Lists a directory. `size` is the size of the names that the walk remembers already.
    fn walk_level(&self, dir: &OwnedFd, path: &str, size: usize) -> Result<WalkLevel> {
        let max = NAMES_MAX.saturating_sub(size);
        let list = self.names_of(dir, path, max).with_context(|| format!("listing {path}"))?;
        let NameList { mut names, size } = list;
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(WalkLevel { names, size, path_length: path.len() })
    }
}

/// Adds a name to the path of its directory.
pub(crate) fn push_name(path: &mut String, name: &CStr) {
    path.push('/');
    path.push_str(&os_string(name).to_string_lossy());
}
