//! Block-level access to the snapshots of a region, as with EBS direct.
//!
//! When a snapshot is started, it gets a sparse file with its parent's data, and blocks are written to this file. The
//! file shares the parent's data if the file system supports that. Otherwise the data are copied, which may be slow.
//! Therefore a bake starts its snapshot in the background.

mod copies;
mod read;
mod write;

use crate::sys::tasks;
pub use copies::Copies;

use super::pending_snapshot::{PutBlocks, SnapshotState, boot_id, invalid};
use super::records::{Completion, PendingWrites};
use super::records::{
    LockedRegion, MAX_GIB, NEVER, PARENT, PUT, RegionStore, SnapshotRecord, created_after, remove_if_there,
};
use super::volumes::with_run_tag;
use super::{Region, new_id};
use crate::cloud::VolumeKind;
use crate::cloud::block_api::{BlockApi, NewSnapshot, ParentUse, SnapshotContents, SnapshotReader};
use crate::cloud::ec2_rules::{check_description, not_found_error};
use crate::ids::Digest;
use crate::ids::{RunId, SnapshotId};
use crate::sys::sparse_copy;
use crate::sys::tasks::CancelFlag;
use crate::sys::temp_file::TempFile;
use anyhow::{Context, Result};
use async_trait::async_trait;
use read::OpenSnapshot;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use write::{make_ready, put};

/// Checks that the snapshot can be the parent of a new snapshot of this size. Fails if it cannot.
fn ensure_parent(store: &RegionStore, id: &SnapshotId, size_gib: u64) -> Result<()> {
    let missing = || {
        let text = format!("The parent snapshot '{id}' does not exist.");
        not_found_error("ResourceNotFoundException: DEPENDENCY_RESOURCE_NOT_FOUND", text)
    };
    let parent: SnapshotRecord = store.find(&id.0)?.ok_or_else(missing)?;
    store.ensure_completed(&parent).map_err(|e| invalid("INVALID_DEPENDENCY_REQUEST", e))?;
    if size_gib < parent.size_gib {
        let text = format!("{size_gib} GiB are less than the {} GiB of the parent {id}", parent.size_gib);
        return Err(invalid("INVALID_VOLUME_SIZE", text));
    }
    Ok(())
}

/// Creates the files of a pending snapshot, and then its record. `copy` is a copy of the parent's data, if there is
/// one.
fn start(
    region: &LockedRegion,
    record: SnapshotRecord,
    written: PendingWrites,
    copy: Option<TempFile>,
) -> Result<()> {
    if let Some(parent) = &written.parent {
        // The parent may have been deleted during the copy.
        ensure_parent(region, parent, record.size_gib)?;
    }
    let (id, created) = (record.id.clone(), record.id.clone());
    let create = move || -> Result<()> {
        let data = region.data::<SnapshotRecord>(&id.0);
        let target = match copy {
            Some(copy) => {
                let target = copy.file().try_clone()?;
                copy.link(&data)?;
                target
            }
            None => File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&data)
                .with_context(|| format!("creating {}", data.display()))?,
        };
        PutBlocks::create(&region.part::<SnapshotRecord>(&id.0, PUT), record.size_gib)?;
        if let Some(parent) = &written.parent {
            let path = region.data::<SnapshotRecord>(&parent.0);
            let name = region.part::<SnapshotRecord>(&id.0, PARENT);
            // A hard link is as good as a copy, because the data of a snapshot never change.
            if std::fs::hard_link(&path, &name).is_err() {
                let source = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
                let dir = region.dir_of::<SnapshotRecord>();
                sparse_copy::copy(&source, record.size_gib << 30, &dir, &CancelFlag::default())?
                    .link(&name)?;
            }
        }
        target.set_len(record.size_gib << 30).context("setting the size of the snapshot")?;
        // The files need not be durable, because a pending snapshot fails after a power failure anyway.
        region.write(&SnapshotRecord { written: Some(written), ..record }, false)
    };
    create().inspect_err(|_| _ = region.remove::<SnapshotRecord>(&created.0))
}

impl Region {
    /// Returns the state of a snapshot as DescribeSnapshots shows it.
    pub fn snapshot_state(&self, id: &SnapshotId) -> Result<SnapshotState> {
        Ok(self.store().snapshot_state(&self.store().get(&id.0)?))
    }

