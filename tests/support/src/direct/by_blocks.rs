//! Bakes by EBS direct with the EC2-shaped server, on a machine that is not an instance.

use super::bake::expected;
use crate::Ec2World;
use crate::disk::tree::tree;
use crate::ec2_world::{Ended, HANGS};
use oven_ec2_server::{Call, Fault, ServerOptions, What};
use std::path::PathBuf;

pub fn bake(world: &Ec2World, what: &str) -> Ended {
    world.start(world.bake_blocks("image")).end(HANGS, what)
}

/// Returns the EBS and EC2 calls so far, for a message.
pub fn calls(world: &Ec2World) -> String {
    let told = |call: &Call| {
        let index = call.params.get("BlockIndex").map(|index| format!(" {index}")).unwrap_or_default();
        format!("{}{index} {}", call.action, call.answer)
    };
    world.server.calls().iter().map(told).collect::<Vec<_>>().join(", ")
}

pub fn count(world: &Ec2World, action: &str) -> usize {
    world.server.calls().iter().filter(|call| call.action == action && !call.dry_run).count()
}

/// Returns the file with the data of an image's snapshot. It includes the data of the snapshot's parent.
pub fn data(world: &Ec2World, image: &str) -> PathBuf {
    let ledger = world.server.ledger();
    let image = ledger.images.iter().find(|entry| entry.id == image).unwrap();
    let snapshot = ledger.snapshots.iter().find(|entry| entry.id == image.of).unwrap();
    snapshot.data.clone().unwrap()
}

/// Fails unless the bake made one image with the expected content, and nothing else.
pub fn assert_whole(world: &Ec2World, ended: &Ended, what: &str) {
    let told = || format!("{what}: {:?}\n{}\n{}", ended.code(), ended.err, calls(world));
    assert_eq!(ended.code(), Some(0), "{}", told());
    let image = ended.image().unwrap_or_else(|| panic!("{}", told()));
    world.assert_one(image, &told());
    assert_eq!(&tree(&data(world, image)), expected(), "{}", told());
}

/// Fails if the bake left more than one image. Then bakes again without faults.
pub fn assert_recovers(world: &Ec2World, what: &str) {
    world.server.set(|options| {
        options.faults.clear();
        options.direct = Default::default();
    });
    world.local.assert_no_traces(what);
    world.assert_no_orphans(&format!("{what}\n{}", calls(world)));
    assert_whole(world, &bake(world, what), &format!("{what}: the next bake"));
}

pub fn with(change: impl FnOnce(&mut ServerOptions)) -> Ec2World {
    let mut options = ServerOptions::default();
    change(&mut options);
    Ec2World::tiny(options)
}

pub fn faulty(faults: Vec<Fault>) -> Ec2World {
    with(|options| options.faults = faults)
}

pub fn error(code: &str) -> What {
    What::Error(code.to_owned())
}

/// Runs a bake that must succeed in spite of its faults.
pub fn assert_heals(world: &Ec2World, what: &str) {
    assert_whole(world, &bake(world, what), what);
}
