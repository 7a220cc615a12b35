//! Checks the names of disks in the texts that a machine reads at boot. This module reads no files.
//!
//! A UUID or a label must belong to the image's own disk. A device name of the kernel is an error. For example,
//! `/dev/loop0p1` is a name on the builder, and `/dev/sda1` may be another disk on each instance.

use crate::device::DeviceNode;
use crate::device::link_name;
use crate::formats::fstab;
use crate::formats::fstab::FstabSource;
use std::collections::BTreeSet;

/// The prefixes of the names that the kernel gives to disks. The rest of a name, such as a number, depends on the
/// machine.
const KERNEL_NAMES: [&str; 9] = ["dm-", "hd", "loop", "md", "mmcblk", "nbd", "nvme", "sd", "vd"];
/// Links of udev that identify a piece of hardware.
const HARDWARE: [&str; 4] = ["disk/by-diskseq/", "disk/by-id/", "disk/by-path/", "disk/by-loop-"];

/// The format of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootTextKind {
    /// Commands of GRUB, variables of a shell, a kernel's command line, or keys and values. `root=` has the same
    /// meaning in all of them.
    Words,
    Fstab,
}

/// The names of the image's own disk.
#[derive(Debug, Clone, Default)]
pub struct DiskNames {
    /// Links such as `disk/by-uuid/…`, which are the same on each machine. UUIDs are in lower case.
    links: BTreeSet<String>,
    /// The disk's device names on the builder, such as `loop0` and `loop0p1`.
    devices: BTreeSet<String>,
}

impl DiskNames {
    pub fn of(nodes: &[DeviceNode]) -> Self {
        Self {
            links: nodes.iter().flat_map(|node| &node.links).map(|link| fold_case(link)).collect(),
            devices: nodes.iter().map(|node| node.name.clone()).collect(),
        }
    }

    fn has(&self, by: &str, id: &str) -> bool {
        // In a kernel's command line, blanks are encoded in the same way as in udev's links.
        self.links.contains(&fold_case(&format!("disk/by-{by}/{}", link_name(&fstab::unhex(id)))))
    }

    /// Returns the disk's UUIDs and labels, such as `UUID=1f…`, for a hint.
    pub fn names(&self) -> Vec<String> {
        let name = |by: &str, tag: &str| {
            let prefix = format!("disk/by-{by}/");
            let of = self.links.iter().filter_map(move |link| Some(link.strip_prefix(&prefix)?.to_owned()));
            of.map(|id| format!("{tag}={}", fstab::unhex(&id))).collect::<Vec<_>>()
        };
        [name("uuid", "UUID"), name("label", "LABEL")].concat()
    }
}

/// Converts UUIDs to lower case, because their case does not matter. Labels are not changed.
fn fold_case(link: &str) -> String {
    let folds = ["disk/by-uuid/", "disk/by-partuuid/"].iter().any(|by| link.starts_with(by));
    if folds { link.to_ascii_lowercase() } else { link.to_owned() }
}

/// A name that does not identify the disk on every instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFinding {
    /// The line number, counted from 1.
    pub line: usize,
    pub what: String,
}

/// The maximum number of findings in a text.
const FINDINGS_MAX: usize = 100;
/// Only this number of bytes of a word is checked. A kernel's command line has at most 4096 bytes.
const WORD_MAX: usize = 4096;

/// Returns the names in a text that do not identify the disk on every instance, but at most `FINDINGS_MAX`.
pub fn lint(kind: BootTextKind, text: &str, own: &DiskNames) -> Vec<BootFinding> {
    let mut found: Vec<BootFinding> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line_number = index + 1;
        let problems = match kind {
            _ if line.trim_start().starts_with('#') => Vec::new(),
            BootTextKind::Fstab => check_fstab_line(line, own).into_iter().collect(),
            BootTextKind::Words => check_words(line, own),
        };
        for what in problems {
            let finding = BootFinding { line: line_number, what };
            if !found.contains(&finding) {
                found.push(finding);
            }
            if found.len() == FINDINGS_MAX {
                return found;
            }
        }
    }
    found
}

