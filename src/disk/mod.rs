//! Creates a bake's disk, and makes a snapshot of that disk.

pub mod attached_disk;
pub mod direct;
pub mod step_record;
pub mod strategy;

use crate::cloud::{Base, Tags, VolumeKind, tag};
use crate::device::Device;
use crate::error::Kind;
use crate::ids::{RunId, SnapshotId};
use crate::owner::Owner;
use crate::transfer::upload::OnProgress;
use crate::undo::Undo;
use anyhow::Result;
use async_trait::async_trait;

/// The disk that a definition requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskSpec {
    /// `None` means the size of the base's disk.
    pub size_gib: Option<u64>,
    /// The type of the volume, and how the volume or the snapshot is encrypted.
    pub kind: VolumeKind,
    /// The tags of the volume and the snapshot.
    pub tags: Tags,
    /// Whether the snapshot is read back and compared with the uploaded blocks. This applies only to snapshots that
    /// oven uploads.
    pub verify: bool,
    /// Whether `commit` will be called. If true, `checkout` can start the snapshot early.
    pub will_commit: bool,
}

impl DiskSpec {
    /// Returns the size in GiB of a new disk that is a copy of the base's disk. Fails if the requested size is smaller
    /// than the base's disk.
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

/// Adds the tags that name a resource's run and its owner, that is, the process that created it. `oven sweep` uses
/// these tags to find leftovers.
pub fn with_owner_tags(tags: &Tags, run: &RunId) -> Tags {
    let mut tags = tags.clone();
    tags.entry(tag::RUN.to_owned()).or_insert_with(|| run.0.clone());
    tags.entry(tag::OWNER.to_owned()).or_insert_with(|| Owner::this().to_string());
    tags
}

/// A strategy to create a writable copy of a base image's disk.
#[async_trait(?Send)]
pub trait DiskStrategy {
    /// Asks the cloud in advance for information that `checkout` needs for this run. Creates nothing and reports
    /// nothing.
    async fn query_facts(&self, _base: &Base, _spec: &DiskSpec, _run: &RunId) -> Result<()> {
        Ok(())
    }

    /// Creates a copy of the base's root disk. Before that, registers clean-up actions for the copy and, if a snapshot
    /// is started early, for the snapshot.
    async fn checkout(&self, base: &Base, spec: &DiskSpec, run: &RunId, undo: &Undo)
    -> Result<Box<dyn Disk>>;

    /// Opens the disk that a run preserved (`--keep-on-failure`). Fails with `NotFound` if there is no such disk.
    async fn reopen(&self, run: &RunId) -> Result<Box<dyn Disk>>;

    /// Removes everything that a run created, except snapshots that images use.
    async fn forget(&self, run: &RunId) -> Result<()>;
}

/// A writable copy of a base's disk. A mounted root borrows the disk, so a mounted disk cannot be committed.
#[async_trait(?Send)]
pub trait Disk {
    fn device(&self) -> &Device;

    /// Creates a snapshot of the disk, and returns when the snapshot is complete. The snapshot's clean-up action is
    /// registered before the snapshot is created. If this process uploads the blocks, `on_progress` gets the number of
    /// bytes that are done, and of all bytes.
    async fn commit(self: Box<Self>, undo: &Undo, on_progress: OnProgress<'_>) -> Result<SnapshotId>;
}
