//! The package cache: downloads of package managers are stored on this machine for later bakes.
//!
//! A plan lists its caches. A cache is a directory to which a package manager downloads. The steps that download
//! packages are called fetch steps. They run no code of packages. Fetch steps see the downloads of earlier bakes with
//! the same base and the same package sources. Before a bake uses the caches, oven compares each cached file with its
//! recorded digest.
//!
//! oven publishes the downloads for later bakes before package code can run. So published caches contain only downloads
//! of fetch steps. Later steps cannot change published files. The definition's scripts can write to the caches, but
//! only later steps of the same bake see what they wrote. These files are discarded when the bake ends.

mod area;
pub(crate) mod key;
pub(crate) mod manifest;
mod session;
pub mod store;
#[cfg(test)]
mod tests;

use crate::disk::step_record::RecordedCaches;
use crate::error::{Failure, Kind};
use crate::image::limits::StoredPaths;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::report::Report;
use crate::sandbox::spec::CacheMount;
use crate::sys::fds::open_directory;
use crate::sys::mount::api::overlay;
use crate::sys::tasks::{self, CancelFlag};
use anyhow::{Context, Result};
use manifest::{CacheEntry, CacheTree};
use oven_distro::{Cache, Phase, Plan, Shim};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::FileType;
use session::{CacheLayers, CacheSession};
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::time::Duration;
pub use store::{CacheStore, PackageCache};
use tokio::task::JoinHandle;

/// The package cache's directory, below a site's state directory.
pub const DIR: &str = "packages";
/// The size limit of the package cache in bytes. This is enough for four base images with about 1 GiB each. 1 GiB is
/// enough for forty server packages with their dependencies, the indexes, and decompressed files. A larger cache would
/// delay bakes, because each bake verifies all cached files of its base image. A bake verifies a few gigabytes per
/// second.
pub const LIMIT: u64 = 4 << 30;

/// The maximum number of directories that a new cache takes over from the image. Usual images have less than 20.
const SEED_MAX: usize = 1000;
/// The number of bytes that must stay free on this machine's disk. If fewer bytes are free, a step that downloads
/// fails. So the builder continues to work even if an image's package manager downloads too much.
const MIN_FREE: u64 = 1 << 30;
/// The number of inodes that must stay free on this machine's disk, like [`MIN_FREE`].
const MIN_FREE_INODES: u64 = 20_000;
/// The interval between checks of the free space. The fastest disks write about 500 MiB in this time.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How a step may use the caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheAccess {
    /// The step sees the image's own directories instead of the caches.
    None,
    /// The step sees the caches, but its writes are discarded when it ends.
    Read,
    /// The step sees the caches, and later steps of this bake see its writes. When the first command that may run
    /// package code or a script starts, the downloads so far are published for later bakes. All other writes are
    /// discarded when the bake ends.
    Write,
}

/// The data that select a bake's caches.
pub struct CacheRequest<'a> {
    /// The package cache; `None` means that nothing is cached.
    pub cache: Option<&'a PackageCache>,
    pub plan: &'a Plan,
    /// The key of the caches. If it is `None`, it is computed from the base, the plan and the image.
    pub key: Option<&'a str>,
    pub image: &'a ImageTree,
    /// The certificates that fetch steps see.
    pub certificates: Option<Shim>,
    pub report: &'a Report,
}

/// The access to the caches that a command requests.
#[derive(Debug, Clone, Copy)]
pub struct CacheUse {
    /// Whether the command runs neither package code nor a script.
    pub trusted: bool,
    pub fetches: bool,
    pub access: CacheAccess,
}

/// The caches of one bake. The first step that needs them waits until they are open.
pub struct DownloadCaches<'a> {
    request: CacheRequest<'a>,
    caches: RefCell<Option<OpenCaches>>,
    /// The caches that a thread opens in the background while the first steps run. `None` if no thread was started, or
    /// if a step already took the thread's result.
    opening: RefCell<Option<Result<Option<Opening>>>>,
    /// Whether opening the caches was tried, successfully or not.
    tried_to_open: Cell<bool>,
    /// Set before the first command that may run package code or a script. Later downloads are not published.
    distrusted: Cell<bool>,
}

