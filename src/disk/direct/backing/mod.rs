//! The blocks of a base snapshot, made ready when they are first used, and ahead of that.
//!
//! A block is ready once it is in the cache's file and was held against its digest. Who serves the disk asks
//! for that over a socket, and reads the file itself.

#[cfg(test)]
mod tests;

use super::block_cache::{Cached, Made, ROOM};
use super::fault::Trouble;
use super::overlay::lock;
use crate::cloud::block_api::{Contents, Indexes, Reader};
use crate::ids::SnapshotId;
use crate::ids::digest_of;
use crate::ids::{BLOCK, Digest};
use crate::trace::{Counter, Track};
use anyhow::{Context, Result};
use rustix::net::{RecvFlags, SendFlags};
use std::collections::{HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

/// Blocks that are read at the same time because somebody waits for them: as many as requests are served.
const ASKED: usize = 16;
/// Blocks that are read at the same time ahead of need: the first byte of a block takes some 20 ms, and 8 of 512 KiB
/// keep a network of 1 Gbit/s busy.
const AHEAD: usize = 8;
/// Blocks that follow one that had to be read are read, too: files lie in one piece, mostly.
const FOLLOWING: u32 = 4;

/// A message of the one who serves the disk, or the answer to it: the index of a block, and 0 or an errno.
pub type Word = (u32, i32);
/// No block: what was written could not be kept.
pub const FAILED: u32 = u32::MAX;

pub fn send(to: &OwnedFd, (index, errno): Word) -> rustix::io::Result<()> {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&index.to_le_bytes());
    bytes[4..].copy_from_slice(&errno.to_le_bytes());
    rustix::net::send(to, &bytes, SendFlags::NOSIGNAL).map(drop)
}

