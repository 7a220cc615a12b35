//! The caches of one bake. They consist of the downloads of earlier bakes, and the changes that this bake makes.

use super::MIN_FREE;
use super::area::{DownloadArea, DownloadLimits};
use super::manifest;
use super::manifest::{CacheChanges, CacheEntry, CacheTree, CopyRequest};
use super::store::{CacheGeneration, CacheStore, Index, remove, total_bytes};
use super::store::{LOCK, lock_file};
use crate::error::Failure;
use crate::sys::lock::{FileLock, LockMode};
use crate::sys::space::{free_space, no_space};
use crate::sys::state_files;
use anyhow::{Context, Error, Result, bail};
use oven_distro::Cache;
use oven_distro::Holds;
use rustix::fs::{CWD, FileType, Mode};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{SystemTime, UNIX_EPOCH};

/// A generation is a published state of the caches. If it records at least this many steps, they are not copied to the
/// next generation. This is rare, because each definition adds only two or three steps.
const DONE_MAX: usize = 1000;

/// The overlay's directories for one cache. If `lower` is `None`, there is no overlay, and steps see `upper` itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheLayers {
    pub lower: Option<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
}

/// The caches of one bake. Downloads that were not published are removed when this value is dropped.
#[derive(Debug)]
pub struct CacheSession {
    store: CacheStore,
    key: PathBuf,
    kinds: Vec<Holds>,
    seeds: Vec<CacheTree>,
    overlays: bool,
    /// The generation with which this bake began. Its directories are the lower layers of the overlays.
    generation: Option<CacheGeneration>,
    /// The undamaged content of the generation, for each cache.
    trees: Vec<CacheTree>,
    layers: Vec<CacheLayers>,
    /// The number of calls of `lay_out`. Each call creates directories with new names.
    layouts: u32,
    /// The steps of this bake that later bakes can skip.
    done: BTreeSet<String>,
    /// The number of bytes in valid cached files when the session was opened.
    pub cached_bytes: u64,
    /// The number of damaged objects in the generation.
    pub damaged: usize,
    /// The damaged paths of each cache.
    damaged_paths: Vec<Vec<String>>,
    /// The errors of leftovers and old generations that could not be removed.
    pub failures: Vec<Error>,
    dir: PathBuf,
    area: Area,
    /// The threads that unmount earlier file systems. This takes some 50 ms.
    unmounting: Vec<JoinHandle<()>>,
    _lock: FileLock,
}

/// The file system with the directories to which steps write.
#[derive(Debug)]
enum Area {
    /// [`CacheSession::limit_writes`] was not called for the current layers.
    Untried,
    Mounted(DownloadArea),
    /// The file system could not be mounted. The error is the reason, until it is reported.
    Failed(Option<Error>),
}

impl CacheSession {
    /// Opens the caches of a bake. They contain the downloads of earlier bakes with the same `key`, which consists of
    /// letters and digits. A new cache contains only the directories in `seeds`. If `overlays` is false, this machine
    /// cannot mount overlays, and all cached files are copied.
    #[cfg(test)]
    pub fn open(
        store: &CacheStore,
        key: &str,
        caches: &[Cache],
        seeds: Vec<CacheTree>,
        overlays: bool,
    ) -> Result<Self> {
        let mut working = Self::begin(store, key, caches, seeds, overlays)?;
        working.verify()?;
        working.lay_out()?;
        Ok(working)
    }

    /// Like `open`, and mounts the file system that limits what steps write ([`Self::limit_writes`]).
    pub fn open_limited(
        store: &CacheStore,
        key: &str,
        caches: &[Cache],
        seeds: Vec<CacheTree>,
        overlays: bool,
    ) -> Result<Self> {
        let mut working = Self::begin(store, key, caches, seeds, overlays)?;
        // Both take some 20 ms, and one of them mostly waits for the kernel.
        let area = thread::scope(|scope| {
            let maker = working.area_maker();
            let area = scope.spawn(move || maker.mount());
            working.verify()?;
            area.join().map_err(|_| anyhow::anyhow!("a thread panicked"))
        })?;
        working.use_area(area)?;
        Ok(working)
    }

