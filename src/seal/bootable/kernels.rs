//! Finds the kernels of an image, and their drivers for an instance's disk and network.

use crate::image::tree::ImageTree;
use crate::text::escape_name;
use anyhow::{Context, Result};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// The paths of kernels. `*` is the version.
const IMAGES: [&str; 4] =
    ["/boot/vmlinuz-*", "/boot/vmlinux-*", "/boot/Image-*", "/usr/lib/modules/*/vmlinuz"];
/// The paths of initramfs files, as Debian, dracut, SUSE and kernel-install name them. `*` is the kernel's version.
const INITRAMFS: [&str; 8] = [
    "/boot/initrd.img-*",
    "/boot/initramfs-*.img",
    "/boot/initrd-*",
    "/boot/initrd-*.img",
    "/boot/initramfs-*",
    "/usr/lib/modules/*/initramfs.img",
    "/usr/lib/modules/*/initrd",
    "/lib/modules/*/initrd",
];
/// The maximum number of kernels. Usual images have one to three.
const KERNELS_MAX: usize = 200;
/// The directories of kernel-install. Each has subdirectories that are named after a machine id or a distribution.
const ENTRIES: [&str; 3] = ["/boot", "/boot/efi", "/efi"];
/// The maximum number of directories in `ENTRIES`. Usual images have less than 20.
const DIRECTORIES_MAX: usize = 1000;

/// A file's inode, size and time. Two different stamps of a path mean that the file was replaced or written again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    inode: u64,
    size: i64,
    modified: (i64, i64),
}

/// A kernel that a boot loader may start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    pub image: (String, Stamp),
    pub initramfs: Option<(String, Stamp)>,
}

/// The drivers of an instance's disk and network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DriverSet {
    pub nvme: bool,
    pub ena: bool,
}

