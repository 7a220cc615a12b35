//! Recognizes the content of a partition by its superblock. Nothing is mounted, and the kernel is not asked.

use super::partition::{ReadAt, le16, le32};
use crate::text::is_unprintable;
use std::fmt;

/// The type of a partition's content. Only some types can be a root. Error messages name the other types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystemType {
    Ext2,
    Ext3,
    Ext4,
    Xfs,
    Vfat,
    Btrfs,
    Swap,
    Lvm,
    Luks,
    Raid,
    Other(&'static str),
}

impl FileSystemType {
    /// Returns the kernel's name of a file system, or the common name of other content.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Vfat => "vfat",
            Self::Btrfs => "btrfs",
            Self::Swap => "swap",
            Self::Lvm => "LVM",
            Self::Luks => "LUKS",
            Self::Raid => "MD RAID",
            Self::Other(name) => name,
        }
    }
}
impl fmt::Display for FileSystemType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    pub kind: FileSystemType,
    /// The UUID, as `/dev/disk/by-uuid` spells it. Empty if there is none.
    pub uuid: String,
    /// The label, without control characters. Empty if there is none.
    pub label: String,
    /// In bytes; 0 if it is unknown.
    pub block_size: u64,
    pub blocks: u64,
    /// For ext, whether the journal has to be replayed. XFS does not record this in its superblock.
    pub dirty: bool,
    /// For ext, the number of errors that the kernel has recorded since the last check.
    pub errors: u32,
    /// For ext, the codes of the first and of the newest recorded error.
    pub error_codes: ErrorCodes,
    /// For ext, the reason why this file system must not be mounted, if there is one.
    pub hazard: Option<MountHazard>,
    /// For XFS, the maximum share of the space that inodes may use, in percent.
    pub inode_percent: u32,
}

/// The codes of an ext file system's first and newest errors. They are numbers of ext4, and not of errno.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ErrorCodes {
    pub first: u8,
    pub last: u8,
}

impl ErrorCodes {
    /// Returns whether the kernel found damage of the file system, and not an error of the storage. `earlier` is the
    /// number of errors that were recorded before. The first error counts, because after it the kernel aborts the
    /// journal, and then records other errors. If there were earlier errors, the first one of the new ones is unknown.
    pub fn are_damage(self, earlier: u64) -> bool {
        // EFSBADCRC and EFSCORRUPTED.
        let is_damage = |code: u8| matches!(code, 4 | 5);
        is_damage(self.first) || (earlier > 0 && is_damage(self.last))
    }
}

/// A property of an ext file system that makes it unsafe to mount. Images do not need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountHazard {
    /// Multi-mount protection. Each mount waits as long as the superblock says, which may be some minutes.
    MultiMountProtection,
    /// The journal is on another device. The kernel would open the device of this machine that the superblock names.
    ExternalJournal,
    /// The superblock contains a mount option that is not on oven's list. The kernel applies it to every mount.
    MountOption(String),
}
impl fmt::Display for MountHazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MultiMountProtection => f.write_str("it has multi-mount protection (mmp)"),
            Self::ExternalJournal => f.write_str("its journal is on another device"),
            Self::MountOption(option) => write!(f, "its superblock sets the mount option {option:?}"),
        }
    }
}
impl MountHazard {
    /// A sentence that says how to remove the property.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::MultiMountProtection => "Turn it off with `tune2fs -O ^mmp`.",
            Self::ExternalJournal => {
                "Create an internal journal with `tune2fs -O ^has_journal` and `tune2fs -j`."
            }
            Self::MountOption(_) => "Remove the options with `tune2fs -E mount_opts=`.",
        }
    }
}

/// The mount options that a superblock may contain. They change neither how the kernel treats errors (oven's own option
/// overrides `errors=`), nor what it opens besides the file system.
const HARMLESS_OPTIONS: [&str; 19] = [
    "acl",
    "noacl",
    "user_xattr",
    "nouser_xattr",
    "barrier",
    "nobarrier",
    "delalloc",
    "nodelalloc",
    "discard",
    "nodiscard",
    "lazytime",
    "nolazytime",
    "auto_da_alloc",
    "noauto_da_alloc",
    "data=ordered",
    "data=writeback",
    "errors=continue",
    "errors=remount-ro",
    "errors=panic",
];

