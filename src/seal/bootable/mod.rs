//! Looks whether what a bake changed of kernel and boot loader boots on an instance.
//!
//! Only what changed is looked at, but that as a whole: a base that was made strangely, and boots, is not ours to refuse.
//! Texts have to name the image's own disk ([`names`]). A kernel that is new, or whose initramfs is, has to find its root
//! disk by itself: nvme is built in or in the initramfs. ena is needed when the root is mounted already, so it may be a
//! module of the root file system as well.

mod device_names;
mod kernels;
#[cfg(test)]
mod tests;

use super::rules;
use crate::error::Kind;
use crate::image::tree::Inside;
use crate::provision::context::Place;
use crate::report::Report;
use crate::sys::tasks::run_to_end;
use anyhow::{Context, Result};
use device_names::Own;
use kernels::{Drivers, Kernel};
use rustix::fs::FileType;
use std::collections::BTreeMap;

/// What is read when a machine boots: a pattern, and how it is read.
const TEXTS: [(&str, device_names::Kind); 19] = [
    ("/etc/fstab", device_names::Kind::Fstab),
    ("/etc/default/grub", device_names::Kind::Words),
    ("/etc/default/grub.d/*.cfg", device_names::Kind::Words),
    ("/etc/kernel/cmdline", device_names::Kind::Words),
    ("/etc/kernel/cmdline.d/*.conf", device_names::Kind::Words),
    ("/usr/lib/kernel/cmdline", device_names::Kind::Words),
    ("/boot/grub/grub.cfg", device_names::Kind::Words),
    ("/boot/grub/grubenv", device_names::Kind::Words),
    ("/boot/grub/menu.lst", device_names::Kind::Words),
    ("/boot/grub/grub.conf", device_names::Kind::Words),
    ("/boot/grub2/grub.cfg", device_names::Kind::Words),
    ("/boot/grub2/grubenv", device_names::Kind::Words),
    ("/boot/efi/EFI/*/grub.cfg", device_names::Kind::Words),
    ("/boot/loader/entries/*.conf", device_names::Kind::Words),
    ("/boot/efi/loader/entries/*.conf", device_names::Kind::Words),
    ("/efi/loader/entries/*.conf", device_names::Kind::Words),
    ("/boot/extlinux/*.conf", device_names::Kind::Words),
    ("/boot/extlinux.conf", device_names::Kind::Words),
    ("/boot/syslinux/*.cfg", device_names::Kind::Words),
];
/// A failure names so many things.
const NAMED_MAX: usize = 20;

/// What a machine boots by, as the base had it.
pub struct Before {
    texts: BTreeMap<String, Vec<u8>>,
    kernels: BTreeMap<String, Kernel>,
}

impl Before {
    pub fn of(inside: &Inside) -> Result<Self> {
        let doing = "looking at what the base boots by";
        let texts = texts(inside).context(doing)?.into_iter().map(|(path, _, text)| (path, text)).collect();
        Ok(Self { texts, kernels: kernels::all(inside).context(doing)? })
    }
}

/// Fails with all that would keep an instance from booting, by file and line.
pub async fn lint(place: &Place<'_>, before: &Before, report: &Report) -> Result<()> {
    let own = Own::of(place.nodes);
    let mut found = Vec::new();
    for (path, kind, text) in texts(place.inside)? {
        if before.texts.get(&path) != Some(&text) {
            report.detail(format!("{path} has changed: looking whether it names the image's own disk"));
            let its = device_names::lint(kind, &String::from_utf8_lossy(&text), &own);
            found.extend(its.into_iter().map(|finding| format!("{path}:{}: {}", finding.line, finding.what)));
        }
    }
    let after = kernels::all(place.inside)?;
    let had_initramfs = before.kernels.values().any(|kernel| kernel.initramfs.is_some());
    for (version, kernel) in
        after.iter().filter(|(version, kernel)| before.kernels.get(*version) != Some(kernel))
    {
        let step = report.step("verify", format!("looking whether the kernel {version} finds its disk"));
        found.extend(judge(place.inside, version, kernel, had_initramfs, report).await?);
        step.done();
    }
    fail(&found, &own)
}

