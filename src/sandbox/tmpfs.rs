//! The limits of the file systems in memory to which a step can write.
//!
//! Without a `size`, the kernel gives half of the memory to each tmpfs. A step has several, so it could fill the whole
//! memory, and files in memory belong to no process that the kernel could kill. The limits below add up to at most half
//! of the memory on a machine with 2 GiB or more.

use super::spec::StepSpec;
use crate::sys::mount::api::new_file_system;
use crate::sys::space::machine_memory;
use crate::text::escape_name;
use anyhow::Result;
use rustix::fd::OwnedFd;
use rustix::mount::MountAttrFlags;

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
    /// package caches that the step may only read. A quarter of the memory, at least 512 MiB, and at most 8 GiB.
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

/// Returns a description of each of the step's file systems in memory that is full. Call this in the step's mount tree.
pub fn full_file_systems(spec: &StepSpec) -> Vec<String> {
    let (run, dev) = (TmpfsLimits::run(), TmpfsLimits::DEV);
    let mut full = Vec::new();
    for (path, limits) in [("/run", run), ("/dev/shm", run), ("/dev", dev)] {
        if is_full(path) {
            full.push(format!("{path}, which is in memory and may have {limits}, is full"));
        }
    }
    // An overlay reports the space of the file system to which it writes.
    if spec.throwaway {
        full.extend(is_full("/").then(throwaway_is_full));
        return full;
    }
    let read_only = spec.caches.iter().filter(|cache| !cache.writable).map(|cache| &*cache.target);
    // All writes that are discarded are in one file system, so one cache is enough.
    if let Some(target) = read_only.into_iter().find(|target| is_overlay(target) && is_full(target)) {
        full.push(format!("{} (writes to {})", throwaway_is_full(), escape_name(target)));
    }
    full
}

/// Describes that the limit of writes that are discarded was reached.
pub fn throwaway_is_full() -> String {
    let limits = TmpfsLimits::throwaway();
    format!("the memory for writes that are discarded, which may have {limits}, is full")
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
}
