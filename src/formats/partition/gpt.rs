//! Reads the GUID partition table (UEFI specification, chapter 5.3), and grows a partition in it.

use super::{DamagedTable, Partition, PartitionTable, PartitionType, ReadAt, TableScheme, le32, le64};
use crate::text::is_unprintable;

const SIGNATURE: &[u8; 8] = b"EFI PART";
/// The length of the fields of a header. The specification allows more fields after them.
const HEADER_LEN: usize = 92;
/// The maximum size of the entries in bytes. 128 entries of 128 bytes are common, and this is 64 times as much.
const ENTRIES_MAX: u64 = 1 << 20;

/// A header whose checksum and place were verified.
struct Header {
    /// The whole sector of the header.
    raw: Vec<u8>,
    alternate: u64,
    first_usable: u64,
    last_usable: u64,
    entries_lba: u64,
    entry_size: usize,
    entries: Vec<u8>,
}

/// Reads the primary copy. If it is damaged, reads the backup and adds a warning.
pub fn read(disk: &(impl ReadAt + ?Sized), sector: u64) -> Result<PartitionTable, DamagedTable> {
    let why = match primary(disk, sector) {
        Ok(table) => return Ok(table),
        Err(why) => why,
    };
    let last = (disk.size() / sector).saturating_sub(1);
    match header(disk, sector, last).and_then(|h| table(&h, sector)) {
        Ok(mut table) => {
            table.warnings.push(format!("the primary GPT is damaged ({why}), so its backup is used"));
            Ok(table)
        }
        Err(backup) => Err(DamagedTable(format!(
            "both copies of the GPT are damaged (primary: {why}; backup: {backup})"
        ))),
    }
}

/// Reads the primary copy only.
pub fn primary(disk: &(impl ReadAt + ?Sized), sector: u64) -> Result<PartitionTable, DamagedTable> {
    table(&header(disk, sector, 1)?, sector)
}

/// Returns the size in bytes of the disk for which the primary copy was written, or `None` if its header is damaged. The
/// disk may be smaller, because it was truncated.
pub fn described_size(disk: &(impl ReadAt + ?Sized), sector: u64) -> Option<u64> {
    let raw = disk.bytes(sector, sector as usize).ok()?;
    let length = le32(&raw, 12) as usize;
    let is_header = &raw[..8] == SIGNATURE && (HEADER_LEN..=raw.len()).contains(&length);
    if !is_header || header_sum(&raw, length) != le32(&raw, 16) || le64(&raw, 24) != 1 {
        return None;
    }
    // The backup is in the last sector of the disk.
    let last = le64(&raw, 32).max(le64(&raw, 48));
    last.checked_add(1)?.checked_mul(sector)
}

fn header(disk: &(impl ReadAt + ?Sized), sector: u64, lba: u64) -> Result<Header, DamagedTable> {
    let damaged = |what: &str| Err(DamagedTable(what.to_owned()));
    let sectors = disk.size() / sector;
    let offset = lba.checked_mul(sector).filter(|_| lba > 0 && lba < sectors);
    let Some(Ok(raw)) = offset.map(|offset| disk.bytes(offset, sector as usize)) else {
        return damaged("the disk is too small");
    };
    if &raw[..8] != SIGNATURE {
        return damaged("it has no signature");
    }
    let length = le32(&raw, 12) as usize;
    if !(HEADER_LEN..=raw.len()).contains(&length) || header_sum(&raw, length) != le32(&raw, 16) {
        return damaged("its header's checksum is wrong");
    }
    let (count, entry_size) = (u64::from(le32(&raw, 80)), u64::from(le32(&raw, 84)));
    let (first_usable, last_usable, entries_lba) = (le64(&raw, 40), le64(&raw, 48), le64(&raw, 72));
    // Both factors are below 2^32, so the product does not overflow.
    let entries_len = count * entry_size;
    if le64(&raw, 24) != lba || entry_size < 128 || !entry_size.is_power_of_two() {
        return damaged("its header has a wrong position or an invalid entry size");
    }
    if entries_len == 0 || entries_len > ENTRIES_MAX || first_usable > last_usable || last_usable >= sectors {
        return damaged("its header does not fit the disk");
    }
    let entries = entries_lba.checked_mul(sector).filter(|_| entries_lba > 0 && entries_lba < sectors);
    let Some(Ok(entries)) = entries.map(|offset| disk.bytes(offset, entries_len as usize)) else {
        return damaged("its entries are beyond the end of the disk");
    };
    if sum(&[&entries]) != le32(&raw, 88) {
        return damaged("the checksum of its entries is wrong");
    }
    let alternate = le64(&raw, 32);
    let entry_size = entry_size as usize;
    Ok(Header { raw, alternate, first_usable, last_usable, entries_lba, entry_size, entries })
}

