//! A cache on this machine for the blocks of base snapshots. Each block that is read from the cloud is added to it.
//!
//! Each snapshot has a directory with these files:
//!
//! - `data`: a sparse file with each cached block at its offset.
//! - `digests`: the digest of each block, in 32 bytes. If a block is not cached, these bytes are zeros.
//! - `indexes`: the list of the blocks that the snapshot has.
//! - `used-…`: one file for each family, that is, for all definitions with the same `name`. It lists the
//!   blocks that the last bake of the family used, in the order of their first use.
//!
//! A block is used only after it was verified against its digest. A block that does not match its digest counts as
//! absent. Concurrent bakes can share `data` and `digests`, because all of them write the same bytes. `indexes` and
//! each `used-…` end with a digest of their content.

#[cfg(test)]
mod tests;

use super::fault::disk_error;
use crate::cloud::block_api::{BlockIndexes, SnapshotContents};
use crate::error::{Kind, hint_of};
use crate::ids::SnapshotId;
use crate::ids::{BLOCK, Digest, digest_of};
use crate::sys::lock::{FileLock, LockMode, lock_mutex};
use crate::sys::state_files;
use crate::sys::temp_file;
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::SystemTime;

const DATA: &str = "data";
const DIGESTS: &str = "digests";
/// The file is not named `contents`, because earlier versions wrote another format to a file with that name.
const CONTENTS: &str = "indexes";
const USED_PREFIX: &str = "used-";
const ABSENT: Digest = [0; 32];
/// The maximum number of attempts to open a snapshot's directory. An attempt fails if another process evicts the
/// snapshot at the same moment.
const MAX_TRIES: u32 = 64;
/// The free space in bytes that the cache leaves for bakes, which write to the same file system. If less is free, no
/// blocks are prefetched, and cached snapshots are evicted.
pub const RESERVED_SPACE: u64 = 1 << 30;
/// The hint for a cache that is unusable.
const REMOVE_HINT: &str = "The cache only saves downloads. You can remove it while no bake runs.";

/// The number of locks for blocks. Each lock is shared by many blocks. This seldom makes a thread wait, because two
/// blocks with the same lock are seldom read from the cloud concurrently.
const LOCKS: usize = 64;

/// The state of a snapshot's blocks in this process. The process's concurrent bakes share the state.
#[derive(Debug)]
struct SharedState {
    /// The digests of the blocks that are ready. A block is ready if this process has verified it, or has written it to
    /// the cache.
    ready: Mutex<HashMap<u32, Digest>>,
    /// A block's lock is held while the block is being made ready.
    locks: [Mutex<()>; LOCKS],
}

/// The key is the data file's device and inode, so a new file of the same name starts with no verified blocks.
type SharedStates = Arc<Mutex<HashMap<(u64, u64), Weak<SharedState>>>>;

/// The block cache: a directory with a size limit.
#[derive(Debug, Clone)]
pub struct BlockCache {
    shared_states: SharedStates,
    dir: PathBuf,
    /// The limit in bytes. Snapshots in use are never evicted, so the cache may be larger.
    limit: u64,
    /// Returns the free bytes of a directory's file system.
    free: fn(&Path) -> Option<u64>,
}

/// The cached blocks of one snapshot. They are not evicted while this value exists.
#[derive(Debug)]
pub struct CachedSnapshot {
    // The fields are dropped in the order of their declaration. When `digests` is dropped, the lock is released, and
    // another process can evict the data. `shared_state` must be dropped before that, so that no later bake relies on
    // blocks that were evicted.
    shared_state: Arc<SharedState>,
    dir: PathBuf,
    data: File,
    /// The file with the lock. The lock is released when this field is dropped, even if a copy of the descriptor still
    /// exists in a child process that is being started.
    digests: FileLock,
}

