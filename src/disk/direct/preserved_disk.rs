//! Disks that `--keep-on-failure` preserved. Each run, that is, each bake, has a directory on this machine with the
//! blocks that it wrote.
//!
//! ```text
//! STATE/kept/RUN/upper        the written blocks, each at its offset
//! STATE/kept/RUN/marks        the block map: which blocks were written
//! STATE/kept/RUN/disk.json    the disk's record. It is written last, so a directory without a record is incomplete
//! ```

use crate::cloud::{StaleRun, Tags};
use crate::error::Kind;
use crate::ids::{RunId, SnapshotId};
use crate::owner::{Owner, OwnerEnded};
use crate::sys::lock::{is_unlocked, try_lock_until_closed};
use crate::sys::state_files;
use crate::sys::temp_file;
use crate::sys::temp_file::TempFile;
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DIR: &str = "kept";
const UPPER: &str = "upper";
const MARKS: &str = "marks";
const RECORD: &str = "disk.json";
/// A process needs less time than this to preserve a disk. So an older directory without a record is the leftover of a
/// killed process.
const GRACE: Duration = Duration::from_secs(60);

/// The description of a disk, without its written blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The base snapshot. Blocks that the run did not write are read from it.
    pub snapshot: SnapshotId,
    /// Whether `snapshot` will be the parent of the new snapshot.
    pub child: bool,
    pub size_gib: u64,
    /// The [`Owner`] of the run.
    pub owner: String,
    pub tags: Tags,
    pub encrypted: bool,
    pub kms_key: Option<String>,
}

/// The files with a disk's written blocks and its block map. They are deleted when the value is dropped, unless
/// [`WrittenFiles::keep`] gives them names.
#[derive(Debug)]
pub struct WrittenFiles {
    upper: TempFile,
    marks: TempFile,
}

/// Returns the directory of preserved disks in this machine's state directory.
pub fn preserved_dir(state: &Path) -> PathBuf {
    state.join(DIR)
}

impl WrittenFiles {
    /// Creates empty files.
    pub fn new(state: &Path) -> Result<Self> {
        let dir = preserved_dir(state);
        state_files::create_dir(&dir)?;
        Ok(Self { upper: TempFile::new(&dir)?, marks: TempFile::new(&dir)? })
    }

    pub fn upper(&self) -> &File {
        self.upper.file()
    }

    pub fn marks(&self) -> &File {
        self.marks.file()
    }

    /// Preserves the files by giving them names, and writes the record.
    pub fn keep(self, state: &Path, run: &RunId, record: &DiskRecord) -> Result<()> {
        let dir = preserved_dir(state).join(&run.0);
        state_files::create_dir(&dir)?;
        self.upper.link(&dir.join(UPPER))?;
        self.marks.link(&dir.join(MARKS))?;
        temp_file::write_atomically(&dir.join(RECORD), &serde_json::to_vec_pretty(record)?, true)
    }
}

/// A preserved disk that is open. The value holds a lock on `upper`, so nobody else can open the disk.
#[derive(Debug)]
pub struct PreservedDisk {
    pub record: DiskRecord,
    pub upper: File,
    pub marks: File,
}

fn in_use_error(run: &RunId) -> anyhow::Error {
    let failure = Kind::Machine.failure(format!("the preserved disk of run {} is in use", run.short()));
    failure.hint("End the `oven shell` that uses it.").into()
}

fn read_record(dir: &Path) -> Result<Option<DiskRecord>> {
    let path = dir.join(RECORD);
    let context = || format!("reading {}", path.display());
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
            let failure = Kind::Machine.failure(error);
            let hint = "The disk is unusable without its record. Remove it with `oven sweep --kept`.";
            anyhow::Error::from(failure.hint(hint)).context(context())
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(context),
    }
}

/// Opens the preserved disk of a run. Returns `None` if this machine has no preserved disk of that run.
pub fn open(state: &Path, run: &RunId) -> Result<Option<PreservedDisk>> {
    let dir = preserved_dir(state).join(&run.0);
    let Some(record) = read_record(&dir)? else { return Ok(None) };
    let open = |name: &str| {
        let file = state_files::open_file(&dir.join(name), OFlags::RDWR);
        file.with_context(|| format!("opening {}", dir.join(name).display()))
    };
    let (upper, marks) = (open(UPPER)?, open(MARKS)?);
    if !try_lock_until_closed(&upper).unwrap_or(false) {
        return Err(in_use_error(run));
    }
    Ok(Some(PreservedDisk { record, upper, marks }))
}

/// Returns the runs that preserved a disk on this machine, except the runs whose process is known to be running.
pub fn list_runs(state: &Path) -> Result<Vec<StaleRun>> {
    let dir = preserved_dir(state);
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("listing {}", dir.display()))?,
    };
    let mut runs = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", dir.display()))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.len() != 32 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
            continue;
        }
        // There is no record if the process is still preserving the disk, or was killed while it did so.
        let record = read_record(&entry.path());
        let owner = match &record {
            Ok(Some(record)) => record.owner.clone(),
            // An unreadable record must not prevent the listing of other disks.
            Ok(None) | Err(_) => String::new(),
        };
        // A new directory without a record is skipped, because a process may be about to write the record.
        let age = entry.metadata().and_then(|metadata| metadata.modified()).map(|made| made.elapsed());
        if matches!(record, Ok(None)) && !age.is_ok_and(|age| age.is_ok_and(|age| age > GRACE)) {
            continue;
        }
        let ended = owner.parse::<Owner>().map_or(OwnerEnded::Unknown, |owner| owner.is_gone());
        if ended != OwnerEnded::No {
            let resources = vec![format!("the disk in {}", entry.path().display())];
            runs.push(StaleRun { run: RunId(name), owner, resources, kept: !matches!(record, Ok(None)) });
        }
    }
    Ok(runs)
}

