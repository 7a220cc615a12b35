//! Mounts by descriptor: made, looked at, and only then attached; and taken away by their id.

use super::busy;
use crate::error::Kind;
use crate::sys::mount::table;
use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_create_exclusive, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    unmount as umount2,
};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// How often, and after what pauses, the kernel is asked again while something is busy: a process that was killed lets
/// go a moment later. 20 times 100 ms in all.
const PAUSES: [u64; 24] = [
    5, 10, 25, 60, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100,
    100, 100,
];

/// What is to be mounted.
#[derive(Debug)]
pub struct Wanted {
    /// The private tmpfs with the nodes ([`crate::mount::partitions`]).
    pub tmpfs: OwnedFd,
    /// The kernel's name of the device.
    pub name: String,
    pub rdev: u64,
    /// The file system, never guessed by the kernel.
    pub kind: &'static str,
    /// Only looked at: the journal is left alone.
    pub read_only: bool,
}

/// This kernel has no such file system.
#[derive(Debug)]
pub struct Unknown;
impl std::fmt::Display for Unknown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("this kernel has no such file system")
    }
}
impl std::error::Error for Unknown {}

/// Makes a mount that is attached nowhere, and verifies that it is of the device that was meant. It goes away with the
/// descriptor. To be called on a thread that ends with it: the thread's root directory becomes the tmpfs, so that the
/// source is `/dev/NAME` in mount tables, as `grub-probe` and `df` need it, and still nothing but our own node.
pub fn create(wanted: &Wanted) -> Result<OwnedFd> {
    let doing = || format!("mounting /dev/{} as {}", wanted.name, wanted.kind);
    // Before the root directory changes: the kernel may have to load a module.
    if let Err(Errno::NODEV) = fsopen(wanted.kind, FsOpenFlags::FSOPEN_CLOEXEC) {
        return Err(anyhow::Error::new(Unknown).context(doing()));
    }
    enter(&wanted.tmpfs).context("entering the private tmpfs")?;
    // A child that is being started holds copies of our descriptors for a moment, and with them what was just closed.
    let mut said = String::new();
    let fs = patiently(|| superblock(wanted, &mut said));
    let fs = fs.map_err(|error| refused(error, &said, wanted)).with_context(doing)?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    // Reading a file must not change the disk.
    attributes |= MountAttrFlags::MOUNT_ATTR_NOATIME;
    if wanted.read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).with_context(doing)?;
    if rustix::fs::fstat(&mount).with_context(doing)?.st_dev != wanted.rdev {
        return Err(Kind::Machine.error("another device was mounted than the one that was verified"))
            .with_context(doing);
    }
    Ok(mount)
}

/// A file system, not mounted yet. `said` is what the kernel had to say of a failure.
fn superblock(wanted: &Wanted, said: &mut String) -> rustix::io::Result<OwnedFd> {
    let fs = fsopen(wanted.kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", format!("/dev/{}", wanted.name))?;
    for (key, value) in options(wanted) {
        if value.is_empty() { fsconfig_set_flag(&fs, *key) } else { fsconfig_set_string(&fs, *key, *value) }?;
    }
    if wanted.read_only {
        fsconfig_set_flag(&fs, "ro")?;
    }
    let made = match fsconfig_create_exclusive(&fs) {
        // Before Linux 6.6. Then only the proof of release finds out that somebody else has it mounted, too.
        Err(Errno::OPNOTSUPP) => fsconfig_create(&fs),
        made => made,
    };
    if made.is_err() {
        let mut message = [0; 512];
        said.clear();
        // The kernel keeps a few messages for whoever asked.
        while let Ok(length @ 1..) = rustix::io::read(&fs, &mut message[..]) {
            *said += &format!("; {}", String::from_utf8_lossy(&message[..length]).trim());
        }
    }
    made.map(|()| fs)
}

fn options(wanted: &Wanted) -> &'static [(&'static str, &'static str)] {
    match (wanted.kind, wanted.read_only) {
        // A copy of a disk has the UUID of the disk, which may be mounted, too.
        ("xfs", false) => &[("nouuid", "")],
        ("xfs", true) => &[("nouuid", ""), ("norecovery", "")],
        ("ext4" | "ext3" | "ext2", true) => &[("noload", "")],
        // Damage ends the bake: what is written after it is not to be trusted. No flush of the device's cache at each
        // fsync: if this machine stops, the disk is thrown away; the proof of release ends with a flush. Nothing is
        // zeroed in the background: that is for an instance of the image, and would race with the discarding.
        ("ext4" | "ext3" | "ext2", false) => {
            &[("errors", "remount-ro"), ("nobarrier", ""), ("noinit_itable", "")]
        }
        _ => &[],
    }
}

