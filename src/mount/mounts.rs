//! The mounts of a root. At the end of a bake, they are checked, synced and unmounted.

use super::create;
use super::create::DIR;
use super::partitions::DiskPart;
use super::{busy, choose_root, make_mount_point};
use crate::device::Device;
use crate::device::Trim;
use crate::error::Kind;
use crate::formats::superblock::FileSystemType;
use crate::report::Report;
use crate::sys::block_ioctls;
use crate::sys::fds::open_directory;
use crate::sys::mount::api;
use crate::sys::mount::table::{self, MountEntry};
use crate::sys::tasks;
use crate::text::human_size;
use anyhow::{Context, Result};
use rustix::fs::Mode;
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// `ST_RDONLY` of statfs(2).
const READ_ONLY: u64 = 1;

/// The maximum number of mounts. No image needs this many, but each recursive bind in an fstab can double the number of
/// mounts.
const MOUNTS_MAX: usize = 256;

/// One mount of a root.
pub struct ImageMount {
    id: u64,
    /// A descriptor of the mount. It is closed before the unmount, because an open descriptor keeps the mount busy.
    fd: Option<OwnedFd>,
    /// The directory of the image on which the mount is attached.
    target: String,
    /// The name and number of the device. It is `None` for a bind mount, and for a second mount of a device.
    pub(crate) device: Option<(String, u64)>,
    /// The number of errors that an ext file system had recorded when it was mounted.
    errors: Option<u64>,
}

/// All mounts at and below one mount point, oldest first. Dropping them unmounts everything, newest first.
pub struct ImageMounts {
    pub(crate) list: Vec<ImageMount>,
    point: PathBuf,
    report: Report,
    /// Whether a mount was still busy after the longest wait. If true, later unmounts do not wait.
    stuck: bool,
}

impl ImageMounts {
    pub fn new(scratch: &Path, report: &Report) -> Result<Self> {
        let point = make_mount_point(scratch)?;
        Ok(Self { list: Vec::new(), point, report: report.clone(), stuck: false })
    }

    pub fn path(&self) -> &Path {
        &self.point
    }

    pub fn attach_root(&mut self, mount: OwnedFd, part: &DiskPart) -> Result<()> {
        let point = open_directory(&self.point)?;
        create::ensure_private(&point)?;
        self.attach(mount, &point, "/", Some(part))
    }

    /// Attaches a mount to a directory of the image.
    pub fn attach(
        &mut self,
        mount: OwnedFd,
        point: &OwnedFd,
        target: &str,
        part: Option<&DiskPart>,
    ) -> Result<()> {
        let id = create::mount_id(&mount)?;
        api::attach(&mount, point).with_context(|| format!("attaching the mount of {target}"))?;
        let device = part.map(|part| (part.name.clone(), part.rdev));
        let is_ext = part.is_some_and(|p| {
            matches!(
                choose_root::file_system_type(p),
                Some(FileSystemType::Ext2 | FileSystemType::Ext3 | FileSystemType::Ext4)
            )
        });
        let errors = part.filter(|_| is_ext).and_then(|part| errors_of(&part.name));
        self.list.push(ImageMount { id, fd: Some(mount), target: target.to_owned(), device, errors });
        // A recursive bind also creates mounts below this mount. They would keep this mount busy, so they are recorded
        // and unmounted first.
        let table = table::of_this_thread()?;
        for line in below(&table, id) {
            let target = format!("{target} ({})", line.path.display());
            self.list.push(ImageMount { id: line.id, fd: None, target, device: None, errors: None });
        }
        if self.list.len() > MOUNTS_MAX {
            let failure =
                Kind::Definition.failure("the recursive binds of the image's fstab create too many mounts");
            return Err(failure
                .hint("Remove binds from the image's fstab, or replace `rbind` by `bind`.")
                .into());
        }
        Ok(())
    }

    /// Creates another mount of a device that is already mounted. The new mount is not attached anywhere.
    pub fn clone_mount(&self, rdev: u64) -> Option<std::io::Result<OwnedFd>> {
        let is = |mounted: &&ImageMount| mounted.device.as_ref().is_some_and(|(_, of)| *of == rdev);
        let fd = self.list.iter().find(is)?.fd.as_ref()?;
        Some(api::clone_mount(fd, "", false))
    }

    /// Checks all file systems, syncs them, and discards their free space.
    pub(crate) async fn check_and_sync(&self, disk: &Device) -> Result<()> {
        for mounted in &self.list {
            let (Some((device, _)), Some(fd)) = (&mounted.device, &mounted.fd) else { continue };
            let target = mounted.target.clone();
            mounted.check().with_context(|| format!("checking the file system of {target} on {device}"))?;
            let dir = rustix::fs::openat(fd, c".", DIR, Mode::empty());
            let dir = dir.with_context(|| format!("opening {target} of the image"))?;
            let trimming = disk.trimming.clone();
            let trimmed = tasks::run_to_end(move || {
                rustix::fs::syncfs(&dir).with_context(|| format!("syncing the file system of {target}"))?;
                // All earlier writes are synced, and no step is running. So every range that is zeroed from now on is
                // free space.
                let trim = trimming.map(Trim::begin).transpose();
                let _trim = trim.context("preparing to discard free space")?;
                Ok::<_, anyhow::Error>(block_ioctls::trim(dir.as_fd()))
            });
            match trimmed.await? {
                Ok(bytes) => self.report.detail(format!("discarded {} on {device}", human_size(bytes))),
                // Many devices cannot discard. In that case, the snapshot is larger, but still correct.
                Err(error) => self.report.detail(format!("did not discard free space on {device}: {error}")),
            }
            // The writes may have revealed damage, so the file system is checked again.
            mounted.check().with_context(|| format!("checking the file system on {device}"))?;
        }
        Ok(())
    }

