use super::*;

fn snapshot(n: u32) -> SnapshotId {
    SnapshotId(format!("snap-{n:017x}"))
}

#[test]
fn blocks_are_cached_and_changed_ones_are_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let cache = BlockCache::new(dir.path(), u64::MAX);
    let data = vec![7; BLOCK];
    cache.open_snapshot(&snapshot(1)).unwrap().put(3, &data, &digest_of(&data)).unwrap();
    let cached = cache.open_snapshot(&snapshot(1)).unwrap();
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
    assert_eq!(cache.open_snapshot(&snapshot(2)).unwrap().verified(3), None);
}

#[test]
fn indexes_and_used_blocks_are_cached_and_damaged_files_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let cache = BlockCache::new(dir.path(), u64::MAX);
    let cached = cache.open_snapshot(&snapshot(1)).unwrap();
    assert_eq!((cached.contents(), cached.used("web")), (None, vec![]));
    let contents = SnapshotContents { size_gib: 8, blocks: [0, 7, 16383].into() };
    cached.store_contents(&contents).unwrap();
    cached.store_used("../web", &[7, 0]).unwrap();
    assert_eq!(cache.open_snapshot(&snapshot(1)).unwrap().contents(), Some(contents));
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
    // A snapshot of 16 TiB that has all blocks has the longest list.
    let all = SnapshotContents { size_gib: 16 << 10, blocks: (0..1 << 25).collect() };
    cached.store_contents(&all).unwrap();
    assert!(cached.dir.join(CONTENTS).metadata().unwrap().len() < 8 << 20);
    assert_eq!(cached.contents(), Some(all));
    cached.data.write_all_at(b"x", 0).unwrap();
    assert!(cached.reading().unwrap().write_all_at(b"y", 0).is_err());
}

#[test]
fn the_least_recently_used_is_evicted_and_snapshots_in_use_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let data = vec![7; BLOCK];
    // The cache's limit is two and a half blocks.
    let cache = BlockCache::new(dir.path(), BLOCK as u64 * 5 / 2);
    let there = || {
        let names = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> =
            names.map(|name| name.trim_start_matches("snap-0").parse::<u32>().unwrap()).collect();
        names.sort();
        names
    };
    let used = |n: u32, ago: u64| {
        let cached = cache.open_snapshot(&snapshot(n)).unwrap();
        cached.put(0, &data, &digest_of(&data)).unwrap();
        cached.store_contents(&SnapshotContents { size_gib: 1, blocks: [0].into() }).unwrap();
        cached.digests.set_modified(SystemTime::now() - std::time::Duration::from_secs(ago)).unwrap();
        cached
    };
    let first = used(1, 300);
    let _copy = first.digests.try_clone().unwrap(); // a child process that is being started has a copy
    drop((first, used(2, 100)));
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
fn on_a_full_disk_unused_snapshots_are_evicted() {
    let dir = tempfile::tempdir().unwrap();
    let data = vec![7; BLOCK];
    let mut cache = BlockCache::new(dir.path(), u64::MAX);
    let put = |cache: &BlockCache, n| {
        let cached = cache.open_snapshot(&snapshot(n)).unwrap();
        cached.put(0, &data, &digest_of(&data)).unwrap();
        cached
    };
    let there = || dir.path().read_dir().unwrap().count();
    drop(put(&cache, 1));
    let in_use = put(&cache, 2);
    cache.trim().unwrap();
    assert_eq!(there(), 2);
    // The free space is one block less than the reserved space.
    cache.free = |_| Some(RESERVED_SPACE - BLOCK as u64);
    cache.trim().unwrap();
    assert_eq!((there(), in_use.verified(0)), (1, Some(digest_of(&data))));
    drop(in_use);
    cache.free = |_| Some(0);
    cache.trim().unwrap();
    assert_eq!(there(), 0);
}

#[test]
fn concurrent_eviction_and_opening_do_not_interfere() {
    let dir = tempfile::tempdir().unwrap();
    let cache = BlockCache::new(dir.path(), 0);
    let data = vec![7; BLOCK];
    std::thread::scope(|scope| {
        for n in 0..4 {
            let (cache, data) = (&cache, &data);
            scope.spawn(move || {
                for round in 0..300 {
                    let cached = cache.open_snapshot(&snapshot((n + round) % 3)).unwrap();
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
fn leftovers_of_an_interrupted_eviction_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let data = vec![7; BLOCK];
    let cached = BlockCache::new(dir.path(), u64::MAX).open_snapshot(&snapshot(1)).unwrap();
    cached.put(0, &data, &digest_of(&data)).unwrap();
    cached.store_contents(&SnapshotContents { size_gib: 1, blocks: [0].into() }).unwrap();
    let place = cached.dir.clone();
    drop(cached);
    // The file with the lock must exist until all other files are removed.
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
fn an_unusable_cache_is_a_machine_failure_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let cache = BlockCache::new(dir.path(), u64::MAX);
    let place = dir.path().join(snapshot(1).0);
    fs::create_dir_all(place.join(DATA)).unwrap();
    let ensure_told = |error: anyhow::Error| {
        let text = format!("{error:#}");
        assert_eq!(Kind::of(&error), Kind::Machine, "{text}");
        assert!(text.contains(place.to_str().unwrap()), "{text}");
        assert!(error.chain().any(|cause| cause.to_string().contains("Is a directory")), "{text}");
    };
    ensure_told(cache.open_snapshot(&snapshot(1)).unwrap_err());
    fs::remove_dir(place.join(DATA)).unwrap();
    let cached = cache.open_snapshot(&snapshot(1)).unwrap();
    fs::create_dir(place.join(CONTENTS)).unwrap();
    let contents = SnapshotContents { size_gib: 1, blocks: [0].into() };
    assert_eq!(cached.contents(), None);
    ensure_told(cached.store_contents(&contents).unwrap_err());
}
