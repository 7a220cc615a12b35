//! A region's directory: a small JSON record for each thing, the data beside it, and one lock for all that changes.

use super::pending_snapshot::Written;
use super::private_dir;
use crate::cloud::ec2_rules::{absent, is_id};
use crate::cloud::{ImageState, Tags};
use crate::error::Kind;
use crate::ids::{Architecture, ImageId, SnapshotId, VolumeId};
use crate::sys::poll::{Policy, Probe, until};
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

/// Raised when records change so that an older oven would misread them.
const FORMAT: u32 = 1;
/// Sections under the lock take milliseconds; a minute means that a process was stopped within one.
const LOCK: Policy = Policy::local(Duration::from_secs(60));

/// Something that has a record.
pub trait Record: Serialize + DeserializeOwned + Send + 'static {
    /// Its directory in the region.
    const DIR: &'static str;
    /// Of its ids.
    const PREFIX: &'static str;
    /// What EC2 says of an id that it does not know, without `.NotFound`.
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
    /// Milliseconds since 1970. Pending before it: also if the process that registered it is gone.
    pub ready_at: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Of an import.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

/// The raw disk that an image was imported from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// [`copy::digest`] of the content.
    pub digest: String,
    /// The file as it was: as long as nothing of this changed, its content has not, either.
    pub stamp: Option<Stamp>,
}

/// What changes of a file when its content does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
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
    /// `None`: imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeId>,
    pub created: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    pub tags: Tags,
    /// [`NEVER`] until its blocks are complete: an oven that does not know `written` takes it for pending, too.
    pub ready_at: u64,
    /// Of one that is written by its blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<Written>,
}

