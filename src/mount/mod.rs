//! Mounts an image, and gives access to its files.

mod busy;
mod check;
mod choose_root;
mod create;
pub(crate) mod damage;
mod grow;
mod mounts;
mod partitions;
mod release;
mod storage_errors;
mod tool;
mod unmountable;
mod write_protection;

use crate::device::Device;
use crate::error::Kind;
use crate::formats::fstab::{MountSource, PlannedMount};
use crate::formats::superblock::FileSystemType;
use crate::ids::Architecture;
use crate::image::tree::ImageTree;
use crate::report::Report;
use crate::sys::mount::api;
use crate::sys::tasks::run_to_end;
use crate::text::escape_name;
use crate::text::{count, human_size};
use anyhow::{Context, Result};
use create::{MountRequest, UnknownFileSystem};
use damage::DamageCause;
use mounts::ImageMounts;
use oven_distro::OsRelease;
use partitions::{DiskNodes, DiskPart};
use rustix::fs::OFlags;
use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use unmountable::UnsupportedMount;
use write_protection::WriteProtection;

/// How a root is mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Whether the root is extended if the disk has unused space at its end. If false, that space stays unused.
    pub grow: bool,
    /// Whether steps can write to the disk below its file systems. If true, damage that appears after the first step is
    /// the fault of a step.
    pub disk_writable: bool,
}

/// An image's file systems, mounted in the private mount namespace of this process. The value borrows the disk, so a
/// mounted disk cannot be committed. [`Root::close`] proves that the disk is released. If the value is only dropped,
/// the file systems are unmounted without this proof.
///
/// ```no_run
/// # use oven::{disk::Disk, report::Report, mount::{MountOptions, Root}, undo::Undo};
/// # async fn bake(disk: Box<dyn Disk>, options: &MountOptions, report: &Report, undo: &Undo) -> anyhow::Result<()> {
/// let root = Root::mount(disk.device(), "/run/oven/1".as_ref(), options, report).await?;
/// root.close().await?;
/// disk.commit(undo, &|_, _| ()).await?;
/// # Ok(()) }
/// ```
/// If the disk is committed first, this does not compile (E0505):
/// ```compile_fail
/// # use oven::{disk::Disk, report::Report, mount::{MountOptions, Root}, undo::Undo};
/// # async fn bake(disk: Box<dyn Disk>, options: &MountOptions, report: &Report, undo: &Undo) -> anyhow::Result<()> {
/// let root = Root::mount(disk.device(), "/run/oven/1".as_ref(), options, report).await?;
/// disk.commit(undo, &|_, _| ()).await?;
/// root.close().await?;
/// # Ok(()) }
/// ```
pub struct Root<'d> {
    // This field is dropped before the mounts, because an open descriptor would keep a mount busy.
    inside: ImageTree,
    mounts: ImageMounts,
    disk: DiskNodes,
    /// The index of the root in `disk.parts`.
    root: usize,
    step_nodes: Vec<crate::device::DeviceNode>,
    unmountable: Vec<UnsupportedMount>,
    unmountable_targets: Vec<PathBuf>,
    report: Report,
    device: &'d Device,
    disk_writable: bool,
}

impl<'d> Root<'d> {
    /// Finds the root partition, extends it if requested, and mounts it. Then mounts the other file systems of this
    /// disk that the image's fstab lists. `scratch` is an existing directory. The mount point is created in it.
    ///
    /// Errors: `Definition` if the disk has no root that oven can identify and mount; `Machine` if this machine lacks a
    /// feature, or if another process uses the disk.
    pub async fn mount(
        device: &'d Device,
        scratch: &Path,
        options: &MountOptions,
        report: &Report,
    ) -> Result<Root<'d>> {
        let node = device.node.try_clone().context("duplicating the disk's descriptor")?;
        let (path, serial) = (device.path.clone(), device.serial.clone());
        let duplicate = Device { node, path, rdev: device.rdev, serial, trimming: None };
        let mut disk = run_to_end(move || partitions::open_disk(&duplicate)).await?;
        disk.table.warnings.iter().for_each(|warning| report.warn(warning));
        let root = choose(&disk).await?;
        let grown = options.grow && grow::grow_partition(device, &mut disk, root).await?;
        report_state(&disk.parts[root], report);
        let mut sizes = if grown { grow::grow_unmounted(&mut disk.parts[root]).await? } else { None };

