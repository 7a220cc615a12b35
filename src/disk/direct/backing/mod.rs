//! Provides the blocks of a base snapshot. A block is read from the cloud when it is first requested, or earlier if it
//! is prefetched.
//!
//! A block is ready when the `data` file of the block cache has it and this process has verified its digest. A separate
//! process, the disk's server, serves the disk (see the module `server`). It requests blocks over a socket. When a
//! block is ready, the server itself reads the block from the `data` file.

#[cfg(test)]
mod tests;

use super::block_cache::{BlockOrigin, CachedSnapshot, RESERVED_SPACE};
use super::fault::FirstFault;
use crate::cloud::block_api::{BlockIndexes, SnapshotContents, SnapshotReader};
use crate::error::Kind;
use crate::ids::SnapshotId;
use crate::ids::digest_of;
use crate::ids::{BLOCK, Digest};
use crate::sys::lock::lock_mutex;
use crate::trace::{Counter, Track};
use anyhow::{Context, Result};
use rustix::net::{RecvFlags, SendFlags};
use std::collections::{HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

/// The number of threads that read requested blocks. It equals the number of FUSE requests that the server handles
/// concurrently.
const READERS: usize = 16;
/// The number of concurrent prefetches. The first byte of a block arrives after about 20 ms, so 8 reads of 512 KiB keep
/// a network of 1 Gbit/s busy.
const PREFETCHERS: usize = 8;
/// If a requested block is not ready, this many blocks after it are prefetched, because most files are contiguous.
const READ_AHEAD: u32 = 4;

/// A request of the disk's server, or the reply to a request. A request has the index of a block and 0. A reply has the
/// index, and 0 or an errno.
pub type BlockMessage = (u32, i32);
/// If the server could not read or write the local file with the disk's changes, it sends this value instead of an
/// index.
pub const WRITE_FAILED: u32 = u32::MAX;

pub fn send(to: &OwnedFd, (index, errno): BlockMessage) -> rustix::io::Result<()> {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&index.to_le_bytes());
    bytes[4..].copy_from_slice(&errno.to_le_bytes());
    rustix::net::send(to, &bytes, SendFlags::NOSIGNAL).map(drop)
}

