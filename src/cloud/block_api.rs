//! Block-level access to snapshots, modelled on the EBS direct APIs. Direct disks use it.

use super::{Tags, VolumeKind};
use crate::ids::Digest;
use crate::ids::{RunId, SnapshotId};
use anyhow::Result;
use async_trait::async_trait;
use std::sync::Arc;

/// A set of block indexes. It is compact, because a snapshot of 16 TiB has 33 million blocks.
pub type BlockIndexes = roaring::RoaringBitmap;

/// The size of a snapshot, and the blocks that it contains.
#[derive(Debug, Clone, PartialEq)]
pub struct SnapshotContents {
    pub size_gib: u64,
    /// The blocks that were ever written. All other blocks are zeros, and a [`SnapshotReader`] cannot read them.
    pub blocks: BlockIndexes,
}

/// Describes a snapshot to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// The snapshot from which the new one inherits all blocks that are not written.
    pub parent: Option<SnapshotId>,
    /// The size must be at least the parent's.
    pub size_gib: u64,
    pub description: String,
    pub run: RunId,
    /// The call that creates the snapshot also sets these tags.
    pub tags: Tags,
    /// Whether to encrypt a snapshot that has no parent. A child is always encrypted like its parent.
    pub encrypted: bool,
    /// The KMS key, if the snapshot is `encrypted`. `None` means the account's default key.
    pub kms_key: Option<String>,
}

/// The error for a pending snapshot that can no longer be completed. Either the cloud discarded the snapshot, because
/// no block was written for too long, or somebody deleted it.
#[derive(Debug)]
pub struct SnapshotExpired(pub SnapshotId);
impl std::fmt::Display for SnapshotExpired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the pending snapshot {} expired, or was deleted, before it was complete", self.0)
    }
}
impl std::error::Error for SnapshotExpired {}

/// How a base snapshot can serve as the parent of a new snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParentUse {
    /// The snapshot itself can be the parent.
    UseAsParent,
    /// The snapshot itself cannot be the parent, because it belongs to another account or its encryption differs from
    /// the requested one. It has to be copied into this account first, and the copy is the parent.
    CopyFirst { why: String },
    /// Neither the snapshot nor a copy can be the parent, because the snapshot is encrypted and the new snapshot must
    /// not be encrypted. The new snapshot gets no parent, and every block is uploaded.
    FullUpload { why: String },
}

/// Reads a snapshot's blocks. A read blocks the calling thread. Many threads may read concurrently.
pub trait SnapshotReader: Send + Sync {
    /// Reads a block, verifies its data against its digest, and returns the data and the digest. Fails for a block that
    /// is not in [`SnapshotContents::blocks`]. Errors name the block and the snapshot.
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)>;
}

/// Block-level operations on snapshots. Errors name the snapshot and the block.
#[async_trait(?Send)]
pub trait BlockApi {
    async fn contents(&self, snapshot: &SnapshotId) -> Result<SnapshotContents>;

    /// Returns a reader for the blocks of a snapshot.
    async fn reader(&self, snapshot: &SnapshotId) -> Result<Arc<dyn SnapshotReader>>;

    /// Returns how this snapshot can be the parent of a new snapshot that is encrypted as `kind` requests. If `kind`
    /// does not set the encryption, the child is encrypted like its parent.
    async fn parent(&self, snapshot: &SnapshotId, kind: &VolumeKind) -> Result<ParentUse>;

    /// Returns a copy of the snapshot in this account. The copy is created only once. Later calls return the same copy,
    /// and wait for it if it is pending. The copy has no run tag, so neither the clean-up of a run nor `oven sweep`
    /// deletes it. `tell` is called before a copy is created or waited for. If a complete copy exists, `tell` is not
    /// called.
    async fn copied(&self, snapshot: &SnapshotId, kind: &VolumeKind, tell: &dyn Fn()) -> Result<SnapshotId>;

    /// Creates a pending snapshot, which has to be completed. Before this call, the caller registers a clean-up action
    /// with `undo`. The action finds the snapshot by the run's tag. So it works even if this future is dropped before
    /// it returns the id. The call may be slow.
    async fn start(&self, spec: &NewSnapshot) -> Result<SnapshotId>;

    /// Writes a block. A second write of the same block overwrites the first.
    async fn put(&self, snapshot: &SnapshotId, index: u32, data: Arc<[u8]>, digest: Digest) -> Result<()>;

    /// Seals a snapshot, so that no block can be written any more. Returns when the snapshot is complete. `count` is
    /// the number of blocks that were put. `checksum` is the SHA256 of their digests, in the order of the block
    /// indexes. Fails with [`SnapshotExpired`] in the error's chain if the snapshot can no longer be completed. In that
    /// case, the caller has to write all blocks again, to a new snapshot.
    async fn complete(&self, snapshot: &SnapshotId, count: u32, checksum: Digest) -> Result<()>;

    /// Deletes every snapshot of the run that no image uses, including pending snapshots.
    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()>;
}
