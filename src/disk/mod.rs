//! Where a bake gets its disk, and how the disk becomes a snapshot.

pub mod attached;
pub mod cache;
pub mod copy;
pub mod export;
pub mod loopdev;
pub mod lower;
pub mod marks;
pub mod overlay;
pub mod serve;
pub mod trouble;

use crate::cloud::{Base, RunId, SnapshotId, Tags, VolumeKind};
use crate::undo::Undo;
use anyhow::Result;
use async_trait::async_trait;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// A whole disk, verified once and held open. Dropping it lets go of the disk: a loop device detaches itself.
#[derive(Debug)]
pub struct Device {
    /// Open for reading and writing. Whoever needs a path takes `/proc/self/fd/N`.
    pub node: OwnedFd,
    /// For messages only.
    pub path: PathBuf,
    /// The device number of the node.
    pub rdev: u64,
    /// The volume that it was verified to be: its serial on NVMe, its id in the local region.
    pub serial: String,
}

/// What a definition wants of its disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskSpec {
    /// `None`: as large as the base's.
    pub size_gib: Option<u64>,
    /// Of the volume that is baked on.
    pub kind: VolumeKind,
    /// For the volume and the snapshot.
    pub tags: Tags,
}

/// A strategy to get a writable copy of a base image's disk.
#[async_trait(?Send)]
pub trait Disks {
    /// A copy of the base's root disk, owed to `undo` before it is made.
    async fn checkout(&self, base: &Base, spec: &DiskSpec, run: &RunId, undo: &Undo)
    -> Result<Box<dyn Disk>>;

    /// The disk that a run kept (`--keep-on-failure`), opened again. `NotFound` if there is none.
    async fn reopen(&self, run: &RunId) -> Result<Box<dyn Disk>>;

    /// Removes all that a run left, but for the snapshots that images use.
    async fn forget(&self, run: &RunId) -> Result<()>;
}

/// A writable copy of a base's disk. A mounted root borrows it, so a mounted disk cannot be committed.
#[async_trait(?Send)]
pub trait Disk {
    fn device(&self) -> &Device;

    /// Makes the snapshot, owed to `undo` before it is made, and answers when it is complete.
    async fn commit(self: Box<Self>, undo: &Undo) -> Result<SnapshotId>;
}
