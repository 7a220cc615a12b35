//! Checks that an instance can boot after a bake changed kernels or boot loader files.
//!
//! Only files that the bake changed are checked. Otherwise, an unusual base image could be rejected although it boots.
//! If a file changed, its whole content is checked. Configuration that is read at boot must name the image's own disk
//! (`device_names.rs`). A kernel's drivers are checked if the kernel or its initramfs is new. The nvme driver must be
//! built into the kernel or be in the initramfs, because the kernel needs it to mount the root. The ena driver is
//! needed only after the root is mounted, so it may also be a module of the root file system.

pub mod device_names;
mod kernels;
#[cfg(test)]
mod tests;

use crate::error::Kind;
use crate::image::data::DataReader;
use crate::image::tree::ImageTree;
use crate::provision::context::MountedImage;
use crate::report::Report;
use crate::sys::tasks::run_to_end;
use crate::text::{escape_name, list_first};
use anyhow::{Context, Result};
use device_names::DiskNames;
use kernels::{DriverSet, Kernel};
use rustix::fs::FileType;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// The text files that are read when a machine boots. Each has a pattern of paths, and a format.
const TEXTS: [(&str, device_names::BootTextKind); 19] = [
    ("/etc/fstab", device_names::BootTextKind::Fstab),
    ("/etc/default/grub", device_names::BootTextKind::Words),
    ("/etc/default/grub.d/*.cfg", device_names::BootTextKind::Words),
    ("/etc/kernel/cmdline", device_names::BootTextKind::Words),
    ("/etc/kernel/cmdline.d/*.conf", device_names::BootTextKind::Words),
    ("/usr/lib/kernel/cmdline", device_names::BootTextKind::Words),
    ("/boot/grub/grub.cfg", device_names::BootTextKind::Words),
    ("/boot/grub/grubenv", device_names::BootTextKind::Words),
    ("/boot/grub/menu.lst", device_names::BootTextKind::Words),
    ("/boot/grub/grub.conf", device_names::BootTextKind::Words),
    ("/boot/grub2/grub.cfg", device_names::BootTextKind::Words),
    ("/boot/grub2/grubenv", device_names::BootTextKind::Words),
    ("/boot/efi/EFI/*/grub.cfg", device_names::BootTextKind::Words),
    ("/boot/loader/entries/*.conf", device_names::BootTextKind::Words),
    ("/boot/efi/loader/entries/*.conf", device_names::BootTextKind::Words),
    ("/efi/loader/entries/*.conf", device_names::BootTextKind::Words),
    ("/boot/extlinux/*.conf", device_names::BootTextKind::Words),
    ("/boot/extlinux.conf", device_names::BootTextKind::Words),
    ("/boot/syslinux/*.cfg", device_names::BootTextKind::Words),
];
/// The maximum number of boot texts. Usual images have less than 20.
const TEXTS_MAX: usize = 1000;
/// The maximum size of a boot text in bytes. A loader entry has less than 1 KiB, and a grub.cfg with a hundred kernels
/// has about 200 KiB.
const TEXT_MAX: u64 = 1 << 20;
/// The maximum number of findings that an error message names.
const NAMED_MAX: usize = 20;

/// The SHA-256 digest of a boot text.
type TextDigest = [u8; 32];

/// The base's boot files, before the bake.
pub struct BootBaseline {
    texts: BTreeMap<String, TextDigest>,
    kernels: BTreeMap<String, Kernel>,
}

impl BootBaseline {
    pub fn of(inside: &ImageTree) -> Result<Self> {
        let doing = "reading the boot files of the base";
        let mut texts = BTreeMap::new();
        for (path, _) in find_texts(inside).context(doing)? {
            let text = read_text(inside, &path).context(doing)?;
            texts.insert(path, Sha256::digest(text).into());
        }
        Ok(Self { texts, kernels: kernels::find_kernels(inside).context(doing)? })
    }
}

/// Fails if a file that the bake changed would prevent an instance from booting. The error lists all findings, each
/// with its file.
pub async fn check_bootable(place: &MountedImage<'_>, before: &BootBaseline, report: &Report) -> Result<()> {
    let own = DiskNames::of(place.nodes);
    let mut found = Vec::new();
    for (path, kind) in find_texts(place.inside)? {
        let text = read_text(place.inside, &path)?;
        let digest: TextDigest = Sha256::digest(&text).into();
        if before.texts.get(&path) != Some(&digest) {
            report.detail(format!(
                "checking that {}, which has changed, names the image's own disk",
                escape_name(&path)
            ));
            let findings = device_names::lint(kind, &String::from_utf8_lossy(&text), &own);
            found.extend(
                findings.into_iter().map(|finding| format!("{path}:{}: {}", finding.line, finding.what)),
            );
        }
    }
    let after = kernels::find_kernels(place.inside)?;
    let had_initramfs = before.kernels.values().any(|kernel| kernel.initramfs.is_some());
    for (version, kernel) in
        after.iter().filter(|(version, kernel)| before.kernels.get(*version) != Some(kernel))
    {
        let step = report.step("verify", format!("checking that the kernel {version} finds its disk"));
        found.extend(check_kernel(place.inside, version, kernel, had_initramfs, report).await?);
        step.done();
    }
    fail_if_any(&found, &own)
}

