//! Copies of parents' data, which their children are written over.

use crate::cloud::local::records::{SnapshotRecord, Store};
use crate::ids::SnapshotId;
use crate::sys::sparse_copy;
use crate::sys::tasks;
use crate::sys::temp_file::Temp;
use anyhow::{Context, Result};
use std::fs::File;
use tokio::sync::Semaphore;

/// Copies that are made at the same time, each with some MiB of memory. Measured, of 470 MiB on ext4: one alone 0.7 s, 8
/// side by side 2.1 s; four keep a disk busy.
const AT_ONCE: usize = 4;

/// Whose turn it is to copy.
#[derive(Debug)]
pub struct Copies(Semaphore);

impl Default for Copies {
    fn default() -> Self {
        Self(Semaphore::new(AT_ONCE))
    }
}

impl Copies {
    /// A copy of a complete snapshot's data. It has no name: if nobody takes it, it vanishes.
    pub async fn of(&self, store: &Store, parent: &SnapshotId) -> Result<Temp> {
        let _turn = self.0.acquire().await.context("waiting for a turn")?;
        let (dir, path) = (store.dir_of::<SnapshotRecord>(), store.data::<SnapshotRecord>(&parent.0));
        tasks::run(move |stop| {
            let source = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
            sparse_copy::copy(&source, sparse_copy::length(&source)?, &dir, stop)
        })
        .await
    }
}