    /// Opens the newest generation without a check of its files, and creates a working directory.
    fn begin(
        store: &CacheStore,
        key: &str,
        caches: &[Cache],
        seeds: Vec<CacheTree>,
        overlays: bool,
    ) -> Result<Self> {
        let key = store.dir().join(key);
        let store_lock = store.lock()?;
        let failures = store.sweep();
        state_files::create_dir(&key)?;
        let dir = store.work(&store_lock)?.keep();
        let lock = lock_file(&dir.join(LOCK), LockMode::Exclusive)?;
        let generation = CacheGeneration::newest(&key, caches.len())?;
        drop(store_lock);
        let kinds: Vec<_> = caches.iter().map(|cache| cache.holds).collect();
        let store = store.clone();
        let (layers, layouts, done) = (Vec::new(), 0, BTreeSet::new());
        Ok(Self {
            store,
            key,
            kinds,
            seeds,
            overlays,
            generation,
            trees: Vec::new(),
            layers,
            layouts,
            done,
            cached_bytes: 0,
            damaged: 0,
            damaged_paths: Vec::new(),
            failures,
            dir,
            area: Area::Untried,
            unmounting: Vec::new(),
            _lock: lock,
        })
    }

    /// Compares all files of the generation with their digests.
    fn verify(&mut self) -> Result<()> {
        for (cache, kind) in self.kinds.iter().enumerate() {
            let (tree, damaged) = match &self.generation {
                Some(generation) => {
                    verify_tree(&generation.tree(cache), &generation.index.trees[cache], *kind)?
                }
                None => (CacheTree::new(), Vec::new()),
            };
            self.cached_bytes += total_bytes(&tree);
            self.damaged += damaged.len();
            self.trees.push(tree);
            self.damaged_paths.push(damaged);
        }
        Ok(())
    }

    /// Mounts the file system that limits what steps write, and creates new layers on it. Call this before a step that
    /// may write. It does nothing if the file system is mounted, or if this machine could not mount it
    /// ([`Self::take_unlimited`]).
    pub fn limit_writes(&mut self) -> Result<()> {
        if !matches!(self.area, Area::Untried) {
            return Ok(());
        }
        let area = self.area_maker().mount();
        self.use_area(area)
    }

    fn use_area(&mut self, area: Result<DownloadArea>) -> Result<()> {
        self.area = area.map_or_else(|error| Area::Failed(Some(error)), Area::Mounted);
        // Nothing was written to the earlier layers.
        self.lay_out()
    }

    fn area_maker(&self) -> AreaMaker {
        let of_generation = |generation: &CacheGeneration| {
            let trees = &generation.index.trees;
            (trees.iter().map(total_bytes).sum(), trees.iter().map(CacheTree::len).sum())
        };
        // Without overlays, all cached files are copied into the area.
        let copied = self.generation.as_ref().filter(|_| !self.overlays).map_or((0, 0), of_generation);
        AreaMaker { at: self.dir.join(format!("area-{}", self.layouts)), cache: self.store.limit(), copied }
    }

    /// Unmounts the file system without waiting for it. The layers on it are lost.
    fn discard_area(&mut self) {
        if matches!(self.area, Area::Mounted(_)) {
            self.layers.clear();
            let area = std::mem::replace(&mut self.area, Area::Untried);
            self.unmounting.push(thread::spawn(move || drop(area)));
        }
    }

    /// Returns the reason why this machine cannot limit what steps write, once.
    pub fn take_unlimited(&mut self) -> Option<Error> {
        if let Area::Failed(why) = &mut self.area { why.take() } else { None }
    }

    /// Returns the failure of a step if it reached the limit of the downloads.
    pub fn limit_failure(&self) -> Option<Failure> {
        if let Area::Mounted(area) = &self.area { area.limit_failure(self.store.dir()) } else { None }
    }

