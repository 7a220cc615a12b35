//! Measures the free space of a file system, and the memory of this machine.

use crate::error::{Kind, errno_of};
use rustix::io::Errno;
use std::path::Path;

/// Returns the free space of the file system that contains `dir`, in bytes.
pub fn free_space(dir: &Path) -> Option<u64> {
    rustix::fs::statvfs(dir).ok().map(|s| s.f_bavail.saturating_mul(s.f_frsize))
}

/// Returns the size of this machine's memory in bytes.
pub fn machine_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.max(1).into())
}

/// Returns the error for a failed write of `needed` bytes in `dir`. If the disk is full, the error names the needed
/// space and the free space.
pub fn write_error(error: anyhow::Error, dir: &Path, needed: u64) -> anyhow::Error {
    match errno_of(&error) {
        Some(Errno::NOSPC | Errno::DQUOT) => no_space(dir, needed),
        _ => error.context(format!("writing in {}", dir.display())),
    }
}

pub fn no_space(dir: &Path, needed: u64) -> anyhow::Error {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let free = free_space(dir).map_or("an unknown amount".into(), |free| format!("{} MiB", free >> 20));
    let text =
        format!("too little space in {}: {} MiB are needed, and {free} is free", dir.display(), mib(needed));
    Kind::Machine
        .failure(text)
        .hint("Free some space on that disk, or use a region on another disk (--region-dir DIR).")
        .into()
}

/// A disk counts as full if less than this is free, in bytes. A file system may be unable to use the last blocks.
const FULL: u64 = 1 << 20;

/// Returns an error if the disk of `dir` is full.
pub fn full_disk_error(dir: &Path) -> Option<anyhow::Error> {
    free_space(dir).filter(|free| *free < FULL)?;
    let failure = Kind::Machine.failure(format!("no space is left in {}", dir.display()));
    Some(
        failure
            .hint("Free some space on that disk, or use a region on another disk (--region-dir DIR).")
            .into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_that_of_the_machine() {
        let info = std::fs::read_to_string("/proc/meminfo").unwrap();
        let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.strip_suffix("kB"));
        let total: u64 = total.unwrap().trim().parse().unwrap();
        // A container may show less memory in that file.
        assert!(machine_memory() >> 10 >= total, "{} {total}", machine_memory());
    }

    #[test]
    fn no_space_says_where_and_how_much() {
        let error = no_space(Path::new("/"), 5 << 20);
        let text = format!("{error:#}");
        assert!(
            text.starts_with("too little space in /: 5 MiB are needed, and ") && text.ends_with(" is free"),
            "{text}"
        );
        assert_eq!(Kind::of(&error), Kind::Machine);
    }
}
