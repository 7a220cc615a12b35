//! Blocks of base snapshots that were read before, kept on this machine.
//!
//! Each snapshot has a directory: `data`, a sparse file with every block at its place, and `digests`, 32 bytes for each
//! block, zeros where there is none. A block is served once it was held against its digest; what does not match is as
//! good as absent. Bakes at the same time share the files: whoever reads a block writes the same bytes. Beside them are
//! `contents`, which blocks the snapshot has, and `used-…`, which of them the last bake of a family used, in order; both
//! end with a digest, too.

use super::copy;
use super::trouble::full;
use crate::cloud::SnapshotId;
use crate::cloud::blocks::{BLOCK, Contents, Digest};
use crate::error::{Kind, hint_of};
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const DATA: &str = "data";
const DIGESTS: &str = "digests";
const CONTENTS: &str = "contents";
const USED: &str = "used-";
const ABSENT: Digest = [0; 32];
/// Each time somebody else has to have evicted it a moment ago.
const TRIES: u32 = 64;
/// What to do about a cache that cannot be used.
const REMOVE: &str = "It only saves reading: remove it while nothing is baked.";

/// The cache: a directory, and how much it may hold.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
    /// In bytes. Snapshots in use are never evicted: with them it may be more.
    limit: u64,
}

/// The blocks of one snapshot. While this value lives nobody evicts them.
#[derive(Debug)]
pub struct Cached {
    dir: PathBuf,
    data: File,
    digests: File,
}

/// A family's name may be anything.
fn used(family: &str) -> String {
    let digest = digest_of(family.as_bytes());
    let digits: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{USED}{digits}")
}

pub fn digest_of(data: &[u8]) -> Digest {
    Sha256::digest(data).into()
}

impl Cache {
    pub fn new(dir: &Path, limit: u64) -> Self {
        Self { dir: dir.to_owned(), limit }
    }

    /// What is known of a snapshot. Room is made first, of what was not used for longest.
    pub fn of(&self, snapshot: &SnapshotId) -> Result<Cached> {
        let dir = self.dir.join(&snapshot.0);
        let context = || format!("opening the cache of blocks in {}", dir.display());
        let failed = |error| broken(error, &context());
        // Others may evict it in between.
        for _ in 0..TRIES {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
            made.map_err(failed)?;
            let Some(digests) = unless_gone(open(&dir.join(DIGESTS))).map_err(failed)? else { continue };
            rustix::fs::flock(&digests, FlockOperation::LockShared).map_err(|e| failed(e.into()))?;
            if !is_called(&digests, &dir.join(DIGESTS)) {
                continue;
            }
            let data = open(&dir.join(DATA)).map_err(failed)?;
            digests.set_modified(SystemTime::now()).map_err(failed)?;
            self.trim()?;
            return Ok(Cached { dir, data, digests });
        }
        Err(Kind::Machine.error(format!("{}: it is evicted again and again", context())))
    }

    /// Evicts snapshots, those that were not used for longest first, until the limit is kept.
    pub fn trim(&self) -> Result<()> {
        let failed = |error| broken(error, &format!("making room in {}", self.dir.display()));
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Ok(digests) = fs::metadata(path.join(DIGESTS)) else { continue };
            let bytes = fs::metadata(path.join(DATA)).map_or(0, |data| data.blocks() * 512);
            all.push((digests.modified().map_err(failed)?, bytes + digests.blocks() * 512, path));
        }
        all.sort();
        let mut held: u64 = all.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in all {
            if held <= self.limit {
                break;
            }
            if evict(&path, &|path| fs::remove_file(path)).map_err(failed)? {
                held -= bytes;
            }
        }
        Ok(())
    }
}

/// Removes a snapshot's directory; `remove`: a file of it. `false`: it is in use, or somebody else does so.
fn evict(dir: &Path, remove: &dyn Fn(&Path) -> io::Result<()>) -> io::Result<bool> {
    let lock = dir.join(DIGESTS);
    let Ok(digests) = File::open(&lock) else { return Ok(false) };
    let is_free = rustix::fs::flock(&digests, FlockOperation::NonBlockingLockExclusive).is_ok();
    if !is_free || !is_called(&digests, &lock) {
        return Ok(false);
    }
    // The lock's file last: until then nobody begins anew here, and what somebody leaves who is killed still counts.
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path != lock {
            remove(&path)?;
        }
    }
    remove(&lock)?;
    // Now somebody may have begun.
    _ = fs::remove_dir(dir);
    Ok(true)
}

/// Whether an open file has this name.
fn is_called(file: &File, path: &Path) -> bool {
    let there = fs::metadata(path).and_then(|there| Ok((there, file.metadata()?)));
    there.is_ok_and(|(there, open)| (open.dev(), open.ino()) == (there.dev(), there.ino()))
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(File::from(rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))?))
}

