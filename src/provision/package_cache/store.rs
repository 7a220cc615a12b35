//! Where downloads are kept between bakes.
//!
//! Below the store's directory each key has one of its own, and in it are generations: `N/index`, which tells each
//! file's digest, and `N/0`, `N/1` and so on, a directory for each cache of the plan. A generation never changes. A bake
//! works in a directory of its own (`working`), and what it leaves is published as the next one: whoever is killed on
//! the way leaves the last one as it is.

use super::manifest;
use super::manifest::{Entry, Tree};
use super::session::Working;
use crate::image::tree::Inside;
use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use oven_distro::Cache;
use rustix::fs::{CWD, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tempfile::TempDir;

const LOCK: &str = "lock";
const INDEX: &str = "index";
/// What a bake works in.
const WORK: &str = "b-";
/// What is being published.
const PART: &str = "part-";
/// Of what an index says; one of another format is passed over.
const FORMAT: u32 = 1;

/// The store: a directory that is root's alone, and how much it may hold.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    /// In bytes. What is in use is never removed: with it, it may be more.
    limit: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    format: u32,
    /// By the caches of a plan.
    pub trees: Vec<Tree>,
    /// When a file came, in milliseconds of the epoch: likewise.
    pub since: Vec<BTreeMap<String, u64>>,
    /// Which steps have nothing to do as long as the trees are these.
    pub done: BTreeSet<String>,
}

/// A generation that is in use: while this value lives nobody removes it.
#[derive(Debug)]
pub struct Generation {
    pub dir: PathBuf,
    pub index: Index,
    _lock: Flock<File>,
}

impl Store {
    /// `limit`: in bytes.
    pub fn new(dir: &Path, limit: u64) -> Self {
        Self { dir: dir.to_owned(), limit }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// A bake's own caches, with what earlier ones with the same `key` (plain letters and digits) left. Where there is
    /// nothing, `seeds` tells the directories to begin with. `overlays`: this machine can lay one directory over another;
    /// else all is copied.
    pub fn open(&self, key: &str, caches: &[Cache], seeds: Vec<Tree>, overlays: bool) -> Result<Working> {
        let key = self.dir.join(key);
        let turn = self.lock()?;
        self.sweep();
        fs::create_dir_all(&key).with_context(|| format!("making {}", key.display()))?;
        let dir = self.work(&turn)?.keep();
        let lock = locked(&dir.join(LOCK), FlockArg::LockExclusive)?;
        let base = Generation::newest(&key, caches.len())?;
        drop(turn);
        let holds = caches.iter().map(|cache| cache.holds).collect();
        Working::new(self.clone(), key, holds, dir, lock, base, seeds, overlays)
    }

    /// A directory to work in. Once the turn is over, somebody else removes it, unless its lock is held.
    pub fn work(&self, _turn: &Flock<File>) -> Result<TempDir> {
        let dir = tempfile::Builder::new().prefix(WORK).tempdir_in(&self.dir);
        dir.with_context(|| format!("making a directory in {}", self.dir.display()))
    }

    /// Taken for moments: to look around, and to publish.
    pub fn lock(&self) -> Result<Flock<File>> {
        fs::create_dir_all(&self.dir).with_context(|| format!("making {}", self.dir.display()))?;
        rustix::fs::chmod(&self.dir, Mode::RWXU)
            .with_context(|| format!("closing {}", self.dir.display()))?;
        locked(&self.dir.join(LOCK), FlockArg::LockExclusive)
    }

    /// Removes what killed bakes worked in. What cannot be removed stays for the next time. The store is locked: who has
    /// no lock of its own yet is dead.
    fn sweep(&self) {
        for (_, path) in children(&self.dir).filter(|(name, _)| name.starts_with(WORK)) {
            let lock = path.join(LOCK);
            let absent = |error: io::Error| error.kind() == io::ErrorKind::NotFound;
            if fs::symlink_metadata(&lock).is_err_and(absent) || try_lock(&lock).is_some() {
                _ = remove(&path);
            }
        }
    }

    /// Removes old generations, and then the keys that were not used for longest, until the limit is kept. The store is
    /// locked.
    pub fn trim(&self) {
        let (mut kept, mut held) = (Vec::new(), 0);
        for (name, key) in children(&self.dir) {
            if name.starts_with(WORK) || !key.is_dir() {
                continue;
            }
            let mut all = numbers(&key);
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
            let bytes = Index::read(&newest).map_or(0, |index| index.trees.iter().map(bytes).sum());
            held += bytes;
            kept.push((used.unwrap_or(SystemTime::UNIX_EPOCH), bytes, key, newest));
        }
        kept.sort();
        for (_, bytes, key, newest) in kept {
            if held > self.limit && try_lock(&newest.join(INDEX)).is_some() {
                _ = remove(&newest);
                _ = fs::remove_dir(&key);
                held -= bytes;
            }
        }
    }
}

impl Index {
    pub fn new(trees: Vec<Tree>, since: Vec<BTreeMap<String, u64>>, done: BTreeSet<String>) -> Self {
        Self { format: FORMAT, trees, since, done }
    }

