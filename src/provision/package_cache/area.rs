//! The file system to which the downloads of one bake are written. It limits their size and their number, so a fetch
//! step can take neither the free space nor the inodes of this machine.
//!
//! It is an ext4 without a journal, in a sparse file that has no name, on a loop device. It is mounted only in oven's
//! private mount namespace. When oven ends for any reason, the kernel unmounts it, detaches the device and frees the
//! file.

use super::store;
use crate::error::{Failure, Kind};
use crate::provision::space::DiskSpace;
use crate::sys::fds::open_directory;
use crate::sys::loop_device;
use crate::sys::mount::api::{PLAIN, attach, new_file_system};
use crate::sys::mount::table;
use crate::sys::sparse_copy::data_after;
use anyhow::{Context, Result};
use rustix::fs::MemfdFlags;
use rustix::mount::{UnmountFlags, unmount};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The program that makes the file system, from e2fsprogs.
const MAKER: &str = "mke2fs";
/// The features of the file system. The list is complete, so that the result does not depend on this machine's
/// mke2fs.conf. `uninit_bg` makes the creation quick, because the tables of inodes are not written.
const FEATURES: &str = "none,extent,filetype,sparse_super,large_file,huge_file,flex_bg,uninit_bg,dir_nlink,\
                        extra_isize,ext_attr,dir_index";
/// The maximum number of files. The indexes and packages of a large installation are some thousands.
const MAX_FILES: u64 = 100_000;
/// The size in bytes of one read of the new file system.
const COPY_BYTES: usize = 256 << 10;
/// A small file system has at most one file per this number of bytes.
const BYTES_PER_FILE: u64 = 16 << 10;

/// The limits of a bake's downloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownloadLimits {
    pub bytes: u64,
    pub files: u64,
}

impl DownloadLimits {
    /// `cache` is the size limit of the package cache, and `free` is the free space on its disk. A bake may download
    /// four times as much as is cached for later bakes, because some bakes need very large packages. But it may use
    /// only half of the free space, because the downloads are copied into the cache.
    pub fn new(cache: u64, free: u64) -> Self {
        let bytes = cache.saturating_mul(4).min(free / 2);
        Self { bytes, files: MAX_FILES.min(bytes / BYTES_PER_FILE) }
    }

    /// Adds room for files that are copied into the area before the first download.
    pub fn plus(self, bytes: u64, files: u64) -> Self {
        Self { bytes: self.bytes.saturating_add(bytes), files: self.files.saturating_add(files) }
    }
}

/// A mounted area. It is unmounted when this value is dropped, and its content is lost then.
#[derive(Debug)]
pub struct DownloadArea {
    at: PathBuf,
    limits: DownloadLimits,
}

impl DownloadArea {
    /// Creates the file system and mounts it on the new directory `at`. Its file is in the directory that contains
    /// `at`.
    pub fn mount(at: &Path, limits: DownloadLimits) -> Result<Self> {
        let dir = at.parent().context("a directory without a parent")?;
        ensure_private(dir)?;
        let file =
            tempfile::tempfile_in(dir).with_context(|| format!("making a file in {}", dir.display()))?;
        // The device is a whole number of sectors, however large the file is.
        let size = limits.bytes >> 20 << 20;
        file.set_len(size).context("making a sparse file")?;
        make_file_system(&file, size, limits)?;
        let device = loop_device::attach(&file, "the downloads")?;
        let source = format!("/proc/self/fd/{}", device.node.as_raw_fd());
        // If the file system is damaged, writes fail, and so does the download. Nothing is flushed at an fsync, because
        // the content is lost when this machine stops.
        let options =
            [("source", &*source), ("errors", "remount-ro"), ("nobarrier", ""), ("noinit_itable", "")];
        let mount = new_file_system("ext4", &options, PLAIN)?;
        std::fs::create_dir(at).with_context(|| format!("making {}", at.display()))?;
        attach(mount, open_directory(at)?).with_context(|| format!("mounting on {}", at.display()))?;
        let area = Self { at: at.to_owned(), limits };
        // The directory for lost files, which mke2fs makes.
        std::fs::remove_dir(at.join("lost+found")).with_context(|| format!("emptying {}", at.display()))?;
        Ok(area)
    }

    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Returns the failure of the step if the limit is reached. `dir` is the package cache's directory.
    pub fn limit_failure(&self, dir: &Path) -> Option<Failure> {
        let full = DiskSpace::of(&self.at).is_ok_and(|space| space.is_full());
        full.then(|| {
            let (mib, files, dir) = (self.limits.bytes >> 20, self.limits.files, dir.display());
            Kind::Step
                .failure(format!("the downloads reached their limit of {mib} MiB and {files} files"))
                .hint(format!(
                    "Download less in one bake, or free some space in {dir}: the limit is half of the free space, and at \
                     most four times the limit of the package cache."
                ))
        })
    }
}

