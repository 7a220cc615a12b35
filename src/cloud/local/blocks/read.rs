//! Reads the blocks of a complete snapshot.

use crate::cloud::block_api::{BlockIndexes, SnapshotReader};
use crate::cloud::ec2_rules::ec2_error;
use crate::cloud::local::pending_snapshot::{PutBlocks, blocks_of, invalid};
use crate::cloud::local::records::{RegionStore, SnapshotRecord};
use crate::ids::SnapshotId;
use crate::ids::{BLOCK, Digest};
use crate::sys::sparse_copy;
use crate::sys::tasks::Cancelled;
use anyhow::{Context, Result};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A complete snapshot that is open for reading.
pub struct OpenSnapshot {
    store: RegionStore,
    id: SnapshotId,
    data: File,
    blocks: u64,
    put: BTreeMap<u32, Digest>,
}

impl OpenSnapshot {
    /// Opens a snapshot; also returns its size in GiB.
    pub fn open(store: &RegionStore, id: &SnapshotId) -> Result<(Self, u64)> {
        let record = store.by_blocks(id)?;
        store.ensure_completed(&record).map_err(|e| invalid("INVALID_SNAPSHOT_ID", e))?;
        let put = PutBlocks::open(store, id)?.map_or_else(|| Ok(BTreeMap::new()), |put| put.digests())?;
        let path = store.data::<SnapshotRecord>(&id.0);
        let data = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let blocks = blocks_of(record.size_gib);
        Ok((Self { store: store.clone(), id: id.clone(), data, blocks, put }, record.size_gib))
    }

    /// The blocks that have data other than zeros, or were put as zeros.
    pub fn contents(&self, stop: &Cancelled) -> Result<BlockIndexes> {
        let mut found: BlockIndexes = self.put.keys().copied().collect();
        sparse_copy::nonzero_blocks(&self.data, stop, &mut |at, data| {
            let end = (at + data.len() as u64).div_ceil(BLOCK as u64);
            found.insert_range((at / BLOCK as u64) as u32..end as u32);
            Ok(())
        })?;
        Ok(found)
    }

    fn is_written(&self, index: u32) -> Result<bool> {
        if self.put.contains_key(&index) {
            return Ok(true);
        }
        let at = u64::from(index) * BLOCK as u64;
        match rustix::fs::seek(&self.data, SeekFrom::Data(at)) {
            Ok(data) => Ok(data < at + BLOCK as u64),
            Err(Errno::NXIO) => Ok(false),
            Err(e) => Err(e).context("looking for data"),
        }
    }
}

impl SnapshotReader for OpenSnapshot {
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        self.store.by_blocks(&self.id)?;
        let id = &self.id;
        if u64::from(index) >= self.blocks || !self.is_written(index)? {
            return Err(invalid("INVALID_BLOCK", format!("Block {index} of '{id}' was never written.")));
        }
        let mut block = vec![0; BLOCK];
        let read = self.data.read_exact_at(&mut block, u64::from(index) * BLOCK as u64);
        read.with_context(|| format!("reading block {index} of {id}"))?;
        let digest = Digest::from(Sha256::digest(&block));
        if self.put.get(&index).is_some_and(|put| *put != digest) {
            return Err(ec2_error(
                "InternalServerException",
                format!("block {index} of {id} differs from the block that was put"),
            ));
        }
        Ok((block, digest))
    }
}
