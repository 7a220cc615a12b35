//! The files of a region: a small JSON record for each resource, its data next to it, and one lock for all changes.

use super::{open_errors, private_dir};
use crate::cloud::ec2_rules::{is_id, not_found_error};
use crate::cloud::{ImageState, Tags};
use crate::error::{Failure, Kind};
use crate::ids::{Architecture, Digest, ImageId, SnapshotId, VolumeId};
use crate::sys::lock::{FileLock, LockMode, is_unlocked};
use crate::sys::poll::PollPolicy;
use crate::sys::state_files;
use crate::sys::tasks;
use crate::sys::temp_file;
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The additional data in the record of a snapshot that is written block by block ([`super::pending_snapshot`]).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PendingWrites {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// The snapshot fails if no block is put for this many milliseconds.
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

/// The version of a region's format. It must be increased when records change so that an older oven would misread them.
const FORMAT: u32 = 1;
/// The maximum size of a volume in GiB. A snapshot has the same limit.
pub const MAX_GIB: u64 = 16384;
/// A process holds the lock only for milliseconds. If the lock is not free after a minute, the process that holds it
/// was probably stopped.
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
    /// The time until which the image is pending, in milliseconds since 1970. The process that registered the image may
    /// end before that time.
    pub ready_at: u64,
    /// The reason why the image failed; `None` if it did not fail.
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
    /// The metadata of the disk's file. If they are the same at the next import, the content is unchanged and is not
    /// read again. `None` for a block device, whose times do not show changes of its content. Also `None` if the file
    /// was changed less than 0.1 s before the import. A second change so soon after the first can leave the file's
    /// times unchanged, so the metadata would not show it.
    pub stamp: Option<FileStamp>,
}

/// The metadata of a file. By comparing them, oven finds out whether the file's content was changed.
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
    /// The volume of which the snapshot was taken. `None` for an import, and for a snapshot that is written block by
    /// block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeId>,
    pub created: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    pub tags: Tags,
    /// The time until which the snapshot is pending. For a snapshot that is written block by block, it is [`NEVER`]
    /// until the snapshot is completed. An older oven ignores `written`, so it treats such a snapshot as pending.
    pub ready_at: u64,
    /// Set if the snapshot is written block by block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written: Option<PendingWrites>,
}

/// A time that is never reached.
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
/// The extension of the file that lists which blocks of a snapshot were put ([`PendingWrites`]).
pub const PUT: &str = "put";
/// The extension of a hard link to the parent's data. A pending snapshot has this link, because the parent may be
/// deleted before the snapshot is complete.
pub const PARENT: &str = "parent";
/// The extensions of all files of a resource except its record.
const EXTENSIONS: [&str; 3] = [IMG, PUT, PARENT];
/// The directory of the images' documents ([`crate::cloud::ImageSpec::documents`]).
const DOCUMENTS: &str = "documents";
/// The directories of the logs and the locks of runs. The region itself does not use them, but it creates them, so that
/// they are private.
const LOGS: &str = "logs";
const LOCKS: &str = "locks";

/// Read access to a region's directory. Changes need a [`LockedRegion`].
#[derive(Debug, Clone)]
pub struct RegionStore {
    dir: Arc<Path>,
}

/// A region whose lock is held by this process.
pub struct LockedRegion {
    store: RegionStore,
    _lock: FileLock,
}
impl Deref for LockedRegion {
    type Target = RegionStore;
    fn deref(&self) -> &RegionStore {
        &self.store
    }
}

/// How a region is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionAccess {
    /// If there is no region in the directory, one is made. The directory must be empty, or must not exist. In the
    /// second case, it is created together with the missing directories above it.
    Create,
    /// The region must exist. If a directory in it is missing, it is created.
    Change,
    /// The region must exist. Nothing is changed.
    Look,
}

/// The directories in a region.
const PARTS: [&str; 6] = [ImageRecord::DIR, SnapshotRecord::DIR, VolumeRecord::DIR, DOCUMENTS, LOGS, LOCKS];
/// The maximum size in bytes of a record in a directory that may not be a region. Records have a few KiB.
const MAX_RECORD: u64 = 1 << 20;
/// The file with the version of a region's format.
const FORMAT_FILE: &str = "region.json";

/// Returns whether a directory is a region. The first thing that is written into a new region is its format. The very
/// first versions of oven wrote the format last, so a region of theirs may lack it, but has records. Directories with
/// the names of a region's directories are not enough, because another program may have made them.
fn is_region(dir: &Path) -> bool {
    dir.join(FORMAT_FILE).is_file()
        || has_records::<ImageRecord>(dir)
        || has_records::<SnapshotRecord>(dir)
        || has_records::<VolumeRecord>(dir)
}

