use super::*;
use crate::disk::direct::block_cache::BlockCache;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A base whose block n is filled with the byte n. It counts the reads.
#[derive(Default)]
struct Base {
    reads: AtomicU32,
    fails: bool,
}
impl SnapshotReader for Base {
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        anyhow::ensure!(!self.fails, "the network is away");
        let data = vec![index as u8; BLOCK];
        let digest = digest_of(&data);
        Ok((data, digest))
    }
}

/// Creates a backing store that shares no state in memory with others, as if it were in another process.
fn lower(dir: &Path, base: &Arc<Base>) -> Arc<BackingStore> {
    lower_of(&BlockCache::new(dir, u64::MAX), base)
}

fn lower_of(cache: &BlockCache, base: &Arc<Base>) -> Arc<BackingStore> {
    let snapshot = SnapshotId("snap-1".into());
    let contents = SnapshotContents { size_gib: 1, blocks: [1, 2, 3, 4, 5, 6, 9, 100].into() };
    let cached = cache.open_snapshot(&snapshot).unwrap();
    Arc::new(BackingStore::new(&snapshot, &contents, base.clone(), cached))
}

/// Requests blocks as the process that serves a disk does.
fn ask(lower: &Arc<BackingStore>, words: &[BlockMessage]) -> Vec<BlockMessage> {
    let (flags, kind) = (SocketFlags::CLOEXEC, SocketType::SEQPACKET);
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
    lower.start_threads(&Arc::new(theirs), Path::new("/place")).unwrap();
    words.iter().for_each(|word| send(&ours, *word).unwrap());
    let answers = words.iter().filter(|(index, _)| *index != WRITE_FAILED);
    let mut answers: Vec<_> = answers.map(|_| receive(&ours).unwrap()).collect();
    answers.sort();
    answers
}

