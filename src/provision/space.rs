//! Checks the free space of the image's file systems.

use crate::error::{Kind, errno_of};
use crate::mount::damage::{BASE_HINT, STEP_HINT};
use crate::sys::mount::table;
use crate::text::escape_name;
use anyhow::{Context, Error, Result};
use rustix::io::Errno;
use std::fmt;
use std::path::Path;

/// The hint for a full disk.
pub const LARGER_DISK_HINT: &str = "Use a larger disk: set `size_gib` of `[disk]` in image.toml.";

/// The hint for a full file system of a step that is in memory.
pub const LARGER_MEMORY_HINT: &str =
    "Write less to this place, or use a builder with more memory: the limit grows with it.";

/// What follows the hint if writes of a test are too large.
pub const COPIED_FILES_HINT: &str =
    " A file of the image that a test changes counts whole, because the test changes a copy of it.";

/// The disk counts as full if at most 1/1024 of it is free. Then a write may have failed, even if no program reported
/// an error.
const MIN_FREE_SHARE: u64 = 1024;

/// ext4 reports its reserved blocks as free. It reserves 1/50 of all blocks, but at most 4096 blocks
/// (ext4_calculate_resv_clusters).
const EXT4_RESERVE: (u64, u64) = (50, 4096);

/// The space of one file system. Each pair has the number of free units and the total number.
#[derive(Debug, Clone, Copy)]
pub struct DiskSpace {
    blocks: (u64, u64),
    /// The numbers of inodes. Both are zero if the file system creates inodes as needed.
    files: (u64, u64),
    /// Whether `df` shows that nothing is available. Root may still be able to use blocks that are reserved for it.
    is_unavailable: bool,
}

impl DiskSpace {
    pub fn of(root: &Path) -> Result<Self> {
        let measure =
            || -> rustix::io::Result<_> { Ok((rustix::fs::statvfs(root)?, rustix::fs::statfs(root)?)) };
        let (stat, of_type) = measure().with_context(|| format!("measuring {}", root.display()))?;
        let ext4 = of_type.f_type as u64 == libc::EXT4_SUPER_MAGIC as u64;
        let reserved = if ext4 { (stat.f_blocks / EXT4_RESERVE.0).min(EXT4_RESERVE.1) } else { 0 };
        Ok(Self {
            blocks: (stat.f_bfree.saturating_sub(reserved), stat.f_blocks),
            files: (stat.f_ffree, stat.f_files),
            is_unavailable: stat.f_blocks > 0 && stat.f_bavail == 0,
        })
    }

    pub fn is_full(&self) -> bool {
        self.is_out_of_blocks() || is_low(self.files)
    }

    fn is_out_of_blocks(&self) -> bool {
        is_low(self.blocks)
    }
}

fn is_low((free, all): (u64, u64)) -> bool {
    all > 0 && free <= all / MIN_FREE_SHARE
}

/// The space of all file systems of an image.
#[derive(Debug)]
pub struct ImageSpace {
    /// The mount points in the image, and their file systems. The first one is `/`.
    file_systems: Vec<(String, DiskSpace)>,
}

impl ImageSpace {
    /// Measures the root and the file systems that are mounted below it.
    pub fn of(root: &Path) -> Result<Self> {
        let mut file_systems = vec![("/".to_owned(), DiskSpace::of(root)?)];
        let root = root.canonicalize().with_context(|| format!("resolving {}", root.display()))?;
        let mut devices = vec![rustix::fs::stat(&root)?.st_dev];
        for mount in table::of_this_thread()? {
            let Ok(below) = mount.path.strip_prefix(&root) else { continue };
            // Another mount of the same file system, such as a bind mount, has the same space.
            if below == Path::new("") || devices.contains(&mount.rdev) {
                continue;
            }
            devices.push(mount.rdev);
            // A mount may be hidden by another one.
            let Ok(space) = DiskSpace::of(&mount.path) else { continue };
            file_systems.push((format!("/{}", escape_name(below)), space));
        }
        Ok(Self { file_systems })
    }

