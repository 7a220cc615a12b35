//! Walks and empties directories of a tree that is not trusted. Directories are opened by descriptors, and symlinks are
//! not followed.

use super::tree::{ImageTree, absent, names, open_in, os_string};
use crate::text::escape_name;
use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, FileType, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

/// The maximum depth of a tree. Each level needs an open descriptor, and a process can usually have 1024 of them. No
/// normal image has a deeper tree.
const DEPTH_MAX: usize = 200;

/// Whether a walk enters an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// The walk enters the object if it is a directory.
    On,
    /// The walk does not enter the object.
    Past,
}

impl ImageTree {
    /// Visits everything below a directory. Each directory is visited before its content. The objects in a directory
    /// are visited in the order of their names. `path` itself may be a symlink. Symlinks below it are visited but not
    /// followed. Other mounts below the directory are not entered. The visitor gets each object's path, which begins
    /// with `path` as it was given, and the object's own metadata. If there is no directory at `path`, nothing is
    /// visited.
    pub fn walk(&self, path: &str, visit: &mut dyn FnMut(&str, &Stat) -> Result<Walk>) -> Result<()> {
        let doing = || format!("reading the directory {} in the image", escape_name(path));
        let Some(top) = absent(self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)).with_context(doing)?
        else {
            return Ok(());
        };
        walk(&top, path.trim_end_matches('/'), 0, visit)
    }

    /// Empties a directory, and returns the number of removed objects. `keep` gets each object's path, which begins
    /// with `path` as it was given. If `keep` returns true, the object and its content are not removed. Symlinks are
    /// not followed, and other mounts are not entered. If `path` itself is not a directory, or is a symlink, nothing is
    /// removed.
    pub fn remove_tree_content(&self, path: &str, keep: &dyn Fn(&str) -> bool) -> Result<u64> {
        let doing = || format!("emptying the directory {} in the image", escape_name(path));
        let path = path.trim_end_matches('/');
        let top = match self.open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(0),
            top => top.with_context(doing)?,
        };
        let mut removed = 0;
        empty(&top, path, 0, keep, &mut removed).with_context(doing)?;
        Ok(removed)
    }
}

/// Opens a directory in a directory. Returns `None` if it is a symlink, or if something is mounted on it.
fn descend(dir: &OwnedFd, name: &CStr) -> rustix::io::Result<Option<OwnedFd>> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    match open_in(dir.as_fd(), name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW, resolve) {
        // Something is mounted on the directory, or the directory was replaced meanwhile.
        Err(Errno::XDEV | Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => Ok(None),
        other => other.map(Some),
    }
}

fn deeper(path: &str, depth: usize) -> Result<usize> {
    if depth == DEPTH_MAX {
        bail!("{} is more than {DEPTH_MAX} directories deep", escape_name(path));
    }
    Ok(depth + 1)
}

fn walk(
    dir: &OwnedFd,
    path: &str,
    depth: usize,
    visit: &mut dyn FnMut(&str, &Stat) -> Result<Walk>,
) -> Result<()> {
    let depth = deeper(path, depth)?;
    let mut found = names(dir).with_context(|| format!("listing {}", escape_name(path)))?;
    found.sort_unstable();
    for name in found {
        let below = format!("{path}/{}", os_string(&name).display());
        let stat = match rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat.with_context(|| format!("examining {}", escape_name(&below)))?,
        };
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if visit(&below, &stat)? == Walk::On && is_dir {
            let inner = descend(dir, &name).with_context(|| format!("opening {}", escape_name(&below)))?;
            if let Some(inner) = inner {
                walk(&inner, &below, depth, visit)?;
            }
        }
    }
    Ok(())
}

/// Returns whether everything was removed.
fn empty(
    dir: &OwnedFd,
    path: &str,
    depth: usize,
    keep: &dyn Fn(&str) -> bool,
    removed: &mut u64,
) -> Result<bool> {
    let depth = deeper(path, depth)?;
    let mut is_emptied = true;
    for name in names(dir).with_context(|| format!("listing {}", escape_name(path)))? {
        let below = format!("{path}/{}", os_string(&name).display());
        if keep(&below) {
            is_emptied = false;
            continue;
        }
        let removal = match rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
            Err(Errno::ISDIR) => {
                match descend(dir, &name).with_context(|| format!("opening {}", escape_name(&below)))? {
                    Some(inner) if empty(&inner, &below, depth, keep, removed)? => {
                        drop(inner);
                        rustix::fs::unlinkat(dir, &name, AtFlags::REMOVEDIR)
                    }
                    _ => {
                        is_emptied = false;
                        continue;
                    }
                }
            }
            Err(Errno::NOENT) => continue,
            removal => removal,
        };
        removal.with_context(|| format!("removing {}", escape_name(&below)))?;
        *removed += 1;
    }
    Ok(is_emptied)
}
