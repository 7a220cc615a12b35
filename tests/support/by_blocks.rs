//! Bakes by EBS direct on the EC2-shaped server's ground, from a machine that is no instance.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use crate::direct::expected;
use crate::ground::{Ended, Ground, HANGS};
use crate::tree::tree;
use oven_ec2_server::{Call, Fault, ServerOptions, What};
use std::path::PathBuf;

pub fn bake(ground: &Ground, what: &str) -> Ended {
    ground.start(ground.bake_blocks("image")).end(HANGS, what)
}

/// The EBS and EC2 calls so far, for a message.
pub fn calls(ground: &Ground) -> String {
    let told = |call: &Call| {
        let index = call.params.get("BlockIndex").map(|index| format!(" {index}")).unwrap_or_default();
        format!("{}{index} {}", call.action, call.answer)
    };
    ground.server.calls().iter().map(told).collect::<Vec<_>>().join(", ")
}

pub fn count(ground: &Ground, action: &str) -> usize {
    ground.server.calls().iter().filter(|call| call.action == action && !call.dry_run).count()
}

/// The file with an image's data, and with its snapshot's parent's.
pub fn data(ground: &Ground, image: &str) -> PathBuf {
    let ledger = ground.server.ledger();
    let image = ledger.images.iter().find(|entry| entry.id == image).unwrap();
    let snapshot = ledger.snapshots.iter().find(|entry| entry.id == image.of).unwrap();
    snapshot.data.clone().unwrap()
}

/// One image, right to the byte, and nothing else.
pub fn assert_whole(ground: &Ground, ended: &Ended, what: &str) {
    let told = || format!("{what}: {:?}\n{}\n{}", ended.code(), ended.err, calls(ground));
    assert_eq!(ended.code(), Some(0), "{}", told());
    let image = ended.image().unwrap_or_else(|| panic!("{}", told()));
    ground.assert_one(image, &told());
    assert_eq!(&tree(&data(ground, image)), expected(), "{}", told());
}

/// Nothing is left but an image, perhaps; and the next bake is undisturbed.
pub fn assert_recovers(ground: &Ground, what: &str) {
    ground.server.set(|options| {
        options.faults.clear();
        options.direct = Default::default();
    });
    ground.world.assert_no_traces(what);
    ground.assert_no_orphans(&format!("{what}\n{}", calls(ground)));
    assert_whole(ground, &bake(ground, what), &format!("{what}: the next bake"));
}

pub fn with(change: impl FnOnce(&mut ServerOptions)) -> Ground {
    let mut options = ServerOptions::default();
    change(&mut options);
    Ground::tiny(options)
}

pub fn faulty(faults: Vec<Fault>) -> Ground {
    with(|options| options.faults = faults)
}

pub fn error(code: &str) -> What {
    What::Error(code.to_owned())
}

/// A bake that has to heal.
pub fn heals(ground: &Ground, what: &str) {
    assert_whole(ground, &bake(ground, what), what);
}
