//! Mounts the file tree of a step, and makes it the root of the step's helper. The helper is process 1 of the step.

use super::mountpoints::Placeholders;
use super::paths::{api_directory, resolve};
use super::shims::ShimMounter;
use super::spec::StepSpec;
use super::tmpfs::{DiscardedWrites, FreeSpace, TmpfsLimits, divide, new_tmpfs};
use super::{dev, masks};
use crate::sandbox::spec::CacheMount;
use crate::sys::fds::open_directory;
use crate::sys::mount::api;
use crate::sys::mount::api::{PLAIN, READ_ONLY, attach, clone_mount, open_plain, restrict};
use crate::sys::mount::table;
use crate::sys::namespaces;
use anyhow::{Context, Result};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags};
use std::path::Path;

pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Each mount whose writes are discarded has a numbered directory for these writes. Caches use this number and higher
/// ones. The image's mounts use lower numbers.
const FIRST_CACHE_INDEX: usize = 1000;

/// Mounts the step's complete file tree, and makes the tree the root of this process, which has a private mount
/// namespace. Returns the file systems of the image whose writes are discarded.
pub fn enter_mount_tree(spec: &StepSpec) -> Result<Vec<DiscardedWrites>> {
    // After this call, mounts are propagated neither to other namespaces nor from them.
    namespaces::make_mounts_private().context("making the mounts private")?;
    let resolv_conf = resolv_conf(spec)?;
    let StepRoot { root, scratch, discarded } =
        root(spec).with_context(|| format!("mounting the step's root {}", spec.root.display()))?;
    if spec.throwaway {
        Placeholders::make(root.as_fd(), spec)?.forget();
    }
    let dev = dev::mount_dev(root.as_fd(), spec)?;
    mount_run(root.as_fd())?;
    let mut shims = ShimMounter { root: root.as_fd(), scratch: scratch.as_fd(), count: 0 };
    for (index, cache) in spec.caches.iter().enumerate() {
        let throwaway = spec.throwaway || !cache.writable;
        mount_cache(cache, root.as_fd(), throwaway.then_some((scratch.as_fd(), index)))
            .with_context(|| format!("mounting the cache of {} for the step", cache.target))?;
    }
    for bind in &spec.binds {
        shims.bind(bind).with_context(|| format!("binding {} for the step", bind.target))?;
    }
    for shim in &spec.shims {
        shims
            .put(&shim.path, shim.content.as_bytes(), shim.mode)
            .with_context(|| format!("placing {} for the step", shim.path))?;
    }
    if let Some(content) = resolv_conf {
        shims.put(RESOLV_CONF, &content, 0o644).with_context(|| format!("binding {RESOLV_CONF}"))?;
    }
    // `/proc` and `/sys` are mounted after the shims. If they were mounted earlier, a shim's path could lead into one
    // of them through a link.
    masks::mount_proc(root.as_fd(), dev.as_fd())?;
    masks::mount_sys(root.as_fd(), dev.as_fd())?;
    namespaces::pivot_to(&root)?;
    Ok(discarded)
}

/// Mounts a cache over the image's directory. If `throwaway` is given, the step can write to the cache, but its writes
/// are discarded when the step ends. Package managers must be able to write, because they create lock files even if
/// they only read packages.
fn mount_cache(
    cache: &CacheMount,
    root: BorrowedFd<'_>,
    throwaway: Option<(BorrowedFd<'_>, usize)>,
) -> Result<()> {
    // A package may have replaced the directory with another object. In that case the cache is not mounted, and steps
    // see that object.
    let open = || {
        let place = resolve(root, Path::new(&cache.target), true).ok();
        place.filter(|place| place.rest.is_empty()).map(|place| place.dir)
    };
    let Some(on) = open() else { return Ok(()) };
    attach(cache.make()?, on)?;
    if let Some((scratch, index)) = throwaway {
        // The cache is mounted on the directory now, so `open` returns the cache.
        let mounted = open().context("it no longer exists")?;
        let covered = self::throwaway(scratch, FIRST_CACHE_INDEX + index, mounted.as_fd())?;
        attach(covered, open().context("it no longer exists")?)?;
    }
    Ok(())
}

/// Returns the content of `/etc/resolv.conf` for a step with the network, or `None` if nothing is to be mounted.
fn resolv_conf(spec: &StepSpec) -> Result<Option<Vec<u8>>> {
    if !spec.network {
        return Ok(None);
    }
    if let Some(content) = &spec.resolv_conf {
        return Ok(Some(content.clone().into_bytes()));
    }
    match std::fs::read(RESOLV_CONF) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading this machine's {RESOLV_CONF}")),
    }
}

/// The root of a step.
struct StepRoot {
    root: OwnedFd,
    /// A tmpfs for files that oven creates for the step. Programs of the image cannot access it.
    scratch: OwnedFd,
    discarded: Vec<DiscardedWrites>,
}

/// Mounts the image's root, with the mounts below it, inside a new tmpfs.
fn root(spec: &StepSpec) -> Result<StepRoot> {
    let place = open(&spec.root)?;
    if spec.throwaway {
        return throwaway_root(spec, place);
    }
    let tree = clone_mount(&place, "", true)?;
    let scratch = new_scratch(&place, TmpfsLimits::throwaway())?;
    restrict(&tree, PLAIN, true)?;
    attach(&tree, open_plain(&scratch, "root")?)?;
    Ok(StepRoot { root: tree, scratch, discarded: Vec::new() })
}

