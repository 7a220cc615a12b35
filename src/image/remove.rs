//! Removes directories with their content. This is the only code of oven that does so. Directories are opened by
//! descriptors, symlinks are not followed, and mounts are not entered. A tree may have any depth.

use super::cursor::DirectoryCursor;
use super::tree::{ImageTree, names_in};
use super::walk::push_name;
use crate::sys::signals;
use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The number of names that are read from a directory at a time.
const BATCH: usize = 10_000;

/// The reason why an object was not removed.
#[derive(Debug)]
enum RemovalError {
    /// Something is mounted on the directory.
    Mounted,
    Failed(anyhow::Error),
}

/// How a directory is emptied.
struct Removal<'a> {
    /// Returns whether an object is excluded, with its content.
    keep: &'a dyn Fn(&str) -> bool,
    /// Called for each object. An error ends the removal.
    count: &'a dyn Fn() -> Result<()>,
    /// Called with the path of an object that was not removed. If this function returns an error, the removal ends.
    failed: &'a mut dyn FnMut(&str, RemovalError) -> Result<()>,
}

/// A directory at or above the one that is being emptied.
struct RemovalLevel {
    /// The directory's name in its parent.
    name: CString,
    path_length: usize,
    /// The subdirectories that still have to be removed.
    directories: Vec<CString>,
    /// The names that stay: objects that are excluded or cannot be removed.
    staying: BTreeSet<CString>,
    /// Whether the last listing had all names of the directory.
    is_listed: bool,
}

impl RemovalLevel {
    fn new(name: CString, path_length: usize) -> Self {
        Self { name, path_length, directories: Vec::new(), staying: BTreeSet::new(), is_listed: false }
    }
}

impl ImageTree {
    /// Empties a directory, and returns the number of removed objects. `keep` gets each object's path, which begins
    /// with `path` as it was given. If `keep` returns true, the object and its content are not removed. Symlinks are
    /// not followed, and other mounts are not entered. If `path` itself is not a directory, or is a symlink, nothing is
    /// removed.
    pub fn remove_tree_content(&self, path: &str, keep: &dyn Fn(&str) -> bool) -> Result<u64> {
        let doing = || format!("emptying the directory {path} in the image");
        let path = path.trim_end_matches('/');
        let top = match self.open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(0),
            top => top.with_context(doing)?,
        };
        let _timer = self.meter().start();
        let mut failed = |path: &str, why: RemovalError| match why {
            RemovalError::Mounted => Ok(()),
            RemovalError::Failed(error) => Err(error.context(format!("removing {path}"))),
        };
        let removal = Removal { keep, count: &|| self.count_object(), failed: &mut failed };
        empty(top, path, removal).with_context(doing)
    }
}

/// Removes a directory of this machine with its content. Objects that cannot be removed do not prevent the removal of
/// the others. `is_stop_requested` is called for each object. If it returns true, the removal ends.
///
/// Errors: the path of the first object that was not removed, with the reason.
pub fn remove_directory(dir: &Path, is_stop_requested: &dyn Fn() -> bool) -> Result<()> {
    let removing = || format!("removing {}", dir.display());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = rustix::fs::openat(CWD, dir, flags, Mode::empty()).with_context(removing)?;
    let (mut first, mut count) = (None, 0u64);
    let mut failed = |path: &str, why: RemovalError| {
        count += 1;
        first.get_or_insert_with(|| match why {
            RemovalError::Mounted => format!("something is mounted on {path}"),
            RemovalError::Failed(error) => format!("{path}: {error:#}"),
        });
        Ok(())
    };
    let count_object = || signals::interrupt_if(is_stop_requested());
    let removal = Removal { keep: &|_| false, count: &count_object, failed: &mut failed };
    empty(top, &dir.to_string_lossy(), removal).with_context(removing)?;
    match (first, count) {
        (Some(first), 1) => bail!("removing {}: {first}", dir.display()),
        (Some(first), count) => bail!("removing {}: {first}, and {} more", dir.display(), count - 1),
        (None, _) => fs::remove_dir(dir).with_context(removing),
    }
}

/// Empties a directory. Returns the number of removed objects.
fn empty(top: OwnedFd, path: &str, mut removal: Removal<'_>) -> Result<u64> {
    let mut path = path.to_owned();
    let mut cursor = DirectoryCursor::new(top)?;
    let mut levels = vec![RemovalLevel::new(CString::default(), path.len())];
    let mut removed = 0;
    while let Some(level) = levels.last_mut() {
        path.truncate(level.path_length);
        if let Some(name) = level.directories.pop() {
            push_name(&mut path, &name);
            match cursor.enter(&name) {
                Ok(true) => levels.push(RemovalLevel::new(name, path.len())),
                Ok(false) => {
                    (removal.failed)(&path, RemovalError::Mounted)?;
                    level.staying.insert(name);
                }
                Err(error) => {
                    (removal.failed)(&path, RemovalError::Failed(error))?;
                    level.staying.insert(name);
                }
            }
        } else if !level.is_listed {
            removed += remove_files(cursor.dir(), &mut path, level, &mut removal)?;
        } else {
            let Some(done) = levels.pop() else { break };
            let Some(parent) = levels.last_mut() else { break };
            cursor.leave().with_context(|| format!("leaving {path}"))?;
            if !done.staying.is_empty() {
                parent.staying.insert(done.name);
                continue;
            }
            match rustix::fs::unlinkat(cursor.dir(), &done.name, AtFlags::REMOVEDIR) {
                Ok(()) => removed += 1,
                Err(Errno::NOENT) => {}
                Err(error) => {
                    (removal.failed)(&path, RemovalError::Failed(error.into()))?;
                    parent.staying.insert(done.name);
                }
            }
        }
    }
    Ok(removed)
}

/// Lists a part of a directory, removes its files, and notes its subdirectories. Returns the number of removed files.
fn remove_files(
    dir: &OwnedFd,
    path: &mut String,
    level: &mut RemovalLevel,
    removal: &mut Removal<'_>,
) -> Result<u64> {
    let mut names = Vec::new();
    level.is_listed = true;
    let listed = names_in(dir, &mut |name| {
        if level.staying.contains(name) {
            return Ok(true);
        }
        level.is_listed = names.len() < BATCH;
        if level.is_listed {
            names.push(name.to_owned());
        }
        Ok(level.is_listed)
    });
    listed.with_context(|| format!("listing {path}"))?;
    let mut removed = 0;
    for name in names {
        (removal.count)()?;
        path.truncate(level.path_length);
        push_name(path, &name);
        if (removal.keep)(path) {
            level.staying.insert(name);
            continue;
        }
        match rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
            Ok(()) => removed += 1,
            Err(Errno::ISDIR) => level.directories.push(name),
            Err(Errno::NOENT) => {}
            Err(error) => {
                (removal.failed)(path, RemovalError::Failed(error.into()))?;
                level.staying.insert(name);
            }
        }
    }
    Ok(removed)
}
