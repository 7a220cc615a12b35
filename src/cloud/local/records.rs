//! The files of a region: a small JSON record for each resource, its data next to it, and one lock for all changes.

use super::private_dir;
use crate::cloud::ec2_rules::{is_id, not_found_error};
use crate::cloud::{ImageState, Tags};
use crate::error::Kind;
use crate::ids::{Architecture, Digest, ImageId, SnapshotId, VolumeId};
use crate::sys::poll::{PollAnswer, PollPolicy, poll_until};
use crate::sys::tasks;
use crate::sys::temp_file;
use anyhow::{Context, Result};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What the record of such a snapshot contains.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PendingWrites {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// Milliseconds without a block after which the snapshot has failed.
    pub patience: u64,
    pub boot: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<Completion>,
}

/// The values that the snapshot was completed with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Completion {
    pub count: u32,
    pub checksum: Digest,
}

/// Raised when records change so that an older oven would misread them.
const FORMAT: u32 = 1;
/// Sections under the lock take milliseconds; a wait of a minute means that a process was stopped within one.
const LOCK_WAIT: PollPolicy = PollPolicy::local(Duration::from_secs(60));

/// A resource that has a record.
pub trait RegionRecord: Serialize + DeserializeOwned + Send + 'static {
    /// Its directory in the region.
    const DIR: &'static str;
    /// The prefix of its ids.
    const PREFIX: &'static str;
    /// EC2's error code for an unknown id, without `.NotFound`.
    const INVALID: &'static str;
    fn id(&self) -> &str;
    fn tags(&self) -> &Tags;
    fn created(&self) -> &str;
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageRecord {
    pub id: ImageId,
    pub name: String,
    pub architecture: Architecture,
    pub snapshot: SnapshotId,
    pub size_gib: u64,
    pub root_device: String,
    pub created: String,
    #[serde(default)]
    pub description: String,
    pub tags: Tags,
    /// Milliseconds since 1970. The image is pending until then, also if the process that registered it has ended.
    pub ready_at: u64,
    /// The reason for a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Set by an import.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ImportSource>,
}

/// The raw disk that an image was imported from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportSource {
    /// [`crate::sys::sparse_copy::digest`] of the content.
    pub digest: String,
    /// The file's metadata: as long as they are the same, its content is the same.
    pub stamp: Option<FileStamp>,
}

/// The metadata of a file that change with its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    pub device: u64,
    pub inode: u64,
    pub length: u64,
    /// Nanoseconds since 1970.
    pub modified: i128,
    pub changed: i128,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotRecord {
    pub id: SnapshotId,
    pub size_gib: u64,
    /// `None` for an import.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeId>,
    pub created: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    pub tags: Tags,
    /// [`NEVER`] until its blocks are complete: an oven that does not know `written` also treats it as pending.
    pub ready_at: u64,
    /// Set if the snapshot is written by its blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<PendingWrites>,
}

/// Later than any time.
pub const NEVER: u64 = u64::MAX;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumeRecord {
    pub id: VolumeId,
    pub snapshot: SnapshotId,
    pub size_gib: u64,
    pub created: String,
    pub tags: Tags,
    pub ready_at: u64,
}

macro_rules! record {
    ($record:ty, $dir:literal, $prefix:literal, $invalid:literal) => {
        impl RegionRecord for $record {
            const DIR: &'static str = $dir;
            const PREFIX: &'static str = $prefix;
            const INVALID: &'static str = $invalid;
            fn id(&self) -> &str {
                &self.id.0
            }
            fn tags(&self) -> &Tags {
                &self.tags
            }
            fn created(&self) -> &str {
                &self.created
            }
        }
    };
}
record!(ImageRecord, "images", "ami", "InvalidAMIID");
record!(SnapshotRecord, "snapshots", "snap", "InvalidSnapshot");
record!(VolumeRecord, "volumes", "vol", "InvalidVolume");

