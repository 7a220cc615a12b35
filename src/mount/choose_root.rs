//! Chooses the partition with the root file system. Only the content of the disk decides. If several partitions are
//! possible, oven fails instead of guessing.

use super::partitions::DiskPart;
use crate::error::Kind;
use crate::formats::fstab;
use crate::formats::fstab::FstabEntry;
use crate::formats::partition;
use crate::formats::superblock::FileSystemType;
use crate::ids::Architecture;
use crate::image::tree::ImageTree;
use anyhow::{Context, Result};

/// The facts about a file system that decide whether it is the root.
#[derive(Debug, Clone, Default)]
pub struct CandidateContent {
    /// Whether the file system has an fstab or an os-release.
    pub system: bool,
    pub fstab: Vec<FstabEntry>,
}

/// The result of [`choose_by_table`], which mounts nothing.
#[derive(Debug, PartialEq, Eq)]
pub enum RootChoice {
    Chosen(usize),
    /// The choice needs the content of these partitions, so they have to be mounted and examined.
    Candidates(Vec<usize>),
}

/// Returns the GPT type of a root partition for an architecture (UAPI.2, discoverable partitions).
fn root_type(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::X86_64 => "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
        Architecture::Arm64 => "b921b045-1df0-41c3-af44-4c6f280d3fae",
    }
}

pub fn file_system_type(part: &DiskPart) -> Option<FileSystemType> {
    part.fs.as_ref().map(|fs| fs.kind)
}

fn is_mountable(part: &DiskPart) -> bool {
    matches!(file_system_type(part), Some(FileSystemType::Ext4 | FileSystemType::Xfs))
}

/// Returns whether a partition may hold a root that oven cannot mount.
fn may_hold_unsupported_root(part: &DiskPart) -> bool {
    matches!(
        file_system_type(part),
        Some(
            FileSystemType::Btrfs
                | FileSystemType::Lvm
                | FileSystemType::Luks
                | FileSystemType::Raid
                | FileSystemType::Ext2
                | FileSystemType::Ext3
                | FileSystemType::Other(_)
        )
    )
}

/// Chooses by the partition table and the superblocks. If these do not suffice, returns the candidates.
///
/// Fails if no partition can be the root, or if oven cannot mount the root.
pub fn choose_by_table(parts: &[DiskPart]) -> Result<RootChoice> {
    let root_type = root_type(Architecture::HOST);
    let has_root_type = |part: &DiskPart| {
        let kind = part.partition.as_ref().map(|p| &p.kind);
        matches!(kind, Some(partition::PartitionType::Gpt(guid)) if guid == root_type)
    };
    let mut discoverable = (0..parts.len()).filter(|&index| has_root_type(&parts[index]));
    if let (Some(one), None) = (discoverable.next(), discoverable.next()) {
        return if is_mountable(&parts[one]) {
            Ok(RootChoice::Chosen(one))
        } else {
            Err(unsupported_root(parts, &[one]))
        };
    }
    let candidates: Vec<_> = (0..parts.len()).filter(|&index| is_mountable(&parts[index])).collect();
    let unsupported: Vec<_> =
        (0..parts.len()).filter(|&index| may_hold_unsupported_root(&parts[index])).collect();
    match (&candidates[..], &unsupported[..]) {
        ([], []) => Err(no_single_root("the disk has no ext4 or xfs file system", parts)),
        ([], _) => Err(unsupported_root(parts, &unsupported)),
        ([one], []) => Ok(RootChoice::Chosen(*one)),
        _ => Ok(RootChoice::Candidates(candidates)),
    }
}

/// Chooses by the content of the candidates. Fails if none of the candidates can be the root, or if several can.
pub fn choose_by_content(parts: &[DiskPart], contents: &[(usize, CandidateContent)]) -> Result<usize> {
    let root_of = |content: &CandidateContent| -> Option<usize> {
        let mut named = (0..parts.len())
            .filter(|&index| fstab::is_root_by_fstab(&content.fstab, &parts[index].ids()) == Some(true));
        let one = named.next();
        one.filter(|_| named.next().is_none())
    };
    // If the fstab of a system names another partition as the root, the system's own partition is not the root.
    let systems: Vec<_> = contents
        .iter()
        .filter(|(_, content)| content.system)
        .map(|(index, content)| (*index, root_of(content)))
        .collect();
    let eligible: Vec<_> =
        systems.iter().filter(|(index, root)| root.is_none_or(|root| root == *index)).collect();
    if let [(one, _)] = eligible[..] {
        return Ok(*one);
    }
    let confirmed: Vec<_> = eligible.iter().filter(|(_, root)| root.is_some()).collect();
    if let [(one, _)] = confirmed[..] {
        return Ok(*one);
    }
    if eligible.is_empty() {
        let unsupported: Vec<_> =
            (0..parts.len()).filter(|&index| may_hold_unsupported_root(&parts[index])).collect();
        if !unsupported.is_empty() {
            return Err(unsupported_root(parts, &unsupported));
        }
        return Err(no_single_root(
            "no file system of the disk can be its root: each of them has neither an fstab nor an os-release, or has an fstab that names another root",
            parts,
        ));
    }
    Err(no_single_root("several partitions of the disk may be its root", parts))
}

/// Reads the facts for [`choose_by_content`] from a file system that is mounted read-only.
pub fn examine(inside: &ImageTree) -> Result<CandidateContent> {
    let fstab = inside
        .read_at_most("/etc/fstab", fstab::TEXT_MAX)
        .context("reading /etc/fstab of a possible root")?;
    let released = inside.exists("/etc/os-release")? || inside.exists("/usr/lib/os-release")?;
    let entries =
        fstab.as_deref().map(|text| fstab::parse(&String::from_utf8_lossy(text))).unwrap_or_default();
    Ok(CandidateContent { system: released || fstab.is_some(), fstab: entries })
}

