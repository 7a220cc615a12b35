//! Gives a bake its disk, and makes a snapshot of the disk.

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

/// The disk that a definition asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskSpec {
    /// `None`: the base's size.
    pub size_gib: Option<u64>,
    /// The kind of the volume, or of the snapshot's encryption.
    pub kind: VolumeKind,
    /// For the volume and the snapshot.
    pub tags: Tags,
    /// Whether the snapshot is read back and compared. Only for snapshots that are uploaded from here.
    pub verify: bool,
    /// Whether the disk will be committed: then its snapshot may be started early.
    pub will_commit: bool,
}

impl DiskSpec {
    /// The size of a disk on this base in GiB; fails if it is smaller than the base.
    pub fn size_gib_on(&self, base: &Base) -> Result<u64> {
        let size_gib = self.size_gib.unwrap_or(base.size_gib);
        if size_gib < base.size_gib {
            let text =
                format!("[disk] size_gib = {size_gib} is less than the {} GiB of {}", base.size_gib, base.id);
            return Err(Kind::Definition.failure(text).hint("A disk can grow, but not shrink.").into());
        }
        Ok(size_gib)
    }
}

/// Adds the tags that say who owns a resource, so that it can be swept.
pub fn with_owner_tags(tags: &Tags, run: &RunId) -> Tags {
    let mut tags = tags.clone();
    tags.entry(tag::RUN.to_owned()).or_insert_with(|| run.0.clone());
    tags.entry(tag::OWNER.to_owned()).or_insert_with(|| Owner::this().to_string());
    tags
}

/// A strategy to get a writable copy of a base image's disk.
#[async_trait(?Send)]
pub trait DiskStrategy {
    /// Queries the cloud for what the run's checkout needs to know. Creates nothing and reports nothing.
    async fn look(&self, _base: &Base, _spec: &DiskSpec, _run: &RunId) -> Result<()> {
        Ok(())
    }

    /// Creates a copy of the base's root disk. Debts for it, and for a snapshot that is started here, are registered
    /// first.
    async fn checkout(&self, base: &Base, spec: &DiskSpec, run: &RunId, undo: &Undo)
    -> Result<Box<dyn Disk>>;

    /// Opens the disk that a run preserved (`--keep-on-failure`). Fails with `NotFound` if there is none.
    async fn reopen(&self, run: &RunId) -> Result<Box<dyn Disk>>;

    /// Removes all leftovers of a run, except snapshots that images use.
    async fn forget(&self, run: &RunId) -> Result<()>;
}

/// A writable copy of a base's disk. A mounted root borrows it, so a mounted disk cannot be committed.
#[async_trait(?Send)]
pub trait Disk {
    fn device(&self) -> &Device;

    /// Makes the snapshot and returns when it is complete; registers a debt for it first. `on_progress` gets the number
    /// of bytes uploaded so far, if this process uploads them.
    async fn commit(self: Box<Self>, undo: &Undo, on_progress: &dyn Fn(u64)) -> Result<SnapshotId>;
}