/// Returns whether a directory below `dir` has a valid record of a resource of this kind.
fn has_records<R: RegionRecord>(dir: &Path) -> bool {
    let is_record = |path: &Path| {
        let id = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        path.extension().is_some_and(|extension| extension == "json")
            && is_id(R::PREFIX, id)
            && fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() <= MAX_RECORD)
            && fs::read(path)
                .is_ok_and(|text| serde_json::from_slice::<R>(&text).is_ok_and(|record| record.id() == id))
    };
    fs::read_dir(dir.join(R::DIR))
        .is_ok_and(|entries| entries.flatten().any(|entry| is_record(&entry.path())))
}

/// Checks that a region can be made in a directory: nothing would be mixed with files of another program.
fn ensure_empty(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // Another process may be making the region at this moment, or was killed while it made the region.
        let is_part = PARTS.contains(&&*name)
            && fs::read_dir(entry.path()).is_ok_and(|mut below| below.next().is_none());
        if is_part || name == FORMAT_FILE || name.starts_with(temp_file::TEMP_PREFIX) {
            continue;
        }
        let what = format!("{} is neither empty nor a region: it has {name:?}", dir.display());
        let hint = "Pass a directory that is empty or does not exist: --region-dir DIR.";
        return Err(Kind::Definition.failure(what).hint(hint).into());
    }
    Ok(())
}

impl RegionStore {
    pub fn open(dir: &Path, access: RegionAccess) -> Result<Self> {
        let make = || -> Result<Self> {
            match access {
                _ if fs::metadata(dir).is_ok_and(|found| !found.is_dir()) => {
                    return Err(std::io::Error::from(ErrorKind::NotADirectory).into());
                }
                _ if is_region(dir) => private_dir::check_region_dir(dir)?,
                RegionAccess::Create => {
                    ensure_empty(dir)?;
                    private_dir::create_region_dir(dir)?;
                }
                RegionAccess::Change | RegionAccess::Look => return Err(open_errors::no_region(dir)),
            }
            let store = Self { dir: fs::canonicalize(dir)?.into() };
            store.check_format(access != RegionAccess::Look)?;
            for part in PARTS.map(|part| store.dir.join(part)) {
                match access {
                    RegionAccess::Create | RegionAccess::Change => private_dir::create_subdirectory(&part)?,
                    RegionAccess::Look => private_dir::check_subdirectory(&part)?,
                }
            }
            Ok(store)
        };
        let opened = make().with_context(|| format!("opening the local region {}", dir.display()));
        opened.map_err(|error| open_errors::explain(error, dir))
    }