    /// Returns the layers in the order of the plan's caches.
    pub fn layers(&self) -> &[CacheLayers] {
        &self.layers
    }

    /// Creates new layers for the steps that follow. Steps do not see damaged files. Removes the earlier layers.
    fn lay_out(&mut self) -> Result<()> {
        self.layouts += 1;
        let layers: Result<_> = self
            .trees
            .iter()
            .enumerate()
            .map(|(cache, tree)| self.create_layers(cache, tree, &self.damaged_paths[cache]))
            .collect();
        for earlier in std::mem::replace(&mut self.layers, layers?) {
            // If this fails, the directory is removed when the bake ends.
            _ = remove(&earlier.upper);
            _ = remove(&earlier.work);
        }
        Ok(())
    }

    fn create_layers(&self, cache: usize, tree: &CacheTree, damaged: &[String]) -> Result<CacheLayers> {
        let area = if let Area::Mounted(area) = &self.area { area.path() } else { &self.dir };
        let new_dir = |what: &str| area.join(format!("{what}-{cache}-{}", self.layouts));
        let (upper, work) = (new_dir("upper"), new_dir("work"));
        let Some((generation, top)) = self.generation.as_ref().zip(tree.get("")) else {
            manifest::create_tree(&upper, &self.seeds[cache], &|_, _| bail!("a new cache has no files"))?;
            return Ok(CacheLayers { lower: None, upper, work });
        };
        let lower = generation.tree(cache);
        if self.overlays {
            fs::create_dir(&work).with_context(|| format!("making {}", work.display()))?;
            let top = CacheTree::from([(String::new(), top.clone())]); // a single directory
            manifest::create_tree(&upper, &top, &|_, _| bail!("a directory has no files"))?;
            if damaged.iter().try_for_each(|path| hide_file(&upper, path, tree)).is_ok() {
                return Ok(CacheLayers { lower: Some(lower), upper, work });
            }
            // A file could not be hidden, for example because this machine does not permit device nodes. So all valid
            // files are copied instead.
            remove(&upper)?;
        }
        manifest::create_tree(&upper, tree, &|path, to| copy(&lower.join(path), to, &tree[path]))?;
        Ok(CacheLayers { lower: None, upper, work })
    }