fn describe_all(parts: &[DiskPart]) -> String {
    parts.iter().map(DiskPart::describe).collect::<Vec<_>>().join(", ")
}

fn no_single_root(why: &str, parts: &[DiskPart]) -> anyhow::Error {
    let failure = Kind::Definition.failure(format!("{why}. The disk has: {}", describe_all(parts)));
    let hint =
        "Bake on an image with one root partition, or give the root partition the GPT type `Linux root`.";
    failure.hint(hint).into()
}

fn unsupported_root(parts: &[DiskPart], which: &[usize]) -> anyhow::Error {
    let found: Vec<_> = which.iter().map(|&index| parts[index].describe()).collect();
    let name = which
        .iter()
        .find_map(|&index| file_system_type(&parts[index]))
        .map_or("an unknown file system", FileSystemType::name);
    let what = format!("the disk's root is on {name}, which oven cannot mount: {}", found.join(", "));
    Kind::Definition
        .failure(what)
        .hint("Bake on an image whose root is ext4 or xfs on a plain partition.")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::partition::Partition;
    use crate::formats::superblock;

    fn part(number: u32, magic: &[(usize, &[u8])], guid: &str) -> DiskPart {
        let mut disk = vec![0; 1 << 17];
        for (at, bytes) in magic {
            disk[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        disk[1024 + 104] = number as u8; // this byte is a part of the UUID of an ext file system
        let partition = Partition {
            number,
            start: 1 << 20,
            size: 1 << 30,
            kind: partition::PartitionType::Gpt(guid.into()),
            partuuid: format!("part-{number}"),
            name: String::new(),
        };
        let node = std::fs::File::open("/dev/null").unwrap().into();
        let fs = superblock::probe(&disk[..], 0, disk.len() as u64);
        DiskPart { partition: Some(partition), fs, name: format!("x{number}"), rdev: 0, size: 1 << 30, node }
    }
    fn ext4(number: u32, guid: &str) -> DiskPart {
        part(number, &[(1080, &[0x53, 0xef]), (1024 + 96, &[0x40])], guid)
    }
    fn btrfs(number: u32, guid: &str) -> DiskPart {
        part(number, &[(0x10040, b"_BHRfS_M")], guid)
    }
    fn system(fstab: &str) -> CandidateContent {
        CandidateContent { system: true, fstab: fstab::parse(fstab) }
    }

    #[test]
    fn the_types_of_a_table_decide_if_one_is_a_root() {
        let root = root_type(Architecture::HOST);
        assert_eq!(choose_by_table(&[ext4(1, ""), ext4(2, root)]).unwrap(), RootChoice::Chosen(1));
        assert_eq!(
            choose_by_table(&[ext4(1, root), ext4(2, root)]).unwrap(),
            RootChoice::Candidates(vec![0, 1])
        );
        assert_eq!(choose_by_table(&[ext4(1, ""), part(2, &[], "")]).unwrap(), RootChoice::Chosen(0));
        let error = choose_by_table(&[ext4(1, ""), btrfs(2, root)]).unwrap_err().to_string();
        assert!(error.contains("on btrfs, which oven cannot mount: partition 2 (btrfs, 1.0 GiB)"), "{error}");
    }

    #[test]
    fn what_cannot_be_mounted_is_named() {
        let lvm = || part(2, &[(512, b"LABELONE"), (536, b"LVM2 001")], "");
        assert!(choose_by_table(&[lvm()]).unwrap_err().to_string().contains("on LVM"));
        // The ext4 partition is a /boot, which cannot be the root.
        let parts = [ext4(1, ""), lvm()];
        assert_eq!(choose_by_table(&parts).unwrap(), RootChoice::Candidates(vec![0]));
        assert!(
            choose_by_content(&parts, &[(0, CandidateContent::default())])
                .unwrap_err()
                .to_string()
                .contains("on LVM")
        );
        assert!(choose_by_table(&[part(1, &[], "")]).unwrap_err().to_string().contains("no ext4 or xfs"));
    }

    #[test]
    fn fstab_says_which_of_two_systems_is_the_root() {
        let parts = [ext4(1, ""), ext4(2, "")];
        let own = |n: u32| system(&format!("PARTUUID=part-{n} / ext4"));
        assert_eq!(choose_by_content(&parts, &[(0, own(1)), (1, CandidateContent::default())]).unwrap(), 0);
        assert_eq!(choose_by_content(&parts, &[(0, own(2)), (1, own(2))]).unwrap(), 1);
        assert_eq!(choose_by_content(&parts, &[(0, system("")), (1, own(2))]).unwrap(), 1);
        assert_eq!(
            choose_by_content(
                &parts,
                &[(0, system("UUID=elsewhere / xfs")), (1, CandidateContent::default())]
            )
            .unwrap(),
            0
        );
        let error = choose_by_content(&parts, &[(0, own(1)), (1, own(2))]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("several partitions") && text.contains("partition 1 (ext4, 1.0 GiB, UUID 01"),
            "{text}"
        );
        assert!(text.contains("partition 2"), "{text}");
        assert_eq!(Kind::of(&error), Kind::Definition);
        assert!(choose_by_content(&parts, &[(0, own(2)), (1, own(1))]).is_err());
        assert!(choose_by_content(&parts, &[(0, system("")), (1, system(""))]).is_err());
    }
}