/// Returns the name of a family's `used-…` file. The file name contains a digest of the family's name, because the
/// family's name may have characters that are not allowed in file names.
fn used_file(family: &str) -> String {
    let digest = digest_of(family.as_bytes());
    let digits: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{USED_PREFIX}{digits}")
}

impl BlockCache {
    pub fn new(dir: &Path, limit: u64) -> Self {
        Self {
            shared_states: SharedStates::default(),
            dir: dir.to_owned(),
            limit,
            free: crate::sys::space::free_space,
        }
    }

    fn shared_state(&self, data: &File) -> io::Result<Arc<SharedState>> {
        let data = data.metadata()?;
        let mut shared_states = lock_mutex(&self.shared_states);
        shared_states.retain(|_, shared_state| shared_state.strong_count() > 0);
        let entry = shared_states.entry((data.dev(), data.ino())).or_default();
        Ok(entry.upgrade().unwrap_or_else(|| {
            let shared_state =
                SharedState { ready: Mutex::default(), locks: std::array::from_fn(|_| Mutex::default()) };
            let shared_state = Arc::new(shared_state);
            *entry = Arc::downgrade(&shared_state);
            shared_state
        }))
    }

    /// Opens a snapshot's directory in the cache, or creates it. Then, if the whole cache is too large, or if too
    /// little space is free for bakes, evicts the least recently used snapshots.
    pub fn open_snapshot(&self, snapshot: &SnapshotId) -> Result<CachedSnapshot> {
        let dir = self.dir.join(&snapshot.0);
        let context = || format!("opening the cache of blocks in {}", dir.display());
        let failed = |error| cache_error(error, &context());
        // Another process may evict the snapshot before its directory is locked. In that case, the loop tries again.
        for _ in 0..MAX_TRIES {
            state_files::create_dir(&dir)
                .map_err(|error| error.downcast().map_or_else(|error| error, failed))?;
            let Some(digests) = none_if_missing(open(&dir.join(DIGESTS))).map_err(failed)? else { continue };
            let digests = FileLock::wait(digests, LockMode::Shared)
                .map_err(|error| error.downcast().map_or_else(|error| error, failed))?;
            if !has_name(&digests, &dir.join(DIGESTS)) {
                continue;
            }
            let data = open(&dir.join(DATA)).map_err(failed)?;
            digests.set_modified(SystemTime::now()).map_err(failed)?;
            let shared_state = self.shared_state(&data).map_err(failed)?;
            self.trim()?;
            return Ok(CachedSnapshot { shared_state, dir, data, digests });
        }
        Err(Kind::Machine.error(format!("{}: other processes evict it repeatedly", context())))
    }

    /// Evicts snapshots, the least recently used first, until the cache is below its limit and the disk has enough free
    /// space for bakes.
    pub fn trim(&self) -> Result<()> {
        let failed = |error| cache_error(error, &format!("making room in {}", self.dir.display()));
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Ok(digests) = fs::metadata(path.join(DIGESTS)) else { continue };
            let bytes = fs::metadata(path.join(DATA)).map_or(0, |data| data.blocks() * 512);
            all.push((digests.modified().map_err(failed)?, bytes + digests.blocks() * 512, path));
        }
        all.sort();
        let mut used_bytes: u64 = all.iter().map(|(_, bytes, _)| bytes).sum();
        let lacking = (self.free)(&self.dir).map_or(0, |free| RESERVED_SPACE.saturating_sub(free));
        let limit = self.limit.min(used_bytes.saturating_sub(lacking));
        for (_, bytes, path) in all {
            if used_bytes <= limit {
                break;
            }
            if evict(&path, &|path| fs::remove_file(path)).map_err(failed)? {
                used_bytes -= bytes;
            }
        }
        Ok(())
    }
}