/// What keeps a kernel from its disk or its network.
async fn judge(
    inside: &Inside,
    version: &str,
    kernel: &Kernel,
    had_initramfs: bool,
    report: &Report,
) -> Result<Vec<String>> {
    let (image, mut found) = (&kernel.image.0, Vec::new());
    let built_in = kernels::built_in(inside, version)?;
    let drivers = match &kernel.initramfs {
        None if had_initramfs => {
            return Ok(vec![format!(
                "{image}: this kernel has no initramfs, and those of the base have one"
            )]);
        }
        // Then the kernel alone mounts its root.
        None => built_in,
        Some((path, _)) => match look(inside, path, built_in).await? {
            Ok(drivers) => {
                tell(path, built_in, drivers, report);
                drivers
            }
            Err(error) if error.is::<crate::formats::initramfs::Unknown>() => {
                report.warn(format!("{path}: it is {error}: whether nvme is in it is not known"));
                Drivers { nvme: true, ..built_in }
            }
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
    // The network comes up when the root is mounted: unless that is on the network, its modules will do.
    if !drivers.ena && !kernels::has_module(inside, version, "ena")? {
        let what = "has no ena driver, be it built in, in the initramfs or among its modules";
        found.push(format!("{image}: the kernel {version} {what}"));
    }
    Ok(found)
}

/// What a kernel has with its initramfs. The inner error: that cannot be read.
async fn look(inside: &Inside, path: &str, built_in: Drivers) -> Result<Result<Drivers>> {
    let file = inside.open_file(path)?.with_context(|| format!("looking for {path} in the image"))?;
    let read = move || {
        let mut drivers = built_in;
        crate::formats::initramfs::names(file, &mut |name| drivers.see(name)).map(|()| drivers)
    };
    Ok(run_to_end(read).await)
}

fn tell(path: &str, built_in: Drivers, found: Drivers, report: &Report) {
    let place = |built_in, found| match (built_in, found) {
        (true, _) => "is built in",
        (false, true) => "is in it",
        (false, false) => "is not in it",
    };
    let (nvme, ena) = (place(built_in.nvme, found.nvme), place(built_in.ena, found.ena));
    report.detail(format!("{path}: nvme {nvme}, ena {ena}"));
}

/// Every text, with its content.
fn texts(inside: &Inside) -> Result<Vec<(String, device_names::Kind, Vec<u8>)>> {
    let mut all = Vec::new();
    for (pattern, kind) in TEXTS {
        for (path, is) in rules::expand(inside, pattern)? {
            // A link leads to another of them, or into /etc; what it leads to counts.
            if matches!(is, FileType::RegularFile | FileType::Symlink) && is_file(inside, &path)? {
                all.push((path.clone(), kind, inside.read(&path)?.unwrap_or_default()));
            }
        }
    }
    Ok(all)
}

fn is_file(inside: &Inside, path: &str) -> Result<bool> {
    Ok(kernels::stamp(inside, path)?.is_some())
}

fn fail(found: &[String], own: &Own) -> Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let mut list: String = found.iter().take(NAMED_MAX).map(|finding| format!("\n    {finding}")).collect();
    if let Some(more) = found.len().checked_sub(NAMED_MAX).filter(|more| *more > 0) {
        list += &format!("\n    and {more} more");
    }
    let mut hint =
        String::from("A package or a script of this bake wrote it. Correct it there, or in a [[run]].");
    let names = own.names();
    if !names.is_empty() {
        hint += &format!(" The image's own disk has {}.", names.join(", "));
    }
    Err(Kind::Step.failure(format!("the image would not boot on an instance:{list}")).hint(hint).into())
}