    /// Returns the first file system that is full.
    pub fn full(&self) -> Option<FullFileSystem> {
        self.first_full(|_| true)
    }

    /// Returns the first file system that is full, and was not full when `before` was measured.
    pub fn full_since(&self, before: &Self) -> Option<FullFileSystem> {
        self.first_full(|target| !before.file_systems.iter().any(|(t, space)| t == target && space.is_full()))
    }

    fn first_full(&self, counts: impl Fn(&str) -> bool) -> Option<FullFileSystem> {
        let full = self.file_systems.iter().find(|(target, space)| space.is_full() && counts(target));
        full.map(|(target, space)| FullFileSystem {
            target: target.clone(),
            files: !space.is_out_of_blocks(),
        })
    }

    /// Returns the file system to which a path of the image belongs.
    pub fn containing(&self, path: &str) -> FullFileSystem {
        let holds = |target: &&str| Path::new(path).starts_with(target);
        let targets = self.file_systems.iter().map(|(target, _)| target.as_str());
        let target = targets.filter(holds).max_by_key(|target| target.len()).unwrap_or("/");
        FullFileSystem { target: target.to_owned(), files: false }
    }

    /// Returns the file system that was full according to messages of a program. The program may have removed its files
    /// since then, so the file system need not be full any more. `messages` say that no space is left. `others` are
    /// other lines of the output: a file on a small file system that they name was probably the one that did not fit.
    /// If no line names a file, the file system is the first one that is full now.
    pub fn full_by_messages<'t>(
        &self,
        messages: impl Iterator<Item = &'t str>,
        others: impl Iterator<Item = &'t str>,
    ) -> FullFileSystem {
        if let Some(path) = messages.flat_map(paths_in).next() {
            return self.containing(path);
        }
        let named = others.flat_map(paths_in).map(|path| self.containing(path));
        let named = named.filter(|found| !found.is_root()).last();
        named.or_else(|| self.full()).unwrap_or_else(|| self.containing("/"))
    }

    /// Fails if a file system became full after this value was measured.
    pub fn ensure_not_full(&self, root: &Path) -> Result<()> {
        self.ensure(root, DiskSpace::is_full)
    }

    /// Fails if a file system became full after this value was measured, or if only blocks that are reserved for root are
    /// left. Call this if another check failed: then an incomplete file is the most probable reason.
    pub fn ensure_available(&self, root: &Path) -> Result<()> {
        self.ensure(root, |space| space.is_full() || space.is_unavailable)
    }

    fn ensure(&self, root: &Path, is_full: fn(&DiskSpace) -> bool) -> Result<()> {
        let now = Self::of(root)?;
        let was_full = |target: &String| {
            self.file_systems.iter().any(|(before, space)| before == target && is_full(space))
        };
        let full = now.file_systems.iter().find(|(target, space)| is_full(space) && !was_full(target));
        let Some((target, space)) = full else { return Ok(()) };
        let has_space = !space.is_out_of_blocks() && !space.is_unavailable;
        let what = if has_space { "room for files (inodes)" } else { "space" };
        let full = FullFileSystem { target: target.clone(), files: has_space };
        let place = match full.is_root() {
            true => "the image's disk".to_owned(),
            false => format!("the image's file system {target}"),
        };
        Err(Kind::Step
            .failure(format!("no {what} is left on {place}, so a step may not have written all of its files"))
            .hint(full.hint())
            .into())
    }
}

/// A file system of the image that is full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FullFileSystem {
    target: String,
    /// Whether it has space, but no room for more files.
    files: bool,
}

impl FullFileSystem {
    fn is_root(&self) -> bool {
        self.target == "/"
    }

    pub fn hint(&self) -> String {
        let target = &self.target;
        match self.is_root() {
            true => LARGER_DISK_HINT.to_owned(),
            false => format!(
                "`size_gib` enlarges only the root file system. Write less to {target}, for example by removing files \
                 (on /boot: old kernels) in an earlier bake, or use a base image whose {target} is larger."
            ),
        }
    }
}

