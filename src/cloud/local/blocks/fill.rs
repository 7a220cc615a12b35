//! A parent's data on its way into a pending snapshot.

use super::super::records::{PARENT, SnapshotRecord, Store};
use super::super::written::{Entry, Put};
use crate::cloud::SnapshotId;
use crate::cloud::blocks::BLOCK;
use crate::disk::copy::{self, Cancelled};
use anyhow::{Context, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use tokio::task::JoinHandle;

/// Parents' data on its way into pending snapshots, each in a thread of its own.
#[derive(Debug, Default)]
pub struct Fills(RefCell<BTreeMap<SnapshotId, Fill>>);

#[derive(Debug)]
struct Fill {
    stop: Cancelled,
    task: JoinHandle<Result<()>>,
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Fills {
    pub fn begin(&self, store: &Store, id: &SnapshotId) {
        let stop = Cancelled::default();
        let (store, of, cancelled) = (store.clone(), id.clone(), stop.clone());
        let task = tokio::task::spawn_blocking(move || {
            let Some(put) = Put::open(&store, &of)? else { return Ok(()) };
            fill(&store, &of, &put, true, &cancelled)
        });
        self.0.borrow_mut().insert(id.clone(), Fill { stop, task });
    }

    pub fn stop(&self, id: &SnapshotId) {
        self.0.borrow_mut().remove(id);
    }

    /// Waits for it. Whether all is there; if not, why does not matter: it has to be done once more.
    pub async fn end(&self, id: &SnapshotId) -> bool {
        let fill = self.0.borrow_mut().remove(id);
        match fill {
            Some(mut fill) => matches!((&mut fill.task).await, Ok(Ok(()))),
            None => false,
        }
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