fn soon(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_block_is_read_once_and_the_next_run_finds_it_in_the_cache() {
    let (dir, base) = (tempfile::tempdir().unwrap(), Arc::new(Base::default()));
    let first = lower(dir.path(), &base);
    assert_eq!(first.fetch(3).unwrap(), digest_of(&vec![3; BLOCK]));
    first.fetch(3).unwrap();
    assert_eq!(first.block(3).unwrap().0, vec![3; BLOCK]);
    assert!(first.fetch(7).is_err(), "the base has no such block");
    let next = lower(dir.path(), &base);
    next.fetch(3).unwrap();
    assert_eq!(base.reads.load(Ordering::SeqCst), 1);
    assert!(first.used().is_empty() && next.used().is_empty(), "they were not used");
}

#[test]
fn concurrent_requests_of_a_block_wait_for_one_read() {
    let (dir, base) = (tempfile::tempdir().unwrap(), Arc::new(Base::default()));
    let lower = lower(dir.path(), &base);
    std::thread::scope(|scope| (0..16).for_each(|_| _ = scope.spawn(|| lower.fetch(5).unwrap())));
    assert_eq!(base.reads.load(Ordering::SeqCst), 1);
}

#[test]
fn a_bit_that_flipped_in_the_cache_is_not_served() {
    use std::os::unix::fs::FileExt;
    let (dir, base) = (tempfile::tempdir().unwrap(), Arc::new(Base::default()));
    lower(dir.path(), &base).fetch(3).unwrap();
    let data = std::fs::File::options().write(true).open(dir.path().join("snap-1/data")).unwrap();
    data.write_all_at(&[2], 3 * BLOCK as u64 + 1234).unwrap();
    let next = lower(dir.path(), &base);
    assert_eq!(next.block(3).unwrap().0, vec![3; BLOCK]);
    assert_eq!(base.reads.load(Ordering::SeqCst), 2);
    // The block changed after it was verified, so it is not uploaded.
    data.write_all_at(&[2], 3 * BLOCK as u64 + 1234).unwrap();
    assert!(next.block(3).unwrap_err().to_string().contains("changed"));
}

#[test]
fn bakes_of_one_process_read_and_verify_a_block_once() {
    use std::os::unix::fs::FileExt;
    let (dir, base) = (tempfile::tempdir().unwrap(), Arc::new(Base::default()));
    let cache = BlockCache::new(dir.path(), u64::MAX);
    let reads = || base.reads.load(Ordering::SeqCst);
    let bakes: Vec<_> = (0..8).map(|_| lower_of(&cache, &base)).collect();
    std::thread::scope(|scope| bakes.iter().for_each(|bake| _ = scope.spawn(|| bake.fetch(5).unwrap())));
    assert_eq!(reads(), 1);
    let next = lower_of(&cache, &base);
    assert!(next.cached().ready(5).is_some() && next.cached().ready(6).is_none());
    // The block is verified again when one of the bakes uploads it.
    let data = dir.path().join("snap-1/data");
    let flip = || {
        let data = std::fs::File::options().write(true).open(&data).unwrap();
        data.write_all_at(&[2], 5 * BLOCK as u64 + 1234).unwrap();
    };
    flip();
    assert!(next.block(5).unwrap_err().to_string().contains("changed"));
    let another = lower_of(&cache, &base);
    assert_eq!((another.block(5).unwrap().0, reads()), (vec![5; BLOCK], 2), "it is read again");
    flip();
    // All these bakes have ended, so a bake that starts now verifies the block again.
    drop((bakes, next, another));
    let later = lower_of(&cache, &base);
    assert!(later.cached().ready(5).is_none());
    assert_eq!((later.block(5).unwrap().0, reads()), (vec![5; BLOCK], 3));
    // The file is replaced by another one with the same name, so the next bake verifies the block again.
    std::fs::rename(&data, dir.path().join("away")).unwrap();
    std::fs::copy(dir.path().join("away"), &data).unwrap();
    flip();
    let other = lower_of(&cache, &base);
    assert!(other.cached().ready(5).is_none() && later.cached().ready(5).is_some());
    assert_eq!((other.block(5).unwrap().0, reads()), (vec![5; BLOCK], 4));
}

#[test]
fn used_blocks_are_recorded_in_order_and_following_ones_prefetched() {
    let (dir, base) = (tempfile::tempdir().unwrap(), Arc::new(Base::default()));
    let lower = lower(dir.path(), &base);
    assert_eq!(ask(&lower, &[(2, 0)]), [(2, 0)]);
    assert_eq!(ask(&lower, &[(100, 0)]), [(100, 0)]);
    assert_eq!(ask(&lower, &[(2, 0)]), [(2, 0)]);
    assert_eq!(lower.used(), [2, 100]);
    soon("3 to 6 are prefetched", || base.reads.load(Ordering::SeqCst) == 6);
    lower.queue_prefetch([9, 8, 2]);
    soon("9 is read; there is no 8", || base.reads.load(Ordering::SeqCst) == 7);
    assert_eq!(lower.used(), [2, 100], "prefetched blocks do not count as used");
    lower.stop_prefetching();
    assert!(lower.trouble().take().is_none());
}

#[test]
fn prefetching_leaves_space_for_what_a_bake_writes() {
    let (dir, base) = (tempfile::tempdir().unwrap(), Arc::new(Base::default()));
    lower(dir.path(), &base).fetch(5).unwrap();
    let mut lower = lower(dir.path(), &base);
    Arc::get_mut(&mut lower).unwrap().free = |_| Some(RESERVED_SPACE - 1);
    assert_eq!(ask(&lower, &[(2, 0)]), [(2, 0)], "requested blocks are read");
    lower.queue_prefetch([9, 5]);
    soon("cached blocks need no more space", || lower.cached().ready(5).is_some());
    assert_eq!(base.reads.load(Ordering::SeqCst), 2, "5 and 2, and nothing is prefetched");
    lower.stop_prefetching();
}

#[test]
fn an_error_of_reading_or_storing_is_reported_once() {
    let (dir, base) = (tempfile::tempdir().unwrap(), Arc::new(Base { fails: true, ..Base::default() }));
    let lower = lower(dir.path(), &base);
    lower.queue_prefetch([9]);
    assert_eq!(ask(&lower, &[(100, 0)]), [(100, libc::EIO)]);
    let told = format!("{:#}", lower.trouble().take().unwrap());
    assert_eq!(told, "reading block 100 of snap-1: the network is away");
    assert!(lower.trouble().take().is_none());
    assert_eq!(ask(&lower, &[(WRITE_FAILED, libc::ENOSPC)]), []);
    let told = Mutex::default();
    soon("it is reported", || {
        *lock_mutex(&told) = lower.trouble().take().map(|error| format!("{error:#}"));
        lock_mutex(&told).is_some()
    });
    let told = told.into_inner().unwrap().unwrap();
    assert!(told.starts_with("storing the disk's changes in /place: No space left"), "{told}");
}

/// A base whose reads never end.
struct Silent;
impl SnapshotReader for Silent {
    fn read(&self, _: u32) -> Result<(Vec<u8>, Digest)> {
        loop {
            std::thread::park();
        }
    }
}

#[test]
fn a_stop_answers_all_requests() {
    let (dir, snapshot) = (tempfile::tempdir().unwrap(), SnapshotId("snap-1".into()));
    let contents = SnapshotContents { size_gib: 1, blocks: [1, 2].into() };
    let cached = BlockCache::new(dir.path(), u64::MAX).open_snapshot(&snapshot).unwrap();
    let lower = Arc::new(BackingStore::new(&snapshot, &contents, Arc::new(Silent), cached));
    let stopped = lower.clone();
    let waits = move || !lock_mutex(&stopped.requests).blocks.is_empty();
    let stopper = {
        let lower = lower.clone();
        std::thread::spawn(move || {
            soon("it waits", waits);
            lower.stop();
        })
    };
    assert_eq!(ask(&lower, &[(1, 0)]), [(1, libc::EIO)]);
    stopper.join().unwrap();
    assert_eq!(ask(&lower, &[(2, 0)]), [(2, libc::EIO)]);
    assert!(lower.trouble().take().is_none(), "a stop is no fault");
}