/// The extension of a disk's data.
const IMG: &str = "img";
/// Lists which blocks of a snapshot were put ([`PendingWrites`]).
pub const PUT: &str = "put";
/// A hard link to the parent's data until a snapshot is complete, because the parent may be deleted.
pub const PARENT: &str = "parent";
/// The extensions of a resource's files besides its record.
const EXTENSIONS: [&str; 3] = [IMG, PUT, PARENT];
/// The documents of images.
const DOCUMENTS: &str = "documents";
/// Directories that runs write to in addition to the region's own: created with the rest, so that they are private,
/// too.
const LOGS: &str = "logs";
const LOCKS: &str = "locks";

/// A region's directory, for reading. Changes need [`LockedRegion`].
#[derive(Debug, Clone)]
pub struct RegionStore {
    dir: Arc<Path>,
}

/// A region under its lock.
pub struct LockedRegion {
    store: RegionStore,
    _lock: File,
}
impl Deref for LockedRegion {
    type Target = RegionStore;
    fn deref(&self) -> &RegionStore {
        &self.store
    }
}

/// Returns what the user can do about a region that cannot be opened.
fn region_hint(dir: &Path, kind: ErrorKind) -> String {
    let is_file = |path: &&Path| fs::metadata(path).is_ok_and(|found| !found.is_dir());
    match dir.ancestors().find(is_file) {
        Some(file) => format!("{} is a file, not a directory; pass another --region-dir.", file.display()),
        None if kind == ErrorKind::StorageFull => {
            "Free some space on that disk, or pass another --region-dir.".to_owned()
        }
        None => "Run oven as root, or pass a --region-dir that you can write to.".to_owned(),
    }
}

impl RegionStore {
    /// Opens a region, or creates one.
    pub fn open(dir: &Path) -> Result<Self> {
        let make = || -> Result<Self> {
            private_dir::create_region_dir(dir)?;
            let store = Self { dir: fs::canonicalize(dir)?.into() };
            for part in [ImageRecord::DIR, SnapshotRecord::DIR, VolumeRecord::DIR, DOCUMENTS, LOGS, LOCKS] {
                private_dir::create_subdirectory(&store.dir.join(part))?;
            }
            store.check_format()?;
            Ok(store)
        };
        make().with_context(|| format!("opening the local region {}", dir.display())).map_err(|error| {
            let io = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            use ErrorKind::{
                AlreadyExists, NotADirectory, PermissionDenied, ReadOnlyFilesystem, StorageFull,
            };
            if let Some(
                kind @ (PermissionDenied | ReadOnlyFilesystem | NotADirectory | AlreadyExists | StorageFull),
            ) = io
            {
                let hint = region_hint(dir, kind);
                return Kind::Machine.failure(format!("{error:#}")).hint(hint).into();
            }
            error
        })
    }

