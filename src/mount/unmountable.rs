//! The mount point of a file system that this kernel cannot mount. At boot, the file system is mounted on this
//! directory and hides everything that a step wrote to the directory. So oven fails if a step changes anything in it.

use crate::error::Kind;
use crate::image::limits::StoredPaths;
use crate::image::tree::ImageTree;
use crate::image::walk::Walk;
use crate::text::escape_name;
use anyhow::{Context, Result};
use rustix::fs::FileType;
use std::collections::BTreeMap;

/// The maximum number of files in the directory. Usually it is empty, because a file system is mounted on it.
const FILES_MAX: usize = 10_000;
/// The maximum number of paths that an error message names.
const NAMES_MAX: usize = 5;

/// The state of a file: its type and mode, user, group, size, and modification time (seconds and nanoseconds). The size
/// and the time of a directory are 0.
type State = (u32, u32, u32, i64, i64, i64);

/// The directory, and the state of its files before the first step.
#[derive(Debug)]
pub struct UnsupportedMount {
    /// The mount point, as fstab spells it.
    target: String,
    kind: String,
    before: BTreeMap<String, State>,
}

impl UnsupportedMount {
    pub fn new(inside: &ImageTree, target: &str, kind: &str) -> Result<Self> {
        Ok(Self { target: target.to_owned(), kind: kind.to_owned(), before: read_states(inside, target)? })
    }

    /// Fails if anything below the directory has changed.
    pub fn check(&self, inside: &ImageTree) -> Result<()> {
        let now = read_states(inside, &self.target)?;
        let gone = self.before.keys().filter(|path| !now.contains_key(*path));
        let new =
            now.iter().filter(|(path, state)| self.before.get(*path) != Some(state)).map(|(path, _)| path);
        let changed: Vec<_> = gone.chain(new).take(NAMES_MAX).map(escape_name).collect();
        if changed.is_empty() {
            return Ok(());
        }
        let (target, kind) = (escape_name(&self.target), &self.kind);
        let what = format!(
            "a step changed {target}, but this kernel cannot mount its {kind} file system; the changed paths are: {}",
            changed.join(", ")
        );
        let hint = format!(
            "The changes would be hidden at boot. Bake on a machine whose kernel has {kind} (`modprobe {kind}`)."
        );
        Err(Kind::Machine.failure(what).hint(hint).into())
    }
}

fn read_states(inside: &ImageTree, target: &str) -> Result<BTreeMap<String, State>> {
    let mut found = BTreeMap::new();
    let mut stored = StoredPaths::new(inside.meter(), target);
    let walked = inside.walk(target, &mut |path, stat| {
        let mut state =
            (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_size, stat.st_mtime, stat.st_mtime_nsec as i64);
        // A file that a step creates and removes again does not count as a change. But it changes the size and time of
        // its directory, so the size and time of a directory are ignored.
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            (state.3, state.4, state.5) = (0, 0, 0);
        }
        stored.count(path)?;
        found.insert(path.to_owned(), state);
        if found.len() > FILES_MAX {
            let target = escape_name(target);
            let what = format!("{target} in the image is a mount point, and has more than {FILES_MAX} files");
            return Err(inside.meter().exceeded(what));
        }
        Ok(Walk::On)
    });
    walked.with_context(|| format!("reading {}", escape_name(target)))?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// The directories in each other have paths of up to 100 KiB, which have 25 MB together.
    #[test]
    fn a_deep_directory_needs_little_memory() {
        use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
        let dir = tempfile::tempdir().unwrap();
        let name = "d".repeat(200);
        let mut inner = openat(CWD, dir.path(), OFlags::PATH, Mode::empty()).unwrap();
        for _ in 0..500 {
            mkdirat(&inner, &*name, Mode::RWXU).unwrap();
            inner = openat(&inner, &*name, OFlags::PATH, Mode::empty()).unwrap();
        }
        let inside = ImageTree::open_dir(dir.path()).unwrap();
        let error = UnsupportedMount::new(&inside, "/", "vfat").unwrap_err();
        let text = format!("{error:#}");
        assert_eq!(text, "reading /: the paths below / in the image have more than 16 MiB together");
        assert_eq!(Kind::of(&error), Kind::Definition);
    }

    #[test]
    fn every_change_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        let inside = ImageTree::open_dir(dir.path()).unwrap();
        let absent = UnsupportedMount::new(&inside, "/boot/efi", "vfat").unwrap();
        fs::create_dir_all(at("boot/efi/EFI")).unwrap();
        fs::write(at("boot/efi/old"), "1").unwrap();
        let error = absent.check(&inside).unwrap_err();
        assert!(error.to_string().contains("/boot/efi/EFI, /boot/efi/old"), "{error}");
        assert_eq!(Kind::of(&error), Kind::Machine);

        let known = UnsupportedMount::new(&inside, "/boot/efi", "vfat").unwrap();
        known.check(&inside).unwrap();
        fs::write(at("boot/efi/EFI/passing"), "").unwrap();
        fs::remove_file(at("boot/efi/EFI/passing")).unwrap();
        known.check(&inside).unwrap();
        fs::write(at("boot/efi/old"), "22").unwrap();
        assert!(known.check(&inside).unwrap_err().to_string().contains("/boot/efi/old"));
        fs::remove_file(at("boot/efi/old")).unwrap();
        assert!(known.check(&inside).unwrap_err().to_string().contains("/boot/efi/old"));
    }
}