    /// Returns whether a step can be skipped. It can be skipped if an earlier bake did it and the caches have not
    /// changed since then.
    pub fn is_done(&self, step: &str) -> Result<bool> {
        let done_in = |generation: &&CacheGeneration| generation.index.done.contains(step);
        let Some(generation) = self.generation.as_ref().filter(done_in) else {
            return Ok(false);
        };
        for (cache, layers) in self.layers.iter().enumerate() {
            let changes = CacheChanges::of_downloads(&layers.upper)?;
            let tree = match layers.lower {
                Some(_) => changes.over(&self.trees[cache]),
                None => changes.tree,
            };
            if tree != generation.index.trees[cache] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Records that a step was done. Later bakes can skip the step until the caches change.
    pub fn note_done(&mut self, step: String) {
        self.done.insert(step);
    }

    /// Publishes this bake's caches. If another bake has published its caches since this bake began, both are merged.
    /// After the call, steps see the published content, and what they write is visible only to this bake. Returns the
    /// number of added bytes.
    pub fn publish(&mut self) -> Result<u64> {
        let copies = self.dir.join(format!("copies-{}", self.layouts));
        fs::create_dir(&copies).with_context(|| format!("making {}", copies.display()))?;
        // Copying takes long, so it is done before the store is locked.
        let mine = self.copy_changes(&copies)?;
        let store_lock = self.store.lock()?;
        let newest = CacheGeneration::newest(&self.key, self.kinds.len())?;
        let theirs = |cache: usize| newest.as_ref().map(|newest| &newest.index.trees[cache]);
        let ours_is_newest = match (&newest, &self.generation) {
            (Some(newest), Some(ours)) => newest.is(ours),
            (None, None) => true,
            _ => false,
        };
        let mut trees = Vec::new();
        for (cache, (_, tree)) in mine.iter().enumerate() {
            trees.push(match theirs(cache) {
                Some(theirs) if !ours_is_newest => merge(&self.trees[cache], tree, theirs, self.kinds[cache]),
                _ => tree.clone(),
            });
        }
        let download_times = self.remove_oldest(&mut trees, newest.as_ref());
        let (needed, limit) = (trees.iter().map(total_bytes).sum::<u64>(), self.store.limit());
        // Without its indexes, a cache would be of no use.
        if needed > limit {
            let (needed, limit) = (needed >> 20, limit >> 20);
            bail!("the package indexes have {needed} MiB, and the package cache may only have {limit} MiB");
        }
        let has_indexes = |cache: usize| self.kinds[cache] == Holds::Indexes;
        // If another bake published a different index meanwhile, each bake did its steps with its own index. So no step
        // is recorded as done for the merged caches.
        let index_differs = !ours_is_newest
            && (0..mine.len()).any(|cache| has_indexes(cache) && theirs(cache) != Some(&mine[cache].1));
        let done = match index_differs {
            true => BTreeSet::new(),
            false => self.steps_done(&trees, mine.iter().map(|(_, tree)| tree), newest.as_ref()),
        };
        let differs = |cache: usize, tree: &CacheTree| theirs(cache) != Some(tree);
        let steps_unchanged = newest.as_ref().is_some_and(|newest| newest.index.done == done);
        // If a damaged file was downloaded again, its entry in the tree is the same as before. So a comparison of the
        // trees does not show that the file was replaced.
        let replaces_damaged = ours_is_newest && self.damaged > 0;
        if !replaces_damaged
            && steps_unchanged
            && !trees.iter().enumerate().any(|(cache, tree)| differs(cache, tree))
        {
            drop(newest);
            // The generation has all downloads, so layers without them show the same. Where there are no overlays, new
            // layers would be copies of all files.
            if ours_is_newest && self.overlays {
                self.discard_area();
                self.lay_out()?;
            }
            return Ok(0);
        }
        let before: u64 = (0..trees.len()).filter_map(theirs).map(total_bytes).sum();
        let after: u64 = trees.iter().map(total_bytes).sum();
        let put = |cache: usize, path: &str, to: &Path| {
            let entry = &trees[cache][path];
            let downloads = &mine[cache].0;
            let copied = downloads.copies.get(path).filter(|_| downloads.tree.get(path) == Some(entry));
            let from = if let Some(copy) = copied {
                copy.clone()
            } else if let (Some(our_entry), Some(ours)) = (self.trees[cache].get(path), &self.generation)
                && our_entry == entry
            {
                ours.tree(cache).join(path)
            } else {
                newest.as_ref().context("a file without a source")?.tree(cache).join(path)
            };
            Ok(fs::hard_link(&from, to)?)
        };
        let index = Index::new(trees.clone(), download_times, done);
        let published = CacheGeneration::publish(&self.key, index, &put)?;
        // The old generations are unlocked here, so that the trim below can remove them.
        drop((self.generation.replace(published), newest));
        self.trees = trees;
        self.damaged = 0;
        self.damaged_paths = vec![Vec::new(); self.trees.len()];
        self.discard_area();
        self.lay_out()?;
        // The generation has links to the copies.
        self.failures.extend(remove(&copies).err());
        self.failures.extend(self.store.trim());
        drop(store_lock);
        Ok(after.saturating_sub(before))
    }

    /// Reads the changes of all caches, and copies the new files into subdirectories of `to`. Returns the changes and
    /// the changed tree of each cache.
    fn copy_changes(&self, to: &Path) -> Result<Vec<(CacheChanges, CacheTree)>> {
        let mut all = Vec::new();
        for (cache, layers) in self.layers.iter().enumerate() {
            let known = &self.trees[cache];
            let to = to.join(cache.to_string());
            fs::create_dir(&to).with_context(|| format!("making {}", to.display()))?;
            let request = CopyRequest { to: &to, known, ensure_room: &|bytes| self.ensure_room(bytes) };
            let changes = CacheChanges::copy_downloads(&layers.upper, &request)?;
            let tree = match layers.lower {
                Some(_) => changes.over(known),
                None => changes.tree.clone(),
            };
            all.push((changes, tree));
        }
        Ok(all)
    }

    /// Fails if new files do not fit on this machine's disk, or almost fill it.
    fn ensure_room(&self, bytes: u64) -> Result<()> {
        let (dir, needed) = (self.store.dir(), bytes.saturating_add(MIN_FREE));
        match free_space(dir) {
            Some(free) if bytes > 0 && free < needed => Err(no_space(dir, needed)),
            _ => Ok(()),
        }
    }

    /// Unmounts the file systems of the downloads, and waits until this is done.
    fn unmount(&mut self) {
        self.area = Area::Untried;
        for thread in self.unmounting.drain(..) {
            _ = thread.join();
        }
    }

    /// Removes the downloads that were not published.
    pub fn close(mut self) -> Result<()> {
        self.unmount();
        remove(&self.dir)
    }

    /// Returns the steps that later bakes can skip. `trees` is the content that is being published. The steps of this
    /// bake are included if `trees` has this bake's indexes and all of its packages. The same holds for the steps that
    /// `newest` records.
    fn steps_done<'a>(
        &self,
        trees: &[CacheTree],
        mine: impl Iterator<Item = &'a CacheTree>,
        newest: Option<&CacheGeneration>,
    ) -> BTreeSet<String> {
        let contains = |cache: usize, of: &CacheTree| match self.kinds[cache] {
            Holds::Indexes => trees[cache] == *of,
            // Only paths are compared, because another bake's file at the same path is an equivalent download.
            Holds::Packages => of.keys().all(|path| trees[cache].contains_key(path)),
        };
        let mut done = BTreeSet::new();
        if mine.enumerate().all(|(cache, tree)| contains(cache, tree)) {
            done.extend(self.done.iter().cloned());
        }
        if let Some(newest) = newest
            && newest.index.trees.iter().enumerate().all(|(cache, tree)| contains(cache, tree))
            && newest.index.done.len() < DONE_MAX
        {
            done.extend(newest.index.done.iter().cloned());
        }
        done
    }

    /// Removes the oldest packages from `trees` until the total size is within the store's limit. Returns the download
    /// time of each remaining file.
    fn remove_oldest(
        &self,
        trees: &mut [CacheTree],
        newest: Option<&CacheGeneration>,
    ) -> Vec<BTreeMap<String, u64>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis());
        let now = u64::try_from(now).unwrap_or(0);
        let download_time = |cache: usize, path: &String| {
            let of = |generation: &CacheGeneration| generation.index.download_times[cache].get(path).copied();
            newest.and_then(of).or_else(|| self.generation.as_ref().and_then(of)).unwrap_or(now)
        };
        let mut total: u64 = trees.iter().map(total_bytes).sum();
        let mut ages = Vec::new();
        for (cache, tree) in
            trees.iter().enumerate().filter(|(cache, _)| self.kinds[*cache] == Holds::Packages)
        {
            for (path, entry) in tree {
                if let CacheEntry::File { size, .. } = entry {
                    ages.push((download_time(cache, path), cache, path.clone(), *size));
                }
            }
        }
        ages.sort();
        for (_, cache, path, size) in ages {
            if total <= self.store.limit() {
                break;
            }
            trees[cache].remove(&path);
            total -= size;
        }
        let is_file = |entry: &CacheEntry| matches!(entry, CacheEntry::File { .. });
        trees
            .iter()
            .enumerate()
            .map(|(cache, tree)| {
                let files = tree.iter().filter(|(_, entry)| is_file(entry));
                files.map(|(path, _)| (path.clone(), download_time(cache, path))).collect()
            })
            .collect()
    }
}