/// Removes a snapshot's directory. Calls `remove` for each file. Returns false if the snapshot is in use or another
/// process is evicting it.
fn evict(dir: &Path, remove: &dyn Fn(&Path) -> io::Result<()>) -> io::Result<bool> {
    let lock = dir.join(DIGESTS);
    let Ok(digests) = File::open(&lock) else { return Ok(false) };
    let Ok(Some(digests)) = FileLock::try_acquire(digests, LockMode::Exclusive) else { return Ok(false) };
    if !has_name(&digests, &lock) {
        return Ok(false);
    }
    // The file with the lock is removed last. As long as it exists, no other process can create a new one. If this
    // process is killed before it has removed this file, a later `trim` still finds the directory, because it looks for
    // this file.
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path != lock {
            remove(&path)?;
        }
    }
    remove(&lock)?;
    // This fails if another process has already created new files in the directory. In that case, the directory must
    // stay.
    _ = fs::remove_dir(dir);
    Ok(true)
}

/// Returns whether the path still leads to this open file.
fn has_name(file: &File, path: &Path) -> bool {
    let there = fs::metadata(path).and_then(|there| Ok((there, file.metadata()?)));
    there.is_ok_and(|(there, open)| (open.dev(), open.ino()) == (there.dev(), there.ino()))
}

fn none_if_missing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// How a block became ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockOrigin {
    /// The block was ready before.
    Before,
    /// The block was taken from the cache.
    Found,
    /// The block was read from the snapshot.
    Read,
}

fn open(path: &Path) -> io::Result<File> {
    state_files::open_file(path, OFlags::RDWR | OFlags::CREATE)
}

/// Returns the error for an unusable cache. `doing` is a gerund with the path, such as "reading …".
fn cache_error(error: io::Error, doing: &str) -> anyhow::Error {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => disk_error(error, doing),
        _ => anyhow::Error::from(Kind::Machine.failure(&error).hint(REMOVE_HINT)).context(doing.to_owned()),
    }
}