impl Drop for DownloadArea {
    fn drop(&mut self) {
        // Otherwise the kernel would write the files to this machine's disk before it unmounts the file system.
        _ = store::empty(&self.at);
        if unmount(&*self.at, UnmountFlags::NOFOLLOW).is_err() {
            _ = unmount(&*self.at, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
        }
    }
}

/// Fails if a mount in this directory would be visible in other mount namespaces.
fn ensure_private(dir: &Path) -> Result<()> {
    let dir = dir.canonicalize().with_context(|| format!("resolving {}", dir.display()))?;
    let table = table::of_this_thread()?;
    let mount = table
        .iter()
        .filter(|entry| dir.starts_with(&entry.path))
        .max_by_key(|entry| entry.path.as_os_str().len());
    match mount {
        Some(entry) if !entry.shared => Ok(()),
        _ => {
            Err(Kind::Machine
                .error(format!("a mount in {} would be visible to other processes", dir.display())))
        }
    }
}

/// Makes the file system in memory, and copies it into the file. The maker calls fsync, which is slow on a disk that is
/// busy.
fn make_file_system(file: &File, size: u64, limits: DownloadLimits) -> Result<()> {
    let made =
        rustix::fs::memfd_create("downloads", MemfdFlags::CLOEXEC).context("making a file in memory")?;
    let made = File::from(made);
    made.set_len(size).context("making a sparse file in memory")?;
    // The file has no name, so the program opens its standard input by path.
    let done = Command::new(MAKER)
        .args(["-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-O", FEATURES])
        .args(["-E", "nodiscard,lazy_itable_init=1,root_owner=0:0", "-N", &limits.files.to_string()])
        .arg("/proc/self/fd/0")
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::from(made.try_clone()?))
        .output();
    let done = match done {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let failure = Kind::Machine.failure(format!("{MAKER} is not installed"));
            return Err(failure.hint("Install e2fsprogs.").into());
        }
        done => done.with_context(|| format!("running {MAKER}"))?,
    };
    let output = String::from_utf8_lossy(&done.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
    anyhow::ensure!(done.status.success(), "{MAKER} failed ({}): {output}", done.status);
    copy_data(&made, file, size).context("copying an empty file system")
}

/// Copies a sparse file. Holes stay holes.
fn copy_data(from: &File, to: &File, size: u64) -> Result<()> {
    let (mut buffer, mut at) = (vec![0; COPY_BYTES], 0);
    while let Some((start, end)) = data_after(from.as_fd(), at, size)? {
        at = start;
        while at < end {
            let length = buffer.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            from.read_exact_at(&mut buffer[..length], at)?;
            to.write_all_at(&buffer[..length], at)?;
            at += length as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_follow_the_cache_and_the_free_space() {
        let limits = |cache, free| {
            let DownloadLimits { bytes, files } = DownloadLimits::new(cache, free);
            (bytes, files)
        };
        assert_eq!(limits(4 << 30, 1 << 40), (16 << 30, 100_000));
        assert_eq!(limits(4 << 30, 2 << 30), (1 << 30, 65_536));
        assert_eq!(limits(16 << 20, 1 << 40), (64 << 20, 4096));
        assert_eq!(limits(u64::MAX, u64::MAX).1, 100_000);
        assert_eq!(DownloadLimits::new(1, 8).plus(16, 1), DownloadLimits { bytes: 20, files: 1 });
    }
}
