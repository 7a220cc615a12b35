//! What package managers download, kept on this machine from bake to bake.
//!
//! A plan names its caches. Fetch steps, which run no package's code, see them with what earlier bakes of the same base
//! and the same sources left, each file held against the digest that it had; they alone write there. As soon as package
//! code may run, what there is has been published for the next bake, and nothing that steps do changes it. Scripts of the definition
//! may use it as their own: what they write goes when the bake ends, and so does what is fetched after them.

pub(crate) mod key;
pub(crate) mod manifest;
mod session;
mod store;
#[cfg(test)]
mod tests;

use super::command::{Call, Runner};
use crate::error::{Failure, Kind};
use crate::image::tree::Inside;
use crate::image::walk::Go;
use crate::report::Report;
use crate::sandbox::spec::CacheMount;
use crate::sys::fds::open_directory;
use crate::sys::mount::api::overlay;
use anyhow::{Context, Result};
use manifest::{Entry, Tree};
use oven_distro::{Cache, Phase};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::FileType;
use session::{Layers, Working};
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::time::Duration;
pub use store::Store;
use tokio::task::JoinHandle;

/// Below a site's state directory.
pub const DIR: &str = "packages";
/// Four bases with a server's usual set each: a gigabyte for forty packages with all that they need, their indexes, and
/// what was decompressed. All of a base's is read and checked in each bake, at some gigabytes a second.
pub const LIMIT: u64 = 4 << 30;

/// Of this machine's disk, downloads leave so much free: whatever an image's package manager does, the builder works on.
const FLOOR: u64 = 1 << 30;
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// What a step may do with the caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It sees what the image has.
    None,
    /// It sees them, and what it writes goes with it.
    Read,
    Write,
}

/// Where caches are kept, and whose they are.
#[derive(Debug, Clone)]
pub struct Kept {
    pub store: Store,
    /// The base image: what runs in fetch steps is its own, so that no other one trusts what they left.
    pub base: String,
}

/// The caches of a bake, from the moment on at which the first one is needed.
#[derive(Default)]
pub struct Downloads {
    caches: RefCell<Option<Caches>>,
    /// They are being looked for, beside what comes before the first step that needs them.
    opening: RefCell<Option<Result<Option<Opening>>>>,
    /// They were looked for.
    begun: Cell<bool>,
    /// Code of packages may have run, or a script: what is fetched from now on is for this bake alone.
    distrusted: Cell<bool>,
}

impl Downloads {
    /// Begins to look for them, if a step of the plan will need them. Steps may run meanwhile, and files of the plan be
    /// placed.
    pub fn look_ahead(&self, runner: &Runner<'_>) {
        let fetches = runner.work.plan.steps.iter().any(|step| step.phase == Phase::Fetch);
        if let Some(kept) = runner.work.kept.filter(|_| fetches) {
            *self.opening.borrow_mut() = Some(Opening::begin(kept, runner));
        }
    }

    /// What a call finds. Before the first one that is not trusted, what was fetched is published.
    pub async fn for_call(&self, runner: &Runner<'_>, call: &Call<'_>) -> Result<Vec<CacheMount>> {
        if !call.trusted {
            self.settle(runner.work.report).await;
        }
        let Some(kept) = &runner.work.kept else { return Ok(Vec::new()) };
        if call.fetches && !self.begun.replace(true) {
            let opening = self.opening.take().unwrap_or_else(|| Opening::begin(kept, runner));
            *self.caches.borrow_mut() = match Caches::open(opening, runner.work.report).await {
                Ok(caches) => caches,
                Err(error) => {
                    let dir = kept.store.dir().display();
                    runner
                        .work
                        .report
                        .warn(format!("what was downloaded before is not used ({dir}): {error:#}"));
                    None
                }
            };
        }
        Ok(self.caches.borrow().as_ref().map_or_else(Vec::new, |caches| caches.mounts(call.caches)))
    }

    /// Where downloads go, once one was begun.
    pub fn dir(&self) -> Option<PathBuf> {
        self.caches.borrow().as_ref().map(|caches| caches.dir.clone())
    }

    /// Comes back, with the reason, when a step that downloads has to end.
    pub async fn full(&self, writes: bool) -> anyhow::Error {
        let Some(dir) = self.dir().filter(|_| writes) else { return std::future::pending().await };
        while crate::sys::space::free_space(&dir).is_none_or(|free| free >= FLOOR) {
            tokio::time::sleep(LOOK).await;
        }
        no_room(&dir).into()
    }

    /// Whether a fetch step has nothing to do. `step` tells it from others, of other plans too.
    pub fn is_done(&self, step: &str) -> bool {
        let caches = self.caches.borrow();
        !self.distrusted.get()
            && caches.as_ref().is_some_and(|caches| caches.working.is_done(step).unwrap_or(false))
    }

    pub fn note_done(&self, step: String) {
        if let Some(caches) = self.caches.borrow_mut().as_mut() {
            caches.working.note_done(step);
        }
    }

    /// Publishes what fetch steps left, unless something else may have written there.
    pub async fn settle(&self, report: &Report) {
        if self.distrusted.replace(true) {
            return;
        }
        let caches = self.caches.take();
        if let Some(caches) = caches {
            *self.caches.borrow_mut() = caches.publish(report).await;
        }
    }
}

