//! Direct disks (`disks = "direct"`). The base's blocks are read from its snapshot, and changed blocks are uploaded. No
//! volume is attached.

pub mod backing;
pub mod block_cache;
pub mod block_map;
pub mod changes;
pub mod fault;
pub mod fuse_fs;
pub mod overlay;
pub mod prefetch;
pub mod preserved_disk;
pub mod server;

use super::{Disk, DiskSpec, DiskStrategy, with_owner_tags};
use crate::cloud::block_api::{BlockApi, NewSnapshot, ParentUse, SnapshotContents};
use crate::cloud::{Base, tag};
use crate::device::Device;
use crate::error::Kind;
use crate::ids::BLOCK;
use crate::ids::{RunId, SnapshotId};
use crate::owner::Owner;
use crate::report::Report;
use crate::sys::loop_device;
use crate::transfer::download;
use crate::transfer::upload::{self, OnProgress};
use crate::undo;
use crate::undo::{Background, Debt, Due, Undo};
use anyhow::{Context, Result};
use async_trait::async_trait;
use backing::BackingStore;
use block_cache::BlockCache;
use block_map::TrimmingByte;
use changes::ChangedBlocks;
use fault::{FirstFault, disk_error};
use preserved_disk::{DiskRecord, PreservedDisk, WrittenFiles};
use server::DiskServer;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

/// The cache's directory in this machine's state directory.
const BLOCKS: &str = "blocks";
/// The price of one GiB of a snapshot for a month, in dollars. This price and the next one are EBS's list prices in
/// us-east-1 of November 2025. They are used only for a rough estimate.
const GIB_MONTH_PRICE: f64 = 0.05;
/// The price of writing 1000 blocks, in dollars.
const PUT_PRICE: f64 = 0.006;
/// The number of blocks in a GiB.
const BLOCKS_PER_GIB: u64 = (1 << 30) / BLOCK as u64;

/// Creates disks that this machine serves block by block.
pub struct DirectDisks<B: BlockApi> {
    blocks: Rc<B>,
    state: PathBuf,
    cache: BlockCache,
    helper: PathBuf,
    report: Report,
    /// For each run, whether and how the base's snapshot can be the parent of the new snapshot. `query_facts` adds an
    /// entry, and `checkout` removes it.
    parent_uses: RefCell<HashMap<RunId, ParentUse>>,
}

/// The base snapshot of a disk. Blocks that the bake did not write are read from this snapshot.
struct BaseSnapshot {
    contents: SnapshotContents,
    lower: Arc<BackingStore>,
}

