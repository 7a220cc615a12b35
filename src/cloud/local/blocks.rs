//! Snapshots of a region by their blocks, as EBS direct has them.
//!
//! A pending one has its own sparse file from the start. Blocks are put there in place; all others are its parent's,
//! which come by themselves, beside the puts (or at once, where the file system can share data). A block is written by
//! one at a time, so neither can undo the other.

use super::names::{absent, check_description, refused};
use super::records::{Locked, NEVER, PARENT, PUT, SnapshotRecord, Store, created_after, remove_if_there};
use super::volumes::with_run;
use super::written::{Entry, Put, Sealed, SnapshotState, Written, blocks_of, boot, invalid};
use super::{Region, new_id};
use crate::cloud::blocks::{BLOCK, Blocks, Contents, Digest, NewSnapshot, Parent, Reader};
use crate::cloud::{RunId, SnapshotId, VolumeKind};
use crate::disk::copy::{self, Cancelled};
use anyhow::{Context, Result};
use async_trait::async_trait;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use tokio::task::JoinHandle;

/// Of a volume, and so of a snapshot.
const MOST_GIB: u64 = 16384;

/// Parents' data on its way into pending snapshots, each in a thread of its own.
#[derive(Debug, Default)]
pub struct Fills(RefCell<BTreeMap<SnapshotId, Fill>>);

#[derive(Debug)]
struct Fill {
    stop: Cancelled,
    task: JoinHandle<Result<()>>,
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Fills {
    fn begin(&self, store: &Store, id: &SnapshotId) {
        let stop = Cancelled::default();
        let (store, of, cancelled) = (store.clone(), id.clone(), stop.clone());
        let task = tokio::task::spawn_blocking(move || {
            let Some(put) = Put::open(&store, &of)? else { return Ok(()) };
            fill(&store, &of, &put, true, &cancelled)
        });
        self.0.borrow_mut().insert(id.clone(), Fill { stop, task });
    }

    pub fn stop(&self, id: &SnapshotId) {
        self.0.borrow_mut().remove(id);
    }

    /// Waits for it. Whether all is there; if not, why does not matter: it has to be done once more.
    async fn end(&self, id: &SnapshotId) -> bool {
        let fill = self.0.borrow_mut().remove(id);
        match fill {
            Some(mut fill) => matches!((&mut fill.task).await, Ok(Ok(()))),
            None => false,
        }
    }
}

/// Copies what the parent has and nobody has put. `turns`: somebody may put blocks meanwhile.
fn fill(store: &Store, id: &SnapshotId, put: &Put, turns: bool, stop: &Cancelled) -> Result<()> {
    let parent = open(store, id, PARENT)?;
    let target = writable(store, id)?;
    let filled = copy::copy_between(&parent, &target, stop, &mut |range| {
        let blocks = (range.start / BLOCK as u64) as u32..range.end.div_ceil(BLOCK as u64) as u32;
        let turn = if turns { Some(put.turn(blocks.clone())?) } else { None };
        let entries = put.entries(blocks.clone())?;
        let kept = blocks.zip(entries).filter(|(_, entry)| *entry != Entry::Never);
        Ok((turn, kept.map(|(index, _)| within(index, &range)).collect()))
    });
    let dir = store.dir_of::<SnapshotRecord>();
    filled.map_err(|e| copy::full(e, &dir, copy::allocated(&parent)))
}

/// The part of a range that a block is.
fn within(index: u32, range: &Range<u64>) -> Range<u64> {
    let start = u64::from(index) * BLOCK as u64;
    start.max(range.start)..(start + BLOCK as u64).min(range.end)
}

fn open(store: &Store, id: &SnapshotId, ending: &str) -> Result<File> {
    let path = store.part::<SnapshotRecord>(&id.0, ending);
    File::open(&path).with_context(|| format!("opening {}", path.display()))
}

fn data(store: &Store, id: &SnapshotId) -> Result<File> {
    let path = store.data::<SnapshotRecord>(&id.0);
    File::open(&path).with_context(|| format!("opening {}", path.display()))
}

fn writable(store: &Store, id: &SnapshotId) -> Result<File> {
    let path = store.data::<SnapshotRecord>(&id.0);
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
    options.open(&path).with_context(|| format!("opening {}", path.display()))
}

/// SHA256 over digests in the order of their indexes.
pub fn linear<'a>(digests: impl IntoIterator<Item = &'a Digest>) -> Digest {
    let mut hash = Sha256::new();
    digests.into_iter().for_each(|digest| hash.update(digest));
    hash.finalize().into()
}