/// Receives a message. Returns `None` if the other side has closed the socket.
pub fn receive(from: &OwnedFd) -> Option<BlockMessage> {
    let mut bytes = [0; 8];
    loop {
        match rustix::net::recv(from, &mut bytes[..], RecvFlags::empty()) {
            Ok((8, _)) => break,
            Err(rustix::io::Errno::INTR) => {}
            _ => return None,
        }
    }
    let [index, errno] = [0, 4].map(|at| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Some((u32::from_le_bytes(index), i32::from_le_bytes(errno)))
}

/// The blocks of a base snapshot.
pub struct BackingStore {
    snapshot: SnapshotId,
    blocks: BlockIndexes,
    reader: Arc<dyn SnapshotReader>,
    cached: CachedSnapshot,
    /// The requested blocks, as a list in the order of the first requests, and as a set. The next bake of a definition
    /// with the same `name` will probably need the same blocks.
    used: Mutex<(Vec<u32>, HashSet<u32>)>,
    prefetch_queue: Mutex<PrefetchQueue>,
    queue_changed: Condvar,
    /// The first error that occurred when a block was read or a change was stored. The file system on the disk only
    /// gets an I/O error.
    trouble: FirstFault,
    /// The directory of the files with the disk's changes. Error messages name it.
    place: OnceLock<PathBuf>,
    fetched: Counter,
    found: Counter,
    /// Requests of the disk's server that have no reply yet.
    requests: Mutex<Requests>,
    /// Returns the free bytes of a directory's file system.
    free: fn(&Path) -> Option<u64>,
}

#[derive(Default)]
struct Requests {
    socket: Option<Arc<OwnedFd>>,
    blocks: HashSet<u32>,
    stopped: bool,
}

impl Requests {
    /// Replies to a request unless it already has a reply. [`BackingStore::stop`] may have replied while the block was
    /// being read. Does nothing if there is no socket.
    fn answer(&mut self, index: u32, errno: i32) {
        if let (true, Some(socket)) = (self.blocks.remove(&index), &self.socket) {
            _ = send(socket, (index, errno));
        }
    }
}

/// The blocks to prefetch.
#[derive(Default)]
struct PrefetchQueue {
    blocks: VecDeque<u32>,
    is_closed: bool,
}

impl BackingStore {
    pub fn new(
        snapshot: &SnapshotId,
        contents: &SnapshotContents,
        reader: Arc<dyn SnapshotReader>,
        cached: CachedSnapshot,
    ) -> Self {
        Self {
            snapshot: snapshot.clone(),
            blocks: contents.blocks.clone(),
            reader,
            cached,
            used: Mutex::default(),
            prefetch_queue: Mutex::default(),
            queue_changed: Condvar::new(),
            trouble: FirstFault::default(),
            place: OnceLock::new(),
            fetched: Track::here().counter("blocks fetched"),
            found: Track::here().counter("blocks found in the cache"),
            requests: Mutex::default(),
            free: crate::sys::space::free_space,
        }
    }

    pub fn cached(&self) -> &CachedSnapshot {
        &self.cached
    }

    pub fn blocks(&self) -> &BlockIndexes {
        &self.blocks
    }

    pub fn trouble(&self) -> &FirstFault {
        &self.trouble
    }

    /// Makes a block of the base ready, and returns its digest. Takes the block from the cache if the cached block
    /// matches its digest, and from the cloud otherwise.
    pub fn fetch(&self, index: u32) -> Result<Digest> {
        let context = || format!("reading block {index} of {}", self.snapshot);
        if !self.blocks.contains(index) {
            return Err(Kind::Cloud.error("the snapshot does not have this block")).with_context(context);
        }
        let read = || {
            let (data, digest) = self.reader.read(index)?;
            match data.len() {
                BLOCK => Ok((data, digest)),
                len => Err(Kind::Cloud.error(format!("the block has {len} bytes instead of {BLOCK}"))),
            }
        };
        let to_cache_error = |error| {
            super::fault::disk_error(error, &format!("caching the block in {}", self.cached.dir().display()))
        };
        let (digest, origin) = self.cached.make_ready(index, read, to_cache_error).with_context(context)?;
        match origin {
            BlockOrigin::Before => {}
            BlockOrigin::Found => self.found.add(1),
            BlockOrigin::Read => self.fetched.add(1),
        }
        Ok(digest)
    }

    /// Returns the bytes of a block and its digest.
    pub fn block(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        let digest = self.fetch(index)?;
        let mut data = vec![0; BLOCK];
        self.cached
            .read(index, 0, &mut data)
            .with_context(|| format!("reading block {index} of the cache"))?;
        // The block was verified when it became ready. It is verified again because it will be uploaded.
        if digest_of(&data) != digest {
            self.cached.mark_unready(index);
            anyhow::bail!("block {index} of {} changed in the cache", self.snapshot);
        }
        Ok((data, digest))
    }

    /// Handles a request for a block: records that the block is used, and makes it ready. If the block was not ready,
    /// also queues the following blocks for prefetching. Returns 0 or an errno.
    fn use_block(&self, index: u32) -> i32 {
        let is_missing = self.cached.ready(index).is_none();
        {
            let mut used = lock_mutex(&self.used);
            if used.1.insert(index) {
                used.0.push(index);
            }
        }
        if is_missing {
            let next = self.blocks.range(index + 1..=index.saturating_add(READ_AHEAD));
            self.prefetch_first(next.collect());
        }
        match self.fetch(index) {
            Ok(_) => 0,
            Err(error) => {
                self.trouble.add(error);
                libc::EIO
            }
        }
    }

    /// Returns the used blocks in the order of their first use.
    pub fn used(&self) -> Vec<u32> {
        lock_mutex(&self.used).0.clone()
    }

    /// Starts threads for requests and threads for prefetching. The threads for requests end when the socket is closed.
    /// The threads for prefetching end after [`Self::stop_prefetching`]. `place` is the directory of the files with the
    /// disk's changes.
    pub fn start_threads(self: &Arc<Self>, socket: &Arc<OwnedFd>, place: &Path) -> std::io::Result<()> {
        _ = self.place.set(place.to_owned());
        lock_mutex(&self.requests).socket = Some(socket.clone());
        for _ in 0..READERS {
            let (lower, socket) = (self.clone(), socket.clone());
            std::thread::Builder::new().name("blocks".to_owned()).spawn(move || {
                while let Some((index, errno)) = receive(&socket) {
                    if index == WRITE_FAILED {
                        lower.trouble.add(lower.store_error(errno));
                    } else if lower.add_request(index) {
                        lower.answer_request(index, lower.use_block(index));
                    }
                }
            })?;
        }
        for _ in 0..PREFETCHERS {
            let lower = self.clone();
            let prefetch = std::thread::Builder::new().name("prefetch".to_owned());
            prefetch.spawn(move || {
                while let Some(index) = lower.next_prefetch() {
                    if lower.has_room_for(index) {
                        // A failure is ignored here. If the block is requested later, it is read again, and an error of
                        // that read is reported.
                        _ = lower.fetch(index);
                    }
                }
            })?;
        }
        Ok(())
    }

    /// Records a request. If the bake was stopped, replies with an error immediately and returns false.
    fn add_request(&self, index: u32) -> bool {
        let mut requests = lock_mutex(&self.requests);
        requests.blocks.insert(index);
        if requests.stopped {
            requests.answer(index, libc::EIO);
        }
        !requests.stopped
    }

    fn answer_request(&self, index: u32, errno: i32) {
        lock_mutex(&self.requests).answer(index, errno);
    }

    /// Replies with an error to all open requests, even if their blocks are still being read. Later requests get the
    /// same reply.
    pub fn stop(&self) {
        let mut requests = lock_mutex(&self.requests);
        requests.stopped = true;
        let blocks: Vec<u32> = requests.blocks.iter().copied().collect();
        blocks.into_iter().for_each(|index| requests.answer(index, libc::EIO));
        drop(requests);
        self.stop_prefetching();
    }

    fn store_error(&self, errno: i32) -> anyhow::Error {
        let error = std::io::Error::from_raw_os_error(errno);
        let place = self.place.get().map_or_else(String::new, |place| format!(" in {}", place.display()));
        super::fault::disk_error(error, &format!("storing the disk's changes{place}"))
    }

    /// Puts blocks at the front of the prefetch queue.
    fn prefetch_first(&self, blocks: Vec<u32>) {
        let mut prefetch_queue = lock_mutex(&self.prefetch_queue);
        blocks.into_iter().rev().for_each(|index| prefetch_queue.blocks.push_front(index));
        self.queue_changed.notify_all();
    }

    /// Adds blocks to the end of the prefetch queue, in this order.
    pub fn queue_prefetch(&self, blocks: impl IntoIterator<Item = u32>) {
        let mut prefetch_queue = lock_mutex(&self.prefetch_queue);
        prefetch_queue.blocks.extend(blocks.into_iter().filter(|index| self.blocks.contains(*index)));
        self.queue_changed.notify_all();
    }

    fn next_prefetch(&self) -> Option<u32> {
        let mut prefetch_queue = lock_mutex(&self.prefetch_queue);
        loop {
            if prefetch_queue.is_closed {
                return None;
            }
            match prefetch_queue.blocks.pop_front() {
                Some(index) if self.cached.ready(index).is_some() => {}
                Some(index) => return Some(index),
                None => {
                    prefetch_queue = self
                        .queue_changed
                        .wait(prefetch_queue)
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                }
            }
        }
    }

    /// Returns whether there is space to prefetch a block. A prefetched block must not take space that a bake needs.
    fn has_room_for(&self, index: u32) -> bool {
        // A block that is already in the cache needs no additional space.
        self.cached.digest(index).is_some()
            || (self.free)(self.cached.dir()).is_none_or(|free| free >= RESERVED_SPACE)
    }

    /// Stops prefetching.
    pub fn stop_prefetching(&self) {
        lock_mutex(&self.prefetch_queue).is_closed = true;
        self.queue_changed.notify_all();
    }
}
