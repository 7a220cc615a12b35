//! Chooses device names for AttachVolume. EC2 accepts only a name that is free on the instance. On an instance with
//! NVMe disks, the name has no other effect, because the kernel names the disk.

use crate::ids::VolumeId;
use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Device names that are in use or were used, as far as this process knows.
#[derive(Debug, Default)]
pub struct DeviceNames {
    /// Names that EC2 refused because they are in use. They are not tried again until [`Self::forget_taken`].
    taken: BTreeSet<String>,
    /// Names that this process has used, oldest first. They are tried last, because a volume can remain in the state
    /// `attaching` forever if another volume had the same name just before.
    used: Vec<String>,
    /// A volume that is to be attached, and the names that were in use on the instance while the volume was being
    /// created.
    pub seen: Option<(VolumeId, BTreeSet<String>)>,
}

/// Returns the names that AWS recommends for data volumes, followed by the others that it allows on HVM instances. The
/// names are listed in EC2's guide under "device names".
fn all_names() -> impl Iterator<Item = String> {
    let recommended = ('f'..='p').map(|last| format!("/dev/sd{last}"));
    let allowed = ['b', 'c']
        .into_iter()
        .flat_map(|first| ('a'..='z').map(move |last| format!("/dev/xvd{first}{last}")));
    recommended.chain(allowed)
}

impl DeviceNames {
    /// Returns the names to try for a volume, best first. Unused names come first, then used ones, least recently used
    /// first. The first name depends on the volume's id, so that bakes of different processes rarely try the same name.
    pub fn for_volume(&self, volume: &str, in_use: &BTreeSet<String>) -> Vec<String> {
        let mut hasher = DefaultHasher::new();
        volume.hash(&mut hasher);
        let fresh: Vec<String> = all_names().filter(|name| !self.used.contains(name)).collect();
        let start = if fresh.is_empty() { 0 } else { (hasher.finish() % fresh.len() as u64) as usize };
        let (before, after) = fresh.split_at(start);
        let names = after.iter().chain(before).chain(&self.used);
        names.filter(|name| !in_use.contains(*name) && !self.taken.contains(*name)).cloned().collect()
    }

    /// Records that EC2 refused a name because it is in use.
    pub fn mark_taken(&mut self, name: &str) {
        self.taken.insert(name.to_owned());
    }

    /// Records that this process uses a name. From now on, the name is tried last.
    pub fn mark_used(&mut self, name: &str) {
        self.used.retain(|used| used != name);
        self.used.push(name.to_owned());
    }

    /// Forgets which names EC2 refused. This is called after all names were tried, because some of them may be free at
    /// the next attachment.
    pub fn forget_taken(&mut self) {
        self.taken.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_63_and_each_is_legal() {
        let names: BTreeSet<String> = all_names().collect();
        assert_eq!(names.len(), 63);
        assert!(
            names
                .iter()
                .all(|name| name.starts_with("/dev/") && !name.ends_with(|c: char| c.is_ascii_digit()))
        );
    }

    #[test]
    fn unused_names_come_first_and_freed_ones_last() {
        let mut names = DeviceNames::default();
        let free = BTreeSet::new();
        let first = names.for_volume("vol-1", &free);
        assert_eq!(first.len(), 63);
        names.mark_used(&first[0]);
        names.mark_used(&first[1]);
        let second = names.for_volume("vol-1", &free);
        assert_eq!(second[61..], first[..2]);
        names.mark_taken(&first[5]);
        let third = names.for_volume("vol-2", &[first[4].clone()].into());
        assert!(!third.contains(&first[5]) && !third.contains(&first[4]));
        assert_eq!(third.len(), 61);
        names.forget_taken();
        assert_eq!(names.for_volume("vol-2", &free).len(), 63);
    }

    #[test]
    fn volumes_start_at_different_names() {
        let names = DeviceNames::default();
        let begins: BTreeSet<String> =
            (0..64).map(|i| names.for_volume(&format!("vol-{i}"), &BTreeSet::new())[0].clone()).collect();
        assert!(begins.len() > 20, "{begins:?}");
    }
}