    fn read(generation: &Path) -> Option<Self> {
        let file = manifest::open(&generation.join(INDEX)).ok()?;
        let index: Self = serde_json::from_reader(BufReader::new(file)).ok()?;
        (index.format == FORMAT && index.trees.len() == index.since.len()).then_some(index)
    }
}

impl Generation {
    /// The newest of a key, if it can be read. The store is locked, so that nobody removes it meanwhile.
    pub fn newest(key: &Path, caches: usize) -> Result<Option<Self>> {
        let Some(number) = numbers(key).pop() else { return Ok(None) };
        let dir = key.join(number.to_string());
        let Some(index) = Index::read(&dir).filter(|index| index.trees.len() == caches) else {
            return Ok(None);
        };
        let lock = locked(&dir.join(INDEX), FlockArg::LockShared)?;
        lock.set_modified(SystemTime::now()).with_context(|| format!("touching {}", dir.display()))?;
        Ok(Some(Self { dir, index, _lock: lock }))
    }

    pub fn is(&self, other: &Self) -> bool {
        self.dir == other.dir
    }

    /// Puts a new one there, whose files `put` makes: the cache, the path in it, and where to. The store is locked.
    pub fn publish(key: &Path, index: Index, put: &dyn Fn(usize, &str, &Path) -> Result<()>) -> Result<Self> {
        let number = numbers(key).pop().unwrap_or(0) + 1;
        // Whoever fails leaves it to the next one who trims.
        let part = tempfile::Builder::new().prefix(PART).tempdir_in(key);
        let part = part.with_context(|| format!("making a directory in {}", key.display()))?.keep();
        for (cache, tree) in index.trees.iter().enumerate() {
            let put = |path: &str, to: &Path| put(cache, path, to);
            manifest::make(&part.join(cache.to_string()), tree, &put)?;
        }
        let writing = || format!("writing an index in {}", key.display());
        let lock = locked(&part.join(INDEX), FlockArg::LockShared)?;
        let mut writer = BufWriter::new(&*lock);
        serde_json::to_writer(&mut writer, &index).with_context(writing)?;
        writer.flush().with_context(writing)?;
        drop(writer);
        let dir = key.join(number.to_string());
        fs::rename(&part, &dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(Self { dir, index, _lock: lock })
    }

    /// Where the files of a cache are.
    pub fn tree(&self, cache: usize) -> PathBuf {
        self.dir.join(cache.to_string())
    }
}

/// Removes a directory with all in it; nothing is followed, and nothing that is mounted is entered.
pub fn remove(dir: &Path) -> Result<()> {
    Inside::open_dir(dir)?.remove_tree_content("/", &|_| false)?;
    fs::remove_dir(dir).with_context(|| format!("removing {}", dir.display()))
}

pub fn bytes(tree: &Tree) -> u64 {
    let size = |entry: &Entry| if let Entry::File { size, .. } = entry { *size } else { 0 };
    tree.values().map(size).sum()
}

/// The generations of a key, the newest last.
fn numbers(key: &Path) -> Vec<u64> {
    let mut numbers: Vec<u64> = children(key).filter_map(|(name, _)| name.parse().ok()).collect();
    numbers.sort_unstable();
    numbers
}

fn children(dir: &Path) -> impl Iterator<Item = (String, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
}

/// A lock that ends with its value: when a file is closed it goes on for as long as a step that was started at that moment
/// has a copy of the descriptor.
fn locked(path: &Path, how: FlockArg) -> Result<Flock<File>> {
    let locking = || format!("locking {}", path.display());
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, path, flags, Mode::RUSR | Mode::WUSR).with_context(locking)?;
    Flock::lock(File::from(file), how).map_err(|(_, errno)| errno).with_context(locking)
}

/// The lock of something that nobody uses.
fn try_lock(path: &Path) -> Option<Flock<File>> {
    Flock::lock(manifest::open(path).ok()?, FlockArg::LockExclusiveNonblock).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_a_descriptor_holds_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let (store, key) = (Store::new(dir.path(), u64::MAX), dir.path().join("k"));
        fs::create_dir(&key).unwrap();
        let publish =
            || Generation::publish(&key, Index::new(vec![], vec![], BTreeSet::new()), &|_, _, _| Ok(()));
        let first = publish().unwrap();
        let _copy = first._lock.try_clone().unwrap();
        let second = publish().unwrap();
        store.trim();
        assert_eq!(numbers(&key), [1, 2], "in use");
        drop(first);
        store.trim();
        assert_eq!(numbers(&key), [2]);
        drop(second);
    }
}
