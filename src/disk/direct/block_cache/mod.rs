//! Blocks of base snapshots that were read before, kept on this machine.
//!
//! Each snapshot has a directory: `data`, a sparse file with every block at its place, and `digests`, 32 bytes for each
//! block, zeros where there is none. A block is served once it was held against its digest; what does not match is as
//! good as absent. Bakes at the same time share the files: whoever reads a block writes the same bytes. Beside them are
//! `indexes`, which blocks the snapshot has, and `used-…`, which of them the last bake of a family used, in order; both
//! end with a digest, too.

#[cfg(test)]
mod tests;

use super::fault::full;
use super::overlay::lock;
use crate::cloud::block_api::{Contents, Indexes};
use crate::error::{Kind, hint_of};
use crate::ids::SnapshotId;
use crate::ids::{BLOCK, Digest, digest_of};
use crate::sys::temp_file;
use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use rustix::fs::{Mode, OFlags};
use sha2::Digest as _;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::SystemTime;

const DATA: &str = "data";
const DIGESTS: &str = "digests";
/// Formerly `contents`, with four bytes for each block.
const CONTENTS: &str = "indexes";
const USED: &str = "used-";
const ABSENT: Digest = [0; 32];
/// Each time somebody else has to have evicted it a moment ago.
const TRIES: u32 = 64;
/// Of this machine's disk, what nobody asked for leaves so much free, in bytes: what bakes write comes there, too.
pub const ROOM: u64 = 1 << 30;
/// What to do about a cache that cannot be used.
const REMOVE: &str = "It only saves reading: remove it while nothing is baked.";

/// Blocks that share a lock: while one is read, seldom another of the same lock is asked for.
const LOCKS: usize = 64;

/// What this process knows of a snapshot's blocks while it uses them: shared by its bakes at the same time.
#[derive(Debug)]
struct Known {
    /// Those that were held against their digests.
    ready: Mutex<HashMap<u32, Digest>>,
    /// For whoever makes one ready.
    locks: [Mutex<()>; LOCKS],
}

/// By the data's device and inode: another file of that name is known anew.
type InUse = Arc<Mutex<HashMap<(u64, u64), Weak<Known>>>>;

/// The cache: a directory, and how much it may hold.
#[derive(Debug, Clone)]
pub struct Cache {
    in_use: InUse,
    dir: PathBuf,
    /// In bytes. Snapshots in use are never evicted: with them it may be more.
    limit: u64,
    /// Of a directory's disk, in bytes.
    free: fn(&Path) -> Option<u64>,
}

/// The blocks of one snapshot. While this value lives nobody evicts them.
#[derive(Debug)]
pub struct Cached {
    // Dropped first: nobody joins in once the lock is let go of, and the data may be evicted.
    known: Arc<Known>,
    dir: PathBuf,
    data: File,
    /// Locked until it is dropped, whoever has copies of its descriptor: a step that is being started has for a moment.
    digests: Flock<File>,
}

/// A family's name may be anything.
fn used(family: &str) -> String {
    let digest = digest_of(family.as_bytes());
    let digits: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{USED}{digits}")
}

impl Cache {
    pub fn new(dir: &Path, limit: u64) -> Self {
        Self { in_use: InUse::default(), dir: dir.to_owned(), limit, free: crate::sys::space::free_space }
    }

    fn known(&self, data: &File) -> io::Result<Arc<Known>> {
        let data = data.metadata()?;
        let mut in_use = lock(&self.in_use);
        in_use.retain(|_, known| known.strong_count() > 0);
        let here = in_use.entry((data.dev(), data.ino())).or_default();
        Ok(here.upgrade().unwrap_or_else(|| {
            let known = Known { ready: Mutex::default(), locks: std::array::from_fn(|_| Mutex::default()) };
            let known = Arc::new(known);
            *here = Arc::downgrade(&known);
            known
        }))
    }

    /// What is known of a snapshot. Room is made first, of what was not used for longest.
    pub fn of(&self, snapshot: &SnapshotId) -> Result<Cached> {
        let dir = self.dir.join(&snapshot.0);
        let context = || format!("opening the cache of blocks in {}", dir.display());
        let failed = |error| broken(error, &context());
        // Others may evict it in between.
        for _ in 0..TRIES {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
            match made {
                // It was there a moment ago, or is again.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !is_other(&dir) => continue,
                made => made.map_err(failed)?,
            }
            let Some(digests) = unless_gone(open(&dir.join(DIGESTS))).map_err(failed)? else { continue };
            let digests =
                Flock::lock(digests, FlockArg::LockShared).map_err(|(_, errno)| failed(errno.into()))?;
            if !is_called(&digests, &dir.join(DIGESTS)) {
                continue;
            }
            let data = open(&dir.join(DATA)).map_err(failed)?;
            digests.set_modified(SystemTime::now()).map_err(failed)?;
            let known = self.known(&data).map_err(failed)?;
            self.trim()?;
            return Ok(Cached { known, dir, data, digests });
        }
        Err(Kind::Machine.error(format!("{}: it is evicted again and again", context())))
    }