    fn check_format(&self) -> Result<()> {
        #[derive(Serialize, Deserialize)]
        struct Format {
            format: u32,
        }
        let path = self.dir.join("region.json");
        let Some(text) = read_if_exists(&path)? else {
            // Two processes that start at once write the same.
            return temp_file::write_atomically(
                &path,
                &serde_json::to_vec(&Format { format: FORMAT })?,
                false,
            );
        };
        let found: Format =
            serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?;
        if found.format > FORMAT {
            let text = format!(
                "the region {} has the format {}, which a newer oven made",
                self.dir.display(),
                found.format
            );
            return Err(Kind::Machine
                .failure(text)
                .hint("Use a newer oven, or another --region-dir.")
                .into());
        }
        Ok(())
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory for resources of a kind.
    pub fn dir_of<R: RegionRecord>(&self) -> PathBuf {
        self.dir.join(R::DIR)
    }

    /// The path of a resource's data.
    pub fn data<R: RegionRecord>(&self, id: &str) -> PathBuf {
        self.part::<R>(id, IMG)
    }

    /// The path of a file of a resource, by its extension.
    pub fn part<R: RegionRecord>(&self, id: &str, ending: &str) -> PathBuf {
        self.dir_of::<R>().join(format!("{id}.{ending}"))
    }

    fn record<R: RegionRecord>(&self, id: &str) -> PathBuf {
        self.dir_of::<R>().join(format!("{id}.json"))
    }

    fn documents_of(&self, id: &ImageId) -> PathBuf {
        self.dir.join(DOCUMENTS).join(format!("{id}.json"))
    }

    /// A record, if there is one.
    pub fn find<R: RegionRecord>(&self, id: &str) -> Result<Option<R>> {
        // Ids come from users, and become paths here.
        if !is_id(R::PREFIX, id) {
            return Err(not_found_error(&format!("{}.Malformed", R::INVALID), format!("Invalid id: {id:?}")));
        }
        let path = self.record::<R>(id);
        let Some(text) = read_if_exists(&path)? else { return Ok(None) };
        let record = serde_json::from_slice(&text).map_err(|error| {
            let hint = "Another program changed this file. If you delete it, the resource that it describes is lost.";
            Kind::Cloud.failure(format!("{} is not a valid record: {error}", path.display())).hint(hint)
        })?;
        Ok(Some(record))
    }

    /// A record; fails if it does not exist.
    pub fn get<R: RegionRecord>(&self, id: &str) -> Result<R> {
        self.find(id)?.ok_or_else(|| {
            let text = format!("'{id}' does not exist in the local region {}", self.dir.display());
            not_found_error(&format!("{}.NotFound", R::INVALID), text)
        })
    }

    /// All resources of a kind, oldest first.
    pub fn list<R: RegionRecord>(&self) -> Result<Vec<R>> {
        let dir = self.dir_of::<R>();
        let mut records = Vec::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("listing {}", dir.display()))? {
            let name = entry.with_context(|| format!("listing {}", dir.display()))?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".json")) else { continue };
            if is_id(R::PREFIX, id) {
                // A record may have been removed since the directory was read.
                records.extend(self.find::<R>(id)?);
            }
        }
        records.sort_by(|a, b| (a.created(), a.id()).cmp(&(b.created(), b.id())));
        Ok(records)
    }

    /// Resources of a kind that have a tag with this value, oldest first.
    pub fn tagged<R: RegionRecord>(&self, key: &str, value: &str) -> Result<Vec<R>> {
        let mut records = self.list::<R>()?;
        records.retain(|r| r.tags().get(key).is_some_and(|found| found == value));
        Ok(records)
    }

    pub fn documents(&self, id: &ImageId) -> Result<BTreeMap<String, String>> {
        let path = self.documents_of(id);
        let Some(text) = read_if_exists(&path)? else { return Ok(BTreeMap::new()) };
        serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))
    }

    /// The state of an image. It is failed if its snapshot is gone.
    pub fn state(&self, image: &ImageRecord) -> ImageState {
        if self.why_failed(image).is_some() {
            ImageState::Failed
        } else if now() < image.ready_at {
            ImageState::Pending
        } else {
            ImageState::Available
        }
    }

    pub fn why_failed(&self, image: &ImageRecord) -> Option<String> {
        let snapshot_exists = self.record::<SnapshotRecord>(&image.snapshot.0).exists()
            && self.data::<SnapshotRecord>(&image.snapshot.0).exists();
        image
            .failed
            .clone()
            .or_else(|| (!snapshot_exists).then(|| format!("its snapshot {} is missing", image.snapshot)))
    }

    /// Runs `work` under the region's lock, on another thread: syncing may be slow. If the future is dropped while it
    /// waits for the lock, nothing happens; later, `work` is completed under the lock, before any cleaning up.
    pub async fn locked<T: Send + 'static>(
        &self,
        work: impl FnOnce(&LockedRegion) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let locked = self.lock().await?;
        tasks::run(move |_| work(&locked)).await
    }

    async fn lock(&self) -> Result<LockedRegion> {
        let path = self.dir.join("lock");
        // It is opened each time: the lock belongs to the open file, so that tasks of one process exclude each other.
        let mut options = File::options();
        // Whoever may open it may lock it.
        options.create(true).truncate(false).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path).with_context(|| format!("opening {}", path.display()))?;
        let what = format!("the lock of the local region ({})", path.display());
        poll_until(&what, &LOCK_WAIT, async || {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => Ok(PollAnswer::Ready(())),
                Err(Errno::WOULDBLOCK | Errno::INTR) => {
                    Ok(PollAnswer::NotYet("held by another process".into()))
                }
                Err(e) => Err(e).with_context(|| format!("locking {}", path.display())),
            }
        })
        .await?;
        Ok(LockedRegion { store: self.clone(), _lock: file })
    }
}

