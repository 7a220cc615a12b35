//! The block map is a file with one byte, the mark, for each block of a disk. The process that serves the disk (see the
//! module `server`) writes the map. oven reads the map when it uploads the disk. The map is preserved together with the
//! written blocks.

use crate::cloud::block_api::SnapshotContents;
use crate::device::Trimming;
use anyhow::{Context, Result};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// The base does not have the block, and the block was not written. It reads as zeros.
pub const ZEROS: u8 = 0;
/// The base has the block, and the block was not written.
pub const BASE: u8 = 1;
/// The block was written, and the base does not have it.
pub const WRITTEN_NEW: u8 = 2;
/// The block was written, and the base has it, too.
pub const WRITTEN_OVER_BASE: u8 = 3;

/// The block map, in the process that writes it.
#[derive(Debug)]
pub struct BlockMap {
    file: File,
    bytes: Box<[AtomicU8]>,
}

/// Creates the map of a disk with `blocks` blocks. No block is marked as written. The [`TrimmingByte`] follows the
/// marks.
pub fn create(file: &File, blocks: u32, base: &SnapshotContents) -> Result<()> {
    let mut bytes = vec![ZEROS; blocks as usize + 1];
    for index in &base.blocks {
        let mark = bytes[..blocks as usize].get_mut(index as usize);
        *mark.with_context(|| format!("block {index} of the base is beyond the end of the disk"))? = BASE;
    }
    file.write_all_at(&bytes, 0).context("writing the block map")
}

/// Returns the written blocks in ascending order. The flag is true if the base also has the block.
pub fn written_blocks(file: &File) -> Result<Vec<(u32, bool)>> {
    let bytes = read(file)?;
    let marks = bytes.iter().zip(0..);
    Ok(marks
        .filter(|(mark, _)| **mark >= WRITTEN_NEW)
        .map(|(mark, at)| (at, *mark == WRITTEN_OVER_BASE))
        .collect())
}

fn read(file: &File) -> Result<Vec<u8>> {
    let context = "reading the block map";
    let length = file.metadata().context(context)?.len();
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).context(context)?;
    anyhow::ensure!(bytes.pop().is_some(), "{context}: the file is empty");
    anyhow::ensure!(bytes.iter().all(|mark| *mark <= WRITTEN_OVER_BASE), "{context}: invalid content");
    Ok(bytes)
}

impl BlockMap {
    pub fn open(file: File) -> Result<Self> {
        let bytes = read(&file)?.into_iter().map(AtomicU8::new).collect();
        Ok(Self { file, bytes })
    }

    pub fn blocks(&self) -> u32 {
        self.bytes.len() as u32
    }

    pub fn get(&self, index: u32) -> u8 {
        self.bytes[index as usize].load(Ordering::Acquire)
    }

    pub fn is_written(&self, index: u32) -> bool {
        self.get(index) >= WRITTEN_NEW
    }

    /// Sets a block's mark in the file, and then in memory. oven reads the file to select the blocks to upload. If the
    /// mark were only in memory, a written block would be taken for a block of the base. If the file cannot be written,
    /// neither mark changes.
    pub fn set(&self, index: u32, mark: u8) -> io::Result<()> {
        self.file.write_all_at(&[mark], index.into())?;
        self.bytes[index as usize].store(mark, Ordering::Release);
        Ok(())
    }

    /// Returns whether a trim is in progress. During a trim, every range that is zeroed is unused space of a file
    /// system.
    pub fn is_trimming(&self) -> io::Result<bool> {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, self.bytes.len() as u64)?;
        Ok(byte != [0])
    }
}

/// The byte after the marks. It is not 0 while a trim is in progress.
#[derive(Debug)]
pub struct TrimmingByte(File);

impl TrimmingByte {
    /// `file` is the disk's block map.
    pub fn of(file: File) -> Arc<dyn Trimming> {
        Arc::new(Self(file))
    }
}

impl Trimming for TrimmingByte {
    fn begin(&self) -> io::Result<()> {
        set(&self.0, 1)
    }

    /// The byte exists already, so this succeeds even if the file system is full.
    fn end(&self) -> io::Result<()> {
        set(&self.0, 0)
    }
}

fn set(file: &File, value: u8) -> io::Result<()> {
    let length = file.metadata()?.len();
    file.write_all_at(&[value], length.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Trim;

    #[test]
    fn both_processes_see_the_same_map() {
        let file = tempfile::tempfile().unwrap();
        create(&file, 6, &SnapshotContents { size_gib: 1, blocks: [1, 3].into() }).unwrap();
        let marks = BlockMap::open(file.try_clone().unwrap()).unwrap();
        assert_eq!((0..marks.blocks()).map(|i| marks.get(i)).collect::<Vec<_>>(), [0, 1, 0, 1, 0, 0]);
        assert_eq!(written_blocks(&file).unwrap(), []);
        marks.set(3, WRITTEN_OVER_BASE).unwrap();
        marks.set(5, WRITTEN_NEW).unwrap();
        assert_eq!(written_blocks(&file).unwrap(), [(3, true), (5, false)]);
        let trim = Trim::begin(TrimmingByte::of(file.try_clone().unwrap())).unwrap();
        assert!(marks.is_trimming().unwrap());
        drop(trim);
        assert!(!marks.is_trimming().unwrap());
        assert_eq!(BlockMap::open(file).unwrap().get(3), WRITTEN_OVER_BASE);
    }

    #[test]
    fn a_base_larger_than_the_disk_and_an_invalid_file_are_rejected() {
        let file = tempfile::tempfile().unwrap();
        assert!(create(&file, 3, &SnapshotContents { size_gib: 1, blocks: [3].into() }).is_err());
        assert!(BlockMap::open(file.try_clone().unwrap()).is_err(), "the file is empty");
        file.write_all_at(b"text", 0).unwrap();
        assert!(written_blocks(&file).is_err());
    }
}
