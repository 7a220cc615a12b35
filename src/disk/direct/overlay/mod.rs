//! A base's blocks, and what was written over them: a disk whose changed blocks are known exactly.
//!
//! What lies below is made ready when it is first used. What is written goes to a file of its own, and with it the rest
//! of its block; so a block is either the base's or here, whole.

#[cfg(test)]
mod tests;

use super::block_map::{BASE, Marks, WRITTEN, WRITTEN_BASE, ZEROS};
use super::fuse_fs::Content;
use crate::ids::BLOCK;
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks that share a lock: while one is read, seldom another of the same lock is asked for.
const LOCKS: usize = 64;

/// The blocks of a base.
pub trait Below: Send + Sync + 'static {
    /// Bytes of one of the base's blocks, read from wherever it is.
    fn read(&self, index: u32, at: usize, buffer: &mut [u8]) -> io::Result<()>;
    /// What was written cannot be kept: the file system above only learns that it failed.
    fn failed(&self, error: &io::Error);
}

/// A disk: a base's blocks, and those that were written.
pub struct Overlay<B> {
    size: u64,
    below: B,
    /// Sparse; has the whole of every block that is marked as written.
    upper: File,
    marks: Marks,
    locks: [Mutex<()>; LOCKS],
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn place(index: u32, within: usize) -> u64 {
    u64::from(index) * BLOCK as u64 + within as u64
}

impl<B: Below> Overlay<B> {
    /// `upper`: as large as the disk that `marks` are of, and sparse.
    pub fn new(below: B, upper: File, marks: Marks) -> Self {
        let size = place(marks.blocks(), 0);
        Self { size, below, upper, marks, locks: std::array::from_fn(|_| Mutex::default()) }
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
            let step = ((BLOCK - within) as u64).min(end - here) as usize;
            let from = (here - at) as usize;
            each(index, within, from..from + step)?;
            here += step as u64;
        }
        Ok(())
    }

    fn turn(&self, index: u32) -> MutexGuard<'_, ()> {
        lock(&self.locks[index as usize % LOCKS])
    }

    fn put(&self, data: &[u8], at: u64) -> io::Result<()> {
        self.upper.write_all_at(data, at).inspect_err(|error| self.below.failed(error))
    }

    fn mark(&self, index: u32, mark: u8) -> io::Result<()> {
        self.marks.set(index, mark).inspect_err(|error| self.below.failed(error))
    }

    fn punch(&self, index: u32, within: usize, length: usize) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (at, length) = (place(index, within), length as u64);
        let punched = rustix::fs::fallocate(&self.upper, flags, at, length);
        punched.map_err(io::Error::from).inspect_err(|error| self.below.failed(error))
    }

    /// Makes a block ours, if it is not, and calls with it. `whole`: all of it will be overwritten, so that nobody has
    /// to know what it was; and until it is, it is not ours, so that nobody sees it half.
    fn change(&self, index: u32, whole: bool, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.marks.is_written(index) {
            // Ours for good, but for a trim, and nothing is written to what a file system gives up.
            return change();
        }
        let _turn = self.turn(index);
        let mark = match self.marks.get(index) {
            BASE => WRITTEN_BASE,
            ZEROS => WRITTEN,
            _ => return change(),
        };
        if mark == WRITTEN_BASE && !whole {
            let mut data = vec![0; BLOCK];
            self.below.read(index, 0, &mut data)?;
            self.put(&data, place(index, 0))?;
        }
        change()?;
        self.mark(index, mark)
    }

    /// Free space of a file system: a block that is the base's stays so, and one that is free as a whole becomes so
    /// again. Nobody reads it before it is written.
    fn discard(&self, index: u32, within: usize, length: usize) -> io::Result<()> {
        let _turn = self.turn(index);
        let below = match self.marks.get(index) {
            WRITTEN => ZEROS,
            WRITTEN_BASE => BASE,
            _ => return Ok(()),
        };
        if length == BLOCK {
            self.mark(index, below)?;
        }
        self.punch(index, within, length)
    }
}

impl<B: Below> Content for Overlay<B> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let length = buffer.len() as u64;
        self.pieces(at, length, |index, within, part| {
            let buffer = &mut buffer[part];
            match self.marks.get(index) {
                ZEROS => buffer.fill(0),
                BASE => self.below.read(index, within, buffer)?,
                _ => {
                    let read = self.upper.read_exact_at(buffer, place(index, within));
                    read.inspect_err(|error| self.below.failed(error))?;
                }
            }
            Ok(())
        })
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.pieces(at, data.len() as u64, |index, within, part| {
            self.change(index, part.len() == BLOCK, || self.put(&data[part], place(index, within)))
        })
    }

    fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        let trimming = self.marks.is_trimming()?;
        self.pieces(at, length, |index, within, part| match self.marks.get(index) {
            ZEROS => Ok(()),
            _ if trimming => self.discard(index, within, part.len()),
            _ => self.change(index, part.len() == BLOCK, || self.punch(index, within, part.len())),
        })
    }

    fn sync(&self) -> io::Result<()> {
        // What is written here ends with the bake: what has to last is sent to the cloud.
        Ok(())
    }
}