/// Later than anything.
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
        impl Record for $record {
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

/// A disk.
const IMG: &str = "img";
/// Which blocks of a snapshot were put ([`Written`]).
pub const PUT: &str = "put";
/// The parent's disk, under a second name, until a snapshot is complete: the parent itself may go.
pub const PARENT: &str = "parent";
/// The endings of what belongs to a record.
const DATA: [&str; 3] = [IMG, PUT, PARENT];
/// Texts kept with images.
const DOCUMENTS: &str = "documents";
/// What runs write here beside the region's own: made with the rest, so that it is as private.
const LOGS: &str = "logs";
const LOCKS: &str = "locks";

/// A region's directory, for reading. What changes it goes through [`Locked`].
#[derive(Debug, Clone)]
pub struct Store {
    dir: Arc<Path>,
}

/// A region under its lock.
pub struct Locked {
    store: Store,
    _lock: File,
}
impl Deref for Locked {
    type Target = Store;
    fn deref(&self) -> &Store {
        &self.store
    }
}

impl Store {
    /// Opens a region, or makes one.
    pub fn open(dir: &Path) -> Result<Self> {
        let make = || -> Result<Self> {
            private_dir::make(dir)?;
            let store = Self { dir: fs::canonicalize(dir)?.into() };
            for part in [ImageRecord::DIR, SnapshotRecord::DIR, VolumeRecord::DIR, DOCUMENTS, LOGS, LOCKS] {
                private_dir::make_part(&store.dir.join(part))?;
            }
            store.check_format()?;
            Ok(store)
        };
        make().with_context(|| format!("opening the local region {}", dir.display())).map_err(|error| {
            let io = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            use ErrorKind::{
                AlreadyExists, NotADirectory, PermissionDenied, ReadOnlyFilesystem, StorageFull,
            };
            if let Some(PermissionDenied | ReadOnlyFilesystem | NotADirectory | AlreadyExists | StorageFull) =
                io
            {
                let hint = "Run oven as root, or name a directory of your own: --region-dir DIR.";
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
        let Some(text) = read_if_there(&path)? else {
            // Two that begin at once write the same.
            return temp_file::write_beside(&path, &serde_json::to_vec(&Format { format: FORMAT })?, false);
        };
        let found: Format =
            serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?;
        if found.format > FORMAT {
            let text = format!("{} is of format {}, made by a newer oven", self.dir.display(), found.format);
            return Err(Kind::Machine.failure(text).hint("Use that one, or another --region-dir.").into());
        }
        Ok(())
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of a kind of things.
    pub fn dir_of<R: Record>(&self) -> PathBuf {
        self.dir.join(R::DIR)
    }

    /// The data of a thing.
    pub fn data<R: Record>(&self, id: &str) -> PathBuf {
        self.part::<R>(id, IMG)
    }

    /// A file of a thing, by its ending.
    pub fn part<R: Record>(&self, id: &str, ending: &str) -> PathBuf {
        self.dir_of::<R>().join(format!("{id}.{ending}"))
    }

    fn record<R: Record>(&self, id: &str) -> PathBuf {
        self.dir_of::<R>().join(format!("{id}.json"))
    }

    fn documents_of(&self, id: &ImageId) -> PathBuf {
        self.dir.join(DOCUMENTS).join(format!("{id}.json"))
    }

    /// A record, if there is one.
    pub fn find<R: Record>(&self, id: &str) -> Result<Option<R>> {
        // Ids come from users, and become paths here.
        if !is_id(R::PREFIX, id) {
            return Err(absent(&format!("{}.Malformed", R::INVALID), format!("Invalid id: {id:?}")));
        }
        let path = self.record::<R>(id);
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        let record = serde_json::from_slice(&text).map_err(|error| {
            let hint = "Something else than oven changed it. Without it, what it stands for is gone.";
            Kind::Cloud.failure(format!("{} is no record: {error}", path.display())).hint(hint)
        })?;
        Ok(Some(record))
    }

    /// A record that has to be there.
    pub fn get<R: Record>(&self, id: &str) -> Result<R> {
        self.find(id)?.ok_or_else(|| {
            let text = format!("'{id}' does not exist in the local region {}", self.dir.display());
            absent(&format!("{}.NotFound", R::INVALID), text)
        })
    }

    /// All of a kind, oldest first.
    pub fn list<R: Record>(&self) -> Result<Vec<R>> {
        let dir = self.dir_of::<R>();
        let mut records = Vec::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("listing {}", dir.display()))? {
            let name = entry.with_context(|| format!("listing {}", dir.display()))?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".json")) else { continue };
            if is_id(R::PREFIX, id) {
                // One that went away since is not there.
                records.extend(self.find::<R>(id)?);
            }
        }
        records.sort_by(|a, b| (a.created(), a.id()).cmp(&(b.created(), b.id())));
        Ok(records)
    }

    /// Those of a kind that carry a tag of this value, oldest first.
    pub fn tagged<R: Record>(&self, key: &str, value: &str) -> Result<Vec<R>> {
        let mut records = self.list::<R>()?;
        records.retain(|r| r.tags().get(key).is_some_and(|found| found == value));
        Ok(records)
    }

    pub fn documents(&self, id: &ImageId) -> Result<BTreeMap<String, String>> {
        let path = self.documents_of(id);
        let Some(text) = read_if_there(&path)? else { return Ok(BTreeMap::new()) };
        serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))
    }

    /// An image whose snapshot is gone is a failed one.
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
        let there = self.record::<SnapshotRecord>(&image.snapshot.0).exists()
            && self.data::<SnapshotRecord>(&image.snapshot.0).exists();
        image.failed.clone().or_else(|| (!there).then(|| format!("its snapshot {} is gone", image.snapshot)))
    }

    /// Changes the region, beside the runtime's thread: what is synced may take a while. Dropped while it waits for
    /// the lock it does nothing; later it does all, and keeps the lock until then: whoever cleans up comes after it.
    pub async fn locked<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Locked) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let locked = self.lock().await?;
        tasks::run(move |_| work(&locked)).await
    }

    async fn lock(&self) -> Result<Locked> {
        let path = self.dir.join("lock");
        // Opened anew each time: the lock belongs to the open file, so that tasks of one process exclude each other.
        let mut options = File::options();
        // Whoever may open it may hold it.
        options.create(true).truncate(false).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path).with_context(|| format!("opening {}", path.display()))?;
        let what = format!("the lock of the local region ({})", path.display());
        until(&what, &LOCK, async || {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => Ok(Probe::Ready(())),
                Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(Probe::NotYet("held by another process".into())),
                Err(e) => Err(e).with_context(|| format!("locking {}", path.display())),
            }
        })
        .await?;
        Ok(Locked { store: self.clone(), _lock: file })
    }
}

