//! Reads the snapshot back, and compares it with the raw disk.

use super::Import;
use crate::ids::{Digest, SnapshotId};
use crate::transfer::download;
use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// Verifies the snapshot if the user gave `--verify`.
pub async fn snapshot(
    import: &Import<'_>,
    snapshot: &SnapshotId,
    digests: &BTreeMap<u32, Digest>,
) -> Result<()> {
    let Import { site, wanted, .. } = import;
    if !wanted.verify {
        return Ok(());
    }
    let step = site.report.step("verify", format!("verifying {snapshot}"));
    let on_progress = |done, all| step.progress(done, Some(all));
    download::verify_with_progress(&*site.blocks, snapshot, digests, None, &on_progress)
        .await
        .context("comparing the snapshot with the raw disk")?;
    step.done();
    Ok(())
}
