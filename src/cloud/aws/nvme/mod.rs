//! Finds the NVMe disk of an EBS volume by its serial, opens it, and verifies the opened disk.
//!
//! Device names do not identify a volume. A name such as `nvme1n1` shows only in which order disks appeared. The links
//! that udev creates can point to a wrong volume. So oven searches the kernel's list for the disk with the volume's
//! serial. After opening that disk, oven queries the serial from the disk itself. Later, oven uses only the descriptor
//! that was verified. These checks cannot be turned off.

mod identify;
mod sysfs;
#[cfg(test)]
mod tests;

use crate::device::Device;
use crate::error::Kind;
use crate::ids::VolumeId;
use crate::sys::lock::try_lock_until_closed;
use anyhow::{Context, Result};
use identify::{IdentifyPage, Identity};
use rustix::fs::{FileType, Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use sysfs::Namespace;

/// Amazon's PCI vendor id, for EBS volumes and instance stores.
const AMAZON: u32 = 0x1d0f;
/// The model of every EBS volume. The model of an instance store is "Amazon EC2 NVMe Instance Storage".
const EBS: &[u8] = b"Amazon Elastic Block Store";

/// Finds, opens and verifies the disk of a volume. Returns `None` if the disk does not exist yet or is not ready. `sys`
/// and `dev` are `/sys` and `/dev`, except in tests.
///
/// Fails in these cases:
/// - Two disks have the volume's serial.
/// - The node in `/dev` has another device number than the kernel's disk of the same name.
/// - The disk does not answer the command Identify Controller, or answers with another serial.
/// - The disk is made by Amazon, but is not an EBS volume.
pub fn find(sys: &Path, dev: &Path, volume: &VolumeId) -> Result<Option<Device>> {
    find_by(&Linux, sys, dev, volume)
}

/// Returns whether this machine has NVMe disks. EC2's older instances (Xen) have none.
pub fn has_nvme(sys: &Path) -> bool {
    sysfs::has_controllers(sys)
}

/// Describes the NVMe disks that the kernel knows, for error messages.
pub fn list(sys: &Path) -> Result<Vec<String>> {
    Ok(sysfs::namespaces(sys)?.iter().map(ToString::to_string).collect())
}

/// The system calls for device nodes. Tests replace them, because the test machine has no NVMe disks.
trait Kernel {
    /// The device number of an open node; `None` if it is not a block device.
    fn number(&self, node: BorrowedFd<'_>) -> io::Result<Option<u64>>;
    /// Opens the block device with this number through a temporary node, whose name is removed immediately.
    fn node(&self, number: u64) -> io::Result<OwnedFd>;
    /// Sends the command Identify Controller, and returns the disk's answer.
    fn identify(&self, node: BorrowedFd<'_>) -> io::Result<Box<IdentifyPage>>;
}

struct Linux;

impl Kernel for Linux {
    fn number(&self, node: BorrowedFd<'_>) -> io::Result<Option<u64>> {
        let stat = rustix::fs::fstat(node)?;
        let is_block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        Ok(is_block.then_some(stat.st_rdev))
    }

    fn node(&self, number: u64) -> io::Result<OwnedFd> {
        crate::sys::loop_device::nameless_node(FileType::BlockDevice, number)
    }

    fn identify(&self, node: BorrowedFd<'_>) -> io::Result<Box<IdentifyPage>> {
        identify::identify_controller(node)
    }
}

fn find_by(kernel: &impl Kernel, sys: &Path, dev: &Path, volume: &VolumeId) -> Result<Option<Device>> {
    let serial = serial_of(volume)?;
    let all = sysfs::namespaces(sys).context("listing the NVMe disks")?;
    let matching = all.into_iter().filter(|disk| disk.serial == serial.as_bytes() && disk.is_live());
    let matching: Vec<_> = matching.collect();
    let disk = match &matching[..] {
        [] => return Ok(None),
        [disk] => disk,
        several => {
            let names: Vec<_> = several.iter().map(|disk| disk.name.as_str()).collect();
            let text = format!("{} disks have the serial of {volume}: {}", names.len(), names.join(", "));
            return Err(device_error(
                text,
                "Detach the wrong disk. `nvme list` shows the disks and their serials.",
            ));
        }
    };
    let path = dev.join(&disk.name);
    let Some(node) = open(kernel, &path, disk)? else { return Ok(None) };
    let page = match kernel.identify(node.as_fd()) {
        Ok(page) => page,
        Err(error) if is_removed(&error) => return Ok(None),
        Err(error) => {
            let hint = match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => {
                    "This needs CAP_SYS_ADMIN. Run oven as root. Run a container with --privileged."
                }
                Some(libc::ENOTTY | libc::EINVAL) => {
                    "The device has the name of an NVMe disk, but is not one."
                }
                _ => "`dmesg` shows the disk's errors.",
            };
            let text = format!("cannot verify that {} is {volume}: {error}", path.display());
            return Err(device_error(text, hint));
        }
    };
    verify(&Identity::of(&page), disk, &serial)
        .map_err(|wrong| device_error(format!("{} is not {volume}: {wrong}", path.display()), REPLACED))?;
    // udev does not probe a locked disk. So udev does not hold the disk open, and does not activate the image's LVM or
    // RAID on this machine. If udev is probing the disk at this moment, locking fails. oven then continues without the
    // lock.
    _ = try_lock_until_closed(&node);
    Ok(Some(Device { node, path, rdev: disk.number, serial, trimming: None }))
}

const REPLACED: &str = "oven wrote nothing to this disk. Perhaps another disk got its name while oven \
                        was opening it. Bake again.";

fn device_error(text: String, hint: &str) -> anyhow::Error {
    Kind::Machine.failure(text).hint(hint).into()
}

/// Returns the serial of a volume's disk, which is the volume's id without the dash.
fn serial_of(volume: &VolumeId) -> Result<String> {
    let digits = volume.0.strip_prefix("vol-").filter(|digits| {
        matches!(digits.len(), 8 | 17) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    });
    let digits = digits.ok_or_else(|| Kind::Cloud.error(format!("{:?} is not a volume id", volume.0)))?;
    Ok(format!("vol{digits}"))
}

/// Opens the disk's node. Fails if the node does not have the device number of `disk`. Returns `None` if the disk was
/// removed.
fn open(kernel: &impl Kernel, path: &Path, disk: &Namespace) -> Result<Option<OwnedFd>> {
    let context = || format!("opening {}", path.display());
    // O_PATH permits inspecting the file at this path without opening its device. So if the file is the node of a
    // different device, that device is never opened.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = match rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from) {
        Ok(found) => found,
        // A container may lack the node, because its `/dev` has only the nodes that existed when the container started.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return open_nameless_node(kernel, path, disk);
        }
        Err(error) => return Err(error).with_context(context),
    };
    match kernel.number(found.as_fd()).with_context(context)? {
        Some(number) if number == disk.number => {}
        Some(number) => {
            let text = format!(
                "{} is device {}, but the kernel's {} is {}",
                path.display(),
                device_number_text(number),
                disk.name,
                device_number_text(disk.number)
            );
            return Err(device_error(text, "It is a stale node of a removed disk. Delete the node."));
        }
        None => {
            let text = format!("{} is not a block device", path.display());
            return Err(device_error(text, "Another file has the disk's name. Remove the file."));
        }
    }
    let same = format!("/proc/self/fd/{}", found.as_raw_fd());
    match rustix::fs::open(same, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from) {
        Ok(node) => Ok(Some(node)),
        Err(error) if is_removed(&error) => Ok(None),
        Err(error) => Err(error).with_context(context),
    }
}