impl<'a> DownloadCaches<'a> {
    /// Starts to open the caches in the background if a step of the plan will need them. Meanwhile, steps can run, and
    /// files of the plan can be placed.
    pub fn new(request: CacheRequest<'a>) -> Self {
        let fetches = request.plan.steps.iter().any(|step| step.phase == Phase::Fetch);
        let opening = request.cache.filter(|_| fetches).map(|cache| Opening::begin(cache, &request));
        Self {
            request,
            caches: RefCell::default(),
            opening: RefCell::new(opening),
            tried_to_open: Cell::default(),
            distrusted: Cell::default(),
        }
    }

    /// Returns the cache mounts of a command. Before the first untrusted command, publishes the downloads.
    pub async fn mounts(&self, wanted: CacheUse) -> Result<Vec<CacheMount>> {
        let report = self.request.report;
        if !wanted.trusted {
            self.settle().await;
        }
        let Some(cache) = self.request.cache else { return Ok(Vec::new()) };
        if wanted.fetches && !self.tried_to_open.replace(true) {
            let opening = self.opening.take().unwrap_or_else(|| Opening::begin(cache, &self.request));
            *self.caches.borrow_mut() = match OpenCaches::open(opening, report).await {
                Ok(caches) => caches,
                Err(error) => {
                    let dir = cache.store.dir().display();
                    report.warn(format!("the package cache in {dir} is not used: {error:#}"));
                    None
                }
            };
        }
        if wanted.access == CacheAccess::Write {
            self.limit_writes().await;
        }
        Ok(self.caches.borrow().as_ref().map_or_else(Vec::new, |caches| caches.mounts(wanted.access)))
    }

    /// Limits the size and the number of the files that steps write to the caches. If this machine cannot do this, only
    /// the free space is watched ([`Self::full`]).
    async fn limit_writes(&self) {
        let Some(mut caches) = self.caches.take() else { return };
        let Some(mut working) = caches.working.take() else { return };
        let limited = tokio::task::spawn_blocking(move || working.limit_writes().map(|()| working)).await;
        // If this failed, later steps see the image's own directories.
        let mut working = match limited.map_err(anyhow::Error::from).flatten() {
            Ok(working) => working,
            Err(error) => {
                self.request.report.warn(format!("packages are not cached: {error:#}"));
                return;
            }
        };
        if let Some(error) = working.take_unlimited() {
            self.request.report.warn(format!(
                "downloads have no limit for their size, so oven only ends them if less than {} MiB are free: {error:#}",
                MIN_FREE >> 20
            ));
        }
        caches.working = Some(working);
        *self.caches.borrow_mut() = Some(caches);
    }

    /// Returns the failure of a step that wrote to the caches and reached the limit of the downloads.
    pub fn limit_failure(&self) -> Option<Failure> {
        self.caches.borrow().as_ref()?.session()?.limit_failure()
    }

    /// Returns the package cache's directory if the caches are open.
    pub fn dir(&self) -> Option<PathBuf> {
        self.caches.borrow().as_ref().map(|caches| caches.dir.clone())
    }

    /// Describes the open caches for a step with this access, so that it can run again with them.
    pub fn record(&self, access: CacheAccess) -> Option<RecordedCaches> {
        let cache = self.request.cache.filter(|_| access != CacheAccess::None)?;
        let opened = self.caches.borrow();
        let opened = opened.as_ref()?;
        Some(RecordedCaches {
            base: cache.base.clone(),
            key: opened.key.clone(),
            caches: opened.caches.clone(),
            writable: access == CacheAccess::Write,
        })
    }