fn check_fstab_line(line: &str, own: &DiskNames) -> Option<String> {
    let mut fields = line.split_ascii_whitespace();
    let (spec, _, _) = (fields.next()?, fields.next()?, fields.next()?);
    let options: Vec<_> = fields.next().unwrap_or("").split(',').collect();
    // A file system with one of these options can be on another disk of the instance. So its UUID or label is not
    // checked.
    let may_be_absent = ["nofail", "noauto"].iter().any(|option| options.contains(option));
    match FstabSource::parse(&fstab::unescape(spec)) {
        FstabSource::Device(path) => check_device(&path, own, may_be_absent),
        spec if may_be_absent => check_builder_device(&spec.to_string(), own),
        spec => check_id(&spec, &spec.to_string(), own),
    }
}

fn check_words(line: &str, own: &DiskNames) -> Vec<String> {
    let words: Vec<_> = line
        .split(|c: char| c.is_whitespace() || "\"'`;".contains(c))
        .filter(|word| !word.is_empty())
        .map(|word| &word[..word.floor_char_boundary(WORD_MAX)])
        .collect();
    let mut found: Vec<String> = check_grub_search(&words, own).into_iter().collect();
    for word in &words {
        if found.len() >= FINDINGS_MAX {
            break;
        }
        for at in word.match_indices("/dev/").map(|(at, _)| at) {
            // `/dev/` is not the start of a path if it follows a letter or a digit, as in `/srv/dev/x`. It is the start
            // of a path at the start of the word, or after `=`, `:` or a bracket.
            let begins = at == 0 || !word.as_bytes()[at - 1].is_ascii_alphanumeric();
            let end = word[at..].find([',', ':', ')', '(', '|', '}']).map_or(word.len(), |end| at + end);
            if begins {
                found.extend(
                    check_device(&word[at..end], own, false).map(|what| in_word(word, &word[at..end], what)),
                );
            }
        }
        // Examples are `root=UUID=…`, `kernelopts=root=LABEL=…` and `resume=UUID=…`.
        for tag in ["UUID=", "LABEL=", "PARTUUID=", "PARTLABEL="] {
            if let Some((before, _)) = word.split_once(tag)
                && before.ends_with(['=', ':'])
            {
                let value = word[before.len()..].split(['/', ',']).next().unwrap_or_default();
                found.extend(check_id(&FstabSource::parse(value), word, own));
            }
        }
    }
    found
}

fn in_word(word: &str, path: &str, what: String) -> String {
    if word == path { what } else { what.replacen(path, word, 1) }
}

/// Checks the commands by which GRUB finds the file system that contains its files: `search --fs-uuid … ID` and
/// `search.fs_uuid ID VARIABLE`.
fn check_grub_search(words: &[&str], own: &DiskNames) -> Option<String> {
    let has = |long: &str, short: &str| words.iter().any(|word| *word == long || *word == short);
    let (tag, id) = match *words.first()? {
        "search.fs_uuid" => ("UUID", *words.get(1)?),
        "search.fs_label" => ("LABEL", *words.get(1)?),
        "search" if has("--fs-uuid", "-u") => ("UUID", *words.last()?),
        "search" if has("--label", "-l") => ("LABEL", *words.last()?),
        _ => return None,
    };
    check_id(&FstabSource::parse(&format!("{tag}={id}")), &format!("{} {id}", words[0]), own)
}

/// Checks a UUID or a label. `text` is the name as it is written in the file, for the message.
fn check_id(spec: &FstabSource, text: &str, own: &DiskNames) -> Option<String> {
    let (by, id) = match spec {
        FstabSource::Uuid(id) => ("uuid", id),
        FstabSource::PartUuid(id) => ("partuuid", id),
        FstabSource::Label(name) => ("label", name),
        FstabSource::PartLabel(name) => ("partlabel", name),
        FstabSource::Device(_) | FstabSource::Other(_) => return None,
    };
    // A variable is expanded at boot, so it cannot be checked.
    if id.is_empty() || id.contains('$') || own.has(by, id) {
        return None;
    }
    Some(format!("`{text}` does not name the image's own disk"))
}

fn check_builder_device(text: &str, own: &DiskNames) -> Option<String> {
    let name = text.strip_prefix("/dev/")?;
    let is_own = own.devices.contains(name);
    is_own.then(|| format!("`{text}` is the builder's name for the image's disk"))
}