impl FileSystem {
    fn of(kind: FileSystemType) -> Self {
        let (uuid, label) = (String::new(), String::new());
        let (block_size, blocks, errors, inode_percent) = (0, 0, 0, 0);
        let (dirty, error_codes, hazard) = (false, ErrorCodes::default(), None);
        Self { kind, uuid, label, block_size, blocks, dirty, errors, error_codes, hazard, inode_percent }
    }

    /// Returns the size in bytes according to the superblock, or 0 if it is unknown.
    pub fn size(&self) -> u64 {
        self.blocks.saturating_mul(self.block_size)
    }
}

/// A range of a disk.
struct Window<'a, D: ReadAt + ?Sized> {
    disk: &'a D,
    start: u64,
    size: u64,
}

impl<D: ReadAt + ?Sized> Window<'_, D> {
    /// Reads bytes of the range. Returns `None` if the bytes exceed the range or cannot be read. Then the content is
    /// not recognized.
    fn get(&self, offset: u64, length: usize) -> Option<Vec<u8>> {
        let end = offset.checked_add(length as u64)?;
        if end > self.size {
            return None;
        }
        self.disk.bytes(self.start.checked_add(offset)?, length).ok()
    }

    fn has(&self, offset: u64, magic: &[u8]) -> bool {
        self.get(offset, magic.len()).as_deref() == Some(magic)
    }
}

/// Recognizes the content of the `size` bytes from `start`. Containers (RAID, LUKS, LVM) are tried first, because a
/// member of a RAID may also look like a file system.
pub fn probe(disk: &(impl ReadAt + ?Sized), start: u64, size: u64) -> Option<FileSystem> {
    let w = Window { disk, start, size };
    raid(&w)
        .or_else(|| luks(&w))
        .or_else(|| lvm(&w))
        .or_else(|| xfs(&w))
        .or_else(|| ext(&w))
        .or_else(|| btrfs(&w))
        .or_else(|| swap(&w))
        .or_else(|| others(&w))
        .or_else(|| vfat(&w))
}

fn ext(w: &Window<'_, impl ReadAt + ?Sized>) -> Option<FileSystem> {
    let sb = w.get(1024, 1024).filter(|sb| le16(sb, 56) == 0xef53)?;
    let (compat, incompat, ro_compat) = (le32(&sb, 92), le32(&sb, 96), le32(&sb, 100));
    let kind = match () {
        () if incompat & 0x8 != 0 => return Some(FileSystem::of(FileSystemType::Other("an ext4 journal"))),
        // ext3 can have these features: filetype, recover and meta_bg (incompat), and sparse_super, large_file and
        // btree_dir (ro_compat). A file system with another feature of these two sets is ext4.
        () if incompat & !0x16 != 0 || ro_compat & !0x7 != 0 => FileSystemType::Ext4,
        () if compat & 0x4 != 0 => FileSystemType::Ext3,
        () => FileSystemType::Ext2,
    };
    let high = if incompat & 0x80 != 0 { u64::from(le32(&sb, 336)) << 32 } else { 0 };
    let log = le32(&sb, 24);
    Some(FileSystem {
        uuid: uuid(&sb[104..120]),
        label: text(&sb[120..136]),
        block_size: if log <= 6 { 1024 << log } else { 0 },
        blocks: high | u64::from(le32(&sb, 4)),
        dirty: incompat & 0x4 != 0,
        errors: le32(&sb, 404),
        error_codes: ErrorCodes { first: sb[634], last: sb[635] },
        hazard: mount_hazard(&sb),
        ..FileSystem::of(kind)
    })
}

/// Finds the reason not to mount an ext file system. The kernel reads the same fields before it mounts.
fn mount_hazard(sb: &[u8]) -> Option<MountHazard> {
    if le32(sb, 96) & 0x100 != 0 {
        return Some(MountHazard::MultiMountProtection);
    }
    let (journal_inode, journal_device) = (le32(sb, 224), le32(sb, 228));
    if le32(sb, 92) & 0x4 != 0 && (journal_inode == 0 || journal_device != 0) {
        return Some(MountHazard::ExternalJournal);
    }
    let options = text(&sb[512..576]);
    let unknown = options.split(',').find(|option| !option.is_empty() && !HARMLESS_OPTIONS.contains(option));
    unknown.map(|option| MountHazard::MountOption(option.to_owned()))
}

