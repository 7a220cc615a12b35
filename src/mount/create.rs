//! Mounts through descriptors: a mount is created, verified, and only then attached. Mounts are unmounted by their ids.

use super::damage::DamageCause;
use super::{busy, damage};
use crate::error::{Kind, is_of_machine};
use crate::sys::mount::table;
use crate::sys::namespaces;
use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags, fsconfig_create, fsconfig_create_exclusive,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, unmount as umount2,
};
use rustix::thread::UnshareFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// The pauses, in milliseconds, between attempts while a device or mount is busy. A killed process needs a moment to
/// release the device. The sum of the pauses is about 2 s.
const PAUSES: [u64; 24] = [
    5, 10, 25, 60, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100,
    100, 100,
];

/// Describes a mount to create.
#[derive(Debug)]
pub struct MountRequest {
    /// The private tmpfs with the device nodes ([`crate::mount::partitions`]).
    pub tmpfs: OwnedFd,
    /// The kernel's name of the device.
    pub name: String,
    pub rdev: u64,
    /// The type of the file system. The kernel never guesses it.
    pub kind: &'static str,
    /// If true, the mount is read-only, and the journal is not replayed.
    pub read_only: bool,
}

/// The error if this kernel does not support the file system.
#[derive(Debug)]
pub struct UnknownFileSystem;
impl std::fmt::Display for UnknownFileSystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("this kernel does not support the file system")
    }
}
impl std::error::Error for UnknownFileSystem {}

/// Creates a mount that is not attached anywhere, and verifies that it shows the right device. If the mount is never
/// attached, it disappears when its descriptor is closed. Call this on a separate thread, because it makes the tmpfs
/// the root directory of the thread. In this root directory, `/dev/NAME` can only be oven's own device node. The
/// mount tables then show `/dev/NAME` as the mount's source. `grub-probe` and `df` need this path.
pub fn create_mount(request: &MountRequest) -> Result<OwnedFd> {
    let doing = || format!("mounting /dev/{} as {}", request.name, request.kind);
    // This call is made before the root directory changes, because the kernel may have to load a module for the file
    // system.
    if let Err(Errno::NODEV) = fsopen(request.kind, FsOpenFlags::FSOPEN_CLOEXEC) {
        return Err(anyhow::Error::new(UnknownFileSystem).context(doing()));
    }
    enter(&request.tmpfs).context("entering the private tmpfs")?;
    // Between fork and exec, a child process has copies of oven's descriptors. If oven has just closed a descriptor of
    // the device, such a copy may keep the device busy for a moment.
    let mut messages = String::new();
    let fs = retry_while_busy(|| superblock(request, &mut messages));
    let fs = fs.map_err(|error| refusal_error(error, &messages, request)).with_context(doing)?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    // Reading a file must not write an access time to the disk.
    attributes |= MountAttrFlags::MOUNT_ATTR_NOATIME;
    if request.read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let mount = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).with_context(doing)?;
    if rustix::fs::fstat(&mount).with_context(doing)?.st_dev != request.rdev {
        return Err(Kind::Machine.error("the mounted device is not the one that was verified"))
            .with_context(doing);
    }
    Ok(mount)
}

/// Creates the kernel's superblock for the file system, without a mount. On failure, writes the kernel's messages to
/// `messages`.
fn superblock(request: &MountRequest, messages: &mut String) -> rustix::io::Result<OwnedFd> {
    let fs = fsopen(request.kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", format!("/dev/{}", request.name))?;
    for (key, value) in options(request) {
        if value.is_empty() { fsconfig_set_flag(&fs, *key) } else { fsconfig_set_string(&fs, *key, *value) }?;
    }
    if request.read_only {
        fsconfig_set_flag(&fs, "ro")?;
    }
    let made = match fsconfig_create_exclusive(&fs) {
        // Linux before 6.6 does not support an exclusive superblock. On such a kernel, oven notices another process's
        // mount only later, when it verifies that nothing uses the disk any more.
        Err(Errno::OPNOTSUPP) => fsconfig_create(&fs),
        made => made,
    };
    if made.is_err() {
        let mut message = [0; 512];
        messages.clear();
        // Each read from the descriptor returns one message of the kernel.
        while let Ok(length @ 1..) = rustix::io::read(&fs, &mut message[..]) {
            *messages += &format!("; {}", String::from_utf8_lossy(&message[..length]).trim());
        }
    }
    made.map(|()| fs)
}

/// Returns the mount options. Every mount of ext4 says what happens at an error. Otherwise the superblock decides, and it
/// may say `panic`: then one damaged directory stops this machine. Options of a mount override those of the superblock,
/// even for a read-only mount. In a vfat and an xfs file system, nothing can ask for a panic.
fn options(request: &MountRequest) -> &'static [(&'static str, &'static str)] {
    match (request.kind, request.read_only) {
        // xfs refuses to mount two file systems with the same UUID. A copy of a disk has the UUID of the original,
        // which may be mounted at the same time. So oven disables this check.
        ("xfs", false) => &[("nouuid", "")],
        ("xfs", true) => &[("nouuid", ""), ("norecovery", "")],
        ("ext4" | "ext3" | "ext2", true) => &[("errors", "remount-ro"), ("noload", "")],
        // The file system becomes read-only if it is damaged, and then the bake fails, because later writes could not
        // be trusted. The device's cache is not flushed at each fsync, because the disk is discarded if this machine
        // stops. The cache is flushed when the root is closed. The kernel must not zero inode tables in the background
        // while oven discards free space. So this zeroing is disabled. An instance of the image zeroes the tables
        // later.
        ("ext4" | "ext3" | "ext2", false) => {
            &[("errors", "remount-ro"), ("nobarrier", ""), ("noinit_itable", "")]
        }
        ("vfat", _) => &[("errors", "remount-ro")],
        _ => &[],
    }
}

