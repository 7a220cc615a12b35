//! The limits of the file systems in memory to which a step can write.
//!
//! Without a `size`, the kernel gives half of the memory to each tmpfs. A step has several, so it could fill the whole
//! memory, and files in memory belong to no process that the kernel could kill. The limits below add up to at most half
//! of the memory on a machine with 2 GiB or more.

use super::spec::{DiscardMemory, FullMemory, StepSpec};
use crate::sys::mount::api::new_file_system;
use crate::sys::space::machine_memory;
use crate::text::escape_name;
use anyhow::Result;
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::mount::MountAttrFlags;
use std::path::Path;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Each file in memory takes at least a page, and about 1 KiB of the kernel's memory. So a limit for files of one per
/// 4 KiB does not stop a step before the limit for bytes does, unless its files are empty.
const BYTES_PER_FILE: u64 = 4096;
/// The maximum number of files, whatever the size is. They take about 300 MiB of the kernel's memory.
const MAX_FILES: u64 = 262_144;

/// The limits of a tmpfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TmpfsLimits {
    pub bytes: u64,
    /// The maximum number of files, directories and links.
    pub files: u64,
}

impl TmpfsLimits {
    const fn of(bytes: u64) -> Self {
        let files = bytes / BYTES_PER_FILE;
        Self { bytes, files: if files < MAX_FILES { files } else { MAX_FILES } }
    }

    /// The limits of `/dev`. Nodes and links need little space. If the node `/dev/sdx` does not exist,
    /// `dd of=/dev/sdx` creates a file in `/dev`. The number of files is enough for a disk with 128 partitions, each
    /// with ten links.
    pub const DEV: Self = Self { bytes: 4 * MIB, files: 4096 };

    /// The limits of `/run`, `/dev/shm`, and shared memory of System V: each an eighth of the memory, and at most
    /// 1 GiB. Programs put sockets and locks in `/run`. `/dev/shm` is as large as in a container (64 MiB) on a machine
    /// with 512 MiB, and is enough for a database that a test starts.
    pub fn run() -> Self {
        Self::run_of(machine_memory())
    }

    fn run_of(memory: u64) -> Self {
        Self::of((memory / 8).min(GIB))
    }

    /// The limits of all writes that are discarded when the step ends: writes of a test to the image, and writes to
    /// package caches that the step may only read. A quarter of the memory, at least 512 MiB, and at most 8 GiB. The
    /// writes of a test are also limited by the image's free space ([`divide`]).
    pub fn throwaway() -> Self {
        Self::throwaway_of(machine_memory())
    }

    fn throwaway_of(memory: u64) -> Self {
        Self::of((memory / 4).clamp(512 * MIB, 8 * GIB))
    }
}

impl std::fmt::Display for TmpfsLimits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} MiB and {} files", self.bytes / MIB, self.files)
    }
}

/// Room for oven's own files and directories in a file system for writes that are discarded.
const OWN: TmpfsLimits = TmpfsLimits { bytes: 64 << 10, files: 64 };

impl TmpfsLimits {
    /// The limits of all writes of a test, without what oven's own files need in `count` file systems.
    pub fn throwaway_in(count: usize) -> Self {
        let (all, count) = (Self::throwaway(), count as u64);
        Self {
            bytes: all.bytes.saturating_sub(count * OWN.bytes),
            files: all.files.saturating_sub(count * OWN.files),
        }
    }
}

/// The free space of a file system of the image.
#[derive(Debug, Clone, Copy)]
pub struct FreeSpace {
    bytes: u64,
    /// `None` if the file system has no fixed number of inodes.
    files: Option<u64>,
}

impl FreeSpace {
    /// The free space of the file system of a directory, as `df` shows it.
    pub fn of(dir: BorrowedFd<'_>) -> Result<Self> {
        let stat = rustix::fs::fstatvfs(dir)?;
        let files = (stat.f_files > 0).then_some(stat.f_favail);
        Ok(Self { bytes: stat.f_bavail.saturating_mul(stat.f_frsize), files })
    }
}

