//! Reads snapshots, and compares them with the uploaded data or writes them to a file.

use super::readers::{run_in_threads, run_until_dropped};
use crate::cloud::block_api::{BlockApi, SnapshotContents, SnapshotReader};
use crate::error::Kind;
use crate::ids::SnapshotId;
use crate::ids::digest_of;
use crate::ids::{BLOCK, Digest};
use crate::sys::sparse_copy::nonzero_runs;
use crate::trace::Track;
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The maximum number of concurrent reads. More reads would not be faster, because the client of EBS direct sends at
/// most this number of reads concurrently. Each read needs the memory of one block.
const READERS: usize = 96;

/// The interval of progress reports.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Calls `work` for each item on several threads, until one call fails.
async fn for_each<T: Send + Sync + 'static>(
    all: Vec<T>,
    work: impl Fn(&T) -> Result<()> + Send + Sync + 'static,
) -> Result<()> {
    let counter = Track::here().counter("blocks read");
    run_until_dropped(move |dropped| {
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        run_in_threads(READERS.min(all.len()), || {
            while !dropped.load(Ordering::Relaxed) && !failed.load(Ordering::Relaxed) {
                let Some(item) = all.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                work(item).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
                counter.add(1);
            }
            Ok(())
        })
    })
    .await
}

fn read(reader: &dyn SnapshotReader, snapshot: &SnapshotId, index: u32) -> Result<(Vec<u8>, Digest)> {
    let (data, digest) = reader.read(index)?;
    if data.len() != BLOCK {
        let text = format!("block {index} of {snapshot} has {} bytes instead of {BLOCK}", data.len());
        return Err(Kind::Cloud.error(text));
    }
    Ok((data, digest))
}

/// The expected content of a block.
enum Expected {
    Uploaded(Digest),
    FromParent,
    /// The block was neither uploaded nor inherited, so it must be zeros.
    Zeros,
}

/// Reads a snapshot back. Fails if an uploaded block differs from the uploaded data, or if any other block differs from
/// the parent's block. A block that the parent does not have must be zeros. The error names the block and the snapshot.
pub async fn verify(
    blocks: &dyn BlockApi,
    snapshot: &SnapshotId,
    sent: &BTreeMap<u32, Digest>,
    parent: Option<&SnapshotId>,
) -> Result<()> {
    verify_with_progress(blocks, snapshot, sent, parent, &|_, _| ()).await
}

