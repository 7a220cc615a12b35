//! Bakes on disks that oven serves block by block. Each test has its own region.

use crate::disk::tree::tree;
use crate::programs::test_bake;
use crate::{LocalWorld, stderr};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Returns the command of a bake. `mode` is a value for the environment: `child`, or `whole` for a snapshot without a
/// parent.
pub fn command(world: &LocalWorld, mode: &str, faults: &[String]) -> Command {
    let mut command = Command::new(test_bake());
    command.arg(world.region()).arg(world.path("image")).args(faults).current_dir(world.dir.path());
    command.env("OVEN_TEST_DIRECT", mode);
    command
}

pub fn bake(world: &LocalWorld, faults: &[String]) -> Output {
    command(world, "child", faults).output().unwrap()
}

pub fn line<'a>(output: &'a Output, word: &str) -> Option<&'a str> {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' '))
}

/// Returns the snapshot of an image, and the file with the snapshot's data.
pub fn snapshot(world: &LocalWorld, image: &str) -> (String, PathBuf) {
    let record = fs::read(world.region().join(format!("images/{image}.json"))).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    let id = record["snapshot"].as_str().unwrap().to_owned();
    let data = world.region().join(format!("snapshots/{id}.img"));
    (id, data)
}

/// Returns the snapshots that have a record in the region.
pub fn snapshots(world: &LocalWorld) -> BTreeSet<String> {
    let files = world.files();
    let ids = files.iter().filter_map(|f| f.strip_prefix("snapshots/")?.strip_suffix(".json"));
    ids.map(str::to_owned).collect()
}

/// Fails unless the region has this number of images, their snapshots, and nothing else except a cache.
pub fn assert_only(world: &LocalWorld, images: usize, what: &str) {
    let files = world.files();
    let ids = snapshots(world);
    let count = |dir: &str| files.iter().filter(|f| f.starts_with(dir) && f.ends_with(".json")).count();
    assert_eq!((count("images/"), ids.len(), count("volumes/")), (images, images, 0), "{what}: {files:#?}");
    let odd = files.iter().filter(|file| {
        let place = file.rsplit_once('/').map_or("", |(dir, _)| dir);
        let name = &file[place.len()..];
        let stem = name.trim_start_matches('/').split('.').next().unwrap();
        match place {
            "" => !matches!(file.as_str(), "region.json" | "lock"),
            "snapshots" => !ids.contains(stem) || name.ends_with(".parent"),
            "images" | "documents" | "locks" => name.contains("tmp"),
            _ => !place.starts_with("blocks/") || name.contains("tmp"),
        }
    });
    let odd: Vec<_> = odd.collect();
    assert!(odd.is_empty(), "{what}: {odd:?}");
}

/// Returns the tree of an image that is baked without faults on an attached disk. Other bakes of the tiny base are
/// compared with it.
pub fn expected() -> &'static BTreeMap<String, String> {
    static TREE: OnceLock<BTreeMap<String, String>> = OnceLock::new();
    TREE.get_or_init(|| {
        let world = LocalWorld::tiny();
        let mut attached = Command::new(test_bake());
        attached.arg(world.region()).arg(world.path("image"));
        let happy = attached.output().unwrap();
        assert_eq!(happy.status.code(), Some(0), "{}", stderr(&happy));
        let tree = tree(&snapshot(&world, line(&happy, "image").unwrap()).1);
        assert!(tree.contains_key("etc/baked") && tree.contains_key("bin/busybox"), "{tree:#?}");
        tree
    })
}

/// Fails unless the bake succeeded, its image has the same tree as a bake on an attached disk, and the region has
/// nothing else.
pub fn assert_whole(world: &LocalWorld, baked: &Output, images: usize, what: &str) {
    assert_eq!(baked.status.code(), Some(0), "{what}: {}", stderr(baked));
    let image = line(baked, "image").unwrap();
    assert_eq!(&tree(&snapshot(world, image).1), expected(), "{what}");
    assert_only(world, images, what);
}

/// Checks the state after a fault: the run left nothing on the machine, `oven sweep` cleans the region, and the next
/// bake makes a correct image.
pub fn assert_recovers(world: &LocalWorld, images: usize, what: &str) {
    world.assert_no_traces(what);
    // A record that was being written when the bake was killed does not count.
    let registered = |file: &String| file.starts_with("images/ami-") && file.ends_with(".json");
    let before: BTreeSet<String> = world.files().into_iter().filter(registered).collect();
    world.expect(0, &["sweep"]);
    let files = world.files();
    let kept: Vec<_> = files.iter().filter(|f| f.starts_with("kept/") || f.ends_with(".parent")).collect();
    assert!(kept.is_empty(), "{what}: after sweep {kept:?}");
    let snapshots = snapshots(world).len();
    assert_eq!(snapshots, before.len(), "{what}: snapshots without an image after sweep: {files:#?}");
    let next = bake(world, &[]);
    assert_whole(world, &next, images, &format!("{what}: the next bake"));
    let after: BTreeSet<String> = world.files().into_iter().filter(registered).collect();
    assert!(after.is_superset(&before), "{what}: {before:?} {after:?}");
    world.assert_no_traces(what);
}
