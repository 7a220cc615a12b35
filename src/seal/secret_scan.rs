//! Searches the files that a bake changed for the bake's secrets.
//!
//! All files that were written, linked or changed after the bake began are searched, including their names and the
//! targets of symlinks. A secret is found in plain form, and in the encoded forms that [`crate::secrets`] lists. A
//! secret is not found if it was compressed, encrypted or cut into pieces, or if it is in extended attributes. Deleted
//! files are not searched. Their content remains in free blocks if the disk does not support discards.

use crate::error::Kind;
use crate::image::data::DataReader;
use crate::image::tree::ImageTree;
use crate::image::walk::{PATH_MAX, Walk, WalkEntry};
use crate::secrets::Secrets;
use crate::text::escape_name;
use anyhow::{Context, Result};
use rustix::fs::{FileType, Stat};
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Files that changed within this time before the bake are also searched. If the clock is set back during the bake, a
/// file that the bake wrote can have a time before the bake's start.
const MARGIN: Duration = Duration::from_secs(10 * 60);
/// The number of bytes of a file that are read at a time.
const CHUNK: usize = 1 << 20;
/// The number of bytes that may be searched, as a multiple of the size of the image's file systems. A file with several
/// hard links is searched only once. But files that share their data (reflinks) are searched separately.
const SEARCHED_MAX: u64 = 2;
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
///
/// Only data are read, not holes. A secret comes from an environment variable, so it contains no zero byte, and neither
/// a hole nor the end of the data before it can be a part of it.
pub fn ensure_no_secrets(inside: &ImageTree, secrets: &Secrets, since: BakeStart) -> Result<()> {
    if secrets.is_empty() {
        return Ok(());
    }
    let _timer = inside.meter().start();
    let mut search = Search {
        inside,
        secrets,
        found: Vec::new(),
        count: 0,
        hard_links: BTreeSet::new(),
        remaining: 0,
        buffer: Vec::new(),
    };
    // A walk does not enter other file systems, so each file system gets its own walk.
    let mut trees = vec!["/".to_owned()];
    while let Some(tree) = trees.pop() {
        let top = inside.open(&tree, rustix::fs::OFlags::PATH)?;
        let device = rustix::fs::fstat(&top)?.st_dev;
        let space = rustix::fs::fstatvfs(&top)?;
        search.remaining += space.f_blocks.saturating_mul(space.f_frsize).saturating_mul(SEARCHED_MAX);
        drop(top);
        inside.walk_entries(&tree, &mut |entry| {
            if entry.kind() == FileType::Directory && entry.stat.st_dev != device {
                trees.push(entry.path.to_owned());
            }
            if !since.includes(entry.stat) {
                return Ok(Walk::On);
            }
            let secret = search
                .search(entry)
                .with_context(|| format!("searching {} for secrets", entry.shown_path()))?;
            if let Some(name) = secret {
                search.note(entry.path, name);
            }
            Ok(Walk::On)
        })?;
    }
    search.result()
}

/// A search for secrets.
struct Search<'a> {
    inside: &'a ImageTree,
    secrets: &'a Secrets,
    /// The first paths with a secret, as lines of the error message.
    found: Vec<String>,
    /// The number of all paths with a secret.
    count: usize,
    /// The device and inode of each file with several hard links that was searched already.
    hard_links: BTreeSet<(u64, u64)>,
    /// The number of bytes that may still be searched.
    remaining: u64,
    buffer: Vec<u8>,
}

impl<'a> Search<'a> {
    fn note(&mut self, path: &str, name: &str) {
        self.count += 1;
        if self.found.len() < NAMED_MAX {
            // In the opposite order, part of a secret could remain.
            let path = shorten(&escape_name(&*self.secrets.mask(path)));
            self.found.push(format!("{path}: contains the secret {name}"));
        }
    }

    fn result(self) -> Result<()> {
        let mut list = self.found.join("\n    ");
        match self.count - self.found.len() {
            0 if self.count == 0 => return Ok(()),
            0 => {}
            more => list += &format!("\n    and {more} more"),
        }
        Err(Kind::Step
            .failure(format!("the image contains secrets:\n    {list}"))
            .hint(
                "Anyone who starts an instance could read them. Remove them in the script. If every instance is \
                 allowed to know a value, it is not a secret. Put the value in a variable or a file.",
            )
            .into())
    }