impl fmt::Display for FullFileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inodes = if self.files { " (no inodes are left)" } else { "" };
        match self.is_root() {
            true => write!(f, "the image's disk is full{inodes}"),
            false => write!(f, "the file system {} of the image is full{inodes}", self.target),
        }
    }
}

/// The directory in a step's `/run` with files that a step cannot change.
const OWN_FILES: &str = "/run/oven/";

/// Returns the absolute paths in a message of a program. A path in `OWN_FILES` does not count: a shell names its script
/// in each message.
pub fn paths_in(line: &str) -> impl Iterator<Item = &str> {
    let is_separator = |c: char| c.is_whitespace() || "'\"`‘’“”()<>[]=,;:".contains(c);
    let words = line.split(is_separator).filter(|word| word.len() > 1 && word.starts_with('/'));
    words.map(|word| word.trim_end_matches('.')).filter(|path| !path.starts_with(OWN_FILES))
}

/// Explains a failure of oven's own writes to the image if a file system is full or broken. `root` is the mount point of
/// the image. `step_wrote` says whether a step may have written to the disk below its file systems.
pub fn explain_full_disk(error: Error, root: &Path, step_wrote: bool) -> Error {
    let (damage, hint) = if step_wrote { (Kind::Step, STEP_HINT) } else { (Kind::Definition, BASE_HINT) };
    match errno_of(&error) {
        Some(Errno::NOSPC | Errno::DQUOT) => {
            let text = format!("{error:#}");
            let full = ImageSpace::of(root).map(|space| {
                space.full().unwrap_or_else(|| space.full_by_messages([&*text].into_iter(), [].into_iter()))
            });
            let full = full.unwrap_or(FullFileSystem { target: "/".into(), files: false });
            Kind::Step.failure(format!("{full}: {text}")).hint(full.hint()).into()
        }
        // This error means that the kernel found damage and made the file system read-only.
        Some(Errno::ROFS) => {
            damage.failure(format!("the image's file system became read-only: {error:#}")).hint(hint).into()
        }
        Some(Errno::UCLEAN | Errno::BADMSG) => {
            damage.failure(format!("the image's file system is damaged: {error:#}")).hint(hint).into()
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::hint_of;

    fn explained(error: Error, step_wrote: bool) -> Error {
        explain_full_disk(error, Path::new("/proc"), step_wrote)
    }

    #[test]
    fn a_full_disk_is_explained_whoever_says_it() {
        let io = Error::from(std::io::Error::from_raw_os_error(libc::ENOSPC)).context("writing /x");
        for error in [io, Error::from(Errno::NOSPC).context("writing /x")] {
            let error = explained(error, false);
            assert!(error.to_string().starts_with("the image's disk is full: writing /x: "), "{error}");
            assert_eq!((Kind::of(&error), hint_of(&error).as_deref()), (Kind::Step, Some(LARGER_DISK_HINT)));
        }
        for (errno, words) in [(Errno::ROFS, "became read-only"), (Errno::UCLEAN, "is damaged")] {
            for (step_wrote, kind) in [(false, Kind::Definition), (true, Kind::Step)] {
                let error = explained(errno.into(), step_wrote);
                assert!(error.to_string().contains(words), "{error}");
                assert_eq!(Kind::of(&error), kind);
            }
        }
        assert_eq!(
            explained(Error::from(Errno::ACCESS).context("writing /x"), true).to_string(),
            "writing /x"
        );
    }

    fn space_of(list: &[(&str, u64)]) -> ImageSpace {
        let space = |free: u64| DiskSpace { blocks: (free, 10_000), files: (0, 0), is_unavailable: false };
        let file_systems = list.iter().map(|(target, free)| ((*target).to_owned(), space(*free))).collect();
        ImageSpace { file_systems }
    }

    #[test]
    fn the_file_system_that_is_full_is_named() {
        let full = |list: &[(&str, u64)]| space_of(list).full().map(|full| full.to_string());
        assert_eq!(full(&[("/", 5000), ("/boot", 5000)]), None);
        assert_eq!(full(&[("/", 2), ("/boot", 5000)]).unwrap(), "the image's disk is full");
        for target in ["/boot", "/boot/efi", "/var/lib/postgresql"] {
            let full = space_of(&[("/", 5000), (target, 1), ("/srv", 300)]).full().unwrap();
            assert_eq!(full.to_string(), format!("the file system {target} of the image is full"));
            let hint = full.hint();
            assert!(hint.contains("enlarges only the root") && hint.contains(target), "{hint}");
        }
        // A file system that was full before is not the cause of a later failure.
        let since = |before: &[(&str, u64)], now: &[(&str, u64)]| {
            space_of(now).full_since(&space_of(before)).map(|full| full.target)
        };
        assert_eq!(since(&[("/", 5000), ("/boot", 0)], &[("/", 5000), ("/boot", 0)]), None);
        assert_eq!(since(&[("/", 5000), ("/boot", 0)], &[("/", 2), ("/boot", 0)]).unwrap(), "/");
        assert_eq!(since(&[("/", 5000), ("/boot", 80)], &[("/", 5000), ("/boot", 0)]).unwrap(), "/boot");
        assert_eq!(since(&[("/", 5000)], &[("/", 5000), ("/boot", 0)]).unwrap(), "/boot");
        let inodes = DiskSpace { blocks: (500, 1000), files: (0, 100), is_unavailable: false };
        let space = ImageSpace { file_systems: vec![("/".into(), inodes)] };
        assert_eq!(space.full().unwrap().to_string(), "the image's disk is full (no inodes are left)");
    }

    /// Messages of dpkg, update-initramfs, rpm, cp and tar, after which the program removed its files.
    #[test]
    fn a_file_system_that_was_full_is_found_in_the_messages() {
        let space = space_of(&[("/", 9000), ("/boot", 4000), ("/boot/efi", 4000), ("/srv", 4000)]);
        let found = |messages: &[&str], others: &[&str]| {
            space.full_by_messages(messages.iter().copied(), others.iter().copied()).target
        };
        for (message, target) in [
            (
                "cannot copy extracted data for './boot/vmlinuz-6.1' to '/boot/vmlinuz-6.1.dpkg-new': failed to write (No space left on device)",
                "/boot",
            ),
            ("installing package kernel-core needs 30MB more space on the /boot filesystem", "/boot"),
            ("cp: error writing '/boot/efi/EFI/x': No space left on device", "/boot/efi"),
            ("tar: /srv/data: Cannot write: No space left on device", "/srv"),
            ("cp: error writing '/bootable': No space left on device", "/"),
            ("/run/oven/definition/x.sh: 2: cannot create /srv/x: No space left on device", "/srv"),
            ("OSError: [Errno 28] No space left on device: \"/srv/x.tmp\"", "/srv"),
        ] {
            assert_eq!(found(&[message], &["update-initramfs: failed for /boot/initrd.img-6.1"]), target);
        }
        let zstd = "zstd: error 70 : Write error : cannot write block : No space left on device";
        let others =
            ["Setting up initramfs-tools", "update-initramfs: failed for /boot/initrd.img-6.1 with 1."];
        assert_eq!(found(&[zstd], &others), "/boot");
        assert_eq!(found(&[zstd], &["cp /usr/share/x /opt/x"]), "/");
        let space = space_of(&[("/", 9000), ("/boot", 4000), ("/srv", 0)]);
        let found =
            |others: &[&str]| space.full_by_messages([zstd].into_iter(), others.iter().copied()).target;
        assert_eq!(found(&others), "/boot");
        assert_eq!(found(&[]), "/srv");
    }

    #[test]
    fn full_is_the_last_thousandth() {
        let space = |blocks, files| DiskSpace { blocks, files, is_unavailable: false }.is_full();
        assert!(!space((100, 1000), (0, 0)), "files made as needed are never short");
        assert!(space((0, 1000), (0, 0)) && space((5, 100_000), (9, 10)));
        assert!(space((500, 1000), (0, 65536)));
        assert!(!DiskSpace::of(Path::new("/")).unwrap().is_full());
        assert!(
            ImageSpace::of(Path::new("/"))
                .unwrap()
                .full_by_messages([].into_iter(), [].into_iter())
                .is_root()
        );
    }
}
