//! Snapshots sent to the cloud block by block, read back, and downloaded: side by side, in little memory.

#[cfg(test)]
mod tests;

use crate::cloud::block_api::{Blocks, Expired, NewSnapshot};
use crate::ids::{BLOCK, Digest};
use crate::ids::{RunId, SnapshotId};
use crate::trace::Track;
use crate::transfer::readers::{Block, Feed};
use crate::transfer::together::together;
use crate::undo;
use crate::undo::{Debt, Due};
use anyhow::{Context, Result};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Context as Task;

/// Blocks in memory at a time: those that are read, those that wait, and those on their way. 24 MiB. EBS direct takes
/// fewer than 1000 puts a second for one snapshot, so that more would only help where a put takes longer than 48 ms.
pub const IN_MEMORY: usize = 48;

/// What is to be sent. Read by several threads at once, beside the runtime's.
pub trait Source: Send + Sync + 'static {
    /// Candidates, ascending.
    fn indexes(&self) -> Vec<u32>;

    /// A block, whole, and its digest; `None`: it is not to be sent.
    fn block(&self, index: u32) -> Result<Option<(Arc<[u8]>, Digest)>>;

    /// Fails if what was sent is not what is there: asked once all is sent, before the snapshot is sealed. Where nobody
    /// else can write, there is nothing to ask.
    fn ensure_unchanged(&self, _sent: &BTreeMap<u32, Digest>) -> Result<()> {
        Ok(())
    }
}

/// A snapshot that is complete, and the blocks that were written to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    pub snapshot: SnapshotId,
    pub blocks: BTreeMap<u32, Digest>,
}

/// Makes a snapshot of a source, and answers when it is complete. `on_progress` is told how many bytes were sent so far.
/// One that the cloud gave up, because it took too long, is deleted and sent once more. The debt for the snapshots of
/// `spec.run` is owed already. Dropping the future stops the threads that read.
pub async fn upload(
    blocks: &dyn Blocks,
    spec: &NewSnapshot,
    source: Arc<dyn Source>,
    on_progress: &dyn Fn(u64),
) -> Result<Sent> {
    upload_started(blocks, spec, blocks.start(spec), source, on_progress).await
}

/// The same, where the snapshot was started before: `started` answers with it.
pub async fn upload_started(
    blocks: &dyn Blocks,
    spec: &NewSnapshot,
    started: impl Future<Output = Result<SnapshotId>>,
    source: Arc<dyn Source>,
    on_progress: &dyn Fn(u64),
) -> Result<Sent> {
    let error = match once(blocks, started, source.clone(), on_progress).await {
        Err(error) if error.chain().any(|cause| cause.is::<Expired>()) => error,
        result => return result,
    };
    // Now, and not by the debt: that is forgiven once the other one is an image.
    let cleaned = blocks.ensure_no_snapshots(&spec.run).await;
    cleaned.with_context(|| format!("making room for another attempt, for {error:#}"))?;
    on_progress(0);
    once(blocks, blocks.start(spec), source, on_progress)
        .await
        .with_context(|| format!("sending all once more, for {error:#}"))
}

/// The digests of a source's blocks, where nothing is to be sent.
pub async fn digests(source: Arc<dyn Source>) -> Result<BTreeMap<u32, Digest>> {
    let mut feed = Feed::start(source.clone(), IN_MEMORY)?;
    let mut all = Vec::new();
    while let Some(block) = poll_fn(|cx| feed.poll_next(cx)).await {
        let Block { index, digest, .. } = block?;
        all.push((index, digest));
    }
    unchanged(source, all).await
}

/// In order, if that is still what is there.
async fn unchanged(source: Arc<dyn Source>, all: Vec<(u32, Digest)>) -> Result<BTreeMap<u32, Digest>> {
    crate::transfer::readers::beside(move || {
        let all = all.into_iter().collect();
        source.ensure_unchanged(&all)?;
        Ok(all)
    })
    .await
}

async fn once(
    blocks: &dyn Blocks,
    started: impl Future<Output = Result<SnapshotId>>,
    source: Arc<dyn Source>,
    on_progress: &dyn Fn(u64),
) -> Result<Sent> {
    let snapshot = started.await?;
    let sent = put_all(blocks, &snapshot, source.clone(), on_progress).await?;
    let sent = unchanged(source, sent).await?;
    let mut linear = Sha256::new();
    sent.values().for_each(|digest| linear.update(digest));
    let count = u32::try_from(sent.len()).context("counting blocks")?;
    blocks.complete(&snapshot, count, linear.finalize().into()).await?;
    Ok(Sent { snapshot, blocks: sent })
}

async fn put_all(
    blocks: &dyn Blocks,
    snapshot: &SnapshotId,
    source: Arc<dyn Source>,
    on_progress: &dyn Fn(u64),
) -> Result<Vec<(u32, Digest)>> {
    let put = |block: Block| async move {
        let Block { index, data, digest, room } = block;
        let put = blocks.put(snapshot, index, data, digest).await;
        drop(room);
        put.map(|()| (index, digest))
    };
    let mut feed = Feed::start(source, IN_MEMORY)?;
    let (mut sent, counter) = (Vec::new(), Track::here().counter("blocks sent"));
    let next = |cx: &mut Task<'_>| feed.poll_next(cx);
    let done = |put: (u32, Digest)| {
        sent.push(put);
        counter.add(1);
        on_progress(sent.len() as u64 * BLOCK as u64);
    };
    together(next, put, done).await?;
    Ok(sent)
}

/// Owed before a snapshot is started: that the run leaves none.
pub fn debt(blocks: Rc<dyn Blocks>, run: &RunId) -> Debt {
    let of = run.clone();
    Debt {
        due: Due::OnFailure,
        what: format!("the snapshot of run {run}"),
        command: undo::sweep_command(run),
        pay: Box::new(move || Box::pin(async move { blocks.ensure_no_snapshots(&of).await })),
        keep: None,
    }
}
