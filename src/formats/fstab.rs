//! Parses an image's fstab, and selects the partitions of the image's disk to mount below the root. Mounts nothing.

use crate::error::Kind;
use crate::text::escape_name;
use anyhow::Result;

/// The maximum size of an fstab in bytes. Usually, it has some KiB. The parsed lines need much more memory.
pub const TEXT_MAX: u64 = 1 << 20;
/// The maximum number of mounts. No image has this many file systems on its disk, and a malicious image must not fill
/// the mount table.
const PLANNED_MAX: usize = 64;

/// A line of fstab(5), unescaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FstabEntry {
    /// The number of the line, counted from 1.
    pub line: usize,
    pub spec: FstabSource,
    /// The mount point: an absolute path without `.` and empty components, or `/` for the root.
    pub target: String,
    pub kind: String,
    pub options: Vec<String>,
}

/// The source of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FstabSource {
    Uuid(String),
    Label(String),
    PartUuid(String),
    PartLabel(String),
    /// The name of a device, which depends on the machine: `/dev/sda2`, `/dev/mapper/…`.
    Device(String),
    /// Not a block device, but a network share, `tmpfs` or a directory.
    Other(String),
}

impl FstabSource {
    pub(crate) fn parse(text: &str) -> Self {
        let by_link = |name: &str| {
            text.strip_prefix("/dev/disk/by-").and_then(|t| t.strip_prefix(name)?.strip_prefix('/'))
        };
        let tag = |name: &str| Some(text.strip_prefix(name)?.strip_prefix('=')?.trim_matches('"').to_owned());
        let either = |upper: &str, lower: &str| tag(upper).or_else(|| by_link(lower).map(unhex));
        if let Some(id) = either("UUID", "uuid") {
            Self::Uuid(id)
        } else if let Some(id) = either("PARTUUID", "partuuid") {
            Self::PartUuid(id)
        } else if let Some(name) = either("LABEL", "label") {
            Self::Label(name)
        } else if let Some(name) = either("PARTLABEL", "partlabel") {
            Self::PartLabel(name)
        } else if text.starts_with("/dev/") || text.starts_with("ID=") {
            Self::Device(text.to_owned())
        } else {
            Self::Other(text.to_owned())
        }
    }

    /// Returns whether this source names the partition. The name of a device never matches, because it depends on the
    /// machine.
    pub fn names(&self, ids: &PartitionIds<'_>) -> bool {
        match self {
            Self::Uuid(id) => !id.is_empty() && id.eq_ignore_ascii_case(ids.uuid),
            Self::PartUuid(id) => !id.is_empty() && id.eq_ignore_ascii_case(ids.partuuid),
            Self::Label(name) => !name.is_empty() && name == ids.label,
            Self::PartLabel(name) => !name.is_empty() && name == ids.partlabel,
            Self::Device(_) | Self::Other(_) => false,
        }
    }
}
impl std::fmt::Display for FstabSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uuid(id) => write!(f, "UUID={id}"),
            Self::Label(name) => write!(f, "LABEL={name}"),
            Self::PartUuid(id) => write!(f, "PARTUUID={id}"),
            Self::PartLabel(name) => write!(f, "PARTLABEL={name}"),
            Self::Device(path) | Self::Other(path) => f.write_str(path),
        }
    }
}

/// The identifiers of a partition.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PartitionIds<'a> {
    pub uuid: &'a str,
    pub label: &'a str,
    pub partuuid: &'a str,
    pub partlabel: &'a str,
}

/// A mount below the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedMount {
    pub target: String,
    pub what: MountSource,
}

/// The source of a planned mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountSource {
    /// The partition with this index.
    Partition(usize),
    /// A directory of the image, as an absolute path. The flag is true if the mounts below the directory are included.
    Bind(String, bool),
}

/// Returns all entries. Fields after the sixth are ignored. A line with fewer than three fields is not an entry.
pub fn parse(text: &str) -> Vec<FstabEntry> {
    let entry = |(index, line): (usize, &str)| {
        let mut fields = line.split_ascii_whitespace();
        let (spec, target, kind) = (fields.next()?, fields.next()?, fields.next()?);
        if spec.starts_with('#') {
            return None;
        }
        let options = fields.next().unwrap_or("defaults").split(',').map(str::to_owned).collect();
        let target = target_of(&unescape(target))?;
        Some(FstabEntry {
            line: index + 1,
            spec: FstabSource::parse(&unescape(spec)),
            target,
            kind: kind.to_owned(),
            options,
        })
    };
    text.lines().enumerate().filter_map(entry).collect()
}

