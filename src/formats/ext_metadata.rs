//! Finds the metadata of a disk's file systems: partition tables, ext's group descriptors, bitmaps and inode tables.
//! The result is only a hint for prefetching, so metadata that cannot be parsed is skipped.

use crate::formats::partition;
use crate::formats::partition::{ReadAt, TableScheme};
use crate::ids::BLOCK;
use std::collections::BTreeSet;
use std::ops::Range;

/// The maximum number of block groups. A file system of 16 TiB with blocks of 4 KiB has this number.
const GROUPS_MAX: u64 = 1 << 17;
/// The largest descriptor that the kernel supports, in bytes.
const DESCRIPTOR_MAX: u64 = 1024;
/// Descriptors are read in pieces of this size in bytes, because an image may claim to have any number of descriptors.
const PIECE: u64 = 64 << 10;
/// The maximum number of blocks that are returned. The metadata of a file system of 16 TiB have about half as many. An
/// image may claim that its whole disk is metadata.
const BLOCKS_MAX: usize = 1 << 20;

/// Returns the indexes of the disk's blocks (of [`BLOCK`] bytes) that contain metadata.
pub fn blocks(disk: &(impl ReadAt + ?Sized)) -> BTreeSet<u32> {
    let mut found = BTreeSet::from([0]);
    let Ok(table) = partition::read(disk, 512) else { return found };
    let mut starts: Vec<u64> = table.partitions.iter().map(|partition| partition.start).collect();
    if table.scheme == TableScheme::None {
        starts.push(0);
    }
    for start in starts {
        let mut ranges = ext(disk, start).unwrap_or_default();
        ranges.sort_by_key(|range| range.start);
        // The ranges may overlap. Blocks before `next` were already added and are skipped.
        let mut next = 0;
        for range in ranges {
            let first = next.max(range.start / BLOCK as u64);
            next = next.max(range.end.div_ceil(BLOCK as u64));
            let room = BLOCKS_MAX.saturating_sub(found.len());
            found.extend((first as u32..next as u32).take(room));
        }
    }
    found
}

fn le32(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, |b| u32::from_le_bytes(b).into())
}

fn le16(bytes: &[u8], at: usize) -> u64 {
    le32(bytes, at) & 0xffff
}