    /// Returns the blocks that were put into a snapshot so far, and their digests. For a complete snapshot, these are
    /// the blocks that it was completed with. The result is empty if the snapshot was not written block by block.
    pub fn put_blocks(&self, id: &SnapshotId) -> Result<BTreeMap<u32, Digest>> {
        self.store().by_blocks(id)?;
        PutBlocks::open(self.store(), id)?.map_or_else(|| Ok(BTreeMap::new()), |put| put.digests())
    }
}

#[async_trait(?Send)]
impl BlockApi for Region {
    async fn contents(&self, snapshot: &SnapshotId) -> Result<SnapshotContents> {
        let (store, id) = (self.store().clone(), snapshot.clone());
        let read = tasks::run(move |stop| {
            let (whole, size_gib) = OpenSnapshot::open(&store, &id)?;
            Ok(SnapshotContents { size_gib, blocks: whole.contents(stop)? })
        });
        read.await.with_context(|| format!("listing the blocks of {snapshot}"))
    }

    async fn reader(&self, snapshot: &SnapshotId) -> Result<Arc<dyn SnapshotReader>> {
        Ok(Arc::new(OpenSnapshot::open(self.store(), snapshot)?.0))
    }

    /// All snapshots of a region have the same owner, and none is encrypted. So each snapshot can be a parent without
    /// being copied.
    async fn parent(&self, snapshot: &SnapshotId, _: &VolumeKind) -> Result<ParentUse> {
        let record = self.store().by_blocks(snapshot)?;
        self.store().ensure_completed(&record)?;
        Ok(ParentUse::UseAsParent)
    }

    /// Returns the snapshot itself, because it is in this account already.
    async fn copied(&self, snapshot: &SnapshotId, _: &VolumeKind, _: &dyn Fn()) -> Result<SnapshotId> {
        let record = self.store().by_blocks(snapshot)?;
        self.store().ensure_completed(&record)?;
        Ok(snapshot.clone())
    }

    async fn start(&self, spec: &NewSnapshot) -> Result<SnapshotId> {
        let reject = |text: &str| Err(invalid("INVALID_PARAMETER_VALUE", text));
        if spec.parent.is_some() && spec.encrypted {
            return reject("With a parent snapshot, Encrypted must not be specified.");
        }
        if spec.kms_key.is_some() && !spec.encrypted {
            return reject("A KMS key requires Encrypted.");
        }
        if spec.size_gib == 0 || spec.size_gib > MAX_GIB {
            let text = format!("the size is {} GiB; 1 to {MAX_GIB} GiB are allowed", spec.size_gib);
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
            tags: with_run_tag(&spec.tags, &spec.run)?,
            ready_at: NEVER,
            written: None,
        };
        let written = PendingWrites {
            parent: spec.parent.clone(),
            patience: self.0.patience.as_millis() as u64,
            boot: boot_id().to_owned(),
            sealed: None,
        };
        let copy = match &spec.parent {
            Some(parent) => {
                ensure_parent(self.store(), parent, spec.size_gib)?;
                let copied = self.0.copies.of(self.store(), parent).await;
                if copied.is_err() {
                    // The parent may have been deleted in the meantime.
                    ensure_parent(self.store(), parent, spec.size_gib)?;
                }
                Some(copied.with_context(|| format!("copying {parent}"))?)
            }
            None => None,
        };
        let start = move |region: &LockedRegion| start(region, record, written, copy);
        self.store().locked(start).await.context("starting a snapshot")?;
        Ok(id)
    }

    async fn put(&self, snapshot: &SnapshotId, index: u32, data: Arc<[u8]>, digest: Digest) -> Result<()> {
        let (store, id) = (self.store().clone(), snapshot.clone());
        let work = tasks::run(move |_| put(&store, &id, index, &data, &digest));
        work.await.with_context(|| format!("writing block {index} of {snapshot}"))
    }

    async fn complete(&self, snapshot: &SnapshotId, count: u32, checksum: Digest) -> Result<()> {
        let (store, id, sealed) = (self.store().clone(), snapshot.clone(), Completion { count, checksum });
        let ready = tasks::run(move |_| make_ready(&store, &id, sealed));
        let context = || format!("completing {snapshot}");
        let Some(ready) = ready.await.with_context(context)? else {
            return self.completed(snapshot).await.map(drop);
        };
        let (id, ready_at) = (snapshot.clone(), self.ready_at());
        let complete = move |region: &LockedRegion| {
            // Fails if the snapshot was deleted in the meantime.
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
