//! Pending snapshots that are written block by block: their state, and which blocks were put.
//!
//! The state is not stored. It is derived from the record and the files, so that it is correct even if a process was
//! killed. The snapshot is complete once its record says so. It has failed if no block was put for too long. It has
//! also failed if the machine was rebooted, because the blocks were not synced.

use super::records::PendingWrites;
use super::records::{PUT, RegionStore, SnapshotRecord, now};
use crate::cloud::block_api::SnapshotExpired;
use crate::cloud::ec2_rules::{ec2_error, not_found_error};
use crate::error::Kind;
use crate::ids::SnapshotId;
use crate::ids::{BLOCK, Digest};
use crate::owner::Owner;
use crate::sys::lock::lock_range_until_closed;
use anyhow::{Context, Result};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::OnceLock;
use std::time::UNIX_EPOCH;

/// The size in bytes of a block's entry in the file that lists the put blocks. One byte is the block's state, and 32
/// are its digest. The size is a power of two, so that no entry crosses a page boundary.
const ENTRY_BYTES: usize = 64;
/// The state of a block whose write has begun. If the process was killed during the write, the block's data are
/// undefined.
const STATE_BEGUN: u8 = 1;
const STATE_DONE: u8 = 2;

/// A snapshot's state, as on EC2: `pending`, `completed`, `error`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotState {
    Pending,
    Completed,
    /// The text is the reason.
    Error(String),
}

/// The id of the machine's current boot.
pub fn boot_id() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| Owner::this().boot)
}

impl RegionStore {
    pub fn snapshot_state(&self, record: &SnapshotRecord) -> SnapshotState {
        let Some(written) = record.written.as_ref().filter(|written| written.sealed.is_none()) else {
            return if now() < record.ready_at { SnapshotState::Pending } else { SnapshotState::Completed };
        };
        if written.boot != boot_id() {
            return SnapshotState::Error("the machine was rebooted before the snapshot was complete".into());
        }
        let last = self.part::<SnapshotRecord>(&record.id.0, PUT).metadata().and_then(|m| m.modified());
        let Some(last) = last.ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()) else {
            return SnapshotState::Error("its data is missing".into());
        };
        if now().saturating_sub(last.as_millis() as u64) > written.patience {
            let text = format!("no block was written for {} seconds", written.patience / 1000);
            return SnapshotState::Error(text);
        }
        SnapshotState::Pending
    }

    /// Fails unless a snapshot is complete.
    pub fn ensure_completed(&self, record: &SnapshotRecord) -> Result<()> {
        let id = &record.id;
        match self.snapshot_state(record) {
            SnapshotState::Completed => Ok(()),
            SnapshotState::Pending => {
                Err(ec2_error("IncorrectState", format!("{id} is in invalid state - pending")))
            }
            SnapshotState::Error(why) => {
                Err(ec2_error("IncorrectState", format!("{id} is in invalid state - error ({why})")))
            }
        }
    }

    /// Returns the record of a snapshot. If the snapshot does not exist, the error is the one that EBS direct returns.
    pub fn by_blocks(&self, id: &SnapshotId) -> Result<SnapshotRecord> {
        self.find(&id.0)?.ok_or_else(|| {
            let text = format!("The snapshot '{id}' does not exist.");
            not_found_error("ResourceNotFoundException", text)
        })
    }

    /// Returns the record of a snapshot that is written block by block. Fails if the snapshot is in the error state.
    pub fn writable(&self, id: &SnapshotId) -> Result<(SnapshotRecord, PendingWrites)> {
        let record = self.by_blocks(id)?;
        let Some(written) = record.written.clone() else {
            let text = format!("The snapshot '{id}' was not created by StartSnapshot.");
            return Err(invalid("INVALID_SNAPSHOT_ID", text));
        };
        match self.snapshot_state(&record) {
            SnapshotState::Error(why) => {
                let text = format!("The snapshot '{id}' is in the error state: {why}.");
                let refused = Kind::Cloud.failure(invalid("INVALID_SNAPSHOT_ID", text));
                Err(anyhow::Error::new(SnapshotExpired(id.clone())).context(refused))
            }
            _ => Ok((record, written)),
        }
    }
}