        let mut mounts = ImageMounts::new(scratch, &disk.name, report)?;
        let part = &disk.parts[root];
        report.detail(format!("the root is {} {}", part.name, part.describe()));
        let mount = match create_mount(&disk, part, false).await {
            Ok(mount) => mount,
            Err(error) => {
                let error = check::explain(error, &disk.parts, root, DamageCause::BaseImage).await;
                return Err(error.context("mounting the root"));
            }
        };
        if grown && sizes.is_none() {
            sizes = grow::grow_file_system(&mount, part).await?;
        }
        if let Some((from, to)) = sizes {
            report.note(format!("grew the root file system from {} to {}", human_size(from), human_size(to)));
        }
        let inside = ImageTree::new(mount.try_clone().context("duplicating the root's descriptor")?);
        mounts.attach_root(mount, part)?;
        let mut mounted = Root {
            inside,
            mounts,
            root,
            step_nodes: partitions::step_nodes(&disk, root),
            disk,
            unmountable: Vec::new(),
            unmountable_targets: Vec::new(),
            report: report.clone(),
            device,
            disk_writable: options.disk_writable,
        };
        match mounted.mount_rest(root).await {
            Ok(()) => Ok(mounted),
            Err(error) => {
                let error = damage::explain(error, &mounted.disk.parts[root]);
                Err(mounted.into_explained(Kind::Definition.unless_machine(error)).await)
            }
        }
    }

    /// Mounts the other file systems of this disk that the image's fstab lists.
    async fn mount_rest(&mut self, root: usize) -> Result<()> {
        let Some(text) = self.inside.read_at_most("/etc/fstab", crate::formats::fstab::TEXT_MAX)? else {
            return Ok(());
        };
        let ids: Vec<_> = self.disk.parts.iter().map(DiskPart::ids).collect();
        let plan = crate::formats::fstab::plan(
            &crate::formats::fstab::parse(&String::from_utf8_lossy(&text)),
            root,
            &ids,
        )?;
        for PlannedMount { target, what } in plan {
            let doing = || format!("mounting {target} of the image's fstab");
            match what {
                MountSource::Partition(index) => self.mount_part(&target, index).await.with_context(doing)?,
                MountSource::Bind(from, recursive) => {
                    self.mount_bind(&target, &from, recursive).with_context(doing)?
                }
            }
        }
        Ok(())
    }

    async fn mount_part(&mut self, target: &str, index: usize) -> Result<()> {
        let part = &self.disk.parts[index];
        if kernel_type(part).is_none() {
            let failure = Kind::Definition.failure(format!("oven cannot mount {}", part.describe()));
            let hint =
                "oven mounts ext4, ext3, ext2, xfs and vfat. Bake on an image whose fstab lists only these.";
            return Err(failure.hint(hint).into());
        }
        report_state(part, &self.report);
        if let Some(mount) = self.mounts.clone_mount(part.rdev) {
            let point = self.mount_point(target)?;
            return self.mounts.attach(
                mount.context("mounting a partition a second time")?,
                &point,
                target,
                None,
            );
        }
        let mount = match create_mount(&self.disk, part, false).await {
            Err(error) if error.is::<UnknownFileSystem>() => {
                let kind = choose_root::file_system_type(part).map_or("", FileSystemType::name);
                // `oven doctor` reports the missing driver. It matters only to a bake whose steps change the directory.
                self.report.detail(format!(
                    "this kernel has no driver for {kind}, so {target} is not mounted. The bake fails if a step \
                     changes {target}"
                ));
                self.unmountable.push(UnsupportedMount::new(&self.inside, target, kind)?);
                self.unmountable_targets.push(target.into());
                return Ok(());
            }
            mount => mount?,
        };
        let point = self.mount_point(target)?;
        self.mounts.attach(mount, &point, target, Some(part))
    }

    fn mount_bind(&mut self, target: &str, from: &str, recursive: bool) -> Result<()> {
        let source = self.inside.open(from, OFlags::PATH).with_context(|| format!("opening {from}"))?;
        let mount = api::clone_mount(&source, "", recursive).with_context(|| format!("binding {from}"))?;
        let point = self.mount_point(target)?;
        self.mounts.attach(mount, &point, target, None)
    }

    /// Opens the directory to mount on. The path is resolved inside the image. If the directory is missing, creates it,
    /// as systemd does at boot.
    fn mount_point(&self, target: &str) -> Result<OwnedFd> {
        self.inside.create_dir_all(target, 0o755)?;
        let point = self.inside.open(target, OFlags::PATH | OFlags::DIRECTORY);
        let point = point.with_context(|| format!("opening {} in the image", escape_name(target)))?;
        let place = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
        let root = rustix::fs::fstat(self.inside.dir()).map(|stat| (stat.st_dev, stat.st_ino));
        if place(&point)? == root? {
            return Err(
                Kind::Definition.error(format!("{} resolves to the root directory", escape_name(target)))
            );
        }
        Ok(point)
    }

    /// Returns the mount point, a path in this process's private mount namespace. Only the helper process that sets up
    /// a step may use this path.
    pub fn path(&self) -> &Path {
        self.mounts.path()
    }

    /// Returns access to the image's files. Paths are resolved inside the image.
    pub fn tree(&self) -> &ImageTree {
        &self.inside
    }

    /// Reads `/etc/os-release` or `/usr/lib/os-release`.
    pub fn os_release(&self) -> Result<OsRelease> {
        let found = crate::image::os_release::os_release(&self.inside);
        found.map_err(|error| Kind::Definition.unless_machine(error))
    }

    /// Returns the architecture of the image's `/bin/sh`.
    pub fn architecture(&self) -> Result<Architecture> {
        let found = crate::image::os_release::architecture(&self.inside);
        found.map_err(|error| Kind::Definition.unless_machine(error))
    }

    /// Returns the nodes of the disk and its partitions, and the links to them, for the private `/dev` of a step.
    pub fn nodes(&self) -> &[crate::device::DeviceNode] {
        &self.step_nodes
    }

    /// Returns the mount points of the file systems that this kernel cannot mount, spelled as in fstab. No step may
    /// change these directories. [`Root::close`] fails if a step did.
    pub fn unmounted(&self) -> &[PathBuf] {
        &self.unmountable_targets
    }

    /// Explains the failure of a bake. If the kernel found a file system of the image damaged meanwhile, the result says
    /// so, because that is the cause of most other failures. Otherwise the result is the same error.
    pub fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        if Kind::of(&error) == Kind::Interrupted {
            return error;
        }
        match self.mounts.check(self.step_wrote()) {
            Ok(()) => error,
            Err(damage) => {
                let hint = crate::error::hint_of(&damage).unwrap_or_default();
                Kind::of(&damage)
                    .failure(format!("{damage:#}. Before, this failed: {error:#}"))
                    .hint(hint)
                    .into()
            }
        }
    }

    /// Unmounts everything, and explains the failure of a bake like [`Self::explain`]. If a file system is damaged, the
    /// result also says what a check of it finds.
    pub async fn into_explained(self, error: anyhow::Error) -> anyhow::Error {
        let error = self.explain(error);
        let cause = if self.step_wrote() { DamageCause::Step } else { DamageCause::BaseImage };
        let Self { inside, mounts, disk, root, .. } = self;
        drop(inside);
        drop(mounts);
        check::explain(error, &disk.parts, root, cause).await
    }

    /// Returns whether a step may have written to the disk below the file systems.
    fn step_wrote(&self) -> bool {
        // The meter knows whether a step has run: what happens before the first step is the fault of the base.
        let is_of_step = |error: &anyhow::Error| Kind::of(error) == Kind::Step;
        self.disk_writable && is_of_step(&self.inside.meter().exceeded("a limit"))
    }

    /// Unmounts everything. Then uses `O_EXCL` to open the whole disk and each partition that was mounted, and syncs
    /// them. If this succeeds, nothing else uses the disk. Fails if a file system was damaged, or if a step wrote to
    /// the mount point of a file system that could not be mounted.
    pub async fn close(self) -> Result<()> {
        let step_wrote = self.step_wrote();
        let cause = if step_wrote { DamageCause::Step } else { DamageCause::BaseImage };
        let Self { inside, mounts, disk, root, unmountable, report, device, .. } = self;
        let empty_mount_points = unmountable.iter().try_for_each(|dir| dir.check(&inside));
        drop(inside);
        empty_mount_points.context("checking the mount points of file systems that were not mounted")?;
        match release::close(mounts, &disk, device, &report, step_wrote).await {
            Err(error) => Err(check::explain(error, &disk.parts, root, cause).await),
            closed => closed,
        }
    }
}

