//! Snapshots in memory that follow EBS direct's rules, for tests.

use crate::cloud::VolumeKind;
use crate::cloud::block_api::{
    BlockApi, NewSnapshot, ParentUse, SnapshotContents, SnapshotExpired, SnapshotReader,
};
use crate::ids::digest_of;
use crate::ids::{BLOCK, Digest};
use crate::ids::{RunId, SnapshotId};
use anyhow::{Result, bail, ensure};
use async_trait::async_trait;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// The fake cloud. Clones share its state.
#[derive(Clone, Default)]
pub struct Fake(Arc<Mutex<State>>);

#[derive(Default)]
pub struct State {
    pub snapshots: BTreeMap<SnapshotId, Snapshot>,
    pub started: u32,
    /// The duration of each put and each read.
    pub delay: Duration,
    /// The current number of concurrent puts. `most` is the highest number so far.
    pub now: usize,
    pub most: usize,
    /// The current number of concurrent reads. `most_reads` is the highest number so far.
    pub reads: usize,
    pub most_reads: usize,
    /// Puts of this block fail.
    pub refused: Option<u32>,
    /// The number of snapshots that expire. A snapshot expires when it is completed, or when the block `expiring_at` is
    /// put.
    pub expiring: u32,
    pub expiring_at: Option<u32>,
    /// Whether data are discarded after they were checked, so that a test with many blocks needs little memory.
    pub forgetful: bool,
}

pub struct Snapshot {
    pub run: RunId,
    pub size_gib: u64,
    pub complete: bool,
    pub expired: bool,
    /// The blocks that were put. After the snapshot is complete, the parent's blocks are added.
    pub blocks: BTreeMap<u32, (Arc<[u8]>, Digest)>,
    parent: Option<SnapshotId>,
}

impl Fake {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Adds a complete snapshot with these blocks.
    pub fn with(&self, name: &str, size_gib: u64, blocks: &[(u32, &[u8])]) -> SnapshotId {
        let blocks =
            blocks.iter().map(|(index, data)| (*index, (Arc::from(*data), digest_of(data)))).collect();
        let id = SnapshotId(name.to_owned());
        let snapshot = Snapshot {
            run: RunId("nobody's".into()),
            size_gib,
            complete: true,
            expired: false,
            blocks,
            parent: None,
        };
        self.state().snapshots.insert(id.clone(), snapshot);
        id
    }

    /// Changes a byte of a block, as a broken disk would do.
    pub fn corrupt(&self, snapshot: &SnapshotId, index: u32) {
        let mut state = self.state();
        let (data, digest) = state.snapshots.get_mut(snapshot).unwrap().blocks.get_mut(&index).unwrap();
        let mut bytes = data.to_vec();
        bytes[77] ^= 1;
        (*data, *digest) = (bytes.as_slice().into(), digest_of(&bytes));
    }
}

/// A put that is in progress. The put is counted until this value is dropped, so the count is correct even if the put's
/// future is dropped.
struct Under(Fake);
impl Drop for Under {
    fn drop(&mut self) {
        self.0.state().now -= 1;
    }
}

#[async_trait(?Send)]
impl BlockApi for Fake {
    async fn contents(&self, snapshot: &SnapshotId) -> Result<SnapshotContents> {
        let state = self.state();
        let Some(found) = state.snapshots.get(snapshot) else { bail!("{snapshot} does not exist") };
        ensure!(found.complete, "{snapshot} is not complete");
        Ok(SnapshotContents { size_gib: found.size_gib, blocks: found.blocks.keys().copied().collect() })
    }

    async fn reader(&self, snapshot: &SnapshotId) -> Result<Arc<dyn SnapshotReader>> {
        Ok(Arc::new(Blocked { fake: self.clone(), snapshot: snapshot.clone() }))
    }

    async fn parent(&self, _: &SnapshotId, _: &VolumeKind) -> Result<ParentUse> {
        Ok(ParentUse::UseAsParent)
    }

    async fn copied(&self, snapshot: &SnapshotId, _: &VolumeKind, _: &dyn Fn()) -> Result<SnapshotId> {
        Ok(snapshot.clone())
    }