/// A place for writes to one file system of the image that are discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiscardLimits {
    pub limits: TmpfsLimits,
    /// Whether the limits are the image's free space. Otherwise they are smaller, because of this machine's memory.
    pub is_free_space: bool,
}

impl DiscardLimits {
    /// The limits of the file system in memory, which also has oven's own files of `own` bytes.
    pub fn with_own(self, own: u64) -> TmpfsLimits {
        TmpfsLimits { bytes: self.limits.bytes + OWN.bytes + own, files: self.limits.files + OWN.files }
    }
}

/// Divides `all`, the memory for writes that are discarded, among the file systems of an image. Each gets its free
/// space. If the memory does not suffice for all of them, the largest ones get less.
pub fn divide(all: TmpfsLimits, free: &[FreeSpace]) -> Vec<DiscardLimits> {
    let mut order: Vec<usize> = (0..free.len()).collect();
    order.sort_by_key(|&index| free[index].bytes);
    let mut found = vec![DiscardLimits { limits: all, is_free_space: false }; free.len()];
    let (mut rest, mut left) = (all, free.len() as u64);
    for index in order {
        let share = TmpfsLimits { bytes: rest.bytes / left, files: rest.files / left };
        let FreeSpace { bytes, files } = free[index];
        let files = files.unwrap_or(u64::MAX).min(share.files);
        let limits = TmpfsLimits { bytes: bytes.min(share.bytes), files };
        found[index] = DiscardLimits { limits, is_free_space: bytes <= share.bytes };
        (rest.bytes, rest.files, left) = (rest.bytes - limits.bytes, rest.files - limits.files, left - 1);
    }
    found
}

/// A file system of the image whose writes are discarded.
#[derive(Debug)]
pub struct DiscardedWrites {
    /// The mount point in the image.
    pub path: String,
    pub place: DiscardLimits,
}

impl DiscardedWrites {
    pub fn memory(&self) -> DiscardMemory {
        DiscardMemory { path: self.path.clone(), if_full: discard_is_full(self) }
    }
}

/// Returns each of the step's file systems in memory that is full. Call this in the step's mount tree.
pub fn full_file_systems(spec: &StepSpec, discarded: &[DiscardedWrites]) -> Vec<FullMemory> {
    let (run, dev) = (TmpfsLimits::run(), TmpfsLimits::DEV);
    let mut full = Vec::new();
    for (path, limits) in [("/run", run), ("/dev/shm", run), ("/dev", dev)] {
        if is_full(path) {
            full.push(FullMemory::of_machine(memory_is_full(path, limits)));
        }
    }
    // An overlay reports the space of the file system to which it writes.
    full.extend(discarded.iter().filter(|writes| is_full(&writes.path)).map(discard_is_full));
    if spec.throwaway {
        return full;
    }
    let read_only = spec.caches.iter().filter(|cache| !cache.writable).map(|cache| &*cache.target);
    // All writes that are discarded are in one file system, so one cache is enough.
    if let Some(target) = read_only.into_iter().find(|target| is_overlay(target) && is_full(target)) {
        let limits = TmpfsLimits::throwaway();
        full.push(FullMemory::of_machine(format!(
            "the memory for writes that are discarded, which may have {limits}, is full (writes to {})",
            escape_name(target)
        )));
    }
    full
}

fn memory_is_full(path: &str, limits: TmpfsLimits) -> String {
    format!("{path}, which is in memory and may have {limits}, is full")
}

/// Describes a file system in memory that was full when a program wrote to this path, or returns `None` if the path is
/// not in memory.
pub fn full_memory_of(path: &str) -> Option<FullMemory> {
    let (run, dev) = (TmpfsLimits::run(), TmpfsLimits::DEV);
    let mounts = [("/run", run), ("/dev/shm", run), ("/dev", dev)];
    let (mount, limits) = mounts.into_iter().find(|(mount, _)| Path::new(path).starts_with(mount))?;
    Some(FullMemory::of_machine(memory_is_full(mount, limits)))
}

