//! The ioctls of block devices and file systems for which no crate has a wrapper.

use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

mod raw {
    #![allow(unsafe_code, clippy::undocumented_unsafe_blocks)]
    use super::{FsGrow, PartitionRequest, TrimRange};
    nix::ioctl_read!(device_size, 0x12, 114, u64);
    nix::ioctl_write_ptr_bad!(update_partition, 0x1269, PartitionRequest);
    nix::ioctl_readwrite!(trim, b'X', 121, TrimRange);
    nix::ioctl_write_ptr!(ext4_resize, b'f', 16, u64);
    nix::ioctl_write_ptr!(xfs_grow, b'X', 110, FsGrow);
    nix::ioctl_write_ptr_bad!(set_read_only, 0x125d, libc::c_int);
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
pub struct PartitionRequest {
    op: i32,
    flags: i32,
    length: i32,
    data: *const PartitionData,
}

/// `struct blkpg_partition`.
#[repr(C)]
struct PartitionData {
    start: i64,
    length: i64,
    number: i32,
    names: [u8; 128],
}

/// `struct fstrim_range`.
#[repr(C)]
pub struct TrimRange {
    start: u64,
    length: u64,
    minimum: u64,
}

/// `struct xfs_growfs_data`.
#[repr(C)]
pub struct FsGrow {
    blocks: u64,
    inode_percent: u32,
}

/// A change of one partition in the kernel's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartitionChange {
    Add = 1,
    Resize = 3,
}

/// Returns a block device's size in bytes.
#[allow(unsafe_code)]
pub fn device_size(device: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut bytes = 0;
    // SAFETY: BLKGETSIZE64 writes 8 bytes to a live u64.
    errno(unsafe { raw::device_size(device.as_raw_fd(), &raw mut bytes) })?;
    Ok(bytes)
}

/// Sets whether the kernel refuses to write to a block device. If it does, a write fails even through a descriptor that
/// was opened before. The flag belongs to this device alone: that of a partition does not change the whole disk.
#[allow(unsafe_code)]
pub fn set_read_only(device: BorrowedFd<'_>, read_only: bool) -> Result<(), Errno> {
    let argument = libc::c_int::from(read_only);
    // SAFETY: BLKROSET reads one int, which outlives the call.
    errno(unsafe { raw::set_read_only(device.as_raw_fd(), &raw const argument) })
}

/// Adds a partition to the kernel's table, or resizes a partition in this table. `start` and `length` are in bytes.
/// Nothing is written to the disk.
#[allow(unsafe_code)]
pub fn update_partition(
    disk: BorrowedFd<'_>,
    change: PartitionChange,
    number: u32,
    start: u64,
    length: u64,
) -> Result<(), Errno> {
    let signed = |value: u64| i64::try_from(value).map_err(|_| Errno::OVERFLOW);
    let number = i32::try_from(number).map_err(|_| Errno::OVERFLOW)?;
    let data = PartitionData { start: signed(start)?, length: signed(length)?, number, names: [0; 128] };
    let length = std::mem::size_of::<PartitionData>() as i32;
    let argument = PartitionRequest { op: change as i32, flags: 0, length, data: &raw const data };
    // SAFETY: BLKPG reads both structs, which outlive the call and have the layout that the kernel expects.
    errno(unsafe { raw::update_partition(disk.as_raw_fd(), &raw const argument) })
}

/// Discards the free space of the file system that contains this open directory. Returns the number of discarded bytes.
#[allow(unsafe_code)]
pub fn trim(dir: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut range = TrimRange { start: 0, length: u64::MAX, minimum: 0 };
    // SAFETY: FITRIM reads and writes one fstrim_range, which outlives the call.
    errno(unsafe { raw::trim(dir.as_raw_fd(), &raw mut range) })?;
    Ok(range.length)
}

/// Extends a mounted ext4 to this number of blocks.
#[allow(unsafe_code)]
pub fn ext4_resize(dir: BorrowedFd<'_>, blocks: u64) -> Result<(), Errno> {
    // SAFETY: EXT4_IOC_RESIZE_FS reads one u64, which outlives the call.
    errno(unsafe { raw::ext4_resize(dir.as_raw_fd(), &raw const blocks) })
}

/// Extends a mounted XFS to this number of blocks.
#[allow(unsafe_code)]
pub fn xfs_grow(dir: BorrowedFd<'_>, blocks: u64, inode_percent: u32) -> Result<(), Errno> {
    let argument = FsGrow { blocks, inode_percent };
    // SAFETY: XFS_IOC_FSGROWFSDATA reads one xfs_growfs_data, which outlives the call.
    errno(unsafe { raw::xfs_grow(dir.as_raw_fd(), &raw const argument) })
}

/// Returns the logical sector size in bytes.
pub fn sector_size(device: impl AsFd) -> Result<u64, Errno> {
    rustix::fs::ioctl_blksszget(device).map(u64::from)
}

fn errno(result: nix::Result<libc::c_int>) -> Result<(), Errno> {
    result.map(drop).map_err(|error| Errno::from_raw_os_error(error as i32))
}