    /// Waits until this machine's disk is almost full, and then returns the failure of the step. `writes` is false if
    /// the step does not write to the caches. Never returns if `writes` is false or if the caches are not open.
    pub async fn full(&self, writes: bool) -> anyhow::Error {
        let Some(dir) = self.dir().filter(|_| writes) else { return std::future::pending().await };
        while !is_almost_full(&dir) {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        no_space_failure(&dir).into()
    }

    /// Returns whether a fetch step can be skipped. `step` is its key (`key::step_key`).
    pub async fn is_done(&self, step: &str) -> bool {
        if self.distrusted.get() {
            return false;
        }
        let working = self.caches.borrow_mut().as_mut().and_then(|caches| caches.working.take());
        let Some(working) = working else { return false };
        let step = step.to_owned();
        // The cached files may have to be read. Meanwhile, other bakes of this process continue.
        let checked = tokio::task::spawn_blocking(move || (working.is_done(&step), working)).await;
        let Ok((is_done, working)) = checked else { return false };
        if let Some(caches) = self.caches.borrow_mut().as_mut() {
            caches.working = Some(working);
        }
        is_done.unwrap_or(false)
    }

    /// Records that a fetch step was done.
    pub fn note_done(&self, step: String) {
        if let Some(session) = self.caches.borrow_mut().as_mut().and_then(|caches| caches.working.as_mut()) {
            session.note_done(step);
        }
    }

    /// Publishes the downloads of fetch steps at the first call. Later calls do nothing, because package code or a
    /// script may have run after the first call.
    pub async fn settle(&self) {
        if self.distrusted.replace(true) {
            return;
        }
        let caches = self.caches.take();
        if let Some(caches) = caches {
            *self.caches.borrow_mut() = caches.publish().await;
        }
    }
}

/// The caches that are open. When the value is dropped, the downloads that were not published are removed. If that
/// fails, a warning is printed.
struct OpenCaches {
    dir: PathBuf,
    key: String,
    caches: Vec<Cache>,
    /// `None` if publishing panicked.
    working: Option<CacheSession>,
    report: Report,
}

impl Drop for OpenCaches {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.working.take().map(CacheSession::close) {
            self.report.warn(format!("{error:#}"));
        }
    }
}

/// The caches that a thread is opening.
struct Opening {
    dir: PathBuf,
    key: String,
    caches: Vec<Cache>,
    working: JoinHandle<Result<CacheSession>>,
    /// Counts the bytes that the thread verifies.
    counter: CancelFlag,
}

impl Opening {
    /// Begins to open the plan's caches that list package sources. Returns `None` if the plan has no such cache, if the
    /// image has none of their directories, or if the disk is almost full.
    fn begin(cache: &PackageCache, request: &CacheRequest<'_>) -> Result<Option<Self>> {
        let (report, plan, inside) = (request.report, request.plan, request.image);
        let (mut caches, mut seeds) = (Vec::new(), Vec::new());
        for planned in plan.caches.iter().filter(|cache| !cache.sources.is_empty()) {
            match read_seed(inside, &planned.path)? {
                Some(seed) => {
                    seeds.push(seed);
                    caches.push(planned.clone());
                }
                None => report.detail(format!(
                    "{} is not cached, because the image does not have this directory",
                    planned.path
                )),
            }
        }
        if caches.is_empty() {
            return Ok(None);
        }
        let dir = cache.store.dir().to_owned();
        if dir.ancestors().find_map(crate::sys::space::free_space).is_some_and(|free| free < 2 * MIN_FREE) {
            report.warn(format!(
                "packages are not cached, because less than 2 GiB are free in {}",
                dir.display()
            ));
            return Ok(None);
        }
        let key = match request.key {
            Some(key) => key.to_owned(),
            None => key::cache_key(&cache.base, &caches, plan, request.certificates.as_ref(), inside)?,
        };
        let (store, opened, key_of_thread) = (cache.store.clone(), caches.clone(), key.clone());
        let counter = CancelFlag::default();
        let of_thread = counter.clone();
        let working = tokio::task::spawn_blocking(move || {
            let overlays = supports_overlays(&store);
            tasks::with_counter(of_thread, || {
                CacheSession::open_limited(&store, &key_of_thread, &opened, seeds, overlays)
            })
        });
        Ok(Some(Self { dir, key, caches, working, counter }))
    }
}

impl OpenCaches {
    /// Returns `None` in the same cases as [`Opening::begin`].
    async fn open(opening: Result<Option<Opening>>, report: &Report) -> Result<Option<Self>> {
        let Some(Opening { dir, key, caches, working, counter }) = opening? else { return Ok(None) };
        let step = report.step("cache", "checking the package cache");
        let verified = step.follow(tasks::follow(counter, working)).await;
        let mut working = verified.context("waiting for a thread")??;
        step.done();
        report_failures(&mut working, report);
        let (bytes, damaged) = (working.cached_bytes, working.damaged);
        if damaged > 0 {
            let dir = dir.display();
            report.warn(format!("{damaged} files in {dir} are damaged and are not used"));
        }
        report.detail(format!("{} MiB are cached", bytes >> 20));
        Ok(Some(Self { dir, key, caches, working: Some(working), report: report.clone() }))
    }

    fn session(&self) -> Option<&CacheSession> {
        self.working.as_ref()
    }