/// Makes the files of a pending snapshot, and then its record. Whether its parent's data has yet to come.
fn start(region: &Locked, record: SnapshotRecord, mut written: Written) -> Result<bool> {
    let parent = match &written.parent {
        None => None,
        Some(id) => {
            let missing = || {
                let text = format!("The parent snapshot '{id}' does not exist.");
                absent("ResourceNotFoundException: DEPENDENCY_RESOURCE_NOT_FOUND", text)
            };
            let parent: SnapshotRecord = region.find(&id.0)?.ok_or_else(missing)?;
            region.ensure_completed(&parent).map_err(|e| invalid("INVALID_DEPENDENCY_REQUEST", e))?;
            if record.size_gib < parent.size_gib {
                let text = format!(
                    "{} GiB are less than the {} GiB of the parent {id}",
                    record.size_gib, parent.size_gib
                );
                return Err(invalid("INVALID_VOLUME_SIZE", text));
            }
            Some(id.clone())
        }
    };
    let id = record.id.clone();
    let make = || -> Result<bool> {
        let dir = region.dir_of::<SnapshotRecord>();
        let mut options = File::options();
        let target =
            options.write(true).create_new(true).mode(0o600).open(region.data::<SnapshotRecord>(&id.0));
        let target = target.with_context(|| format!("making a file in {}", dir.display()))?;
        Put::create(&region.part::<SnapshotRecord>(&id.0, PUT), record.size_gib)?;
        if let Some(parent) = &parent {
            let source = data(region, parent)?;
            let name = region.part::<SnapshotRecord>(&id.0, PARENT);
            // Data of a snapshot never changes: a second name for it is as good as a copy.
            if std::fs::hard_link(region.data::<SnapshotRecord>(&parent.0), &name).is_err() {
                copy::copy(&source, record.size_gib << 30, &dir, &Cancelled::default())?.link(&name)?;
            }
            written.shared = copy::reflink(&source, &target);
            if !written.shared {
                copy::ensure_room(&source, &dir)?;
            }
        }
        target.set_len(record.size_gib << 30).context("making room for the snapshot")?;
        let to_come = parent.is_some() && !written.shared;
        // After a loss of power it would have failed: nothing of it has to last.
        region.write(&SnapshotRecord { written: Some(written), ..record }, false)?;
        Ok(to_come)
    };
    make().inspect_err(|_| _ = region.remove::<SnapshotRecord>(&id.0))
}

/// A snapshot that only lacks the word that it is complete. Nobody can put a block for as long as this value lives.
struct Ready {
    _turn: Put,
    sealed: Sealed,
}

/// Verifies what was put, and makes the data whole and durable. `None`: that was done before.
fn make_ready(
    store: &Store,
    id: &SnapshotId,
    sealed: Sealed,
    filled: bool,
    stop: &Cancelled,
) -> Result<Option<Ready>> {
    store.by_blocks(id)?;
    let put = opened(store, id)?.turn_of_all()?;
    let (_, written) = store.writable(id)?;
    if let Some(before) = written.sealed {
        if before == sealed {
            return Ok(None);
        }
        return Err(invalid(
            "INVALID_SNAPSHOT_ID",
            format!("The snapshot '{id}' is complete, with other blocks."),
        ));
    }
    let digests = put.digests()?;
    if digests.len() as u64 != u64::from(sealed.count) {
        let text =
            format!("The changed blocks count is {}, and {} blocks were put.", sealed.count, digests.len());
        return Err(invalid("INVALID_PARAMETER_VALUE", text));
    }
    if linear(digests.values()) != sealed.checksum {
        return Err(invalid(
            "INVALID_PARAMETER_VALUE",
            "The checksum is not that of the blocks that were put.",
        ));
    }
    if written.parent.is_some() && !written.shared && !filled {
        fill(store, id, &put, false, stop)?;
    }
    let target = writable(store, id)?;
    for (index, entry) in put.all()? {
        if entry == Entry::Begun {
            restore(store, id, &target, written.parent.is_some(), index)?;
        }
    }
    target.sync_data().and_then(|()| put.sync()).context("writing the snapshot to the disk")?;
    Ok(Some(Ready { _turn: put, sealed }))
}