/// `path` begins with `/dev/`.
fn check_device(path: &str, own: &DiskNames, may_be_absent: bool) -> Option<String> {
    let name = path.strip_prefix("/dev/")?;
    if let Some(what) = check_builder_device(path, own) {
        return Some(what);
    }
    // Loop devices are created by the program that uses them. No instance has one as its disk.
    if let Some(number) = name.strip_prefix("loop")
        && number.starts_with(|c: char| c.is_ascii_digit())
    {
        return Some(format!("`{path}` is a loop device of the builder, which no instance has"));
    }
    if may_be_absent {
        return None;
    }
    if HARDWARE.iter().any(|by| name.starts_with(by)) {
        return Some(format!("`{path}` names a piece of hardware, which differs from instance to instance"));
    }
    if name.starts_with("disk/by-") {
        return check_id(&FstabSource::parse(path), path, own);
    }
    let kernels = KERNEL_NAMES.iter().chain(&["xvd"]).any(|prefix| {
        let rest = name.strip_prefix(prefix);
        rest.is_some_and(|rest| match *prefix {
            "sd" | "hd" | "vd" | "xvd" => rest.starts_with(|c: char| c.is_ascii_lowercase()),
            _ => rest.starts_with(|c: char| c.is_ascii_digit()),
        })
    });
    // The names of software RAID and device-mapper devices also depend on the machine, because the kernel numbers these
    // devices in the order in which it finds them. The names in /dev/md/ and /dev/mapper/ are stable.
    kernels.then(|| {
        format!("`{path}` depends on the machine, because on an instance, another disk or no disk may have that name")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> DiskNames {
        let node = |name: &str, links: &[&str]| DeviceNode {
            name: name.into(),
            rdev: 0,
            links: links.iter().map(|link| format!("disk/by-{link}")).collect(),
        };
        DiskNames::of(&[
            node("nvme1n1", &[]),
            node("nvme1n1p1", &["uuid/6b1f-root", "partuuid/aa-01", "label/cloudimg-rootfs"]),
            node("nvme1n1p15", &["uuid/ABCD-0123", "label/UEFI", r"partlabel/EFI\x20System"]),
        ])
    }

    fn lines(kind: BootTextKind, text: &str) -> Vec<(usize, String)> {
        lint(kind, text, &own()).into_iter().map(|f| (f.line, f.what)).collect()
    }

    /// A file as update-grub writes it on Debian 12.
    const DEBIAN: &str = r#"#
# DO NOT EDIT THIS FILE: root=/dev/sda1
### BEGIN /etc/grub.d/00_header ###
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ x$feature_default_font_path = xy ] ; then
   font=unicode
else
insmod part_gpt
insmod ext2
set root='hd0,gpt1'
if [ x$feature_platform_search_hint = xy ]; then
  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1 --hint-efi=hd0,gpt1 --hint-baremetal=ahci0,gpt1  6b1f-root
else
  search --no-floppy --fs-uuid --set=root 6b1f-root
fi
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-6b1f-root' {
	linux	/boot/vmlinuz-6.1.0-28-cloud-amd64 root=UUID=6b1f-root ro  console=tty0 console=ttyS0,115200 earlyprintk=ttyS0,115200
	initrd	/boot/initrd.img-6.1.0-28-cloud-amd64
}
"#;

    #[test]
    fn a_grub_cfg_by_its_own_uuid_is_good() {
        assert_eq!(lines(BootTextKind::Words, DEBIAN), []);
    }

    #[test]
    fn a_builders_device_in_a_grub_cfg_is_found_with_its_line() {
        let planted = DEBIAN.replace("root=UUID=6b1f-root", "root=/dev/loop0p1");
        let found = lines(BootTextKind::Words, &planted);
        assert_eq!(found.len(), 1);
        assert!(found[0].0 == 20 && found[0].1.contains("`root=/dev/loop0p1` is a loop device"), "{found:?}");
        let found = lines(BootTextKind::Words, &DEBIAN.replace("root=UUID=6b1f-root", "root=/dev/nvme1n1p1"));
        assert!(found[0].1.contains("the builder's name for"), "{found:?}");
        let other = DEBIAN.replace("--set=root 6b1f-root", "--set=root 9999-other");
        let found = lines(BootTextKind::Words, &other);
        assert!(found[0].0 == 17 && found[0].1.contains("`search 9999-other`"), "{found:?}");
    }

    #[test]
    fn names_in_kernel_command_lines() {
        for good in [
            "options root=UUID=6B1F-ROOT ro console=ttyS0 nvme_core.io_timeout=4294967295",
            "options $kernelopts $tuned_params",
            "options root=$root rd.luks=0 crashkernel=auto root=UUID=${uuid}",
            "GRUB_CMDLINE_LINUX=\"root=LABEL=cloudimg-rootfs resume=UUID=6b1f-root\"",
            "GRUB_DEVICE=\"/dev/disk/by-partuuid/AA-01\"",
            "set default_kernelopts=\"root=PARTUUID=aa-01/PARTNROFF=1 ro\"",
            "kernelopts=root=PARTLABEL=EFI\\x20System",
            "root=/dev/mapper/vg-root rd.lvm.lv=vg/root root=/dev/vg/root root=/dev/md/root",
            "root=ZFS=rpool/ROOT root=nfs:host:/x root=live:CDLABEL=x console=/dev/null",
            "search --no-floppy --file /boot/vmlinuz",
            "search.fs_uuid 6b1f-root root",
            "APPEND root=LABEL=UEFI rw",
            "set root=(hd0,gpt1)",
            "root=/dev/ram0 blkdev=/srv/dev/sdax",
        ] {
            assert_eq!(lines(BootTextKind::Words, good), [], "{good}");
        }
        for (bad, word) in [
            ("options root=UUID=beef ro", "`root=UUID=beef`"),
            ("GRUB_CMDLINE_LINUX=\"root=/dev/sda1 ro\"", "`root=/dev/sda1`"),
            ("kernelopts=root=/dev/xvda1 ro", "/dev/xvda1`"),
            ("resume=/dev/vda2", "/dev/vda2"),
            ("root=/dev/disk/by-id/nvme-Amazon_vol0abc-part1", "hardware"),
            ("root=/dev/disk/by-path/pci-0000-part1", "hardware"),
            ("root=/dev/disk/by-uuid/beef", "`root=/dev/disk/by-uuid/beef` does not name"),
            ("root=PARTUUID=bb-01/PARTNROFF=1", "PARTUUID=bb-01"),
            ("append initrd=x root=LABEL=CLOUDIMG-ROOTFS", "LABEL=CLOUDIMG-ROOTFS"),
            ("search.fs_label other root", "search.fs_label other"),
            ("linux /vmlinuz boot=/dev/nvme0n1p2,x", "/dev/nvme0n1p2"),
            ("root=/dev/dm-0", "/dev/dm-0"),
        ] {
            let found = lines(BootTextKind::Words, bad);
            assert!(found.len() == 1 && found[0].1.contains(word), "{bad}: {found:?}");
        }
    }

    #[test]
    fn an_fstab() {
        let good = "# /dev/sda1 / ext4\nUUID=6b1f-root / ext4 discard 0 1\nLABEL=UEFI /boot/efi vfat umask=0077\n\
                    /dev/xvdb /mnt auto defaults,nofail,comment=cloudconfig 0 2\nUUID=beef /data xfs nofail\n\
                    PARTLABEL=EFI\\040System /x vfat\ntmpfs /tmp tmpfs\nhost:/x /nfs nfs _netdev\n\
                    /swapfile none swap sw\n/dev/mapper/vg-x /x ext4\n/dev/sr0 /media/c udf noauto\nshort\n";
        assert_eq!(lines(BootTextKind::Fstab, good), []);
        for (bad, word) in [
            ("UUID=beef / ext4 defaults", "`UUID=beef` does not name the image's own disk"),
            ("UUID=beef none swap sw", "UUID=beef"),
            ("/dev/sdf /data ext4 defaults", "depends on the machine"),
            ("/dev/loop7p1 / ext4 nofail", "loop device"),
            ("/dev/nvme1n1p1 / ext4 nofail", "the builder's name"),
            ("/dev/disk/by-label/other / ext4", "LABEL=other"),
        ] {
            let found = lines(BootTextKind::Fstab, &format!("#\n{bad}\n"));
            assert!(found.len() == 1 && found[0].0 == 2 && found[0].1.contains(word), "{bad}: {found:?}");
        }
    }

    #[test]
    fn names_for_a_hint() {
        assert_eq!(
            own().names(),
            ["UUID=6b1f-root", "UUID=abcd-0123", "LABEL=UEFI", "LABEL=cloudimg-rootfs"]
        );
    }
}
