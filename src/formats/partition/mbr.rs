//! Reads the PC's master boot record, and grows a partition in it. The record has four primary partitions and a chain
//! of logical ones.

use super::gpt::{DiskWrite, PartitionGrowth};
use super::{DamagedTable, Partition, PartitionType, ReadAt, le16, le32};

/// The maximum number of logical partitions. A longer chain is invalid, and is probably a loop.
const LOGICAL_MAX: u32 = 60;

/// The content of a boot sector.
pub enum MbrContent {
    Nothing,
    /// The protective entry of a GPT.
    Protective,
    Table(Vec<Partition>),
}

struct Entry {
    kind: u8,
    /// The first sector. `count` is the number of sectors.
    start: u64,
    count: u64,
}

impl Entry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

/// Returns the four entries of a boot sector, or `None` if the sector is not a boot record.
fn entries(boot: &[u8]) -> Option<[Entry; 4]> {
    let signed = boot.len() >= 512 && le16(boot, 510) == 0xaa55;
    let at = |i: usize| &boot[446 + 16 * i..462 + 16 * i];
    // The first byte of an entry is 0 or 0x80. With any other value, this is the boot sector of a file system, which
    // has code in place of the entries.
    if !signed || (0..4).any(|i| at(i)[0] & 0x7f != 0) {
        return None;
    }
    Some(std::array::from_fn(|i| {
        let (start, count) = (u64::from(le32(at(i), 8)), u64::from(le32(at(i), 12)));
        Entry { kind: if count == 0 { 0 } else { at(i)[4] }, start, count }
    }))
}

pub fn read(disk: &(impl ReadAt + ?Sized), sector: u64, boot: &[u8]) -> Result<MbrContent, DamagedTable> {
    let Some(primary) = entries(boot) else { return Ok(MbrContent::Nothing) };
    if primary.iter().any(|entry| entry.kind == 0xee) {
        return Ok(MbrContent::Protective);
    }
    let id = le32(boot, 440);
    let partition = |number: u32, kind: u8, start: u64, count: u64| Partition {
        number,
        // `start` and `count` are sums of 32-bit numbers, and `sector` is at most 4096. So the products do not
        // overflow.
        start: start * sector,
        size: count * sector,
        kind: PartitionType::Mbr(kind),
        partuuid: format!("{id:08x}-{number:02x}"),
        name: String::new(),
    };
    let mut found = Vec::new();
    for (index, entry) in primary.iter().enumerate().filter(|(_, entry)| entry.kind != 0) {
        if entry.is_extended() {
            read_logical(disk, sector, entry, |number, kind, start, count| {
                found.push(partition(number, kind, start, count));
            })?;
        } else if entry.start == 0 {
            return Err(DamagedTable(format!(
                "partition {} begins at sector 0, which contains the partition table",
                index + 1
            )));
        } else {
            found.push(partition(index as u32 + 1, entry.kind, entry.start, entry.count));
        }
    }
    found.sort_by_key(|p| p.number);
    Ok(if found.is_empty() { MbrContent::Nothing } else { MbrContent::Table(found) })
}

/// Returns the end in bytes of the last entry of a boot sector, or `None` if there is no entry. The entry of a GPT may
/// have the largest possible size, whatever the size of the disk is. Such an entry does not count.
pub fn described_end(boot: &[u8], sector: u64) -> Option<u64> {
    let is_real = |entry: &&Entry| entry.kind != 0 && entry.count != u64::from(u32::MAX);
    entries(boot)?.iter().filter(is_real).map(|entry| (entry.start + entry.count) * sector).max()
}

/// Reads the logical partitions. Each of them has its own boot record, which says where the next boot record is.
fn read_logical(
    disk: &(impl ReadAt + ?Sized),
    sector: u64,
    extended: &Entry,
    mut found: impl FnMut(u32, u8, u64, u64),
) -> Result<(), DamagedTable> {
    let mut at = extended.start;
    let mut number = 5;
    loop {
        let boot = disk.bytes(at * sector, 512);
        let boot = boot.map_err(|_| DamagedTable("the extended partition exceeds the disk".into()))?;
        // If the extended partition is empty, its first sector may have any content.
        let Some([own, next, ..]) = entries(&boot) else { return Ok(()) };
        if own.kind != 0 && !own.is_extended() {
            let (start, end) = (at + own.start, extended.start + extended.count);
            if own.start == 0 || start + own.count > end {
                return Err(DamagedTable(format!("partition {number} exceeds the extended partition")));
            }
            found(number, own.kind, start, own.count);
            number += 1;
        }
        if !next.is_extended() {
            return Ok(());
        }
        let onward = extended.start + next.start;
        // Tools write the chain in ascending order. A link to an earlier sector would make a loop.
        if onward <= at || number > LOGICAL_MAX {
            return Err(DamagedTable("the list of logical partitions has no end".into()));
        }
        at = onward;
    }
}

