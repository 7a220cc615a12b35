//! The volumes of a region: sparse files that are attached as loop devices.

use super::records::{MAX_GIB, RegionStore, SnapshotRecord, VolumeRecord, created_after, now, sync_dir};
use super::{PENDING_POLL, Region};
use crate::cloud::ec2_rules::{check_tags, ec2_error, new_id};
use crate::cloud::{Tags, VolumeSpec, Volumes, tag};
use crate::device::Device;
use crate::ids::{RunId, SnapshotId, VolumeId};
use crate::sys::lock::try_lock_until_closed;
use crate::sys::poll::{PollAnswer, PollPolicy, poll_until};
use crate::sys::state_files;
use crate::sys::tasks;
use crate::sys::temp_file;
use crate::sys::{loop_device, sparse_copy};
use anyhow::{Context, Result};
use async_trait::async_trait;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// How long to wait for the lock of a volume's file. A loop device closes its file when the last descriptor of the
/// device is closed, and another program that probes the device may have a descriptor open for some milliseconds.
const BUSY_WAIT: PollPolicy = PollPolicy::local(Duration::from_secs(1)).of_region();
/// How long to wait until a volume that is to be deleted is detached. The wait is needed because a mount namespace ends
/// some time after its processes, and because a loop device first writes its remaining data. The limit is shorter than
/// the time within which oven has to end after Ctrl-C.
const RELEASE_WAIT: PollPolicy = PollPolicy::local(Duration::from_secs(5)).of_region();

/// Locks a volume's file. While the file is locked, the volume cannot be attached. Returns `None` if the volume is
/// attached.
fn lock(store: &RegionStore, id: &VolumeId) -> Result<Option<File>> {
    let path = store.data::<VolumeRecord>(&id.0);
    let file = match state_files::open_file(&path, OFlags::RDWR) {
        Ok(file) => file,
        Err(e) => return Err(e).with_context(|| format!("opening {}", path.display())),
    };
    let locked = try_lock_until_closed(&file).with_context(|| format!("locking {}", path.display()))?;
    Ok(locked.then_some(file))
}

fn in_use_error(store: &RegionStore, id: &VolumeId) -> anyhow::Error {
    let holder = loop_device::device_of(&store.data::<VolumeRecord>(&id.0));
    let holder = holder.map_or_else(|| "another process".to_owned(), |name| format!("/dev/{name}"));
    ec2_error("VolumeInUse", format!("{id} is currently attached to {holder}"))
}

/// Deletes a volume. Returns false if it is attached.
fn delete_if_detached(region: &super::LockedRegion, id: &VolumeId) -> Result<bool> {
    let gone = !region.data::<VolumeRecord>(&id.0).exists();
    // The file remains locked until the volume is removed, so that nobody attaches the volume meanwhile.
    let file = if gone { None } else { lock(region, id)? };
    if !gone && file.is_none() {
        return Ok(false);
    }
    region.remove::<VolumeRecord>(&id.0)?;
    Ok(true)
}

impl Region {
    /// Deletes a volume. Fails if it is attached.
    pub async fn delete_volume(&self, id: &VolumeId) -> Result<()> {
        let wanted = id.clone();
        let delete = move |region: &super::LockedRegion| {
            region.get::<VolumeRecord>(&wanted.0)?;
            delete_if_detached(region, &wanted)
        };
        if self.store().locked(delete).await? { Ok(()) } else { Err(in_use_error(self.store(), id)) }
    }

    /// Opens and locks the data of a volume. The volume counts as attached as long as the file is open.
    pub async fn hold(&self, volume: &VolumeId) -> Result<File> {
        self.wait_until_available(volume).await?;
        let Some(file) = self.lock_when_free(volume).await? else {
            return Err(in_use_error(self.store(), volume));
        };
        if file.metadata()?.nlink() == 0 {
            // The volume was deleted before its file was locked. So `get` fails with the right error.
            self.store().get::<VolumeRecord>(&volume.0)?;
        }
        self.own_file(volume, file).await
    }

    /// Locks a volume's file, if it is free or becomes free soon.
    pub(crate) async fn lock_when_free(&self, id: &VolumeId) -> Result<Option<File>> {
        let start = tokio::time::Instant::now();
        poll_until(&format!("the volume {id}"), &BUSY_WAIT, async || match lock(self.store(), id)? {
            None if start.elapsed() < BUSY_WAIT.deadline => Ok(PollAnswer::NotYet("attached".to_owned())),
            file => Ok(PollAnswer::Ready(file)),
        })
        .await
    }

