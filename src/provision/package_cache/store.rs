//! The store of the package cache.
//!
//! The store's directory has a subdirectory for each key, with the generations of that key. A generation is a state of
//! the caches that a bake published. Generation N has a file `N/index` with the digest of each cached file, and the
//! directories `N/0`, `N/1` and so on, one for each of the plan's caches. A generation never changes. A bake downloads
//! to a private directory, and then publishes its downloads as the next generation (see `session`). If a bake is killed
//! before it publishes, the store has no new generation.

use super::manifest;
use super::manifest::{CacheEntry, CacheTree};
use crate::image::tree::ImageTree;
use crate::sys::lock::{FileLock, LockMode};
use crate::sys::state_files;
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufReader, BufWriter, Write};
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
    /// The limit in bytes. Generations in use are never removed, so the store can temporarily be larger than the limit.
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

    /// Removes the working directories of killed bakes. A bake creates and locks its directory while it holds the
    /// store's lock. So if the caller holds the store's lock, a directory that is not locked belongs to a killed bake.
    /// If a directory cannot be removed, the next call tries again.
    pub fn sweep(&self) {
        for (_, path) in children(&self.dir).filter(|(name, _)| name.starts_with(WORK)) {
            let lock = path.join(LOCK);
            let absent = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
            if fs::symlink_metadata(&lock).is_err_and(absent) || try_lock(&lock).is_some() {
                _ = remove(&path);
            }
        }
    }

    /// Removes all generations except the newest of each key. Then removes the least recently used keys until the store
    /// is within its limit. Generations in use are not removed. The store must be locked.
    pub fn trim(&self) {
        let (mut keys, mut total) = (Vec::new(), 0);
        for (name, key) in children(&self.dir) {
            if name.starts_with(WORK) || !key.is_dir() {
                continue;
            }
            let mut all = generation_numbers(&key);
            let newest = all.pop();
            for old in all.into_iter().map(|number| key.join(number.to_string())) {
                if try_lock(&old.join(INDEX)).is_some() {
                    _ = remove(&old);
                }
            }
            for (name, path) in children(&key) {
                if name.starts_with(PART) {
                    _ = remove(&path);
                }
            }
            let Some(newest) = newest.map(|number| key.join(number.to_string())) else { continue };
            let used = fs::metadata(newest.join(INDEX)).and_then(|metadata| metadata.modified());
            let bytes = Index::read(&newest).map_or(0, |index| index.trees.iter().map(total_bytes).sum());
            total += bytes;
            keys.push((used.unwrap_or(SystemTime::UNIX_EPOCH), bytes, key, newest));
        }
        keys.sort();
        for (_, bytes, key, newest) in keys {
            if total > self.limit && try_lock(&newest.join(INDEX)).is_some() {
                _ = remove(&newest);
                _ = fs::remove_dir(&key);
                total -= bytes;
            }
        }
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
        // If a later call fails, the next trim removes this directory.
        let part = tempfile::Builder::new().prefix(PART).tempdir_in(key);
        let part = part.with_context(|| format!("making a directory in {}", key.display()))?.keep();
        for (cache, tree) in index.trees.iter().enumerate() {
            let put = |path: &str, to: &Path| put(cache, path, to);
            manifest::create_tree(&part.join(cache.to_string()), tree, &put)?;
        }
        let writing = || format!("writing an index in {}", key.display());
        let lock = lock_file(&part.join(INDEX), LockMode::Shared)?;
        let mut writer = BufWriter::new(&*lock);
        serde_json::to_writer(&mut writer, &index).with_context(writing)?;
        writer.flush().with_context(writing)?;
        drop(writer);
        let dir = key.join(number.to_string());
        fs::rename(&part, &dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(Self { dir, index, _lock: lock })
    }

    /// Returns the directory with the files of a cache.
    pub fn tree(&self, cache: usize) -> PathBuf {
        self.dir.join(cache.to_string())
    }
}

/// Removes a directory with its content. Links are not followed, and mounted file systems are not entered.
pub fn remove(dir: &Path) -> Result<()> {
    empty(dir)?;
    fs::remove_dir(dir).with_context(|| format!("removing {}", dir.display()))
}

/// Removes the content of a directory, like [`remove`].
pub fn empty(dir: &Path) -> Result<()> {
    ImageTree::open_dir(dir)?.remove_tree_content("/", &|_| false).map(drop)
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
    entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
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
}
