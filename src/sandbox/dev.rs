//! Creates a step's private `/dev`. It contains a few harmless nodes, private terminals, and the nodes of the image's
//! disk.

use super::paths::api_directory;
use super::spec::StepSpec;
use super::tmpfs::{TmpfsLimits, new_tmpfs};
use crate::device::DeviceNode;
use crate::sys::mount::api::{PLAIN, attach, new_file_system};
use anyhow::{Context, Result, bail};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, makedev};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use std::path::{Component, Path};

/// The name, major number and minor number of each node. The numbers are the same in every kernel.
pub const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];
/// The id of the group `disk` in every distribution.
const DISK: u32 = 6;

/// Mounts the step's `/dev`, and returns the mount.
pub fn mount_dev(root: BorrowedFd<'_>, spec: &StepSpec) -> Result<OwnedFd> {
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let dev = new_tmpfs("0755", TmpfsLimits::DEV, attributes)?;
    for (name, major, minor) in NODES {
        let mode = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(&dev, name, FileType::CharacterDevice, mode, makedev(major, minor))
            .with_context(|| format!("making /dev/{name}"))?;
    }
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, &dev, name).with_context(|| format!("making /dev/{name}"))?;
    }
    for node in &spec.nodes {
        disk_node(dev.as_fd(), node, spec.can_write_disk())
            .with_context(|| format!("making the disk's node /dev/{}", node.name))?;
    }
    for name in ["pts", "shm", "mqueue"] {
        rustix::fs::mkdirat(&dev, name, Mode::from_raw_mode(0o755)).context("making directories in /dev")?;
    }
    attach(&dev, api_directory(root, "dev")?).context("mounting /dev")?;
    let options = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")]; // 5 is the group `tty` in every distribution
    let no_exec = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    attach(new_file_system("devpts", &options, no_exec)?, api_directory(dev.as_fd(), "pts")?)
        .context("mounting /dev/pts")?;
    attach(new_tmpfs("1777", TmpfsLimits::run(), PLAIN)?, api_directory(dev.as_fd(), "shm")?)
        .context("mounting /dev/shm")?;
    Ok(dev)
}

/// The mode is only for programs that look at it. The cgroup of the step prevents that root writes to the disk.
fn disk_node(dev: BorrowedFd<'_>, node: &DeviceNode, writable: bool) -> Result<()> {
    let (dir, name, _) = parent(dev, &node.name)?;
    let mode = Mode::from_raw_mode(if writable { 0o660 } else { 0o440 });
    rustix::fs::mknodat(&dir, &name, FileType::BlockDevice, mode, node.rdev)?;
    let disk = Gid::from_raw(DISK);
    rustix::fs::chownat(&dir, &name, Some(Uid::ROOT), Some(disk), AtFlags::SYMLINK_NOFOLLOW)?;
    for link in &node.links {
        let (dir, name, depth) = parent(dev, link)?;
        let target = "../".repeat(depth) + &node.name;
        match rustix::fs::symlinkat(&target, &dir, &name) {
            Err(Errno::EXIST) => {} // if two partitions have the same label, the first one gets the link
            result => result.with_context(|| format!("making /dev/{link}"))?,
        }
    }
    Ok(())
}

/// Splits a path below `/dev` into its directory and its last name. Creates the directory if it is missing. Returns the
/// directory, the last name, and the number of names before the last one. A path with `..` is an error, because the
/// path may contain a label from the image.
fn parent(dev: BorrowedFd<'_>, path: &str) -> Result<(OwnedFd, String, usize)> {
    let names = Path::new(path).components().map(|part| match part {
        Component::Normal(name) => Ok(name.to_string_lossy().into_owned()),
        _ => bail!("\"{path}\" is not a name below /dev"),
    });
    let mut names = names.collect::<Result<Vec<_>>>()?;
    let Some(last) = names.pop() else { bail!("a device node has no name") };
    let mut dir = dev.try_clone_to_owned()?;
    for name in &names {
        match rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        dir = rustix::fs::openat(&dir, name, flags, Mode::empty())?;
    }
    Ok((dir, last, names.len()))
}