/// `None`: the other side is gone.
pub fn receive(from: &OwnedFd) -> Option<Word> {
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
pub struct Lower {
    snapshot: SnapshotId,
    blocks: Indexes,
    reader: Arc<dyn Reader>,
    cached: Cached,
    /// In the order of their first use: what the next bake of this kind will want, too.
    used: Mutex<(Vec<u32>, HashSet<u32>)>,
    wanted: Mutex<Wanted>,
    more: Condvar,
    /// Why a block could not be read: the file system above only learns that it could not.
    trouble: Trouble,
    /// Where what is written is kept, for messages.
    place: OnceLock<PathBuf>,
    fetched: Counter,
    found: Counter,
    /// Who serves the disk, and what it waits for; and whether it waits in vain.
    asked: Mutex<Waiting>,
    /// Of a directory's disk, in bytes.
    free: fn(&Path) -> Option<u64>,
}

#[derive(Default)]
struct Waiting {
    socket: Option<Arc<OwnedFd>>,
    blocks: HashSet<u32>,
    stopped: bool,
}

impl Waiting {
    /// Once: it may be the answer of a read that nobody waits for any more. If nobody is there, nobody waits.
    fn answer(&mut self, index: u32, errno: i32) {
        if let (true, Some(socket)) = (self.blocks.remove(&index), &self.socket) {
            _ = send(socket, (index, errno));
        }
    }
}

/// What is to be read ahead.
#[derive(Default)]
struct Wanted {
    queue: VecDeque<u32>,
    over: bool,
}

impl Lower {
    pub fn new(snapshot: &SnapshotId, contents: &Contents, reader: Arc<dyn Reader>, cached: Cached) -> Self {
        Self {
            snapshot: snapshot.clone(),
            blocks: contents.blocks.clone(),
            reader,
            cached,
            used: Mutex::default(),
            wanted: Mutex::default(),
            more: Condvar::new(),
            trouble: Trouble::default(),
            place: OnceLock::new(),
            fetched: Track::here().counter("blocks fetched"),
            found: Track::here().counter("blocks found in the cache"),
            asked: Mutex::default(),
            free: crate::sys::space::free_space,
        }
    }

    pub fn cached(&self) -> &Cached {
        &self.cached
    }

    pub fn blocks(&self) -> &Indexes {
        &self.blocks
    }

    pub fn trouble(&self) -> &Trouble {
        &self.trouble
    }

    /// Makes a block of the base ready to be read: from the cache if it is there and is what it was, else from the
    /// cloud. Answers with its digest.
    pub fn fetch(&self, index: u32) -> Result<Digest> {
        let context = || format!("reading block {index} of {}", self.snapshot);
        if !self.blocks.contains(index) {
            anyhow::bail!("{}: it has none", context());
        }
        let read = || {
            let (data, digest) = self.reader.read(index)?;
            anyhow::ensure!(data.len() == BLOCK, "it has {} bytes", data.len());
            Ok((data, digest))
        };
        let keeping =
            |error| super::fault::full(error, &format!("keeping it in {}", self.cached.dir().display()));
        let (digest, made) = self.cached.make_ready(index, read, keeping).with_context(context)?;
        match made {
            Made::Before => {}
            Made::Found => self.found.add(1),
            Made::Read => self.fetched.add(1),
        }
        Ok(digest)
    }

    /// The bytes of a block, and its digest.
    pub fn block(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        let digest = self.fetch(index)?;
        let mut data = vec![0; BLOCK];
        self.cached
            .read(index, 0, &mut data)
            .with_context(|| format!("reading block {index} of the cache"))?;
        // It was verified when it was made ready; what is sent is verified once more.
        if digest_of(&data) != digest {
            self.cached.spoilt(index);
            anyhow::bail!("block {index} of the cache of {} changed", self.snapshot);
        }
        Ok((data, digest))
    }

    /// A block is used. What follows it is likely to be, too.
    fn used_now(&self, index: u32) -> i32 {
        let following = self.cached.ready(index).is_none();
        {
            let mut used = lock(&self.used);
            if used.1.insert(index) {
                used.0.push(index);
            }
        }
        if following {
            let next = self.blocks.range(index + 1..=index.saturating_add(FOLLOWING));
            self.first(next.collect());
        }
        match self.fetch(index) {
            Ok(_) => 0,
            Err(error) => {
                self.trouble.add(error);
                libc::EIO
            }
        }
    }

    /// Blocks in the order of their first use.
    pub fn used(&self) -> Vec<u32> {
        lock(&self.used).0.clone()
    }

    /// Answers who serves the disk, until it is gone. `place`: where what is written is kept.
    pub fn answer(self: &Arc<Self>, socket: &Arc<OwnedFd>, place: &Path) -> std::io::Result<()> {
        _ = self.place.set(place.to_owned());
        lock(&self.asked).socket = Some(socket.clone());
        for _ in 0..ASKED {
            let (lower, socket) = (self.clone(), socket.clone());
            std::thread::Builder::new().name("blocks".to_owned()).spawn(move || {
                while let Some((index, errno)) = receive(&socket) {
                    if index == FAILED {
                        lower.trouble.add(lower.not_kept(errno));
                    } else if lower.begin(index) {
                        lower.finish(index, lower.used_now(index));
                    }
                }
            })?;
        }
        for _ in 0..AHEAD {
            let lower = self.clone();
            let ahead = std::thread::Builder::new().name("ahead".to_owned());
            ahead.spawn(move || {
                while let Some(index) = lower.next() {
                    if lower.has_room_for(index) {
                        // Whoever needs it will try again, and be told.
                        _ = lower.fetch(index);
                    }
                }
            })?;
        }
        Ok(())
    }

    /// Whether it is to be read: a bake that was stopped waits for nothing.
    fn begin(&self, index: u32) -> bool {
        let mut asked = lock(&self.asked);
        asked.blocks.insert(index);
        if asked.stopped {
            asked.answer(index, libc::EIO);
        }
        !asked.stopped
    }

    fn finish(&self, index: u32, errno: i32) {
        lock(&self.asked).answer(index, errno);
    }

    /// Whoever waits for a block gets an error, now and from now on: however long a read takes that is under way.
    pub fn stop(&self) {
        let mut asked = lock(&self.asked);
        asked.stopped = true;
        let blocks: Vec<u32> = asked.blocks.iter().copied().collect();
        blocks.into_iter().for_each(|index| asked.answer(index, libc::EIO));
        drop(asked);
        self.end();
    }

    fn not_kept(&self, errno: i32) -> anyhow::Error {
        let error = std::io::Error::from_raw_os_error(errno);
        let place = self.place.get().map_or_else(String::new, |place| format!(" in {}", place.display()));
        super::fault::full(error, &format!("keeping what was written{place}"))
    }

    /// These next, before what was to come.
    fn first(&self, blocks: Vec<u32>) {
        let mut wanted = lock(&self.wanted);
        blocks.into_iter().rev().for_each(|index| wanted.queue.push_front(index));
        self.more.notify_all();
    }

    /// Reads these ahead of need, in this order, after what is wanted already.
    pub fn ahead(&self, blocks: impl IntoIterator<Item = u32>) {
        let mut wanted = lock(&self.wanted);
        wanted.queue.extend(blocks.into_iter().filter(|index| self.blocks.contains(*index)));
        self.more.notify_all();
    }

    fn next(&self) -> Option<u32> {
        let mut wanted = lock(&self.wanted);
        loop {
            if wanted.over {
                return None;
            }
            match wanted.queue.pop_front() {
                Some(index) if self.cached.ready(index).is_some() => {}
                Some(index) => return Some(index),
                None => wanted = self.more.wait(wanted).unwrap_or_else(std::sync::PoisonError::into_inner),
            }
        }
    }

    /// What nobody asked for takes no room that a bake needs.
    fn has_room_for(&self, index: u32) -> bool {
        // What is there has its room.
        self.cached.digest(index).is_some() || (self.free)(self.cached.dir()).is_none_or(|free| free >= ROOM)
    }

    /// Nothing is read ahead any more.
    pub fn end(&self) {
        lock(&self.wanted).over = true;
        self.more.notify_all();
    }
}