impl CachedSnapshot {
    /// Returns the directory, for messages.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Opens the `data` file read-only. The process that serves the disk (see the module `server`) gets this file, and
    /// reads blocks from it after they have become ready.
    pub fn reading(&self) -> std::io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.data.as_raw_fd()))
    }

    /// Returns the list of the snapshot's blocks if the list is cached.
    pub fn contents(&self) -> Option<SnapshotContents> {
        let bytes = self.read_with_digest(CONTENTS)?;
        let (size, blocks) = bytes.split_first_chunk()?;
        let blocks = BlockIndexes::deserialize_from(blocks).ok()?;
        Some(SnapshotContents { size_gib: u64::from_le_bytes(*size), blocks })
    }

    /// Caches the list of the snapshot's blocks. The list stays valid, because a snapshot never changes.
    pub fn store_contents(&self, contents: &SnapshotContents) -> Result<()> {
        let mut bytes = contents.size_gib.to_le_bytes().to_vec();
        contents.blocks.serialize_into(&mut bytes).context("serializing the block indexes")?;
        self.write_with_digest(CONTENTS, bytes)
    }

    /// Returns the blocks that the last bake of a family used, in the order of their first use. The list is empty if
    /// there was no such bake.
    pub fn used(&self, family: &str) -> Vec<u32> {
        let bytes = self.read_with_digest(&used_file(family)).unwrap_or_default();
        bytes.as_chunks().0.iter().copied().map(u32::from_le_bytes).collect()
    }

    pub fn store_used(&self, family: &str, blocks: &[u32]) -> Result<()> {
        self.write_with_digest(
            &used_file(family),
            blocks.iter().copied().flat_map(u32::to_le_bytes).collect(),
        )
    }

    fn write_with_digest(&self, name: &str, mut bytes: Vec<u8>) -> Result<()> {
        let digest = digest_of(&bytes);
        bytes.extend(digest);
        let written = temp_file::write_atomically(&self.dir.join(name), &bytes, false);
        written.map_err(|error| match hint_of(&error).is_some() {
            true => error,
            false => Kind::Machine.failure(format!("{error:#}")).hint(REMOVE_HINT).into(),
        })
    }

    /// Returns the content of a file in the directory, without the digest at the file's end. Returns `None` if the
    /// content does not match this digest.
    fn read_with_digest(&self, name: &str) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.dir.join(name)).ok()?;
        let (content, digest) = bytes.split_last_chunk::<32>()?;
        let length = content.len();
        (digest_of(content) == *digest).then(|| {
            bytes.truncate(length);
            bytes
        })
    }

    /// Returns the recorded digest of a cached block. Does not verify the block.
    pub fn digest(&self, index: u32) -> Option<Digest> {
        let mut digest = ABSENT;
        self.digests.read_exact_at(&mut digest, u64::from(index) * 32).ok()?;
        (digest != ABSENT).then_some(digest)
    }

    /// Returns the digest of a block if the block is ready, that is, if this process has verified it or has written it
    /// to the cache.
    pub fn ready(&self, index: u32) -> Option<Digest> {
        lock_mutex(&self.shared_state.ready).get(&index).copied()
    }

    /// Marks a block as not ready because it changed after it was verified.
    pub fn mark_unready(&self, index: u32) {
        lock_mutex(&self.shared_state.ready).remove(&index);
    }

    /// Makes a block ready if it is not ready yet. If the cached block matches its digest, uses this block. Otherwise
    /// calls `read`, and writes the result to the cache. If two calls for the same block are concurrent, one of them
    /// waits for the other. `to_cache_error` converts the error if the block cannot be written to the cache.
    pub fn make_ready(
        &self,
        index: u32,
        read: impl FnOnce() -> Result<(Vec<u8>, Digest)>,
        to_cache_error: impl FnOnce(io::Error) -> anyhow::Error,
    ) -> Result<(Digest, BlockOrigin)> {
        if let Some(digest) = self.ready(index) {
            return Ok((digest, BlockOrigin::Before));
        }
        let _lock = lock_mutex(&self.shared_state.locks[index as usize % LOCKS]);
        if let Some(digest) = self.ready(index) {
            return Ok((digest, BlockOrigin::Before));
        }
        let made = match self.verified(index) {
            Some(digest) => (digest, BlockOrigin::Found),
            None => {
                let (data, digest) = read()?;
                self.put(index, &data, &digest).map_err(to_cache_error)?;
                (digest, BlockOrigin::Read)
            }
        };
        lock_mutex(&self.shared_state.ready).insert(index, made.0);
        Ok(made)
    }

    /// Returns the digest of a cached block if the content of the block matches the digest.
    pub fn verified(&self, index: u32) -> Option<Digest> {
        let digest = self.digest(index)?;
        let mut data = vec![0; BLOCK];
        self.read(index, 0, &mut data).ok()?;
        (digest_of(&data) == digest).then_some(digest)
    }

    /// Fails if the kernel could not store a block that was written to the cache since this value was created.
    pub fn ensure_stored(&self) -> Result<()> {
        let result = super::fault::ensure_written(&self.data);
        if result.is_err() {
            // All blocks become unready, so that each of them is verified again before it is used. A later
            // `CachedSnapshot` could not detect this error, because the kernel reports it only through descriptors that
            // were open when it occurred.
            lock_mutex(&self.shared_state.ready).clear();
        }
        result.map_err(|error| cache_error(error, &format!("caching blocks in {}", self.dir.display())))
    }

    /// Reads bytes of a block that is ready.
    pub fn read(&self, index: u32, at: usize, buffer: &mut [u8]) -> std::io::Result<()> {
        self.data.read_exact_at(buffer, u64::from(index) * BLOCK as u64 + at as u64)
    }

    pub fn put(&self, index: u32, data: &[u8], digest: &Digest) -> std::io::Result<()> {
        self.data.write_all_at(data, u64::from(index) * BLOCK as u64)?;
        self.digests.write_all_at(digest, u64::from(index) * 32)
    }
}
