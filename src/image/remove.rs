//! Removes directories with their content. This is the only code of oven that does so. Directories are opened by
//! descriptors, symlinks are not followed, and mounts are not entered. The depth of a tree is limited only by the memory
//! for the names of its directories.

use super::cursor::DirectoryCursor;
use super::limits::ReadLimits;
use super::tree::{ImageTree, memory_of, names_in, split};
use super::walk::{LEVEL_OVERHEAD, ShownPath, push_name};
use crate::sys::signals;
use crate::text::escape_name;
use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The number of names that are read from a directory at a time, for each subdirectory that may be noted.
const BATCH: usize = 100;
/// The number of subdirectories that are noted at a time, at each level. A directory with more of them is listed again.
const DIRECTORIES_MAX: usize = 100;

/// The reason why an object was not removed.
#[derive(Debug)]
enum RemovalError {
    /// Something is mounted on the directory.
    Mounted,
    Failed(anyhow::Error),
}

/// Removes an object. The outer error ends the removal; because of the inner one, only this object stays.
type UnlinkFn<'a> = dyn Fn(&OwnedFd, &CStr, AtFlags, &ShownPath<'_>) -> Result<rustix::io::Result<()>> + 'a;

/// How a directory is emptied.
struct Removal<'a> {
    /// Returns whether an object is excluded, with its content.
    keep: &'a dyn Fn(&str) -> bool,
    /// Called for each object. An error ends the removal.
    count: &'a dyn Fn() -> Result<()>,
    /// Removes the object with a name in a directory. The path is for messages.
    unlink: &'a UnlinkFn<'a>,
    /// Called with the path of an object that was not removed. If this function returns an error, the removal ends.
    failed: &'a mut dyn FnMut(&ShownPath<'_>, RemovalError) -> Result<()>,
    /// The maximum memory in bytes for names.
    memory: usize,
    /// Returns the error for a tree that would need more memory.
    exceeded: &'a dyn Fn(String) -> anyhow::Error,
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
    /// The memory in bytes for the names of this level and of those above it.
    memory: usize,
}

impl RemovalLevel {
    /// `above` is the memory of the levels above.
    fn new(name: CString, path_length: usize, above: usize) -> Self {
        // The name is also a part of the path.
        let memory = above + LEVEL_OVERHEAD + 2 * memory_of(&name);
        let (directories, staying) = (Vec::new(), BTreeSet::new());
        Self { name, path_length, directories, staying, is_listed: false, memory }
    }

    fn note_directory(&mut self, name: CString) {
        self.memory += memory_of(&name);
        self.directories.push(name);
    }

    fn next_directory(&mut self) -> Option<CString> {
        let name = self.directories.pop()?;
        self.memory -= memory_of(&name);
        Some(name)
    }

    fn stay(&mut self, name: CString) {
        self.memory += memory_of(&name);
        self.staying.insert(name);
    }

    /// Returns how many subdirectories may be noted at a time. In a very deep tree it is only one, so that the memory is
    /// enough for the depth.
    fn directories_max(&self, memory: usize) -> usize {
        if self.memory < memory / 4 { DIRECTORIES_MAX } else { 1 }
    }
}

impl ImageTree {
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
        let _timer = self.meter().start();
        let mut failed = |path: &ShownPath<'_>, why: RemovalError| match why {
            RemovalError::Mounted => Ok(()),
            RemovalError::Failed(error) => Err(error.context(format!("removing {path}"))),
        };
        let removal = Removal {
            keep,
            count: &|| self.count_object(),
            unlink: &|dir, name, flags, shown| {
                let mut unlink = || rustix::fs::unlinkat(dir, name, flags);
                Ok(self.change(dir, name, shown, &mut unlink)?.result)
            },
            failed: &mut failed,
            memory: self.meter().limits().names,
            exceeded: &|what| self.meter().exceeded(what),
        };
        empty(top, path, removal).with_context(doing)
    }
}

