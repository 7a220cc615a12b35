//! Step 5: the disk becomes a snapshot.

use super::Bake;
use crate::disk::Disk;
use crate::ids::SnapshotId;
use crate::undo::Undo;
use anyhow::{Context, Result};
use std::rc::Rc;

/// Takes the snapshot. It consumes the disk, so that nothing can still have it mounted.
pub async fn snapshot(bake: &Bake<'_>, disk: Box<dyn Disk>, undo: &Rc<Undo>) -> Result<SnapshotId> {
    let step = bake.site.report.step("snapshot", "taking the snapshot");
    let on_progress = |bytes| step.progress(bytes, None);
    let snapshot = disk.commit(undo, &on_progress).await.context("taking the snapshot")?;
    step.done();
    Ok(snapshot)
}
