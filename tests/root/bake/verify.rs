//! `oven bake --verify`, and what becomes of what was baked: out by `oven export`, and in again.

use oven::sys::{loop_device, sparse_copy, tasks};
use oven::transfer::raw::RawDisk;
use oven::transfer::readers::BlockSource;
use oven::transfer::upload::digests;
use oven_testing::LocalWorld;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

fn small() -> LocalWorld {
    let base = std::env::var_os("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test root");
    let world = LocalWorld::empty();
    world.expect(0, &["import", base.to_str().unwrap(), "--name", "small"]);
    world.write(
        "web/image.toml",
        "from = { name = \"small\" }\n[[file]]\nsource = \"f\"\ntarget = \"/etc/f\"\n",
    );
    world.write("web/f", "text\n");
    world
}

fn snapshot_of(world: &LocalWorld, ami: &str) -> String {
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
    assert!(err.contains(&format!("verifying {snapshot}")), "{err}");
    world.assert_no_traces("after the bake");

    // All of it: the base's blocks, and those that were sent.
    world.expect(0, &["export", ami.trim(), "web.raw"]);
    let exported = File::open(world.path("web.raw")).unwrap();
    let data = world.region().join("snapshots").join(format!("{snapshot}.img"));
    let data = File::open(data).unwrap();
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

/// A device has no times that show a change: it is read again.
#[tokio::test]
async fn a_device_is_read_again_before_what_was_sent_counts() {
    let world = small();
    let base = std::env::var_os("OVEN_TEST_TINY").unwrap();
    let dir = world.dir.path().to_owned();
    let copied = tasks::run(move |stop| {
        let base = File::open(base)?;
        sparse_copy::copy(&base, sparse_copy::length(&base)?, &dir, stop)
    });
    let copied = copied.await.unwrap();
    let device = loop_device::attach(copied.file(), "oven-test").unwrap();
    let path = device.path.to_str().unwrap();
    let (there, _) = world.expect(0, &["images", "list", "small"]);
    let (ami, err) = world.expect(0, &["import", path, "--name", "small", "--verify"]);
    assert!(there.starts_with(ami.trim()) && err.contains("was already imported from this disk"), "{err}");

    let raw = Arc::new(RawDisk::new(File::open(path).unwrap(), &device.path).unwrap());
    let sent = digests(raw.clone()).await.unwrap();
    raw.ensure_unchanged(&sent).unwrap();
    let node = File::from(device.node.try_clone().unwrap());
    let (block, _) = sent.last_key_value().unwrap();
    node.write_all_at(b"changed", u64::from(*block) << 19).unwrap();
    let error = raw.ensure_unchanged(&sent).unwrap_err();
    assert_eq!(error.to_string(), format!("{path} was changed while it was read"));
}
