//! The raw disk of an import.

use super::ImportRequest;
use crate::cloud::local::Region;
use crate::ids::Digest;
use crate::report::Step;
use crate::sys::tasks;
use crate::transfer::raw::RawDisk;
use crate::transfer::upload;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

/// Opens the file. Fails if it is not a raw disk.
pub fn open(wanted: &ImportRequest) -> Result<File> {
    Region::open_raw(&wanted.raw)
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
    format!("reading {}", wanted.raw.display())
}
