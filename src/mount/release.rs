//! Closes a root: checks, syncs and unmounts its file systems, and proves that the disk is released.

use super::busy;
use super::create;
use super::damage;
use super::damage::DamageCause;
use super::mounts::ImageMounts;
use super::partitions::{DeviceBytes, DiskNodes, DiskPart};
use crate::device::Device;
use crate::error::Kind;
use crate::formats::partition;
use crate::formats::partition::Partition;
use crate::formats::superblock;
use crate::report::Report;
use crate::sys::tasks;
use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::AsFd;

/// Closes a root. `step_wrote` says whether a step may have written to the disk below the file systems.
pub async fn close(
    mut mounts: ImageMounts,
    disk: &DiskNodes,
    device: &Device,
    report: &Report,
    step_wrote: bool,
) -> Result<()> {
    let path = device.path.display();
    mounts.check_and_sync(device, step_wrote).await?;
    let used: Vec<_> = mounts.list.iter().filter_map(|m| m.device.clone()).collect();
    mounts.unmount().await.with_context(|| format!("releasing {path}"))?;
    prove_released(disk, &used).await.with_context(|| format!("proving that {path} is released"))?;
    for part in disk.parts.iter().filter(|part| used.iter().any(|(name, _)| *name == part.name)) {
        check_superblock(part, mounts.unrecorded_cause(step_wrote))
            .with_context(|| format!("checking {} after it was unmounted", part.name))?;
    }
    check_partition_table(disk, device, &used)
        .with_context(|| format!("checking the partition table of {path}"))?;
    drop(mounts);
    report.detail(format!("{path} is released"));
    Ok(())
}

/// Uses `O_EXCL` to open the whole disk and each device that was mounted, and syncs them. An open fails if the device
/// is still mounted in any namespace, or if a loop device or swap uses it. A successful `umount` does not prove this,
/// because the device may still be mounted in another namespace.
async fn prove_released(disk: &DiskNodes, used: &[(String, u64)]) -> Result<()> {
    let mut devices = used.to_vec();
    let whole = (disk.name.clone(), disk.rdev);
    if !devices.contains(&whole) {
        devices.push(whole);
    }
    let tmpfs = disk.tmpfs.try_clone().context("duplicating a descriptor")?;
    let all: Vec<_> = used.iter().map(|(_, rdev)| *rdev).chain([disk.rdev]).collect();
    tasks::run_to_end(move || {
        for (name, _) in devices {
            let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
            let open = || rustix::fs::openat(&tmpfs, format!("dev/{name}"), flags, Mode::empty());
            let node = create::retry_while_busy(open).map_err(|error| match error {
                Errno::BUSY => {
                    let failure = Kind::Machine
                        .failure(format!("{name} is still in use{}", busy::holders_clause(&all)));
                    failure
                        .hint("oven took no snapshot. End the programs that use the disk, and bake again.")
                        .into()
                }
                error => anyhow::Error::new(error).context(format!("opening {name}")),
            })?;
            File::from(node).sync_all().with_context(|| format!("syncing {name}"))?;
        }
        Ok(())
    })
    .await
}

/// Fails if a step damaged the partition table, or changed a partition that was mounted. Steps can write to the disk's
/// nodes if the definition has `[disk] writable = true`.
fn check_partition_table(disk: &DiskNodes, device: &Device, used: &[(String, u64)]) -> Result<()> {
    let changed = |what: String| Kind::Step.failure(what).hint(damage::STEP_HINT);
    let now = partition::read(&DeviceBytes { fd: device.node.as_fd(), size: disk.size }, disk.sector);
    // The table was valid before the first step.
    let now = now.map_err(|error| match Kind::of(&error) {
        Kind::Definition => changed(format!("a step damaged the partition table: {error:#}")).into(),
        _ => error,
    })?;
    if let Some(warning) = now.warnings.iter().find(|warning| !disk.table.warnings.contains(warning)) {
        return Err(changed(format!("a step damaged the partition table: {warning}")).into());
    }
    let is_used = |part: &&DiskPart| used.iter().any(|(name, _)| *name == part.name);
    for wanted in disk.parts.iter().filter(is_used).filter_map(|part| part.partition.as_ref()) {
        let place = |p: &Partition| (p.number, p.start, p.size);
        if !now.partitions.iter().any(|p| place(p) == place(wanted)) {
            let what = format!("a step changed the position or size of partition {}", wanted.number);
            return Err(changed(what).into());
        }
    }
    Ok(())
}

/// Compares the superblock of an unmounted file system with its superblock before the bake. Fails if the bake damaged
/// the file system. `cause` is the cause unless the superblock records that the kernel found wrong metadata of the base.
fn check_superblock(part: &DiskPart, cause: DamageCause) -> Result<()> {
    let Some(before) = &part.fs else { return Ok(()) };
    let bytes = DeviceBytes { fd: part.node.as_fd(), size: part.size };
    let Some(after) = superblock::probe(&bytes, 0, part.size) else {
        return Err(damage::error("it no longer has a valid superblock", cause));
    };
    if after.kind != before.kind || after.errors > before.errors || after.dirty {
        let is_metadata = after.errors > before.errors && after.error_codes.are_damage(before.errors.into());
        let is_base = is_metadata && cause == DamageCause::Storage;
        let cause = if is_base { DamageCause::BaseImage } else { cause };
        return Err(damage::error("its superblock records new errors", cause));
    }
    Ok(())
}
