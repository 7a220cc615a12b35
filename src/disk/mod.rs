//! Where a bake gets its disk, and how the disk becomes a snapshot.

pub mod attached_disk;
pub mod direct;
pub mod strategy;

use crate::cloud::{Base, Tags, VolumeKind, tag};
use crate::device::Device;
use crate::error::Kind;
use crate::ids::{RunId, SnapshotId};
use crate::owner::Owner;
use crate::undo::Undo;
use anyhow::Result;
use async_trait::async_trait;

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
