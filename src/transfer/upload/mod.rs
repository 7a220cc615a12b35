//! Uploads snapshots block by block, concurrently and with little memory.

#[cfg(test)]
mod tests;

use crate::cloud::block_api::{BlockApi, NewSnapshot, SnapshotExpired};
use crate::ids::{BLOCK, Digest};
use crate::ids::{RunId, SnapshotId};
use crate::trace::Track;
use crate::transfer::readers::BlockSource;
use crate::transfer::readers::{BlockCount, BlockFeed, ReadBlock};
use crate::undo;
use crate::undo::{Debt, Due};
use anyhow::{Context, Result};
use futures_util::stream::{self, TryStreamExt};
use sha2::{Digest as _, Sha256};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::Arc;

/// The maximum number of blocks in memory (24 MiB). These blocks are being read, queued or being sent. EBS direct
/// accepts fewer than 1000 puts a second for one snapshot, so more blocks would help only if a put took longer than 48
/// ms.
pub const MAX_BLOCKS_IN_MEMORY: usize = 48;

/// A complete snapshot, and the blocks that were uploaded to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UploadedSnapshot {
    pub snapshot: SnapshotId,
    pub blocks: BTreeMap<u32, Digest>,
}

/// Gets the number of bytes that are done, and of all bytes if it is known.
pub type OnProgress<'a> = &'a dyn Fn(u64, Option<u64>);

/// Uploads a source as a snapshot and returns when the snapshot is complete. `on_progress` gets the number of bytes
/// that were uploaded or need no upload. If the snapshot expires because the upload took too long, the snapshot is
/// deleted, and the source is uploaded once more. Register the clean-up action for the snapshots of `spec.run` before this call. Dropping the
/// future stops the reading threads.
pub async fn upload(
    blocks: &dyn BlockApi,
    spec: &NewSnapshot,
    source: Arc<dyn BlockSource>,
    on_progress: OnProgress<'_>,
) -> Result<UploadedSnapshot> {
    upload_started(blocks, spec, blocks.start(spec), source, on_progress).await
}

/// Like [`upload`], but the caller already starts the snapshot. `started` is the future that returns the snapshot's id.
pub async fn upload_started(
    blocks: &dyn BlockApi,
    spec: &NewSnapshot,
    started: impl Future<Output = Result<SnapshotId>>,
    source: Arc<dyn BlockSource>,
    on_progress: OnProgress<'_>,
) -> Result<UploadedSnapshot> {
    let error = match try_upload(blocks, started, source.clone(), on_progress).await {
        Err(error) if error.chain().any(|cause| cause.is::<SnapshotExpired>()) => error,
        result => return result,
    };
    // The expired snapshot is removed now. The clean-up action would not remove it, because the action is cancelled
    // when the second snapshot becomes an image.
    let cleaned = blocks.ensure_no_snapshots(&spec.run).await;
    cleaned.with_context(|| {
        format!("removing the expired snapshot before a second attempt, after this error: {error:#}")
    })?;
    on_progress(0, None);
    try_upload(blocks, blocks.start(spec), source, on_progress)
        .await
        .with_context(|| format!("uploading all blocks again, after this error: {error:#}"))
}

/// Returns the digests of a source's blocks without uploading them.
pub async fn digests(source: Arc<dyn BlockSource>) -> Result<BTreeMap<u32, Digest>> {
    digests_with_progress(source, &|_, _| ()).await
}

/// Like [`digests`], but calls `on_progress` with the number of bytes read and the total.
pub async fn digests_with_progress(
    source: Arc<dyn BlockSource>,
    on_progress: OnProgress<'_>,
) -> Result<BTreeMap<u32, Digest>> {
    let mut feed = BlockFeed::start(source.clone(), MAX_BLOCKS_IN_MEMORY)?;
    let mut all = Vec::new();
    while let Some(block) = poll_fn(|cx| feed.poll_next(cx)).await {
        let ReadBlock { index, digest, .. } = block?;
        all.push((index, digest));
        report(feed.count(), all.len(), on_progress);
    }
    ensure_unchanged_source(source, all).await
}

/// Checks that the source is unchanged, and returns the digests in the order of the block indexes.
async fn ensure_unchanged_source(
    source: Arc<dyn BlockSource>,
    all: Vec<(u32, Digest)>,
) -> Result<BTreeMap<u32, Digest>> {
    crate::transfer::readers::run_in_thread(move || {
        let all = all.into_iter().collect();
        source.ensure_unchanged(&all)?;
        Ok(all)
    })
    .await
}

/// Reports the blocks that are done, and the blocks of zeros that were skipped.
fn report(count: &BlockCount, done: usize, on_progress: OnProgress<'_>) {
    let bytes = |blocks: usize| blocks as u64 * BLOCK as u64;
    on_progress(bytes(done + count.skipped()), count.all().map(bytes));
}

async fn try_upload(
    blocks: &dyn BlockApi,
    started: impl Future<Output = Result<SnapshotId>>,
    source: Arc<dyn BlockSource>,
    on_progress: OnProgress<'_>,
) -> Result<UploadedSnapshot> {
    let snapshot = started.await?;
    let sent = put_all(blocks, &snapshot, source.clone(), on_progress).await?;
    let sent = ensure_unchanged_source(source, sent).await?;
    let mut linear = Sha256::new();
    sent.values().for_each(|digest| linear.update(digest));
    let count = u32::try_from(sent.len()).context("counting blocks")?;
    blocks.complete(&snapshot, count, linear.finalize().into()).await?;
    Ok(UploadedSnapshot { snapshot, blocks: sent })
}

async fn put_all(
    blocks: &dyn BlockApi,
    snapshot: &SnapshotId,
    source: Arc<dyn BlockSource>,
    on_progress: OnProgress<'_>,
) -> Result<Vec<(u32, Digest)>> {
    let mut feed = BlockFeed::start(source, MAX_BLOCKS_IN_MEMORY)?;
    let (sent, counter) = (RefCell::new(Vec::new()), Track::here().counter("blocks sent"));
    let count = feed.count().clone();
    let put = async |block: ReadBlock| {
        let ReadBlock { index, data, digest, room } = block;
        blocks.put(snapshot, index, data, digest).await?;
        drop(room);
        sent.borrow_mut().push((index, digest));
        counter.add(1);
        report(&count, sent.borrow().len(), on_progress);
        Ok(())
    };
    // No limit is set here, because the feed limits the number of blocks.
    stream::poll_fn(|cx| feed.poll_next(cx)).try_for_each_concurrent(None, put).await?;
    Ok(sent.into_inner())
}

/// Returns the clean-up action that removes all snapshots of the run. Register it before a snapshot is started.
pub fn snapshot_debt(blocks: Rc<dyn BlockApi>, run: &RunId) -> Debt {
    let of_run = run.clone();
    Debt {
        due: Due::OnFailure,
        what: format!("the snapshot of run {run}"),
        command: undo::sweep_command(run),
        pay: Box::new(move || Box::pin(async move { blocks.ensure_no_snapshots(&of_run).await })),
        keep: None,
    }
}
