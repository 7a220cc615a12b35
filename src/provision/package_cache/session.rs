//! A bake's private caches: its changes over the downloads of earlier bakes.

use super::manifest;
use super::manifest::{CacheChanges, CacheEntry, CacheTree};
use super::store::{CacheGeneration, CacheStore, Index, remove, total_bytes};
use super::store::{LOCK, lock_file};
use crate::sys::lock::{FileLock, LockMode};
use anyhow::{Context, Result, bail};
use oven_distro::Cache;
use oven_distro::Holds;
use rustix::fs::{CWD, FileType, Mode};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The maximum number of recorded steps. Fewer definitions share a base, and each has two or three such steps.
const DONE_MAX: usize = 1000;

/// The directories of a cache for steps: `upper` over `lower`, or `upper` alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheLayers {
    pub lower: Option<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
}

/// A bake's private caches. Downloads that were not published are removed when this value is dropped.
#[derive(Debug)]
pub struct CacheSession {
    store: CacheStore,
    key: PathBuf,
    holds: Vec<Holds>,
    seeds: Vec<CacheTree>,
    overlays: bool,
    base: Option<CacheGeneration>,
    /// The valid part of the base, for each cache.
    trees: Vec<CacheTree>,
    layers: Vec<CacheLayers>,
    /// The number of times that the layers were created. Each time they are in new directories.
    layouts: u32,
    /// The steps of this bake that later bakes can skip.
    done: BTreeSet<String>,
    /// The number of cached bytes that were found, and the number of damaged objects.
    pub found: (u64, usize),
    dir: PathBuf,
    _lock: FileLock,
}

impl CacheSession {
    /// Opens a bake's private caches, with the downloads of earlier bakes with the same `key` (letters and digits). A
    /// new cache begins with the directories of `seeds`. `overlays`: whether this machine can overlay directories; if
    /// not, everything is copied.
    pub fn open(
        store: &CacheStore,
        key: &str,
        caches: &[Cache],
        seeds: Vec<CacheTree>,
        overlays: bool,
    ) -> Result<Self> {
        let key = store.dir().join(key);
        let store_lock = store.lock()?;
        store.sweep();
        fs::create_dir_all(&key).with_context(|| format!("making {}", key.display()))?;
        let dir = store.work(&store_lock)?.keep();
        let lock = lock_file(&dir.join(LOCK), LockMode::Exclusive)?;
        let base = CacheGeneration::newest(&key, caches.len())?;
        drop(store_lock);
        let holds: Vec<_> = caches.iter().map(|cache| cache.holds).collect();
        let store = store.clone();
        let (mut trees, mut damaged, mut found) = (Vec::new(), Vec::new(), (0, 0));
        for (cache, holds) in holds.iter().enumerate() {
            let (tree, bad) = match &base {
                Some(base) => verify_tree(&base.tree(cache), &base.index.trees[cache], *holds)?,
                None => (CacheTree::new(), Vec::new()),
            };
            found = (found.0 + total_bytes(&tree), found.1 + bad.len());
            trees.push(tree);
            damaged.push(bad);
        }
        let (layers, layouts, done) = (Vec::new(), 0, BTreeSet::new());
        let mut working = Self {
            store,
            key,
            holds,
            seeds,
            overlays,
            base,
            trees,
            layers,
            layouts,
            done,
            found,
            dir,
            _lock: lock,
        };
        working.lay_out(&damaged)?;
        Ok(working)
    }

    /// Returns the layers in the order of the plan's caches.
    pub fn layers(&self) -> &[CacheLayers] {
        &self.layers
    }

    /// Creates new directories for steps, with damaged files hidden.
    fn lay_out(&mut self, damaged: &[Vec<String>]) -> Result<()> {
        self.layouts += 1;
        let layers: Result<_> = self
            .trees
            .iter()
            .enumerate()
            .map(|(cache, tree)| self.create_layers(cache, tree, &damaged[cache]))
            .collect();
        self.layers = layers?;
        Ok(())
    }

    fn create_layers(&self, cache: usize, tree: &CacheTree, damaged: &[String]) -> Result<CacheLayers> {
        let new_dir = |what: &str| self.dir.join(format!("{what}-{cache}-{}", self.layouts));
        let (upper, work) = (new_dir("upper"), new_dir("work"));
        let Some((base, top)) = self.base.as_ref().zip(tree.get("")) else {
            manifest::create_tree(&upper, &self.seeds[cache], &|_, _| bail!("a new cache has no files"))?;
            return Ok(CacheLayers { lower: None, upper, work });
        };
        let lower = base.tree(cache);
        if self.overlays {
            fs::create_dir(&work).with_context(|| format!("making {}", work.display()))?;
            let top = CacheTree::from([(String::new(), top.clone())]);
            manifest::create_tree(&upper, &top, &|_, _| bail!("a directory has no files"))?;
            if damaged.iter().try_for_each(|path| hide_file(&upper, path, tree)).is_ok() {
                return Ok(CacheLayers { lower: Some(lower), upper, work });
            }
            // This machine cannot create device nodes here, so the files are copied.
            remove(&upper)?;
        }
        manifest::create_tree(&upper, tree, &|path, to| copy(&lower.join(path), to, &tree[path]))?;
        Ok(CacheLayers { lower: None, upper, work })
    }

