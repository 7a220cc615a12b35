//! What is sent of a disk: the blocks that differ from the base's.

use super::backing::Lower;
use super::fault::{ensure_kept, full};
use crate::ids::digest_of;
use crate::ids::{BLOCK, Digest};
use crate::transfer::upload::Source;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// The blocks of a disk that are to be sent.
pub struct Changes {
    lower: Arc<Lower>,
    upper: File,
    /// And whether it is one of the base's.
    written: BTreeMap<u32, bool>,
    /// Of the parent, if there is one.
    child: bool,
}

impl Changes {
    /// `written`: as the marks have it. `child`: of the snapshot that lies below; else all of it is sent.
    pub fn new(lower: Arc<Lower>, upper: File, written: Vec<(u32, bool)>, child: bool) -> Self {
        Self { lower, upper, written: written.into_iter().collect(), child }
    }
}

impl Source for Changes {
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
            // All of it is sent.
            let (data, digest) = self.lower.block(index)?;
            return Ok(some(&data, digest));
        };
        let mut data = vec![0; BLOCK];
        let read = self.upper.read_exact_at(&mut data, u64::from(index) * BLOCK as u64);
        read.with_context(|| format!("reading block {index} of what was written"))?;
        let digest = digest_of(&data);
        if !self.child || !on_base {
            return Ok(some(&data, digest));
        }
        // Zeros are sent where the base has something else.
        Ok((self.lower.fetch(index)? != digest).then(|| (data.into(), digest)))
    }

    /// Nobody else writes there; but what was written may have been lost, and then what was read is something else.
    fn ensure_unchanged(&self, _: &BTreeMap<u32, Digest>) -> Result<()> {
        ensure_kept(&self.upper).map_err(|error| full(error, "keeping what was written, on this machine"))?;
        self.lower.cached().ensure_kept()
    }
}

/// Zeros are what is there where nothing was sent, and the parent has nothing.
fn some(data: &[u8], digest: Digest) -> Option<(Arc<[u8]>, Digest)> {
    data.iter().any(|byte| *byte != 0).then(|| (data.into(), digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::block_api::{Contents, Reader};
    use crate::disk::direct::block_cache::Cache;
    use crate::ids::SnapshotId;

    /// Block n is full of n.
    struct Base;
    impl Reader for Base {
        fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
            let data = vec![index as u8; BLOCK];
            let digest = digest_of(&data);
            Ok((data, digest))
        }
    }

    /// On a base with the blocks 1, 3 and 5: what is sent, and of what it is full.
    fn sent(child: bool, written: &[(u32, u8)]) -> Vec<(u32, u8)> {
        let (dir, id) = (tempfile::tempdir().unwrap(), SnapshotId("snap-1".into()));
        let contents = Contents { size_gib: 1, blocks: [1, 3, 5].into() };
        let cached = Cache::new(dir.path(), u64::MAX).of(&id).unwrap();
        let lower = Arc::new(Lower::new(&id, &contents, Arc::new(Base), cached));
        let upper = tempfile::tempfile().unwrap();
        for (index, byte) in written {
            upper.write_all_at(&vec![*byte; BLOCK], u64::from(*index) * BLOCK as u64).unwrap();
        }
        let marks = written.iter().map(|(index, _)| (*index, contents.blocks.contains(*index)));
        let changes = Changes::new(lower, upper, marks.collect(), child);
        let blocks = changes.indexes().into_iter().filter_map(|index| {
            let (data, digest) = changes.block(index).unwrap()?;
            assert!(data.iter().all(|byte| *byte == data[0]) && digest == digest_of(&data));
            Some((index, data[0]))
        });
        blocks.collect()
    }

    #[test]
    fn a_child_gets_what_differs_and_zeros_where_the_base_has_something() {
        // The same as before; zeros over something; something else; zeros over zeros; new.
        let written = [(1, 1), (3, 0), (5, 9), (6, 0), (7, 8)];
        assert_eq!(sent(true, &written), [(3, 0), (5, 9), (7, 8)]);
    }

    #[test]
    fn without_a_parent_all_is_sent_but_zeros() {
        assert_eq!(sent(false, &[(3, 0), (5, 9), (6, 0), (7, 8)]), [(1, 1), (5, 9), (7, 8)]);
        assert_eq!(sent(false, &[]), [(1, 1), (3, 3), (5, 5)]);
    }
}