/// Extends a primary partition to the end of the disk. Returns the necessary write, or `None` if the partition cannot
/// become larger.
pub fn grow(
    disk: &(impl ReadAt + ?Sized),
    sector: u64,
    number: u32,
) -> Result<Option<PartitionGrowth>, DamagedTable> {
    let boot = disk.bytes(0, 512).map_err(|e| DamagedTable(e.to_string()))?;
    let primary = entries(&boot).ok_or_else(|| DamagedTable("there is no MBR".into()))?;
    let align = (1 << 20) / sector;
    let limit = disk.size() / sector / align * align;
    if primary.iter().any(|entry| entry.kind != 0 && entry.start + entry.count >= limit) {
        return Ok(None);
    }
    if number > 4 {
        return Err(DamagedTable(format!(
            "partition {number} is a logical partition, which oven does not grow"
        )));
    }
    let root = &primary[number as usize - 1];
    let end = root.start + root.count;
    if let Some(next) = primary.iter().position(|other| other.kind != 0 && other.start >= end) {
        return Err(DamagedTable(format!(
            "partition {number} cannot grow, because partition {} follows it",
            next + 1
        )));
    }
    // The field for the number of sectors has 32 bits.
    let limit = limit.min((root.start + u64::from(u32::MAX)) / align * align);
    if limit <= end {
        return Ok(None);
    }
    let count = limit - root.start;
    let bytes = (count as u32).to_le_bytes().into();
    let write = DiskWrite { offset: 446 + 16 * (u64::from(number) - 1) + 12, bytes };
    Ok(Some(PartitionGrowth { writes: vec![write], size: count * sector }))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::formats::partition::{TableScheme, read as read_table};

    /// Writes an entry of the boot sector that begins at the byte `at`.
    fn put(disk: &mut [u8], at: usize, index: usize, entry: &Entry) {
        let e = at + 446 + 16 * index;
        disk[e + 4] = entry.kind;
        disk[e + 8..e + 12].copy_from_slice(&(entry.start as u32).to_le_bytes());
        disk[e + 12..e + 16].copy_from_slice(&(entry.count as u32).to_le_bytes());
        disk[at + 510..at + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    /// Returns a disk with partition 2 in the sectors 10 to 59. An extended partition in the sectors 100 to 299 has the
    /// partitions 5 (110 to 159) and 6 (210 to 259).
    pub fn disk(sector: u64, sectors: u64) -> Vec<u8> {
        let s = sector as usize;
        let mut disk = vec![0; s * sectors as usize];
        disk[440..444].copy_from_slice(&0x0bad_cafe_u32.to_le_bytes());
        put(&mut disk, 0, 1, &Entry { kind: 0x83, start: 10, count: 50 });
        put(&mut disk, 0, 2, &Entry { kind: 0x0f, start: 100, count: 200 });
        put(&mut disk, 100 * s, 0, &Entry { kind: 0x83, start: 10, count: 50 });
        put(&mut disk, 100 * s, 1, &Entry { kind: 0x05, start: 100, count: 60 });
        put(&mut disk, 200 * s, 0, &Entry { kind: 0x82, start: 10, count: 50 });
        disk
    }

    #[test]
    fn primary_and_logical() {
        for sector in [512, 4096] {
            let table = read_table(&disk(sector, 400)[..], sector).unwrap();
            assert_eq!(table.scheme, TableScheme::Mbr);
            let seen: Vec<_> =
                table.partitions.iter().map(|p| (p.number, p.start / sector, p.size / sector)).collect();
            assert_eq!(seen, [(2, 10, 50), (5, 110, 50), (6, 210, 50)]);
            assert_eq!(table.partitions[1].partuuid, "0badcafe-05");
            assert_eq!(table.partitions[2].kind, PartitionType::Mbr(0x82));
        }
    }

    #[test]
    fn a_chain_that_turns_back_is_rejected() {
        let mut looped = disk(512, 400);
        put(&mut looped, 200 * 512, 1, &Entry { kind: 0x05, start: 0, count: 60 });
        assert!(format!("{:#}", read_table(&looped[..], 512).unwrap_err()).contains("has no end"));
        let mut far = disk(512, 400);
        put(&mut far, 200 * 512, 1, &Entry { kind: 0x05, start: 5000, count: 60 });
        assert!(format!("{:#}", read_table(&far[..], 512).unwrap_err()).contains("exceeds the disk"));
    }

    #[test]
    fn overlap_end_and_boot_sectors_of_file_systems() {
        let mut overlap = disk(512, 400);
        put(&mut overlap, 0, 0, &Entry { kind: 0x83, start: 20, count: 5 });
        assert!(format!("{:#}", read_table(&overlap[..], 512).unwrap_err()).contains("overlap"));
        let mut long = disk(512, 400);
        put(&mut long, 0, 0, &Entry { kind: 0x83, start: 300, count: 101 });
        assert!(format!("{:#}", read_table(&long[..], 512).unwrap_err()).contains("ends beyond the disk"));
        let mut code = disk(512, 400);
        code[446] = 0xeb;
        assert_eq!(read_table(&code[..], 512).unwrap().scheme, TableScheme::None);
    }

    #[test]
    fn grows_a_primary_partition_that_is_last() {
        let mut small = disk(512, 400);
        small.resize(4 << 20, 0);
        assert!(grow(&small[..], 512, 2).unwrap_err().0.contains("partition 3 follows it"));
        assert!(grow(&small[..], 512, 5).unwrap_err().0.contains("logical"));
        small[446 + 32..446 + 48].fill(0);
        let growth = grow(&small[..], 512, 2).unwrap().unwrap();
        let DiskWrite { offset, bytes } = &growth.writes[0];
        small[*offset as usize..*offset as usize + 4].copy_from_slice(bytes);
        let table = read_table(&small[..], 512).unwrap();
        assert_eq!((table.partitions[0].size, table.partitions[0].end()), (growth.size, 4 << 20));
        assert_eq!(grow(&small[..], 512, 2).unwrap(), None);
    }
}
