//! The device that a volume is: found by its serial, and proven on the opened descriptor, or refused.
//!
//! Names (`nvme1n1`, `/dev/sdf`) say in which order disks arrived, and udev's links have pointed at other volumes. So
//! the kernel's own list says which disk claims to be the volume, and the disk itself is asked once it is open: what
//! was verified is what is held. Nothing turns a check off.

mod identify;
mod sysfs;
#[cfg(test)]
mod tests;

use crate::device::Device;
use crate::error::Kind;
use crate::ids::VolumeId;
use anyhow::{Context, Result};
use identify::{Identity, Page};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use sysfs::Namespace;

/// Amazon's PCI vendor id: EBS volumes and instance stores alike.
const AMAZON: u32 = 0x1d0f;
/// The model of every EBS volume. An instance store's is "Amazon EC2 NVMe Instance Storage".
const EBS: &[u8] = b"Amazon Elastic Block Store";

/// The device of a volume, verified and held open; `None` while it is not there, or not ready. `sys` and `dev` are
/// `/sys` and `/dev`.
///
/// Fails, rather than to guess, if two disks claim to be the volume, if the node is not the disk that the kernel means,
/// if the disk cannot be asked who it is, or answers with another serial, or is no EBS volume though Amazon made it.
pub fn find(sys: &Path, dev: &Path, volume: &VolumeId) -> Result<Option<Device>> {
    find_by(&Linux, sys, dev, volume)
}

/// Whether this machine has NVMe at all. EC2's older instances (Xen) do not.
pub fn has_nvme(sys: &Path) -> bool {
    sysfs::has_controllers(sys)
}

/// What NVMe disks the kernel knows, a line each: for the message when a volume does not appear.
pub fn list(sys: &Path) -> Result<Vec<String>> {
    Ok(sysfs::namespaces(sys)?.iter().map(ToString::to_string).collect())
}

