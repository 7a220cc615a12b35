//! What a bake works in: its own changes over what earlier bakes left.

use super::manifest;
use super::manifest::{Changes, Entry, Tree};
use super::store::{Generation, Index, Store, bytes, remove};
use anyhow::{Context, Result, bail};
use nix::fcntl::Flock;
use oven_distro::Holds;
use rustix::fs::{CWD, FileType, Mode};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Definitions that share a base are fewer, and each has two or three such steps.
const DONE_MAX: usize = 1000;

/// Where steps find a cache: `upper` over `lower`, or `upper` alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    pub lower: Option<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
}

/// A bake's own caches. What was not published goes with this value.
#[derive(Debug)]
pub struct Working {
    store: Store,
    key: PathBuf,
    holds: Vec<Holds>,
    seeds: Vec<Tree>,
    overlays: bool,
    base: Option<Generation>,
    /// What counts of the base, for each cache.
    trees: Vec<Tree>,
    layers: Vec<Layers>,
    /// How often it was laid out: each time in new directories.
    laid: u32,
    /// Steps of this bake that need not be done again.
    done: BTreeSet<String>,
    /// Bytes that were found, and objects that were not what was kept.
    pub found: (u64, usize),
    dir: PathBuf,
    _lock: Flock<File>,
}

impl Working {
    #[allow(clippy::too_many_arguments, reason = "the store alone calls it")]
    pub(crate) fn new(
        store: Store,
        key: PathBuf,
        holds: Vec<Holds>,
        dir: PathBuf,
        lock: Flock<File>,
        base: Option<Generation>,
        seeds: Vec<Tree>,
        overlays: bool,
    ) -> Result<Self> {
        let (mut trees, mut spoilt, mut found) = (Vec::new(), Vec::new(), (0, 0));
        for (cache, holds) in holds.iter().enumerate() {
            let (tree, bad) = match &base {
                Some(base) => sound(&base.tree(cache), &base.index.trees[cache], *holds)?,
                None => (Tree::new(), Vec::new()),
            };
            found = (found.0 + bytes(&tree), found.1 + bad.len());
            trees.push(tree);
            spoilt.push(bad);
        }
        let (layers, laid, done) = (Vec::new(), 0, BTreeSet::new());
        let mut working = Self {
            store,
            key,
            holds,
            seeds,
            overlays,
            base,
            trees,
            layers,
            laid,
            done,
            found,
            dir,
            _lock: lock,
        };
        working.lay(&spoilt)?;
        Ok(working)
    }

    /// By the caches of the plan.
    pub fn layers(&self) -> &[Layers] {
        &self.layers
    }

    /// Makes the directories for steps anew; `spoilt` is not to be seen.
    fn lay(&mut self, spoilt: &[Vec<String>]) -> Result<()> {
        self.laid += 1;
        let layers: Result<_> = self
            .trees
            .iter()
            .enumerate()
            .map(|(cache, tree)| self.layer(cache, tree, &spoilt[cache]))
            .collect();
        self.layers = layers?;
        Ok(())
    }

    fn layer(&self, cache: usize, tree: &Tree, spoilt: &[String]) -> Result<Layers> {
        let made = |what: &str| self.dir.join(format!("{what}-{cache}-{}", self.laid));
        let (upper, work) = (made("upper"), made("work"));
        let Some((base, top)) = self.base.as_ref().zip(tree.get("")) else {
            manifest::make(&upper, &self.seeds[cache], &|_, _| bail!("a new cache has no files"))?;
            return Ok(Layers { lower: None, upper, work });
        };
        let lower = base.tree(cache);
        if self.overlays {
            fs::create_dir(&work).with_context(|| format!("making {}", work.display()))?;
            let top = Tree::from([(String::new(), top.clone())]);
            manifest::make(&upper, &top, &|_, _| bail!("a directory alone"))?;
            if spoilt.iter().try_for_each(|path| cover(&upper, path, tree)).is_ok() {
                return Ok(Layers { lower: Some(lower), upper, work });
            }
            // No right to make what covers a file.
            remove(&upper)?;
        }
        manifest::make(&upper, tree, &|path, to| copy(&lower.join(path), to, &tree[path]))?;
        Ok(Layers { lower: None, upper, work })
    }

