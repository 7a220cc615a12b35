//! Reads partition tables (GPT and MBR) from bytes. The tables are not trusted.

pub mod gpt;
pub mod mbr;

use crate::error::Kind;
use anyhow::{Context, Result};
use std::fmt;
use std::io;

/// Bytes that can be read at any offset: a disk, or a slice in tests.
pub trait ReadAt {
    /// Returns the size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffer. Fails if reading fails or if the range is not on the disk.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Reads exactly `length` bytes. If `length` depends on a number from the disk, the caller must limit it first.
    fn bytes(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; length];
        self.read_at(offset, &mut buffer)?;
        Ok(buffer)
    }
}

impl ReadAt for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let range =
            usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(buffer.len())?));
        let bytes = range.and_then(|range| self.get(range)).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableScheme {
    /// There is no table. The whole disk may be a file system.
    None,
    Gpt,
    Mbr,
}

/// The purpose of a partition, according to its table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PartitionType {
    /// A GUID, in lower case.
    Gpt(String),
    Mbr(u8),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// The kernel's number of the partition. The numbers begin with 1. The numbers of logical partitions begin with 5.
    pub number: u32,
    /// In bytes, from the start of the disk.
    pub start: u64,
    /// In bytes.
    pub size: u64,
    pub kind: PartitionType,
    /// As `/dev/disk/by-partuuid` spells it.
    pub partuuid: String,
    /// The GPT's name; empty if there is none.
    pub name: String,
}

