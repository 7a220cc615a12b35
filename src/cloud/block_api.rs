//! Snapshots read and written by their blocks, for strategy (b): the shapes of the EBS direct APIs.

use super::{Tags, VolumeKind};
use crate::ids::Digest;
use crate::ids::{RunId, SnapshotId};
use anyhow::Result;
use async_trait::async_trait;
use std::sync::Arc;

/// Indexes of blocks, in little memory: a snapshot of 16 TiB has 33 million.
pub type Indexes = roaring::RoaringBitmap;

/// What a snapshot holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    pub size_gib: u64,
    /// Blocks that were ever written. All others are zeros, and cannot be read.
    pub blocks: Indexes,
}

/// A snapshot that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Blocks that are not written are this one's.
    pub parent: Option<SnapshotId>,
    /// At least the parent's.
    pub size_gib: u64,
    pub description: String,
    pub run: RunId,
    /// Set in the call that makes it.
    pub tags: Tags,
    /// Without a parent. A child is encrypted as its parent is.
    pub encrypted: bool,
    /// Only with `encrypted`; `None`: the account's own.
    pub kms_key: Option<String>,
}

/// A pending snapshot was given up by the cloud, for too long nothing was written to it; or somebody deleted it.
#[derive(Debug)]
pub struct Expired(pub SnapshotId);
impl std::fmt::Display for Expired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the pending snapshot {} expired, or was deleted, before it was complete", self.0)
    }
}
impl std::error::Error for Expired {}

/// What stands between a base snapshot and a child of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parent {
    /// Nothing.
    Itself,
    /// Its blocks cannot be read by this account (it is public, and not ours): it has to be copied into the account
    /// first, once.
    Copy { why: String },
    /// Its blocks can be read, but a child could not be what is asked for (encrypted with another key): the new
    /// snapshot has none, and every block is sent.
    Whole { why: String },
}

/// Reads a snapshot's blocks. It blocks its thread, and is used by many at once.
pub trait Reader: Send + Sync {
    /// A block of [`Contents::blocks`], verified against the digest that came with it, and that digest. A failure names both
    /// block and snapshot.
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)>;
}

/// Snapshots by their blocks. Failures name the snapshot, and the block.
#[async_trait(?Send)]
pub trait Blocks {
    async fn contents(&self, snapshot: &SnapshotId) -> Result<Contents>;

    /// Reads blocks of a snapshot whose contents were asked for.
    async fn reader(&self, snapshot: &SnapshotId) -> Result<Arc<dyn Reader>>;

    /// Whether a child of this snapshot can be made that is encrypted as `kind` asks (`None`: as its parent is).
    async fn parent(&self, snapshot: &SnapshotId, kind: &VolumeKind) -> Result<Parent>;

    /// A copy of a snapshot in this account, made once: the next who asks is answered with the same, also while it is
    /// pending. It is a result, and no scratch: it has no tag of a run, and no sweep removes it. `tell` is called before
    /// it is made, or waited for: where it is there, nothing takes time or money.
    async fn copied(&self, snapshot: &SnapshotId, kind: &VolumeKind, tell: &dyn Fn()) -> Result<SnapshotId>;

    /// A pending snapshot, which has to be completed. It is the run's, as its tags say: a debt is owed for it before. It may
    /// take its time. Where it is dropped before it answers, what it made is the debt's.
    async fn start(&self, spec: &NewSnapshot) -> Result<SnapshotId>;

    /// Writes a block; the same block again overwrites it.
    async fn put(&self, snapshot: &SnapshotId, index: u32, data: Arc<[u8]>, digest: Digest) -> Result<()>;

    /// Seals a snapshot: `count` blocks were put, and `checksum` is the SHA256 of their digests in the order of their
    /// indexes. Answers when it is complete. Fails with [`Expired`] in its chain where it took too long between the
    /// blocks: then it has to be written once more, as another snapshot.
    async fn complete(&self, snapshot: &SnapshotId, count: u32, checksum: Digest) -> Result<()>;

    /// Deletes every snapshot of the run that no image uses, pending ones too.
    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()>;
}