/// Returns the path of a kernel of the image, or `None` if it has no kernel.
pub fn find_kernel(inside: &ImageTree) -> Result<Option<String>> {
    let kernels = kernels::find_kernels(inside).context("searching for kernels")?;
    Ok(kernels.into_values().next().map(|kernel| kernel.image.0))
}

/// Returns the reasons why a kernel would not find its disk or its network.
async fn check_kernel(
    inside: &ImageTree,
    version: &str,
    kernel: &Kernel,
    had_initramfs: bool,
    report: &Report,
) -> Result<Vec<String>> {
    let (image, mut found) = (&kernel.image.0, Vec::new());
    let built_in = kernels::built_in_drivers(inside, version)?;
    let drivers = match &kernel.initramfs {
        None if had_initramfs => {
            return Ok(vec![format!(
                "{image}: this kernel has no initramfs, but the base's kernels have one"
            )]);
        }
        // Without an initramfs, the kernel mounts its root by itself, so only built-in drivers count.
        None => built_in,
        Some((path, _)) => match read_drivers(inside, path, built_in).await? {
            Ok(drivers) => {
                log_drivers(path, built_in, drivers, report);
                drivers
            }
            Err(error) if error.is::<crate::formats::initramfs::UnknownFormat>() => {
                report.warn(format!(
                    "{}: it is {error}, so it is unknown whether it has the nvme driver",
                    escape_name(path)
                ));
                DriverSet { nvme: true, ..built_in }
            }
            Err(error) if Kind::of(&error) == Kind::Interrupted => return Err(error),
            Err(error) => return Ok(vec![format!("{path}: {error:#}")]),
        },
    };
    if !drivers.nvme {
        found.push(match &kernel.initramfs {
            Some((path, _)) => {
                format!("{path}: it has no nvme driver, and none is built into the kernel {version}")
            }
            None => format!("{image}: it has no nvme driver built in, and no initramfs"),
        });
    }
    // The network starts after the root is mounted, so a module of the root file system is enough. A root on the
    // network is not considered.
    if !drivers.ena && !kernels::has_module(inside, version, "ena")? {
        let what = "has no ena driver: it is not built in, not in the initramfs and not among the modules";
        found.push(format!("{image}: the kernel {version} {what}"));
    }
    Ok(found)
}

/// Returns the drivers that are built into a kernel or are in its initramfs. The outer error means that the initramfs
/// cannot be opened. The inner error means that its content cannot be read.
async fn read_drivers(inside: &ImageTree, path: &str, built_in: DriverSet) -> Result<Result<DriverSet>> {
    let file =
        inside.open_file(path)?.with_context(|| format!("opening {} in the image", escape_name(path)))?;
    let (_timer, meter) = (inside.meter().start(), inside.meter().clone());
    let read = move || {
        let mut drivers = built_in;
        let count = |bytes| meter.count_unpacked(bytes);
        let file = DataReader::new(file, meter.clone());
        crate::formats::initramfs::list_files(file, &count, &mut |name| drivers.see(name)).map(|()| drivers)
    };
    Ok(run_to_end(read).await)
}

fn log_drivers(path: &str, built_in: DriverSet, found: DriverSet, report: &Report) {
    let place = |built_in, found| match (built_in, found) {
        (true, _) => "is built in",
        (false, true) => "is in it",
        (false, false) => "is not in it",
    };
    let (nvme, ena) = (place(built_in.nvme, found.nvme), place(built_in.ena, found.ena));
    report.detail(format!("{}: nvme {nvme}, ena {ena}", escape_name(path)));
}

/// Returns the paths and formats of all boot texts that the image has.
fn find_texts(inside: &ImageTree) -> Result<Vec<(String, device_names::BootTextKind)>> {
    let mut all = Vec::new();
    for (pattern, kind) in TEXTS {
        for (path, file_type) in inside.expand(pattern)? {
            // If the path is a symlink, the content of its target is checked.
            if matches!(file_type, FileType::RegularFile | FileType::Symlink) && is_file(inside, &path)? {
                all.push((path, kind));
            }
        }
    }
    if all.len() > TEXTS_MAX {
        let what = format!("the image has more than {TEXTS_MAX} files that a boot loader reads");
        return Err(inside.meter().exceeded(what));
    }
    Ok(all)
}

fn read_text(inside: &ImageTree, path: &str) -> Result<Vec<u8>> {
    Ok(inside.read_at_most(path, TEXT_MAX)?.unwrap_or_default())
}

fn is_file(inside: &ImageTree, path: &str) -> Result<bool> {
    Ok(kernels::file_stamp(inside, path)?.is_some())
}

fn fail_if_any(found: &[String], own: &DiskNames) -> Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let found: Vec<_> = found.iter().map(escape_name).collect();
    let list = list_first(&found, NAMED_MAX, "\n    ");
    let mut hint = String::from(
        "A package or a script of this bake wrote these files. Correct the script, or add a [[run]] that corrects \
         the files.",
    );
    let names = own.names();
    if !names.is_empty() {
        hint += &format!(" The image's own disk has {}.", names.join(", "));
    }
    let what = format!("the image would not boot on an instance:\n    {list}");
    Err(Kind::Step.failure(what).hint(hint).into())
}