impl<B: BlockApi + 'static> DirectDisks<B> {
    /// `state` is this machine's state directory, which has the cache and the written blocks. `helper` is the path of
    /// this program.
    pub fn new(blocks: Rc<B>, state: &Path, cache_gib: u64, helper: &Path, report: &Report) -> Self {
        let state = std::path::absolute(state).unwrap_or_else(|_| state.to_owned());
        let cache = BlockCache::new(&state.join(BLOCKS), cache_gib << 30);
        let parent_uses = RefCell::default();
        Self { blocks, state, cache, helper: helper.to_owned(), report: report.clone(), parent_uses }
    }

    async fn open_base(&self, snapshot: &SnapshotId) -> Result<BaseSnapshot> {
        let cached = self.cache.open_snapshot(snapshot)?;
        let contents = match cached.contents() {
            Some(contents) => contents,
            None => {
                let contents = self.blocks.contents(snapshot).await?;
                cached.store_contents(&contents)?;
                contents
            }
        };
        let reader = self.blocks.reader(snapshot).await?;
        let lower = Arc::new(BackingStore::new(snapshot, &contents, reader, cached));
        Ok(BaseSnapshot { contents, lower })
    }

    async fn query_parent(&self, base: &Base, spec: &DiskSpec) -> Result<ParentUse> {
        let parent = self.blocks.parent(&base.snapshot, &spec.kind).await;
        parent.with_context(|| format!("checking whether {} can be a parent", base.snapshot))
    }

    /// Returns the snapshot from which unwritten blocks are read, and whether this snapshot will be the parent of the
    /// new one. If only a copy of the base's snapshot can be a parent, makes and returns the copy. Before a copy or a
    /// full upload, reports its cost.
    async fn parent(&self, base: &Base, spec: &DiskSpec, run: &RunId) -> Result<(SnapshotId, bool)> {
        let snapshot = &base.snapshot;
        let looked_up = self.parent_uses.borrow_mut().remove(run);
        let parent = match looked_up {
            Some(parent) => parent,
            None => self.query_parent(base, spec).await?,
        };
        match parent {
            ParentUse::UseAsParent => Ok((snapshot.clone(), true)),
            ParentUse::CopyFirst { why } => {
                let dollars = base.size_gib as f64 * GIB_MONTH_PRICE;
                let tell = || {
                    self.report.note(format!(
                        "copying {snapshot} into this account, because {why}. This is done once and takes minutes. The \
                         copy has {} GiB and costs at most about ${dollars:.2} a month until you delete it",
                        base.size_gib
                    ));
                };
                Ok((self.blocks.copied(snapshot, &spec.kind, &tell).await?, true))
            }
            ParentUse::FullUpload { why } => {
                let blocks = base.size_gib * BLOCKS_PER_GIB;
                let dollars = base.size_gib as f64 * GIB_MONTH_PRICE;
                self.report.note(format!(
                    "the new snapshot cannot be a child of {snapshot}, because {why}. oven uploads the whole disk: at \
                     most {} GiB in {blocks} blocks, which costs about ${:.2}. The snapshot costs at most about \
                     ${dollars:.2} a month",
                    base.size_gib,
                    blocks as f64 / 1000.0 * PUT_PRICE
                ));
                Ok((snapshot.clone(), false))
            }
        }
    }

    /// Serves a disk that consists of the base snapshot and the written blocks.
    fn disk(
        &self,
        run: &RunId,
        base_snapshot: BaseSnapshot,
        files: Files,
        record: DiskRecord,
    ) -> Result<DirectDisk<B>> {
        let BaseSnapshot { lower, .. } = base_snapshot;
        let (name, place) = (format!("oven-{run}"), preserved_disk::preserved_dir(&self.state));
        let spec = server::DiskServerSpec {
            helper: &self.helper,
            name: &name,
            upper: files.upper(),
            marks: files.marks(),
            place: &place,
        };
        let server = DiskServer::start(&spec, &lower)?;
        let device = loop_device::attach(&server.file, &name).context("attaching the disk")?;
        let marks = files.marks().try_clone().context("duplicating a descriptor")?;
        let device = Device { trimming: Some(TrimmingByte::of(marks)), ..device };
        Ok(DirectDisk {
            device: Some(device),
            server: Some(server),
            lower,
            files,
            record,
            run: run.clone(),
            blocks: self.blocks.clone(),
            cache: self.cache.clone(),
            report: self.report.clone(),
            verify: false,
            started: None,
        })
    }

    /// Returns the clean-up action for the written files. The action deletes or preserves these files.
    fn disk_debt(&self, run: &RunId, record: &DiskRecord, slot: &WrittenSlot) -> Debt {
        let (kept_state, kept_run, pay_slot) = (self.state.clone(), run.clone(), slot.clone());
        let (keep_slot, record) = (slot.clone(), record.clone());
        let (state, run) = (self.state.clone(), run.clone());
        Debt {
            due: Due::Scratch,
            what: format!("the disk of run {run}"),
            command: undo::sweep_command(&run),
            pay: Box::new(move || {
                drop(pay_slot.take());
                Box::pin(async move { preserved_disk::remove(&state, &run) })
            }),
            keep: Some(Box::new(move || {
                Box::pin(async move {
                    let written = keep_slot.take().and_then(Rc::into_inner);
                    let written = written.context("the disk is still in use or was already removed")?;
                    written.keep(&kept_state, &kept_run, &record)
                })
            })),
        }
    }
}

/// The written files. The disk shares them with the clean-up action, because that action may preserve them after the
/// disk is dropped.
type WrittenSlot = Rc<RefCell<Option<Rc<WrittenFiles>>>>;

/// The written files of a new disk, or of a disk that an earlier bake preserved.
enum Files {
    New(Rc<WrittenFiles>),
    Kept(PreservedDisk),
}

impl Files {
    fn upper(&self) -> &File {
        match self {
            Self::New(written) => written.upper(),
            Self::Kept(kept) => &kept.upper,
        }
    }

    fn marks(&self) -> &File {
        match self {
            Self::New(written) => written.marks(),
            Self::Kept(kept) => &kept.marks,
        }
    }
}

