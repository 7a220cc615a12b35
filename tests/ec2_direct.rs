//! `disks = "direct"` in AWS: the real program, against the EC2-shaped server, in a place that is no instance: no
//! metadata service, no right to attach anything, and a state directory of its own.

#[path = "support/cached.rs"]
mod cached;
#[path = "support/ground.rs"]
mod ground;
#[path = "support/world.rs"]
mod world;

use cached::{assert_read_once, kept};
use ground::{Ended, Ground, HANGS};
use oven_ec2_server::ServerOptions;
use serde_json::Value;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
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
fn direct(ground: &Ground, args: &[&str]) -> Ended {
    // What it keeps is the test's own.
    let state = ground.world.path("state");
    std::fs::create_dir_all(&state).unwrap();
    let script = "mkdir -p /var/lib/oven && mount --bind \"$0\" /var/lib/oven && exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(&state)
        .args([env!("CARGO_BIN_EXE_oven"), "--cloud", "aws", "--disks", "direct"])
        .args(args)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", ground.world.dir.path())
        .env("AWS_ENDPOINT_URL", ground.server.endpoint())
        .env("AWS_REGION", "us-east-1")
        .env("AWS_ACCESS_KEY_ID", "AKIDTEST")
        .env("AWS_SECRET_ACCESS_KEY", "secret")
        // Nobody is there.
        .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
        .current_dir(ground.world.dir.path());
    ground.start(command).end(HANGS, "oven --disks direct")
}

fn good(ground: &Ground, args: &[&str]) -> Ended {
    let ended = direct(ground, args);
    let calls: Vec<_> =
        ground.server.calls().iter().map(|call| format!("{} {}", call.action, call.answer)).collect();
    assert_eq!(ended.code(), Some(0), "oven {args:?}\n{}\n{}\n{calls:?}", ended.out, ended.err);
    ended
}

fn bake(ground: &Ground) -> Ended {
    let path = ground.world.path("plugin");
    if !path.exists() {
        std::fs::write(&path, PLUGIN).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    good(ground, &["--plugin", path.to_str().unwrap(), "bake", "image"])
}

fn count(ground: &Ground, action: &str) -> usize {
    ground.server.calls().iter().filter(|call| call.action == action).count()
}

#[test]
fn bakes_on_no_instance_and_without_a_right_to_attach() {
    let ground = Ground::tiny(ServerOptions { policy: Some(policy()), ..ServerOptions::default() });
    let base = ground.base();
    ground.define(&base, "[[file]]\nsource = \"told\"\ntarget = \"/etc/told\"\n");
    ground.world.write("image/told", "one");
    let first = bake(&ground);
    ground.assert_one(first.out.trim(), "the first");
    let (read, written) = (count(&ground, "GetSnapshotBlock"), count(&ground, "PutSnapshotBlock"));
    assert!(read > 0 && written > 0, "{read} {written}");
    // Once more, with a warm cache: nothing is listed or read that was before. (What is read ahead of need, and was under
    // way as the first bake ended, may be.)
    let kept = kept(&ground, &base);
    assert!(!kept.is_empty());
    ground.server.forget_calls();
    ground.world.write("image/told", "two");
    let second = bake(&ground);
    assert_ne!(second.out, first.out);
    assert_read_once(&ground, &base, &kept);
    assert!(count(&ground, "PutSnapshotBlock") > 0);
    let asked: BTreeSet<String> = ground.server.calls().into_iter().map(|call| call.action).collect();
    for action in ["CreateVolume", "AttachVolume", "DescribeInstances", "CreateSnapshot", "CopySnapshot"] {
        assert!(!asked.contains(action), "{asked:?}");
    }
    // And a hit.
    ground.server.forget_calls();
    let third = bake(&ground);
    assert_eq!((third.out, count(&ground, "StartSnapshot")), (second.out, 0));
    let made = ground.made();
    assert_eq!((made.images.len(), made.snapshots.len(), made.volumes.len()), (2, 2, 0), "{made:#?}");
    let refused = ground
        .server
        .calls()
        .into_iter()
        .find(|call| call.answer.contains("Unauthorized") || call.answer.contains("AccessDenied"));
    assert!(refused.is_none(), "{refused:?}");
    good(&ground, &["sweep"]);
    assert_eq!(ground.made(), made);
    ground.world.assert_no_traces("all of it");
}

#[test]
fn doctor_asks_for_no_instance_and_says_what_it_cannot_judge() {
    let ground = Ground::tiny(ServerOptions { policy: Some(policy()), ..ServerOptions::default() });
    let ended = good(&ground, &["doctor"]);
    for line in ["ok     credentials AKIDTEST\n", "ok     EC2 in us-east-1\n", "ok     permitted: "] {
        assert!(ended.out.contains(line), "no {line:?} in {}", ended.out);
    }
    let perhaps = ended.out.lines().find(|line| line.contains("ebs:PutSnapshotBlock")).unwrap();
    assert!(perhaps.starts_with("note   perhaps permitted: ") && perhaps.contains("no DryRun"), "{perhaps}");
    assert!(!ended.out.contains("NVMe") && !ended.out.contains("AttachVolume"), "{}", ended.out);
    assert_eq!(ground.made(), Default::default());
}