    /// Returns whether a step can be skipped because it was done before and nothing has changed since.
    pub fn is_done(&self, step: &str) -> Result<bool> {
        let Some(base) = self.base.as_ref().filter(|base| base.index.done.contains(step)) else {
            return Ok(false);
        };
        for (cache, layers) in self.layers.iter().enumerate() {
            let changes = CacheChanges::read(&layers.upper)?;
            let tree = match layers.lower {
                Some(_) => changes.over(&self.trees[cache]),
                None => changes.tree,
            };
            if tree != base.index.trees[cache] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Records that a step was done. It can be skipped until something changes.
    pub fn note_done(&mut self, step: String) {
        self.done.insert(step);
    }

    /// Publishes the present content, merged with the content that others published meanwhile, and continues with the
    /// result. Later writes of steps stay in this bake. Returns the number of added bytes.
    pub fn publish(&mut self) -> Result<u64> {
        let mut mine = Vec::new();
        for (cache, layers) in self.layers.iter().enumerate() {
            let changes = CacheChanges::read(&layers.upper)?;
            let tree = match layers.lower {
                Some(_) => changes.over(&self.trees[cache]),
                None => changes.tree.clone(),
            };
            mine.push((changes, tree));
        }
        let store_lock = self.store.lock()?;
        let newest = CacheGeneration::newest(&self.key, self.holds.len())?;
        let theirs = |cache: usize| newest.as_ref().map(|newest| &newest.index.trees[cache]);
        let base_is_newest = match (&newest, &self.base) {
            (Some(newest), Some(base)) => newest.is(base),
            (None, None) => true,
            _ => false,
        };
        let mut trees = Vec::new();
        for (cache, (_, tree)) in mine.iter().enumerate() {
            trees.push(match theirs(cache) {
                Some(theirs) if !base_is_newest => merge(&self.trees[cache], tree, theirs, self.holds[cache]),
                _ => tree.clone(),
            });
        }
        let since = self.download_times(&mut trees, newest.as_ref());
        let indexes = |cache: usize| self.holds[cache] == Holds::Indexes;
        // Packages that were downloaded with another index were never checked against this one.
        let index_differs = !base_is_newest
            && (0..mine.len()).any(|cache| indexes(cache) && theirs(cache) != Some(&mine[cache].1));
        let done = match index_differs {
            true => BTreeSet::new(),
            false => self.steps_done(&trees, mine.iter().map(|(_, tree)| tree), newest.as_ref()),
        };
        let is_new = |cache: usize, tree: &CacheTree| theirs(cache) != Some(tree);
        let steps_unchanged = newest.as_ref().is_some_and(|newest| newest.index.done == done);
        // A file that replaces a damaged one has the same entry, so a comparison of the trees does not show it.
        let replaces_damaged = base_is_newest && self.found.1 > 0;
        if !replaces_damaged
            && steps_unchanged
            && !trees.iter().enumerate().any(|(cache, tree)| is_new(cache, tree))
        {
            return Ok(0);
        }
        let before: u64 = (0..trees.len()).filter_map(theirs).map(total_bytes).sum();
        let after: u64 = trees.iter().map(total_bytes).sum();
        let put = |cache: usize, path: &str, to: &Path| {
            let entry = &trees[cache][path];
            let from = if mine[cache].0.tree.get(path) == Some(entry) {
                self.layers[cache].upper.join(path)
            } else if let (Some(entry_of_base), Some(base)) = (self.trees[cache].get(path), &self.base)
                && entry_of_base == entry
            {
                base.tree(cache).join(path)
            } else {
                newest.as_ref().context("a file without a source")?.tree(cache).join(path)
            };
            Ok(fs::hard_link(&from, to)?)
        };
        let index = Index::new(trees.clone(), since, done);
        let published = CacheGeneration::publish(&self.key, index, &put)?;
        // These generations are released, so that the trim below may remove them.
        drop((self.base.replace(published), newest));
        self.trees = trees;
        self.found.1 = 0;
        let none = vec![Vec::new(); self.trees.len()];
        self.lay_out(&none)?;
        self.store.trim();
        drop(store_lock);
        Ok(after.saturating_sub(before))
    }

    /// Returns the steps that can be skipped with the content that is being published. These are the steps of a bake
    /// whose indexes are published and whose packages are all among the published ones.
    fn steps_done<'a>(
        &self,
        trees: &[CacheTree],
        mine: impl Iterator<Item = &'a CacheTree>,
        newest: Option<&CacheGeneration>,
    ) -> BTreeSet<String> {
        let holds = |cache: usize, of: &CacheTree| match self.holds[cache] {
            Holds::Indexes => trees[cache] == *of,
            // A file of that name from another bake can be used as well.
            Holds::Packages => of.keys().all(|path| trees[cache].contains_key(path)),
        };
        let mut done = BTreeSet::new();
        if mine.enumerate().all(|(cache, tree)| holds(cache, tree)) {
            done.extend(self.done.iter().cloned());
        }
        if let Some(newest) = newest
            && newest.index.trees.iter().enumerate().all(|(cache, tree)| holds(cache, tree))
            && newest.index.done.len() < DONE_MAX
        {
            done.extend(newest.index.done.iter().cloned());
        }
        done
    }

    /// Returns the download time of each file. While the store is above its limit, the oldest packages are dropped.
    fn download_times(
        &self,
        trees: &mut [CacheTree],
        newest: Option<&CacheGeneration>,
    ) -> Vec<BTreeMap<String, u64>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let now = u64::try_from(now).unwrap_or(0);
        let download_time = |cache: usize, path: &String| {
            let of = |generation: &CacheGeneration| generation.index.since[cache].get(path).copied();
            newest.and_then(of).or_else(|| self.base.as_ref().and_then(of)).unwrap_or(now)
        };
        let mut total: u64 = trees.iter().map(total_bytes).sum();
        let mut ages = Vec::new();
        for (cache, tree) in
            trees.iter().enumerate().filter(|(cache, _)| self.holds[*cache] == Holds::Packages)
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
        let file = |entry: &CacheEntry| matches!(entry, CacheEntry::File { .. });
        trees
            .iter()
            .enumerate()
            .map(|(cache, tree)| {
                let files = tree.iter().filter(|(_, entry)| file(entry));
                files.map(|(path, _)| (path.clone(), download_time(cache, path))).collect()
            })
            .collect()
    }
}