struct DirectDisk<B: BlockApi> {
    // This field is dropped before `server`. When the device is closed, the kernel writes cached data to the disk. The
    // server must still run at that time.
    device: Option<Device>,
    server: Option<DiskServer>,
    lower: Arc<BackingStore>,
    files: Files,
    record: DiskRecord,
    run: RunId,
    blocks: Rc<B>,
    cache: BlockCache,
    report: Report,
    /// Whether the uploaded blocks are read back and compared.
    verify: bool,
    /// The new snapshot, if it was started at the checkout.
    started: Option<Started>,
}

/// A snapshot that is being started in the background.
type Started = Background<SnapshotId>;

/// Describes the snapshot to create from a disk.
fn new_snapshot(record: &DiskRecord, run: &RunId) -> NewSnapshot {
    let DiskRecord { snapshot, child, size_gib, tags, encrypted, kms_key, .. } = record;
    NewSnapshot {
        parent: child.then(|| snapshot.clone()),
        size_gib: *size_gib,
        description: format!("oven run {run}"),
        run: run.clone(),
        tags: tags.clone(),
        // A child snapshot has the encryption of its parent, so no encryption is requested for the child.
        encrypted: *encrypted && !child,
        kms_key: kms_key.clone().filter(|_| *encrypted && !child),
    }
}

/// Starts a snapshot in the background, and registers a clean-up action for it.
fn start<B: BlockApi + 'static>(blocks: &Rc<B>, spec: NewSnapshot, undo: &Undo) -> Started {
    undo.owe(upload::snapshot_debt(blocks.clone(), &spec.run));
    let blocks = blocks.clone();
    undo.run_in_background(async move { blocks.start(&spec).await })
}

impl<B: BlockApi> Drop for DirectDisk<B> {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            // This makes the kernel write its cached data to the disk, because the disk may be preserved. An error is
            // ignored, because the process that serves the disk reports failed writes itself (see [`DiskServer`]).
            _ = File::from(device.node).sync_all();
        }
        self.server = None;
        self.lower.stop_prefetching();
    }
}

#[async_trait(?Send)]
impl<B: BlockApi + 'static> DiskStrategy for DirectDisks<B> {
    async fn query_facts(&self, base: &Base, spec: &DiskSpec, run: &RunId) -> Result<()> {
        let parent = self.query_parent(base, spec).await?;
        self.parent_uses.borrow_mut().insert(run.clone(), parent);
        Ok(())
    }

    async fn checkout(
        &self,
        base: &Base,
        spec: &DiskSpec,
        run: &RunId,
        undo: &Undo,
    ) -> Result<Box<dyn Disk>> {
        let size_gib = spec.size_gib_on(base)?;
        let (snapshot, child) = self.parent(base, spec, run).await?;
        let base_snapshot = self.open_base(&snapshot).await?;
        let (kind, trouble) = (&spec.kind, base_snapshot.lower.trouble().clone());
        let record = DiskRecord {
            snapshot,
            child,
            size_gib,
            owner: Owner::this().to_string(),
            tags: with_owner_tags(&spec.tags, run),
            encrypted: kind.encrypted == Some(true),
            kms_key: kind.kms_key.clone(),
        };
        let written = Rc::new(self.create_files(size_gib, &base_snapshot.contents)?);
        let slot: WrittenSlot = Rc::new(RefCell::new(Some(written.clone())));
        undo.owe(self.disk_debt(run, &record, &slot));
        undo.explain(move || trouble.take());
        let lower = base_snapshot.lower.clone();
        undo.on_stop(move || lower.stop());
        // Starting a snapshot takes time, so the snapshot is started in the background.
        let started = spec.will_commit.then(|| start(&self.blocks, new_snapshot(&record, run), undo));
        let family = spec.tags.get(tag::NAME).map(String::as_str).unwrap_or_default();
        prefetch::start_prefetching(&base_snapshot.lower, base_snapshot.lower.cached().used(family));
        let mut disk = self.disk(run, base_snapshot, Files::New(written), record)?;
        disk.verify = spec.verify;
        disk.started = started;
        Ok(Box::new(disk))
    }

    async fn reopen(&self, run: &RunId) -> Result<Box<dyn Disk>> {
        let kept = preserved_disk::open(&self.state, run)?.ok_or_else(|| {
            let text = format!("run {run} has no preserved disk");
            Kind::NotFound.failure(text).hint("With --keep-on-failure, a bake that fails preserves its disk.")
        })?;
        let base_snapshot = self.open_base(&kept.record.snapshot).await?;
        let record = kept.record.clone();
        Ok(Box::new(self.disk(run, base_snapshot, Files::Kept(kept), record)?))
    }

    async fn forget(&self, run: &RunId) -> Result<()> {
        // The snapshots are removed even if the disk cannot be removed.
        let (disk, snapshots) =
            (preserved_disk::remove(&self.state, run), self.blocks.ensure_no_snapshots(run).await);
        disk.and(snapshots).with_context(|| format!("removing the leftovers of run {run}"))
    }
}