fn refusal_error(error: Errno, messages: &str, request: &MountRequest) -> anyhow::Error {
    match error {
        Errno::BUSY => Kind::Machine.error(format!(
            "{} is in use{messages}{}",
            request.name,
            busy::holders_clause(&[request.rdev])
        )),
        // If a superblock names a block beyond the end of the device, the error is EIO, too. oven reads the superblock
        // before the mount, so a disk that fails was found before this point.
        Errno::INVAL | Errno::UCLEAN | Errno::IO | Errno::BADMSG => {
            let what = format!(
                "the {} file system on {} is damaged, or this kernel is too old for it ({error}{messages})",
                request.kind, request.name
            );
            damage::error(&what, DamageCause::BaseImage)
        }
        _ => {
            let lacks_rights = matches!(error, Errno::PERM | Errno::ACCESS | Errno::NXIO | Errno::NODEV);
            let of_machine = is_of_machine(error) || lacks_rights;
            let kind = if of_machine { Kind::Machine } else { Kind::Definition };
            kind.error(format!("the kernel rejected the mount{messages} ({error})"))
        }
    }
}

/// Makes the tmpfs the root directory of this thread only.
fn enter(tmpfs: &OwnedFd) -> rustix::io::Result<()> {
    namespaces::unshare(UnshareFlags::FS)?;
    rustix::process::fchdir(tmpfs)?;
    rustix::process::chroot(c".")
}

/// Returns the id of the mount to which a descriptor belongs. Mount tables use the same id.
pub fn mount_id(fd: impl AsFd) -> Result<u64> {
    let found = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .context("reading a mount's id")?;
    if found.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
        return Err(Kind::Machine
            .failure("this kernel does not provide the ids of mounts")
            .hint("Use Linux 5.8 or newer.")
            .into());
    }
    Ok(found.stx_mnt_id)
}

/// Fails if a mount in this directory would be visible in other namespaces.
pub fn ensure_private(dir: &OwnedFd) -> Result<()> {
    let id = mount_id(dir)?;
    match table::of_this_thread()?.iter().find(|line| line.id == id) {
        Some(line) if !line.shared => Ok(()),
        Some(line) => {
            bail!(
                Kind::Machine.failure(format!(
                    "mounts in {} would be visible to other processes",
                    line.path.display()
                ))
            )
        }
        None => {
            bail!(Kind::Machine.failure("the directory for mounts is outside this process's mount namespace"))
        }
    }
}

/// Unmounts by id, which works even if the mount was moved. Never unmounts lazily. Succeeds if the mount no longer
/// exists. If `patient` is true, retries for about 2 s while the mount is busy. If the mount is busy after the last
/// attempt, fails with EBUSY.
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

/// Retries while the result is EBUSY, with the same limit as [`unmount`].
pub fn retry_while_busy<T>(mut attempt: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    for &ms in &PAUSES {
        match attempt() {
            Err(Errno::BUSY) => pause(ms),
            done => return done,
        }
    }
    attempt()
}

#[allow(clippy::disallowed_methods)] // on a separate thread, or in a Drop, which cannot await
fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// The flags with which a directory is opened for ioctls on its file system.
pub const DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mount_of_ext4_and_vfat_says_what_happens_at_an_error() {
        let tmpfs = || OwnedFd::from(std::fs::File::open("/").unwrap());
        for kind in ["ext2", "ext3", "ext4", "vfat"] {
            for read_only in [true, false] {
                let request = MountRequest { tmpfs: tmpfs(), name: "x".into(), rdev: 0, kind, read_only };
                assert!(options(&request).contains(&("errors", "remount-ro")), "{kind}");
            }
        }
    }

    #[test]
    fn pauses_sum_up_to_two_seconds() {
        assert_eq!(PAUSES.iter().sum::<u64>(), 2100);
    }
}
