//! Finds a disk's partitions in the kernel, and creates private device nodes for them.
//!
//! oven reads the partition table itself, because some kernels are built without support for it. oven uses BLKPG
//! ([`crate::sys::block_ioctls::update_partition`]) to add partitions that the kernel lacks, and takes device numbers
//! from sysfs. oven does not use udev's links, because udev may be absent or late, and a link may lead to another disk.
//! The nodes are in a tmpfs that is not attached anywhere and disappears when its last descriptor is closed.

use crate::device::Device;
use crate::device::link_name;
use crate::error::Kind;
use crate::formats::fstab::PartitionIds;
use crate::formats::partition;
use crate::formats::partition::{Partition, PartitionTable, ReadAt, TableScheme};
use crate::formats::superblock;
use crate::formats::superblock::FileSystem;
use crate::sys::block_ioctls;
use crate::sys::block_ioctls::PartitionChange;
use crate::sys::mount::api;
use crate::text::human_size;
use anyhow::{Context, Result};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// The superblocks of ext4 and xfs end before this byte of a partition.
const SUPERBLOCK_END: u64 = 4096;

/// Reads a block device as a sequence of bytes. The descriptor is borrowed from the owner of the disk.
pub struct DeviceBytes<'a> {
    pub fd: BorrowedFd<'a>,
    pub size: u64,
}