    /// Unmounts everything, newest first.
    pub(crate) async fn unmount(&mut self) -> Result<()> {
        while let Some(last) = self.list.last_mut() {
            last.fd = None;
            let (id, target) = (last.id, last.target.clone());
            if let Err(error) = tasks::run_to_end(move || create::unmount(id, true)).await {
                self.stuck = true;
                return Err(add_users_if_busy(error, &target, last));
            }
            self.list.pop();
        }
        Ok(())
    }

    fn remove_point(&self) -> std::io::Result<()> {
        // The removal is never recursive, because a disk may still be mounted on the directory.
        std::fs::remove_dir(&self.point)
    }
}

impl Drop for ImageMounts {
    fn drop(&mut self) {
        // All descriptors are closed first, because a descriptor keeps its mount busy, and a mounted child keeps its
        // parent busy.
        self.list.iter_mut().for_each(|mounted| mounted.fd = None);
        while let Some(last) = self.list.pop() {
            if let Err(error) = create::unmount(last.id, !self.stuck) {
                let error = add_users_if_busy(error, &last.target, &last);
                self.report.warn(format!("{} stays mounted until oven exits: {error:#}", last.target));
            }
        }
        match self.remove_point() {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                self.report.warn(format!("cannot remove the mount point {}: {error}", self.point.display()));
            }
            _ => {}
        }
    }
}

impl ImageMount {
    fn check(&self) -> Result<()> {
        let Some(fd) = &self.fd else { return Ok(()) };
        let name = self.device.as_ref().map_or("", |(name, _)| name);
        let statistics = rustix::fs::fstatfs(fd).map_err(|error| match error {
            Errno::IO => storage_failed("the kernel shut it down"),
            error => error.into(),
        })?;
        if statistics.f_flags as u64 & READ_ONLY != 0 {
            return Err(damaged("it became read-only", name));
        }
        if let (Some(before), Some(now)) = (self.errors, errors_of(name))
            && now > before
        {
            let what = format!("the kernel found {} errors in it during the bake", now - before);
            return Err(damaged(&what, name));
        }
        Ok(())
    }
}

/// Returns the mounts below a mount, at any depth, parents first.
fn below(table: &[MountEntry], id: u64) -> Vec<&MountEntry> {
    let mut found: Vec<&MountEntry> = Vec::new();
    let mut parents = vec![id];
    while let Some(parent) = parents.pop() {
        let children = table.iter().filter(|line| line.parent == parent && line.id != parent);
        for child in children {
            parents.push(child.id);
            found.push(child);
        }
    }
    found
}

/// Returns the failure for damage that the kernel found in a mounted file system. `name` is the device's name. The base
/// is at fault, unless the kernel recorded that the device failed.
pub(crate) fn damaged(what: &str, name: &str) -> anyhow::Error {
    if last_error_of(name) == Some(EXT4_ERR_EIO) {
        return storage_failed(what);
    }
    let hint = "The base image's file system is damaged. Repair it (e2fsck, xfs_repair), or bake on another image. The \
                kernel's log (dmesg) says where.";
    Kind::Definition.failure(what).hint(hint).into()
}

fn storage_failed(what: &str) -> anyhow::Error {
    let hint = "This machine's storage may be damaged. See the kernel's log (dmesg).";
    Kind::Machine.failure(what).hint(hint).into()
}

/// The number with which ext4 records an I/O error (`EXT4_ERR_EIO` in the kernel's fs/ext4/ext4.h).
const EXT4_ERR_EIO: u64 = 2;

/// Returns the number of the last error that the kernel has recorded in a mounted ext file system. `None` if there is
/// none, or if the kernel is older than 5.7.
fn last_error_of(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/sys/fs/ext4/{name}/last_error_errcode")).ok()?;
    text.trim().parse().ok()
}

/// Returns the number of errors that the kernel has recorded in a mounted ext file system.
fn errors_of(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/sys/fs/ext4/{name}/errors_count")).ok()?;
    text.trim().parse().ok()
}

/// If the error says that the mount is busy, adds the names of the mount's users.
fn add_users_if_busy(error: anyhow::Error, target: &str, mounted: &ImageMount) -> anyhow::Error {
    if !error.chain().any(|cause| cause.downcast_ref::<Errno>() == Some(&Errno::BUSY)) {
        return error;
    }
    let devices: Vec<_> = mounted.device.iter().map(|(_, rdev)| *rdev).collect();
    let below = table::of_this_thread().unwrap_or_default();
    let below: Vec<_> = below.iter().filter(|line| line.parent == mounted.id).collect();
    let below: String =
        below.iter().map(|line| format!("; {} is mounted below it", line.path.display())).collect();
    Kind::Machine.error(format!("{target} of the image is busy{}{below}", busy::holders_clause(&devices)))
}