/// Makes an error in EBS direct's form.
pub fn invalid(reason: &str, text: impl std::fmt::Display) -> anyhow::Error {
    ec2_error(&format!("ValidationException: {reason}"), text)
}

/// The states of a snapshot's blocks, in a sparse file.
pub struct PutBlocks(File);

/// The state of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockEntry {
    Never,
    Begun,
    Done(Digest),
}

impl PutBlocks {
    pub fn create(path: &Path, size_gib: u64) -> Result<()> {
        let mut options = File::options();
        let file = options.write(true).create_new(true).mode(0o600).open(path);
        let entries = blocks_of(size_gib) * ENTRY_BYTES as u64;
        file.and_then(|file| file.set_len(entries)).with_context(|| format!("creating {}", path.display()))
    }

    /// Opens the file; returns `None` if it does not exist. Each caller opens the file again, because a lock belongs to
    /// an open file. So callers exclude each other even within one process.
    pub fn open(store: &RegionStore, id: &SnapshotId) -> Result<Option<Self>> {
        let path = store.part::<SnapshotRecord>(&id.0, PUT);
        match File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
            Ok(file) => Ok(Some(Self(file))),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("opening {}", path.display())),
        }
    }

    /// Waits until no other thread or process writes these blocks, and locks them until the returned value is dropped.
    pub fn lock(self, blocks: Range<u32>) -> Result<Self> {
        lock_range_until_closed(&self.0, blocks).context("waiting for other writers of the snapshot")?;
        Ok(self)
    }

    pub fn begin(&self, index: u32) -> std::io::Result<()> {
        self.0.write_all_at(&[STATE_BEGUN], u64::from(index) * ENTRY_BYTES as u64)
    }

    pub fn done(&self, index: u32, digest: &Digest) -> std::io::Result<()> {
        let mut entry = [STATE_DONE; 33];
        entry[1..].copy_from_slice(digest);
        self.0.write_all_at(&entry, u64::from(index) * ENTRY_BYTES as u64)
    }

    /// Returns the entries of a range of blocks.
    pub fn entries(&self, blocks: Range<u32>) -> std::io::Result<Vec<BlockEntry>> {
        let mut bytes = vec![0; blocks.len() * ENTRY_BYTES];
        self.0.read_exact_at(&mut bytes, u64::from(blocks.start) * ENTRY_BYTES as u64)?;
        Ok(bytes.chunks(ENTRY_BYTES).map(parse_entry).collect())
    }

    /// Returns all entries except those of blocks that were never put.
    pub fn all(&self) -> Result<BTreeMap<u32, BlockEntry>> {
        let (mut found, mut at) = (BTreeMap::new(), 0);
        loop {
            let from = match rustix::fs::seek(&self.0, SeekFrom::Data(at)) {
                Ok(from) => from - from % ENTRY_BYTES as u64,
                Err(Errno::NXIO) => return Ok(found),
                Err(e) => return Err(e).context("looking for blocks that were put"),
            };
            at = rustix::fs::seek(&self.0, SeekFrom::Hole(from))?.next_multiple_of(ENTRY_BYTES as u64);
            let blocks = (from / ENTRY_BYTES as u64) as u32..(at / ENTRY_BYTES as u64) as u32;
            let entries = self.entries(blocks.clone()).context("reading which blocks were put")?;
            found.extend(blocks.zip(entries).filter(|(_, entry)| *entry != BlockEntry::Never));
        }
    }

    /// Returns the digests of the blocks that were put, in the order of the block indexes.
    pub fn digests(&self) -> Result<BTreeMap<u32, Digest>> {
        let done =
            |(index, entry)| if let BlockEntry::Done(digest) = entry { Some((index, digest)) } else { None };
        Ok(self.all()?.into_iter().filter_map(done).collect())
    }

    pub fn sync(&self) -> std::io::Result<()> {
        self.0.sync_data()
    }
}

fn parse_entry(bytes: &[u8]) -> BlockEntry {
    match bytes[0] {
        0 => BlockEntry::Never,
        STATE_DONE => {
            let mut digest = Digest::default();
            digest.copy_from_slice(&bytes[1..33]);
            BlockEntry::Done(digest)
        }
        _ => BlockEntry::Begun,
    }
}

pub fn blocks_of(size_gib: u64) -> u64 {
    (size_gib << 30) / BLOCK as u64
}