    fn mounts(&self, access: CacheAccess) -> Vec<CacheMount> {
        let mount = |(cache, layers): (&Cache, &CacheLayers)| {
            let CacheLayers { lower, upper, work } = layers.clone();
            let writable = access == CacheAccess::Write;
            CacheMount { target: cache.path.clone(), lower, upper, work, writable }
        };
        match access {
            CacheAccess::None => Vec::new(),
            _ => {
                let layers = self.session().map_or(&[][..], CacheSession::layers);
                self.caches.iter().zip(layers).map(mount).collect()
            }
        }
    }

    /// Publishes the downloads. If the publishing thread panics, the caches are lost, and this function returns `None`.
    /// Then later steps see the image's own directories.
    async fn publish(mut self) -> Option<Self> {
        let step = self.report.step("cache", "caching packages");
        let mut working = self.working.take()?;
        let counter = CancelFlag::default();
        let of_thread = counter.clone();
        let publishing = tokio::task::spawn_blocking(move || {
            (tasks::with_counter(of_thread, || working.publish()), working)
        });
        let published = step.follow(tasks::follow(counter, publishing)).await;
        let published = match published {
            Ok((published, mut working)) => {
                report_failures(&mut working, &self.report);
                self.working = Some(working);
                published
            }
            Err(error) => Err(error.into()),
        };
        match published {
            Ok(bytes) => self.report.detail(format!("{} MiB were added to the package cache", bytes >> 20)),
            Err(error) => self.report.warn(format!("packages are not cached: {error:#}")),
        }
        step.done();
        self.working.is_some().then_some(self)
    }
}

/// Prints a warning for everything in the package cache that could not be removed.
fn report_failures(working: &mut CacheSession, report: &Report) {
    for error in working.failures.drain(..) {
        report.warn(format!("{error:#}"));
    }
}

/// Returns whether less than [`MIN_FREE`] bytes or [`MIN_FREE_INODES`] inodes are free. A file system that creates
/// inodes as needed reports none in total.
fn is_almost_full(dir: &Path) -> bool {
    let low = |space: rustix::fs::StatVfs| {
        space.f_bavail.saturating_mul(space.f_frsize) < MIN_FREE
            || space.f_files > 0 && space.f_favail < MIN_FREE_INODES
    };
    rustix::fs::statvfs(dir).is_ok_and(low)
}

/// Returns the failure for a disk without space for downloads.
pub(crate) fn no_space_failure(dir: &Path) -> Failure {
    let what = format!("no space is left in {} for downloads", dir.display());
    Kind::Machine
        .failure(what)
        .hint("Free some space on that disk. You can also empty that directory while no bake runs.")
}

/// Returns the directories of a new cache. They have the paths, owners and modes of the image's directories at and
/// below `path`. Returns `None` if the image does not have the directory `path`.
fn read_seed(inside: &ImageTree, path: &str) -> Result<Option<CacheTree>> {
    let directory = |stat: &rustix::fs::Stat| CacheEntry::Directory {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
    };
    let Some(top) = inside.directory(path)? else { return Ok(None) };
    let mut tree = CacheTree::from([(String::new(), directory(&top))]);
    let mut stored = StoredPaths::new(inside.meter(), path);
    inside.walk(path, &mut |found, stat| {
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory
            && let Some(below) = found.strip_prefix(path)
        {
            stored.count(below)?;
            tree.insert(below.trim_start_matches('/').to_owned(), directory(stat));
        }
        if tree.len() > SEED_MAX {
            let what = format!("{path} in the image has more than {SEED_MAX} directories");
            return Err(inside.meter().exceeded(what));
        }
        Ok(Walk::On)
    })?;
    Ok(Some(tree))
}

/// Returns whether directories of the store can be the layers of an overlay. In a container, the store may be on a file
/// system that does not support this.
fn supports_overlays(store: &CacheStore) -> bool {
    let try_overlay = || -> Result<()> {
        let lock = store.lock()?;
        // Without a lock file of its own, the directory counts as a leftover if it is not removed here.
        let temp = store.work(&lock)?.keep();
        let layers = ["lower", "upper", "work"].map(|name| -> Result<OwnedFd> {
            std::fs::create_dir(temp.join(name))?;
            open_directory(&temp.join(name))
        });
        let [lower, upper, work] = layers;
        let made = overlay(lower?.as_fd(), upper?.as_fd(), work?.as_fd());
        store::remove(&temp)?;
        made?;
        Ok(())
    };
    try_overlay().is_ok()
}