/// Those that are open.
struct Caches {
    dir: PathBuf,
    caches: Vec<Cache>,
    working: Working,
}

/// Those that a thread looks for.
struct Opening {
    dir: PathBuf,
    caches: Vec<Cache>,
    working: JoinHandle<Result<Working>>,
}

impl Opening {
    /// `None` if the plan has none, or the image has no place for them.
    fn begin(kept: &Kept, runner: &Runner<'_>) -> Result<Option<Self>> {
        let (report, plan, inside) = (runner.work.report, runner.work.plan, runner.place.inside);
        let (mut caches, mut seeds) = (Vec::new(), Vec::new());
        for cache in &plan.caches {
            match seed(inside, &cache.path)? {
                Some(seed) => {
                    seeds.push(seed);
                    caches.push(cache.clone());
                }
                None => report.detail(format!("{} is not kept: the image has no such directory", cache.path)),
            }
        }
        if caches.is_empty() {
            return Ok(None);
        }
        let dir = kept.store.dir().to_owned();
        if dir.ancestors().find_map(crate::sys::space::free_space).is_some_and(|free| free < 2 * FLOOR) {
            report.warn(format!("less than 2 GiB are free in {}: downloads are not kept", dir.display()));
            return Ok(None);
        }
        let key = key::of(&kept.base, &caches, plan, runner.certificates(), inside)?;
        let (store, of_plan) = (kept.store.clone(), caches.clone());
        let working = tokio::task::spawn_blocking(move || {
            let overlays = lays(&store);
            store.open(&key, &of_plan, seeds, overlays)
        });
        Ok(Some(Self { dir, caches, working }))
    }
}

impl Caches {
    /// `None` as above.
    async fn open(opening: Result<Option<Opening>>, report: &Report) -> Result<Option<Self>> {
        let Some(Opening { dir, caches, working }) = opening? else { return Ok(None) };
        let step = report.step("cache", "looking at what was downloaded before");
        let working = working.await.context("waiting for a thread")??;
        step.done();
        let (bytes, spoilt) = working.found;
        if spoilt > 0 {
            let dir = dir.display();
            report.warn(format!("{spoilt} files in {dir} are not what was downloaded: they are not used"));
        }
        report.detail(format!("{} MiB were downloaded before", bytes >> 20));
        Ok(Some(Self { dir, caches, working }))
    }

    fn mounts(&self, access: Access) -> Vec<CacheMount> {
        let mount = |(cache, layers): (&Cache, &Layers)| {
            let Layers { lower, upper, work } = layers.clone();
            let writable = access == Access::Write;
            CacheMount { target: cache.path.clone(), lower, upper, work, writable }
        };
        match access {
            Access::None => Vec::new(),
            _ => self.caches.iter().zip(self.working.layers()).map(mount).collect(),
        }
    }

    /// `None` if they are lost on the way; then steps see what the image has.
    async fn publish(self, report: &Report) -> Option<Self> {
        let step = report.step("cache", "keeping what was downloaded");
        let Self { dir, caches, mut working } = self;
        let published = tokio::task::spawn_blocking(move || (working.publish(), working)).await;
        let (published, working) = match published {
            Ok((published, working)) => (published, Some(working)),
            Err(error) => (Err(error.into()), None),
        };
        match published {
            Ok(bytes) => report.detail(format!("{} MiB more are kept", bytes >> 20)),
            Err(error) => report.warn(format!("what was downloaded is not kept: {error:#}")),
        }
        step.done();
        working.map(|working| Self { dir, caches, working })
    }
}

/// What to say where there is no room for downloads.
pub(crate) fn no_room(dir: &Path) -> Failure {
    let what = format!("there is no room in {} for what is downloaded", dir.display());
    Kind::Machine
        .failure(what)
        .hint("It may be emptied while nothing is baked; the disk that it is on is full.")
}

/// The directories that an empty cache begins with: those of the image, owners and modes included. `None` if the image
/// has no such directory.
fn seed(inside: &Inside, path: &str) -> Result<Option<Tree>> {
    let directory = |stat: &rustix::fs::Stat| Entry::Directory {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
    };
    let Some(top) = inside.directory(path)? else { return Ok(None) };
    let mut tree = Tree::from([(String::new(), directory(&top))]);
    inside.walk(path, &mut |found, stat| {
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            && let Some(below) = found.strip_prefix(path)
        {
            tree.insert(below.trim_start_matches('/').to_owned(), directory(stat));
        }
        Ok(Go::On)
    })?;
    Ok(Some(tree))
}

/// Whether one directory of the store can be laid over another: in a container it may be on what cannot be laid on.
fn lays(store: &Store) -> bool {
    let try_it = || -> Result<()> {
        let turn = store.lock()?;
        let temp = store.work(&turn)?;
        let made = ["lower", "upper", "work"].map(|name| -> Result<OwnedFd> {
            std::fs::create_dir(temp.path().join(name))?;
            open_directory(&temp.path().join(name))
        });
        let [lower, upper, work] = made;
        overlay(lower?.as_fd(), upper?.as_fd(), work?.as_fd())?;
        Ok(())
    };
    try_it().is_ok()
}
