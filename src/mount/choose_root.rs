//! Which partition is "/": told by the disk, never guessed.

use super::partitions::Part;
use crate::error::Kind;
use crate::formats::fstab;
use crate::formats::fstab::Entry;
use crate::formats::partition;
use crate::formats::superblock::Type;
use crate::ids::Architecture;
use crate::image::tree::Inside;
use anyhow::{Context, Result};

/// What is inside a file system that may be the root.
#[derive(Debug, Clone, Default)]
pub struct Look {
    /// It has an fstab or an os-release.
    pub system: bool,
    pub fstab: Vec<Entry>,
}

/// How the choice stands before anything is mounted.
#[derive(Debug, PartialEq, Eq)]
pub enum First {
    Chosen(usize),
    /// These have to be looked into.
    Candidates(Vec<usize>),
}

/// The type of a root partition for an architecture (UAPI.2, discoverable partitions).
fn root_type(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::X86_64 => "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
        Architecture::Arm64 => "b921b045-1df0-41c3-af44-4c6f280d3fae",
    }
}

pub fn kind(part: &Part) -> Option<Type> {
    part.fs.as_ref().map(|fs| fs.kind)
}

fn mountable(part: &Part) -> bool {
    matches!(kind(part), Some(Type::Ext4 | Type::Xfs))
}

/// What may hold a root that oven cannot mount.
fn foreign(part: &Part) -> bool {
    matches!(
        kind(part),
        Some(Type::Btrfs | Type::Lvm | Type::Luks | Type::Raid | Type::Ext2 | Type::Ext3 | Type::Other(_))
    )
}

/// Decides by the table and the superblocks, as far as they go.
pub fn first(parts: &[Part]) -> Result<First> {
    let root_type = root_type(Architecture::HOST);
    let typed = |part: &Part| {
        let kind = part.partition.as_ref().map(|p| &p.kind);
        matches!(kind, Some(partition::Type::Gpt(guid)) if guid == root_type)
    };
    let mut discoverable = (0..parts.len()).filter(|&index| typed(&parts[index]));
    if let (Some(one), None) = (discoverable.next(), discoverable.next()) {
        return if mountable(&parts[one]) { Ok(First::Chosen(one)) } else { Err(unsupported(parts, &[one])) };
    }
    let candidates: Vec<_> = (0..parts.len()).filter(|&index| mountable(&parts[index])).collect();
    let foreign: Vec<_> = (0..parts.len()).filter(|&index| foreign(&parts[index])).collect();
    match (&candidates[..], &foreign[..]) {
        ([], []) => Err(refused("the disk has no ext4 or xfs file system", parts)),
        ([], _) => Err(unsupported(parts, &foreign)),
        ([one], []) => Ok(First::Chosen(*one)),
        _ => Ok(First::Candidates(candidates)),
    }
}

/// Decides by what is inside of the candidates.
pub fn second(parts: &[Part], looks: &[(usize, Look)]) -> Result<usize> {
    let names = |look: &Look| -> Option<usize> {
        let mut named = (0..parts.len())
            .filter(|&index| fstab::names_root(&look.fstab, &parts[index].ids()) == Some(true));
        let one = named.next();
        one.filter(|_| named.next().is_none())
    };
    // An fstab that calls another partition the root speaks for that one, not for itself.
    let systems: Vec<_> =
        looks.iter().filter(|(_, look)| look.system).map(|(index, look)| (*index, names(look))).collect();
    let eligible: Vec<_> =
        systems.iter().filter(|(index, root)| root.is_none_or(|root| root == *index)).collect();
    if let [(one, _)] = eligible[..] {
        return Ok(*one);
    }
    let sure: Vec<_> = eligible.iter().filter(|(_, root)| root.is_some()).collect();
    if let [(one, _)] = sure[..] {
        return Ok(*one);
    }
    if eligible.is_empty() {
        let foreign: Vec<_> = (0..parts.len()).filter(|&index| foreign(&parts[index])).collect();
        if !foreign.is_empty() {
            return Err(unsupported(parts, &foreign));
        }
        return Err(refused("no file system of the disk holds a system (an fstab or an os-release)", parts));
    }
    Err(refused("several partitions of the disk may be its root", parts))
}

/// Reads what [`second`] wants to know, from a file system that is mounted read-only.
pub fn look(inside: &Inside) -> Result<Look> {
    let fstab = inside.read("/etc/fstab").context("reading /etc/fstab of a possible root")?;
    let released = inside.exists("/etc/os-release")? || inside.exists("/usr/lib/os-release")?;
    let entries =
        fstab.as_deref().map(|text| fstab::parse(&String::from_utf8_lossy(text))).unwrap_or_default();
    Ok(Look { system: released || fstab.is_some(), fstab: entries })
}

