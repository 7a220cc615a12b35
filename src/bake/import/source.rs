//! The raw disk of an import.

use super::ImportRequest;
use crate::cloud::local::Region;
use crate::error::Kind;
use crate::formats::partition::{self, ReadAt, TableScheme};
use crate::formats::{disk_size, superblock};
use crate::ids::Digest;
use crate::report::Step;
use crate::sys::sparse_copy::{self, disk_name};
use crate::sys::tasks;
use crate::transfer::raw::RawDisk;
use crate::transfer::upload;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// The size of a sector in bytes. Partition tables give offsets and sizes in sectors.
const SECTOR: u64 = 512;

/// A file or block device that is read as a disk.
struct DiskBytes<'f> {
    file: &'f File,
    size: u64,
}

impl ReadAt for DiskBytes<'_> {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// Opens a raw disk. Errors: [`Kind::Usage`] if the file is not a raw disk, or if its end is missing.
pub fn open(path: &Path) -> Result<File> {
    let file = Region::open_raw(path)?;
    let disk = DiskBytes { file: &file, size: sparse_copy::length(&file)? };
    // A partition table that cannot be used is accepted here. A bake rejects it later and says why.
    let no_table = partition::read(&disk, SECTOR).is_ok_and(|table| table.scheme == TableScheme::None);
    if no_table && superblock::probe(&disk, 0, disk.size).is_none() {
        let name = disk_name(path);
        let message = format!("{name} is not a disk: it has neither a partition table nor a file system");
        return Err(Kind::Usage.failure(message).hint("Import the raw image of a whole disk.").into());
    }
    ensure_complete(path, &disk)?;
    Ok(file)
}

/// Fails if the disk ends before its own partition table or file system says. Errors: [`Kind::Usage`].
fn ensure_complete(path: &Path, disk: &DiskBytes<'_>) -> Result<()> {
    let Some(described) = disk_size::described_size(disk) else { return Ok(()) };
    let Some(missing) = described.bytes.checked_sub(disk.size).filter(|missing| *missing > 0) else {
        return Ok(());
    };
    let what = format!(
        "{} is truncated: {missing} bytes are missing. Its {} is for a disk of {} bytes, but it has only {} bytes",
        disk_name(path),
        described.source,
        described.bytes,
        disk.size
    );
    Err(Kind::Usage.failure(what).hint("Copy or download the disk image again.").into())
}

/// Finds the ranges of the file that have data.
pub async fn disk(wanted: &ImportRequest, file: File) -> Result<Arc<RawDisk>> {
    let name = wanted.raw.clone();
    Ok(Arc::new(tasks::run(move |_| RawDisk::new(file, &name)).await?))
}

/// Reads the disk, and returns the digests of its blocks. `step` shows how far this is.
pub async fn digests(
    wanted: &ImportRequest,
    disk: Arc<RawDisk>,
    step: &Step,
) -> Result<BTreeMap<u32, Digest>> {
    let on_progress = |done, all| step.progress(done, all);
    upload::digests_with_progress(disk, &on_progress).await.with_context(|| reading_context(wanted))
}

pub fn reading_context(wanted: &ImportRequest) -> String {
    format!("reading {}", disk_name(&wanted.raw))
}