    /// Whether a step has nothing to do: it was done once, and nothing is different since.
    pub fn is_done(&self, step: &str) -> Result<bool> {
        let Some(base) = self.base.as_ref().filter(|base| base.index.done.contains(step)) else {
            return Ok(false);
        };
        for (cache, layers) in self.layers.iter().enumerate() {
            let changes = Changes::read(&layers.upper)?;
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

    /// A step was done, and need not be done again as long as nothing is different.
    pub fn note_done(&mut self, step: String) {
        self.done.insert(step);
    }

    /// Publishes what is there now, together with what others published meanwhile, and goes on with that: what steps do
    /// from now on stays here. Answers how many bytes came.
    pub fn publish(&mut self) -> Result<u64> {
        let mut mine = Vec::new();
        for (cache, layers) in self.layers.iter().enumerate() {
            let changes = Changes::read(&layers.upper)?;
            let tree = match layers.lower {
                Some(_) => changes.over(&self.trees[cache]),
                None => changes.tree.clone(),
            };
            mine.push((changes, tree));
        }
        let turn = self.store.lock()?;
        let newest = Generation::newest(&self.key, self.holds.len())?;
        let theirs = |cache: usize| newest.as_ref().map(|newest| &newest.index.trees[cache]);
        let same = match (&newest, &self.base) {
            (Some(newest), Some(base)) => newest.is(base),
            (None, None) => true,
            _ => false,
        };
        let mut trees = Vec::new();
        for (cache, (_, tree)) in mine.iter().enumerate() {
            trees.push(match theirs(cache) {
                Some(theirs) if !same => together(&self.trees[cache], tree, theirs, self.holds[cache]),
                _ => tree.clone(),
            });
        }
        let since = self.since(&mut trees, newest.as_ref());
        let indexes = |cache: usize| self.holds[cache] == Holds::Indexes;
        // Of packages that came with another index nobody has seen whether they are what this one says.
        let apart =
            !same && (0..mine.len()).any(|cache| indexes(cache) && theirs(cache) != Some(&mine[cache].1));
        let done = match apart {
            true => BTreeSet::new(),
            false => self.steps_done(&trees, mine.iter().map(|(_, tree)| tree), newest.as_ref()),
        };
        let is_new = |cache: usize, tree: &Tree| theirs(cache) != Some(tree);
        let as_before = newest.as_ref().is_some_and(|newest| newest.index.done == done);
        // What was downloaded anew says the same of itself as what was spoilt.
        let heals = same && self.found.1 > 0;
        if !heals && as_before && !trees.iter().enumerate().any(|(cache, tree)| is_new(cache, tree)) {
            return Ok(0);
        }
        let before: u64 = (0..trees.len()).filter_map(theirs).map(bytes).sum();
        let after: u64 = trees.iter().map(bytes).sum();
        let put = |cache: usize, path: &str, to: &Path| {
            let entry = &trees[cache][path];
            let from = if mine[cache].0.tree.get(path) == Some(entry) {
                self.layers[cache].upper.join(path)
            } else if let (Some(entry_of_base), Some(base)) = (self.trees[cache].get(path), &self.base)
                && entry_of_base == entry
            {
                base.tree(cache).join(path)
            } else {
                newest.as_ref().context("a file of nobody")?.tree(cache).join(path)
            };
            Ok(fs::hard_link(&from, to)?)
        };
        let index = Index::new(trees.clone(), since, done);
        let published = Generation::publish(&self.key, index, &put)?;
        // Looked at no more: what is trimmed below may be these.
        drop((self.base.replace(published), newest));
        self.trees = trees;
        self.found.1 = 0;
        let none = vec![Vec::new(); self.trees.len()];
        self.lay(&none)?;
        self.store.trim();
        drop(turn);
        Ok(after.saturating_sub(before))
    }

    /// The steps that have nothing to do where there is what is being published: those of a bake whose indexes these are,
    /// and whose packages are all among them.
    fn steps_done<'a>(
        &self,
        trees: &[Tree],
        mine: impl Iterator<Item = &'a Tree>,
        newest: Option<&Generation>,
    ) -> BTreeSet<String> {
        let holds = |cache: usize, of: &Tree| match self.holds[cache] {
            Holds::Indexes => trees[cache] == *of,
            // Another's file of that name serves as well.
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

    /// When each file came. Those that came first are left out where there is more than the store may hold.
    fn since(&self, trees: &mut [Tree], newest: Option<&Generation>) -> Vec<BTreeMap<String, u64>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let now = u64::try_from(now).unwrap_or(0);
        let known = |cache: usize, path: &String| {
            let of = |generation: &Generation| generation.index.since[cache].get(path).copied();
            newest.and_then(of).or_else(|| self.base.as_ref().and_then(of)).unwrap_or(now)
        };
        let mut held: u64 = trees.iter().map(bytes).sum();
        let mut ages = Vec::new();
        for (cache, tree) in
            trees.iter().enumerate().filter(|(cache, _)| self.holds[*cache] == Holds::Packages)
        {
            for (path, entry) in tree {
                if let Entry::File { size, .. } = entry {
                    ages.push((known(cache, path), cache, path.clone(), *size));
                }
            }
        }
        ages.sort();
        for (_, cache, path, size) in ages {
            if held <= self.store.limit() {
                break;
            }
            trees[cache].remove(&path);
            held -= size;
        }
        let file = |entry: &Entry| matches!(entry, Entry::File { .. });
        trees
            .iter()
            .enumerate()
            .map(|(cache, tree)| {
                let files = tree.iter().filter(|(_, entry)| file(entry));
                files.map(|(path, _)| (path.clone(), known(cache, path))).collect()
            })
            .collect()
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        // What stays, the next bake removes.
        _ = remove(&self.dir);
    }
}

/// What counts of a kept tree, and what is not what it was.
fn sound(dir: &Path, tree: &Tree, holds: Holds) -> Result<(Tree, Vec<String>)> {
    let Ok((spoilt, directories)) = manifest::differences(dir, tree) else {
        return Ok((Tree::new(), vec![String::new()])); // it cannot be read
    };
    if directories || !spoilt.is_empty() && holds == Holds::Indexes {
        return Ok((Tree::new(), spoilt));
    }
    let mut tree = tree.clone();
    tree.retain(|path, _| !spoilt.contains(path));
    Ok((tree, spoilt))
}

/// Hides a file of the lower directory: an overlay takes a device with the number 0 for a hole.
fn cover(upper: &Path, path: &str, tree: &Tree) -> Result<()> {
    let parents: Vec<_> = path.match_indices('/').map(|(end, _)| &path[..end]).collect();
    for parent in parents.into_iter().filter(|parent| !upper.join(parent).exists()) {
        let of = |entry: &Entry| Tree::from([(String::new(), entry.clone())]);
        let one = tree.get(parent).map(of).context("a file without a directory")?;
        manifest::make(&upper.join(parent), &one, &|_, _| bail!("a directory alone"))?;
    }
    rustix::fs::mknodat(CWD, upper.join(path), FileType::CharacterDevice, Mode::empty(), 0)?;
    Ok(())
}

/// A copy of a kept file, as it was.
fn copy(from: &Path, to: &Path, entry: &Entry) -> Result<()> {
    let Entry::File { mode, uid, gid, modified, .. } = entry else { bail!("it is no file") };
    let mut file = File::options().write(true).create_new(true).open(to)?;
    std::io::copy(&mut manifest::open(from)?, &mut file)?;
    std::os::unix::fs::fchown(&file, Some(*uid), Some(*gid))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(*mode))?;
    let seconds = u64::try_from(modified.0).unwrap_or(0);
    file.set_modified(UNIX_EPOCH + std::time::Duration::new(seconds, modified.1.try_into().unwrap_or(0)))?;
    Ok(())
}

/// What two bakes that began with `base` leave. An index is one's or the other's; of packages each adds its own.
fn together(base: &Tree, mine: &Tree, theirs: &Tree, holds: Holds) -> Tree {
    if mine == base {
        return theirs.clone();
    }
    if holds == Holds::Indexes {
        return mine.clone();
    }
    let gone: BTreeSet<_> = base.keys().filter(|path| !mine.contains_key(*path)).collect();
    let mut all: Tree = theirs.clone();
    all.retain(|path, _| !gone.contains(path));
    let changed = mine.iter().filter(|(path, entry)| base.get(*path) != Some(entry));
    all.extend(changed.map(|(path, entry)| (path.clone(), entry.clone())));
    // Nothing without the directory that it is in.
    let there = all.clone();
    all.retain(|path, _| {
        path.match_indices('/')
            .all(|(end, _)| matches!(there.get(&path[..end]), Some(Entry::Directory { .. })))
    });
    all
}
