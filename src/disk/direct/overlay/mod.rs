//! A disk that consists of a base's blocks and of written blocks over them, so that the changed blocks are known
//! exactly.
//!
//! A base's block is made ready when it is first used. A write goes to a separate file, together with the rest of its
//! block. So every block is either completely the base's or completely in that file.

#[cfg(test)]
mod tests;

use super::block_map::{BASE, BlockMap, WRITTEN, WRITTEN_BASE, ZEROS};
use super::fuse_fs::DiskContent;
use crate::ids::BLOCK;
use crate::sys::lock::lock_mutex;
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard};

/// The number of locks for blocks. A block shares its lock with other blocks, but these are seldom needed while it is
/// read.
const LOCKS: usize = 64;

/// The blocks of a base.
pub trait BaseBlocks: Send + Sync + 'static {
    /// Reads bytes of one of the base's blocks, either from the cache or from the cloud.
    fn read(&self, index: u32, at: usize, buffer: &mut [u8]) -> io::Result<()>;
    /// Reports that a write could not be stored. The file system on the disk only gets an I/O error.
    fn failed(&self, error: &io::Error);
}

/// A base's blocks and the written blocks over them.
pub struct Overlay<B> {
    size: u64,
    below: B,
    /// A sparse file that has the complete content of every block that is marked as written.
    upper: File,
    marks: BlockMap,
    locks: [Mutex<()>; LOCKS],
}

fn offset_of(index: u32, within: usize) -> u64 {
    u64::from(index) * BLOCK as u64 + within as u64
}

impl<B: BaseBlocks> Overlay<B> {
    /// `upper` is a sparse file of the disk's size. `marks` is the block map of that disk.
    pub fn new(below: B, upper: File, marks: BlockMap) -> Self {
        let size = offset_of(marks.blocks(), 0);
        Self { size, below, upper, marks, locks: std::array::from_fn(|_| Mutex::default()) }
    }

    /// Calls `each` for every block that overlaps a range. It gets the block's index, the offset in the block, and the
    /// part of the range.
    fn pieces(
        &self,
        at: u64,
        length: u64,
        mut each: impl FnMut(u32, usize, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = at.checked_add(length).filter(|end| *end <= self.size);
        let end = end.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        let mut offset = at;
        while offset < end {
            let (index, within) = ((offset / BLOCK as u64) as u32, (offset % BLOCK as u64) as usize);
            let step = ((BLOCK - within) as u64).min(end - offset) as usize;
            let from = (offset - at) as usize;
            each(index, within, from..from + step)?;
            offset += step as u64;
        }
        Ok(())
    }

    fn lock_block(&self, index: u32) -> MutexGuard<'_, ()> {
        lock_mutex(&self.locks[index as usize % LOCKS])
    }

    fn put(&self, data: &[u8], at: u64) -> io::Result<()> {
        self.upper.write_all_at(data, at).inspect_err(|error| self.below.failed(error))
    }

    fn mark(&self, index: u32, mark: u8) -> io::Result<()> {
        self.marks.set(index, mark).inspect_err(|error| self.below.failed(error))
    }

    fn punch(&self, index: u32, within: usize, length: usize) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (at, length) = (offset_of(index, within), length as u64);
        let punched = rustix::fs::fallocate(&self.upper, flags, at, length);
        punched.map_err(io::Error::from).inspect_err(|error| self.below.failed(error))
    }

    /// Copies a block to the upper file unless it is already in it, and calls `change`. If `whole` is true, `change`
    /// overwrites the complete block, so the old content is not copied. Such a block is marked as written only
    /// afterwards, so that nobody reads a half-written block.
    fn change(&self, index: u32, whole: bool, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.marks.is_written(index) {
            // Only a trim can make the block unwritten again, and a file system does not write to space that it is
            // discarding.
            return change();
        }
        let _guard = self.lock_block(index);
        let mark = match self.marks.get(index) {
            BASE => WRITTEN_BASE,
            ZEROS => WRITTEN,
            _ => return change(),
        };
        if mark == WRITTEN_BASE && !whole {
            let mut data = vec![0; BLOCK];
            self.below.read(index, 0, &mut data)?;
            self.put(&data, offset_of(index, 0))?;
        }
        change()?;
        self.mark(index, mark)
    }

    /// Handles discarded space of a file system. A base's block does not change. A written block that is discarded
    /// completely becomes the base's again. The file system does not read the space before it writes to it again.
    fn discard(&self, index: u32, within: usize, length: usize) -> io::Result<()> {
        let _guard = self.lock_block(index);
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

impl<B: BaseBlocks> DiskContent for Overlay<B> {
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
                    let read = self.upper.read_exact_at(buffer, offset_of(index, within));
                    read.inspect_err(|error| self.below.failed(error))?;
                }
            }
            Ok(())
        })
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.pieces(at, data.len() as u64, |index, within, part| {
            self.change(index, part.len() == BLOCK, || self.put(&data[part], offset_of(index, within)))
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
        // These files are deleted when the bake ends, so they need no sync. Blocks that must last are uploaded.
        Ok(())
    }
}