fn xfs(w: &Window<'_, impl ReadAt + ?Sized>) -> Option<FileSystem> {
    let sb = w.get(0, 512).filter(|sb| &sb[..4] == b"XFSB")?;
    let be64 = |at: usize| u64::from_be_bytes(sb[at..at + 8].try_into().expect("8 bytes"));
    Some(FileSystem {
        uuid: uuid(&sb[32..48]),
        label: text(&sb[108..120]),
        block_size: be64(0) & 0xffff_ffff,
        blocks: be64(8),
        inode_percent: u32::from(sb[127]),
        ..FileSystem::of(FileSystemType::Xfs)
    })
}

fn vfat(w: &Window<'_, impl ReadAt + ?Sized>) -> Option<FileSystem> {
    let boot = w.get(0, 512).filter(|boot| le16(boot, 510) == 0xaa55)?;
    let (sector, cluster) = (u64::from(le16(&boot, 11)), boot[13]);
    if !matches!(sector, 512 | 1024 | 2048 | 4096) || !cluster.is_power_of_two() {
        return None;
    }
    // FAT32 has its volume id and label at another place than FAT12 and FAT16.
    let at = match () {
        () if &boot[82..87] == b"FAT32" => 67,
        () if &boot[54..57] == b"FAT" => 39,
        () => return None,
    };
    let id = le32(&boot, at);
    let label = text(&boot[at + 4..at + 15]);
    Some(FileSystem {
        uuid: format!("{:04X}-{:04X}", id >> 16, id & 0xffff),
        label: if label == "NO NAME" { String::new() } else { label },
        ..FileSystem::of(FileSystemType::Vfat)
    })
}

fn btrfs(w: &Window<'_, impl ReadAt + ?Sized>) -> Option<FileSystem> {
    let sb = w.get(0x10000, 1024).filter(|sb| &sb[64..72] == b"_BHRfS_M")?;
    Some(FileSystem {
        uuid: uuid(&sb[32..48]),
        label: text(&sb[299..555]),
        ..FileSystem::of(FileSystemType::Btrfs)
    })
}

fn swap(w: &Window<'_, impl ReadAt + ?Sized>) -> Option<FileSystem> {
    // The signature is at the end of the first page. The page size is that of the machine that created the swap space.
    let found = [4096, 8192, 16384, 65536].into_iter().any(|page| {
        let sign = w.get(page - 10, 10);
        sign.is_some_and(|sign| &sign == b"SWAPSPACE2" || &sign == b"SWAP-SPACE")
    });
    let head = w.get(1024, 64).filter(|_| found)?;
    Some(FileSystem {
        uuid: uuid(&head[12..28]),
        label: text(&head[28..44]),
        ..FileSystem::of(FileSystemType::Swap)
    })
}

fn lvm(w: &Window<'_, impl ReadAt + ?Sized>) -> Option<FileSystem> {
    let labelled = |at: &u64| w.has(*at, b"LABELONE") && w.has(*at + 24, b"LVM2 001");
    [0, 512, 1024, 1536].iter().any(labelled).then(|| FileSystem::of(FileSystemType::Lvm))
}

fn luks(w: &Window<'_, impl ReadAt + ?Sized>) -> Option<FileSystem> {
    let head = w.get(0, 208).filter(|head| &head[..6] == b"LUKS\xba\xbe")?;
    Some(FileSystem { uuid: text(&head[168..208]), ..FileSystem::of(FileSystemType::Luks) })
}

fn raid(w: &Window<'_, impl ReadAt + ?Sized>) -> Option<FileSystem> {
    // The superblock's place depends on the version. `places` has the places for the versions 1.1, 1.2, 1.0 and 0.90.
    let old = (w.size & !0xffff).checked_sub(0x10000);
    let end = w.size.checked_sub(8192).map(|end| end & !4095);
    let magic = 0xa92b_4efc_u32.to_le_bytes();
    let places = [Some(0), Some(4096), end, old];
    places.into_iter().flatten().any(|at| w.has(at, &magic)).then(|| FileSystem::of(FileSystemType::Raid))
}