/// Returns the mounts below the root, parents first. Network shares, file systems in memory and `noauto` entries are
/// skipped. A line that names another disk is an error unless it has `nofail`.
pub fn plan(
    entries: &[FstabEntry],
    root: usize,
    partitions: &[PartitionIds<'_>],
) -> Result<Vec<PlannedMount>> {
    let mut planned = Vec::new();
    for entry in entries.iter().filter(|entry| entry.target != "/") {
        let has = |option: &str| entry.options.iter().any(|o| o == option);
        // An automount is mounted by the first access, so it is not skipped even if it has `noauto`.
        if entry.kind == "swap" || (has("noauto") && !has("x-systemd.automount")) {
            continue;
        }
        let invalid = |why: &str| {
            let what = format!("line {} of the image's /etc/fstab", entry.line);
            let failure = Kind::Definition
                .failure(escape_name(&format!("{what} mounts {} on {}: {why}", entry.spec, entry.target)));
            let hint = "Bake on an image whose file systems are all on its root disk, or add the option `nofail` to the \
                        line.";
            failure.hint(hint)
        };
        let what = match &entry.spec {
            FstabSource::Other(from) if has("bind") || has("rbind") => {
                let from = target_of(from)
                    .ok_or_else(|| invalid("the source of a bind mount has to be an absolute path"))?;
                MountSource::Bind(from, has("rbind"))
            }
            FstabSource::Other(_) => continue,
            // An optical disc belongs to a machine and not to an image, so its line is skipped.
            FstabSource::Device(_) if matches!(entry.kind.as_str(), "iso9660" | "udf" | "udf,iso9660") => {
                continue;
            }
            FstabSource::Device(_) if has("nofail") => continue,
            FstabSource::Device(_) => {
                return Err(invalid(
                    "this device name depends on the machine; use UUID=, LABEL=, PARTUUID= or PARTLABEL= instead",
                )
                .into());
            }
            spec => {
                let mut found = (0..partitions.len()).filter(|&index| spec.names(&partitions[index]));
                match (found.next(), found.next()) {
                    (Some(one), None) if one == root => {
                        return Err(invalid("this is the root partition itself").into());
                    }
                    (Some(one), None) => MountSource::Partition(one),
                    (Some(_), Some(_)) => {
                        return Err(invalid("several partitions of the disk match").into());
                    }
                    (None, _) if has("nofail") => continue,
                    (None, _) => return Err(invalid("no partition of the disk matches").into()),
                }
            }
        };
        if entry.target.split('/').any(|part| part == "..") {
            return Err(invalid("the mount point contains `..`").into());
        }
        if planned.len() == PLANNED_MAX {
            return Err(invalid(&format!("the fstab has more than {PLANNED_MAX} such mounts")).into());
        }
        planned.push(PlannedMount { target: entry.target.clone(), what });
    }
    // Bind mounts come last, because their sources may be inside other mounts. Otherwise parents come first. Lines with
    // the same target keep their order, so that the last one is mounted on top, as at boot.
    planned.sort_by_key(|p| (matches!(p.what, MountSource::Bind(..)), depth(&p.target)));
    Ok(planned)
}

/// Returns whether the line for `/` in the fstab names this partition. Returns `None` if there is no such line, or if
/// its source is the name of a device.
pub fn is_root_by_fstab(entries: &[FstabEntry], ids: &PartitionIds<'_>) -> Option<bool> {
    let root = entries.iter().find(|entry| entry.target == "/")?;
    match root.spec {
        FstabSource::Device(_) | FstabSource::Other(_) => None,
        _ => Some(root.spec.names(ids)),
    }
}

fn depth(target: &str) -> usize {
    target.matches('/').count()
}

/// Returns a normalized mount point, or `None` if the text is not an absolute path (for example, `none`).
fn target_of(text: &str) -> Option<String> {
    let parts: Vec<_> =
        text.strip_prefix('/')?.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    Some(format!("/{}", parts.join("/")))
}

/// Decodes `\040` and similar escapes, as getmntent(3) does.
pub(crate) fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|digits| bytes[at] == b'\\' && digits.iter().all(|d| (b'0'..b'8').contains(d)));
        match octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Decodes `\x20` and similar escapes, which udev writes in the names of links.