impl Drop for CacheSession {
    fn drop(&mut self) {
        self.unmount();
        // After `close`, the directory is missing. If the removal fails, the next bake reports that.
        _ = remove(&self.dir);
    }
}

/// What is needed to mount a file system for downloads.
struct AreaMaker {
    at: PathBuf,
    /// The size limit of the package cache in bytes.
    cache: u64,
    /// The bytes and the number of the files that are copied into the area before the first download.
    copied: (u64, usize),
}

impl AreaMaker {
    fn mount(self) -> Result<DownloadArea> {
        let dir = self.at.parent().context("a directory without a parent")?;
        let free = free_space(dir).with_context(|| format!("measuring {}", dir.display()))?;
        let (bytes, files) = self.copied;
        DownloadArea::mount(&self.at, DownloadLimits::new(self.cache, free).plus(bytes, files as u64))
    }
}

/// Returns the valid part of a cached tree, and the damaged paths. If a directory or an index is damaged, the whole
/// tree counts as damaged.
fn verify_tree(dir: &Path, tree: &CacheTree, kind: Holds) -> Result<(CacheTree, Vec<String>)> {
    let Ok((damaged, directory_differs)) = manifest::differences(dir, tree) else {
        return Ok((CacheTree::new(), vec![String::new()])); // the directory cannot be read
    };
    if directory_differs || !damaged.is_empty() && kind == Holds::Indexes {
        return Ok((CacheTree::new(), damaged));
    }
    let mut tree = tree.clone();
    tree.retain(|path, _| !damaged.contains(path));
    Ok((tree, damaged))
}