impl<B: BlockApi + 'static> DirectDisks<B> {
    fn create_files(&self, size_gib: u64, base: &SnapshotContents) -> Result<WrittenFiles> {
        let doing = || format!("creating a disk in {}", self.state.display());
        let blocks = size_gib.checked_mul(BLOCKS_PER_GIB).and_then(|blocks| u32::try_from(blocks).ok());
        let too_large =
            || Kind::Definition.error(format!("a disk of {size_gib} GiB is larger than EBS allows"));
        let blocks = blocks.ok_or_else(too_large)?;
        let written = WrittenFiles::new(&self.state).with_context(doing)?;
        written.upper().set_len(size_gib << 30).map_err(|error| disk_error(error, &doing()))?;
        block_map::create(written.marks(), blocks, base).with_context(doing)?;
        Ok(written)
    }
}

/// If the disk had a fault, returns the first fault as the error, because it is the cause of later errors. Otherwise
/// returns `result`.
fn explain<T>(result: Result<T>, trouble: &FirstFault) -> Result<T> {
    match (trouble.take(), result) {
        (None, result) => result,
        (Some(cause), Ok(_)) => Err(cause.context("the disk failed while it was in use")),
        (Some(cause), Err(error)) => Err(cause.context(format!("{error:#}"))),
    }
}

#[async_trait(?Send)]
impl<B: BlockApi + 'static> Disk for DirectDisk<B> {
    fn device(&self) -> &Device {
        // The device exists until the disk is committed or dropped.
        self.device.as_ref().expect("a disk in use has a device")
    }

    async fn commit(mut self: Box<Self>, undo: &Undo, on_progress: OnProgress<'_>) -> Result<SnapshotId> {
        let device = self.device.take().context("a disk can be committed only once")?;
        let path = device.path.clone();
        // The kernel reports some write errors only at a sync. A disk with such an error must not become an image.
        let node = File::from(device.node.try_clone().context("duplicating a descriptor")?);
        let synced = crate::sys::tasks::run(move |_| Ok(node.sync_all()?)).await;
        let synced = synced.with_context(|| format!("syncing {}", path.display()));
        drop(device);
        // This ends the server. After that, nobody can write to the disk, even through a device that is still open.
        self.server = None;
        explain(synced, self.lower.trouble())?;
        if let Some(family) = self.record.tags.get(tag::NAME) {
            // If the list cannot be stored, the next bake is slower, but correct.
            _ = self.lower.cached().store_used(family, &self.lower.used());
        }
        let written = block_map::written_blocks(self.files.marks())?;
        let written_count = written.len();
        let upper = self.files.upper().try_clone().context("duplicating a descriptor")?;
        let changes = ChangedBlocks::new(self.lower.clone(), upper, written, self.record.child);
        let spec = new_snapshot(&self.record, &self.run);
        let started = self.started.take().unwrap_or_else(|| start(&self.blocks, spec.clone(), undo));
        let sent =
            upload::upload_started(&*self.blocks, &spec, started, Arc::new(changes), on_progress).await?;
        let mib = sent.blocks.len() as f64 * BLOCK as f64 / f64::from(1 << 20);
        self.report
            .detail(format!("uploaded {} of {written_count} written blocks ({mib} MiB)", sent.blocks.len()));
        if self.verify {
            let step = self.report.step("verify", format!("verifying {}", sent.snapshot));
            let (blocks, parent) = (&*self.blocks, spec.parent.as_ref());
            let on_progress = |done, all| step.progress(done, Some(all));
            download::verify_with_progress(blocks, &sent.snapshot, &sent.blocks, parent, &on_progress)
                .await?;
            step.done();
        }
        // The bake may have made the cache exceed its limit. In that case, snapshots that are not in use are evicted.
        _ = self.cache.trim();
        Ok(sent.snapshot)
    }
}
