//! Where a bake gets its disk, and how the disk becomes a snapshot.

mod ahead;
pub mod attached;
pub mod cache;
mod changes;
pub mod chosen;
pub mod copy;
pub mod direct;
pub mod export;
pub mod kept;
pub mod loopdev;
pub mod lower;
pub mod marks;
mod metadata;
pub mod overlay;
pub mod raw;
pub mod serve;
pub mod trouble;
pub mod upload;

use crate::cloud::{Base, RunId, SnapshotId, Tags, VolumeKind, tag};
use crate::error::Kind;
use crate::owner::Owner;
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
    /// Where free space that is discarded and zeros that are asked for have to be told apart.
    pub trimming: Option<marks::Trimming>,
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
    /// Whether the snapshot is read back, and compared. Only where it is sent from here.
    pub verify: bool,
    /// Whether it is to be committed: then its snapshot may be started before.
    pub lasts: bool,
}

impl DiskSpec {
    /// How large a disk on this base is to be.
    pub fn size_on(&self, base: &Base) -> Result<u64> {
        let size_gib = self.size_gib.unwrap_or(base.size_gib);
        if size_gib < base.size_gib {
            let text =
                format!("[disk] size_gib = {size_gib} is less than the {} GiB of {}", base.size_gib, base.id);
            return Err(Kind::Definition.failure(text).hint("A disk can grow, and not shrink.").into());
        }
        Ok(size_gib)
    }
}

/// The command that removes what a run left.
fn sweep(run: &RunId) -> String {
    format!("oven sweep --run {run}")
}

/// Tags that say whose a resource is: without them nobody could sweep it.
pub fn owned(tags: &Tags, run: &RunId) -> Tags {
    let mut tags = tags.clone();
    tags.entry(tag::RUN.to_owned()).or_insert_with(|| run.0.clone());
    tags.entry(tag::OWNER.to_owned()).or_insert_with(|| Owner::this().to_string());
    tags
}

/// A strategy to get a writable copy of a base image's disk.
#[async_trait(?Send)]
pub trait Disks {
    /// Asks the cloud what the run's checkout will have to know. Nothing is made, and nothing said.
    async fn look(&self, _base: &Base, _spec: &DiskSpec, _run: &RunId) -> Result<()> {
        Ok(())
    }

    /// A copy of the base's root disk, owed to `undo` before it is made; so is its snapshot, if that is started here.
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

    /// Makes the snapshot, owed to `undo` before it is made, and answers when it is complete. `on_progress` is told how
    /// many bytes were sent so far, where this process sends them.
    async fn commit(self: Box<Self>, undo: &Undo, on_progress: &dyn Fn(u64)) -> Result<SnapshotId>;
}