impl ImageTree {
    /// Removes a directory with its content, like [`Self::remove_tree_content`]. The directory stays if something in it
    /// stays.
    pub fn remove_tree(&self, path: &str, keep: &dyn Fn(&str) -> bool) -> Result<()> {
        self.remove_tree_content(path, keep)?;
        let doing = || format!("removing {} in the image", escape_name(path));
        let (parent, name) = split(path)?;
        let parent = self.open(&parent, OFlags::PATH | OFlags::DIRECTORY).with_context(doing)?;
        let mut remove = || rustix::fs::unlinkat(&parent, &*name, AtFlags::REMOVEDIR);
        match self.change(&parent, &*name, &escape_name(path), &mut remove).with_context(doing)?.result {
            Err(Errno::NOENT | Errno::NOTEMPTY | Errno::BUSY) => Ok(()),
            done => done.with_context(doing),
        }
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
    let mut failed = |path: &ShownPath<'_>, why: RemovalError| {
        count += 1;
        first.get_or_insert_with(|| match why {
            RemovalError::Mounted => format!("something is mounted on {path}"),
            RemovalError::Failed(error) => format!("{path}: {error:#}"),
        });
        Ok(())
    };
    let count_object = || signals::interrupt_if(is_stop_requested());
    let removal = Removal {
        keep: &|_| false,
        count: &count_object,
        unlink: &|dir, name, flags, _| Ok(rustix::fs::unlinkat(dir, name, flags)),
        failed: &mut failed,
        memory: ReadLimits::default().names,
        exceeded: &|what| anyhow!(what),
    };
    empty(top, &dir.to_string_lossy(), removal).with_context(removing)?;
    match (first, count) {
        (Some(first), 1) => bail!("removing {}: {first}", dir.display()),
        (Some(first), count) => bail!("removing {}: {first}, and {} more", dir.display(), count - 1),
        (None, _) => fs::remove_dir(dir).with_context(removing),
    }
}

/// Empties a directory. Returns the number of removed objects.
fn empty(top: OwnedFd, path: &str, mut removal: Removal<'_>) -> Result<u64> {
    let (mut path, top_length) = (path.to_owned(), path.len());
    let mut cursor = DirectoryCursor::new(top)?;
    let mut levels = vec![RemovalLevel::new(CString::default(), path.len(), 0)];
    let mut removed = 0;
    while let Some(level) = levels.last_mut() {
        path.truncate(level.path_length);
        if level.memory > removal.memory {
            let shown = ShownPath { path: &path, top: top_length };
            let max = removal.memory;
            let what =
                format!("the names in {shown}, and in the directories above it, need more than {max} bytes");
            return Err((removal.exceeded)(what));
        }
        if let Some(name) = level.next_directory() {
            push_name(&mut path, &name);
            let shown = ShownPath { path: &path, top: top_length };
            match cursor.enter(&name) {
                Ok(true) => {
                    let above = level.memory;
                    levels.push(RemovalLevel::new(name, path.len(), above));
                }
                Ok(false) => {
                    (removal.failed)(&shown, RemovalError::Mounted)?;
                    level.stay(name);
                }
                Err(error) => {
                    (removal.failed)(&shown, RemovalError::Failed(error))?;
                    level.stay(name);
                }
            }
        } else if !level.is_listed {
            removed += remove_files(cursor.dir(), (&mut path, top_length), level, &mut removal)?;
        } else {
            let Some(done) = levels.pop() else { break };
            let Some(parent) = levels.last_mut() else { break };
            let shown = ShownPath { path: &path, top: top_length };
            cursor.leave().with_context(|| format!("leaving {shown}"))?;
            if !done.staying.is_empty() {
                parent.stay(done.name);
                continue;
            }
            match (removal.unlink)(cursor.dir(), &done.name, AtFlags::REMOVEDIR, &shown)? {
                Ok(()) => removed += 1,
                Err(Errno::NOENT) => {}
                Err(error) => {
                    (removal.failed)(&shown, RemovalError::Failed(error.into()))?;
                    parent.stay(done.name);
                }
            }
        }
    }
    Ok(removed)
}

/// Lists a part of a directory, removes its files, and notes its subdirectories. `path` is the directory's path, with the
/// length of the path of the tree's top. Returns the number of removed files.
fn remove_files(
    dir: &OwnedFd,
    (path, top): (&mut String, usize),
    level: &mut RemovalLevel,
    removal: &mut Removal<'_>,
) -> Result<u64> {
    (removal.count)()?;
    let directories_max = level.directories_max(removal.memory);
    let mut names = Vec::new();
    level.is_listed = true;
    let listed = names_in(dir, &mut |name| {
        if level.staying.contains(name) {
            return Ok(true);
        }
        level.is_listed = names.len() < BATCH * directories_max;
        if level.is_listed {
            names.push(name.to_owned());
        }
        Ok(level.is_listed)
    });
    listed.with_context(|| format!("listing {}", ShownPath { path, top }))?;
    let mut removed = 0;
    for name in names {
        if level.directories.len() == directories_max {
            level.is_listed = false;
            break;
        }
        (removal.count)()?;
        path.truncate(level.path_length);
        push_name(path, &name);
        if (removal.keep)(path) {
            level.stay(name);
            continue;
        }
        match (removal.unlink)(dir, &name, AtFlags::empty(), &ShownPath { path, top })? {
            Ok(()) => removed += 1,
            Err(Errno::ISDIR) => level.note_directory(name),
            Err(Errno::NOENT) => {}
            Err(error) => {
                (removal.failed)(&ShownPath { path, top }, RemovalError::Failed(error.into()))?;
                level.stay(name);
            }
        }
    }
    Ok(removed)
}
