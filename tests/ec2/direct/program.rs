//! `disks = "direct"` in AWS: the real program, against the EC2-shaped server, in a place that is no instance: no
//! metadata service, no right to attach anything, and a state directory of its own.

use oven_ec2_server::ServerOptions;
use oven_testing::Ec2World;
use oven_testing::direct::base_cache::{assert_read_once, cached_blocks};
use oven_testing::ec2_world::{Ended, HANGS};
use oven_testing::programs::write_program;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// The plugin of the small base's system: a step that writes a file.
const PLUGIN: &str = r#"#!/bin/sh
cat > /dev/null
case $1 in
claims) echo '{"api": 1, "claim": "exact"}' ;;
plan) echo '{"api": 1, "plan": {"steps": [{"phase": "install", "why": "writing a file",
    "argv": ["/bin/sh", "-c", "echo baked > /etc/baked"], "timeout": 60}]}}' ;;
esac
"#;

/// What `oven policy` prints for such bakes.
fn policy() -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
    let output = command.args(["policy", "--disks", "direct"]).env_clear().current_dir("/").output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// `oven --cloud aws --disks direct`, where nobody answers for an instance.
fn direct(world: &Ec2World, args: &[&str]) -> Ended {
    // Its state is the test's own.
    let state = world.local.path("state");
    std::fs::create_dir_all(&state).unwrap();
    direct_after(world, "mkdir -p /var/lib/oven && mount --bind \"$0\" /var/lib/oven", &state, args)
}

/// Runs the program after a script, whose mounts only the program sees. `$0` of the script is `path`.
fn direct_after(world: &Ec2World, script: &str, path: &Path, args: &[&str]) -> Ended {
    let script = format!("{script} && exec \"$@\"");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .arg(path)
        .args([env!("CARGO_BIN_EXE_oven"), "--cloud", "aws", "--disks", "direct"])
        .args(args)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", world.local.dir.path())
        .env("AWS_ENDPOINT_URL", world.server.endpoint())
        .env("AWS_REGION", "us-east-1")
        .env("AWS_ACCESS_KEY_ID", "AKIDTEST")
        .env("AWS_SECRET_ACCESS_KEY", "secret")
        // Nobody is there.
        .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
        .current_dir(world.local.dir.path());
    world.start(command).end(HANGS, "oven --disks direct")
}

fn good(world: &Ec2World, args: &[&str]) -> Ended {
    let ended = direct(world, args);
    let calls: Vec<_> =
        world.server.calls().iter().map(|call| format!("{} {}", call.action, call.answer)).collect();
    assert_eq!(ended.code(), Some(0), "oven {args:?}\n{}\n{}\n{calls:?}", ended.out, ended.err);
    ended
}

fn bake(world: &Ec2World) -> Ended {
    let path = world.local.path("plugin");
    if !path.exists() {
        write_program(&path, PLUGIN);
    }
    good(world, &["--plugin", path.to_str().unwrap(), "bake", "image"])
}

fn count(world: &Ec2World, action: &str) -> usize {
    world.server.calls().iter().filter(|call| call.action == action).count()
}

#[test]
fn bakes_on_no_instance_and_without_a_right_to_attach() {
    let world = Ec2World::tiny(ServerOptions { policy: Some(policy()), ..ServerOptions::default() });
    let base = world.base();
    world.define(&base, "[[file]]\nsource = \"told\"\ntarget = \"/etc/told\"\n");
    world.local.write("image/told", "one");
    let first = bake(&world);
    world.assert_one(first.out.trim(), "the first");
    let (read, written) = (count(&world, "GetSnapshotBlock"), count(&world, "PutSnapshotBlock"));
    assert!(read > 0 && written > 0, "{read} {written}");
    // Again, with a warm cache: nothing is listed or read that was before. (A prefetch that was
    // under way as the first bake ended may be repeated.)
    let kept = cached_blocks(&world, &base);
    assert!(!kept.is_empty());
    world.server.forget_calls();
    world.local.write("image/told", "two");
    let second = bake(&world);
    assert_ne!(second.out, first.out);
    assert_read_once(&world, &base, &kept);
    assert!(count(&world, "PutSnapshotBlock") > 0);
    let asked: BTreeSet<String> = world.server.calls().into_iter().map(|call| call.action).collect();
    for action in ["CreateVolume", "AttachVolume", "DescribeInstances", "CreateSnapshot", "CopySnapshot"] {
        assert!(!asked.contains(action), "{asked:?}");
    }
    // And a hit.
    world.server.forget_calls();
    let third = bake(&world);
    assert_eq!((third.out, count(&world, "StartSnapshot")), (second.out, 0));
    let made = world.made();
    assert_eq!((made.images.len(), made.snapshots.len(), made.volumes.len()), (2, 2, 0), "{made:#?}");
    let refused = world
        .server
        .calls()
        .into_iter()
        .find(|call| call.answer.contains("Unauthorized") || call.answer.contains("AccessDenied"));
    assert!(refused.is_none(), "{refused:?}");
    good(&world, &["sweep"]);
    assert_eq!(world.made(), made);
    world.local.assert_no_traces("all of it");
}

