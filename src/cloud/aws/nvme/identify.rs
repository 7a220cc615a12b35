//! Sends the NVMe admin command Identify Controller, which returns a disk's vendor, serial and model.

use std::io::{Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

/// The data that the command returns (NVM Express Base Specification, figure "Identify Controller Data Structure").
pub type IdentifyPage = [u8; 4096];

mod raw {
    #![allow(unsafe_code, clippy::undocumented_unsafe_blocks)]
    // `NVME_IOCTL_ADMIN_CMD` of <linux/nvme_ioctl.h>.
    nix::ioctl_readwrite!(admin_command, b'N', 0x41, super::Command);
}

const IDENTIFY: u8 = 0x06;
/// Requests the data structure about the controller.
const CONTROLLER: u32 = 1;
/// The time limit for an answer, which usually takes milliseconds. oven cannot react to Ctrl-C while it waits, so the
/// kernel's default limit of a minute would be too long.
const TIMEOUT_MS: u32 = 5_000;

/// `struct nvme_passthru_cmd`.
#[repr(C)]
#[derive(Default)]
struct Command {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    words_2_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_length: u32,
    length: u32,
    words_10_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

/// The kernel copies a structure of exactly this size.
const _: () = assert!(size_of::<Command>() == 72);

/// Sends the command to an open disk. Fails with ENOTTY if the device is not an NVMe disk, and with EPERM if this
/// process lacks the permission.
#[allow(unsafe_code)]
pub fn identify_controller(node: BorrowedFd<'_>) -> Result<Box<IdentifyPage>> {
    let mut page = Box::new([0; size_of::<IdentifyPage>()]);
    let mut command = Command {
        opcode: IDENTIFY,
        address: page.as_mut_ptr() as u64,
        length: size_of::<IdentifyPage>() as u32,
        words_10_15: [CONTROLLER, 0, 0, 0, 0, 0],
        timeout_ms: TIMEOUT_MS,
        ..Command::default()
    };
    // SAFETY: the ioctl reads and writes one `struct nvme_passthru_cmd`, which is `command`. It also writes at most
    // `length` bytes to `address`. `address` is the address of `page`. `page` has that length, is not referenced
    // elsewhere, and outlives the call.
    match unsafe { raw::admin_command(node.as_raw_fd(), &raw mut command) }? {
        0 => Ok(page),
        status => Err(Error::other(format!("NVMe status {status:#x}"))),
    }
}

/// The fields of an [`IdentifyPage`] that identify a disk.
#[derive(Debug, PartialEq, Eq)]
pub struct Identity<'a> {
    /// PCI vendor id.
    pub vendor: u16,
    pub serial: &'a [u8],
    pub model: &'a [u8],
}

impl<'a> Identity<'a> {
    pub fn of(page: &'a IdentifyPage) -> Self {
        Self {
            vendor: u16::from_le_bytes([page[0], page[1]]),
            serial: unpadded(&page[4..24]),
            model: unpadded(&page[24..64]),
        }
    }
}

/// Removes the padding of a field, that is, the blanks and zero bytes at its end. Those at the beginning are part of
/// the text.
pub fn unpadded(field: &[u8]) -> &[u8] {
    let end = field.iter().rposition(|byte| !matches!(byte, b' ' | 0)).map_or(0, |last| last + 1);
    &field[..end]
}
