//! Finds the NVMe device of a volume by its serial, and verifies it on the opened descriptor.
//!
//! Names (`nvme1n1`, `/dev/sdf`) show only in which order disks arrived, and udev's links have pointed at other
//! volumes. Therefore the kernel's list says which disk claims to be the volume, and the disk itself is queried once it
//! is open: the descriptor in use is the one that was verified. No option turns a check off.

mod identify;
mod sysfs;
#[cfg(test)]
mod tests;

use crate::device::Device;
use crate::error::Kind;
use crate::ids::VolumeId;
use anyhow::{Context, Result};
use identify::{IdentifyPage, Identity};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use sysfs::Namespace;

/// Amazon's PCI vendor id, for EBS volumes and instance stores.
const AMAZON: u32 = 0x1d0f;
/// The model of every EBS volume. An instance store's is "Amazon EC2 NVMe Instance Storage".
const EBS: &[u8] = b"Amazon Elastic Block Store";

/// The device of a volume, verified and open; `None` if it is not there yet, or not ready. `sys` and `dev` are `/sys`
/// and `/dev`.
///
/// Fails if two disks claim to be the volume, if the node is not the kernel's disk of that name, if the disk does not
/// answer Identify Controller or answers with another serial, or if it is Amazon's but not an EBS volume.
pub fn find(sys: &Path, dev: &Path, volume: &VolumeId) -> Result<Option<Device>> {
    find_by(&Linux, sys, dev, volume)
}

/// Whether this machine has NVMe disks. EC2's older instances (Xen) have none.
pub fn has_nvme(sys: &Path) -> bool {
    sysfs::has_controllers(sys)
}

/// The NVMe disks that the kernel knows, one per line, for error messages.
pub fn list(sys: &Path) -> Result<Vec<String>> {
    Ok(sysfs::namespaces(sys)?.iter().map(ToString::to_string).collect())
}

/// The kernel's answers about a node; tests without devices implement it.
trait Kernel {
    /// The device number of an open node; `None` if it is not a block device.
    fn number(&self, node: BorrowedFd<'_>) -> io::Result<Option<u64>>;
    /// Opens a nameless node of that block device.
    fn node(&self, number: u64) -> io::Result<OwnedFd>;
    /// The disk's answer to Identify Controller.
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
            return Err(device_error(text, "Detach the wrong one; `nvme list` shows them."));
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
                    "This needs CAP_SYS_ADMIN. Run oven as root, and a container with --privileged."
                }
                Some(libc::ENOTTY | libc::EINVAL) => {
                    "It is not an NVMe disk, although it has the name of one."
                }
                _ => "`dmesg` shows the disk's errors.",
            };
            let text = format!("cannot verify that {} is {volume}: {error}", path.display());
            return Err(device_error(text, hint));
        }
    };
    verify(&Identity::of(&page), disk, &serial)
        .map_err(|wrong| device_error(format!("{} is not {volume}: {wrong}", path.display()), REPLACED))?;
    // udev ignores a locked disk: no probe holds it open, and no LVM or RAID of the image is activated on this machine.
    // If the lock fails because udev is probing the disk just now, nothing is lost.
    _ = rustix::fs::flock(&node, FlockOperation::NonBlockingLockExclusive);
    Ok(Some(Device { node, path, rdev: disk.number, serial, trimming: None }))
}

const REPLACED: &str = "oven wrote nothing to it. Perhaps disks were exchanged at this moment. Bake again.";

fn device_error(text: String, hint: &str) -> anyhow::Error {
    Kind::Machine.failure(text).hint(hint).into()
}

/// The disk serial of a volume: its id without the dash.
fn serial_of(volume: &VolumeId) -> Result<String> {
    let digits = volume.0.strip_prefix("vol-").filter(|digits| {
        matches!(digits.len(), 8 | 17) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    });
    let digits = digits.ok_or_else(|| Kind::Cloud.error(format!("{:?} is not a volume id", volume.0)))?;
    Ok(format!("vol{digits}"))
}

/// Opens the disk's node if it is the kernel's block device of that name; `None` if the disk went away.
fn open(kernel: &impl Kernel, path: &Path, disk: &Namespace) -> Result<Option<OwnedFd>> {
    let context = || format!("opening {}", path.display());
    // The node is inspected before it is opened, so that anything else at that path is never touched.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = match rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from) {
        Ok(found) => found,
        // A container has only the nodes that existed when it started.
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

/// Compares the disk's identity with the expected one; the error says what differs.
fn verify(identity: &Identity<'_>, disk: &Namespace, serial: &str) -> Result<(), String> {
    if identity.serial != serial.as_bytes() {
        return Err(format!("its serial is {:?}", text(identity.serial)));
    }
    // A disk of unknown vendor is treated as Amazon's, which is checked more strictly.
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

/// Whether the kernel reports that the disk was just removed.
fn is_removed(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}