    async fn start(&self, spec: &NewSnapshot) -> Result<SnapshotId> {
        let mut state = self.state();
        if let Some(parent) = &spec.parent {
            let Some(parent) = state.snapshots.get(parent) else { bail!("{parent} does not exist") };
            ensure!(parent.complete && spec.size_gib >= parent.size_gib, "the parent is larger, or pending");
        }
        state.started += 1;
        let id = SnapshotId(format!("snap-{}", state.started));
        let snapshot = Snapshot {
            run: spec.run.clone(),
            size_gib: spec.size_gib,
            complete: false,
            expired: false,
            blocks: BTreeMap::new(),
            parent: spec.parent.clone(),
        };
        state.snapshots.insert(id.clone(), snapshot);
        Ok(id)
    }

    async fn put(&self, snapshot: &SnapshotId, index: u32, data: Arc<[u8]>, digest: Digest) -> Result<()> {
        let delay = {
            let mut state = self.state();
            state.now += 1;
            state.most = state.most.max(state.now);
            state.delay
        };
        let _under = Under(self.clone());
        tokio::time::sleep(delay).await;
        let mut state = self.state();
        ensure!(state.refused != Some(index), "writing block {index} of {snapshot}: AccessDeniedException");
        let (expires, forgetful) = (state.expiring > 0 && state.expiring_at == Some(index), state.forgetful);
        if expires {
            state.expiring -= 1;
        }
        let Some(found) = state.snapshots.get_mut(snapshot) else { bail!("{snapshot} does not exist") };
        found.expired |= expires;
        if found.expired {
            return Err(SnapshotExpired(snapshot.clone()).into());
        }
        ensure!(!found.complete, "{snapshot} is not pending");
        ensure!(data.len() == BLOCK, "a block has {} bytes", data.len());
        ensure!(digest == digest_of(&data), "the checksum of block {index} is wrong");
        ensure!((u64::from(index) + 1) * BLOCK as u64 <= found.size_gib << 30, "{index} is beyond the end");
        let data = if forgetful { Arc::from([]) } else { data };
        let again = found.blocks.insert(index, (data, digest));
        ensure!(again.is_none(), "block {index} was sent twice, and nothing asked for it");
        Ok(())
    }

    async fn complete(&self, snapshot: &SnapshotId, count: u32, checksum: Digest) -> Result<()> {
        let mut state = self.state();
        let expires = state.expiring > 0 && state.expiring_at.is_none();
        if expires {
            state.expiring -= 1;
        }
        ensure!(state.now == 0, "puts are under way");
        let Some(mut found) = state.snapshots.remove(snapshot) else { bail!("{snapshot} does not exist") };
        found.expired |= expires;
        let wrong = if found.complete { Some("it is complete") } else { None };
        let mut linear = Sha256::new();
        found.blocks.values().for_each(|(_, digest)| linear.update(digest));
        let wrong = wrong
            .or((found.blocks.len() as u32 != count).then_some("the count is wrong"))
            .or((Digest::from(linear.finalize()) != checksum).then_some("the checksum is wrong"));
        let result = match wrong {
            _ if found.expired => Err(SnapshotExpired(snapshot.clone()).into()),
            Some(wrong) => Err(anyhow::anyhow!("{snapshot}: {wrong}")),
            None => {
                if let Some(parent) = &found.parent {
                    for (index, block) in &state.snapshots[parent].blocks {
                        found.blocks.entry(*index).or_insert_with(|| block.clone());
                    }
                }
                found.complete = true;
                Ok(())
            }
        };
        state.snapshots.insert(snapshot.clone(), found);
        result
    }

    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()> {
        self.state().snapshots.retain(|_, snapshot| snapshot.run != *run);
        Ok(())
    }
}

struct Blocked {
    fake: Fake,
    snapshot: SnapshotId,
}

impl SnapshotReader for Blocked {
    #[allow(clippy::disallowed_methods)] // a read may block its thread, which is not the runtime's
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        let delay = {
            let mut state = self.fake.state();
            state.reads += 1;
            state.most_reads = state.most_reads.max(state.reads);
            state.delay
        };
        std::thread::sleep(delay);
        let mut state = self.fake.state();
        state.reads -= 1;
        let block = state.snapshots[&self.snapshot].blocks.get(&index);
        let Some((data, digest)) = block else { bail!("{} has no block {index}", self.snapshot) };
        ensure!(
            digest_of(data) == *digest,
            "reading block {index} of {}: it does not match its checksum",
            self.snapshot
        );
        Ok((data.to_vec(), *digest))
    }
}