fn new_scratch(place: &OwnedFd, limits: TmpfsLimits) -> Result<OwnedFd> {
    let scratch = new_tmpfs("0700", limits, PLAIN)?;
    attach(&scratch, place)?;
    rustix::fs::mkdirat(&scratch, "root", Mode::from_raw_mode(0o755))?;
    Ok(scratch)
}

/// Covers the image's root and the mounts below it with overlays, whose writes are discarded. Each file system of the
/// image has a separate tmpfs for its writes, which is as large as its free space.
fn throwaway_root(spec: &StepSpec, place: OwnedFd) -> Result<StepRoot> {
    let lower = lower(&spec.root)?;
    let device = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|stat| stat.st_dev);
    let mut file_systems = vec![(device(&place)?, FreeSpace::of(place.as_fd())?)];
    let mut file_system_of = Vec::new();
    for (_, mount) in &lower {
        let device = device(mount)?;
        let known = file_systems.iter().position(|(known, _)| *known == device);
        file_system_of.push(known.unwrap_or(file_systems.len()));
        if known.is_none() {
            file_systems.push((device, FreeSpace::of(mount.as_fd())?));
        }
    }
    let free: Vec<_> = file_systems.iter().map(|(_, free)| *free).collect();
    let limits = divide(TmpfsLimits::throwaway_in(free.len()), &free);
    let own: u64 = spec.shims.iter().map(|shim| (shim.content.len() as u64).next_multiple_of(4096)).sum();
    let scratch = new_scratch(&place, limits[0].with_own(own))?;
    let root = overlay(scratch.as_fd(), 0, place.as_fd())?;
    attach(&root, open_plain(&scratch, "root")?)?;
    let mut places = vec![scratch.try_clone().context("duplicating a descriptor")?];
    for (number, limits) in limits.iter().enumerate().skip(1) {
        let (name, tmpfs) = (format!("writes{number}"), new_tmpfs("0700", limits.with_own(0), PLAIN)?);
        rustix::fs::mkdirat(&scratch, &name, Mode::from_raw_mode(0o700))?;
        attach(&tmpfs, open_plain(&scratch, &name)?)?;
        places.push(tmpfs);
    }
    let mut discarded = vec![DiscardedWrites { path: "/".to_owned(), place: limits[0] }];
    for (index, (path, mount)) in lower.iter().enumerate() {
        let number = file_system_of[index];
        let covered = throwaway(places[number].as_fd(), index + 1, mount.as_fd())
            .and_then(|cover| Ok(attach(cover, open_plain(&root, path)?)?));
        covered.with_context(|| format!("mounting the step's /{path}"))?;
        if number > 0 && !file_system_of[..index].contains(&number) {
            discarded.push(DiscardedWrites { path: format!("/{path}"), place: limits[number] });
        }
    }
    Ok(StepRoot { root, scratch, discarded })
}

fn open(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

/// Returns the mounts below the image's root with their relative paths, parents first.
fn lower(root: &Path) -> Result<Vec<(String, OwnedFd)>> {
    let root = root.canonicalize()?;
    let mut found: Vec<(String, OwnedFd)> = Vec::new();
    for path in table::of_this_thread()?.into_iter().map(|entry| entry.path) {
        let Some(below) = path.strip_prefix(&root).ok().and_then(Path::to_str) else { continue };
        if !below.is_empty() && !found.iter().any(|(known, _)| known == below) {
            found.push((below.to_owned(), open(&path)?));
        }
    }
    Ok(found)
}

/// Creates an overlay over `lower`, so that the step's changes are discarded when the step ends. If the file system of
/// `lower` (such as vfat) does not support overlays, returns a read-only mount of `lower` instead.
fn throwaway(scratch: BorrowedFd<'_>, index: usize, lower: BorrowedFd<'_>) -> Result<OwnedFd> {
    if let Ok(overlay) = overlay(scratch, index, lower) {
        return Ok(overlay);
    }
    let read_only = clone_mount(lower, "", false)?;
    restrict(&read_only, READ_ONLY, false)?;
    Ok(read_only)
}

fn overlay(scratch: BorrowedFd<'_>, index: usize, lower: BorrowedFd<'_>) -> Result<OwnedFd> {
    let (upper, work) = (format!("upper{index}"), format!("work{index}"));
    let stat = rustix::fs::fstat(lower)?;
    for name in [&upper, &work] {
        rustix::fs::mkdirat(scratch, name, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    }
    api::overlay(lower, open_plain(scratch, &upper)?.as_fd(), open_plain(scratch, &work)?.as_fd())
}

/// Mounts an almost empty `/run`. So the step does not see this machine's sockets, and packages detect that the image
/// is not a running system.
fn mount_run(root: BorrowedFd<'_>) -> Result<()> {
    let run = new_tmpfs("0755", TmpfsLimits::run(), PLAIN)?;
    rustix::fs::mkdirat(&run, "lock", Mode::from_raw_mode(0o1777)).context("making /run/lock")?;
    attach(run, api_directory(root, "run")?).context("mounting /run")
}

impl CacheMount {
    /// Creates the cache's mount, which is not attached anywhere yet.
    pub(crate) fn make(&self) -> Result<OwnedFd> {
        let upper = open_directory(&self.upper)?;
        let mount = match &self.lower {
            Some(lower) => api::overlay(
                open_directory(lower)?.as_fd(),
                upper.as_fd(),
                open_directory(&self.work)?.as_fd(),
            )?,
            None => {
                clone_mount(&upper, "", false).with_context(|| format!("binding {}", self.upper.display()))?
            }
        };
        restrict(&mount, if self.writable { PLAIN } else { READ_ONLY }, false)?;
        Ok(mount)
    }
}