impl ReadAt for DeviceBytes<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        // A wrong table may lead beyond the end of the device, so the range is checked before anything is read.
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while !buffer.is_empty() {
            match rustix::io::pread(self.fd, &mut *buffer, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    buffer = &mut buffer[read..];
                    offset += read as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A partition, with its file system and its device. If there is no partition table, this is the whole disk.
#[derive(Debug)]
pub struct DiskPart {
    /// `None` means the whole disk.
    pub partition: Option<Partition>,
    pub fs: Option<FileSystem>,
    /// The kernel's name, such as `loop0p1`.
    pub name: String,
    pub rdev: u64,
    /// The size in bytes.
    pub size: u64,
    /// The device node, open for reading. While the node is open, the kernel does not give its device number to another
    /// device.
    pub node: OwnedFd,
}

impl DiskPart {
    pub fn ids(&self) -> PartitionIds<'_> {
        let fs = self.fs.as_ref();
        let partition = self.partition.as_ref();
        PartitionIds {
            uuid: fs.map_or("", |fs| &fs.uuid),
            label: fs.map_or("", |fs| &fs.label),
            partuuid: partition.map_or("", |p| &p.partuuid),
            partlabel: partition.map_or("", |p| &p.name),
        }
    }

    /// Describes the partition for messages: `partition 1 (ext4, 3.0 GiB, UUID 1f…, label "root")`.
    pub fn describe(&self) -> String {
        let whose =
            self.partition.as_ref().map_or("the whole disk".into(), |p| format!("partition {}", p.number));
        let what = self.fs.as_ref().map_or("unknown content", |fs| fs.kind.name());
        let mut text = format!("{whose} ({what}, {}", human_size(self.size));
        let ids = self.ids();
        if !ids.uuid.is_empty() {
            text += &format!(", UUID {}", ids.uuid);
        }
        if !ids.label.is_empty() {
            text += &format!(", label {:?}", ids.label);
        }
        text + ")"
    }
}

/// The disk's table, its partitions and their nodes.
#[derive(Debug)]
pub struct DiskNodes {
    /// A tmpfs that is not attached anywhere, with `dev/NAME` for the disk and each partition.
    pub tmpfs: OwnedFd,
    /// The kernel's name of the whole disk.
    pub name: String,
    pub rdev: u64,
    /// The size in bytes.
    pub size: u64,
    pub sector: u64,
    pub table: PartitionTable,
    pub parts: Vec<DiskPart>,
}

/// Reads the partition table, and creates a node for the disk and for each partition.
pub fn open_disk(device: &Device) -> Result<DiskNodes> {
    let disk = || format!("examining the disk {}", device.path.display());
    let stat = rustix::fs::fstat(&device.node).with_context(disk)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice || stat.st_rdev != device.rdev {
        let what = format!("{} is no longer the device that was verified", device.path.display());
        return Err(Kind::Machine.error(what));
    }
    let size = block_ioctls::device_size(device.node.as_fd()).with_context(disk)?;
    let sector = block_ioctls::sector_size(&device.node).with_context(disk)?;
    let bytes = DeviceBytes { fd: device.node.as_fd(), size };
    ensure_readable(&bytes, 0, 2 * sector).with_context(disk)?;
    ensure_readable(&bytes, size.saturating_sub(sector), sector).with_context(disk)?;
    let table = partition::read(&bytes, sector).with_context(disk)?;
    let tmpfs = tmpfs().context("making a private tmpfs for device nodes")?;
    let name = name_of(device.rdev)?;
    node(&tmpfs, &name, device.rdev)?;

    let mut parts = Vec::new();
    for partition in &table.partitions {
        let (name, rdev) = ensure_in_kernel(device, partition)?;
        ensure_readable(&bytes, partition.start, SUPERBLOCK_END.min(partition.size)).with_context(disk)?;
        let fs = superblock::probe(&bytes, partition.start, partition.size);
        let node = node(&tmpfs, &name, rdev)?;
        let real = block_ioctls::device_size(node.as_fd()).with_context(|| format!("examining {name}"))?;
        if real != partition.size {
            return Err(geometry_error(&name, partition));
        }
        parts.push(DiskPart {
            partition: Some(partition.clone()),
            fs,
            name,
            rdev,
            size: partition.size,
            node,
        });
    }
    if table.scheme == TableScheme::None {
        let fs = superblock::probe(&bytes, 0, size);
        let node = open_node(&tmpfs, &name, OFlags::RDONLY)?;
        parts.push(DiskPart { partition: None, fs, name: name.clone(), rdev: device.rdev, size, node });
    }
    Ok(DiskNodes { tmpfs, name, rdev: device.rdev, size, sector, table, parts })
}

/// Fails if the disk itself cannot be read at `start`. Without this check, a disk that fails would look like an image
/// without a partition table or without a file system.
fn ensure_readable(disk: &DeviceBytes<'_>, start: u64, length: u64) -> Result<()> {
    let length = length.min(disk.size.saturating_sub(start));
    match disk.bytes(start, length as usize) {
        Ok(_) => Ok(()),
        Err(error) => {
            let failure = Kind::Machine.failure(format!("reading the disk failed at byte {start}: {error}"));
            Err(failure.hint("The kernel's log (dmesg) may say more.").into())
        }
    }
}

/// Returns the kernel's name and device number of a partition. If the kernel has no partition with this number, adds
/// it.
fn ensure_in_kernel(device: &Device, partition: &Partition) -> Result<(String, u64)> {
    let number = partition.number;
    let doing = || format!("adding partition {number} of {}", device.path.display());
    if let Some(found) = lookup(device.rdev, partition)? {
        return Ok(found);
    }
    let added = block_ioctls::update_partition(
        device.node.as_fd(),
        PartitionChange::Add,
        number,
        partition.start,
        partition.size,
    );
    match added {
        // EBUSY means that another program, such as udev, added a partition first. The code below checks that this is
        // the same partition.
        Ok(()) | Err(Errno::BUSY) => {}
        // The kernel has a limit for the number of partitions, and refuses partitions that are not whole sectors.
        Err(Errno::INVAL) => {
            let failure = Kind::Definition.failure("the kernel does not accept this partition");
            return Err(failure.hint("Repair the base image's partition table, or bake on another image."))
                .with_context(doing);
        }
        Err(error) => return Err(error).with_context(doing),
    }
    let found = lookup(device.rdev, partition)?;
    found
        .ok_or_else(|| Kind::Machine.error("the kernel has another partition in this part of the disk"))
        .with_context(doing)
}

/// Finds a partition of a disk in sysfs by its number. Fails if the kernel's partition has another start or size.
fn lookup(disk: u64, partition: &Partition) -> Result<Option<(String, u64)>> {
    let dir = sysfs_dir(disk);
    let read = |path: PathBuf| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let entries = std::fs::read_dir(&dir).with_context(|| format!("listing {}", dir.display()))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if read(path.join("partition")).and_then(|n| n.parse().ok()) != Some(partition.number) {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        // sysfs counts in sectors of 512 bytes, even if the disk's sectors are larger.
        let bytes = |file: &str| read(path.join(file))?.parse::<u64>().ok()?.checked_mul(512);
        if (bytes("start"), bytes("size")) != (Some(partition.start), Some(partition.size)) {
            return Err(geometry_error(&name, partition));
        }
        let rdev = read(path.join("dev")).and_then(|text| {
            let (major, minor) = text.split_once(':')?;
            Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
        });
        let rdev = rdev.with_context(|| format!("reading the device number of {name}"))?;
        return Ok(Some((name, rdev)));
    }
    Ok(None)
}

fn geometry_error(name: &str, partition: &Partition) -> anyhow::Error {
    let (number, start, size) = (partition.number, partition.start, partition.size);
    let what = format!(
        "the kernel's {name} differs from partition {number} of the table, which begins at byte {start} and has \
         {size} bytes"
    );
    Kind::Machine
        .failure(what)
        .hint("The table was changed while the disk was attached. Attach the disk again.")
        .into()
}

fn sysfs_dir(rdev: u64) -> PathBuf {
    format!("/sys/dev/block/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev)).into()
}

/// Returns the kernel's name of a block device.
pub fn name_of(rdev: u64) -> Result<String> {
    let path = sysfs_dir(rdev);
    let link = std::fs::read_link(&path).with_context(|| format!("reading {} in sysfs", path.display()))?;
    // A file name in sysfs cannot contain a slash, so sysfs writes `!` instead of each slash in a device's name.
    Ok(link.file_name().unwrap_or_default().to_string_lossy().replace('!', "/"))
}

fn tmpfs() -> Result<OwnedFd> {
    let mount = api::new_file_system("tmpfs", &[], MountAttrFlags::MOUNT_ATTR_NOSUID)?;
    rustix::fs::mkdirat(&mount, "dev", Mode::from_raw_mode(0o700))?;
    Ok(mount)
}

fn node(tmpfs: &OwnedFd, name: &str, rdev: u64) -> Result<OwnedFd> {
    let path = format!("dev/{name}");
    if let Some((parent, _)) = name.split_once('/') {
        _ = rustix::fs::mkdirat(tmpfs, format!("dev/{parent}"), Mode::from_raw_mode(0o700));
    }
    let made = rustix::fs::mknodat(tmpfs, &*path, FileType::BlockDevice, Mode::from_raw_mode(0o600), rdev);
    made.with_context(|| format!("making a node for {name}"))?;
    open_node(tmpfs, name, OFlags::RDONLY)
}

/// Opens the node of the device with this kernel name.
pub fn open_node(tmpfs: &OwnedFd, name: &str, flags: OFlags) -> Result<OwnedFd> {
    let node = rustix::fs::openat(tmpfs, format!("dev/{name}"), flags | OFlags::CLOEXEC, Mode::empty());
    node.with_context(|| format!("opening {name}"))
}

/// Returns the nodes for the private `/dev` of a step. If several partitions have the same identifier, only one of them
/// gets the link with that identifier. The root takes precedence.
pub fn step_nodes(nodes: &DiskNodes, root: usize) -> Vec<crate::device::DeviceNode> {
    let mut taken = std::collections::HashSet::new();
    let mut order: Vec<usize> = (0..nodes.parts.len()).collect();
    order.sort_by_key(|&index| index != root);
    let mut made: Vec<crate::device::DeviceNode> = Vec::new();
    for part in order.into_iter().map(|index| &nodes.parts[index]) {
        let ids = part.ids();
        let kinds = [
            ("uuid", ids.uuid),
            ("partuuid", ids.partuuid),
            ("label", ids.label),
            ("partlabel", ids.partlabel),
        ];
        let named = kinds.into_iter().filter(|(_, id)| !id.is_empty());
        let mut links: Vec<_> = named.map(|(by, id)| format!("disk/by-{by}/{}", link_name(id))).collect();
        links.retain(|link| taken.insert(link.clone()));
        made.push(crate::device::DeviceNode { name: part.name.clone(), rdev: part.rdev, links });
    }
    if nodes.table.scheme != TableScheme::None {
        made.push(crate::device::DeviceNode {
            name: nodes.name.clone(),
            rdev: nodes.rdev,
            links: Vec::new(),
        });
    }
    made.sort_by(|a, b| a.name.cmp(&b.name));
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        assert_eq!(human_size(3 << 30), "3.0 GiB");
        assert_eq!(human_size(124 << 20), "124.0 MiB");
    }
}
