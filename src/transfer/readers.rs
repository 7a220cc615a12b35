//! Threads that read and hash a source's blocks, with a limit on the blocks in memory.

use crate::ids::Digest;
use crate::sys::lock::lock_mutex;
use anyhow::{Context as _, Result, anyhow};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

/// The source of an upload. Several threads read it concurrently. The runtime's thread never reads it, so a read may
/// block.
pub trait BlockSource: Send + Sync + 'static {
    /// Returns the indexes of blocks that may have to be uploaded, ascending.
    fn indexes(&self) -> Vec<u32>;

    /// Returns a complete block with its digest, or `None` if the block need not be uploaded.
    fn block(&self, index: u32) -> Result<Option<(Arc<[u8]>, Digest)>>;

    /// Fails if the source changed after its blocks were read. This method is called after the last block was read and
    /// before the snapshot is completed. A source to which nobody else can write needs no check.
    fn ensure_unchanged(&self, _sent: &BTreeMap<u32, Digest>) -> Result<()> {
        Ok(())
    }
}

/// The maximum number of threads. While one thread waits for the disk, another one hashes. More than four threads would
/// hash faster than EBS direct accepts blocks.
const MAX_READERS: usize = 4;

/// A block that was read, and the [`Room`] that it takes in memory.
pub struct ReadBlock {
    pub index: u32,
    pub data: Arc<[u8]>,
    pub digest: Digest,
    pub room: Room,
}

/// A stream of blocks. Dropping the stream stops the threads that read the blocks.
pub struct BlockFeed {
    blocks: UnboundedReceiver<Result<ReadBlock>>,
    gate: Arc<Gate>,
    count: Arc<BlockCount>,
}

/// Counts the blocks of a source while they are read.
#[derive(Debug, Default)]
pub struct BlockCount {
    /// The number of all blocks, and 1 more. 0 if it is not known yet.
    all: AtomicUsize,
    skipped: AtomicUsize,
}

impl BlockCount {
    /// The number of all blocks that may have to be uploaded, when the source has listed them.
    pub fn all(&self) -> Option<usize> {
        self.all.load(Ordering::Relaxed).checked_sub(1)
    }

    /// The number of blocks that were read but need not be uploaded.
    pub fn skipped(&self) -> usize {
        self.skipped.load(Ordering::Relaxed)
    }
}

/// Counts how many more blocks may be in memory.
struct Gate {
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    free: usize,
    closed: bool,
}

/// Room for one block in memory. Dropping this value makes room for another block.
pub struct Room(Arc<Gate>);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock_mutex(&self.state)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.freed.notify_all();
    }

    /// Waits for room. Returns `None` if the feed was dropped or a read failed.
    fn take(self: &Arc<Self>) -> Option<Room> {
        let full = |state: &mut State| state.free == 0 && !state.closed;
        let mut state = self.freed.wait_while(self.lock(), full).unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        state.free -= 1;
        Some(Room(self.clone()))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.0.lock().free += 1;
        self.0.freed.notify_one();
    }
}

impl Drop for BlockFeed {
    fn drop(&mut self) {
        self.gate.close();
    }
}

impl BlockFeed {
    pub fn start(source: Arc<dyn BlockSource>, room: usize) -> Result<Self> {
        let gate =
            Arc::new(Gate { state: Mutex::new(State { free: room, closed: false }), freed: Condvar::new() });
        let (sender, blocks) = unbounded_channel();
        let count = Arc::<BlockCount>::default();
        let feed = Self { blocks, gate: gate.clone(), count: count.clone() };
        spawn(move || read_all(&source, &gate, &sender, &count))?;
        Ok(feed)
    }

    pub fn count(&self) -> &Arc<BlockCount> {
        &self.count
    }

    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<ReadBlock>>> {
        self.blocks.poll_recv(cx)
    }
}

/// Returns the number of threads that read a local source.
pub fn reader_count() -> usize {
    thread::available_parallelism().map_or(2, |n| n.get().clamp(2, MAX_READERS))
}

/// Lists the source's blocks and reads them on several threads.
fn read_all(
    source: &Arc<dyn BlockSource>,
    gate: &Arc<Gate>,
    sender: &UnboundedSender<Result<ReadBlock>>,
    count: &BlockCount,
) {
    let read = |indexes: &[u32], next: &AtomicUsize| {
        while let Some(room) = gate.take() {
            let Some(&index) = indexes.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let read = source.block(index).with_context(|| format!("reading block {index}"))?;
            let Some((data, digest)) = read else {
                count.skipped.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            if sender.send(Ok(ReadBlock { index, data, digest, room })).is_err() {
                break;
            }
        }
        Ok(())
    };
    let report_error = |result: Result<()>| {
        if let Err(error) = result {
            // The gate is closed first, because the receiver of the error may wait for the other threads.
            gate.close();
            _ = sender.send(Err(error));
        }
        Ok(())
    };
    let all = || {
        let (indexes, next) = (source.indexes(), AtomicUsize::new(0));
        count.all.store(indexes.len() + 1, Ordering::Relaxed);
        run_in_threads(reader_count(), || report_error(catch_panic(|| read(&indexes, &next))))
    };
    _ = report_error(catch_panic(all));
}

/// Runs the same work on several threads. Returns the first error.
pub fn run_in_threads(threads: usize, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            // If a thread cannot be started, the work only takes longer.
            .filter_map(|_| thread::Builder::new().name("oven-blocks".into()).spawn_scoped(scope, &work).ok())
            .collect();
        if all.is_empty() {
            return work();
        }
        let ended: Vec<_> =
            all.into_iter().map(|one| one.join().unwrap_or_else(|panic| resume_unwind(panic))).collect();
        ended.into_iter().collect()
    })
}

/// Converts a panic to an error. Without the conversion, the receiver would take a panic for the end of the blocks.
fn catch_panic<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(anyhow!("a thread that reads blocks panicked")))
}

/// Starts a thread that is never joined, because it may still be waiting for a disk or the network when the process
/// ends.
fn spawn(work: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name("oven-blocks".into()).spawn(work).context("starting a thread")?;
    Ok(())
}

/// Runs work on a thread. Dropping the future does not stop the work.
pub async fn run_in_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = oneshot::channel();
    spawn(move || _ = sender.send(catch_panic(work)))?;
    receiver.await.context("waiting for a thread")?
}

/// Like [`run_in_thread`], for work that checks a flag regularly. The flag becomes true when the future is dropped.
pub async fn run_until_dropped<T: Send + 'static>(
    work: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static,
) -> Result<T> {
    struct OnDrop(Arc<AtomicBool>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = Arc::new(AtomicBool::new(false));
    let _guard = OnDrop(stop.clone());
    run_in_thread(move || work(&stop)).await
}