/// Makes a block the parent's again, of which somebody wrote a part.
fn restore(store: &Store, id: &SnapshotId, target: &File, parent: bool, index: u32) -> Result<()> {
    let at = u64::from(index) * BLOCK as u64;
    rustix::fs::fallocate(target, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, BLOCK as u64)
        .with_context(|| format!("undoing block {index}"))?;
    if parent {
        let parent = open(store, id, PARENT)?;
        if at < copy::length(&parent)? {
            let mut block = vec![0; BLOCK];
            parent.read_exact_at(&mut block, at).context("reading the parent")?;
            target.write_all_at(&block, at).with_context(|| format!("undoing block {index}"))?;
        }
    }
    Ok(())
}

fn opened(store: &Store, id: &SnapshotId) -> Result<Put> {
    match Put::open(store, id)? {
        Some(put) => Ok(put),
        None => {
            // None, or deleted since: this says which.
            store.writable(id)?;
            Err(absent("ResourceNotFoundException", format!("The snapshot '{id}' does not exist.")))
        }
    }
}

fn put(store: &Store, id: &SnapshotId, index: u32, block: &[u8], digest: &Digest) -> Result<()> {
    let file = opened(store, id)?;
    if block.len() != BLOCK {
        return Err(invalid("INVALID_BLOCK", format!("{} bytes, and a block has {BLOCK}", block.len())));
    }
    if Digest::from(Sha256::digest(block)) != *digest {
        return Err(invalid(
            "INVALID_BLOCK",
            format!("The data of block {index} does not match its checksum."),
        ));
    }
    let _turn = file.turn(index..index.saturating_add(1))?;
    let (record, written) = store.writable(id)?;
    if written.sealed.is_some() {
        return Err(invalid("INVALID_SNAPSHOT_ID", format!("The snapshot '{id}' is not pending.")));
    }
    if u64::from(index) >= blocks_of(record.size_gib) {
        let text = format!("Block {index} is beyond the {} GiB of '{id}'.", record.size_gib);
        return Err(invalid("INVALID_BLOCK", text));
    }
    let target = writable(store, id)?;
    let write = || {
        file.begin(index)?;
        target.write_all_at(block, u64::from(index) * BLOCK as u64)?;
        file.done(index, digest)
    };
    let dir = store.dir_of::<SnapshotRecord>();
    write().map_err(|e| copy::full(e.into(), &dir, BLOCK as u64))
}

/// A complete snapshot.
struct Whole {
    store: Store,
    id: SnapshotId,
    data: File,
    blocks: u64,
    put: BTreeMap<u32, Digest>,
}

impl Whole {
    fn open(store: &Store, id: &SnapshotId) -> Result<(Self, u64)> {
        let record = store.by_blocks(id)?;
        store.ensure_completed(&record).map_err(|e| invalid("INVALID_SNAPSHOT_ID", e))?;
        let put = Put::open(store, id)?.map_or_else(|| Ok(BTreeMap::new()), |put| put.digests())?;
        let (data, blocks) = (data(store, id)?, blocks_of(record.size_gib));
        Ok((Self { store: store.clone(), id: id.clone(), data, blocks, put }, record.size_gib))
    }