impl DriverSet {
    /// Records a driver if `name` is the path of the driver's module. Returns `Break` when both drivers have been
    /// found.
    pub fn see(&mut self, name: &[u8]) -> ControlFlow<()> {
        let file = name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        self.nvme |= is_module(file, b"nvme");
        self.ena |= is_module(file, b"ena");
        if self.nvme && self.ena { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// Returns whether `file` is the file name of the module `name`, such as `nvme.ko` or `nvme.ko.xz`.
fn is_module(file: &[u8], name: &[u8]) -> bool {
    let end = file.strip_prefix(name);
    end.is_some_and(|end| matches!(end, b".ko" | b".ko.xz" | b".ko.zst" | b".ko.gz"))
}

/// Returns `None` if there is no regular file at the path. Symlinks are followed inside the image.
pub fn file_stamp(inside: &ImageTree, path: &str) -> Result<Option<Stamp>> {
    let doing = || format!("reading the metadata of {} in the image", escape_name(path));
    inside.count_object().with_context(doing)?;
    let found = match inside.open(path, OFlags::PATH) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        found => rustix::fs::fstat(found.with_context(doing)?).with_context(doing)?,
    };
    let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
    #[allow(clippy::unnecessary_cast, reason = "their types depend on the machine")]
    Ok(is_file.then_some(Stamp {
        inode: found.st_ino as u64,
        size: found.st_size as i64,
        modified: (found.st_mtime as i64, found.st_mtime_nsec as i64),
    }))
}

/// Returns all kernels by version. If a kernel has several paths, the one in /boot is used.
pub fn find_kernels(inside: &ImageTree) -> Result<BTreeMap<String, Kernel>> {
    let mut kernels = BTreeMap::new();
    let entries = entry_directories(inside)?;
    for pattern in IMAGES {
        let (before, after) = pattern.split_once('*').unwrap_or_default();
        for (path, _) in inside.expand(pattern)? {
            let version = path.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
            let Some(version) = version.filter(|version| is_version(version)) else { continue };
            if kernels.contains_key(version) {
                continue;
            }
            let Some(image) = file_stamp(inside, &path)? else { continue };
            let initramfs = find_initramfs(inside, version, &entries)?;
            kernels.insert(version.to_owned(), Kernel { image: (path.clone(), image), initramfs });
            if kernels.len() > KERNELS_MAX {
                return Err(inside
                    .meter()
                    .exceeded(format!("the image has more than {KERNELS_MAX} kernels")));
            }
        }
    }
    Ok(kernels)
}

/// Returns whether the text is a version. Returns false for the names of package managers' backups.
fn is_version(text: &str) -> bool {
    let backups = [".old", ".bak", ".dpkg-bak", ".dpkg-new", ".dpkg-tmp", ".rpmsave", ".rpmnew", ".hmac"];
    !text.is_empty() && !backups.iter().any(|end| text.ends_with(end))
}

/// Returns the directories in which kernel-install stores kernels.
fn entry_directories(inside: &ImageTree) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for top in ENTRIES {
        let all = inside.expand(&format!("{top}/*"))?;
        found.extend(all.into_iter().filter(|(_, kind)| *kind == FileType::Directory).map(|(dir, _)| dir));
    }
    if found.len() > DIRECTORIES_MAX {
        let what = format!("/boot and /efi in the image have more than {DIRECTORIES_MAX} directories");
        return Err(inside.meter().exceeded(what));
    }
    Ok(found)
}

fn find_initramfs(inside: &ImageTree, version: &str, entries: &[String]) -> Result<Option<(String, Stamp)>> {
    let usual = INITRAMFS.iter().map(|pattern| pattern.replace('*', version));
    let names = ["initrd", "initramfs.img"];
    let installed = entries.iter().flat_map(|dir| names.map(|name| format!("{dir}/{version}/{name}")));
    for path in usual.chain(installed) {
        if let Some(stamp) = file_stamp(inside, &path)? {
            return Ok(Some((path, stamp)));
        }
    }
    Ok(None)
}

/// Returns the drivers that are built into a kernel, according to its list of built-in modules or its configuration.
pub fn built_in_drivers(inside: &ImageTree, version: &str) -> Result<DriverSet> {
    let mut drivers = DriverSet::default();
    let built_in = inside.read_text(&format!("/lib/modules/{version}/modules.builtin"))?;
    for file in built_in.lines() {
        _ = drivers.see(file.trim().as_bytes());
    }
    for path in [format!("/boot/config-{version}"), format!("/lib/modules/{version}/config")] {
        for line in inside.read_text(&path)?.lines().map(str::trim) {
            drivers.nvme |= line == "CONFIG_BLK_DEV_NVME=y";
            drivers.ena |= line == "CONFIG_ENA_ETHERNET=y";
        }
    }
    Ok(drivers)
}

/// Returns whether the root file system's `modules.dep` lists a module. modprobe can load only the modules in this
/// list.
pub fn has_module(inside: &ImageTree, version: &str, name: &str) -> Result<bool> {
    let is_entry = |line: &str| {
        let path = line.split(':').next().unwrap_or_default();
        is_module(path.rsplit('/').next().unwrap_or_default().as_bytes(), name.as_bytes())
    };
    let modules = inside.read_text(&format!("/lib/modules/{version}/modules.dep"))?;
    Ok(modules.lines().map(str::trim).any(is_entry))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;

    #[test]
    fn kernels_of_each_kind_have_their_initramfs() {
        let tree = Tree::new();
        for path in [
            "boot/vmlinuz-6.1.0-28-cloud-amd64",
            "boot/initrd.img-6.1.0-28-cloud-amd64",
            "boot/vmlinuz-5.14.0-503.el9.x86_64",
            "boot/initramfs-5.14.0-503.el9.x86_64.img",
            "boot/.vmlinuz-5.14.0-503.el9.x86_64.hmac",
            "boot/vmlinuz-6.4.0-150600-default",
            "boot/initrd-6.4.0-150600-default",
            "boot/vmlinuz-9.9.old",
            "usr/lib/modules/6.12-fedora/vmlinuz",
            "boot/0123abcd/6.12-fedora/initrd",
            "boot/vmlinuz-4.19-none",
            "boot/grub/grub.cfg",
        ] {
            tree.file(path, path);
        }
        tree.link("vmlinuz-4.19-none", "boot/vmlinuz-4.19-link");
        tree.link("gone", "boot/vmlinuz-dangling");
        let kernels = find_kernels(&tree.tree()).unwrap();
        let found: Vec<_> = kernels
            .iter()
            .map(|(version, kernel)| {
                (version.as_str(), kernel.initramfs.as_ref().map(|(path, _)| path.as_str()))
            })
            .collect();
        assert_eq!(
            found,
            [
                ("4.19-link", None),
                ("4.19-none", None),
                ("5.14.0-503.el9.x86_64", Some("/boot/initramfs-5.14.0-503.el9.x86_64.img")),
                ("6.1.0-28-cloud-amd64", Some("/boot/initrd.img-6.1.0-28-cloud-amd64")),
                ("6.12-fedora", Some("/boot/0123abcd/6.12-fedora/initrd")),
                ("6.4.0-150600-default", Some("/boot/initrd-6.4.0-150600-default")),
            ]
        );
    }

    #[test]
    fn drivers() {
        let tree = Tree::new();
        tree.file(
            "usr/lib/modules/1/modules.builtin",
            "kernel/fs/ext4/ext4.ko\nkernel/drivers/nvme/host/nvme.ko\n",
        );
        tree.file(
            "usr/lib/modules/1/modules.dep",
            "updates/dkms/ena.ko.zst: kernel/x.ko\nkernel/y.ko: kernel/z/gve.ko\n",
        );
        tree.file("boot/config-2", "# CONFIG_X is not set\nCONFIG_BLK_DEV_NVME=m\nCONFIG_ENA_ETHERNET=y\n");
        tree.link("usr/lib", "lib");
        let inside = tree.tree();
        assert_eq!(built_in_drivers(&inside, "1").unwrap(), DriverSet { nvme: true, ena: false });
        assert_eq!(built_in_drivers(&inside, "2").unwrap(), DriverSet { nvme: false, ena: true });
        assert_eq!(built_in_drivers(&inside, "3").unwrap(), DriverSet::default());
        assert!(has_module(&inside, "1", "ena").unwrap());
        assert!(!has_module(&inside, "1", "gve").unwrap() && !has_module(&inside, "2", "ena").unwrap());
        let mut drivers = DriverSet::default();
        for name in ["lib/nvme-core.ko", "lib/arena.ko", "etc/nvme", "nvme.ko.d", "lib/nvme-fabrics.ko.xz"] {
            assert!(drivers.see(name.as_bytes()).is_continue());
        }
        assert_eq!(drivers, DriverSet::default());
        assert!(drivers.see(b"usr/lib/modules/6/kernel/nvme.ko.zst").is_continue());
        assert!(drivers.see(b"ena.ko").is_break());
    }
}