fn others(w: &Window<'_, impl ReadAt + ?Sized>) -> Option<FileSystem> {
    let known: [(u64, &[u8], &'static str); 8] = [
        (0, b"hsqs", "squashfs"),
        (3, b"NTFS    ", "NTFS"),
        (3, b"-FVE-FS-", "BitLocker"),
        (3, b"EXFAT   ", "exFAT"),
        (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "EROFS"),
        (1024, &[0x10, 0x20, 0xf5, 0xf2], "F2FS"),
        (0x8001, b"CD001", "ISO 9660"),
        // This is the magic number of the first uberblock in a ZFS label, as a little-endian machine writes it.
        (0x20000, &[0x0c, 0xb1, 0xba, 0], "ZFS"),
    ];
    let found = known.into_iter().find(|(at, magic, _)| w.has(*at, magic));
    found.map(|(_, _, name)| FileSystem::of(FileSystemType::Other(name)))
}

/// Formats 16 bytes as `/dev/disk/by-uuid` spells them. Returns an empty string if all bytes are zero.
fn uuid(b: &[u8]) -> String {
    if b.iter().all(|&b| b == 0) {
        return String::new();
    }
    let hex: String = b.iter().map(|b| format!("{b:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// Returns a label up to its NUL byte, without padding.
fn text(bytes: &[u8]) -> String {
    let bytes = bytes.split(|&b| b == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(bytes).replace(is_unprintable, "\u{fffd}");
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::partition::tests::Random;

    fn with(size: usize, pieces: &[(usize, &[u8])]) -> Vec<u8> {
        let mut disk = vec![0; size];
        for (at, bytes) in pieces {
            disk[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        disk
    }
    fn kind(disk: &[u8]) -> Option<FileSystemType> {
        probe(disk, 0, disk.len() as u64).map(|fs| fs.kind)
    }

    #[test]
    fn each_kind_is_recognized_by_its_signature() {
        let magic = 0xa92b_4efc_u32.to_le_bytes();
        let size = 1 << 20;
        for (want, pieces) in [
            (FileSystemType::Ext2, vec![(1080, &[0x53, 0xef][..])]),
            (FileSystemType::Ext3, vec![(1080, &[0x53, 0xef][..]), (1024 + 92, &[4])]),
            (FileSystemType::Ext4, vec![(1080, &[0x53, 0xef][..]), (1024 + 92, &[4]), (1024 + 96, &[0x40])]),
            (FileSystemType::Other("an ext4 journal"), vec![(1080, &[0x53, 0xef][..]), (1024 + 96, &[8])]),
            (FileSystemType::Xfs, vec![(0, b"XFSB")]),
            (FileSystemType::Btrfs, vec![(0x10040, b"_BHRfS_M")]),
            (FileSystemType::Swap, vec![(4086, b"SWAPSPACE2")]),
            (FileSystemType::Swap, vec![(65526, b"SWAPSPACE2")]),
            (FileSystemType::Lvm, vec![(512, b"LABELONE"), (536, b"LVM2 001")]),
            (FileSystemType::Luks, vec![(0, b"LUKS\xba\xbe")]),
            (FileSystemType::Raid, vec![(4096, &magic)]),
            (FileSystemType::Raid, vec![(0, &magic)]),
            (FileSystemType::Raid, vec![(size - 8192, &magic), (1080, &[0x53, 0xef])]),
            (FileSystemType::Raid, vec![(size - 65536, &magic)]),
            (FileSystemType::Other("squashfs"), vec![(0, b"hsqs")]),
            (FileSystemType::Other("NTFS"), vec![(3, b"NTFS    "), (510, &[0x55, 0xaa])]),
        ] {
            let disk = with(size, &pieces);
            assert_eq!(kind(&disk), Some(want));
            // The content is also recognized if it does not begin at the start of the disk. It is not recognized if it
            // is cut off before the signature.
            let mut shifted = vec![0xff; 4096];
            shifted.extend_from_slice(&disk);
            assert_eq!(probe(&shifted[..], 4096, size as u64).map(|fs| fs.kind), Some(want));
            assert_eq!(probe(&disk[..], 0, 2), None);
        }
        assert_eq!(kind(&with(size, &[])), None);
    }

    /// The options of `tune2fs -E mount_opts=`, the features of `mkfs.ext4`, and the fields of an external journal.
    #[test]
    fn an_ext_file_system_that_is_unsafe_to_mount_has_a_reason() {
        let hazard = |pieces: &[(usize, &[u8])]| {
            let mut all = vec![(1080, &[0x53, 0xef][..]), (1024 + 96, &[0x40])];
            all.extend_from_slice(pieces);
            probe(&with(4096, &all)[..], 0, 4096).unwrap().hazard
        };
        let (journal, inode) = ((1024 + 92, &[4][..]), (1024 + 224, &[8][..]));
        assert_eq!(hazard(&[]), None);
        assert_eq!(hazard(&[journal, inode]), None);
        assert_eq!(hazard(&[(1024 + 97, &[1])]), Some(MountHazard::MultiMountProtection));
        assert_eq!(hazard(&[journal]), Some(MountHazard::ExternalJournal));
        assert_eq!(hazard(&[journal, inode, (1024 + 228, &[1])]), Some(MountHazard::ExternalJournal));
        assert_eq!(hazard(&[(1024 + 512, b"acl,errors=panic,data=ordered")]), None);
        for option in ["journal_path=/dev/sda", "abort", "dax", " acl", "usrjquota=x", "errors=panic "] {
            let options = format!("acl,{option},discard");
            let found = hazard(&[(1024 + 512, options.as_bytes())]);
            assert_eq!(found, Some(MountHazard::MountOption(option.to_owned())));
        }
        // The field has no NUL byte if it is full.
        let full = "x".repeat(64);
        assert_eq!(hazard(&[(1024 + 512, full.as_bytes())]), Some(MountHazard::MountOption(full)));
    }

    #[test]
    fn the_first_new_error_is_damage_or_not() {
        let codes = |first, last| {
            let pieces = [(1080, &[0x53, 0xef][..]), (1024 + 404, &[2]), (1024 + 634, &[first, last])];
            let fs = probe(&with(4096, &pieces)[..], 0, 4096).unwrap();
            assert_eq!(fs.errors, 2);
            fs.error_codes
        };
        // 2 is EIO, and 8 is EROFS.
        for (first, last, damage, damage_after_others) in [
            (0, 0, false, false),
            (2, 5, false, true),
            (4, 8, true, true),
            (5, 2, true, true),
            (2, 8, false, false),
        ] {
            let codes = codes(first, last);
            assert_eq!(
                (codes.are_damage(0), codes.are_damage(1)),
                (damage, damage_after_others),
                "{codes:?}"
            );
        }
    }

    #[test]
    fn vfat_has_a_number_and_a_label() {
        let head = [(11, &[0, 2][..]), (13, &[4]), (510, &[0x55, 0xaa])];
        let mut pieces = head.to_vec();
        pieces.extend([(67, &[0x78, 0x56, 0x34, 0x12][..]), (71, b"UEFI       "), (82, b"FAT32   ")]);
        let fs = probe(&with(4096, &pieces)[..], 0, 4096).unwrap();
        assert_eq!(
            (fs.kind, fs.uuid.as_str(), fs.label.as_str()),
            (FileSystemType::Vfat, "1234-5678", "UEFI")
        );
        let mut pieces = head.to_vec();
        pieces.extend([(39, &[1, 0, 0xff, 0xee][..]), (43, b"NO NAME    "), (54, b"FAT16   ")]);
        let fs = probe(&with(4096, &pieces)[..], 0, 4096).unwrap();
        assert_eq!((fs.uuid.as_str(), fs.label.as_str()), ("EEFF-0001", ""));
    }

    #[test]
    fn noise_never_panics() {
        let mut random = Random(99);
        let marks: [(usize, &[u8]); 6] = [
            (1080, &[0x53, 0xef]),
            (0, b"XFSB"),
            (0x10040, b"_BHRfS_M"),
            (4086, b"SWAPSPACE2"),
            (0, b"LUKS\xba\xbe"),
            (510, &[0x55, 0xaa]),
        ];
        for round in 0..400 {
            let mut disk: Vec<u8> = (0..0x11000 / 8).flat_map(|_| random.next().to_le_bytes()).collect();
            let (at, mark) = marks[round % marks.len()];
            disk[at..at + mark.len()].copy_from_slice(mark);
            let size = [disk.len(), random.below(disk.len()), random.below(2048)][round % 3];
            for (start, size) in [(0, size as u64), (random.next(), u64::MAX), (u64::MAX, random.next())] {
                if let Some(fs) = probe(&disk[..], start, size) {
                    assert!(!fs.label.contains(|c: char| c.is_control()));
                }
            }
        }
    }

    #[test]
    fn zeros_are_no_uuid_and_a_label_has_no_control_bytes() {
        assert_eq!(uuid(&[0; 16]), "");
        assert_eq!(text(b"a\x1b[2J \0rest"), "a\u{fffd}[2J");
    }
}