    /// Returns the name of a secret in an object's name, in its target if it is a symlink, or in its content.
    fn search(&mut self, entry: &WalkEntry<'_>) -> Result<Option<&'a str>> {
        if let Some(secret) = self.secrets.find(entry.name()) {
            return Ok(Some(secret));
        }
        match entry.kind() {
            FileType::Symlink => Ok(self.secrets.find(entry.read_link()?.as_encoded_bytes())),
            FileType::RegularFile => self.search_file(entry),
            _ => Ok(None),
        }
    }

    fn search_file(&mut self, entry: &WalkEntry<'_>) -> Result<Option<&'a str>> {
        #[allow(clippy::unnecessary_cast, reason = "their types depend on the machine")]
        let id = (entry.stat.st_dev as u64, entry.stat.st_ino as u64);
        if entry.stat.st_nlink > 1 && !self.hard_links.insert(id) {
            return Ok(None);
        }
        let Some(file) = entry.open_file()? else { return Ok(None) };
        let mut reader = DataReader::new(file, self.inside.meter().clone());
        let overlap = self.secrets.longest_searched().saturating_sub(1);
        self.buffer.resize(CHUNK + overlap, 0);
        // The last bytes of the data before are searched together with the next data.
        let (mut carried, mut end) = (0, 0);
        while let Some((offset, read)) = reader.read_data(&mut self.buffer[carried..])? {
            if offset != end {
                // There is a hole before these data.
                self.buffer.copy_within(carried..carried + read, 0);
                carried = 0;
            }
            end = offset + read as u64;
            let Some(remaining) = self.remaining.checked_sub(read as u64) else {
                let what = "the files that the bake changed have more data than the image's disk can store";
                return Err(self.inside.meter().exceeded(what));
            };
            self.remaining = remaining;
            let length = carried + read;
            if let Some(name) = self.secrets.find(&self.buffer[..length]) {
                return Ok(Some(name));
            }
            carried = overlap.min(length);
            self.buffer.copy_within(length - carried..length, 0);
        }
        Ok(None)
    }
}

/// Replaces the middle of a path that is longer than the kernel permits. Secrets in it must be masked already.
pub(super) fn shorten(path: &str) -> String {
    if path.len() <= PATH_MAX {
        return path.to_owned();
    }
    let start = path.floor_char_boundary(PATH_MAX / 8);
    let end = path.ceil_char_boundary(path.len() - PATH_MAX / 8);
    format!("{}…{}", &path[..start], &path[end..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;
    use rustix::fs::{Mode, OFlags};

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
        for path in ["/etc/conf", "/root/.netrc", "/srv/***.txt", "/srv/link"] {
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
    fn secrets_are_found_between_holes_and_at_any_depth() {
        use std::os::unix::fs::FileExt;
        for at in [0, 1, 4090, (1 << 20) - 3, (15 << 40) - 15] {
            let tree = Tree::new();
            tree.file("big", "");
            let file = tree.open("big");
            file.set_len(15 << 40).unwrap();
            file.write_all_at(b"hunter2-", at).unwrap();
            file.write_all_at(b"x", at / 2).unwrap();
            assert_eq!(search(&tree, BakeStart::now()), Ok(()), "{at}");
            file.write_all_at(b"hunter2-hunter2", at).unwrap();
            assert!(search(&tree, BakeStart::now()).is_err(), "{at}");
        }
        // The path of this file is longer than the kernel permits.
        let tree = Tree::new();
        tree.deep_file(&"d".repeat(200), 300, "hunter2-hunter2");
        assert!(search(&tree, BakeStart::now()).unwrap_err().contains("ddd: contains the secret TOKEN"));
        let tree = Tree::new();
        tree.deep_file("\u{e9}", 3, "hunter2-hunter2");
        assert!(search(&tree, BakeStart::now()).is_err());
    }

    #[test]
    fn a_secret_at_the_cut_of_a_long_path_is_masked() {
        let (secret, end) = ("hunter2-hunter2", PATH_MAX / 8);
        for at in end - secret.len()..=end {
            // The name of the third directory has the bytes 403 to 602 of the path.
            let tree = Tree::new();
            let mut names = vec!["d".repeat(200); 25];
            names[2].replace_range(at - 403..at - 403 + secret.len(), secret);
            let mut dir = rustix::fs::openat(tree.tree().dir(), ".", OFlags::PATH, Mode::empty()).unwrap();
            for name in &names {
                rustix::fs::mkdirat(&dir, name, Mode::RWXU).unwrap();
                dir = rustix::fs::openat(&dir, name, OFlags::PATH, Mode::empty()).unwrap();
            }
            rustix::fs::symlinkat(format!("/{secret}"), &dir, "link").unwrap();
            let error = search(&tree, BakeStart::now()).unwrap_err();
            assert!(error.contains('…') && !error.contains("hunt"), "{at}: {error}");
        }
    }

    #[test]
    fn a_file_whose_name_is_not_text_is_searched() {
        use std::os::unix::ffi::OsStrExt;
        let tree = Tree::new();
        tree.file("plain", "hunter2-hunter2");
        tree.rename("plain", std::ffi::OsStr::from_bytes(b"\xff\xfe"));
        assert!(search(&tree, BakeStart::now()).is_err());
    }

    #[test]
    fn a_file_with_many_links_is_searched_once() {
        let tree = Tree::new();
        tree.file("0", "x");
        (1..1000).for_each(|link| tree.hard_link("0", &link.to_string()));
        let of_file = (1 << 20) as u64;
        tree.open("0").set_len(of_file).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&tree.open("0"), &vec![1; of_file as usize], 0).unwrap();
        let (inside, secrets) = (tree.tree(), secrets());
        let mut search = Search {
            inside: &inside,
            secrets: &secrets,
            found: Vec::new(),
            count: 0,
            hard_links: BTreeSet::new(),
            remaining: of_file,
            buffer: Vec::new(),
        };
        let walk = |search: &mut Search<'_>| {
            inside.walk_entries("/", &mut |entry| search.search(entry).map(|_| Walk::On))
        };
        walk(&mut search).unwrap();
        assert_eq!(search.remaining, 0);
        search.hard_links.clear();
        let error = format!("{:#}", walk(&mut search).unwrap_err());
        assert!(error.contains("have more data than the image's disk can store"), "{error}");
    }

    #[test]
    fn a_search_ends_at_a_signal() {
        use crate::image::limits::ReadMeter;
        let tree = Tree::new();
        tree.file("etc/conf", "x");
        let dir =
            rustix::fs::openat(tree.tree().dir(), ".", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty());
        let inside = ImageTree::with_meter(dir.unwrap(), ReadMeter::new(Default::default(), || true));
        let error = ensure_no_secrets(&inside, &secrets(), BakeStart::now()).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Interrupted);
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
