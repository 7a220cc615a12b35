//! The targets that parse a disk: partition tables, superblocks, metadata of ext.

use super::parsers::World;
use oven::formats::partition::{PartitionTable, ReadAt, TableScheme, gpt, mbr};
use oven::formats::{disk_size, ext_metadata, partition, superblock};
use oven::ids::BLOCK;
use std::io;

/// The largest volume that a cloud has.
const LARGEST: u64 = 16 << 40;

/// A disk that begins with the input and has zeros behind it.
struct SparseDisk<'a> {
    start: &'a [u8],
    size: u64,
}

impl ReadAt for SparseDisk<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.fill(0);
        let start =
            usize::try_from(offset).ok().and_then(|offset| self.start.get(offset..)).unwrap_or_default();
        let length = start.len().min(buffer.len());
        buffer[..length].copy_from_slice(&start[..length]);
        Ok(())
    }
}

pub fn partition_table(_: &mut World, input: &[u8]) -> bool {
    let mut accepted = false;
    for sector in [512_u16, 4096] {
        // A random change makes the checksums of a GPT wrong. With correct checksums, the values are examined, too.
        let mut sealed = input.to_vec();
        seal_gpt(&mut sealed, sector.into());
        let sector = u64::from(sector);
        for start in [input, &sealed] {
            for size in [start.len() as u64, LARGEST] {
                let disk = SparseDisk { start, size };
                let described = disk_size::described_size(&disk);
                assert!(described.is_none_or(|size| size.bytes > 0), "{described:?}");
                if let Ok(table) = partition::read(&disk, sector) {
                    check_table(&table, size, sector);
                    grow(&disk, &table, sector);
                    accepted |= table.scheme != TableScheme::None;
                }
            }
        }
    }
    accepted
}

fn check_table(table: &PartitionTable, size: u64, sector: u64) {
    let mut ranges = Vec::new();
    for partition in &table.partitions {
        assert!(partition.number > 0 && partition.size > 0 && partition.end() <= size, "{partition:?}");
        assert!(partition.start % sector == 0 && partition.size % sector == 0, "{partition:?}");
        assert!(!partition.name.contains(char::is_control), "{partition:?}");
        ranges.push((partition.start, partition.end()));
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{table:?}");
}

fn grow(disk: &SparseDisk<'_>, table: &PartitionTable, sector: u64) {
    for partition in &table.partitions {
        let growth = match table.scheme {
            TableScheme::Gpt => gpt::grow(disk, sector, partition.number),
            TableScheme::Mbr => mbr::grow(disk, sector, partition.number),
            TableScheme::None => unreachable!("there are partitions"),
        };
        let Ok(Some(growth)) = growth else { continue };
        assert!(growth.size > partition.size && partition.start + growth.size <= disk.size, "{growth:?}");
        for write in growth.writes {
            assert!(write.offset + write.bytes.len() as u64 <= disk.size, "{write:?}");
        }
    }
}

/// Writes the checksums of the primary GPT, if there is one.
fn seal_gpt(disk: &mut [u8], sector: usize) {
    let sum = |parts: &[&[u8]]| {
        let mut sum = flate2::Crc::new();
        parts.iter().for_each(|part| sum.update(part));
        sum.sum().to_le_bytes()
    };
    let Some(header) = disk.get(sector..2 * sector) else { return };
    let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()) as usize;
    let (length, entries) = (number(12), number(72).saturating_mul(sector));
    let entries = entries..entries.saturating_add(number(80).saturating_mul(number(84)));
    if let Some(entries) = disk.get(entries).map(|entries| sum(&[entries])) {
        disk[sector + 88..sector + 92].copy_from_slice(&entries);
    }
    let header = &disk[sector..2 * sector];
    if let Some(rest) = header.get(20..length) {
        let sum = sum(&[&header[..16], &[0; 4], rest]);
        disk[sector + 16..sector + 20].copy_from_slice(&sum);
    }
}

pub fn superblock(_: &mut World, input: &[u8]) -> bool {
    let mut accepted = false;
    for size in [input.len() as u64, LARGEST] {
        let found = superblock::probe(&SparseDisk { start: input, size }, 0, size);
        if let Some(found) = found {
            assert!(
                ![&found.label, &found.uuid].iter().any(|text| text.contains(char::is_control)),
                "{found:?}"
            );
            // The size saturates.
            assert!(found.size() >= found.blocks || found.block_size == 0, "{found:?}");
            accepted = true;
        }
    }
    accepted
}

pub fn ext_metadata(_: &mut World, input: &[u8]) -> bool {
    let found = ext_metadata::blocks(&SparseDisk { start: input, size: LARGEST });
    assert!(found.last().is_some_and(|last| u64::from(*last) < LARGEST / BLOCK as u64));
    found.len() > 1
}
