//! A disk that consists of a base's blocks and of blocks that were written over them. The block map records which
//! blocks were written.
//!
//! A base's block is read from the cache or the cloud when it is first used. The first write to a block stores the
//! complete block in a separate file, the upper file. So every block is either completely in the base or completely in
//! the upper file.

#[cfg(test)]
mod tests;

use super::block_map::{BASE, BlockMap, WRITTEN_NEW, WRITTEN_OVER_BASE, ZEROS};
use super::fuse_fs::DiskContent;
use crate::ids::BLOCK;
use crate::sys::lock::lock_mutex;
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard};

/// The number of locks for blocks. Each lock is shared by many blocks. This seldom makes a thread wait, because two
/// blocks with the same lock are seldom written concurrently.
const LOCKS: usize = 64;

/// The blocks of a base.
pub trait BaseBlocks: Send + Sync + 'static {
    /// Reads bytes of one of the base's blocks, either from the cache or from the cloud.
    fn read(&self, index: u32, at: usize, buffer: &mut [u8]) -> io::Result<()>;
    /// Reports that the upper file could not be read or written. The file system on the disk only gets an I/O error,
    /// without the reason.
    fn report_io_error(&self, error: &io::Error);
}

/// A base's blocks and the written blocks over them.
pub struct Overlay<B> {
    size: u64,
    base: B,
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
    pub fn new(base: B, upper: File, marks: BlockMap) -> Self {
        let size = offset_of(marks.blocks(), 0);
        Self { size, base, upper, marks, locks: std::array::from_fn(|_| Mutex::default()) }
    }

    /// Calls `each` for every block that overlaps a range. `each` gets the block's index, the offset in the block, and
    /// the corresponding part of the range.
    fn for_each_block(
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

    fn write_upper(&self, data: &[u8], at: u64) -> io::Result<()> {
        self.upper.write_all_at(data, at).inspect_err(|error| self.base.report_io_error(error))
    }

    fn set_mark(&self, index: u32, mark: u8) -> io::Result<()> {
        self.marks.set(index, mark).inspect_err(|error| self.base.report_io_error(error))
    }

    fn punch_hole(&self, index: u32, within: usize, length: usize) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (at, length) = (offset_of(index, within), length as u64);
        let punched = rustix::fs::fallocate(&self.upper, flags, at, length);
        punched.map_err(io::Error::from).inspect_err(|error| self.base.report_io_error(error))
    }

    /// Changes a block in the upper file by calling `change`, and then marks the block as written. If the base has the
    /// block, and the block was not written before, the base's content is first copied to the upper file. `whole` means
    /// that `change` overwrites the complete block. In that case, nothing is copied. The block is marked last, so that
    /// nobody reads an incomplete block from the upper file.
    fn change(&self, index: u32, whole: bool, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.marks.is_written(index) {
            // This needs no lock. Only a trim can make the block unwritten again, and a file system does not write to
            // space that it is discarding.
            return change();
        }
        let _guard = self.lock_block(index);
        let mark = match self.marks.get(index) {
            BASE => WRITTEN_OVER_BASE,
            ZEROS => WRITTEN_NEW,
            _ => return change(),
        };
        if mark == WRITTEN_OVER_BASE && !whole {
            let mut data = vec![0; BLOCK];
            self.base.read(index, 0, &mut data)?;
            self.write_upper(&data, offset_of(index, 0))?;
        }
        change()?;
        self.set_mark(index, mark)
    }

    /// Handles space that the file system on the disk discards. Nothing is done for a block that was not written. A
    /// written block becomes unwritten if it is discarded completely. This changes the block's content, but a file
    /// system writes to discarded space before it reads the space again.
    fn discard(&self, index: u32, within: usize, length: usize) -> io::Result<()> {
        let _guard = self.lock_block(index);
        let unwritten_mark = match self.marks.get(index) {
            WRITTEN_NEW => ZEROS,
            WRITTEN_OVER_BASE => BASE,
            _ => return Ok(()),
        };
        if length == BLOCK {
            self.set_mark(index, unwritten_mark)?;
        }
        self.punch_hole(index, within, length)
    }
}

impl<B: BaseBlocks> DiskContent for Overlay<B> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let length = buffer.len() as u64;
        self.for_each_block(at, length, |index, within, part| {
            let buffer = &mut buffer[part];
            match self.marks.get(index) {
                ZEROS => buffer.fill(0),
                BASE => self.base.read(index, within, buffer)?,
                _ => {
                    let read = self.upper.read_exact_at(buffer, offset_of(index, within));
                    read.inspect_err(|error| self.base.report_io_error(error))?;
                }
            }
            Ok(())
        })
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.for_each_block(at, data.len() as u64, |index, within, part| {
            self.change(index, part.len() == BLOCK, || {
                self.write_upper(&data[part], offset_of(index, within))
            })
        })
    }

    fn zero(&self, at: u64, length: u64) -> io::Result<()> {
        let trimming = self.marks.is_trimming()?;
        self.for_each_block(at, length, |index, within, part| match self.marks.get(index) {
            ZEROS => Ok(()),
            _ if trimming => self.discard(index, within, part.len()),
            _ => self.change(index, part.len() == BLOCK, || self.punch_hole(index, within, part.len())),
        })
    }

    fn sync(&self) -> io::Result<()> {
        // The upper file need not survive a power failure, because a power failure ends the bake. Data that must
        // survive are uploaded.
        Ok(())
    }
}
