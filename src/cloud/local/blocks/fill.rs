//! A parent's data on its way into a pending snapshot.

use super::super::records::{PARENT, SnapshotRecord, Store};
use super::super::written::{Entry, Put};
use crate::cloud::SnapshotId;
use crate::cloud::blocks::BLOCK;
use crate::disk::copy::{self, Cancelled, Temp};
use anyhow::{Context, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use tokio::task::JoinHandle;

/// Parents' data on its way, each in a thread of its own.
#[derive(Debug, Default)]
pub struct Fills {
    /// Into pending snapshots.
    fills: RefCell<BTreeMap<SnapshotId, Work<()>>>,
    /// Copies of snapshots of which somebody will start a child. They have no name: if nobody does, they vanish.
    ahead: RefCell<BTreeMap<SnapshotId, Work<Temp>>>,
}

#[derive(Debug)]
struct Work<T> {
    stop: Cancelled,
    task: JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Work<T> {
    fn begin(work: impl FnOnce(&Cancelled) -> Result<T> + Send + 'static) -> Self {
        let stop = Cancelled::default();
        let cancelled = stop.clone();
        Self { stop, task: tokio::task::spawn_blocking(move || work(&cancelled)) }
    }

    /// Why it failed does not matter: whoever needs it does it once more.
    async fn end(mut self) -> Option<T> {
        (&mut self.task).await.ok()?.ok()
    }
}

impl<T> Drop for Work<T> {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Fills {
    pub fn begin(&self, store: &Store, id: &SnapshotId) {
        let (store, of) = (store.clone(), id.clone());
        let fill = Work::begin(move |stop| {
            let Some(put) = Put::open(&store, &of)? else { return Ok(()) };
            fill(&store, &of, &put, true, stop)
        });
        self.fills.borrow_mut().insert(id.clone(), fill);
    }

    pub fn stop(&self, id: &SnapshotId) {
        self.fills.borrow_mut().remove(id);
        self.ahead.borrow_mut().remove(id);
    }

    /// Waits for it. Whether all is there.
    pub async fn end(&self, id: &SnapshotId) -> bool {
        let fill = self.fills.borrow_mut().remove(id);
        match fill {
            Some(fill) => fill.end().await.is_some(),
            None => false,
        }
    }

    /// A child of this complete snapshot will be started: its data is copied now, for then it would be waited for.
    pub fn expect(&self, store: &Store, parent: &SnapshotId) {
        let (dir, path) = (store.dir_of::<SnapshotRecord>(), store.data::<SnapshotRecord>(&parent.0));
        let copy = move |stop: &Cancelled| {
            let source = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
            copy::copy(&source, copy::length(&source)?, &dir, stop)
        };
        self.ahead.borrow_mut().entry(parent.clone()).or_insert_with(|| Work::begin(copy));
    }

    /// The copy that was made ahead, for one child.
    pub async fn expected(&self, parent: &SnapshotId) -> Option<Temp> {
        let copy = self.ahead.borrow_mut().remove(parent)?;
        copy.end().await
    }
}

/// Copies what the parent has and nobody has put. `turns`: somebody may put blocks meanwhile.
pub fn fill(store: &Store, id: &SnapshotId, put: &Put, turns: bool, stop: &Cancelled) -> Result<()> {
    let parent = parent_of(store, id)?;
    let target = data_of(store, id)?;
    let filled = copy::copy_between(&parent, &target, stop, &mut |range| {
        let blocks = (range.start / BLOCK as u64) as u32..range.end.div_ceil(BLOCK as u64) as u32;
        let turn = if turns { Some(put.turn(blocks.clone())?) } else { None };
        let entries = put.entries(blocks.clone())?;
        let kept = blocks.zip(entries).filter(|(_, entry)| *entry != Entry::Never);
        Ok((turn, kept.map(|(index, _)| within(index, &range)).collect()))
    });
    let dir = store.dir_of::<SnapshotRecord>();
    filled.map_err(|e| copy::full(e, &dir, copy::allocated(&parent)))
}

/// The part of a range that a block is.
fn within(index: u32, range: &Range<u64>) -> Range<u64> {
    let start = u64::from(index) * BLOCK as u64;
    start.max(range.start)..(start + BLOCK as u64).min(range.end)
}

/// The data that a pending snapshot is written over.
pub fn parent_of(store: &Store, id: &SnapshotId) -> Result<File> {
    let path = store.part::<SnapshotRecord>(&id.0, PARENT);
    File::open(&path).with_context(|| format!("opening {}", path.display()))
}

/// The data of a pending snapshot.
pub fn data_of(store: &Store, id: &SnapshotId) -> Result<File> {
    let path = store.data::<SnapshotRecord>(&id.0);
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
    options.open(&path).with_context(|| format!("opening {}", path.display()))
}