fn table(header: &Header, sector: u64) -> Result<PartitionTable, DamagedTable> {
    let mut partitions = Vec::new();
    for (index, entry) in header.entries.chunks_exact(header.entry_size).enumerate() {
        if entry[..16] == [0; 16] {
            continue;
        }
        let number = index as u32 + 1;
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        if first < header.first_usable || last < first || last > header.last_usable {
            return Err(DamagedTable(format!("partition {number} is outside the usable space of its table")));
        }
        // `last` is below the number of sectors, so nothing overflows.
        partitions.push(Partition {
            number,
            start: first * sector,
            size: (last - first + 1) * sector,
            kind: PartitionType::Gpt(guid(&entry[..16])),
            partuuid: guid(&entry[16..32]),
            name: name(&entry[56..128]),
        });
    }
    Ok(PartitionTable { scheme: TableScheme::Gpt, partitions, warnings: Vec::new() })
}

/// Extends a partition to the end of a disk that has become larger than its table says. Returns the necessary writes.
/// Their order is: the new backup, the primary copy, the protective MBR, and zeros over the old backup. Returns `None`
/// if the partition cannot become larger.
pub fn grow(
    disk: &(impl ReadAt + ?Sized),
    sector: u64,
    number: u32,
) -> Result<Option<PartitionGrowth>, DamagedTable> {
    let old = header(disk, sector, 1)?;
    let partitions = table(&old, sector)?.partitions;
    let root = partitions.iter().find(|p| p.number == number);
    let root = root.ok_or_else(|| DamagedTable(format!("there is no partition {number}")))?;
    let last = disk.size() / sector - 1;
    let array = (old.entries.len() as u64).div_ceil(sector);
    // The partition ends at a multiple of a MiB, as partitioning tools align partitions.
    let align = (1 << 20) / sector;
    let end = (last - array) / align * align;
    if last <= old.alternate || partitions.iter().any(|p| end * sector <= p.end()) {
        return Ok(None);
    }
    if let Some(next) = partitions.iter().find(|p| p.start >= root.end()) {
        return Err(DamagedTable(format!(
            "partition {number} cannot grow, because partition {} follows it",
            next.number
        )));
    }

    let mut entries = old.entries.clone();
    let at = (number as usize - 1) * old.entry_size;
    entries[at + 40..at + 48].copy_from_slice(&(end - 1).to_le_bytes());
    let header_sector = |my: u64, other: u64, entries_lba: u64| {
        let mut raw = old.raw.clone();
        raw[24..32].copy_from_slice(&my.to_le_bytes());
        raw[32..40].copy_from_slice(&other.to_le_bytes());
        raw[48..56].copy_from_slice(&(last - array - 1).to_le_bytes());
        raw[72..80].copy_from_slice(&entries_lba.to_le_bytes());
        raw[88..92].copy_from_slice(&sum(&[&entries]).to_le_bytes());
        let length = le32(&raw, 12) as usize;
        let sum = header_sum(&raw, length);
        raw[16..20].copy_from_slice(&sum.to_le_bytes());
        raw
    };
    let mut writes = vec![
        DiskWrite { offset: (last - array) * sector, bytes: entries.clone() },
        DiskWrite { offset: last * sector, bytes: header_sector(last, 1, last - array) },
        DiskWrite { offset: old.entries_lba * sector, bytes: entries.clone() },
        DiskWrite { offset: sector, bytes: header_sector(1, last, old.entries_lba) },
    ];
    let protective = disk.bytes(446, 64).map_err(|e| DamagedTable(e.to_string()))?;
    if let Some(index) = protective.chunks_exact(16).position(|entry| entry[4] == 0xee) {
        let covered = u32::try_from(last).unwrap_or(u32::MAX).to_le_bytes();
        writes.push(DiskWrite { offset: 446 + 16 * index as u64 + 12, bytes: covered.into() });
    }
    // The old backup is not at the end of the larger disk. It is overwritten, because it would confuse tools that
    // search for a header.
    if old.alternate > 1 && old.alternate < last - array && header(disk, sector, old.alternate).is_ok() {
        writes.push(DiskWrite { offset: old.alternate * sector, bytes: vec![0; sector as usize] });
    }
    Ok(Some(PartitionGrowth { writes, size: end * sector - root.start }))
}

