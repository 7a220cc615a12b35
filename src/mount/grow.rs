//! Extends the root partition and its file system if the disk is larger than its partition table says.

use super::create::DIR;
use super::partitions::{DeviceBytes, DiskNodes, DiskPart};
use super::tool::{self, ToolEnd, ToolOutput};
use crate::device::Device;
use crate::error::Kind;
use crate::formats::partition::gpt::DiskWrite;
use crate::formats::partition::{TableScheme, gpt, mbr};
use crate::formats::superblock;
use crate::formats::superblock::{FileSystem, FileSystemType};
use crate::sys::block_ioctls;
use crate::sys::block_ioctls::PartitionChange;
use crate::sys::lock::{FileLock, LockMode};
use crate::sys::tasks;
use crate::text::human_size;
use anyhow::{Context, Result};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// The file system is extended only if at least this many unused bytes follow it. Alignment leaves a few unused bytes
/// at the end of every disk.
const SLACK: u64 = 1 << 20;
/// The number of attempts to lock the disk. udev holds the lock only for moments. If the lock is held for longer,
/// another program is changing the disk.
const LOCK_TRIES: u32 = 100;

/// The time limit of e2fsck and of resize2fs. Both process only metadata, which takes minutes on a large disk.
const TOOL_TIMEOUT: Duration = Duration::from_secs(30 * 60);
const HOSTILE: &str = "The base image's file system is damaged, or was made to harm the builder. Check it with e2fsck, or \
                       leave `size_gib` out.";

/// How often e2fsck is retried while the device is busy. The pauses between the attempts take about 2 s in total.
const CHECK_TRIES: u32 = 20;