/// Hides a file of the lower directory. In an overlay, a character device with the number 0/0 hides the file of the
/// same name.
fn hide_file(upper: &Path, path: &str, tree: &CacheTree) -> Result<()> {
    let parents: Vec<_> = path.match_indices('/').map(|(end, _)| &path[..end]).collect();
    for parent in parents.into_iter().filter(|parent| !upper.join(parent).exists()) {
        let of = |entry: &CacheEntry| CacheTree::from([(String::new(), entry.clone())]);
        let one = tree.get(parent).map(of).context("a file without a directory")?;
        manifest::create_tree(&upper.join(parent), &one, &|_, _| bail!("a directory has no files"))?;
    }
    rustix::fs::mknodat(CWD, upper.join(path), FileType::CharacterDevice, Mode::empty(), 0)?;
    Ok(())
}

/// Copies a cached file, with its owner, mode and modification time.
fn copy(from: &Path, to: &Path, entry: &CacheEntry) -> Result<()> {
    let CacheEntry::File { mode, uid, gid, modified, .. } = entry else { bail!("it is not a file") };
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(to)?;
    std::io::copy(&mut manifest::open(from)?, &mut file)?;
    std::os::unix::fs::fchown(&file, Some(*uid), Some(*gid))?;
    file.set_permissions(Permissions::from_mode(*mode))?;
    file.set_modified(manifest::system_time(*modified))?;
    Ok(())
}

/// Merges the tree of this bake (`mine`) with the tree of another bake (`theirs`). `start` is the tree with which this
/// bake began. Packages are taken from both bakes. If this bake changed its indexes, its indexes are used. Otherwise,
/// the indexes of the other bake are used.
fn merge(start: &CacheTree, mine: &CacheTree, theirs: &CacheTree, kind: Holds) -> CacheTree {
    if mine == start {
        return theirs.clone();
    }
    if kind == Holds::Indexes {
        return mine.clone();
    }
    let gone: BTreeSet<_> = start.keys().filter(|path| !mine.contains_key(*path)).collect();
    let mut all: CacheTree = theirs.clone();
    all.retain(|path, _| !gone.contains(path));
    let changed = mine.iter().filter(|(path, entry)| start.get(*path) != Some(entry));
    all.extend(changed.map(|(path, entry)| (path.clone(), entry.clone())));
    // An object is dropped if its directory is missing.
    let merged = all.clone();
    all.retain(|path, _| {
        path.match_indices('/')
            .all(|(end, _)| matches!(merged.get(&path[..end]), Some(CacheEntry::Directory { .. })))
    });
    all
}