    /// Takes a snapshot of the current content of a volume. `free` is the volume's locked file; `None` if the volume is
    /// attached.
    async fn snapshot_of(
        &self,
        VolumeRecord { id: volume, size_gib, .. }: VolumeRecord,
        run: &RunId,
        tags: &Tags,
        free: Option<File>,
    ) -> Result<SnapshotId> {
        let tags = with_run_tag(tags, run)?;
        let path = self.store().data::<VolumeRecord>(&volume.0);
        let id = SnapshotId(new_id("snap"));
        let target = self.store().data::<SnapshotRecord>(&id.0);
        let record = SnapshotRecord {
            id: id.clone(),
            size_gib,
            volume: Some(volume.clone()),
            created: created_after::<SnapshotRecord>(&[]),
            description: String::new(),
            tags,
            ready_at: self.ready_at(),
            written: None,
        };
        let dir = self.store().dir_of::<SnapshotRecord>();
        // If nobody writes to the volume, the snapshot shares the volume's file, and nothing is copied. The volume gets
        // a separate file when it is attached again (`own_file`). Most volumes are never attached again.
        let data = tasks::run(move |stop| {
            let open = || File::open(&path).with_context(|| format!("opening {}", path.display()));
            let data = match free {
                // Linking fails on a file system without hard links.
                Some(file) => match temp_file::TempFile::linked(file, &path, &dir) {
                    Ok(shared) => shared,
                    Err(_) => sparse_copy::copy(&open()?, size_gib << 30, &dir, stop)?,
                },
                None => sparse_copy::copy(&open()?, size_gib << 30, &dir, stop)?,
            };
            data.file().sync_data().context("writing the snapshot to the disk")?;
            Ok(data)
        })
        .await?;
        let commit = move |region: &super::LockedRegion| {
            // Fails if the volume was deleted in the meantime.
            region.get::<VolumeRecord>(record.volume.as_ref().map_or("", |v| &v.0))?;
            data.link(&target)?;
            sync_dir(&region.dir_of::<SnapshotRecord>())?;
            region.write(&record, true)
        };
        self.store().locked(commit).await.with_context(|| format!("taking the snapshot of {volume}"))?;
        self.completed(&id).await
    }

    /// Takes a snapshot of a volume that may be attached. Does not wait until it is detached.
    pub async fn snapshot_attached(&self, volume: &VolumeId, run: &RunId, tags: &Tags) -> Result<SnapshotId> {
        let record = self.wait_until_available(volume).await?;
        let free = lock(self.store(), volume)?;
        self.snapshot_of(record, run, tags, free).await
    }

    /// If a snapshot shares the volume's file, replaces the volume's file by a copy, because nobody may write to a
    /// snapshot's file. Returns the volume's file, which is locked.
    pub(crate) async fn own_file(&self, id: &VolumeId, file: File) -> Result<File> {
        let metadata = file.metadata()?;
        if metadata.nlink() < 2 {
            return Ok(file);
        }
        let (dir, path) = (self.store().dir_of::<VolumeRecord>(), self.store().data::<VolumeRecord>(&id.0));
        let source = file.try_clone()?;
        let copied = tasks::run(move |stop| sparse_copy::copy(&source, metadata.len(), &dir, stop)).await?;
        // The old file remains locked until the new one is locked, so that nobody attaches the volume in between.
        let own = copied.file().try_clone()?;
        if !try_lock_until_closed(&own).context("locking a copy")? {
            return Err(Errno::WOULDBLOCK).context("locking a copy");
        }
        self.store().locked(move |_| copied.replace(&path)).await?;
        Ok(own)
    }

    pub(crate) async fn completed(&self, id: &SnapshotId) -> Result<SnapshotId> {
        poll_until(&format!("the snapshot {id}"), &PENDING_POLL, async || {
            let pending = now() < self.store().get::<SnapshotRecord>(&id.0)?.ready_at;
            Ok(if pending { PollAnswer::NotYet("pending".to_owned()) } else { PollAnswer::Ready(id.clone()) })
        })
        .await
    }

    async fn wait_until_available(&self, id: &VolumeId) -> Result<VolumeRecord> {
        poll_until(&format!("the volume {id}"), &PENDING_POLL, async || {
            let volume: VolumeRecord = self.store().get(&id.0)?;
            Ok(if now() < volume.ready_at {
                PollAnswer::NotYet("creating".to_owned())
            } else {
                PollAnswer::Ready(volume)
            })
        })
        .await
    }
}

pub(crate) fn with_run_tag(tags: &Tags, run: &RunId) -> Result<Tags> {
    let mut tags = tags.clone();
    tags.insert(tag::RUN.to_owned(), run.0.clone());
    check_tags(&tags)?;
    Ok(tags)
}