/// Locks the whole disk against udev and other programs that respect this lock.
async fn lock(device: &Device) -> Result<FileLock<&OwnedFd>> {
    for _ in 0..LOCK_TRIES {
        let lock = FileLock::try_acquire(&device.node, LockMode::Exclusive);
        match lock.with_context(|| format!("locking {}", device.path.display()))? {
            Some(lock) => return Ok(lock),
            None => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
    let failure = Kind::Machine.failure(format!("{} is locked by another process", device.path.display()));
    Err(failure.hint("`lslocks` shows which one.").into())
}

/// If the disk is larger than the partition table says, extends the root partition to the end of the disk. Both the
/// table and the kernel get the new size. Returns true if the partition was extended, or if there is no table. In both
/// cases, the file system may be smaller than its device.
pub async fn grow_partition(device: &Device, nodes: &mut DiskNodes, root: usize) -> Result<bool> {
    let Some(old) = nodes.parts[root].partition.clone() else { return Ok(true) };
    let number = old.number;
    let doing = || format!("growing partition {number} of {}", device.path.display());
    let locked = lock(device).await?;
    let bytes = DeviceBytes { fd: device.node.as_fd(), size: nodes.size };
    let growth = match nodes.table.scheme {
        TableScheme::Gpt => gpt::grow(&bytes, nodes.sector, number),
        TableScheme::Mbr => mbr::grow(&bytes, nodes.sector, number),
        TableScheme::None => return Ok(true),
    };
    let growth = growth.map_err(|why| {
        let failure = Kind::Definition.failure(format!("the disk is larger than the base's disk, but {why}"));
        failure.hint("Leave `size_gib` out, or bake on an image whose root partition is the last one.")
    })?;
    let Some(growth) = growth else { return Ok(false) };
    let node = File::from(device.node.try_clone().context("duplicating the disk's descriptor")?);
    tasks::run_to_end(move || write(&node, &growth.writes)).await.with_context(doing)?;
    block_ioctls::update_partition(
        device.node.as_fd(),
        PartitionChange::Resize,
        number,
        old.start,
        growth.size,
    )
    .with_context(doing)?;
    drop(locked);

    let part = &mut nodes.parts[root];
    let real = block_ioctls::device_size(part.node.as_fd()).with_context(doing)?;
    if real != growth.size {
        let what = format!(
            "the kernel reports a size of {real} bytes, but the partition has {} bytes in the partition table",
            growth.size
        );
        return Err(Kind::Machine.error(what)).with_context(doing);
    }
    part.size = growth.size;
    part.partition = Some(crate::formats::partition::Partition { size: growth.size, ..old });
    nodes.table = crate::formats::partition::read(&bytes, nodes.sector).with_context(doing)?;
    Ok(true)
}

fn write(node: &File, writes: &[DiskWrite]) -> Result<()> {
    for DiskWrite { offset, bytes } in writes {
        node.write_all_at(bytes, *offset).context("writing the partition table")?;
    }
    node.sync_all().context("syncing the partition table")
}

/// Extends a mounted file system to the size of its device. Returns the file system's sizes before and after in bytes,
/// or `None` if the file system had that size already.
pub async fn grow_file_system(mount: &OwnedFd, part: &DiskPart) -> Result<Option<(u64, u64)>> {
    let Some(fs) = growable(part) else { return Ok(None) };
    let doing = format!("growing the {} on {}", fs.kind, part.name);
    let (kind, blocks, percent) = (fs.kind, part.size / fs.block_size, fs.inode_percent);
    let dir = rustix::fs::openat(mount, c".", DIR, Mode::empty()).with_context(|| doing.clone())?;
    let (expected, recorded_errors) = (part.size - fs.size(), fs.errors > 0);
    tasks::run_to_end(move || {
        let total = |dir: &OwnedFd| rustix::fs::fstatfs(dir).map(|s| s.f_blocks * s.f_bsize as u64);
        let before = total(&dir)?;
        match kind {
            FileSystemType::Xfs => block_ioctls::xfs_grow(dir.as_fd(), blocks, percent),
            _ => block_ioctls::ext4_resize(dir.as_fd(), blocks),
        }
        .map_err(|error| refusal_error(error, recorded_errors))?;
        let after = total(&dir)?;
        // Inode tables use a part of the new space: 1.6 % by default, and more if the file system was created with many
        // inodes. So an error is reported only if less than half of the space was added.
        if after.saturating_sub(before) < expected / 2 {
            let sizes = (human_size(before), human_size(after));
            return Err(Kind::Machine.error(format!("it grew only from {} to {}", sizes.0, sizes.1)));
        }
        Ok(Some((before, after)))
    })
    .await
    .context(doing)
}

/// Returns the error for a file system that the kernel does not extend. ext4 returns EPERM if its superblock records
/// errors.
fn refusal_error(error: Errno, recorded_errors: bool) -> anyhow::Error {
    let of_image = match error {
        Errno::UCLEAN | Errno::BADMSG | Errno::INVAL | Errno::OPNOTSUPP => true,
        error => error == Errno::PERM && recorded_errors,
    };
    let kind = if of_image { Kind::Definition } else { Kind::Machine };
    let hint = "Check the base image's file system (e2fsck, xfs_repair), or leave `size_gib` out.";
    kind.failure(format!("the kernel refused to grow the file system ({error})")).hint(hint).into()
}

/// Returns the file system of a partition if there is enough unused space to extend the file system.
fn growable(part: &DiskPart) -> Option<&FileSystem> {
    part.fs.as_ref().filter(|fs| fs.block_size > 0 && fs.size() + SLACK <= part.size)
}

/// Extends an ext4 file system with e2fsprogs before it is mounted. Without CAP_SYS_RESOURCE, the kernel refuses to
/// extend a mounted ext4. Processes in containers and on hardened machines often lack this capability. If this process
/// has it, this function does nothing. Returns the sizes before and after in bytes, or `None` if nothing was done.
pub async fn grow_unmounted(part: &mut DiskPart) -> Result<Option<(u64, u64)>> {
    let Some(fs) = growable(part).filter(|fs| fs.kind == FileSystemType::Ext4) else { return Ok(None) };
    let effective =
        rustix::thread::capabilities(None).context("reading this process's capabilities")?.effective;
    if effective.contains(CapabilitySet::SYS_RESOURCE) {
        return Ok(None);
    }
    let (before, doing) = (fs.size(), format!("growing the ext4 on {}", part.name));
    // The tools inherit the descriptor of the verified device. This path leads to that descriptor.
    let path = format!("/proc/self/fd/{}", part.node.as_raw_fd());
    // resize2fs accepts only a file system that was checked. Exit code 1 of e2fsck means that it repaired a small
    // error. Between fork and exec, another child process may have a copy of a descriptor that oven has just closed.
    // This copy may keep the device busy for a moment.
    let arguments = ["-f", "-p", &path];
    let check = || run_tool("e2fsck", &arguments, &part.node, &[0, 1], TOOL_TIMEOUT);
    let mut checked = check().await;
    for _ in 0..CHECK_TRIES {
        if !matches!(&checked, Err(error) if error.to_string().contains("is in use")) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        checked = check().await;
    }
    checked.with_context(|| doing.clone())?;
    let resized = run_tool("resize2fs", &[&path], &part.node, &[0], TOOL_TIMEOUT).await;
    resized.with_context(|| doing.clone())?;
    let bytes = DeviceBytes { fd: part.node.as_fd(), size: part.size };
    part.fs = superblock::probe(&bytes, 0, part.size);
    match growable(part) {
        None => Ok(Some((before, part.fs.as_ref().map_or(0, FileSystem::size)))),
        Some(fs) => {
            let what = format!("it grew only from {} to {}", human_size(before), human_size(fs.size()));
            Err(Kind::Machine.error(what)).context(doing)
        }
    }
}

/// Runs a tool of e2fsprogs on the device. Fails if its exit code is not in `good`.
async fn run_tool(
    name: &str,
    arguments: &[&str],
    device: &OwnedFd,
    good: &[i32],
    timeout: Duration,
) -> Result<()> {
    let ended = tool::run(name, arguments, device, timeout).await?;
    let ToolOutput { status, last, errors, .. } = match ended {
        ToolEnd::Ended(output) => output,
        ToolEnd::Missing => {
            let failure = Kind::Machine.failure(format!("{name} is not installed"));
            return Err(failure.hint("Install e2fsprogs, or run oven with CAP_SYS_RESOURCE.").into());
        }
        ToolEnd::Limited(what) => return Err(Kind::Definition.failure(what).hint(HOSTILE).into()),
    };
    if status.code().is_some_and(|code| good.contains(&code)) {
        return Ok(());
    }
    let output = last.split_whitespace().chain(errors.split_whitespace()).collect::<Vec<_>>().join(" ");
    let what = format!("{name} failed ({status}): {output}");
    // With this exit code, e2fsck found damage that it does not repair without a question.
    if name == "e2fsck" && status.code() == Some(4) {
        let hint = "Repair the base image's file system with e2fsck, or bake on another image.";
        return Err(Kind::Definition.failure(what).hint(hint).into());
    }
    Err(Kind::Machine.error(what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::tool::OUTPUT_MAX;
    use crate::sandbox::cgroup::StepCgroup;
    use crate::sys::landlock;

    async fn sh(script: &str, device: &OwnedFd, timeout: Duration) -> Result<()> {
        run_tool("sh", &["-ec", script], device, &[0], timeout).await
    }

    #[tokio::test]
    async fn a_tool_has_limits() {
        if !rustix::process::geteuid().is_root() {
            return; // only root can isolate a tool
        }
        let device = OwnedFd::from(File::open("/dev/null").unwrap());
        let minute = Duration::from_secs(60);
        sh("grep -qx 800 /proc/self/oom_score_adj", &device, minute).await.unwrap();
        if StepCgroup::for_tool().unwrap().is_some() {
            sh("grep -q /oven-step- /proc/self/cgroup", &device, minute).await.unwrap();
        }
        let flood =
            "head -c 50000000 /dev/zero | tr '\\0' x; echo ' y z'; head -c 9999999 /dev/zero >&2; exit 9";
        let error = format!("{:#}", sh(flood, &device, minute).await.unwrap_err());
        assert!(
            error.starts_with("sh failed (exit status: 9): xxx") && error.contains("x y z"),
            "{error:.99}"
        );
        assert!(error.len() <= 2 * OUTPUT_MAX + 100, "{}", error.len());
        // Its child is killed, too.
        let sleep = format!("sleep 1000.{}", std::process::id());
        let error = sh(&format!("{sleep}; true"), &device, Duration::from_millis(300)).await.unwrap_err();
        assert_eq!(
            (Kind::of(&error), error.to_string()),
            (Kind::Definition, "sh took longer than 300ms".into())
        );
        if StepCgroup::for_tool().unwrap().is_some() {
            let processes = std::fs::read_dir("/proc").unwrap().flatten();
            let lines =
                processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok());
            let left = lines.filter(|line| line.trim_end_matches('\0').replace('\0', " ") == sleep);
            assert_eq!(left.count(), 0);
        }
    }

    /// Runs a shell as the tool, because a malicious image could make the tool execute any command.
    #[tokio::test]
    async fn a_tool_can_write_only_to_the_device() {
        if !rustix::process::geteuid().is_root() {
            return; // only root can isolate a tool
        }
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("device");
        std::fs::write(&device, "old").unwrap();
        let fd = OwnedFd::from(std::fs::File::open(&device).unwrap());
        let (path, shown) = (format!("/proc/self/fd/{}", fd.as_raw_fd()), dir.path().display());
        let sh = async |script: String| sh(&script, &fd, Duration::from_secs(60)).await;
        sh(format!("echo new 1<>{path}")).await.unwrap();
        assert_eq!(std::fs::read_to_string(&device).unwrap(), "new\n");
        sh("grep -qx 'CapEff:.0*' /proc/self/status".into()).await.unwrap();
        sh("grep -qx 'CapBnd:.0*' /proc/self/status".into()).await.unwrap();
        sh("grep -qx 'Seccomp:.2' /proc/self/status".into()).await.unwrap();
        sh("! grep -v lo: /proc/net/dev | grep -q :".into()).await.unwrap();
        if landlock::version() < 1 {
            return; // this kernel has no Landlock
        }
        for script in ["echo x > {}/other", "mkdir {}/made", "rm {}/device", "ln -s x {}/link"] {
            assert!(sh(script.replace("{}", &shown.to_string())).await.is_err(), "{script}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
