//! Selects the blocks of a disk to upload. If the base is the parent of the new snapshot, only blocks that differ from
//! the base's blocks are selected. Otherwise all blocks that are not zeros are selected.

use super::backing::BackingStore;
use super::fault::{disk_error, ensure_written};
use crate::ids::digest_of;
use crate::ids::{BLOCK, Digest};
use crate::transfer::readers::BlockSource;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// The blocks of a disk to upload.
pub struct ChangedBlocks {
    lower: Arc<BackingStore>,
    upper: File,
    /// The written blocks by index. The value is true if the base also has the block.
    written: BTreeMap<u32, bool>,
    /// Whether the new snapshot has a parent.
    child: bool,
}

impl ChangedBlocks {
    /// `written` comes from the block map. If `child` is true, the base snapshot is the parent of the new one.
    /// Otherwise there is no parent, and the base's blocks are uploaded, too.
    pub fn new(lower: Arc<BackingStore>, upper: File, written: Vec<(u32, bool)>, child: bool) -> Self {
        Self { lower, upper, written: written.into_iter().collect(), child }
    }
}

impl BlockSource for ChangedBlocks {
    fn indexes(&self) -> Vec<u32> {
        let mut all: Vec<u32> = self.written.keys().copied().collect();
        if !self.child {
            all.extend(self.lower.blocks());
            all.sort_unstable();
            all.dedup();
        }
        all
    }

    fn block(&self, index: u32) -> Result<Option<(Arc<[u8]>, Digest)>> {
        let Some(on_base) = self.written.get(&index) else {
            // This block was not written. It is uploaded only because there is no parent.
            let (data, digest) = self.lower.block(index)?;
            return Ok(unless_zeros(&data, digest));
        };
        let mut data = vec![0; BLOCK];
        let read = self.upper.read_exact_at(&mut data, u64::from(index) * BLOCK as u64);
        read.with_context(|| format!("reading block {index} of the disk's changes"))?;
        let digest = digest_of(&data);
        if !self.child || !on_base {
            return Ok(unless_zeros(&data, digest));
        }
        // A block that differs from the base's block is uploaded even if it has only zeros.
        Ok((self.lower.fetch(index)? != digest).then(|| (data.into(), digest)))
    }

    /// No process writes to the local files during the upload, so this checks only for write errors. The kernel may
    /// report a write as done, and later fail to store the data. In that case, the data that were read for the upload
    /// may be wrong.
    fn ensure_unchanged(&self, _: &BTreeMap<u32, Digest>) -> Result<()> {
        ensure_written(&self.upper)
            .map_err(|error| disk_error(error, "storing the disk's changes on this machine"))?;
        self.lower.cached().ensure_stored()
    }
}

/// Returns `None` if all bytes are zeros. Such a block need not be uploaded if the new snapshot has no parent or the
/// parent lacks the block, because a missing block reads as zeros.
fn unless_zeros(data: &[u8], digest: Digest) -> Option<(Arc<[u8]>, Digest)> {
    data.iter().any(|byte| *byte != 0).then(|| (data.into(), digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::block_api::{SnapshotContents, SnapshotReader};
    use crate::disk::direct::block_cache::BlockCache;
    use crate::ids::SnapshotId;

    /// A base whose block n is filled with the byte n.
    struct Base;
    impl SnapshotReader for Base {
        fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
            let data = vec![index as u8; BLOCK];
            let digest = digest_of(&data);
            Ok((data, digest))
        }
    }

    /// Returns the index and the byte of each uploaded block, for a base with the blocks 1, 3 and 5.
    fn uploaded(child: bool, written: &[(u32, u8)]) -> Vec<(u32, u8)> {
        let (dir, id) = (tempfile::tempdir().unwrap(), SnapshotId("snap-1".into()));
        let contents = SnapshotContents { size_gib: 1, blocks: [1, 3, 5].into() };
        let cached = BlockCache::new(dir.path(), u64::MAX).open_snapshot(&id).unwrap();
        let lower = Arc::new(BackingStore::new(&id, &contents, Arc::new(Base), cached));
        let upper = tempfile::tempfile().unwrap();
        for (index, byte) in written {
            upper.write_all_at(&vec![*byte; BLOCK], u64::from(*index) * BLOCK as u64).unwrap();
        }
        let marks = written.iter().map(|(index, _)| (*index, contents.blocks.contains(*index)));
        let changes = ChangedBlocks::new(lower, upper, marks.collect(), child);
        let blocks = changes.indexes().into_iter().filter_map(|index| {
            let (data, digest) = changes.block(index).unwrap()?;
            assert!(data.iter().all(|byte| *byte == data[0]) && digest == digest_of(&data));
            Some((index, data[0]))
        });
        blocks.collect()
    }

    #[test]
    fn a_child_gets_differing_blocks_and_zeros_over_data() {
        // The blocks are, in this order, an unchanged block, zeros over data, other data, zeros over zeros, and a new
        // block.
        let written = [(1, 1), (3, 0), (5, 9), (6, 0), (7, 8)];
        assert_eq!(uploaded(true, &written), [(3, 0), (5, 9), (7, 8)]);
    }

    #[test]
    fn without_a_parent_all_blocks_but_zeros_are_uploaded() {
        assert_eq!(uploaded(false, &[(3, 0), (5, 9), (6, 0), (7, 8)]), [(1, 1), (5, 9), (7, 8)]);
        assert_eq!(uploaded(false, &[]), [(1, 1), (3, 3), (5, 5)]);
    }
}