/// Removes the preserved disk of a run, if there is one.
pub fn remove(state: &Path, run: &RunId) -> Result<()> {
    let dir = preserved_dir(state).join(&run.0);
    if !dir.exists() {
        return Ok(());
    }
    let context = || format!("removing {}", dir.display());
    if let Ok(upper) = File::open(dir.join(UPPER))
        && !try_lock_until_closed(&upper).unwrap_or(false)
    {
        return Err(in_use_error(run)).with_context(context);
    }
    // The record is removed last. If the removal of another file fails, `list_runs` still finds the disk, so the
    // removal can be repeated. All files are removed, because there may also be temporary files of an unfinished write.
    for entry in fs::read_dir(&dir).with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path != dir.join(RECORD) {
            fs::remove_file(path).with_context(context)?;
        }
    }
    match fs::remove_file(dir.join(RECORD)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(context),
        _ => fs::remove_dir(&dir).with_context(context),
    }
}

/// Removes temporary files that no process is writing. They are the leftovers of killed bakes on a file system without
/// O_TMPFILE.
pub fn remove_orphans(state: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(preserved_dir(state)) else { return Ok(()) };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_temporary = entry.file_name().to_string_lossy().starts_with(temp_file::TEMP_PREFIX);
        if is_temporary && is_unlocked(&path) {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn record(owner: &Owner) -> DiskRecord {
        DiskRecord {
            snapshot: SnapshotId("snap-1".into()),
            child: true,
            size_gib: 1,
            owner: owner.to_string(),
            tags: Tags::new(),
            encrypted: false,
            kms_key: None,
        }
    }

    #[test]
    fn a_preserved_disk_can_be_opened_once_and_removed() {
        let state = tempfile::tempdir().unwrap();
        let (state, run) = (state.path(), RunId::new());
        assert!(list_runs(state).unwrap().is_empty() && open(state, &run).unwrap().is_none());
        let gone = Owner { started: Owner::this().started + 1, ..Owner::this() };
        let written = WrittenFiles::new(state).unwrap();
        written.upper().write_all_at(b"text", 0).unwrap();
        written.keep(state, &run, &record(&gone)).unwrap();
        let found = list_runs(state).unwrap();
        assert_eq!((found.len(), &found[0].run, found[0].kept), (1, &run, true));
        let kept = open(state, &run).unwrap().unwrap();
        assert_eq!(kept.record, record(&gone));
        let mut text = [0; 4];
        kept.upper.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(&text, b"text");
        assert!(open(state, &run).unwrap_err().to_string().contains("is in use"));
        assert!(remove(state, &run).is_err());
        drop(kept);
        remove(state, &run).unwrap();
        remove(state, &run).unwrap();
        assert_eq!(preserved_dir(state).read_dir().unwrap().count(), 0);
    }

    #[test]
    fn an_unreadable_record_hides_no_other_disks_and_its_disk_can_be_removed() {
        let state = tempfile::tempdir().unwrap();
        let state = state.path();
        let gone = Owner { started: Owner::this().started + 1, ..Owner::this() };
        let (whole, damaged) = (RunId::new(), RunId::new());
        for run in [&whole, &damaged] {
            WrittenFiles::new(state).unwrap().keep(state, run, &record(&gone)).unwrap();
        }
        fs::write(preserved_dir(state).join(&damaged.0).join(RECORD), "{").unwrap();
        let found = list_runs(state).unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found.iter().all(|run| run.kept), "{found:?}");
        let error = open(state, &damaged).unwrap_err();
        assert_eq!(crate::error::Kind::of(&error), Kind::Machine, "{error:#}");
        remove(state, &damaged).unwrap();
        assert_eq!(list_runs(state).unwrap().len(), 1);
    }

    #[test]
    fn the_disk_of_a_running_bake_is_no_leftover_but_one_without_a_record_is() {
        let state = tempfile::tempdir().unwrap();
        let state = state.path();
        WrittenFiles::new(state).unwrap().keep(state, &RunId::new(), &record(&Owner::this())).unwrap();
        assert!(list_runs(state).unwrap().is_empty());
        let half = RunId::new();
        fs::create_dir(preserved_dir(state).join(&half.0)).unwrap();
        assert!(list_runs(state).unwrap().is_empty(), "its record may be written in a moment");
        let dir = File::open(preserved_dir(state).join(&half.0)).unwrap();
        dir.set_modified(std::time::SystemTime::now() - 2 * GRACE).unwrap();
        let found = list_runs(state).unwrap();
        assert_eq!((found.len(), found[0].kept), (1, false));
        // The process of this run was killed while it wrote the record.
        fs::write(preserved_dir(state).join(&half.0).join(format!("{}1", temp_file::TEMP_PREFIX)), "{")
            .unwrap();
        remove(state, &half).unwrap();
        drop(WrittenFiles::new(state).unwrap());
        remove_orphans(state).unwrap();
        assert_eq!(preserved_dir(state).read_dir().unwrap().count(), 1);
    }
}