/// The new size of a partition, and the writes that give the partition this size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionGrowth {
    pub writes: Vec<DiskWrite>,
    /// The partition's new size in bytes.
    pub size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskWrite {
    pub offset: u64,
    pub bytes: Vec<u8>,
}

fn header_sum(raw: &[u8], length: usize) -> u32 {
    // The checksum is computed as if its own field were zero.
    sum(&[&raw[..16], &[0; 4], &raw[20..length]])
}

fn sum(parts: &[&[u8]]) -> u32 {
    let mut crc = flate2::Crc::new();
    parts.iter().for_each(|part| crc.update(part));
    crc.sum()
}

/// Formats a GUID. Its first three fields are little-endian.
fn guid(b: &[u8]) -> String {
    let hex = |order: &[usize]| order.iter().map(|&i| format!("{:02x}", b[i])).collect::<String>();
    let (head, tail) = (hex(&[3, 2, 1, 0]), hex(&[10, 11, 12, 13, 14, 15]));
    format!("{head}-{}-{}-{}-{tail}", hex(&[5, 4]), hex(&[7, 6]), hex(&[8, 9]))
}

fn name(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).take_while(|&u| u != 0);
    let name: String = char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
    name.replace(is_unprintable, "\u{fffd}")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::formats::partition::read as read_table;

    /// Returns a disk with this many sectors. Partition 1 has the sectors 200 to 299, and partition 15 has the sectors
    /// 100 to 149.
    pub fn disk(sector: u64, sectors: u64) -> Vec<u8> {
        let s = sector as usize;
        let mut disk = vec![0; s * sectors as usize];
        disk[446 + 4] = 0xee;
        disk[446 + 8..446 + 12].copy_from_slice(&1u32.to_le_bytes());
        disk[446 + 12..446 + 16].copy_from_slice(&(sectors as u32 - 1).to_le_bytes());
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        let array = 16384u64.div_ceil(sector);
        for (my, other, at) in [(1, sectors - 1, 2), (sectors - 1, 1, sectors - 1 - array)] {
            let h = my as usize * s;
            disk[h..h + 8].copy_from_slice(SIGNATURE);
            let fields = [(8, 0x10000u64, 4), (12, 92, 4), (24, my, 8), (32, other, 8), (40, 2 + array, 8)];
            let more = [(48, sectors - 2 - array, 8), (72, at, 8), (80, 128, 4), (84, 128, 4)];
            for (offset, value, length) in fields.into_iter().chain(more) {
                disk[h + offset..h + offset + length].copy_from_slice(&value.to_le_bytes()[..length]);
            }
            for (index, first, last, label) in [(0, 200u64, 299u64, "root"), (14, 100, 149, "EFI\n")] {
                let e = at as usize * s + index * 128;
                disk[e..e + 16].fill(0x10 + index as u8);
                disk[e + 16..e + 32].copy_from_slice(&std::array::from_fn::<u8, 16, _>(|i| i as u8));
                disk[e + 32..e + 40].copy_from_slice(&first.to_le_bytes());
                disk[e + 40..e + 48].copy_from_slice(&last.to_le_bytes());
                for (i, unit) in label.encode_utf16().enumerate() {
                    disk[e + 56 + 2 * i..e + 58 + 2 * i].copy_from_slice(&unit.to_le_bytes());
                }
            }
        }
        seal(&mut disk, sector);
        disk
    }

    /// Corrects the checksums. A checksum of bytes that are not on the disk is left unchanged.
    pub fn seal(disk: &mut [u8], sector: u64) {
        let s = sector as usize;
        for h in [s, disk.len() - s] {
            let entries = (le64(disk, h + 72) as usize).saturating_mul(s);
            let length = (le32(disk, h + 80) as usize).saturating_mul(le32(disk, h + 84) as usize);
            if let Some(bytes) = disk.get(entries..entries.saturating_add(length)) {
                let sum = sum(&[bytes]).to_le_bytes();
                disk[h + 88..h + 92].copy_from_slice(&sum);
            }
            let length = le32(disk, h + 12) as usize;
            if (HEADER_LEN..=s).contains(&length) {
                let sum = header_sum(&disk[h..h + s], length).to_le_bytes();
                disk[h + 16..h + 20].copy_from_slice(&sum);
            }
        }
    }

    #[test]
    fn partitions_of_both_sector_sizes() {
        for sector in [512, 4096] {
            let table = read_table(&disk(sector, 400)[..], sector).unwrap();
            assert_eq!((table.scheme, table.warnings.len()), (TableScheme::Gpt, 0));
            let [root, efi] = &table.partitions[..] else { panic!("{table:?}") };
            assert_eq!((root.number, root.start, root.size), (1, 200 * sector, 100 * sector));
            assert_eq!(
                (root.name.as_str(), root.partuuid.as_str()),
                ("root", "03020100-0504-0706-0809-0a0b0c0d0e0f")
            );
            assert_eq!((efi.number, efi.name.as_str()), (15, "EFI\u{fffd}"));
        }
    }

    #[test]
    fn the_backup_stands_in_with_a_warning() {
        let whole = disk(512, 400);
        for (what, at) in [("signature", 512), ("header", 512 + 40), ("entries", 1024)] {
            let mut disk = whole.clone();
            disk[at] ^= 1;
            let table = read_table(&disk[..], 512).unwrap();
            assert_eq!(table.partitions, read_table(&whole[..], 512).unwrap().partitions, "{what}");
            assert!(table.warnings[0].contains("backup"), "{what}");
            let end = disk.len();
            disk[end - 512 + 40] ^= 1;
            let error = format!("{:#}", read_table(&disk[..], 512).unwrap_err());
            assert!(error.contains("both copies of the GPT are damaged"), "{what}: {error}");
        }
    }

    #[test]
    fn overlaps_and_strays_are_rejected() {
        for (first, last) in [(140u64, 299u64), (200, 399), (200, 199), (1, 50), (0, u64::MAX)] {
            let mut disk = disk(512, 400);
            for e in [2 * 512, (399 - 32) * 512] {
                disk[e + 32..e + 40].copy_from_slice(&first.to_le_bytes());
                disk[e + 40..e + 48].copy_from_slice(&last.to_le_bytes());
            }
            seal(&mut disk, 512);
            assert!(read_table(&disk[..], 512).is_err(), "{first}..{last}");
        }
    }

    #[test]
    fn grows_the_last_partition_and_moves_the_backup() {
        for sector in [512u64, 4096] {
            let mut disk = disk(sector, 400);
            let before = read_table(&disk[..], sector).unwrap();
            assert_eq!(grow(&disk[..], sector, 1).unwrap(), None);
            disk.resize(8 << 20, 0);
            let growth = grow(&disk[..], sector, 1).unwrap().unwrap();
            assert!(grow(&disk[..], sector, 15).unwrap_err().0.contains("partition 1 follows it"));
            for DiskWrite { offset, bytes } in &growth.writes {
                disk[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
            }
            let after = read_table(&disk[..], sector).unwrap();
            assert_eq!(after.partitions[0].size, growth.size);
            assert_eq!(after.partitions[0].end(), 7 << 20);
            assert_eq!(after.partitions[1], before.partitions[1]);
            disk[sector as usize] ^= 1; // damages the primary copy, so that the moved backup is read
            assert_eq!(read_table(&disk[..], sector).unwrap().partitions, after.partitions);
            let signatures = disk.windows(8).filter(|w| w == SIGNATURE).count();
            assert_eq!(signatures, 1, "the old backup is gone");
        }
    }
}