/// The cache cannot be used, while doing something (a gerund, which names the place).
fn broken(error: io::Error, doing: &str) -> anyhow::Error {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => full(error, doing),
        _ => anyhow::Error::from(Kind::Machine.failure(&error).hint(REMOVE)).context(doing.to_owned()),
    }
}

impl Cached {
    /// Where it is, for messages.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The blocks, for a process that reads what is verified, and writes nothing.
    pub fn reading(&self) -> std::io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.data.as_raw_fd()))
    }

    /// Which blocks the snapshot has, if that is kept.
    pub fn contents(&self) -> Option<Contents> {
        let numbers = self.numbers(CONTENTS)?;
        let (size, blocks) = numbers.split_first()?;
        Some(Contents { size_gib: (*size).into(), blocks: blocks.iter().copied().collect() })
    }

    /// Snapshots never change: it is asked for once.
    pub fn keep_contents(&self, contents: &Contents) -> Result<()> {
        let size = u32::try_from(contents.size_gib).context("a snapshot is larger than any disk")?;
        self.keep(CONTENTS, std::iter::once(size).chain(contents.blocks.iter().copied()))
    }

    /// What the last bake of a family used, in order; empty if there was none.
    pub fn used(&self, family: &str) -> Vec<u32> {
        self.numbers(&used(family)).unwrap_or_default()
    }

    pub fn keep_used(&self, family: &str, blocks: &[u32]) -> Result<()> {
        self.keep(&used(family), blocks.iter().copied())
    }

    fn keep(&self, name: &str, numbers: impl Iterator<Item = u32>) -> Result<()> {
        let mut bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
        let digest = digest_of(&bytes);
        bytes.extend(digest);
        let kept = copy::write_beside(&self.dir.join(name), &bytes, false);
        kept.map_err(|error| match hint_of(&error).is_some() {
            true => error,
            false => Kind::Machine.failure(format!("{error:#}")).hint(REMOVE).into(),
        })
    }

    fn numbers(&self, name: &str) -> Option<Vec<u32>> {
        let bytes = fs::read(self.dir.join(name)).ok()?;
        let (numbers, digest) = bytes.split_last_chunk::<32>()?;
        let whole = digest_of(numbers) == *digest && numbers.len().is_multiple_of(4);
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
        whole.then(|| numbers.chunks(4).map(number).collect())
    }

    /// The digest of a block, if it is kept; it is not verified.
    pub fn digest(&self, index: u32) -> Option<Digest> {
        let mut digest = ABSENT;
        self.digests.read_exact_at(&mut digest, u64::from(index) * 32).ok()?;
        (digest != ABSENT).then_some(digest)
    }

    /// The digest of a block that is kept and is what it was.
    pub fn verified(&self, index: u32) -> Option<Digest> {
        let digest = self.digest(index)?;
        let mut data = vec![0; BLOCK];
        self.read(index, 0, &mut data).ok()?;
        (digest_of(&data) == digest).then_some(digest)
    }

    /// Fails if a block that was put since this value is there was lost on its way to the disk.
    pub fn ensure_kept(&self) -> Result<()> {
        let kept = super::trouble::ensure_kept(&self.data);
        kept.map_err(|error| broken(error, &format!("keeping blocks in {}", self.dir.display())))
    }

    /// Bytes of a block that was verified or put.
    pub fn read(&self, index: u32, at: usize, buffer: &mut [u8]) -> std::io::Result<()> {
        self.data.read_exact_at(buffer, u64::from(index) * BLOCK as u64 + at as u64)
    }

    pub fn put(&self, index: u32, data: &[u8], digest: &Digest) -> std::io::Result<()> {
        self.data.write_all_at(data, u64::from(index) * BLOCK as u64)?;
        self.digests.write_all_at(digest, u64::from(index) * 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(n: u32) -> SnapshotId {
        SnapshotId(format!("snap-{n:017x}"))
    }

    #[test]
    fn a_block_is_kept_and_one_that_changed_is_not_served() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), u64::MAX);
        let data = vec![7; BLOCK];
        cache.of(&snapshot(1)).unwrap().put(3, &data, &digest_of(&data)).unwrap();
        let cached = cache.of(&snapshot(1)).unwrap();
        assert_eq!(cached.verified(3), Some(digest_of(&data)));
        assert_eq!((cached.verified(2), cached.verified(4)), (None, None));
        for at in [0, 1234, BLOCK as u64 - 1] {
            let place = 3 * BLOCK as u64 + at;
            cached.data.write_all_at(&[8], place).unwrap();
            assert_eq!(cached.verified(3), None, "a bit at {at} flipped");
            cached.data.write_all_at(&[7], place).unwrap();
        }
        cached.digests.write_all_at(&[1], 3 * 32).unwrap();
        assert_eq!(cached.verified(3), None);
        assert_eq!(cache.of(&snapshot(2)).unwrap().verified(3), None);
    }

    #[test]
    fn what_is_known_of_a_snapshot_is_kept_and_damage_is_as_good_as_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), u64::MAX);
        let cached = cache.of(&snapshot(1)).unwrap();
        assert_eq!((cached.contents(), cached.used("web")), (None, vec![]));
        let contents = Contents { size_gib: 8, blocks: [0, 7, 16383].into() };
        cached.keep_contents(&contents).unwrap();
        cached.keep_used("../web", &[7, 0]).unwrap();
        assert_eq!(cache.of(&snapshot(1)).unwrap().contents(), Some(contents));
        assert_eq!((cached.used("../web"), cached.used("web")), (vec![7, 0], vec![]));
        for at in [0, 5, 20] {
            let path = cached.dir.join(CONTENTS);
            let mut bytes = fs::read(&path).unwrap();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert_eq!(cached.contents(), None, "a bit at {at} flipped");
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
        }
        cached.data.write_all_at(b"x", 0).unwrap();
        assert!(cached.reading().unwrap().write_all_at(b"y", 0).is_err());
    }

    #[test]
    fn what_was_not_used_for_longest_goes_and_what_is_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let data = vec![7; BLOCK];
        // Room for two and a half.
        let cache = Cache::new(dir.path(), BLOCK as u64 * 5 / 2);
        let there = || {
            let names =
                fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<_> =
                names.map(|name| name.trim_start_matches("snap-0").parse::<u32>().unwrap()).collect();
            names.sort();
            names
        };
        let used = |n: u32, ago: u64| {
            let cached = cache.of(&snapshot(n)).unwrap();
            cached.put(0, &data, &digest_of(&data)).unwrap();
            cached.keep_contents(&Contents { size_gib: 1, blocks: [0].into() }).unwrap();
            cached.digests.set_modified(SystemTime::now() - std::time::Duration::from_secs(ago)).unwrap();
            cached
        };
        drop((used(1, 300), used(2, 100)));
        let third = used(3, 200);
        let fourth = used(4, 50);
        cache.trim().unwrap();
        assert_eq!(there(), [3, 4], "1 and 2 are not in use");
        drop((third, fourth));
        drop(used(5, 0));
        cache.trim().unwrap();
        assert_eq!(there(), [4, 5]);
    }

    #[test]
    fn who_evicts_and_who_begins_at_the_same_time_do_not_get_in_each_others_way() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), 0);
        let data = vec![7; BLOCK];
        std::thread::scope(|scope| {
            for n in 0..4 {
                let (cache, data) = (&cache, &data);
                scope.spawn(move || {
                    for round in 0..300 {
                        let cached = cache.of(&snapshot((n + round) % 3)).unwrap();
                        cached.put(0, data, &digest_of(data)).unwrap();
                        assert!(cached.dir.join(DIGESTS).exists(), "it is evicted while it is in use");
                        assert_eq!(cached.verified(0), Some(digest_of(data)));
                    }
                });
            }
        });
        cache.trim().unwrap();
        assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn who_is_killed_while_it_evicts_leaves_nothing_that_is_not_counted() {
        let dir = tempfile::tempdir().unwrap();
        let data = vec![7; BLOCK];
        let cached = Cache::new(dir.path(), u64::MAX).of(&snapshot(1)).unwrap();
        cached.put(0, &data, &digest_of(&data)).unwrap();
        cached.keep_contents(&Contents { size_gib: 1, blocks: [0].into() }).unwrap();
        let place = cached.dir.clone();
        drop(cached);
        // What it was about to remove is there as long as the lock's file.
        let removed = std::cell::RefCell::new(Vec::new());
        let evicted = evict(&place, &|path| {
            assert!(place.join(DIGESTS).exists(), "{} would be nobody's", path.display());
            removed.borrow_mut().push(path.file_name().unwrap().to_owned());
            fs::remove_file(path)
        });
        assert!(evicted.unwrap() && !place.exists());
        assert_eq!(removed.into_inner().last().unwrap(), DIGESTS);
    }

    #[test]
    fn what_cannot_be_opened_is_this_machines_and_may_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path(), u64::MAX);
        let place = dir.path().join(snapshot(1).0);
        fs::create_dir_all(place.join(DATA)).unwrap();
        let ensure_told = |error: anyhow::Error| {
            let text = format!("{error:#}");
            assert_eq!(Kind::of(&error), Kind::Machine, "{text}");
            assert!(text.contains(place.to_str().unwrap()), "{text}");
            assert!(error.chain().any(|cause| cause.to_string().contains("Is a directory")), "{text}");
        };
        ensure_told(cache.of(&snapshot(1)).unwrap_err());
        fs::remove_dir(place.join(DATA)).unwrap();
        let cached = cache.of(&snapshot(1)).unwrap();
        fs::create_dir(place.join(CONTENTS)).unwrap();
        let contents = Contents { size_gib: 1, blocks: [0].into() };
        assert_eq!(cached.contents(), None);
        ensure_told(cached.keep_contents(&contents).unwrap_err());
    }
}