fn refused(error: Errno, said: &str, wanted: &Wanted) -> anyhow::Error {
    match error {
        Errno::BUSY => {
            Kind::Machine.error(format!("{} is in use{said}{}", wanted.name, busy::clause(&[wanted.rdev])))
        }
        Errno::INVAL | Errno::UCLEAN | Errno::IO | Errno::BADMSG => {
            let what = format!(
                "the {} on {} is damaged, or too new for this kernel ({error}{said})",
                wanted.kind, wanted.name
            );
            Kind::Definition.failure(what).hint("The kernel's log (dmesg) may say more.").into()
        }
        _ => anyhow::Error::new(error).context(format!("the kernel refused{said}")),
    }
}

/// Makes the tmpfs this thread's root directory, for this thread alone.
fn enter(tmpfs: &OwnedFd) -> nix::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
    nix::unistd::fchdir(tmpfs)?;
    nix::unistd::chroot(c".")
}

/// Attaches a mount to an open directory.
pub fn attach(mount: &OwnedFd, target: &OwnedFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, c"", target, c"", flags)
}

/// The id by which a mount table calls the mount that a descriptor is on.
pub fn id(fd: impl AsFd) -> Result<u64> {
    let found = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .context("asking for a mount's id")?;
    if found.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
        return Err(Kind::Machine
            .failure("this kernel does not tell the id of a mount")
            .hint("Linux 5.8 does.")
            .into());
    }
    Ok(found.stx_mnt_id)
}

/// What is attached in this directory must be seen by nobody else.
pub fn is_private(dir: &OwnedFd) -> Result<()> {
    let id = id(dir)?;
    match table::of_this_thread()?.iter().find(|line| line.id == id) {
        Some(line) if !line.shared => Ok(()),
        Some(line) => bail!(
            Kind::Machine
                .failure(format!("mounts in {} would be seen outside of this process", line.path.display()))
        ),
        None => bail!(Kind::Machine.failure("the directory for mounts is in no mount of this namespace")),
    }
}

/// Unmounts by id, wherever the mount is by now; never lazily. A mount that is gone is fine. If `patient`, blocks for
/// 2 s at most while it is busy; then says EBUSY.
pub fn unmount(id: u64, patient: bool) -> Result<()> {
    let mut pauses = PAUSES[..if patient { PAUSES.len() } else { 0 }].iter();
    loop {
        let table = table::of_this_thread()?;
        let Some(line) = table.iter().find(|line| line.id == id) else { return Ok(()) };
        match umount2(&line.path, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::BUSY) if pauses.len() > 0 => pauses.by_ref().take(1).for_each(|&ms| pause(ms)),
            Err(error) => return Err(error).with_context(|| format!("unmounting {}", line.path.display())),
        }
    }
}

/// Repeats while the answer is EBUSY, as long as [`unmount`] does.
pub fn patiently<T>(mut attempt: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    for &ms in &PAUSES {
        match attempt() {
            Err(Errno::BUSY) => pause(ms),
            done => return done,
        }
    }
    attempt()
}

#[allow(clippy::disallowed_methods)] // on a thread of its own, or in a Drop, which cannot await
fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// The flags with which a directory of a file system is opened to ask the file system for things.
pub const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_sum_up_to_two_seconds() {
        assert_eq!(PAUSES.iter().sum::<u64>(), 2100);
    }
}
