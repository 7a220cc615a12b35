//! Describes the content of a cache's directory: all objects by path, with the digest of each file.

use crate::sys::lock::lock_mutex;
use crate::sys::signals::ensure_not_stopped;
use crate::text::escape_name;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The size of one read in bytes.
const BUFFER_BYTES: usize = 256 << 10;
/// The maximum depth of directories. Package managers use a depth of four or five.
const DEPTH_MAX: usize = 32;
/// The maximum number of objects. A thousand packages and the indexes of ten repositories are far below this limit.
const OBJECTS_MAX: usize = 100_000;
/// The maximum size of all files together, in bytes. A file may be larger than its space on the disk. The package cache
/// is much smaller than this limit.
const BYTES_MAX: u64 = 32 << 30;
/// The maximum number of threads that compute digests. More threads are not faster, because the disk is the limit.
const MAX_THREADS: usize = 4;
/// The attribute that marks an opaque directory in an overlay's upper layer. Such a directory hides the content of the
/// lower layer's directory with the same path.
const OPAQUE: &str = "trusted.overlay.opaque";

/// The bits of a mode that cached objects may have. Set-user-ID, set-group-ID and sticky bits, and the permission to
/// write for others than the owner, are not cached.
const MODE: u32 = 0o755;
/// The extended attributes that no cached file may have: capabilities and access control lists.
const FORBIDDEN_ATTRIBUTES: [&[u8]; 3] =
    [b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"];

/// An object in a cache. An object of another type, or with a name that is not UTF-8, is not cached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheEntry {
    Directory {
        mode: u32,
        uid: u32,
        gid: u32,
    },
    File {
        mode: u32,
        uid: u32,
        gid: u32,
        size: u64,
        /// The time of the last modification, in seconds and nanoseconds. Package managers use this time to check
        /// whether the file is current.
        modified: (i64, i64),
        digest: String,
    },
    /// A symlink with this target. apt links the index of a repository on the image's own disk. oven never follows it.
    Link(String),
}

impl CacheEntry {
    /// Returns the object as it is cached: a file that belongs to root, or a directory, without special rights. A
    /// directory keeps its owner, because package managers let another user download to it.
    fn plain(self) -> Self {
        match self {
            Self::Directory { mode, uid, gid } => Self::Directory { mode: mode & MODE, uid, gid },
            Self::File { mode, size, modified, digest, .. } => {
                let (uid, gid) = file_owner();
                Self::File { mode: mode & MODE, uid, gid, size, modified, digest }
            }
            Self::Link(target) => Self::Link(target),
        }
    }

    /// Returns the size of a file, and 0 for a directory.
    pub fn bytes(&self) -> u64 {
        if let Self::File { size, .. } = self { *size } else { 0 }
    }

    /// Returns whether [`Self::plain`] would change nothing.
    pub fn is_plain(&self) -> bool {
        match self {
            Self::Directory { mode, .. } => mode & !MODE == 0,
            Self::File { mode, uid, gid, .. } => mode & !MODE == 0 && (*uid, *gid) == file_owner(),
            Self::Link(_) => true,
        }
    }
}

/// The owner of cached files: the user who runs oven, which is root.
fn file_owner() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// The objects below a directory by path. A parent comes before its children. The directory itself has the empty path.
pub type CacheTree = BTreeMap<String, CacheEntry>;

/// The changes to an older tree. They are read from an overlay's upper directory.
#[derive(Debug, Default)]
pub struct CacheChanges {
    /// Removed paths. The older tree's objects at and below these paths are hidden. `tree` can have new objects at the
    /// same paths.
    pub gone: Vec<String>,
    /// Opaque directories. The older tree's objects below them are hidden.
    pub emptied: Vec<String>,
    pub tree: CacheTree,
}