/// Chooses the partition with the root file system. The kernel does not write to the candidates meanwhile.
async fn choose(disk: &DiskNodes) -> Result<usize> {
    let candidates = match choose_root::choose_by_table(&disk.parts).context("finding the root partition")? {
        choose_root::RootChoice::Chosen(one) => return Ok(one),
        choose_root::RootChoice::Candidates(candidates) => candidates,
    };
    const DOING: &str = "finding the root partition";
    let mut contents = Vec::new();
    let protection = WriteProtection::enable(candidates.iter().map(|&index| &disk.parts[index]));
    let protection = protection.context(DOING)?;
    let explain = async |error, index| {
        check::explain(error, &disk.parts, index, DamageCause::BaseImage).await.context(DOING)
    };
    for index in candidates {
        let part = &disk.parts[index];
        let mount = match create_mount(disk, part, true).await {
            Ok(mount) => mount,
            Err(error) => return Err(explain(error, index).await),
        };
        let content =
            choose_root::examine(&ImageTree::new(mount)).with_context(|| format!("reading {}", part.name));
        let content = content
            .map_err(|error| damage::explain(error, part))
            .map_err(|error| Kind::Definition.unless_machine(error));
        match content {
            Ok(content) => contents.push((index, content)),
            Err(error) => return Err(explain(error, index).await),
        }
    }
    protection.disable().context(DOING)?;
    choose_root::choose_by_content(&disk.parts, &contents).context(DOING)
}

