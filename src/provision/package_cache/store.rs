//! The store of the package cache.
//!
//! The store's directory has a subdirectory for each key, with the generations of that key. A generation is a state of
//! the caches that a bake published. Generation N has a file `N/index` with the digest of each cached file, and the
//! directories `N/0`, `N/1` and so on, one for each of the plan's caches. A generation never changes. A bake downloads
//! to a private directory, and then publishes its downloads as the next generation (see `session`). If a bake is killed
//! before it publishes, the store has no new generation.

use super::manifest;
use super::manifest::{CacheEntry, CacheTree};
use crate::image::limits::{ReadLimits, ReadMeter};
use crate::image::remove::remove_directory;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::sys::lock::{FileLock, LockMode};
use crate::sys::signals::is_stop_requested;
use crate::sys::state_files;
use anyhow::{Context, Error, Result};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tempfile::TempDir;

/// The package cache, and the base image of a bake. A bake uses only the part of the cache that belongs to its base
/// image.
#[derive(Debug, Clone)]
pub struct PackageCache {
    pub store: CacheStore,
    /// The id of the base image's snapshot. The steps that download packages run programs of the base image. So their
    /// downloads are not used for other base images.
    pub base: String,
}

pub const LOCK: &str = "lock";
const INDEX: &str = "index";
/// The prefix of the name of a bake's working directory.
const WORK: &str = "b-";
/// The prefix of the name of a generation that is being published.
const PART: &str = "part-";
/// The version of the index's format. An index with another version is ignored.
const FORMAT: u32 = 1;

/// The store: a directory that only root may enter, with a size limit.
#[derive(Debug, Clone)]
pub struct CacheStore {
    dir: PathBuf,
    /// The limit in bytes for everything in the directory. Generations in use and directories of running bakes are never
    /// removed, so the store can temporarily be larger than the limit.
    limit: u64,
}

/// The content of a generation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    format: u32,
    /// The trees, in the order of the plan's caches.
    pub trees: Vec<CacheTree>,
    /// The download times of the files of each tree, in milliseconds since 1970. The order is that of `trees`.
    #[serde(rename = "since")]
    pub download_times: Vec<BTreeMap<String, u64>>,
    /// The keys of the steps that can be skipped as long as the trees do not change.
    pub done: BTreeSet<String>,
}

/// What [`CacheStore::remove_leftovers`] did.
#[derive(Debug, Default)]
pub struct CacheSweep {
    /// The leftovers that were removed, or only listed.
    pub found: Vec<PathBuf>,
    /// The errors of the leftovers that could not be removed.
    pub failures: Vec<Error>,
}

/// A generation that is in use. It is not removed while this value exists.
#[derive(Debug)]
pub struct CacheGeneration {
    pub dir: PathBuf,
    pub index: Index,
    _lock: FileLock,
}

