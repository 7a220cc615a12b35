//! Puts blocks into a pending snapshot, and completes it.

use crate::cloud::ec2_rules::not_found_error;
use crate::cloud::local::pending_snapshot::{BlockEntry, PutBlocks, blocks_of, invalid};
use crate::cloud::local::records::Completion;
use crate::cloud::local::records::{PARENT, RegionStore, SnapshotRecord};
use crate::ids::SnapshotId;
use crate::ids::{BLOCK, Digest};
use crate::sys::space;
use crate::sys::sparse_copy;
use anyhow::{Context, Result};
use rustix::fs::{Advice, FallocateFlags};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// Opens the data of a pending snapshot's parent.
fn open_parent(store: &RegionStore, id: &SnapshotId) -> Result<File> {
    let path = store.part::<SnapshotRecord>(&id.0, PARENT);
    File::open(&path).with_context(|| format!("opening {}", path.display()))
}

/// Opens the data of a pending snapshot.
fn open_data(store: &RegionStore, id: &SnapshotId) -> Result<File> {
    let path = store.data::<SnapshotRecord>(&id.0);
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
    options.open(&path).with_context(|| format!("opening {}", path.display()))
}

/// Returns the SHA256 of the concatenated digests, which have to be in the order of the block indexes.
pub fn linear<'a>(digests: impl IntoIterator<Item = &'a Digest>) -> Digest {
    let mut hash = Sha256::new();
    digests.into_iter().for_each(|digest| hash.update(digest));
    hash.finalize().into()
}

/// A snapshot that is ready to be marked as complete. No block can be put as long as this value exists.
pub struct VerifiedSnapshot {
    _lock: PutBlocks,
    pub sealed: Completion,
}

/// Verifies the blocks that were put, restores blocks whose put was interrupted, and syncs the data. Returns `None` if
/// the snapshot is complete already.
pub fn make_ready(
    store: &RegionStore,
    id: &SnapshotId,
    sealed: Completion,
) -> Result<Option<VerifiedSnapshot>> {
    store.by_blocks(id)?;
    let put = open_put(store, id)?.lock(0..u32::MAX)?;
    let (_, written) = store.writable(id)?;
    if let Some(before) = written.sealed {
        if before == sealed {
            return Ok(None);
        }
        return Err(invalid(
            "INVALID_SNAPSHOT_ID",
            format!("The snapshot '{id}' is already complete, with other blocks."),
        ));
    }
    let digests = put.digests()?;
    if digests.len() as u64 != u64::from(sealed.count) {
        let text =
            format!("The changed blocks count is {}, but {} blocks were put.", sealed.count, digests.len());
        return Err(invalid("INVALID_PARAMETER_VALUE", text));
    }
    if linear(digests.values()) != sealed.checksum {
        return Err(invalid(
            "INVALID_PARAMETER_VALUE",
            "The checksum does not match the blocks that were put.",
        ));
    }
    let target = open_data(store, id)?;
    for (index, entry) in put.all()? {
        if entry == BlockEntry::Begun {
            restore(store, id, &target, written.parent.is_some(), index)?;
        }
    }
    target.sync_data().and_then(|()| put.sync()).context("writing the snapshot to the disk")?;
    Ok(Some(VerifiedSnapshot { _lock: put, sealed }))
}

/// Restores a block after an interrupted write: to the parent's data, or to zeros if the parent does not have the
/// block.
fn restore(store: &RegionStore, id: &SnapshotId, target: &File, parent: bool, index: u32) -> Result<()> {
    let at = u64::from(index) * BLOCK as u64;
    rustix::fs::fallocate(target, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, BLOCK as u64)
        .with_context(|| format!("restoring block {index}"))?;
    if parent {
        let parent = open_parent(store, id)?;
        if at < sparse_copy::length(&parent)? {
            let mut block = vec![0; BLOCK];
            parent.read_exact_at(&mut block, at).context("reading the parent")?;
            target.write_all_at(&block, at).with_context(|| format!("restoring block {index}"))?;
        }
    }
    Ok(())
}

fn open_put(store: &RegionStore, id: &SnapshotId) -> Result<PutBlocks> {
    match PutBlocks::open(store, id)? {
        Some(put) => Ok(put),
        None => {
            // The snapshot was never pending, or it was deleted. `writable` fails with the right error.
            store.writable(id)?;
            Err(not_found_error("ResourceNotFoundException", format!("The snapshot '{id}' does not exist.")))
        }
    }
}

pub fn put(store: &RegionStore, id: &SnapshotId, index: u32, block: &[u8], digest: &Digest) -> Result<()> {
    let file = open_put(store, id)?.lock(index..index.saturating_add(1))?;
    if block.len() != BLOCK {
        return Err(invalid(
            "INVALID_BLOCK",
            format!("the block has {} bytes instead of {BLOCK}", block.len()),
        ));
    }
    if Digest::from(Sha256::digest(block)) != *digest {
        return Err(invalid(
            "INVALID_BLOCK",
            format!("The data of block {index} does not match its checksum."),
        ));
    }
    let (record, written) = store.writable(id)?;
    if written.sealed.is_some() {
        return Err(invalid("INVALID_SNAPSHOT_ID", format!("The snapshot '{id}' is not pending.")));
    }
    if u64::from(index) >= blocks_of(record.size_gib) {
        let text = format!("Block {index} is beyond the {} GiB of '{id}'.", record.size_gib);
        return Err(invalid("INVALID_BLOCK", text));
    }
    let target = open_data(store, id)?;
    let write = || {
        file.begin(index)?;
        let at = u64::from(index) * BLOCK as u64;
        target.write_all_at(block, at)?;
        // Asks the kernel to write the block to the disk soon, because all blocks have to be on the disk when the
        // snapshot is completed. An error does not matter.
        _ = rustix::fs::fadvise(&target, at, NonZeroU64::new(BLOCK as u64), Advice::DontNeed);
        file.done(index, digest)
    };
    let dir = store.dir_of::<SnapshotRecord>();
    write().map_err(|e| space::write_error(e.into(), &dir, BLOCK as u64))
}
