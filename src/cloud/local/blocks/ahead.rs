//! A parent's data, copied before a child is started.

use super::super::records::{SnapshotRecord, Store};
use crate::cloud::SnapshotId;
use crate::disk::copy::{self, Cancelled, Temp};
use anyhow::{Context, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use tokio::task::JoinHandle;

/// Copies of snapshots of which somebody will start a child, each made in a thread of its own. They have no name: if
/// nobody does, they vanish.
#[derive(Debug, Default)]
pub struct Ahead(RefCell<BTreeMap<SnapshotId, Work>>);

#[derive(Debug)]
struct Work {
    stop: Cancelled,
    task: JoinHandle<Result<Temp>>,
}

impl Drop for Work {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Ahead {
    /// A child of this complete snapshot will be started.
    pub fn expect(&self, store: &Store, parent: &SnapshotId) {
        let (dir, path) = (store.dir_of::<SnapshotRecord>(), store.data::<SnapshotRecord>(&parent.0));
        self.0.borrow_mut().entry(parent.clone()).or_insert_with(|| {
            let stop = Cancelled::default();
            let cancelled = stop.clone();
            let task = tokio::task::spawn_blocking(move || {
                let source = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
                copy::copy(&source, copy::length(&source)?, &dir, &cancelled)
            });
            Work { stop, task }
        });
    }

    /// The copy, for one child; waits for it. Why there is none does not matter: it is made later then.
    pub async fn take(&self, parent: &SnapshotId) -> Option<Temp> {
        let mut work = self.0.borrow_mut().remove(parent)?;
        (&mut work.task).await.ok()?.ok()
    }

    /// Nobody will.
    pub fn forget(&self, parent: &SnapshotId) {
        self.0.borrow_mut().remove(parent);
    }
}