#[test]
fn doctor_asks_for_no_instance_and_says_what_it_cannot_judge() {
    let world = Ec2World::tiny(ServerOptions { policy: Some(policy()), ..ServerOptions::default() });
    let ended = good(&world, &["doctor"]);
    for line in ["ok     credentials AKIDTEST\n", "ok     EC2 in us-east-1\n", "ok     permitted: "] {
        assert!(ended.out.contains(line), "no {line:?} in {}", ended.out);
    }
    let perhaps = ended.out.lines().find(|line| line.contains("ebs:PutSnapshotBlock")).unwrap();
    assert!(perhaps.starts_with("note   perhaps permitted: ") && perhaps.contains("no DryRun"), "{perhaps}");
    assert!(!ended.out.contains("NVMe") && !ended.out.contains("AttachVolume"), "{}", ended.out);
    assert_eq!(world.made(), Default::default());
}

#[test]
fn the_state_directory_is_private_and_no_link_in_it_is_followed() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    fn assert_private(path: &Path) {
        let mode = path.symlink_metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{} is open to others: {mode:o}", path.display());
        if path.is_dir() {
            path.read_dir().unwrap().for_each(|entry| assert_private(&entry.unwrap().path()));
        }
    }
    let world = Ec2World::tiny(ServerOptions { policy: Some(policy()), ..ServerOptions::default() });
    world.define(&world.base(), "");
    let state = world.local.path("state");
    // An older oven made them.
    for dir in ["", "logs", "locks"] {
        std::fs::create_dir_all(state.join(dir)).unwrap();
        std::fs::set_permissions(state.join(dir), PermissionsExt::from_mode(0o755)).unwrap();
    }
    bake(&world);
    for part in ["logs", "locks", "blocks"] {
        assert!(state.join(part).is_dir(), "{part}");
    }
    assert_private(&state);
    let (made, precious) = (world.made(), world.local.path("precious"));
    std::fs::create_dir(&precious).unwrap();
    std::fs::remove_dir(state.join("locks")).unwrap();
    symlink(&precious, state.join("locks")).unwrap();
    world.local.write("image/new", "x");
    let plugin = world.local.path("plugin");
    let refused = direct(&world, &["--plugin", plugin.to_str().unwrap(), "bake", "image"]);
    assert_eq!(refused.code(), Some(8), "{}", refused.err);
    assert!(refused.err.contains("/var/lib/oven/locks is a link or a file"), "{}", refused.err);
    assert_eq!((world.made(), precious.read_dir().unwrap().count()), (made.clone(), 0));

    // The state directory itself is a link.
    let lib = world.local.path("lib");
    std::fs::create_dir(&lib).unwrap();
    symlink(&precious, lib.join("oven")).unwrap();
    std::fs::set_permissions(&precious, PermissionsExt::from_mode(0o755)).unwrap();
    let refused = direct_after(&world, "mount --bind \"$0\" /var/lib", &lib, &["bake", "image"]);
    assert_eq!(refused.code(), Some(8), "{}", refused.err);
    assert!(refused.err.contains("/var/lib/oven is a link or a file"), "{}", refused.err);
    assert_eq!((world.made(), precious.read_dir().unwrap().count()), (made, 0));
    assert_eq!(precious.metadata().unwrap().permissions().mode() & 0o777, 0o755, "its mode was changed");
}
