//! What the cache of a machine that bakes by EBS direct holds of a base, and what is read of it again.

use crate::ground::Ground;
use oven::disk::direct::block_cache::{Cache, Cached};
use oven::ids::SnapshotId;
use std::collections::BTreeSet;

/// The blocks that were read since calls were forgotten.
pub fn read(ground: &Ground) -> BTreeSet<u32> {
    let calls = ground.server.ebs_calls();
    let read = calls.iter().filter(|call| call.action == "GetSnapshotBlock");
    read.map(|call| call.params["BlockIndex"].parse().unwrap()).collect()
}

/// The snapshot that an image is of.
fn snapshot(ground: &Ground, image: &str) -> SnapshotId {
    let ledger = ground.server.ledger();
    SnapshotId(ledger.images.iter().find(|entry| entry.id == image).unwrap().of.clone())
}

/// What this machine's cache knows of an image's snapshot.
fn cached(ground: &Ground, image: &str) -> Cached {
    let cache = Cache::new(&ground.world.path("state/blocks"), u64::MAX);
    cache.of(&snapshot(ground, image)).unwrap()
}

/// The blocks that the snapshot has.
pub fn contents(ground: &Ground, image: &str) -> BTreeSet<u32> {
    cached(ground, image).contents().expect("the list is kept").blocks.iter().collect()
}

/// Those that are in the cache, and are what they were.
pub fn kept(ground: &Ground, image: &str) -> BTreeSet<u32> {
    let cached = cached(ground, image);
    contents(ground, image).into_iter().filter(|index| cached.verified(*index).is_some()).collect()
}

/// Since calls were forgotten, nothing was read of what was in the cache then, and nothing is listed but for the rest.
pub fn assert_read_once(ground: &Ground, image: &str, kept: &BTreeSet<u32>) {
    let again = read(ground);
    let rest: BTreeSet<u32> = contents(ground, image).difference(kept).copied().collect();
    assert!(again.is_subset(&rest), "{again:?}, of the cache {kept:?}");
    let listed = ground.server.ebs_calls().iter().any(|call| call.action == "ListSnapshotBlocks");
    assert!(!listed || !rest.is_empty(), "listed, and all is in the cache: {kept:?}");
}