fn open_nameless_node(kernel: &impl Kernel, path: &Path, disk: &Namespace) -> Result<Option<OwnedFd>> {
    match kernel.node(disk.number) {
        Ok(node) => Ok(Some(node)),
        Err(error) if is_removed(&error) => Ok(None),
        Err(error) => {
            let text = format!("{} does not exist, and creating a node failed: {error}", path.display());
            Err(device_error(text, "Run oven as root; a container needs the host's /dev (-v /dev:/dev)."))
        }
    }
}

/// Checks the identity that the opened disk reported. The error says what is wrong.
fn verify(identity: &Identity<'_>, disk: &Namespace, serial: &str) -> Result<(), String> {
    if identity.serial != serial.as_bytes() {
        return Err(format!("its serial is {:?}", text(identity.serial)));
    }
    // A disk of an unknown vendor is checked like a disk of Amazon.
    let may_be_amazon = |vendor: Option<u32>| vendor.is_none_or(|vendor| vendor == AMAZON);
    if disk.controllers.iter().any(|c| may_be_amazon(c.vendor)) || u32::from(identity.vendor) == AMAZON {
        if identity.model != EBS {
            return Err(format!("its model is {:?}", text(identity.model)));
        }
        if u32::from(identity.vendor) != AMAZON {
            return Err(format!("its vendor is {:#06x}", identity.vendor));
        }
    }
    Ok(())
}

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

fn device_number_text(number: u64) -> String {
    format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number))
}

/// Returns whether the error means that the disk was removed.
fn is_removed(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}
