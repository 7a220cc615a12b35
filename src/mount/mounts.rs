//! The mounts of a root. At the end of a bake, they are checked, synced and unmounted.

use super::create::DIR;
use super::damage::DamageCause;
use super::partitions::DiskPart;
use super::storage_errors::StorageErrors;
use super::{busy, choose_root, make_mount_point};
use super::{create, damage};
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
use crate::text::{count, escape_name, human_size};
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
    /// The description of the partition, for messages.
    part: String,
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
    storage_errors: StorageErrors,
    /// Whether a mount was still busy after the longest wait. If true, later unmounts do not wait.
    stuck: bool,
}

impl ImageMounts {
    /// `disk` is the kernel's name of the whole disk.
    pub fn new(scratch: &Path, disk: &str, report: &Report) -> Result<Self> {
        let point = make_mount_point(scratch)?;
        let storage_errors = StorageErrors::watch(disk);
        Ok(Self { list: Vec::new(), point, report: report.clone(), storage_errors, stuck: false })
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
        api::attach(&mount, point)
            .with_context(|| format!("attaching the mount of {}", escape_name(target)))?;
        let device = part.map(|part| (part.name.clone(), part.rdev));
        let is_ext = part.is_some_and(|p| {
            matches!(
                choose_root::file_system_type(p),
                Some(FileSystemType::Ext2 | FileSystemType::Ext3 | FileSystemType::Ext4)
            )
        });
        let errors = part.filter(|_| is_ext).and_then(|part| errors_of(&part.name));
        let (fd, target) = (Some(mount), target.to_owned());
        let part = part.map(DiskPart::describe).unwrap_or_default();
        self.list.push(ImageMount { id, fd, target: target.clone(), part, device, errors });
        // A recursive bind also creates mounts below this mount. They would keep this mount busy, so they are recorded
        // and unmounted first.
        let table = table::of_this_thread()?;
        for line in below(&table, id) {
            let target = format!("{target} ({})", escape_name(&line.path));
            let part = String::new();
            self.list.push(ImageMount { id: line.id, fd: None, target, part, device: None, errors: None });
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

    /// Fails if the kernel found a file system damaged since it was mounted. `step_wrote` says whether a step may have
    /// written to the disk below the file systems.
    pub(crate) fn check(&self, step_wrote: bool) -> Result<()> {
        self.list.iter().try_for_each(|mounted| self.check_one(mounted, step_wrote))
    }

    fn check_one(&self, mounted: &ImageMount, step_wrote: bool) -> Result<()> {
        let Some((device, _)) = &mounted.device else { return Ok(()) };
        let checked = mounted.check(step_wrote, &self.storage_errors);
        checked.with_context(|| {
            format!("checking the file system of {} on {device}", escape_name(&mounted.target))
        })
    }

    /// Returns what damaged a file system, if its metadata is wrong although the kernel recorded no error.
    pub(crate) fn unrecorded_cause(&self, step_wrote: bool) -> DamageCause {
        if step_wrote && !self.storage_errors.found() { DamageCause::Step } else { DamageCause::Storage }
    }

    /// Checks all file systems, syncs them, and discards their free space.
    pub(crate) async fn check_and_sync(&self, disk: &Device, step_wrote: bool) -> Result<()> {
        for mounted in &self.list {
            let (Some((device, _)), Some(fd)) = (&mounted.device, &mounted.fd) else { continue };
            let target = mounted.target.clone();
            self.check_one(mounted, step_wrote)?;
            let dir = rustix::fs::openat(fd, c".", DIR, Mode::empty());
            let dir = dir.with_context(|| format!("opening {} of the image", escape_name(&target)))?;
            let trimming = disk.trimming.clone();
            let trimmed = tasks::run_to_end(move || {
                rustix::fs::syncfs(&dir)
                    .with_context(|| format!("syncing the file system of {}", escape_name(&target)))?;
                // All earlier writes are synced, and no step is running. So every range that is zeroed from now on is
                // free space.
                let trim = trimming.map(Trim::begin).transpose();
                let _trim = trim.context("preparing to discard free space")?;
                Ok::<_, anyhow::Error>(block_ioctls::trim(dir.as_fd()))
            });
            // The writes may have revealed damage, so the file system is checked again. The damage explains an error of
            // the sync.
            let trimmed = trimmed.await;
            self.check_one(mounted, step_wrote)?;
            match trimmed? {
                Ok(bytes) => self.report.detail(format!("discarded {} on {device}", human_size(bytes))),
                // Many devices cannot discard. In that case, the snapshot is larger, but still correct.
                Err(error) => self.report.detail(format!("did not discard free space on {device}: {error}")),
            }
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
                self.report
                    .warn(format!("{} stays mounted until oven exits: {error:#}", escape_name(&last.target)));
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
    fn check(&self, step_wrote: bool, storage_errors: &StorageErrors) -> Result<()> {
        let Some(fd) = &self.fd else { return Ok(()) };
        let name = self.device.as_ref().map_or("", |(name, _)| name);
        let new_errors =
            self.errors.zip(errors_of(name)).map_or(0, |(before, now)| now.saturating_sub(before));
        // If the kernel has shut down an xfs, fstat fails, but fstatfs does not.
        let found = match rustix::fs::fstat(fd).and_then(|_| rustix::fs::fstatfs(fd)) {
            Err(Errno::IO) => "the kernel shut it down".to_owned(),
            Err(error) => return Err(error.into()),
            Ok(statistics) if statistics.f_flags as u64 & READ_ONLY != 0 => "it became read-only".to_owned(),
            Ok(_) if new_errors > 0 => format!("the kernel found {}", count(new_errors as usize, "error")),
            Ok(_) => return Ok(()),
        };
        let what = format!("{} is damaged: during the bake, {found}", self.part);
        let is_metadata = || match self.errors {
            Some(earlier) => new_errors > 0 && damage::recorded_codes(name).are_damage(earlier),
            None => !storage_errors.found(),
        };
        let cause = if step_wrote && !storage_errors.found() {
            DamageCause::Step
        } else if is_metadata() {
            DamageCause::BaseImage
        } else {
            DamageCause::Storage
        };
        Err(damage::error(&what, cause))
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
        below.iter().map(|line| format!("; {} is mounted below it", escape_name(&line.path))).collect();
    Kind::Machine.error(format!(
        "{} of the image is busy{}{below}",
        escape_name(target),
        busy::holders_clause(&devices)
    ))
}