fn list(parts: &[Part]) -> String {
    parts.iter().map(Part::describe).collect::<Vec<_>>().join(", ")
}

fn refused(why: &str, parts: &[Part]) -> anyhow::Error {
    let failure = Kind::Definition.failure(format!("{why}: {}", list(parts)));
    let hint =
        "Bake on an image with one root partition, or give that one the type of a root partition in its GPT.";
    failure.hint(hint).into()
}

fn unsupported(parts: &[Part], which: &[usize]) -> anyhow::Error {
    let found: Vec<_> = which.iter().map(|&index| parts[index].describe()).collect();
    let name = which.iter().find_map(|&index| kind(&parts[index])).map_or("nothing known", Type::name);
    let what = format!("the disk's root is on {name}, which oven does not mount: {}", found.join(", "));
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

    fn part(number: u32, magic: &[(usize, &[u8])], guid: &str) -> Part {
        let mut disk = vec![0; 1 << 17];
        for (at, bytes) in magic {
            disk[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        disk[1024 + 104] = number as u8; // a UUID of its own, where it is ext
        let partition = Partition {
            number,
            start: 1 << 20,
            size: 1 << 30,
            kind: partition::Type::Gpt(guid.into()),
            partuuid: format!("part-{number}"),
            name: String::new(),
        };
        let node = std::fs::File::open("/dev/null").unwrap().into();
        let fs = superblock::probe(&disk[..], 0, disk.len() as u64);
        Part { partition: Some(partition), fs, name: format!("x{number}"), rdev: 0, size: 1 << 30, node }
    }
    fn ext4(number: u32, guid: &str) -> Part {
        part(number, &[(1080, &[0x53, 0xef]), (1024 + 96, &[0x40])], guid)
    }
    fn btrfs(number: u32, guid: &str) -> Part {
        part(number, &[(0x10040, b"_BHRfS_M")], guid)
    }
    fn system(fstab: &str) -> Look {
        Look { system: true, fstab: fstab::parse(fstab) }
    }

    #[test]
    fn the_types_of_a_table_decide_if_one_is_a_root() {
        let root = root_type(Architecture::HOST);
        assert_eq!(first(&[ext4(1, ""), ext4(2, root)]).unwrap(), First::Chosen(1));
        assert_eq!(first(&[ext4(1, root), ext4(2, root)]).unwrap(), First::Candidates(vec![0, 1]));
        assert_eq!(first(&[ext4(1, ""), part(2, &[], "")]).unwrap(), First::Chosen(0));
        let error = first(&[ext4(1, ""), btrfs(2, root)]).unwrap_err().to_string();
        assert!(
            error.contains("on btrfs, which oven does not mount: partition 2 (btrfs, 1.0 GiB)"),
            "{error}"
        );
    }

    #[test]
    fn what_cannot_be_mounted_is_named() {
        let lvm = || part(2, &[(512, b"LABELONE"), (536, b"LVM2 001")], "");
        assert!(first(&[lvm()]).unwrap_err().to_string().contains("on LVM"));
        // A /boot beside it is no root.
        let parts = [ext4(1, ""), lvm()];
        assert_eq!(first(&parts).unwrap(), First::Candidates(vec![0]));
        assert!(second(&parts, &[(0, Look::default())]).unwrap_err().to_string().contains("on LVM"));
        assert!(first(&[part(1, &[], "")]).unwrap_err().to_string().contains("no ext4 or xfs"));
    }

    #[test]
    fn fstab_tells_which_of_two_systems_is_the_root() {
        let parts = [ext4(1, ""), ext4(2, "")];
        let own = |n: u32| system(&format!("PARTUUID=part-{n} / ext4"));
        assert_eq!(second(&parts, &[(0, own(1)), (1, Look::default())]).unwrap(), 0);
        assert_eq!(second(&parts, &[(0, own(2)), (1, own(2))]).unwrap(), 1);
        assert_eq!(second(&parts, &[(0, system("")), (1, own(2))]).unwrap(), 1);
        assert_eq!(second(&parts, &[(0, system("UUID=elsewhere / xfs")), (1, Look::default())]).unwrap(), 0);
        let error = second(&parts, &[(0, own(1)), (1, own(2))]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("several partitions") && text.contains("partition 1 (ext4, 1.0 GiB, UUID 01"),
            "{text}"
        );
        assert!(text.contains("partition 2"), "{text}");
        assert_eq!(Kind::of(&error), Kind::Definition);
        assert!(second(&parts, &[(0, own(2)), (1, own(1))]).is_err());
        assert!(second(&parts, &[(0, system("")), (1, system(""))]).is_err());
    }
}