impl CacheStore {
    /// `limit` is in bytes.
    pub fn new(dir: &Path, limit: u64) -> Self {
        Self { dir: dir.to_owned(), limit }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Creates a bake's working directory. The caller must lock this directory before it unlocks the store. Otherwise
    /// another bake may remove the directory.
    pub fn work(&self, _store_lock: &FileLock) -> Result<TempDir> {
        let dir = tempfile::Builder::new().prefix(WORK).tempdir_in(&self.dir);
        dir.with_context(|| format!("making a directory in {}", self.dir.display()))
    }

    /// Locks the store. Callers hold the lock only for a moment, while they read the store or publish.
    pub fn lock(&self) -> Result<FileLock> {
        state_files::create_dir(&self.dir)?;
        lock_file(&self.dir.join(LOCK), LockMode::Exclusive)
    }

    /// Returns the leftovers of killed bakes: their working directories, and generations that they did not finish. A bake
    /// creates and locks its directory while it holds the store's lock. So if the caller holds the store's lock, a
    /// directory that is not locked belongs to a killed bake.
    fn leftovers(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for (name, path) in children(&self.dir).filter(|(_, path)| is_directory(path)) {
            if !name.starts_with(WORK) {
                found
                    .extend(children(&path).filter(|(name, _)| name.starts_with(PART)).map(|(_, path)| path));
                continue;
            }
            let lock = path.join(LOCK);
            let absent = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
            if fs::symlink_metadata(&lock).is_err_and(absent) || try_lock(&lock).is_some() {
                found.push(path);
            }
        }
        found
    }

    /// Removes the leftovers of killed bakes. The store must be locked. Returns the errors of those that could not be
    /// removed. The next call tries again.
    pub fn sweep(&self) -> Vec<Error> {
        self.leftovers().iter().filter_map(|path| remove_directory(path, &is_stop_requested).err()).collect()
    }

    /// Removes the leftovers of killed bakes, or only lists them if `dry_run` is true. Then nothing is changed.
    pub fn remove_leftovers(&self, dry_run: bool) -> Result<CacheSweep> {
        let mut swept = CacheSweep::default();
        // Without this file, no bake has used the store yet.
        if !self.dir.join(LOCK).exists() {
            return Ok(swept);
        }
        let _lock = lock_file(&self.dir.join(LOCK), LockMode::Exclusive)?;
        for path in self.leftovers() {
            match if dry_run { Ok(()) } else { remove_directory(&path, &is_stop_requested) } {
                Ok(()) => swept.found.push(path),
                Err(error) => swept.failures.push(error),
            }
        }
        if !dry_run {
            swept.failures.extend(self.trim());
        }
        Ok(swept)
    }

    /// Removes all generations except the newest of each key. Then removes the least recently used keys until the store
    /// is within its limit. Everything in the store's directory counts. Generations in use are not removed. The store
    /// must be locked. Returns the errors of what could not be removed or measured.
    pub fn trim(&self) -> Vec<Error> {
        let (mut keys, mut total, mut failures) = (Vec::new(), 0u64, Vec::new());
        // What cannot be measured is not counted. Otherwise one unreadable directory would empty the store.
        let measure = |path: &Path, failures: &mut Vec<Error>| {
            used_bytes(path).unwrap_or_else(|error| {
                failures.push(error);
                0
            })
        };
        for (name, key) in children(&self.dir) {
            if name.starts_with(WORK) || !is_directory(&key) {
                total = total.saturating_add(measure(&key, &mut failures));
                continue;
            }
            let newest = generation_numbers(&key).pop();
            for (name, path) in children(&key) {
                let number: Option<u64> = name.parse().ok();
                if number.is_some() && number == newest {
                    continue;
                }
                let is_unused =
                    name.starts_with(PART) || number.is_some() && try_lock(&path.join(INDEX)).is_some();
                if is_unused {
                    failures.extend(remove(&path).err());
                }
                total = total.saturating_add(measure(&path, &mut failures));
            }
            let Some(newest) = newest.map(|number| key.join(number.to_string())) else { continue };
            let used = fs::metadata(newest.join(INDEX)).and_then(|metadata| metadata.modified());
            let bytes = Index::read(&newest).map_or(0, |index| index.trees.iter().map(total_bytes).sum());
            total = total.saturating_add(bytes);
            keys.push((used.unwrap_or(SystemTime::UNIX_EPOCH), bytes, key, newest));
        }
        keys.sort();
        for (_, bytes, key, newest) in keys {
            if total > self.limit && try_lock(&newest.join(INDEX)).is_some() {
                match remove(&newest) {
                    Ok(()) => total -= bytes,
                    Err(error) => failures.push(error),
                }
                _ = fs::remove_dir(&key);
            }
        }
        failures
    }
}

impl Index {
    pub fn new(
        trees: Vec<CacheTree>,
        download_times: Vec<BTreeMap<String, u64>>,
        done: BTreeSet<String>,
    ) -> Self {
        Self { format: FORMAT, trees, download_times, done }
    }

    fn read(generation: &Path) -> Option<Self> {
        let file = manifest::open(&generation.join(INDEX)).ok()?;
        let index: Self = serde_json::from_reader(BufReader::new(file)).ok()?;
        let plain = index.trees.iter().flat_map(CacheTree::values).all(CacheEntry::is_plain);
        (index.format == FORMAT && index.trees.len() == index.download_times.len() && plain).then_some(index)
    }
}

impl CacheGeneration {
    /// Returns the newest generation of a key if it can be read. The store must be locked, so that no other bake
    /// removes the generation meanwhile.
    pub fn newest(key: &Path, caches: usize) -> Result<Option<Self>> {
        let Some(number) = generation_numbers(key).pop() else { return Ok(None) };
        let dir = key.join(number.to_string());
        let Some(index) = Index::read(&dir).filter(|index| index.trees.len() == caches) else {
            return Ok(None);
        };
        let lock = lock_file(&dir.join(INDEX), LockMode::Shared)?;
        lock.set_modified(SystemTime::now()).with_context(|| format!("touching {}", dir.display()))?;
        Ok(Some(Self { dir, index, _lock: lock }))
    }

    pub fn is(&self, other: &Self) -> bool {
        self.dir == other.dir
    }