/// Returns the kernel's driver for the file system of a partition. The driver of ext4 also serves ext2 and ext3.
fn kernel_type(part: &DiskPart) -> Option<&'static str> {
    match choose_root::file_system_type(part)? {
        FileSystemType::Ext2 | FileSystemType::Ext3 | FileSystemType::Ext4 => Some("ext4"),
        FileSystemType::Xfs => Some("xfs"),
        FileSystemType::Vfat => Some("vfat"),
        _ => None,
    }
}

/// Creates the mount of a partition. The mount is not attached anywhere yet.
async fn create_mount(disk: &DiskNodes, part: &DiskPart, read_only: bool) -> Result<OwnedFd> {
    let kind = kernel_type(part).with_context(|| format!("oven cannot mount {}", part.describe()))?;
    if let Some(hazard) = part.fs.as_ref().and_then(|fs| fs.hazard.as_ref()) {
        let failure =
            Kind::Definition.failure(format!("oven does not mount {}, because {hazard}", part.describe()));
        return Err(failure.hint(hazard.remedy()).into());
    }
    let tmpfs = disk.tmpfs.try_clone().context("duplicating a descriptor")?;
    let wanted = MountRequest { tmpfs, name: part.name.clone(), rdev: part.rdev, kind, read_only };
    run_to_end(move || create::create_mount(&wanted)).await.map_err(|error| {
        match (error.is::<UnknownFileSystem>(), kind) {
            // oven requires a kernel with ext4 and xfs. Only vfat is optional.
            (true, "ext4" | "xfs") => {
                let failure = Kind::Machine.failure(format!("this kernel has no driver for {kind}"));
                failure.hint(format!("Load its module: `modprobe {kind}`.")).into()
            }
            _ => error,
        }
    })
}

/// Reports if a file system was not unmounted cleanly, or if its superblock records errors.
fn report_state(part: &DiskPart, report: &Report) {
    let Some(fs) = &part.fs else { return };
    if fs.dirty {
        report.note(format!("{} was not unmounted cleanly, so its journal is replayed", part.name));
    }
    if fs.errors > 0 {
        report.warn(format!(
            "the superblock of {} records {} from before the bake",
            part.name,
            count(fs.errors as usize, "error")
        ));
    }
}

/// Creates a directory for mounts. Other users cannot enter it.
fn make_mount_point(scratch: &Path) -> Result<PathBuf> {
    let scratch = scratch.canonicalize().with_context(|| format!("resolving {}", scratch.display()))?;
    let path = scratch.join("root");
    let made = DirBuilder::new().mode(0o700).create(&path);
    made.with_context(|| format!("creating the mount point {}", path.display()))?;
    Ok(path)
}