/// Like [`verify`], but calls `on_progress` regularly with the number of bytes verified and the total.
pub async fn verify_with_progress(
    blocks: &dyn BlockApi,
    snapshot: &SnapshotId,
    sent: &BTreeMap<u32, Digest>,
    parent: Option<&SnapshotId>,
    on_progress: &dyn Fn(u64, u64),
) -> Result<()> {
    let existing = blocks.contents(snapshot).await?.blocks;
    let reader = blocks.reader(snapshot).await?;
    let mut expected: Vec<(u32, Expected)> =
        sent.iter().map(|(index, digest)| (*index, Expected::Uploaded(*digest))).collect();
    let mut parents = None;
    if let Some(parent) = parent {
        let parent_blocks = blocks.contents(parent).await?.blocks;
        let others = parent_blocks.iter().filter(|index| !sent.contains_key(index));
        expected.extend(others.map(|index| (index, Expected::FromParent)));
        parents = Some((parent.clone(), blocks.reader(parent).await?, parent_blocks));
    }
    let is_expected = |index: &u32| {
        sent.contains_key(index)
            || parents.as_ref().is_some_and(|(.., parent_blocks)| parent_blocks.contains(*index))
    };
    let others = existing.iter().filter(|index| !is_expected(index));
    expected.extend(others.map(|index| (index, Expected::Zeros)));
    let parents = parents.map(|(parent, reader, _)| (parent, reader));
    let (snapshot, zeros) = (snapshot.clone(), digest_of(&[0; BLOCK]));
    let (all, done) = (expected.len(), Arc::new(AtomicUsize::new(0)));
    let count = done.clone();
    let verifying = for_each(expected, move |(index, expected)| {
        let (expected, what) = match (expected, &parents) {
            (Expected::Uploaded(digest), _) => (*digest, "the uploaded block".to_owned()),
            (Expected::FromParent, Some((parent, reader))) => {
                (read(&**reader, parent, *index)?.1, format!("the block of its parent {parent}"))
            }
            (Expected::FromParent, None) | (Expected::Zeros, _) => {
                (zeros, "zeros, although oven never wrote it".to_owned())
            }
        };
        // A block that the snapshot does not have reads as zeros.
        let actual = if existing.contains(*index) { read(&*reader, &snapshot, *index)?.1 } else { zeros };
        if actual == expected {
            count.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        let absent = if existing.contains(*index) { "" } else { ", because it is missing" };
        Err(Kind::Cloud.error(format!("block {index} of {snapshot} differs from {what}{absent}")))
    });
    report_until_done(verifying, &done, all, on_progress).await
}

/// Writes a snapshot to a file, and replaces the file's old content. Zeros in the snapshot become holes in the file.
/// Each block is verified against its digest.
pub async fn download(blocks: &dyn BlockApi, snapshot: &SnapshotId, into: &File) -> Result<SnapshotContents> {
    download_with_progress(blocks, snapshot, into, &|_, _| ()).await
}

/// Like [`download`], but calls `on_progress` regularly with the number of bytes read and the total.
pub async fn download_with_progress(
    blocks: &dyn BlockApi,
    snapshot: &SnapshotId,
    into: &File,
    on_progress: &dyn Fn(u64, u64),
) -> Result<SnapshotContents> {
    let contents = contents(blocks, snapshot).await?;
    let reader = blocks.reader(snapshot).await?;
    let size = contents.size_gib << 30;
    // An empty file is not truncated, because ext4 writes a truncated file completely to the disk when it is closed.
    let is_empty = into.metadata().context("inspecting the file")?.len() == 0;
    let emptied = if is_empty { Ok(()) } else { into.set_len(0) };
    emptied.and_then(|()| into.set_len(size)).context("setting the size of the file")?;
    let file = into.try_clone().context("duplicating a descriptor")?;
    let (all, snapshot) = (contents.blocks.iter().collect(), snapshot.clone());
    let done = Arc::new(AtomicUsize::new(0));
    let count = done.clone();
    let reading = for_each(all, move |index| {
        let (data, _) = read(&*reader, &snapshot, *index)?;
        let start = u64::from(*index) * BLOCK as u64;
        nonzero_runs(&data, &mut |at, data| Ok(file.write_all_at(data, start + at as u64)?))
            .with_context(|| format!("writing block {index} of {snapshot} to the file"))?;
        count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    });
    report_until_done(reading, &done, contents.blocks.len() as usize, on_progress).await?;
    Ok(contents)
}

/// Returns the list of a snapshot's blocks. Fails if a block is beyond the end of the disk.
async fn contents(blocks: &dyn BlockApi, snapshot: &SnapshotId) -> Result<SnapshotContents> {
    let contents = blocks.contents(snapshot).await?;
    let size = contents.size_gib << 30;
    if contents.blocks.max().is_some_and(|last| (u64::from(last) + 1) * BLOCK as u64 > size) {
        let text = format!("{snapshot} has blocks beyond its size of {} GiB", contents.size_gib);
        return Err(Kind::Cloud.error(text));
    }
    Ok(contents)
}

/// Waits for `work`, and calls `on_progress` regularly. `done` is the number of blocks done so far.
async fn report_until_done(
    work: impl Future<Output = Result<()>>,
    done: &AtomicUsize,
    all: usize,
    on_progress: &dyn Fn(u64, u64),
) -> Result<()> {
    let bytes = |blocks: usize| (blocks * BLOCK) as u64;
    let (mut work, mut ticks) = (pin!(work), tokio::time::interval(PROGRESS_INTERVAL));
    loop {
        tokio::select! {
            biased;
            result = &mut work => break result?,
            _ = ticks.tick() => on_progress(bytes(done.load(Ordering::Relaxed)), bytes(all)),
        }
    }
    on_progress(bytes(all), bytes(all));
    Ok(())
}

/// Writes a snapshot to a stream, such as a pipe, from its first byte to its last, with all its zeros. Each block is
/// verified before it is written. If this fails, a part of the disk was already written.
pub async fn download_in_order(
    blocks: &dyn BlockApi,
    snapshot: &SnapshotId,
    into: &File,
    on_progress: &dyn Fn(u64, u64),
) -> Result<SnapshotContents> {
    let contents = contents(blocks, snapshot).await?;
    let reader = blocks.reader(snapshot).await?;
    let stream = into.try_clone().context("duplicating a descriptor")?;
    let (all, id): (Vec<u32>, _) = (contents.blocks.iter().collect(), snapshot.clone());
    let end = (contents.size_gib << 30) / BLOCK as u64;
    let done = Arc::new(AtomicUsize::new(0));
    let count = done.clone();
    let writing = run_until_dropped(move |dropped| {
        let zeros = vec![0; BLOCK];
        let write = |data: &[u8]| write_to_stream(&stream, data, dropped);
        let mut next = 0;
        for batch in all.chunks(READERS) {
            let data = read_batch(&*reader, &id, batch, dropped)?;
            for (index, data) in batch.iter().map(|index| u64::from(*index)).zip(data) {
                (next..index).try_for_each(|_| write(&zeros))?;
                write(&data)?;
                next = index + 1;
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
        (next..end).try_for_each(|_| write(&zeros))
    });
    report_until_done(writing, &done, contents.blocks.len() as usize, on_progress).await?;
    Ok(contents)
}

/// Reads some blocks concurrently, and returns their data in the same order.
fn read_batch(
    reader: &dyn SnapshotReader,
    snapshot: &SnapshotId,
    indexes: &[u32],
    dropped: &AtomicBool,
) -> Result<Vec<Vec<u8>>> {
    let (next, data) = (AtomicUsize::new(0), Mutex::new(vec![Vec::new(); indexes.len()]));
    run_in_threads(indexes.len(), || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(index) = indexes.get(at) else { return Ok(()) };
            if dropped.load(Ordering::Relaxed) {
                return Err(Kind::Interrupted.error("stopped"));
            }
            let block = read(reader, snapshot, *index)?.0;
            data.lock().unwrap_or_else(PoisonError::into_inner)[at] = block;
        }
    })?;
    Ok(data.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// How long a thread waits for a stream before it checks whether it was cancelled.
const STREAM_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// If a pipe is ready, it takes at least this many bytes without blocking (PIPE_BUF).
const PIPE_CHUNK: usize = 4096;

/// Writes to a stream. Never blocks for long, so that a reader that has stopped cannot delay the end of this process.
fn write_to_stream(stream: &File, mut data: &[u8], dropped: &AtomicBool) -> Result<()> {
    while !data.is_empty() {
        if dropped.load(Ordering::Relaxed) {
            return Err(Kind::Interrupted.error("stopped"));
        }
        let mut ready = [PollFd::new(stream, PollFlags::OUT)];
        match poll(&mut ready, Some(&STREAM_WAIT)) {
            Ok(0) | Err(Errno::INTR) => continue,
            ready => _ = ready.context("waiting for standard output")?,
        }
        match rustix::io::write(stream, &data[..data.len().min(PIPE_CHUNK)]) {
            Ok(written) => data = &data[written..],
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(Errno::PIPE) => {
                let what = "the program that reads standard output ended before it had read the whole disk";
                return Err(Kind::Machine.error(what));
            }
            Err(error) => return Err(error).context("writing to standard output"),
        }
    }
    Ok(())
}
