//! A base's blocks, and what was written over them: a disk whose changed blocks are known exactly.
//!
//! What lies below is read when it is first used. What is written goes to a file of its own, and with it the rest of
//! its block; so a block is either the base's or here, whole.

use super::cache::{Cached, digest_of};
use super::export::Content;
use crate::cloud::blocks::{BLOCK, Contents, Digest, Reader};
use anyhow::{Context, Result};
use rustix::fs::FallocateFlags;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Blocks that share a lock: while one is read, seldom another of the same lock is asked for.
const LOCKS: usize = 64;

/// Zeros are compared and found in pieces of this length.
const PIECE: usize = 4096;

/// The blocks of a base snapshot, read when they are first used.
pub struct Lower {
    blocks: BTreeSet<u32>,
    reader: Arc<dyn Reader>,
    cached: Cached,
    /// By index: whether it was read, or verified, in this run.
    ready: Box<[AtomicBool]>,
    digests: Mutex<Vec<(u32, Digest)>>,
    locks: [Mutex<()>; LOCKS],
    /// In the order of their first use: what the next bake of this kind will want, too.
    used: Mutex<Vec<u32>>,
    /// Why a block could not be read: the file system above only learns that it could not.
    trouble: Mutex<Option<anyhow::Error>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn flags(count: usize) -> Box<[AtomicBool]> {
    (0..count).map(|_| AtomicBool::new(false)).collect()
}

impl Lower {
    pub fn new(contents: &Contents, reader: Arc<dyn Reader>, cached: Cached) -> Self {
        let count = contents.blocks.last().map_or(0, |last| *last as usize + 1);
        Self {
            blocks: contents.blocks.clone(),
            reader,
            cached,
            ready: flags(count),
            digests: Mutex::default(),
            locks: std::array::from_fn(|_| Mutex::default()),
            used: Mutex::default(),
            trouble: Mutex::default(),
        }
    }

    /// Whether the base has this block; else it is zeros.
    pub fn has(&self, index: u32) -> bool {
        self.blocks.contains(&index)
    }

    /// Makes a block of the base ready to be read: from the cache if it is there and is what it was, else from the
    /// cloud.
    pub fn fetch(&self, index: u32) -> Result<()> {
        let ready = &self.ready[index as usize];
        if ready.load(Ordering::Acquire) {
            return Ok(());
        }
        let _turn = lock(&self.locks[index as usize % LOCKS]);
        if ready.load(Ordering::Acquire) {
            return Ok(());
        }
        let digest = match self.cached.verified(index) {
            Some(digest) => digest,
            None => {
                let (data, digest) = self.reader.read(index)?;
                self.cached.put(index, &data, &digest).context("writing to the cache of blocks")?;
                digest
            }
        };
        lock(&self.digests).push((index, digest));
        ready.store(true, Ordering::Release);
        Ok(())
    }

    fn read(&self, index: u32, at: usize, buffer: &mut [u8]) -> io::Result<()> {
        if !self.has(index) {
            buffer.fill(0);
            return Ok(());
        }
        let first = !self.ready[index as usize].load(Ordering::Acquire);
        if let Err(error) = self.fetch(index) {
            lock(&self.trouble).get_or_insert(error.context(format!("reading block {index} of the base")));
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if first {
            lock(&self.used).push(index);
        }
        self.cached.read(index, at, buffer)
    }

    /// The digest of a block that was used in this run, or in one before.
    fn digest(&self, index: u32) -> Option<Digest> {
        let used = lock(&self.digests).iter().find(|(of, _)| *of == index).map(|(_, digest)| *digest);
        used.or_else(|| self.cached.digest(index))
    }

    /// Blocks in the order of their first use.
    pub fn used(&self) -> Vec<u32> {
        lock(&self.used).clone()
    }

    /// Why a read failed, once.
    pub fn trouble(&self) -> Option<anyhow::Error> {
        lock(&self.trouble).take()
    }
}

/// A disk: a base's blocks, and those that were written.
pub struct Overlay {
    size: u64,
    lower: Arc<Lower>,
    /// Sparse; has the whole of every block that is [`HERE`].
    upper: File,
    state: Box<[AtomicU8]>,
    locks: [Mutex<()>; LOCKS],
    trimming: AtomicBool,
}

const BELOW: u8 = 0;
const HERE: u8 = 1;

/// A block that is not the base's any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    pub index: u32,
    pub data: Arc<[u8]>,
    pub digest: Digest,
}

impl Overlay {
    /// `upper`: an empty file; it will be as large as the disk, and sparse. `size`: bytes, whole blocks.
    pub fn new(size: u64, lower: Arc<Lower>, upper: File) -> Result<Self> {
        anyhow::ensure!(size.is_multiple_of(BLOCK as u64), "a disk of {size} bytes is not of whole blocks");
        upper.set_len(size).context("making room for what will be written")?;
        let blocks = (size / BLOCK as u64) as usize;
        Ok(Self {
            size,
            lower,
            upper,
            state: (0..blocks).map(|_| AtomicU8::new(BELOW)).collect(),
            locks: std::array::from_fn(|_| Mutex::default()),
            trimming: AtomicBool::new(false),
        })
    }