pub(crate) fn unhex(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.strip_prefix(b"x").and_then(|t| t.get(..2)).filter(|_| first == b'\\');
        match digits.and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: [PartitionIds<'static>; 4] = [
        PartitionIds { uuid: "root-id", label: "cloudimg-rootfs", partuuid: "p-1", partlabel: "" },
        PartitionIds { uuid: "ABCD-0123", label: "UEFI", partuuid: "p-15", partlabel: "EFI System" },
        PartitionIds { uuid: "boot-id", label: "BOOT", partuuid: "p-16", partlabel: "" },
        PartitionIds { uuid: "var-id", label: "same", partuuid: "p-2", partlabel: "" },
    ];

    fn planned(text: &str) -> Vec<(String, MountSource)> {
        plan(&parse(text), 0, &DISK).unwrap().into_iter().map(|p| (p.target, p.what)).collect()
    }
    fn refused(text: &str) -> String {
        plan(&parse(text), 0, &DISK).unwrap_err().to_string()
    }

    #[test]
    fn a_cloud_image() {
        let found = planned(
            "LABEL=UEFI\t/boot/efi\tvfat\tumask=0077\t0 1\n# comment\n\nLABEL=BOOT /boot ext4 defaults 0 2\n\
             LABEL=cloudimg-rootfs / ext4 discard 0 1\nUUID=none none swap sw 0 0\ntmpfs /tmp tmpfs\n\
             proc /proc proc defaults\nhost:/x /mnt/nfs nfs _netdev\n//host/y /mnt/y cifs\nshort /line\n",
        );
        assert_eq!(
            found,
            [("/boot".into(), MountSource::Partition(2)), ("/boot/efi".into(), MountSource::Partition(1))]
        );
    }

    #[test]
    fn every_way_to_name_a_partition() {
        for spec in [
            "UUID=abcd-0123",
            "UUID=\"ABCD-0123\"",
            "LABEL=UEFI",
            "PARTUUID=P-15",
            "PARTLABEL=EFI\\040System",
            "/dev/disk/by-uuid/ABCD-0123",
            "/dev/disk/by-label/UEFI",
            "/dev/disk/by-partuuid/p-15",
            "/dev/disk/by-partlabel/EFI\\x20System",
        ] {
            assert_eq!(
                planned(&format!("{spec} /boot//./efi/ vfat x")),
                [("/boot/efi".into(), MountSource::Partition(1))],
                "{spec}"
            );
        }
    }

    #[test]
    fn skipped_lines() {
        for line in [
            "UUID=boot-id /boot ext4 noauto",
            "/dev/cdrom /media/c udf,iso9660 user,noauto",
            "/dev/sr0 /c iso9660 ro",
            "/dev/xvdb /mnt auto defaults,nofail,comment=cloudconfig",
            "UUID=elsewhere /data ext4 nofail",
            "LABEL=UEFI none swap sw",
            "/swapfile none swap sw",
            "UUID=var-id relative ext4",
        ] {
            assert_eq!(planned(line), [], "{line}");
        }
        assert_eq!(planned("UUID=var-id /var ext4 noauto,x-systemd.automount").len(), 1);
    }

    #[test]
    fn errors_name_the_line() {
        assert!(
            refused("#\nUUID=elsewhere /data ext4")
                .contains("line 2 of the image's /etc/fstab mounts UUID=elsewhere on /data")
        );
        assert!(refused("/dev/mapper/vg-var /var ext4").contains("/dev/mapper/vg-var on /var"));
        assert!(refused("/dev/xvda15 /boot/efi vfat").contains("depends on the machine"));
        assert!(refused("UUID=root-id /again ext4").contains("the root partition itself"));
        assert!(refused("UUID=var-id /a/../../b ext4").contains(".."));
        assert!(refused(&"UUID=var-id /v ext4\n".repeat(65)).contains("more than 64 such mounts"));
        let twice = [DISK[0], DISK[3], DISK[3]];
        assert!(
            plan(&parse("LABEL=same /s ext4"), 0, &twice)
                .unwrap_err()
                .to_string()
                .contains("several partitions")
        );
    }

    #[test]
    fn binds_come_last_and_parents_first() {
        let found = planned("/var/srv /srv none bind\nUUID=boot-id /var/log ext4\nUUID=var-id /var ext4");
        let targets: Vec<_> = found.iter().map(|(target, _)| target.as_str()).collect();
        assert_eq!(targets, ["/var", "/var/log", "/srv"]);
        assert_eq!(found[2].1, MountSource::Bind("/var/srv".into(), false));
    }

    #[test]
    fn the_roots_own_line() {
        assert_eq!(is_root_by_fstab(&parse("UUID=ROOT-ID / ext4"), &DISK[0]), Some(true));
        assert_eq!(is_root_by_fstab(&parse("UUID=other / ext4"), &DISK[0]), Some(false));
        assert_eq!(is_root_by_fstab(&parse("/dev/sda1 / ext4"), &DISK[0]), None);
        assert_eq!(is_root_by_fstab(&parse("UUID= / ext4"), &PartitionIds::default()), Some(false));
    }
}