    /// Evicts snapshots, those that were not used for longest first, until the limit is kept, and bakes have room.
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
        let lacking = (self.free)(&self.dir).map_or(0, |free| ROOM.saturating_sub(free));
        let limit = self.limit.min(held.saturating_sub(lacking));
        for (_, bytes, path) in all {
            if held <= limit {
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
    let Ok(digests) = Flock::lock(digests, FlockArg::LockExclusiveNonblock) else { return Ok(false) };
    if !is_called(&digests, &lock) {
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

/// Whether what has this name is no directory.
fn is_other(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|there| !there.is_dir())
}

fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// How a block became ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// It was.
    Before,
    /// It was kept.
    Found,
    Read,
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
        let bytes = self.kept(CONTENTS)?;
        let (size, blocks) = bytes.split_first_chunk()?;
        let blocks = Indexes::deserialize_from(blocks).ok()?;
        Some(Contents { size_gib: u64::from_le_bytes(*size), blocks })
    }

    /// Snapshots never change: it is asked for once.
    pub fn keep_contents(&self, contents: &Contents) -> Result<()> {
        let mut bytes = contents.size_gib.to_le_bytes().to_vec();
        contents.blocks.serialize_into(&mut bytes).context("writing down which blocks there are")?;
        self.keep(CONTENTS, bytes)
    }

    /// What the last bake of a family used, in order; empty if there was none.
    pub fn used(&self, family: &str) -> Vec<u32> {
        let bytes = self.kept(&used(family)).unwrap_or_default();
        bytes.as_chunks().0.iter().copied().map(u32::from_le_bytes).collect()
    }

    pub fn keep_used(&self, family: &str, blocks: &[u32]) -> Result<()> {
        self.keep(&used(family), blocks.iter().copied().flat_map(u32::to_le_bytes).collect())
    }

    fn keep(&self, name: &str, mut bytes: Vec<u8>) -> Result<()> {
        let digest = digest_of(&bytes);
        bytes.extend(digest);
        let kept = temp_file::write_beside(&self.dir.join(name), &bytes, false);
        kept.map_err(|error| match hint_of(&error).is_some() {
            true => error,
            false => Kind::Machine.failure(format!("{error:#}")).hint(REMOVE).into(),
        })
    }

    /// What was kept under a name, if it is what it was.
    fn kept(&self, name: &str) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.dir.join(name)).ok()?;
        let (kept, digest) = bytes.split_last_chunk::<32>()?;
        let length = kept.len();
        (digest_of(kept) == *digest).then(|| {
            bytes.truncate(length);
            bytes
        })
    }

    /// The digest of a block, if it is kept; it is not verified.
    pub fn digest(&self, index: u32) -> Option<Digest> {
        let mut digest = ABSENT;
        self.digests.read_exact_at(&mut digest, u64::from(index) * 32).ok()?;
        (digest != ABSENT).then_some(digest)
    }

    /// The digest of a block that is ready: it was put, or held against its digest, since this process began to use the
    /// snapshot.
    pub fn ready(&self, index: u32) -> Option<Digest> {
        lock(&self.known.ready).get(&index).copied()
    }

    /// A block is not what it was when it was made ready: it is made so anew.
    pub fn spoilt(&self, index: u32) {
        lock(&self.known.ready).remove(&index);
    }

    /// Makes a block ready, unless it is: from what is kept if that is what it was, else by `read`. Who wants the same
    /// block at the same time waits. `keeping`: the error, where what was read cannot be kept.
    pub fn make_ready(
        &self,
        index: u32,
        read: impl FnOnce() -> Result<(Vec<u8>, Digest)>,
        keeping: impl FnOnce(io::Error) -> anyhow::Error,
    ) -> Result<(Digest, Made)> {
        if let Some(digest) = self.ready(index) {
            return Ok((digest, Made::Before));
        }
        let _turn = lock(&self.known.locks[index as usize % LOCKS]);
        if let Some(digest) = self.ready(index) {
            return Ok((digest, Made::Before));
        }
        let made = match self.verified(index) {
            Some(digest) => (digest, Made::Found),
            None => {
                let (data, digest) = read()?;
                self.put(index, &data, &digest).map_err(keeping)?;
                (digest, Made::Read)
            }
        };
        lock(&self.known.ready).insert(index, made.0);
        Ok(made)
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
        let kept = super::fault::ensure_kept(&self.data);
        if kept.is_err() {
            // The next one is not told of what was lost before it began.
            lock(&self.known.ready).clear();
        }
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
