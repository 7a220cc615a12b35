//! Walking and emptying directories of a tree that is not trusted: by descriptors, and nothing is followed.

use super::tree::{Inside, absent, names, open_in, os_string};
use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, FileType, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

/// Each level costs a descriptor, of which a process has 1024; a tree that is deeper was made so on purpose.
const DEPTH_MAX: usize = 200;

/// What a step of a walk does with a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Go {
    /// Into it, if it is one.
    On,
    /// Not into it.
    Past,
}

impl Inside {
    /// Visits all below a directory, each directory before what is in it, names in order. Symlinks are visited, not
    /// followed (but `path` itself may lead through some), and what is mounted below is passed over. The visitor is
    /// told the path, below `path` as it was given, and the object's own metadata. Nothing there: no visit.
    pub fn walk(&self, path: &str, visit: &mut dyn FnMut(&str, &Stat) -> Result<Go>) -> Result<()> {
        let doing = || format!("reading the directory {path} in the image");
        let Some(top) = absent(self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)).with_context(doing)?
        else {
            return Ok(());
        };
        walk(&top, path.trim_end_matches('/'), 0, visit)
    }

    /// Empties a directory and answers how many objects are gone. `keep` is asked with each path, below `path` as it
    /// was given: what it wants stays, with all in it. Nothing is followed and nothing else that is mounted is entered;
    /// if `path` itself is a symlink or no directory, nothing is done.
    pub fn remove_tree_content(&self, path: &str, keep: &dyn Fn(&str) -> bool) -> Result<u64> {
        let doing = || format!("emptying the directory {path} in the image");
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

/// A directory of a directory: not a symlink to one, not one that is mounted there.
fn descend(dir: &OwnedFd, name: &CStr) -> rustix::io::Result<Option<OwnedFd>> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    match open_in(dir.as_fd(), name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW, resolve) {
        // Mounted, or replaced meanwhile.
        Err(Errno::XDEV | Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => Ok(None),
        other => other.map(Some),
    }
}

fn deeper(path: &str, depth: usize) -> Result<usize> {
    if depth == DEPTH_MAX {
        bail!("{path} is nested deeper than {DEPTH_MAX} directories");
    }
    Ok(depth + 1)
}

fn walk(
    dir: &OwnedFd,
    path: &str,
    depth: usize,
    visit: &mut dyn FnMut(&str, &Stat) -> Result<Go>,
) -> Result<()> {
    let depth = deeper(path, depth)?;
    let mut found = names(dir).with_context(|| format!("listing {path}"))?;
    found.sort_unstable();
    for name in found {
        let below = format!("{path}/{}", os_string(&name).display());
        let stat = match rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat.with_context(|| format!("looking at {below}"))?,
        };
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if visit(&below, &stat)? == Go::On && is_dir {
            let inner = descend(dir, &name).with_context(|| format!("opening {below}"))?;
            if let Some(inner) = inner {
                walk(&inner, &below, depth, visit)?;
            }
        }
    }
    Ok(())
}

/// Answers whether nothing was kept.
fn empty(
    dir: &OwnedFd,
    path: &str,
    depth: usize,
    keep: &dyn Fn(&str) -> bool,
    removed: &mut u64,
) -> Result<bool> {
    let depth = deeper(path, depth)?;
    let mut all = true;
    for name in names(dir).with_context(|| format!("listing {path}"))? {
        let below = format!("{path}/{}", os_string(&name).display());
        if keep(&below) {
            all = false;
            continue;
        }
        let gone = match rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
            Err(Errno::ISDIR) => match descend(dir, &name).with_context(|| format!("opening {below}"))? {
                Some(inner) if empty(&inner, &below, depth, keep, removed)? => {
                    drop(inner);
                    rustix::fs::unlinkat(dir, &name, AtFlags::REMOVEDIR)
                }
                _ => {
                    all = false;
                    continue;
                }
            },
            Err(Errno::NOENT) => continue,
            gone => gone,
        };
        gone.with_context(|| format!("removing {below}"))?;
        *removed += 1;
    }
    Ok(all)
}