    /// Publishes a new generation. `put` creates each file. Its arguments are the number of the cache, the file's path
    /// in the cache, and the full path of the new file. The store must be locked.
    pub fn publish(key: &Path, index: Index, put: &dyn Fn(usize, &str, &Path) -> Result<()>) -> Result<Self> {
        let number = generation_numbers(key).pop().unwrap_or(0) + 1;
        let part = tempfile::Builder::new().prefix(PART).tempdir_in(key);
        let part = part.with_context(|| format!("making a directory in {}", key.display()))?;
        for (cache, tree) in index.trees.iter().enumerate() {
            let put = |path: &str, to: &Path| put(cache, path, to);
            manifest::create_tree(&part.path().join(cache.to_string()), tree, &put)?;
        }
        let writing = || format!("writing an index in {}", key.display());
        let lock = lock_file(&part.path().join(INDEX), LockMode::Shared)?;
        let mut writer = BufWriter::new(&*lock);
        serde_json::to_writer(&mut writer, &index).with_context(writing)?;
        writer.flush().with_context(writing)?;
        drop(writer);
        let dir = key.join(number.to_string());
        fs::rename(part.path(), &dir).with_context(|| format!("making {}", dir.display()))?;
        _ = part.keep();
        Ok(Self { dir, index, _lock: lock })
    }

    /// Returns the directory with the files of a cache.
    pub fn tree(&self, cache: usize) -> PathBuf {
        self.dir.join(cache.to_string())
    }
}

/// Removes a directory with its content. A signal does not end the removal.
pub fn remove(dir: &Path) -> Result<()> {
    remove_directory(dir, &|| false)
}

/// Returns the space in bytes that an object takes on the disk, with its content. Files with several hard links are not
/// counted, because generations share them.
fn used_bytes(path: &Path) -> Result<u64> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(0) };
    let mut bytes = metadata.blocks() * 512;
    if metadata.is_dir() {
        let add = |tree: ImageTree| {
            tree.walk("/", &mut |_, stat| {
                let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
                if is_directory || stat.st_nlink == 1 {
                    bytes += stat.st_blocks as u64 * 512;
                }
                Ok(Walk::On)
            })
        };
        open_tree(path).and_then(add).with_context(|| format!("measuring {}", path.display()))?;
    }
    Ok(bytes)
}

/// Opens a directory. A signal does not end the walks of the tree.
fn open_tree(dir: &Path) -> Result<ImageTree> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(CWD, dir, flags, Mode::empty());
    let opened = opened.with_context(|| format!("opening {}", dir.display()))?;
    Ok(ImageTree::with_meter(opened, ReadMeter::new(ReadLimits::default(), || false)))
}

fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

/// Removes the content of a directory, like [`remove`].
pub fn empty(dir: &Path) -> Result<()> {
    open_tree(dir)?.remove_tree_content("/", &|_| false).map(drop)
}

/// Returns the size of all files of a tree.
pub fn total_bytes(tree: &CacheTree) -> u64 {
    tree.values().map(CacheEntry::bytes).sum()
}

/// Returns the numbers of a key's generations, the newest last.
fn generation_numbers(key: &Path) -> Vec<u64> {
    let mut numbers: Vec<u64> = children(key).filter_map(|(name, _)| name.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

fn children(dir: &Path) -> impl Iterator<Item = (String, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
}

/// Opens a file, or creates it if it is missing, and waits for its lock.
pub fn lock_file(path: &Path, mode: LockMode) -> Result<FileLock> {
    let locking = || format!("locking {}", path.display());
    let file = state_files::open_file(path, OFlags::RDWR | OFlags::CREATE).with_context(locking)?;
    FileLock::wait(file, mode).with_context(locking)
}

/// Locks a file if nobody else has locked it.
fn try_lock(path: &Path) -> Option<FileLock> {
    FileLock::try_acquire(manifest::open(path).ok()?, LockMode::Exclusive).ok()?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_a_descriptor_holds_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let (store, key) = (CacheStore::new(dir.path(), u64::MAX), dir.path().join("k"));
        fs::create_dir(&key).unwrap();
        let publish =
            || CacheGeneration::publish(&key, Index::new(vec![], vec![], BTreeSet::new()), &|_, _, _| Ok(()));
        let first = publish().unwrap();
        let _copy = first._lock.try_clone().unwrap();
        let second = publish().unwrap();
        store.trim();
        assert_eq!(generation_numbers(&key), [1, 2], "in use");
        drop(first);
        store.trim();
        assert_eq!(generation_numbers(&key), [2]);
        drop(second);
    }

    #[test]
    fn a_generation_that_cannot_be_published_leaves_nothing() {
        let key = tempfile::tempdir().unwrap();
        let file = CacheEntry::File {
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 1,
            modified: (0, 0),
            digest: String::new(),
        };
        let directory = CacheEntry::Directory { mode: 0o755, uid: 0, gid: 0 };
        let tree = CacheTree::from([(String::new(), directory), ("a".into(), file)]);
        let index = Index::new(vec![tree], vec![BTreeMap::new()], BTreeSet::new());
        let full = CacheGeneration::publish(key.path(), index, &|_, _, _| anyhow::bail!("full"));
        assert!(format!("{:#}", full.unwrap_err()).ends_with("full"));
        assert_eq!(fs::read_dir(key.path()).unwrap().count(), 0);
    }
}
