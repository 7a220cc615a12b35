//! Describes the content of a cache's directory: all objects by path, with the digest of each file.

use crate::sys::lock::lock_mutex;
use crate::sys::signals::ensure_not_stopped;
use crate::sys::tasks::{self, CancelFlag};
use crate::text::escape_name;
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata, Permissions};
use std::io::Read;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The size of one read in bytes.
const BUFFER_BYTES: usize = 256 << 10;
/// The maximum depth of directories. Package managers use a depth of four or five.
const DEPTH_MAX: usize = 32;
/// The maximum number of objects. A thousand packages and the indexes of ten repositories are far below this limit.
const OBJECTS_MAX: usize = 100_000;
/// The maximum size of all files together, in bytes. A bake may download as much. Without this limit, files with holes
/// could have more bytes than any disk.
const BYTES_MAX: u64 = 16 << 30;
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

    /// Returns whether two files have the same size, times, modes and owners. Their contents may differ.
    fn looks_like(&self, other: &Self) -> bool {
        let without_digest = |entry: &Self| match entry.clone() {
            Self::File { mode, uid, gid, size, modified, .. } => Some((mode, uid, gid, size, modified)),
            _ => None,
        };
        without_digest(self).is_some() && without_digest(self) == without_digest(other)
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
    /// The copies of files, by path ([`CacheChanges::copy_downloads`]).
    pub copies: BTreeMap<String, PathBuf>,
    /// The number of objects that were found, including those that are not cached.
    objects: usize,
}

/// A request to copy files while they are read.
pub struct CopyRequest<'a> {
    /// An existing, empty directory. The names of the copies are numbers.
    pub to: &'a Path,
    /// Files that are as in this tree are not copied.
    pub known: &'a CacheTree,
    /// Fails if this machine's disk has no room for this number of bytes.
    pub ensure_room: &'a dyn Fn(u64) -> Result<()>,
}

/// A file whose digest is needed.
struct FileToRead {
    size: u64,
    path: String,
    copy: Option<NewFile>,
}

/// A file to create.
struct NewFile {
    path: PathBuf,
    mode: u32,
    modified: (i64, i64),
}

/// Returns the paths of all directories that contain an object, and the empty path of the tree's own directory.
fn parents(path: &str) -> impl Iterator<Item = &str> {
    let below_top = path.match_indices('/').map(|(end, _)| &path[..end]);
    let top = (!path.is_empty()).then_some("");
    top.into_iter().chain(below_top)
}