    /// What has data that is not zero, or was put as zeros.
    fn contents(&self, stop: &Cancelled) -> Result<BTreeSet<u32>> {
        let mut found: BTreeSet<u32> = self.put.keys().copied().collect();
        copy::blocks(&self.data, stop, &mut |at, data| {
            let end = (at + data.len() as u64).div_ceil(BLOCK as u64);
            found.extend((at / BLOCK as u64) as u32..end as u32);
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

impl Reader for Whole {
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
            return Err(refused(
                "InternalServerException",
                format!("block {index} of {id} is not what was put"),
            ));
        }
        Ok((block, digest))
    }
}

impl Region {
    /// As DescribeSnapshots tells it.
    pub fn snapshot_state(&self, id: &SnapshotId) -> Result<SnapshotState> {
        Ok(self.store().snapshot_state(&self.store().get(&id.0)?))
    }

    /// The blocks that were put into a snapshot so far, and their digests: of a complete one those that it was
    /// completed with. Nothing of a snapshot that was made otherwise.
    pub fn put_blocks(&self, id: &SnapshotId) -> Result<BTreeMap<u32, Digest>> {
        self.store().by_blocks(id)?;
        Put::open(self.store(), id)?.map_or_else(|| Ok(BTreeMap::new()), |put| put.digests())
    }
}

#[async_trait(?Send)]
impl Blocks for Region {
    async fn contents(&self, snapshot: &SnapshotId) -> Result<Contents> {
        let (store, id) = (self.store().clone(), snapshot.clone());
        let read = copy::blocking(move |stop| {
            let (whole, size_gib) = Whole::open(&store, &id)?;
            Ok(Contents { size_gib, blocks: whole.contents(stop)? })
        });
        read.await.with_context(|| format!("listing the blocks of {snapshot}"))
    }

    async fn reader(&self, snapshot: &SnapshotId) -> Result<Arc<dyn Reader>> {
        Ok(Arc::new(Whole::open(self.store(), snapshot)?.0))
    }

    /// Everything in a region is its owner's, and nothing is encrypted: a child is always possible.
    async fn parent(&self, snapshot: &SnapshotId, _: &VolumeKind) -> Result<Parent> {
        let record = self.store().by_blocks(snapshot)?;
        self.store().ensure_completed(&record)?;
        Ok(Parent::Itself)
    }

    /// It is in this account already.
    async fn copied(&self, snapshot: &SnapshotId, _: &VolumeKind) -> Result<SnapshotId> {
        let record = self.store().by_blocks(snapshot)?;
        self.store().ensure_completed(&record)?;
        Ok(snapshot.clone())
    }

    async fn start(&self, spec: &NewSnapshot) -> Result<SnapshotId> {
        let refuse = |text: &str| Err(invalid("INVALID_PARAMETER_VALUE", text));
        if spec.parent.is_some() && spec.encrypted {
            return refuse("With a parent snapshot, Encrypted must not be given.");
        }
        if spec.kms_key.is_some() && !spec.encrypted {
            return refuse("A KMS key is given, and Encrypted is not.");
        }
        if spec.size_gib == 0 || spec.size_gib > MOST_GIB {
            let text = format!("{} GiB, and 1 to {MOST_GIB} are allowed", spec.size_gib);
            return Err(invalid("INVALID_VOLUME_SIZE", text));
        }
        check_description(&spec.description)?;
        let id = SnapshotId(new_id("snap"));
        let record = SnapshotRecord {
            id: id.clone(),
            size_gib: spec.size_gib,
            volume: None,
            created: created_after::<SnapshotRecord>(&[]),
            description: spec.description.clone(),
            tags: with_run(&spec.tags, &spec.run)?,
            ready_at: NEVER,
            written: None,
        };
        let written = Written {
            parent: spec.parent.clone(),
            shared: false,
            patience: self.0.patience.as_millis() as u64,
            boot: boot().to_owned(),
            sealed: None,
        };
        if self
            .store()
            .locked(move |region| start(region, record, written))
            .await
            .context("starting a snapshot")?
        {
            self.0.fills.begin(self.store(), &id);
        }
        Ok(id)
    }

    async fn put(&self, snapshot: &SnapshotId, index: u32, data: Arc<[u8]>, digest: Digest) -> Result<()> {
        let (store, id) = (self.store().clone(), snapshot.clone());
        let work = copy::blocking(move |_| put(&store, &id, index, &data, &digest));
        work.await.with_context(|| format!("writing block {index} of {snapshot}"))
    }

    async fn complete(&self, snapshot: &SnapshotId, count: u32, checksum: Digest) -> Result<()> {
        let filled = self.0.fills.end(snapshot).await;
        let (store, id, sealed) = (self.store().clone(), snapshot.clone(), Sealed { count, checksum });
        let ready = copy::blocking(move |stop| make_ready(&store, &id, sealed, filled, stop));
        let context = || format!("completing {snapshot}");
        let Some(ready) = ready.await.with_context(context)? else {
            return self.completed(snapshot).await.map(drop);
        };
        let (id, ready_at) = (snapshot.clone(), self.ready_at());
        let complete = move |region: &Locked| {
            // Not if it was deleted meanwhile.
            let mut record = region.by_blocks(&id)?;
            if let Some(written) = &mut record.written {
                written.sealed = Some(ready.sealed.clone());
            }
            region.write(&SnapshotRecord { ready_at, ..record }, true)?;
            remove_if_there(&region.part::<SnapshotRecord>(&id.0, PARENT))
        };
        self.store().locked(complete).await.with_context(context)?;
        self.completed(snapshot).await.map(drop)
    }

    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()> {
        Region::ensure_no_snapshots(self, run).await
    }
}
