//! The kernel's mount tables in the format of `/proc/…/mountinfo` (proc_pid_mountinfo(5)).

use anyhow::{Context, Result};
use std::path::PathBuf;

/// A line of a mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    pub id: u64,
    pub parent: u64,
    pub rdev: u64,
    /// The mount point, relative to this process's root directory.
    pub path: PathBuf,
    pub shared: bool,
    /// The path, within the file system, of the directory or file that is mounted.
    pub root: PathBuf,
    /// The type of the file system, such as `ext4`.
    pub kind: String,
}

/// Parses a mount table in the format of `/proc/…/mountinfo`. Skips lines that it cannot parse.
pub fn parse(text: &[u8]) -> Vec<MountEntry> {
    let line = |line: &[u8]| {
        let fields: Vec<_> = line.split(|&b| b == b' ').collect();
        let number = |index: usize| std::str::from_utf8(fields.get(index)?).ok()?.parse::<u64>().ok();
        let (major, minor) = std::str::from_utf8(fields.get(2)?).ok()?.split_once(':')?;
        let mut optional = fields.get(6..)?.iter();
        let shared =
            optional.by_ref().take_while(|field| **field != b"-").any(|field| field.starts_with(b"shared:"));
        let kind = fields.iter().position(|field| *field == b"-").and_then(|dash| fields.get(dash + 1));
        Some(MountEntry {
            id: number(0)?,
            parent: number(1)?,
            rdev: rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?),
            path: unescape(fields.get(4)?),
            shared,
            root: unescape(fields.get(3)?),
            kind: String::from_utf8_lossy(kind.copied().unwrap_or_default()).into_owned(),
        })
    };
    text.split(|&b| b == b'\n').filter_map(line).collect()
}

/// Returns the mount table of this thread. Other threads may be in other mount namespaces.
pub fn of_this_thread() -> Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read("/proc/thread-self/mountinfo").context("reading the mount table")?))
}

/// Decodes a path of a mount table, in which blanks and some other characters are written in octal.
fn unescape(path: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut out = Vec::new();
    let mut rest = path;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| first == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        if let Some(byte) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            out.push(byte);
            rest = &tail[3..];
        } else {
            out.push(first);
            rest = tail;
        }
    }
    std::ffi::OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_mount_table() {
        let text = b"36 35 98:0 / /mnt\\040a rw,noatime shared:1 - ext4 /dev/x rw\nbroken\n37 36 7:1 /m /b rw - tmpfs t rw";
        let lines = parse(text);
        assert_eq!((lines.len(), lines[0].id, lines[0].parent, lines[0].shared), (2, 36, 35, true));
        assert_eq!(lines[0].path, PathBuf::from("/mnt a"));
        assert_eq!((lines[1].rdev, lines[1].shared), (rustix::fs::makedev(7, 1), false));
        assert_eq!((lines[0].root.as_path(), lines[0].kind.as_str()), (Path::new("/"), "ext4"));
        assert_eq!((lines[1].root.as_path(), lines[1].kind.as_str()), (Path::new("/m"), "tmpfs"));
        let escaped = b"36 35 98:0 /mnt\\0401 /mnt\\0402/a\\134b rw - ext3 /dev/root rw\n";
        let lines = parse(escaped);
        assert_eq!(lines[0].path, PathBuf::from("/mnt 2/a\\b"), "blanks and backslashes are octal");
        assert_eq!((lines[0].root.as_path(), lines[0].kind.as_str()), (Path::new("/mnt 1"), "ext3"));
        assert!(of_this_thread().unwrap().len() > 1);
    }
}
