//! The size of a disk according to its own partition table or file system. A file that is shorter was truncated, for
//! example by a download that was interrupted.

use super::partition::mbr::{self, MbrContent};
use super::partition::{Partition, ReadAt, gpt};
use super::superblock;

/// The sizes of a sector in bytes. An image of a disk with larger sectors has its GPT at another place.
const SECTORS: [u64; 2] = [512, 4096];

/// The size that a disk must have at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DescribedSize {
    pub bytes: u64,
    /// What describes this size: `GPT`, `MBR`, or the type of a file system.
    pub source: &'static str,
}

/// Returns the size that the disk must have at least, according to its partition table, or to its file system if there
/// is no table. Returns `None` if the disk describes no size, or if its table is damaged. The bytes are not trusted.
pub fn described_size(disk: &(impl ReadAt + ?Sized)) -> Option<DescribedSize> {
    let boot = disk.bytes(0, SECTORS[0] as usize).ok()?;
    let content = mbr::read(disk, SECTORS[0], &boot);
    let of_mbr = |bytes: Option<u64>| bytes.map(|bytes| DescribedSize { bytes, source: "MBR" });
    // The disk may still have the GPT of an earlier image, whose partitions nothing uses.
    if let Ok(MbrContent::Protective | MbrContent::Nothing) = content
        && let Some(bytes) = SECTORS.into_iter().find_map(|sector| gpt::described_size(disk, sector))
    {
        return Some(DescribedSize { bytes, source: "GPT" });
    }
    match content {
        Ok(MbrContent::Table(partitions)) => of_mbr(partitions.iter().map(Partition::end).max()),
        // The file ends before the GPT, or the table leads to a sector that the file does not have.
        Ok(MbrContent::Protective) if disk.size() >= 2 * SECTORS[0] => None,
        Ok(MbrContent::Protective) | Err(_) => {
            of_mbr(mbr::described_end(&boot, SECTORS[0]).filter(|end| *end > disk.size()))
        }
        Ok(MbrContent::Nothing) => {
            let fs = superblock::probe(disk, 0, disk.size())?;
            Some(DescribedSize { bytes: fs.size(), source: fs.kind.name() }).filter(|size| size.bytes > 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::partition::{gpt, mbr};

    fn size_of(disk: &[u8]) -> Option<(u64, &'static str)> {
        described_size(disk).map(|size| (size.bytes, size.source))
    }

    #[test]
    fn a_table_describes_the_size_of_its_disk_even_if_the_end_is_missing() {
        for sector in [512, 4096] {
            let disk = gpt::tests::disk(sector, 400);
            let whole = Some((400 * sector, "GPT"));
            // Without the backup, without half of the disk, and without everything after the header.
            for length in [disk.len(), disk.len() - 1, disk.len() / 2, 2 * sector as usize] {
                assert_eq!(size_of(&disk[..length]), whole, "{length}");
            }
            // A damaged header describes nothing.
            let mut damaged = disk.clone();
            damaged[sector as usize + 32] ^= 1;
            assert_eq!(size_of(&damaged), None);
        }
        let disk = gpt::tests::disk(512, 400);
        assert_eq!(size_of(&disk[..512]), Some((400 * 512, "MBR")), "only the protective MBR is left");

        let disk = mbr::tests::disk(512, 400);
        let whole = size_of(&disk);
        let end = crate::formats::partition::read(&disk[..], 512).unwrap().partitions;
        let end = end.iter().map(Partition::end).max().unwrap();
        assert_eq!(whole, Some((end, "MBR")));
        for length in [end as usize - 1, 1024, 512] {
            let described = described_size(&disk[..length]).unwrap();
            assert!(described.source == "MBR" && described.bytes >= end, "{length}: {described:?}");
        }
        assert_eq!(size_of(&disk[..511]), None);
    }

    #[test]
    fn an_earlier_table_describes_nothing() {
        // An image with an MBR was written over a larger disk with a GPT, whose header is still on the disk.
        let (old, new) = (gpt::tests::disk(512, 4000), mbr::tests::disk(512, 400));
        let mut disk = old;
        disk[..512].copy_from_slice(&new[..512]);
        disk[1024..new.len()].copy_from_slice(&new[1024..]);
        let disk = &disk[..new.len()];
        assert_eq!(size_of(disk), size_of(&new));
        assert!(crate::formats::partition::read(disk, 512).is_ok());
        // Without any table in the first sector, the GPT is used.
        let mut disk = gpt::tests::disk(512, 400);
        disk[..512].fill(0);
        assert_eq!(size_of(&disk[..4096]), Some((400 * 512, "GPT")));
    }

    #[test]
    fn a_file_system_without_a_table_describes_its_size() {
        let mut ext = vec![0; 1 << 16];
        ext[1080..1082].copy_from_slice(&[0x53, 0xef]);
        ext[1024 + 24] = 2; // blocks of 4096 bytes
        ext[1024 + 4..1024 + 8].copy_from_slice(&1000u32.to_le_bytes());
        assert_eq!(size_of(&ext), Some((1000 * 4096, "ext2")));
        ext[1024 + 96] = 0x40; // extents
        assert_eq!(size_of(&ext[..4096]), Some((1000 * 4096, "ext4")));
        let mut xfs = vec![0; 1 << 16];
        xfs[..4].copy_from_slice(b"XFSB");
        xfs[4..8].copy_from_slice(&4096u32.to_be_bytes());
        xfs[8..16].copy_from_slice(&70_000u64.to_be_bytes());
        assert_eq!(size_of(&xfs[..512]), Some((70_000 * 4096, "xfs")));
        assert_eq!(size_of(&[0; 4096]), None);
    }
}