/// Returns the byte ranges of an ext file system's metadata. The format is described in the kernel's documentation of
/// ext4, "Super Block" and "Block Group Descriptors".
fn ext(disk: &(impl ReadAt + ?Sized), start: u64) -> Option<Vec<Range<u64>>> {
    let sb = disk.bytes(start.checked_add(1024)?, 1024).ok().filter(|sb| le16(sb, 56) == 0xef53)?;
    let (log, first, per_group) = (le32(&sb, 24), le32(&sb, 20), le32(&sb, 32));
    let (inodes, inode_size) = (le32(&sb, 40), le16(&sb, 88).max(128));
    let wide = le32(&sb, 96) & 0x80 != 0;
    // A file system with the feature meta_bg is not supported here, because its descriptors are scattered.
    if log > 6 || per_group == 0 || le32(&sb, 96) & 0x10 != 0 {
        return None;
    }
    let block = 1024u64 << log;
    let total = le32(&sb, 4) | if wide { le32(&sb, 336) << 32 } else { 0 };
    let groups = total.checked_sub(first)?.div_ceil(per_group).min(GROUPS_MAX);
    let size = if wide { le16(&sb, 254).max(32) } else { 32 };
    if !size.is_power_of_two() || size > DESCRIPTOR_MAX {
        return None;
    }
    let at = start.checked_add((first + 1) * block)?;
    let end = at.checked_add(groups * size).filter(|end| *end <= disk.size())?;
    // Returns the ranges that a group's descriptor names.
    let of_group = |descriptor: &[u8]| {
        let offset_of = |low: usize, high: usize| {
            let high = if size >= 64 { le32(descriptor, high) << 32 } else { 0 };
            start.checked_add((le32(descriptor, low) | high).checked_mul(block)?)
        };
        let range = |at: u64, length: u64| Some(at..at.checked_add(length)?);
        let flags = le16(descriptor, 18);
        let unused = le16(descriptor, 28) | if size >= 64 { le16(descriptor, 50) << 16 } else { 0 };
        let mut found = [None, None, None];
        // With the flag BLOCK_UNINIT or INODE_UNINIT, the bitmap or the table was never written, so it need not be
        // read.
        if let (Some(at), 0) = (offset_of(0, 32), flags & 2) {
            found[0] = range(at, block);
        }
        if let (Some(bitmap), Some(table), 0) = (offset_of(4, 36), offset_of(8, 40), flags & 1) {
            found[1] = range(bitmap, block);
            found[2] = range(table, inodes.saturating_sub(unused) * inode_size);
        }
        found.into_iter().flatten()
    };
    let mut ranges = Vec::from_iter(Some(start..end));
    for piece in (at..end).step_by(PIECE as usize) {
        let descriptors = disk.bytes(piece, PIECE.min(end - piece) as usize).ok()?;
        ranges.extend(descriptors.chunks_exact(size as usize).flat_map(of_group));
    }
    let disk_end = disk.size();
    ranges.retain(|range| range.start < range.end && range.end <= disk_end);
    Some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a disk with a file system of two groups, each with 8192 blocks of 4 KiB. The inode tables of both groups
    /// are in the first group.
    fn disk() -> Vec<u8> {
        let mut disk = vec![0; 64 << 20];
        let mut put = |at: usize, value: u32| disk[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let sb = 1024;
        for (at, value) in [(4, 16384), (20, 0), (24, 2), (32, 8192), (40, 1024), (56, 0xef53), (88, 256)] {
            put(sb + at, value);
        }
        for (group, unused) in [(0usize, 0), (1, 1000)] {
            let at = 4096 + group * 32;
            put(at, 200 + group as u32);
            put(at + 4, 300 + group as u32);
            put(at + 8, 1000 + 5000 * group as u32);
            put(at + 28, unused);
        }
        disk
    }

    #[test]
    fn tables_and_bitmaps_are_found_as_far_as_they_are_used() {
        // The bitmaps begin at the file system's blocks 200 and 300. A table of 1024 inodes of 256 bytes has 64 blocks,
        // and a table of 24 inodes has two.
        let expected = [200 / 128, 300 / 128, 1000 / 128, 1063 / 128, 6000 / 128].map(|block| block as u32);
        assert_eq!(blocks(&disk()[..]), BTreeSet::from_iter(expected.into_iter().chain([0])));
    }

    #[test]
    fn invalid_metadata_is_harmless() {
        for seed in 0..200u64 {
            let mut disk = disk();
            let mut state = seed;
            for _ in 0..8 {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                disk[1024 + (state >> 33) as usize % 4096] = (state >> 24) as u8;
            }
            assert!(blocks(&disk[..]).into_iter().all(|index| index < 128), "seed {seed}");
        }
        assert_eq!(blocks(&[0u8; 4096][..]), BTreeSet::from([0]));
    }

    /// A disk of 1 TiB that repeats one byte after its start. It records the size of the largest read.
    struct RepeatingDisk {
        start: Vec<u8>,
        rest: u8,
        largest_read: std::cell::Cell<usize>,
    }

    impl ReadAt for RepeatingDisk {
        fn size(&self) -> u64 {
            1 << 40
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
            self.largest_read.set(self.largest_read.get().max(buffer.len()));
            buffer.fill(self.rest);
            let start = self.start.get(offset as usize..).unwrap_or_default();
            buffer.iter_mut().zip(start).for_each(|(to, byte)| *to = *byte);
            Ok(())
        }
    }

    #[test]
    fn exaggerated_sizes_need_little_memory_and_time() {
        let with = |rest: u8, size: u16, changes: &[(usize, u32)]| {
            let mut start = disk();
            start.truncate(4096);
            for (at, value) in changes {
                start[1024 + at..1024 + at + 4].copy_from_slice(&value.to_le_bytes());
            }
            start[1024 + 254..1024 + 256].copy_from_slice(&size.to_le_bytes());
            RepeatingDisk { start, rest, largest_read: Default::default() }
        };
        // The file system is 64-bit, and has a huge number of groups. Each group has an inode table that covers most of
        // the disk.
        let groups = [(96, 0x80), (336, 1), (32, 1), (40, u32::MAX)];
        for (rest, size) in [(0, 64), (0x10, 32), (0xff, 64), (1, 1024)] {
            let disk = with(rest, size, &groups);
            let found = blocks(&disk);
            assert!(found.last().is_some_and(|last| u64::from(*last) < disk.size() / BLOCK as u64));
            assert!(disk.largest_read.get() <= 1 << 20, "{} bytes at once", disk.largest_read.get());
            assert!(found.len() <= BLOCKS_MAX, "{} blocks", found.len());
        }
        // No file system has descriptors of this size.
        let disk = with(0, u16::MAX, &groups);
        assert_eq!((blocks(&disk), disk.largest_read.get() <= 1 << 20), (BTreeSet::from([0]), true));
    }
}