impl Drop for CacheSession {
    fn drop(&mut self) {
        // If this fails, the next bake removes the directory.
        _ = remove(&self.dir);
    }
}

/// Returns the valid part of a cached tree, and the paths that are damaged.
fn verify_tree(dir: &Path, tree: &CacheTree, holds: Holds) -> Result<(CacheTree, Vec<String>)> {
    let Ok((damaged, directories)) = manifest::differences(dir, tree) else {
        return Ok((CacheTree::new(), vec![String::new()])); // it cannot be read
    };
    if directories || !damaged.is_empty() && holds == Holds::Indexes {
        return Ok((CacheTree::new(), damaged));
    }
    let mut tree = tree.clone();
    tree.retain(|path, _| !damaged.contains(path));
    Ok((tree, damaged))
}

/// Hides a file of the lower directory. In an overlay, a device node with the number 0 marks a file as removed.
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

/// Copies a cached file, with its owner, mode and time.
fn copy(from: &Path, to: &Path, entry: &CacheEntry) -> Result<()> {
    let CacheEntry::File { mode, uid, gid, modified, .. } = entry else { bail!("it is not a file") };
    let mut file = File::options().write(true).create_new(true).open(to)?;
    std::io::copy(&mut manifest::open(from)?, &mut file)?;
    std::os::unix::fs::fchown(&file, Some(*uid), Some(*gid))?;
    file.set_permissions(Permissions::from_mode(*mode))?;
    let seconds = u64::try_from(modified.0).unwrap_or(0);
    file.set_modified(UNIX_EPOCH + std::time::Duration::new(seconds, modified.1.try_into().unwrap_or(0)))?;
    Ok(())
}

/// Merges the downloads of two bakes that began with `base`. An index is taken from one of them; packages are taken
/// from both.
fn merge(base: &CacheTree, mine: &CacheTree, theirs: &CacheTree, holds: Holds) -> CacheTree {
    if mine == base {
        return theirs.clone();
    }
    if holds == Holds::Indexes {
        return mine.clone();
    }
    let gone: BTreeSet<_> = base.keys().filter(|path| !mine.contains_key(*path)).collect();
    let mut all: CacheTree = theirs.clone();
    all.retain(|path, _| !gone.contains(path));
    let changed = mine.iter().filter(|(path, entry)| base.get(*path) != Some(entry));
    all.extend(changed.map(|(path, entry)| (path.clone(), entry.clone())));
    // An object whose directory is missing is dropped.
    let there = all.clone();
    all.retain(|path, _| {
        path.match_indices('/')
            .all(|(end, _)| matches!(there.get(&path[..end]), Some(CacheEntry::Directory { .. })))
    });
    all
}