    pub fn lower(&self) -> &Lower {
        &self.lower
    }

    /// While `on`, zeroing is what a file system says of blocks that it does not use: nothing of the base has to change
    /// for that. Only where nothing else zeroes ranges at the same time.
    pub fn trimming(&self, on: bool) {
        self.trimming.store(on, Ordering::SeqCst);
    }

    fn is_here(&self, index: u32) -> bool {
        self.state[index as usize].load(Ordering::Acquire) == HERE
    }

    /// Blocks that were written to, whatever with.
    pub fn written(&self) -> Vec<u32> {
        (0..self.state.len() as u32).filter(|index| self.is_here(*index)).collect()
    }

    /// A block that was written to, if it differs from the base's. (Where that was overwritten whole and never read, it
    /// is taken to differ.)
    pub fn changed(&self, index: u32) -> Result<Option<Changed>> {
        let mut data = vec![0; BLOCK];
        self.upper
            .read_exact_at(&mut data, u64::from(index) * BLOCK as u64)
            .with_context(|| format!("reading block {index} of what was written"))?;
        // Zeros are told to the cloud only where the base has something else.
        if !self.lower.has(index) && data.chunks(PIECE).all(is_zero) {
            return Ok(None);
        }
        let digest = digest_of(&data);
        Ok((self.lower.digest(index) != Some(digest)).then(|| Changed { index, data: data.into(), digest }))
    }

    /// Calls with every block that a range touches: its index, where in it, and which part of the range.
    fn pieces(
        &self,
        at: u64,
        length: u64,
        mut each: impl FnMut(u32, usize, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = at.checked_add(length).filter(|end| *end <= self.size);
        let end = end.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let mut here = at;
        while here < end {
            let (index, within) = ((here / BLOCK as u64) as u32, (here % BLOCK as u64) as usize);
            let step = (BLOCK - within).min((end - here) as usize);
            let from = (here - at) as usize;
            each(index, within, from..from + step)?;
            here += step as u64;
        }
        Ok(())
    }

    /// Makes a block ours. `whole`: all of it will be overwritten, so that nobody has to know what it was.
    fn take(&self, index: u32, whole: bool) -> io::Result<()> {
        if self.is_here(index) {
            return Ok(());
        }
        let _turn = lock(&self.locks[index as usize % LOCKS]);
        if self.is_here(index) {
            return Ok(());
        }
        if !whole && self.lower.has(index) {
            let mut data = vec![0; BLOCK];
            self.lower.read(index, 0, &mut data)?;
            self.upper.write_all_at(&data, u64::from(index) * BLOCK as u64)?;
        }
        self.state[index as usize].store(HERE, Ordering::Release);
        Ok(())
    }
}

fn is_zero(piece: &[u8]) -> bool {
    piece == &[0; PIECE][..piece.len()]
}

impl Content for Overlay {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let length = buffer.len() as u64;
        self.pieces(at, length, |index, within, part| {
            let buffer = &mut buffer[part];
            if self.is_here(index) {
                self.upper.read_exact_at(buffer, u64::from(index) * BLOCK as u64 + within as u64)
            } else {
                self.lower.read(index, within, buffer)
            }
        })
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.pieces(at, data.len() as u64, |index, within, part| {
            self.take(index, part.len() == BLOCK)?;
            self.upper.write_all_at(&data[part], u64::from(index) * BLOCK as u64 + within as u64)
        })
    }

    fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        let trimming = self.trimming.load(Ordering::SeqCst);
        self.pieces(at, length, |index, within, part| {
            if !self.is_here(index) {
                if trimming || !self.lower.has(index) {
                    return Ok(());
                }
                self.take(index, part.len() == BLOCK)?;
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let at = u64::from(index) * BLOCK as u64 + within as u64;
            Ok(rustix::fs::fallocate(&self.upper, flags, at, part.len() as u64)?)
        })
    }

    fn sync(&self) -> io::Result<()> {
        // What is written here ends with the bake: what has to last is sent to the cloud.
        Ok(())
    }
}

#[cfg(test)]
#[path = "overlay/tests.rs"]
mod tests;
