//! Resolves paths inside an image, one name at a time, and creates small files without changing the times of their
//! directories.

use crate::error::Kind;
use crate::text::escape_name;
use anyhow::{Context, Result, bail};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path};
use std::time::SystemTime;

/// The maximum number of links in a path. The kernel has the same limit.
const MAX_LINKS: usize = 40;

/// The name of `/run`, which is a new mount in each step. If a step needs a file or mount point below `/run`, oven
/// creates it in that mount and not in the image.
pub(crate) const RUN: &str = "run";

/// Opens the directory `name` of `root`, so that a file system can be mounted on it. Fails if `name` is a file or a
/// symlink. Through a symlink, the file system would be mounted on another directory.
pub(crate) fn api_directory(root: BorrowedFd<'_>, name: &str) -> Result<OwnedFd> {
    let open = || -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(root, name, flags, Mode::empty())?)
    };
    open().map_err(|error| {
        Kind::Step
            .failure(format!("the image's /{name} is not a directory ({error})"))
            .hint("Each step needs it as a mount point. Make it a directory in the base image.")
            .into()
    })
}

/// The result of resolving a path inside an image.
pub(crate) struct ResolvedPath {
    /// The deepest directory that exists.
    pub dir: OwnedFd,
    /// The names of the directories from the root to `dir`, without links.
    pub real: Vec<OsString>,
    /// The names of the path after `dir`. If the path leads to a directory, the list is empty. If only the last name
    /// does not exist or is not a directory, the list has only this name.
    pub rest: Vec<OsString>,
    /// The metadata of the last name, if it exists and is not a directory.
    pub found: Option<Stat>,
}

impl ResolvedPath {
    pub(crate) fn in_run(&self) -> bool {
        self.real.iter().chain(&self.rest).next().is_some_and(|first| first == RUN)
    }

    pub(crate) fn is_file(&self, content: &[u8], mode: u32) -> Result<bool> {
        let same_mode = |stat: &Stat| stat.st_mode & 0o777 == mode & 0o777;
        Ok(self.found.as_ref().is_some_and(same_mode)
            && has_content(self.dir.as_fd(), &self.rest[0], content)?)
    }
}

/// Resolves a path inside `root`, one name at a time, as the kernel would if `root` were `/`. Symlinks are followed.
/// But a symlink at the end of the path is followed only if `follow` is true.
pub(crate) fn resolve(root: BorrowedFd<'_>, path: &Path, follow: bool) -> Result<ResolvedPath> {
    let mut dirs: Vec<(OwnedFd, OsString)> = Vec::new();
    let mut queue = names(path);
    let mut links = 0;
    while let Some(name) = queue.pop_front() {
        if name == ".." {
            dirs.pop();
            continue;
        }
        let dir = dirs.last().map_or(root, |(dir, _)| dir.as_fd());
        let stat = match rustix::fs::statat(dir, &*name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => {
                if queue.iter().any(|name| name == "..") {
                    bail!("{} contains `..` after a directory that does not exist", escape_name(path));
                }
                return place(root, dirs, std::iter::once(name).chain(queue).collect(), None);
            }
            Err(error) => return Err(error).with_context(|| format!("resolving {}", escape_name(path))),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink if follow || !queue.is_empty() => {
                links += 1;
                if links > MAX_LINKS {
                    bail!("{} has a loop of symbolic links", escape_name(path));
                }
                let target = rustix::fs::readlinkat(dir, &*name, Vec::new())
                    .with_context(|| format!("reading a link of {}", escape_name(path)))?;
                let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                if target.is_absolute() {
                    dirs.clear();
                }
                let mut rest = names(target);
                rest.append(&mut queue);
                queue = rest;
            }
            FileType::Directory => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let next = rustix::fs::openat(dir, &*name, flags, Mode::empty())
                    .with_context(|| format!("opening a directory of {}", escape_name(path)))?;
                dirs.push((next, name));
            }
            _ if queue.is_empty() => return place(root, dirs, vec![name], Some(stat)),
            _ => bail!("{} leads through {name:?}, which is not a directory", escape_name(path)),
        }
    }
    place(root, dirs, Vec::new(), None)
}

fn place(
    root: BorrowedFd<'_>,
    dirs: Vec<(OwnedFd, OsString)>,
    rest: Vec<OsString>,
    found: Option<Stat>,
) -> Result<ResolvedPath> {
    let mut real = Vec::new();
    let mut dir = None;
    for (fd, name) in dirs {
        dir = Some(fd);
        real.push(name);
    }
    let dir = match dir {
        Some(dir) => dir,
        None => root.try_clone_to_owned().context("copying a descriptor")?,
    };
    Ok(ResolvedPath { dir, real, rest, found })
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        _ => None,
    };
    path.components().filter_map(name).collect()
}

/// Calls `act`, which changes a directory, and restores the directory's times afterwards. Package managers check these
/// times, and a file that exists only during a step must not count as a change.
pub(crate) fn keep_directory_times<T>(dir: &OwnedFd, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let stat = rustix::fs::fstat(dir)?;
    let result = act()?;
    let time = |tv_sec, tv_nsec: u64| Timespec { tv_sec, tv_nsec: tv_nsec as _ };
    let last_access = time(stat.st_atime, stat.st_atime_nsec as u64);
    let last_modification = time(stat.st_mtime, stat.st_mtime_nsec as u64);
    // `dir` may be an `O_PATH` descriptor, through which times cannot be set directly. So the path `.` is used.
    rustix::fs::utimensat(dir, ".", &Timestamps { last_access, last_modification }, AtFlags::empty())?;
    Ok(result)
}

pub(crate) fn write_new(dir: BorrowedFd<'_>, name: &OsStr, content: &[u8], mode: u32) -> Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600))?);
    let written = file.write_all(content);
    if written.is_err() {
        _ = rustix::fs::unlinkat(dir, name, AtFlags::empty()); // perhaps the disk is full
    }
    written?;
    file.set_permissions(Permissions::from_mode(mode & 0o777))?;
    // The file gets the same modification time in every step. Package managers store data that they derive from such a
    // file. If the time changed, they would compute the data again in each step.
    file.set_modified(SystemTime::UNIX_EPOCH)?;
    Ok(file.into())
}

/// Returns whether `name` in `dir` is a regular file with exactly this content.
pub(crate) fn has_content(dir: BorrowedFd<'_>, name: &OsStr, content: &[u8]) -> Result<bool> {
    let is_like_it = |stat: &Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size == content.len() as i64
    };
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(false),
        stat if !is_like_it(&stat?) => return Ok(false),
        _ => {}
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?);
    let mut found = Vec::new();
    Ok(is_like_it(&rustix::fs::fstat(&file)?) && {
        (&mut file).take(content.len() as u64 + 1).read_to_end(&mut found)?;
        found == content
    })
}
