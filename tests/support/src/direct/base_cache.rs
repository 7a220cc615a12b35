//! What the cache of a machine that bakes by EBS direct holds of a base, and what is read of it again.

use crate::Ec2World;
use oven::disk::direct::block_cache::{BlockCache, CachedSnapshot};
use oven::ids::SnapshotId;
use std::collections::BTreeSet;

/// The blocks that were read since calls were forgotten.
pub fn read(world: &Ec2World) -> BTreeSet<u32> {
    let calls = world.server.ebs_calls();
    let read = calls.iter().filter(|call| call.action == "GetSnapshotBlock");
    read.map(|call| call.params["BlockIndex"].parse().unwrap()).collect()
}

/// The snapshot that an image is of.
fn snapshot(world: &Ec2World, image: &str) -> SnapshotId {
    let ledger = world.server.ledger();
    SnapshotId(ledger.images.iter().find(|entry| entry.id == image).unwrap().of.clone())
}

/// What this machine's cache knows of an image's snapshot.
fn cached(world: &Ec2World, image: &str) -> CachedSnapshot {
    let cache = BlockCache::new(&world.local.path("state/blocks"), u64::MAX);
    cache.of(&snapshot(world, image)).unwrap()
}

/// The blocks that the snapshot has.
pub fn contents(world: &Ec2World, image: &str) -> BTreeSet<u32> {
    cached(world, image).contents().expect("the list is cached").blocks.iter().collect()
}

/// Those that are in the cache, and are what they were.
pub fn cached_blocks(world: &Ec2World, image: &str) -> BTreeSet<u32> {
    let cached = cached(world, image);
    contents(world, image).into_iter().filter(|index| cached.verified(*index).is_some()).collect()
}

/// Since calls were forgotten, nothing was read of what was in the cache then, and nothing is listed but for the rest.
pub fn assert_read_once(world: &Ec2World, image: &str, kept: &BTreeSet<u32>) {
    let again = read(world);
    let rest: BTreeSet<u32> = contents(world, image).difference(kept).copied().collect();
    assert!(again.is_subset(&rest), "{again:?}, of the cache {kept:?}");
    let listed = world.server.ebs_calls().iter().any(|call| call.action == "ListSnapshotBlocks");
    assert!(!listed || !rest.is_empty(), "listed, and all is in the cache: {kept:?}");
}