impl LockedRegion {
    /// Writes a record to a temporary file and renames it. With `durable` it is synced when this returns.
    pub fn write<R: RegionRecord>(&self, record: &R, durable: bool) -> Result<()> {
        temp_file::write_atomically(
            &self.record::<R>(record.id()),
            &serde_json::to_vec_pretty(record)?,
            durable,
        )?;
        if durable { sync_dir(&self.dir_of::<R>()) } else { Ok(()) }
    }

    /// Removes data and record. The record goes last: while it exists, the removal can be tried again.
    pub fn remove<R: RegionRecord>(&self, id: &str) -> Result<()> {
        for part in EXTENSIONS {
            remove_if_there(&self.part::<R>(id, part))?;
        }
        remove_if_there(&self.record::<R>(id))
    }

    pub fn write_documents(&self, id: &ImageId, documents: &BTreeMap<String, String>) -> Result<()> {
        temp_file::write_atomically(&self.documents_of(id), &serde_json::to_vec_pretty(documents)?, true)?;
        sync_dir(&self.dir.join(DOCUMENTS))
    }

    /// Removes an image. Its snapshot is not deleted, as on EC2.
    pub fn deregister(&self, id: &ImageId) -> Result<()> {
        self.get::<ImageRecord>(&id.0)?;
        // The record goes first: documents without it are garbage, which `tidy` removes.
        self.remove::<ImageRecord>(&id.0)?;
        remove_if_there(&self.documents_of(id))
    }

    /// Removes files without a record: a process was killed between writing data and record. The lock excludes other
    /// processes between the two; a temporary file that is being written is locked by its writer.
    pub fn tidy(&self) -> Result<()> {
        for (dir, documents) in
            [(SnapshotRecord::DIR, false), (VolumeRecord::DIR, false), (ImageRecord::DIR, false)]
                .into_iter()
                .chain([(DOCUMENTS, true)])
        {
            let dir = self.dir.join(dir);
            for entry in fs::read_dir(&dir).with_context(|| format!("listing {}", dir.display()))? {
                let name = entry.with_context(|| format!("listing {}", dir.display()))?.file_name();
                let Some(name) = name.to_str() else { continue };
                let path = dir.join(name);
                let orphan = if name.starts_with(temp_file::TEMP_PREFIX) {
                    is_unlocked(&path)
                } else if let (true, Some(id)) = (documents, name.strip_suffix(".json")) {
                    is_id(ImageRecord::PREFIX, id) && !has_record(&self.record::<ImageRecord>(id))
                } else if let Some((id, _)) =
                    name.rsplit_once('.').filter(|(_, part)| EXTENSIONS.contains(part))
                {
                    !has_record(&dir.join(format!("{id}.json"))) && is_unlocked(&path)
                } else if name.ends_with(".json") {
                    !has_record(&path)
                } else {
                    false
                };
                if orphan {
                    remove_if_there(&path)?;
                }
            }
        }
        Ok(())
    }
}

/// Whether a record exists: see [`read_if_exists`].
fn has_record(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.len() > 0)
}

/// Whether no process has locked this file: no copy is under way, and no volume attached.
fn is_unlocked(path: &Path) -> bool {
    File::open(path)
        .is_ok_and(|file| rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok())
}

/// The content of a file. An empty file counts as absent: its name survived a power failure, and its content did not.
fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(text) => Ok(Some(text).filter(|text| !text.is_empty())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

pub fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Syncs a directory, so that names in it survive a power failure.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| format!("syncing {}", dir.display()))
}

/// Milliseconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// The creation time of a new resource: later than that of all others, so that "the newest" is unique whatever the
/// clock did.
pub fn created_after<R: RegionRecord>(others: &[R]) -> String {
    let newest = others.iter().filter_map(|r| millis(r.created())).max();
    let time = newest.map_or_else(now, |newest| now().max(newest + 1));
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(time)).to_string()
}

/// A creation time as milliseconds since 1970.
pub fn millis(created: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339(created).ok()?;
    time.duration_since(UNIX_EPOCH).ok().map(|time| time.as_millis() as u64)
}