impl Locked {
    /// Writes a record beside its place and renames it. `durable`: it survives a loss of power when this returns.
    pub fn write<R: Record>(&self, record: &R, durable: bool) -> Result<()> {
        temp_file::write_beside(
            &self.record::<R>(record.id()),
            &serde_json::to_vec_pretty(record)?,
            durable,
        )?;
        if durable { sync_dir(&self.dir_of::<R>()) } else { Ok(()) }
    }

    /// Removes data and record. The record goes last: while there is one, somebody may find it and try again.
    pub fn remove<R: Record>(&self, id: &str) -> Result<()> {
        for part in DATA {
            remove_if_there(&self.part::<R>(id, part))?;
        }
        remove_if_there(&self.record::<R>(id))
    }

    pub fn write_documents(&self, id: &ImageId, documents: &BTreeMap<String, String>) -> Result<()> {
        temp_file::write_beside(&self.documents_of(id), &serde_json::to_vec_pretty(documents)?, true)?;
        sync_dir(&self.dir.join(DOCUMENTS))
    }

    /// Removes an image; its snapshot stays, as on EC2.
    pub fn deregister(&self, id: &ImageId) -> Result<()> {
        self.get::<ImageRecord>(&id.0)?;
        // The record first: without it the documents are nobody's, and `tidy` finds them.
        self.remove::<ImageRecord>(&id.0)?;
        remove_if_there(&self.documents_of(id))
    }

    /// Removes what no record names: a process was killed between data and record. Nobody else is between the two,
    /// for we hold the lock; a temporary file that is being written is locked by its writer.
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
                    is_abandoned(&path)
                } else if let (true, Some(id)) = (documents, name.strip_suffix(".json")) {
                    is_id(ImageRecord::PREFIX, id) && !is_written(&self.record::<ImageRecord>(id))
                } else if let Some((id, _)) = name.rsplit_once('.').filter(|(_, part)| DATA.contains(part)) {
                    !is_written(&dir.join(format!("{id}.json"))) && is_abandoned(&path)
                } else if name.ends_with(".json") {
                    !is_written(&path)
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

/// Whether there is a record: see [`read_if_there`].
fn is_written(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.len() > 0)
}

/// Whether nobody has this file locked: a copy under way, or an attached volume.
fn is_abandoned(path: &Path) -> bool {
    File::open(path)
        .is_ok_and(|file| rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok())
}

/// An empty file is not there: its name outlived a loss of power, and its content, which nobody had synced, did not.
fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
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

/// Makes names in a directory survive a loss of power.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| format!("syncing {}", dir.display()))
}

/// Milliseconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// The time of creation of something new: later than all that there is, so that "the newest" is one and only, whatever
/// the clock did.
pub fn created_after<R: Record>(others: &[R]) -> String {
    let newest = others.iter().filter_map(|r| millis(r.created())).max();
    let time = newest.map_or_else(now, |newest| now().max(newest + 1));
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(time)).to_string()
}

/// A time of creation as milliseconds since 1970.
pub fn millis(created: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339(created).ok()?;
    time.duration_since(UNIX_EPOCH).ok().map(|time| time.as_millis() as u64)
}
