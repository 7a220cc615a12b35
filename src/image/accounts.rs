//! The accounts of an image.

use super::tree::ImageTree;
use anyhow::Result;

/// The image's accounts, from /etc/passwd and /etc/group in the image. The accounts of this machine are not used.
pub struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    pub fn read(inside: &ImageTree) -> Result<Self> {
        let text = |path| -> Result<String> {
            Ok(inside
                .read(path)?
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

    /// Returns the home directories of all accounts, without duplicates. Returns at most `HOMES_MAX` directories.
    pub fn homes(&self) -> Vec<String> {
        let fields = self.passwd.lines().filter_map(|line| line.split(':').nth(5));
        let mut homes: Vec<_> = fields.filter(|home| home.starts_with('/')).map(str::to_owned).collect();
        homes.sort_unstable();
        homes.dedup();
        homes.truncate(HOMES_MAX);
        homes
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

/// The maximum number of home directories. Examining a home directory takes about 50 us. oven reacts to a signal only
/// after it has examined all of them, so their number must be limited.
pub(crate) const HOMES_MAX: usize = 10_000;