fn discard_is_full(writes: &DiscardedWrites) -> FullMemory {
    let (path, DiscardLimits { limits, is_free_space }) = (escape_name(&writes.path), writes.place);
    let why = if is_free_space {
        format!("which is as large as the image's free space on {path} and may have {limits}")
    } else {
        format!("which may have {limits}")
    };
    let message = format!("the memory for writes that are discarded, {why}, is full");
    FullMemory { message, of_image: is_free_space.then(|| writes.path.clone()) }
}

/// Returns whether a path is on an overlay. If a package has replaced the directory of a cache with another object, the
/// cache is not mounted, and the path is on the image's disk.
fn is_overlay(path: &str) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type as u64 == libc::OVERLAYFS_SUPER_MAGIC as u64)
}

/// Returns whether at most 1/1024 of a file system is free.
fn is_full(path: &str) -> bool {
    let low = |free: u64, all: u64| all > 0 && free <= all / 1024;
    rustix::fs::statvfs(path)
        .is_ok_and(|space| low(space.f_bavail, space.f_blocks) || low(space.f_favail, space.f_files))
}

/// Creates a tmpfs that is not attached anywhere yet. `mode` is the mode of its root directory.
pub fn new_tmpfs(mode: &str, limits: TmpfsLimits, attributes: MountAttrFlags) -> Result<OwnedFd> {
    let (size, files) = (limits.bytes.to_string(), limits.files.to_string());
    new_file_system("tmpfs", &[("mode", mode), ("size", &size), ("nr_inodes", &files)], attributes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_follow_the_memory_and_leave_half_of_it() {
        for (memory, run, throwaway) in [
            (GIB, 128 * MIB, 512 * MIB),
            (2 * GIB, 256 * MIB, 512 * MIB),
            (8 * GIB, GIB, 2 * GIB),
            (512 * GIB, GIB, 8 * GIB),
        ] {
            let (small, large) = (TmpfsLimits::run_of(memory), TmpfsLimits::throwaway_of(memory));
            assert_eq!((small.bytes, large.bytes), (run, throwaway), "{memory}");
            assert!(memory < 2 * GIB || 2 * small.bytes + large.bytes <= memory / 2, "{memory}");
            assert!(small.files <= MAX_FILES && large.files <= MAX_FILES, "{memory}");
        }
        assert_eq!(TmpfsLimits::of(256 * MIB).files, 65_536);
    }

    #[test]
    fn discarded_writes_get_the_free_space_of_the_image_if_the_memory_suffices() {
        let divide = |all: u64, free: &[(u64, Option<u64>)]| -> Vec<(u64, u64, bool)> {
            let free: Vec<_> =
                free.iter().map(|&(mib, files)| FreeSpace { bytes: mib * MIB, files }).collect();
            let found = divide(TmpfsLimits { bytes: all * MIB, files: 1000 }, &free);
            found.into_iter().map(|of| (of.limits.bytes / MIB, of.limits.files, of.is_free_space)).collect()
        };
        assert_eq!(divide(512, &[(300, Some(90))]), [(300, 90, true)]);
        assert_eq!(divide(512, &[(3000, None)]), [(512, 1000, false)]);
        assert_eq!(divide(512, &[(0, Some(0))]), [(0, 0, true)]);
        // The small ones have their free space, and the root gets the rest.
        let root_boot_efi = [(9000, Some(90_000)), (60, Some(10)), (1, None)];
        assert_eq!(divide(512, &root_boot_efi), [(451, 657, false), (60, 10, true), (1, 333, true)]);
        assert_eq!(divide(600, &[(400, None), (400, None)]), [(300, 500, false), (300, 500, false)]);
        // The kernel takes 0 for no limit.
        let own = DiscardLimits { limits: TmpfsLimits { bytes: 0, files: 0 }, is_free_space: true };
        assert!(own.with_own(0).bytes >= 4096 && own.with_own(0).files > 10);
    }
}
