//! Step 5: takes a snapshot of the disk.

use super::Bake;
use crate::disk::Disk;
use crate::ids::SnapshotId;
use crate::undo::Undo;
use anyhow::{Context, Result};
use std::rc::Rc;

/// The phase and the title of the step.
pub const SNAPSHOT: (&str, &str) = ("snapshot", "taking the snapshot");

/// Takes the snapshot. This consumes the disk, so it compiles only if no [`Root`](crate::mount::Root) borrows the disk.
pub async fn snapshot(bake: &Bake<'_>, disk: Box<dyn Disk>, undo: &Rc<Undo>) -> Result<SnapshotId> {
    let step = bake.site.report.step(SNAPSHOT.0, SNAPSHOT.1);
    let on_progress = |done, all| step.progress(done, all);
    let snapshot = step.follow(disk.commit(undo, &on_progress)).await.context(SNAPSHOT.1)?;
    step.done();
    Ok(snapshot)
}