/// Returns whether `path` is `dir` itself or below it.
fn is_within(path: &str, dir: &str) -> bool {
    dir.is_empty() || path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl CacheChanges {
    /// Reads the changes from an overlay's upper directory. For any other directory, `tree` has all objects of that
    /// directory.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut changes = Self::default();
        let mut files = Vec::new();
        scan(dir, "", 0, &mut changes, &mut files)?;
        for (path, digest) in digests(dir, files)? {
            if let Some(CacheEntry::File { digest: recorded, .. }) = changes.tree.get_mut(&path) {
                *recorded = digest;
            }
        }
        Ok(changes)
    }

    /// Like [`Self::read`], but returns the objects as they are cached.
    pub fn of_downloads(dir: &Path) -> Result<Self> {
        let changes = Self::read(dir)?;
        let tree = changes.tree.into_iter().map(|(path, entry)| (path, entry.plain())).collect();
        Ok(Self { tree, ..changes })
    }

    /// Returns the older tree with these changes.
    pub fn over(&self, older: &CacheTree) -> CacheTree {
        let hidden = |path: &str| {
            self.gone.iter().any(|gone| is_within(path, gone))
                || self.emptied.iter().any(|dir| path != dir && is_within(path, dir))
        };
        let mut tree: CacheTree = older
            .iter()
            .filter(|(path, _)| !hidden(path))
            .map(|(path, entry)| (path.clone(), entry.clone()))
            .collect();
        tree.extend(self.tree.iter().map(|(path, entry)| (path.clone(), entry.clone())));
        tree
    }
}

fn scan(
    dir: &Path,
    path: &str,
    depth: usize,
    changes: &mut CacheChanges,
    files: &mut Vec<String>,
) -> Result<()> {
    if depth == DEPTH_MAX {
        bail!("{} is more than {DEPTH_MAX} directories deep", escape_name(dir));
    }
    let at = dir.join(path);
    let reading = || format!("reading {}", escape_name(&at));
    let metadata = fs::symlink_metadata(&at).with_context(reading)?;
    changes.tree.insert(path.to_owned(), read_entry(&at, &metadata)?.with_context(reading)?);
    for child in fs::read_dir(&at).with_context(reading)? {
        let child = child.with_context(reading)?;
        let objects = changes.tree.len() + changes.gone.len() + changes.emptied.len();
        ensure!(objects <= 2 * OBJECTS_MAX, "{} has more than {OBJECTS_MAX} files", dir.display());
        let Ok(name) = child.file_name().into_string() else { continue };
        let below = if path.is_empty() { name } else { format!("{path}/{name}") };
        let metadata = child.metadata().with_context(reading)?; // symlinks are not followed
        if metadata.file_type().is_char_device() && metadata.rdev() == 0 {
            changes.gone.push(below);
        } else if metadata.is_dir() {
            if is_opaque(&child.path()) {
                changes.emptied.push(below.clone());
            }
            scan(dir, &below, depth + 1, changes, files)?;
        } else if let Some(entry) = read_entry(&child.path(), &metadata)? {
            if metadata.is_file() {
                files.push(below.clone());
            }
            changes.gone.push(below.clone()); // hides the older object, which may be a directory with content
            changes.tree.insert(below, entry);
        }
    }
    Ok(())
}

fn is_opaque(dir: &Path) -> bool {
    rustix::fs::lgetxattr(dir, OPAQUE, &mut [0_u8; 1][..]).is_ok_and(|len| len == 1)
}

/// Returns `None` for an object that is not cached. A file's digest is added later.
fn read_entry(path: &Path, metadata: &Metadata) -> Result<Option<CacheEntry>> {
    let (mode, uid, gid) = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
    Ok(if metadata.is_dir() {
        Some(CacheEntry::Directory { mode, uid, gid })
    } else if metadata.is_symlink() {
        let target = fs::read_link(path).with_context(|| format!("reading {}", escape_name(path)))?;
        target.into_os_string().into_string().ok().map(CacheEntry::Link)
    } else if metadata.is_file() {
        let size = metadata.size();
        // Whenever package managers run, they change the times of their empty lock files. So the time of an empty file
        // is ignored.
        let modified = if size == 0 { (0, 0) } else { (metadata.mtime(), metadata.mtime_nsec()) };
        Some(CacheEntry::File { mode, uid, gid, size, modified, digest: String::new() })
    } else {
        None
    })
}

/// Returns whether a file has capabilities or an access control list.
fn has_forbidden_attribute(file: &Path) -> bool {
    let mut names = [0_u8; 4096];
    match rustix::fs::llistxattr(file, &mut names[..]) {
        Ok(len) => names[..len].split(|byte| *byte == 0).any(|name| FORBIDDEN_ATTRIBUTES.contains(&name)),
        Err(Errno::NOTSUP) => false,
        Err(_) => true, // more attributes than any cached file has
    }
}