impl CacheChanges {
    /// Reads the changes from an overlay's upper directory. For any other directory, `tree` has all objects of that
    /// directory.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut changes = Self::scan(dir)?;
        let files = changes.files_to_read(&|_, _| true);
        changes.read_files(dir, files)?;
        Ok(changes)
    }

    /// Like [`Self::read`], but returns the objects as they are cached.
    pub fn of_downloads(dir: &Path) -> Result<Self> {
        let changes = Self::read(dir)?;
        let tree = changes.tree.into_iter().map(|(path, entry)| (path, entry.plain())).collect();
        Ok(Self { tree, ..changes })
    }

    /// Like [`Self::of_downloads`], and copies the new files while they are read. A copy is as the file is cached: it
    /// has neither extended attributes nor another name, and steps cannot write to it.
    pub fn copy_downloads(dir: &Path, request: &CopyRequest<'_>) -> Result<Self> {
        let known = request.known;
        let mut changes = Self::scan(dir)?;
        changes.tree = changes.tree.into_iter().map(|(path, entry)| (path, entry.plain())).collect();
        let looks_known =
            |path: &str, entry: &CacheEntry| known.get(path).is_some_and(|known| known.looks_like(entry));
        let files = changes.files_to_read(&looks_known);
        changes.read_files(dir, files)?;
        // The content of a file can differ although its size and time do not. It is read once more for the copy.
        let differs = |path: &str, entry: &CacheEntry| known.get(path) != Some(entry);
        let mut files = changes.files_to_read(&differs);
        (request.ensure_room)(files.iter().map(|file| file.size).sum())?;
        for (number, file) in files.iter_mut().enumerate() {
            if let Some(CacheEntry::File { mode, modified, .. }) = changes.tree.get(&file.path) {
                let path = request.to.join(number.to_string());
                file.copy = Some(NewFile { path, mode: *mode, modified: *modified });
            }
        }
        changes.read_files(dir, files)?;
        Ok(changes)
    }

    fn scan(dir: &Path) -> Result<Self> {
        let mut changes = Self::default();
        scan(dir, "", 0, &mut changes)?;
        let total = changes.tree.values().map(CacheEntry::bytes).fold(0, u64::saturating_add);
        ensure!(total <= BYTES_MAX, "{} has more than {} GiB of files", dir.display(), BYTES_MAX >> 30);
        Ok(changes)
    }

    /// Returns the files of the tree for which `is_wanted` is true.
    fn files_to_read(&self, is_wanted: &dyn Fn(&str, &CacheEntry) -> bool) -> Vec<FileToRead> {
        let wanted = self.tree.iter().filter(|(path, entry)| is_wanted(path, entry));
        wanted
            .filter_map(|(path, entry)| match entry {
                CacheEntry::File { size, .. } => {
                    Some(FileToRead { size: *size, path: path.clone(), copy: None })
                }
                _ => None,
            })
            .collect()
    }

    /// Records the digests of files, and copies the files for which this is requested.
    fn read_files(&mut self, dir: &Path, files: Vec<FileToRead>) -> Result<()> {
        for (file, read) in read_on_threads(dir, files)? {
            if let Some(CacheEntry::File { digest, .. }) = self.tree.get_mut(&file.path) {
                *digest = read;
            }
            if let Some(copy) = file.copy {
                self.copies.insert(file.path, copy.path);
            }
        }
        Ok(())
    }

    /// Returns the older tree with these changes.
    pub fn over(&self, older: &CacheTree) -> CacheTree {
        let gone: BTreeSet<&str> = self.gone.iter().map(String::as_str).collect();
        let emptied: BTreeSet<&str> = self.emptied.iter().map(String::as_str).collect();
        let hidden = |path: &str| {
            gone.contains(path)
                || parents(path).any(|parent| gone.contains(parent) || emptied.contains(parent))
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

fn scan(dir: &Path, path: &str, depth: usize, changes: &mut CacheChanges) -> Result<()> {
    if depth == DEPTH_MAX {
        bail!("{} is more than {DEPTH_MAX} directories deep", escape_name(dir));
    }
    let at = dir.join(path);
    let reading = || format!("reading {}", escape_name(&at));
    let metadata = fs::symlink_metadata(&at).with_context(reading)?;
    changes.tree.insert(path.to_owned(), read_entry(&at, &metadata)?.with_context(reading)?);
    for child in fs::read_dir(&at).with_context(reading)? {
        ensure_not_stopped()?;
        let child = child.with_context(reading)?;
        changes.objects += 1;
        ensure!(changes.objects <= OBJECTS_MAX, "{} has more than {OBJECTS_MAX} files", dir.display());
        let Ok(name) = child.file_name().into_string() else { continue };
        let below = if path.is_empty() { name } else { format!("{path}/{name}") };
        let metadata = child.metadata().with_context(reading)?; // symlinks are not followed
        if metadata.file_type().is_char_device() && metadata.rdev() == 0 {
            changes.gone.push(below);
        } else if metadata.is_dir() {
            if is_opaque(&child.path()) {
                changes.emptied.push(below.clone());
            }
            scan(dir, &below, depth + 1, changes)?;
        } else if let Some(entry) = read_entry(&child.path(), &metadata)? {
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

/// Computes the digests of files on several threads, and copies the files for which this is requested. The largest files
/// are read first.
fn read_on_threads(dir: &Path, mut files: Vec<FileToRead>) -> Result<Vec<(FileToRead, String)>> {
    files.sort_by(|a, b| (a.size, &a.path).cmp(&(b.size, &b.path)));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    let counter = tasks::counter();
    counter.expect_more_bytes(files.iter().map(|file| file.size).sum());
    let (threads, queue) = (threads.min(files.len()).max(1), std::sync::Mutex::new(files));
    let work = || -> Result<Vec<(FileToRead, String)>> {
        let (mut done, mut buffer) = (Vec::new(), vec![0; BUFFER_BYTES]);
        loop {
            let next = lock_mutex(&queue).pop();
            let Some(file) = next else { return Ok(done) };
            let digest = read_file(&dir.join(&file.path), file.copy.as_ref(), (&mut buffer, &counter))?;
            done.push((file, digest));
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

/// Returns the digest of a file, and creates a copy if `copy` is given. In the copy, blocks of zeros are holes.
fn read_file(
    path: &Path,
    copy: Option<&NewFile>,
    (buffer, counter): (&mut [u8], &CancelFlag),
) -> Result<String> {
    let reading = || format!("reading {}", escape_name(path));
    let copying = || format!("copying {}", escape_name(path));
    let mut file = open(path).with_context(reading)?;
    let create = |new: &NewFile| File::options().write(true).create_new(true).mode(0o600).open(&new.path);
    let target = copy.map(create).transpose().with_context(copying)?;
    let mut hasher = blake3::Hasher::new();
    let mut size = 0;
    loop {
        ensure_not_stopped()?;
        let count = file.read(buffer).with_context(reading)?;
        if count == 0 {
            break;
        }
        let read = &buffer[..count];
        hasher.update(read);
        if let Some(target) = target.as_ref().filter(|_| read.iter().any(|byte| *byte != 0)) {
            target.write_all_at(read, size).with_context(copying)?;
        }
        size += count as u64;
        counter.add_bytes(count as u64);
    }
    if let Some((target, new)) = target.zip(copy) {
        finish_file(&target, size, new).with_context(copying)?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn finish_file(file: &File, size: u64, new: &NewFile) -> Result<()> {
    file.set_len(size)?;
    file.set_permissions(Permissions::from_mode(new.mode))?;
    file.set_modified(system_time(new.modified))?;
    Ok(())
}

/// Returns a time from seconds and nanoseconds since 1970. Earlier times become 1970.
pub fn system_time((seconds, nanoseconds): (i64, i64)) -> SystemTime {
    let since = Duration::new(seconds.try_into().unwrap_or(0), nanoseconds.try_into().unwrap_or(0));
    UNIX_EPOCH + since
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
