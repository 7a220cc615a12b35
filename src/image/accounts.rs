//! The accounts of an image.

use super::tree::ImageTree;
use anyhow::Result;
use std::collections::BTreeSet;

/// The maximum size of /etc/passwd and of /etc/group in bytes. 50,000 accounts need about 3 MiB.
const TABLE_MAX: u64 = 8 << 20;
/// The maximum number of home directories. Examining one takes about 50 us.
pub(crate) const HOMES_MAX: usize = 50_000;

/// The image's accounts, from /etc/passwd and /etc/group in the image. The accounts of this machine are not used.
pub struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    pub fn read(inside: &ImageTree) -> Result<Self> {
        let text = |path| -> Result<String> {
            Ok(inside
                .read_at_most(path, TABLE_MAX)?
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .unwrap_or_default())
        };
        Ok(Self { passwd: text("/etc/passwd")?, group: text("/etc/group")? })
    }

    /// Returns the id of a user. `root` is known even if the file does not list it.
    pub fn user(&self, name: &str) -> Option<u32> {
        id(&self.passwd, name)
    }

    pub fn group(&self, name: &str) -> Option<u32> {
        id(&self.group, name)
    }

    /// Returns the home directories of all accounts, sorted and without duplicates. Returns `None` if there are more
    /// than `HOMES_MAX`.
    pub fn homes(&self) -> Option<Vec<String>> {
        let mut homes = BTreeSet::new();
        for home in self.passwd.lines().filter_map(|line| line.split(':').nth(5)) {
            if home.starts_with('/') {
                homes.insert(home);
            }
            if homes.len() > HOMES_MAX {
                return None;
            }
        }
        Some(homes.into_iter().map(str::to_owned).collect())
    }
}

/// Returns the third field of the line that begins with `name`. If `name` is a number, returns this number.
fn id(table: &str, name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let line = table.lines().find(|line| line.split(':').next() == Some(name));
    match line.and_then(|line| line.split(':').nth(2)?.parse().ok()) {
        None if name == "root" => Some(0),
        found => found,
    }
}
