//! Uploads the disk block by block to a snapshot.

use super::Import;
use crate::cloud::Tags;
use crate::cloud::block_api::NewSnapshot;
use crate::disk::with_owner_tags;
use crate::sys::sparse_copy::disk_name;
use crate::transfer::raw::RawDisk;
use crate::transfer::upload::{self, UploadedSnapshot};
use crate::undo::Undo;
use anyhow::{Context, Result};
use std::sync::Arc;

/// Uploads the disk, and registers the clean-up of its snapshot in `undo`.
pub async fn blocks(import: &Import<'_>, disk: &Arc<RawDisk>, undo: &Undo) -> Result<UploadedSnapshot> {
    let Import { site, wanted, run } = import;
    let spec = NewSnapshot {
        parent: None,
        size_gib: disk.size_gib(),
        description: wanted.description(),
        run: (*run).clone(),
        tags: with_owner_tags(&Tags::new(), run),
        encrypted: false,
        kms_key: None,
    };
    undo.owe(upload::snapshot_debt(site.blocks.clone(), run));
    let step = site.report.step("import", format!("uploading {}", disk_name(&wanted.raw)));
    let on_progress = |done, all| step.progress(done, all);
    let sent = upload::upload(&*site.blocks, &spec, disk.clone(), &on_progress).await;
    let sent = sent.with_context(|| format!("importing {}", disk_name(&wanted.raw)))?;
    step.done();
    Ok(sent)
}
