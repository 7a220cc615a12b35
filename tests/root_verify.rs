//! `oven bake --verify`, and what becomes of what was baked: out by `oven export`, and in again.

#[path = "support/world.rs"]
mod world;

use std::os::unix::fs::FileExt;
use world::World;

fn small() -> World {
    let base = std::env::var_os("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test root");
    let world = World::empty();
    world.expect(0, &["import", base.to_str().unwrap(), "--name", "small"]);
    world.write(
        "web/image.toml",
        "from = { name = \"small\" }\n[[file]]\nsource = \"f\"\ntarget = \"/etc/f\"\n",
    );
    world.write("web/f", "text\n");
    world
}

fn snapshot_of(world: &World, ami: &str) -> String {
    let (out, _) = world.expect(0, &["--json", "images", "show", ami.trim()]);
    let object: serde_json::Value = serde_json::from_str(out.trim()).unwrap();
    object["snapshot"].as_str().unwrap().to_owned()
}

#[test]
fn a_bake_is_read_back_where_it_was_sent_and_comes_out_whole() {
    let world = small();
    let (out, err) = world.expect(2, &["--disks", "attached", "bake", "--verify", "web"]);
    assert!(out.is_empty() && err.contains("--verify") && err.contains("--disks direct"), "{err}");
    let (ami, err) = world.expect(0, &["--disks", "direct", "bake", "--verify", "web"]);
    let snapshot = snapshot_of(&world, &ami);
    assert!(err.contains(&format!("reading {snapshot} back")), "{err}");
    world.assert_no_traces("after the bake");

    // All of it: the base's blocks, and those that were sent.
    world.expect(0, &["export", ami.trim(), "web.raw"]);
    let exported = std::fs::File::open(world.path("web.raw")).unwrap();
    let data = world.region().join("snapshots").join(format!("{snapshot}.img"));
    let data = std::fs::File::open(data).unwrap();
    let length = data.metadata().unwrap().len();
    assert_eq!(exported.metadata().unwrap().len(), length);
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..length).step_by(ours.len()) {
        data.read_exact_at(&mut ours, at).unwrap();
        exported.read_exact_at(&mut theirs, at).unwrap();
        assert!(ours == theirs, "they differ in the MiB at {at}");
    }
    // A base like any other.
    world.expect(0, &["import", "web.raw", "--name", "again", "--verify"]);
    world.write(
        "web/image.toml",
        "name = \"web\"\nfrom = { name = \"again\" }\n[[test]]\nscript = \"t.sh\"\n",
    );
    world.write("web/t.sh", "#!/bin/sh\ntest \"$(cat /etc/f)\" = text\n");
    world.expect(0, &["bake", "web"]);
    world.assert_no_traces("after all");
}
