//! Threads that read and hash a source's blocks, and hold no more of them than there is room for.

use super::upload::Source;
use crate::ids::Digest;
use anyhow::{Context as _, Result, anyhow};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

/// One waits for the disk while the other one hashes; more than four hash faster than EBS direct takes blocks.
const MOST_READERS: usize = 4;

/// A block that was read, and the room that it takes.
pub struct Block {
    pub index: u32,
    pub data: Arc<[u8]>,
    pub digest: Digest,
    pub room: Room,
}

/// Blocks as they are read. Dropping it stops the threads.
pub struct Feed {
    blocks: UnboundedReceiver<Result<Block>>,
    gate: Arc<Gate>,
}

/// How much more may be held, and whether anybody waits for it.
struct Gate {
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    free: usize,
    closed: bool,
}

/// Room for a block, until it is dropped.
pub struct Room(Arc<Gate>);

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.freed.notify_all();
    }

    /// Waits for room. `None`: nobody wants it any more.
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

impl Drop for Feed {
    fn drop(&mut self) {
        self.gate.close();
    }
}

impl Feed {
    pub fn start(source: Arc<dyn Source>, room: usize) -> Result<Self> {
        let gate =
            Arc::new(Gate { state: Mutex::new(State { free: room, closed: false }), freed: Condvar::new() });
        let (sender, blocks) = unbounded_channel();
        let feed = Self { blocks, gate: gate.clone() };
        spawn(move || lead(&source, &gate, &sender))?;
        Ok(feed)
    }

    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Block>>> {
        self.blocks.poll_recv(cx)
    }
}

/// How many threads read a local source.
pub fn readers() -> usize {
    thread::available_parallelism().map_or(2, |n| n.get().clamp(2, MOST_READERS))
}

/// Lists the source's blocks, and reads them with others.
fn lead(source: &Arc<dyn Source>, gate: &Arc<Gate>, sender: &UnboundedSender<Result<Block>>) {
    let read = |indexes: &[u32], next: &AtomicUsize| {
        while let Some(room) = gate.take() {
            let Some(&index) = indexes.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let read = source.block(index).with_context(|| format!("reading block {index}"))?;
            let Some((data, digest)) = read else { continue };
            if sender.send(Ok(Block { index, data, digest, room })).is_err() {
                break;
            }
        }
        Ok(())
    };
    let tell = |result: Result<()>| {
        if let Err(error) = result {
            // Before it is told: whoever hears of it may wait for the other threads.
            gate.close();
            _ = sender.send(Err(error));
        }
        Ok(())
    };
    let all = || {
        let (indexes, next) = (source.indexes(), AtomicUsize::new(0));
        each_of(readers(), || tell(caught(|| read(&indexes, &next))))
    };
    _ = tell(caught(all));
}

/// Does the same in several threads, and answers with the first failure.
pub fn each_of(threads: usize, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            // With fewer it only takes longer.
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

/// A panic of a thread must end what waits for it, and never look like its end.
fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(anyhow!("a thread that reads blocks panicked")))
}

/// A thread that nobody joins: at the end of the process it may still wait for a disk or for the network.
fn spawn(work: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name("oven-blocks".into()).spawn(work).context("starting a thread")?;
    Ok(())
}

/// Runs work in a thread. Dropping the future leaves it to its end.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, receiver) = oneshot::channel();
    spawn(move || _ = sender.send(caught(work)))?;
    receiver.await.context("waiting for a thread")?
}

/// The same for work that asks now and then whether anybody still waits for it.
pub async fn beside_until_dropped<T: Send + 'static>(
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
    beside(move || work(&stop)).await
}
