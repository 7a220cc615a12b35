//! Checks which blocks of a base are in the block cache of a machine that bakes by EBS direct, and which blocks are
//! read again.

use crate::Ec2World;
use oven::disk::direct::block_cache::{BlockCache, CachedSnapshot};
use oven::ids::SnapshotId;
use std::collections::BTreeSet;

/// Returns the blocks that were read since the server's list of calls was cleared.
pub fn read(world: &Ec2World) -> BTreeSet<u32> {
    let calls = world.server.ebs_calls();
    let read = calls.iter().filter(|call| call.action == "GetSnapshotBlock");
    read.map(|call| call.params["BlockIndex"].parse().unwrap()).collect()
}

/// Returns the snapshot of an image.
fn snapshot(world: &Ec2World, image: &str) -> SnapshotId {
    let ledger = world.server.ledger();
    SnapshotId(ledger.images.iter().find(|entry| entry.id == image).unwrap().of.clone())
}

/// Returns the cache entry of an image's snapshot on this machine.
fn cached(world: &Ec2World, image: &str) -> CachedSnapshot {
    let cache = BlockCache::new(&world.local.path("state/blocks"), u64::MAX);
    cache.open_snapshot(&snapshot(world, image)).unwrap()
}

/// Returns the blocks that the snapshot has.
pub fn contents(world: &Ec2World, image: &str) -> BTreeSet<u32> {
    cached(world, image).contents().expect("the list is cached").blocks.iter().collect()
}

/// Returns the blocks of the snapshot that are in the cache and undamaged.
pub fn cached_blocks(world: &Ec2World, image: &str) -> BTreeSet<u32> {
    let cached = cached(world, image);
    contents(world, image).into_iter().filter(|index| cached.verified(*index).is_some()).collect()
}

/// Checks the calls since the server's list of calls was cleared. No block in `kept` was read again. The snapshot was
/// listed only if other blocks were missing.
pub fn assert_read_once(world: &Ec2World, image: &str, kept: &BTreeSet<u32>) {
    let again = read(world);
    let rest: BTreeSet<u32> = contents(world, image).difference(kept).copied().collect();
    assert!(again.is_subset(&rest), "{again:?}, of the cache {kept:?}");
    let listed = world.server.ebs_calls().iter().any(|call| call.action == "ListSnapshotBlocks");
    assert!(!listed || !rest.is_empty(), "listed, and all is in the cache: {kept:?}");
}
