//! Walks directories of a tree that is not trusted. Directories are opened by descriptors, and symlinks are not
//! followed. A path may be longer than the kernel permits in one call.

use super::cursor::DirectoryCursor;
use super::file_version::FileVersion;
use super::tree::{ImageTree, NameList, absent, ensure_regular, os_string};
use crate::text::escape_name;
use anyhow::{Context, Result};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsString};
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

/// The kernel's limit for a path in bytes.
pub(crate) const PATH_MAX: usize = 4096;
/// The memory in bytes that a directory at or above the current one needs besides its names.
pub(crate) const LEVEL_OVERHEAD: usize = 64;

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
    /// The length of the walk's own path, with which `path` begins.
    top: usize,
    tree: &'a ImageTree,
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

    /// Returns the path in a form for messages.
    pub fn shown_path(&self) -> String {
        self.shown().to_string()
    }

    fn shown(&self) -> ShownPath<'_> {
        ShownPath { path: self.path, top: self.top }
    }

    /// Returns the version of the object itself. Returns `None` if it does not exist any more.
    pub fn version(&self) -> Result<Option<FileVersion>> {
        let version = absent(FileVersion::of(self.dir, self.name));
        version.with_context(|| format!("examining {} in the image", self.shown()))
    }

    /// Opens a regular file for reading. Returns `None` if the file does not exist any more.
    pub fn open_file(&self) -> Result<Option<File>> {
        if self.kind() != FileType::RegularFile {
            return Ok(None);
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let opened = absent(rustix::fs::openat(self.dir, self.name, flags, Mode::empty()));
        let opened = opened.with_context(|| format!("opening {} in the image", self.shown()))?;
        let Some(file) = opened else { return Ok(None) };
        ensure_regular(&file, self.path)?;
        Ok(Some(File::from(file)))
    }

    /// Returns the text of a symlink.
    pub fn read_link(&self) -> Result<OsString> {
        let target = rustix::fs::readlinkat(self.dir, self.name, Vec::new());
        let target = target.with_context(|| format!("reading the link {} in the image", self.shown()))?;
        Ok(OsString::from_vec(target.into_bytes()))
    }

    /// Removes an object that is not a directory.
    pub fn remove(&self) -> Result<()> {
        let doing = || format!("removing {} in the image", self.shown());
        let mut unlink = || rustix::fs::unlinkat(self.dir, self.name, AtFlags::empty());
        match self.tree.change(self.dir, self.name, &self.shown(), &mut unlink).with_context(doing)?.result {
            Err(Errno::NOENT) => Ok(()),
            done => done.with_context(doing),
        }
    }

    /// Empties a regular file.
    pub fn truncate(&self) -> Result<()> {
        if self.kind() != FileType::RegularFile {
            return Ok(());
        }
        let doing = || format!("emptying {} in the image", self.shown());
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let mut empty = || {
            let file = rustix::fs::openat(self.dir, self.name, flags, Mode::empty())?;
            match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
                FileType::RegularFile => rustix::fs::ftruncate(&file, 0),
                _ => Ok(()),
            }
        };
        match self.tree.change(self.dir, self.name, &self.shown(), &mut empty).with_context(doing)?.result {
            Err(Errno::NOENT) => Ok(()),
            done => done.with_context(doing),
        }
    }
}

/// A path for messages. If it is longer than the kernel permits, only its length and the directory in which the walk
/// began are shown. A message cannot contain megabytes, and a part of a path could contain a part of a secret.
pub(crate) struct ShownPath<'a> {
    pub path: &'a str,
    /// The length of the walk's own path, with which `path` begins.
    pub top: usize,
}

impl Display for ShownPath<'_> {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        if self.path.len() <= PATH_MAX {
            return out.write_str(&escape_name(self.path));
        }
        let top = escape_name(self.path.get(..self.top).unwrap_or_default());
        write!(out, "{top}/… (a path of {} bytes)", self.path.len())
    }
}

/// A directory at or above the current position of a walk.
struct WalkLevel {
    /// The names that were not visited yet, in reverse order.
    names: Vec<CString>,
    /// The memory in bytes for the names in this directory and in those above it.
    memory: usize,
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
        let doing = || format!("reading the directory {} in the image", escape_name(path));
        let top = absent(self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)).with_context(doing)?;
        let Some(top) = top else { return Ok(()) };
        let _timer = self.meter().start();
        let mut cursor = DirectoryCursor::new(top).with_context(doing)?;
        let mut path = path.trim_end_matches('/').to_owned();
        let top = path.len();
        let mut levels = vec![self.walk_level(cursor.dir(), &ShownPath { path: &path, top }, 0)?];
        while let Some(level) = levels.last_mut() {
            path.truncate(level.path_length);
            let Some(name) = level.names.pop() else {
                levels.pop();
                if !levels.is_empty() {
                    cursor.leave().with_context(|| format!("leaving {}", ShownPath { path: &path, top }))?;
                }
                continue;
            };
            let memory = level.memory;
            push_name(&mut path, &name);
            let shown = ShownPath { path: &path, top };
            let stat = match rustix::fs::statat(cursor.dir(), &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                stat => stat.with_context(|| format!("examining {shown}"))?,
            };
            let (tree, dir) = (self, cursor.dir().as_fd());
            let entry = WalkEntry { path: &path, stat: &stat, top, tree, dir, name: &name };
            let is_directory = entry.kind() == FileType::Directory;
            if visit(&entry)? == Walk::On
                && is_directory
                && cursor.enter(&name).with_context(|| format!("opening {shown}"))?
            {
                levels.push(self.walk_level(cursor.dir(), &shown, memory)?);
            }
        }
        Ok(())
    }

    /// Lists a directory. `above` is the memory for the names in the directories above it.
    fn walk_level(&self, dir: &OwnedFd, at: &ShownPath<'_>, above: usize) -> Result<WalkLevel> {
        let (limits, path_length) = (self.meter().limits(), at.path.len());
        if path_length > limits.path {
            let max = limits.path;
            return Err(self.meter().exceeded(format!("{at} in the image is longer than {max} bytes")));
        }
        let above = above + LEVEL_OVERHEAD;
        let max = limits.names.saturating_sub(above + path_length);
        let list = self.names_of(dir, at, max).with_context(|| format!("listing {at}"))?;
        let NameList { mut names, size } = list;
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(WalkLevel { names, memory: above + size, path_length })
    }
}

/// Adds a name to the path of its directory.
pub(crate) fn push_name(path: &mut String, name: &CStr) {
    path.push('/');
    path.push_str(&os_string(name).to_string_lossy());
}
