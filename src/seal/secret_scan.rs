//! Searches the files that a bake changed for the bake's secrets.
//!
//! All files that were written, linked or changed after the bake began are searched, including their names and the
//! targets of symlinks. A secret is found in plain form, and in the encoded forms that [`crate::secrets`] lists. A
//! secret is not found if it was compressed, encrypted or cut into pieces, or if it is in extended attributes. Deleted
//! files are not searched. Their content remains in free blocks if the disk does not support discards.

use crate::error::Kind;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::secrets::Secrets;
use crate::text::{escape_name, list_first};
use anyhow::{Context, Result};
use rustix::fs::{FileType, Stat};
use std::io::Read;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Files that changed within this time before the bake are also searched. If the clock is set back during the bake, a
/// file that the bake wrote can have a time before the bake's start.
const MARGIN: Duration = Duration::from_secs(10 * 60);
/// The number of bytes of a file that are read at a time.
const CHUNK: usize = 1 << 20;
/// The maximum number of paths that an error message names.
const NAMED_MAX: usize = 20;

/// Files that changed at this time or later are searched. The time is `MARGIN` before the bake's start, in seconds
/// since 1970.
#[derive(Debug, Clone, Copy)]
pub struct BakeStart(i64);

impl BakeStart {
    pub fn now() -> Self {
        let now = (SystemTime::now() - MARGIN).duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(i64::try_from(now.as_secs()).unwrap_or_default())
    }

    /// Returns whether a file was written, linked or changed after the bake began.
    #[allow(clippy::unnecessary_cast, reason = "its type depends on the machine")]
    pub fn includes(self, stat: &Stat) -> bool {
        stat.st_ctime as i64 >= self.0
    }
}

/// Fails if a secret is in the image. The error contains the paths, and the names of the secrets.
pub fn ensure_no_secrets(inside: &ImageTree, secrets: &Secrets, since: BakeStart) -> Result<()> {
    if secrets.is_empty() {
        return Ok(());
    }
    let mut found: Vec<(String, String)> = Vec::new();
    // A walk does not enter other file systems, so each file system gets its own walk.
    let mut trees = vec!["/".to_owned()];
    while let Some(tree) = trees.pop() {
        let device = rustix::fs::fstat(inside.open(&tree, rustix::fs::OFlags::PATH)?)?.st_dev;
        inside.walk(&tree, &mut |path, stat| {
            let kind = FileType::from_raw_mode(stat.st_mode);
            if kind == FileType::Directory && stat.st_dev != device {
                trees.push(path.to_owned());
            }
            if !since.includes(stat) {
                return Ok(Walk::On);
            }
            let name = path.rsplit('/').next().unwrap_or_default();
            let secret = match kind {
                _ if secrets.find(name.as_bytes()).is_some() => secrets.find(name.as_bytes()),
                FileType::Symlink => {
                    let to = inside.read_link(path)?.unwrap_or_default();
                    secrets.find(to.as_encoded_bytes())
                }
                FileType::RegularFile => find_in_file(inside, path, secrets)
                    .with_context(|| format!("reading {} in the image", escape_name(path)))?,
                _ => None,
            };
            found.extend(secret.map(|name| (path.to_owned(), name.to_owned())));
            Ok(Walk::On)
        })?;
    }
    if found.is_empty() {
        return Ok(());
    }

    let lines: Vec<_> = found
        .iter()
        .map(|(path, name)| format!("{}: contains the secret {name}", escape_name(path)))
        .collect();
    let list = list_first(&lines, NAMED_MAX, "\n    ");
    Err(Kind::Step
        .failure(format!("the image contains secrets:\n    {list}"))
        .hint(
            "Anyone who starts an instance could read them. Remove them in the script. If every instance is allowed \
             to know a value, it is not a secret. Put the value in a variable or a file.",
        )
        .into())
}

fn find_in_file<'s>(inside: &ImageTree, path: &str, secrets: &'s Secrets) -> Result<Option<&'s str>> {
    let Some(mut file) = inside.open_file(path)? else { return Ok(None) };
    let overlap = secrets.longest_searched().saturating_sub(1);
    let mut buffer = vec![0; CHUNK + overlap];
    let mut carried = 0;
    loop {
        let read = match file.read(&mut buffer[carried..]) {
            Ok(0) => return Ok(None),
            Ok(read) => carried + read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        if let Some(name) = secrets.find(&buffer[..read]) {
            return Ok(Some(name));
        }
        carried = overlap.min(read);
        buffer.copy_within(read - carried..read, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;

    fn secrets() -> Secrets {
        Secrets::of_test(&[("TOKEN", "hunter2-hunter2")])
    }

    fn search(tree: &Tree, since: BakeStart) -> Result<(), String> {
        ensure_no_secrets(&tree.tree(), &secrets(), since).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn secrets_are_found_in_files_names_and_links() {
        let tree = Tree::new();
        tree.file("etc/fine", "hunter2");
        tree.fifo("run/fifo");
        assert_eq!(search(&tree, BakeStart::now()), Ok(()));
        tree.file("etc/conf", "token = hunter2-hunter2\n");
        // The text is the output of: printf user:hunter2-hunter2 | base64
        tree.file("root/.netrc", "Basic dXNlcjpodW50ZXIyLWh1bnRlcjI=\n");
        tree.file("srv/hunter2-hunter2.txt", "");
        tree.link("/x?token=hunter2-hunter2", "srv/link");
        let error = search(&tree, BakeStart::now()).unwrap_err();
        for path in ["/etc/conf", "/root/.netrc", "/srv/hunter2-hunter2.txt", "/srv/link"] {
            assert!(error.contains(&format!("{path}: contains the secret TOKEN")), "{path}: {error}");
        }
        assert!(!error.contains("/etc/fine"), "{error}");
    }

    #[test]
    fn secrets_are_found_across_chunks() {
        for at in CHUNK - 20..CHUNK + 40 {
            let tree = Tree::new();
            tree.file("big", &format!("{}hunter2-hunter2{}", "x".repeat(at), "y".repeat(CHUNK)));
            assert!(search(&tree, BakeStart::now()).is_err(), "{at}");
        }
    }

    #[test]
    fn files_of_the_base_are_not_searched() {
        let tree = Tree::new();
        tree.file("etc/conf", "hunter2-hunter2");
        let later = BakeStart(BakeStart::now().0 + 3600);
        assert_eq!(search(&tree, later), Ok(()));
        assert!(ensure_no_secrets(&tree.tree(), &Secrets::default(), BakeStart(0)).is_ok());
    }
}