impl Partition {
    /// Returns the offset of the first byte after the partition.
    pub fn end(&self) -> u64 {
        self.start + self.size
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionTable {
    pub scheme: TableScheme,
    /// The partitions, sorted by number. No partition overlaps another or exceeds the disk.
    pub partitions: Vec<Partition>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
}

/// The reason why a table was rejected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedTable(pub String);
impl fmt::Display for DamagedTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Reads the table of a disk with logical sectors of `sector` bytes (512 or 4096).
pub fn read(disk: &(impl ReadAt + ?Sized), sector: u64) -> Result<PartitionTable> {
    if !matches!(sector, 512 | 4096) {
        return Err(Kind::Machine
            .error(format!("the disk has sectors of {sector} bytes, but oven supports only 512 and 4096")));
    }
    let no_table = PartitionTable { scheme: TableScheme::None, partitions: Vec::new(), warnings: Vec::new() };
    let Ok(boot) = disk.bytes(0, sector as usize) else { return Ok(no_table) };
    let table = match mbr::read(disk, sector, &boot) {
        Ok(mbr::MbrContent::Protective) => {
            gpt::read(disk, sector).map_err(|why| damaged_gpt(disk, sector, &why))?
        }
        Ok(mbr::MbrContent::Table(partitions)) => {
            PartitionTable { scheme: TableScheme::Mbr, partitions, ..no_table }
        }
        Ok(mbr::MbrContent::Nothing) => match gpt::primary(disk, sector) {
            // The first sector was overwritten, so the GPT has no protective MBR. oven can use the partitions, but
            // firmware and other systems would not find them.
            Ok(mut table) => {
                table.warnings.push("the disk has a GPT without a protective MBR".into());
                table
            }
            Err(_) => no_table,
        },
        Err(why) => return Err(damaged_table(&why)),
    };
    check(&table.partitions, disk.size())
        .map_err(|why| damaged_table(&why))
        .context("checking the partition table")?;
    Ok(table)
}

fn damaged_table(why: &DamagedTable) -> anyhow::Error {
    let failure = Kind::Definition.failure(format!("the disk's partition table cannot be used: {why}"));
    failure.hint("Repair the base image, or bake on another one.").into()
}

/// Returns the error for a damaged GPT. An image that was made for the other sector size has its GPT at another place.
/// In this case, the error names both sector sizes.
fn damaged_gpt(disk: &(impl ReadAt + ?Sized), sector: u64, why: &DamagedTable) -> anyhow::Error {
    let other = if sector == 512 { 4096 } else { 512 };
    if gpt::primary(disk, other).is_ok() {
        return damaged_table(&DamagedTable(format!(
            "it was made for sectors of {other} bytes, but the disk has sectors of {sector} bytes"
        )));
    }
    damaged_table(why)
}

/// Checks that no partition exceeds the disk or overlaps another.
fn check(partitions: &[Partition], disk: u64) -> Result<(), DamagedTable> {
    let mut sorted: Vec<_> = partitions.iter().collect();
    sorted.sort_by_key(|p| p.start);
    for p in &sorted {
        if p.start.checked_add(p.size).is_none_or(|end| end > disk) {
            return Err(DamagedTable(format!("partition {} ends beyond the disk", p.number)));
        }
    }
    for pair in sorted.windows(2) {
        if pair[0].end() > pair[1].start {
            return Err(DamagedTable(format!(
                "partitions {} and {} overlap",
                pair[0].number, pair[1].number
            )));
        }
    }
    Ok(())
}

/// Reads a little-endian number of a slice. `at` is a constant of a format and lies within the slice.
pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}
pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small random generator (xorshift64*), which returns the same numbers in each run.
    pub struct Random(pub u64);
    impl Random {
        pub fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }
        pub fn below(&mut self, limit: usize) -> usize {
            (self.next() % limit as u64) as usize
        }
    }

    /// Checks the conditions that every returned table must satisfy, even if the disk has random bytes.
    fn check_invariants(disk: &[u8], sector: u64) {
        if let Ok(table) = read(disk, sector) {
            let mut ends = Vec::new();
            for p in &table.partitions {
                assert!(p.number > 0 && p.size > 0 && p.end() <= disk.len() as u64, "{p:?}");
                assert!(p.start % sector == 0 && p.size % sector == 0, "{p:?}");
                assert!(!p.name.contains(|c: char| c.is_control()), "{p:?}");
                ends.push((p.start, p.end()));
            }
            ends.sort_unstable();
            assert!(ends.windows(2).all(|w| w[0].1 <= w[1].0), "{table:?}");
        }
    }

    #[test]
    fn no_mutation_of_a_table_panics_or_breaks_an_invariant() {
        let mut random = Random(0x00fe_11ce);
        for sector in [512u64, 4096] {
            let gpt = gpt::tests::disk(sector, 400);
            let mbr = mbr::tests::disk(sector, 400);
            for round in 0..6000 {
                let mut disk = if round % 2 == 0 { gpt.clone() } else { mbr.clone() };
                for _ in 0..1 + random.below(6) {
                    let hot = [446, 512, sector as usize, 2 * sector as usize, disk.len() - sector as usize];
                    let at = match random.below(3) {
                        0 => random.below(disk.len()),
                        _ => (hot[random.below(hot.len())] + random.below(160)) % disk.len(),
                    };
                    disk[at] = [0, 0xff, 0x80, random.next() as u8][random.below(4)];
                }
                if round % 3 == 0 {
                    gpt::tests::seal(&mut disk, sector); // makes the checksums correct for the damaged values
                }
                disk.truncate(disk.len() - [0, 0, 0, random.below(disk.len())][random.below(4)]);
                check_invariants(&disk, sector);
            }
        }
    }

    #[test]
    fn noise_is_no_table() {
        let mut random = Random(7);
        for length in [0, 1, 511, 512, 513, 1024, 40_000] {
            let disk: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
            check_invariants(&disk, 512);
            check_invariants(&disk, 4096);
        }
        assert_eq!(read(&[0u8; 100_000][..], 512).unwrap().scheme, TableScheme::None);
    }

    #[test]
    fn an_image_for_other_sectors_is_named() {
        let disk = gpt::tests::disk(512, 400);
        let error = read(&disk[..], 4096).unwrap_err();
        assert!(
            format!("{error:#}")
                .contains("made for sectors of 512 bytes, but the disk has sectors of 4096 bytes"),
            "{error:#}"
        );
    }

    #[test]
    fn a_lost_protective_mbr_is_warned_about() {
        let mut disk = gpt::tests::disk(512, 400);
        disk[..512].fill(0);
        let table = read(&disk[..], 512).unwrap();
        assert_eq!((table.scheme, table.partitions.len()), (TableScheme::Gpt, 2));
        assert!(table.warnings[0].contains("protective MBR"));
    }
}