#[async_trait(?Send)]
impl Volumes for Region {
    fn directory(&self) -> Option<&Path> {
        Some(self.dir())
    }

    async fn create(&self, spec: &VolumeSpec) -> Result<VolumeId> {
        let tags = with_run_tag(&spec.tags, &spec.run)?;
        let snapshot: SnapshotRecord = self.store().get(&spec.snapshot.0)?;
        self.store().ensure_completed(&snapshot)?;
        if spec.size_gib < snapshot.size_gib || spec.size_gib > MAX_GIB {
            let text = format!(
                "the size of the volume is {} GiB; it must be at least that of {} ({} GiB) and at most {MAX_GIB} GiB",
                spec.size_gib, snapshot.id, snapshot.size_gib
            );
            return Err(ec2_error("InvalidParameterValue", text));
        }
        let path = self.store().data::<SnapshotRecord>(&snapshot.id.0);
        let source = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let (dir, size) = (self.store().dir_of::<VolumeRecord>(), spec.size_gib << 30);
        let data = tasks::run(move |stop| sparse_copy::copy(&source, size, &dir, stop)).await?;
        let record = VolumeRecord {
            id: VolumeId(new_id("vol")),
            snapshot: snapshot.id,
            size_gib: spec.size_gib,
            created: created_after::<VolumeRecord>(&[]),
            tags,
            ready_at: self.ready_at(),
        };
        let id = record.id.clone();
        let create = move |region: &super::LockedRegion| {
            data.link(&region.data::<VolumeRecord>(&record.id.0))?;
            // The volume need not survive a power failure, because it is only used during the bake.
            region.write(&record, false)
        };
        self.store().locked(create).await?;
        self.wait_until_available(&id).await?;
        Ok(id)
    }

    async fn attach(&self, volume: &VolumeId) -> Result<Device> {
        let file = self.hold(volume).await?;
        // The loop device takes over this open file and its lock. So the volume is attached exactly as long as the
        // device has the file open, even if a process is killed.
        loop_device::attach(&file, &volume.0).with_context(|| format!("attaching {volume}"))
    }

    async fn snapshot(&self, volume: &VolumeId, run: &RunId, tags: &Tags) -> Result<SnapshotId> {
        let record = self.wait_until_available(volume).await?;
        let free = self.lock_when_free(volume).await?;
        self.snapshot_of(record, run, tags, free).await
    }

    async fn keep(&self, run: &RunId) -> Result<Vec<VolumeId>> {
        let run = run.clone();
        let keep = move |region: &super::LockedRegion| {
            let mut ids = Vec::new();
            for mut volume in region.tagged::<VolumeRecord>(tag::RUN, &run.0)? {
                volume.tags.insert(tag::KEPT.to_owned(), "true".to_owned());
                check_tags(&volume.tags)?;
                region.write(&volume, true)?;
                ids.push(volume.id);
            }
            Ok(ids)
        };
        self.store().locked(keep).await
    }

    async fn kept(&self, run: &RunId) -> Result<Option<VolumeId>> {
        let volumes = self.store().tagged::<VolumeRecord>(tag::RUN, &run.0)?;
        Ok(volumes.into_iter().rfind(|volume| volume.tags.contains_key(tag::KEPT)).map(|volume| volume.id))
    }

    async fn ensure_no_volumes(&self, run: &RunId) -> Result<()> {
        let mut first = None;
        // The region's lock is taken even if no volume is visible yet, because another task that holds the lock may be
        // creating one.
        let run = run.clone();
        let list = move |region: &super::LockedRegion| region.tagged::<VolumeRecord>(tag::RUN, &run.0);
        for volume in self.store().locked(list).await? {
            let id = volume.id;
            let deleted = poll_until(&format!("the volume {id}"), &RELEASE_WAIT, async || {
                let wanted = id.clone();
                let deleted = self.store().locked(move |region| delete_if_detached(region, &wanted)).await?;
                Ok(if deleted { PollAnswer::Ready(()) } else { PollAnswer::NotYet("attached".to_owned()) })
            })
            .await;
            if let Err(error) = deleted {
                let error = if lock(self.store(), &id).is_ok_and(|file| file.is_none()) {
                    in_use_error(self.store(), &id).context(format!("deleting {id}"))
                } else {
                    error
                };
                first.get_or_insert(error);
            }
        }
        first.map_or(Ok(()), Err)
    }

    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()> {
        Region::ensure_no_snapshots(self, run).await
    }
}