/// Compares `dir` with `tree`. Returns the paths of objects that are missing, changed or new, or that have a forbidden
/// attribute. Also returns whether a directory is among these objects.
pub fn differences(dir: &Path, tree: &CacheTree) -> Result<(Vec<String>, bool)> {
    let found = CacheChanges::read(dir)?;
    let paths: BTreeSet<_> = tree.keys().chain(found.tree.keys()).chain(&found.gone).collect();
    let differ = |path: &&String| {
        !tree.contains_key(*path)
            || tree.get(*path) != found.tree.get(*path)
            || has_forbidden_attribute(&dir.join(path))
    };
    let paths: Vec<_> = paths.into_iter().filter(differ).cloned().collect();
    let is_directory = |path: &String| {
        [tree, &found.tree].iter().any(|t| matches!(t.get(path), Some(CacheEntry::Directory { .. })))
    };
    let directory_differs = paths.iter().any(is_directory) || !found.emptied.is_empty();
    Ok((paths, directory_differs))
}

/// Computes the digests of files on several threads. The largest files are read first.
fn digests(dir: &Path, files: Vec<String>) -> Result<Vec<(String, String)>> {
    let mut sized: Vec<(u64, String)> = Vec::with_capacity(files.len());
    for path in files {
        sized.push((fs::symlink_metadata(dir.join(&path)).map_or(0, |m| m.size()), path));
    }
    let total = sized.iter().fold(0u64, |total, (size, _)| total.saturating_add(*size));
    ensure!(total <= BYTES_MAX, "{} has more than {} GiB of files", dir.display(), BYTES_MAX >> 30);
    sized.sort();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    let (queue, threads) = (std::sync::Mutex::new(sized), threads.max(1));
    let work = || -> Result<Vec<(String, String)>> {
        let (mut done, mut buffer) = (Vec::new(), vec![0; BUFFER_BYTES]);
        loop {
            let next = lock_mutex(&queue).pop();
            let Some((_, path)) = next else { return Ok(done) };
            let digest = digest(&dir.join(&path), &mut buffer)?;
            done.push((path, digest));
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut all = work()?;
        for other in others {
            all.extend(other.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??);
        }
        Ok(all)
    })
}

fn digest(path: &Path, buffer: &mut [u8]) -> Result<String> {
    let reading = || format!("reading {}", escape_name(path));
    let mut file = open(path).with_context(reading)?;
    let mut hasher = blake3::Hasher::new();
    loop {
        ensure_not_stopped()?;
        match file.read(buffer).with_context(reading)? {
            0 => return Ok(hasher.finalize().to_hex().to_string()),
            count => _ = hasher.update(&buffer[..count]),
        }
    }
}

/// Opens a regular file. Does not follow a symlink, and does not block on a FIFO.
pub fn open(path: &Path) -> Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(CWD, path, flags, Mode::empty())?);
    anyhow::ensure!(file.metadata()?.is_file(), "it is not a regular file");
    Ok(file)
}

/// Creates `to` with all objects of a tree. `put` creates each file. Its arguments are the file's path below `to`, and
/// the full path.
pub fn create_tree(to: &Path, tree: &CacheTree, put: &dyn Fn(&str, &Path) -> Result<()>) -> Result<()> {
    for (path, entry) in tree {
        let at = if path.is_empty() { PathBuf::from(to) } else { to.join(path) };
        let making = || format!("making {}", escape_name(&at));
        match entry {
            CacheEntry::Directory { mode, uid, gid } => {
                fs::create_dir(&at).with_context(making)?;
                std::os::unix::fs::chown(&at, Some(*uid), Some(*gid)).with_context(making)?;
                fs::set_permissions(&at, Permissions::from_mode(*mode)).with_context(making)?;
            }
            CacheEntry::File { .. } => put(path, &at).with_context(making)?,
            CacheEntry::Link(target) => std::os::unix::fs::symlink(target, &at).with_context(making)?,
        }
    }
    Ok(())
}