/// What is asked of the kernel about a node, so that tests without devices can answer.
trait Kernel {
    /// The number of the block device that an open node is; `None`: it is something else.
    fn number(&self, node: BorrowedFd<'_>) -> io::Result<Option<u64>>;
    /// An open node of that block device, that has no name.
    fn node(&self, number: u64) -> io::Result<OwnedFd>;
    /// What the disk answers to Identify Controller.
    fn identify(&self, node: BorrowedFd<'_>) -> io::Result<Box<Page>>;
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

    fn identify(&self, node: BorrowedFd<'_>) -> io::Result<Box<Page>> {
        identify::controller(node)
    }
}

fn find_by(kernel: &impl Kernel, sys: &Path, dev: &Path, volume: &VolumeId) -> Result<Option<Device>> {
    let serial = serial_of(volume)?;
    let all = sysfs::namespaces(sys).context("looking through the NVMe disks")?;
    let live = all.into_iter().filter(|disk| disk.serial == serial.as_bytes() && disk.is_live());
    let live: Vec<_> = live.collect();
    let disk = match &live[..] {
        [] => return Ok(None),
        [disk] => disk,
        several => {
            let names: Vec<_> = several.iter().map(|disk| disk.name.as_str()).collect();
            let text = format!("{} disks have the serial of {volume}: {}", names.len(), names.join(", "));
            return Err(refused(text, "Detach what should not be there; `nvme list` shows it."));
        }
    };
    let path = dev.join(&disk.name);
    let Some(node) = open(kernel, &path, disk)? else { return Ok(None) };
    let page = match kernel.identify(node.as_fd()) {
        Ok(page) => page,
        Err(error) if gone(&error) => return Ok(None),
        Err(error) => {
            let hint = match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => {
                    "It takes CAP_SYS_ADMIN: run oven as root; a container has to be --privileged."
                }
                Some(libc::ENOTTY | libc::EINVAL) => "It is no NVMe disk: something else stands at its name.",
                _ => "`dmesg` tells what the disk did.",
            };
            let text = format!("{} cannot be asked whether it is {volume}: {error}", path.display());
            return Err(refused(text, hint));
        }
    };
    verify(&Identity::of(&page), disk, &serial)
        .map_err(|wrong| refused(format!("{} is not {volume}: {wrong}", path.display()), REPLACED))?;
    // udev leaves a locked disk alone: no probe that holds it open, no LVM or RAID of the image on this machine. Best
    // effort: where it looks at the disk just now, nothing is lost.
    _ = rustix::fs::flock(&node, FlockOperation::NonBlockingLockExclusive);
    Ok(Some(Device { node, path, rdev: disk.number, serial, trimming: None }))
}

const REPLACED: &str = "Nothing was written to it. Disks may have been exchanged just now: bake again.";

fn refused(text: String, hint: &str) -> anyhow::Error {
    Kind::Machine.failure(text).hint(hint).into()
}

/// What a disk's serial is if it is this volume: the id without its dash.
fn serial_of(volume: &VolumeId) -> Result<String> {
    let digits = volume.0.strip_prefix("vol-").filter(|digits| {
        matches!(digits.len(), 8 | 17) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    });
    let digits = digits.ok_or_else(|| Kind::Cloud.error(format!("{:?} is no volume's id", volume.0)))?;
    Ok(format!("vol{digits}"))
}

/// The disk's node, open, if it is the block device that the kernel calls so; `None` if the disk went away.
fn open(kernel: &impl Kernel, path: &Path, disk: &Namespace) -> Result<Option<OwnedFd>> {
    let context = || format!("opening {}", path.display());
    // Looked at before it is opened: whatever else stands there is never touched.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = match rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from) {
        Ok(found) => found,
        // A container has the nodes that were there when it began.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return own_node(kernel, path, disk),
        Err(error) => return Err(error).with_context(context),
    };
    match kernel.number(found.as_fd()).with_context(context)? {
        Some(number) if number == disk.number => {}
        Some(number) => {
            let text = format!(
                "{} is device {}, and the kernel's {} is {}",
                path.display(),
                spelt(number),
                disk.name,
                spelt(disk.number)
            );
            return Err(refused(text, "A node that nobody removed when its disk went: remove it."));
        }
        None => {
            let text = format!("{} is not a block device", path.display());
            return Err(refused(text, "Something else stands at the disk's name: remove it."));
        }
    }
    let same = format!("/proc/self/fd/{}", found.as_raw_fd());
    match rustix::fs::open(same, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from) {
        Ok(node) => Ok(Some(node)),
        Err(error) if gone(&error) => Ok(None),
        Err(error) => Err(error).with_context(context),
    }
}

fn own_node(kernel: &impl Kernel, path: &Path, disk: &Namespace) -> Result<Option<OwnedFd>> {
    match kernel.node(disk.number) {
        Ok(node) => Ok(Some(node)),
        Err(error) if gone(&error) => Ok(None),
        Err(error) => {
            let text = format!("there is no {}, and no node can be made: {error}", path.display());
            Err(refused(text, "Run oven as root; a container needs the host's /dev (-v /dev:/dev)."))
        }
    }
}

/// Says what is wrong with the disk, if it is not the one.
fn verify(identity: &Identity<'_>, disk: &Namespace, serial: &str) -> Result<(), String> {
    if identity.serial != serial.as_bytes() {
        return Err(format!("its serial is {:?}", text(identity.serial)));
    }
    // What the kernel cannot tell the maker of is held to be Amazon's: it has to prove the more.
    let amazons = |vendor: Option<u32>| vendor.is_none_or(|vendor| vendor == AMAZON);
    if disk.controllers.iter().any(|c| amazons(c.vendor)) || u32::from(identity.vendor) == AMAZON {
        if identity.model != EBS {
            return Err(format!("it is a {:?}", text(identity.model)));
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

fn spelt(number: u64) -> String {
    format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number))
}

/// What the kernel answers about a disk that was just pulled out.
fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}