    /// Checks the format. If the region has none, writes it with `write`.
    fn check_format(&self, write: bool) -> Result<()> {
        #[derive(Serialize, Deserialize)]
        struct Format {
            format: u32,
        }
        let path = self.dir.join(FORMAT_FILE);
        let Some(text) = read_if_exists(&path)? else {
            if !write {
                return Ok(());
            }
            // If two processes start at the same time, both write the same content. So no lock is needed.
            return temp_file::write_atomically(
                &path,
                &serde_json::to_vec(&Format { format: FORMAT })?,
                false,
            );
        };
        let found: Format = serde_json::from_slice(&text).map_err(|error| invalid_record(&path, &error))?;
        if found.format > FORMAT {
            let text = format!(
                "the region {} was made by a newer oven: it has the format {}",
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

    /// Returns a record, if there is one.
    pub fn find<R: RegionRecord>(&self, id: &str) -> Result<Option<R>> {
        // The id is checked, because it may come from a user and becomes a path here.
        if !is_id(R::PREFIX, id) {
            return Err(not_found_error(&format!("{}.Malformed", R::INVALID), format!("Invalid id: {id:?}")));
        }
        let path = self.record::<R>(id);
        let Some(text) = read_if_exists(&path)? else { return Ok(None) };
        Ok(Some(serde_json::from_slice(&text).map_err(|error| invalid_record(&path, &error))?))
    }

    /// Returns a record. Fails if it does not exist.
    pub fn get<R: RegionRecord>(&self, id: &str) -> Result<R> {
        self.find(id)?.ok_or_else(|| {
            let text = format!("'{id}' does not exist in the local region {}", self.dir.display());
            not_found_error(&format!("{}.NotFound", R::INVALID), text)
        })
    }

    /// Returns all resources of a kind, oldest first.
    pub fn list<R: RegionRecord>(&self) -> Result<Vec<R>> {
        let dir = self.dir_of::<R>();
        let mut records = Vec::new();
        let entries = match fs::read_dir(&dir) {
            // The process that made the region was killed.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(records),
            entries => entries.with_context(|| format!("listing {}", dir.display()))?,
        };
        for entry in entries {
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

    /// Returns the resources of a kind that have a tag with this value, oldest first.
    pub fn tagged<R: RegionRecord>(&self, key: &str, value: &str) -> Result<Vec<R>> {
        let mut records = self.list::<R>()?;
        records.retain(|r| r.tags().get(key).is_some_and(|found| found == value));
        Ok(records)
    }

    pub fn documents(&self, id: &ImageId) -> Result<BTreeMap<String, String>> {
        let path = self.documents_of(id);
        let Some(text) = read_if_exists(&path)? else { return Ok(BTreeMap::new()) };
        Ok(serde_json::from_slice(&text).map_err(|error| invalid_record(&path, &error))?)
    }

    /// Returns the state of an image. An image without its snapshot has failed.
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

    /// Runs `work` under the region's lock, on another thread, because syncing may be slow. If the future is dropped
    /// while it waits for the lock, `work` does not run. If the future is dropped later, `work` is still completed
    /// under the lock. A clean-up takes the same lock, so the clean-up runs after `work`.
    pub async fn locked<T: Send + 'static>(
        &self,
        work: impl FnOnce(&LockedRegion) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let locked = self.lock().await?;
        tasks::run(move |_| work(&locked)).await
    }

    async fn lock(&self) -> Result<LockedRegion> {
        let path = self.dir.join("lock");
        // The file is opened again for each lock, because a lock belongs to an open file. So tasks of the same process
        // also exclude each other.
        // The file is private, because everybody who can open a file can lock it.
        let file = state_files::open_file(&path, OFlags::WRONLY | OFlags::CREATE)
            .map_err(|error| Kind::Machine.error(format!("opening {}: {error}", path.display())))?;
        let what = format!("the lock of the local region ({})", path.display());
        let locking = format!("locking {}", path.display());
        let lock = FileLock::poll(file, LockMode::Exclusive, &LOCK_WAIT, &what, &locking).await?;
        Ok(LockedRegion { store: self.clone(), _lock: lock })
    }
}

impl LockedRegion {
    /// Writes a record to a temporary file, and renames the file. With `durable`, returns only after the record was
    /// synced.
    pub fn write<R: RegionRecord>(&self, record: &R, durable: bool) -> Result<()> {
        temp_file::write_atomically(
            &self.record::<R>(record.id()),
            &serde_json::to_vec_pretty(record)?,
            durable,
        )?;
        if durable { sync_dir(&self.dir_of::<R>()) } else { Ok(()) }
    }

    /// Removes the data and the record of a resource. The record is removed last. As long as it exists, the removal can
    /// be repeated.
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
        // The record is removed first. If the process is killed after that, `tidy` removes the documents, because they
        // have no record.
        self.remove::<ImageRecord>(&id.0)?;
        remove_if_there(&self.documents_of(id))
    }

    /// Removes files without a record. Such a file remains if a process was killed after it wrote the data and before
    /// it wrote the record. No process can be between these two steps now, because this process holds the region's
    /// lock. A temporary file is not removed while its writer locks it.
    pub fn tidy(&self) -> Result<()> {
        for (dir, documents) in
            [(SnapshotRecord::DIR, false), (VolumeRecord::DIR, false), (ImageRecord::DIR, false)]
                .into_iter()
                .chain([(DOCUMENTS, true)])
        {
            let dir = self.dir.join(dir);
            let entries = match fs::read_dir(&dir) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                entries => entries.with_context(|| format!("listing {}", dir.display()))?,
            };
            for entry in entries {
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

fn invalid_record(path: &Path, error: &serde_json::Error) -> Failure {
    let hint = "Another program changed this file. If you delete it, the resource that it describes is lost.";
    Kind::Cloud.failure(format!("{} is not a valid record: {error}", path.display())).hint(hint)
}

/// Returns whether a record exists. An empty file does not count as a record ([`read_if_exists`]).
fn has_record(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.len() > 0)
}

/// Returns the content of a file. An empty file counts as absent, because after a power failure a file's name may exist
/// without its content.
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

/// Syncs a directory, so that the names in it survive a power failure.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| format!("syncing {}", dir.display()))
}

/// Milliseconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64)
}

/// Returns the creation time of a new resource. It is later than the times of all `others`, so that there is only one
/// newest resource even if the clock was set back.
pub fn created_after<R: RegionRecord>(others: &[R]) -> String {
    let newest = others.iter().filter_map(|r| millis(r.created())).max();
    let time = newest.map_or_else(now, |newest| now().max(newest + 1));
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(time)).to_string()
}

/// Converts a creation time to milliseconds since 1970.
pub fn millis(created: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339(created).ok()?;
    time.duration_since(UNIX_EPOCH).ok().map(|time| time.as_millis() as u64)
}
