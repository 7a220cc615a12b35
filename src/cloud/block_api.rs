//! Block-level access to snapshots, in the shape of the EBS direct APIs. Direct disks use it.

use super::{Tags, VolumeKind};
use crate::ids::Digest;
use crate::ids::{RunId, SnapshotId};
use anyhow::Result;
use async_trait::async_trait;
use std::sync::Arc;

/// A compact set of block indexes: a snapshot of 16 TiB has 33 million.
pub type BlockIndexes = roaring::RoaringBitmap;

/// What a snapshot contains.
#[derive(Debug, Clone, PartialEq)]
pub struct SnapshotContents {
    pub size_gib: u64,
    /// Blocks that were ever written. All others are zeros and cannot be read.
    pub blocks: BlockIndexes,
}

/// Describes a snapshot to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// The snapshot that supplies the blocks that are not written.
    pub parent: Option<SnapshotId>,
    /// At least the parent's size.
    pub size_gib: u64,
    pub description: String,
    pub run: RunId,
    /// Set by the call that creates the snapshot.
    pub tags: Tags,
    /// Only without a parent: a child is encrypted as its parent is.
    pub encrypted: bool,
    /// Only with `encrypted`; `None` is the account's default key.
    pub kms_key: Option<String>,
}

/// The cloud discarded a pending snapshot because nothing was written to it for too long, or somebody deleted it.
#[derive(Debug)]
pub struct SnapshotExpired(pub SnapshotId);
impl std::fmt::Display for SnapshotExpired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the pending snapshot {} expired, or was deleted, before it was complete", self.0)
    }
}
impl std::error::Error for SnapshotExpired {}

/// How a base snapshot can serve as the parent of a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParentUse {
    /// It can be the parent itself.
    UseAsParent,
    /// This account cannot read its blocks (it is public and belongs to another account): it has to be copied into the
    /// account first, once.
    CopyFirst { why: String },
    /// Its blocks can be read, but a child could not have the requested properties (encryption with another key). The
    /// new snapshot gets no parent, and every block is uploaded.
    FullUpload { why: String },
}

/// Reads a snapshot's blocks. It blocks the calling thread, and many threads use it concurrently.
pub trait SnapshotReader: Send + Sync {
    /// Reads a block of [`SnapshotContents::blocks`], verifies it against the digest that came with it, and returns both. An
    /// error names the block and the snapshot.
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)>;
}

/// Block-level operations on snapshots. Errors name the snapshot and the block.
#[async_trait(?Send)]
pub trait BlockApi {
    async fn contents(&self, snapshot: &SnapshotId) -> Result<SnapshotContents>;

    /// A reader for the blocks of a snapshot whose [`BlockApi::contents`] were listed.
    async fn reader(&self, snapshot: &SnapshotId) -> Result<Arc<dyn SnapshotReader>>;

    /// How this snapshot can be the parent of one that is encrypted as `kind` asks (`None`: as its parent is).
    async fn parent(&self, snapshot: &SnapshotId, kind: &VolumeKind) -> Result<ParentUse>;

    /// A copy of a snapshot in this account. It is created once: later callers get the same copy, also while it is
    /// pending. It is a result and not scratch: it has no tag of a run, and no sweep removes it. `tell` is called
    /// before the copy is created or waited for; if the copy exists already, the call costs neither time nor money.
    async fn copied(&self, snapshot: &SnapshotId, kind: &VolumeKind, tell: &dyn Fn()) -> Result<SnapshotId>;

    /// Starts a pending snapshot, which has to be completed. Its tags assign it to the run: the caller registers an
    /// undo debt first. The call may be slow. If it is dropped before it answers, the debt removes what it created.
    async fn start(&self, spec: &NewSnapshot) -> Result<SnapshotId>;

    /// Writes a block; a second write overwrites the first.
    async fn put(&self, snapshot: &SnapshotId, index: u32, data: Arc<[u8]>, digest: Digest) -> Result<()>;

    /// Seals a snapshot: `count` blocks were put, and `checksum` is the SHA256 of their digests in the order of their
    /// indexes. Returns when the snapshot is complete. Fails with [`SnapshotExpired`] in its chain if too much time passed
    /// between the blocks: then they have to be written again, to another snapshot.
    async fn complete(&self, snapshot: &SnapshotId, count: u32, checksum: Digest) -> Result<()>;

    /// Deletes every snapshot of the run that no image uses, pending ones too.
    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()>;
}
