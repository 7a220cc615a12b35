//! Whole bakes by EBS direct against the EC2-shaped server, on a machine that is no instance: what is sent, and what
//! comes of rows D1 to D9 of the faults that EBS direct knows.

use oven::ids::BLOCK;
use oven_ec2_server::{Call, Fault, ServerOptions, What};
use oven_testing::direct::bake::expected;
use oven_testing::direct::base_cache::{assert_read_once, cached_blocks, contents, read};
use oven_testing::direct::by_blocks::{
    assert_heals, assert_recovers, assert_whole, bake, calls, count, data, error, faulty, with,
};
use oven_testing::disk::tree::tree;
use oven_testing::ec2_world::{HANGS, MILLI, Run};
use oven_testing::local_world::tiny_base;
use oven_testing::{Ec2World, each};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The vendor's account.
const VENDOR: &str = "099720109477";

/// Blocks by which two raw disks differ.
fn differ(one: &Path, other: &Path) -> BTreeSet<u32> {
    let (one, other) = (File::open(one).unwrap(), File::open(other).unwrap());
    let length = one.metadata().unwrap().len();
    assert_eq!(length, other.metadata().unwrap().len());
    let read = |file: &File, index: u64| {
        let mut block = vec![0; BLOCK];
        file.read_exact_at(&mut block, index * BLOCK as u64).unwrap();
        block
    };
    (0..length / BLOCK as u64).filter(|i| read(&one, *i) != read(&other, *i)).map(|i| i as u32).collect()
}

/// A bake that has to fail, by the cloud's fault, and to say so.
fn fails(world: &Ec2World, words: &[&str], what: &str) {
    let ended = bake(world, what);
    let told = || format!("{what}: {:?}\n{}\n{}", ended.code(), ended.err, calls(world));
    assert_eq!(ended.code(), Some(6), "{}", told());
    assert!(words.iter().all(|word| ended.err.contains(word)), "{words:?}: {}", told());
    assert!(ended.left().is_empty(), "{}", told());
    assert!(world.made().images.is_empty(), "{}", told());
    assert_recovers(world, what);
}

#[test]
fn only_blocks_that_changed_are_sent_and_no_volume_is_asked_for() {
    let world = Ec2World::tiny(ServerOptions::default());
    let ended = bake(&world, "happy");
    assert_whole(&world, &ended, "happy");
    let (base, image) = (world.base(), ended.image().unwrap());
    let changed = differ(&data(&world, &base), &data(&world, image));
    let put: Vec<u32> = world
        .server
        .ebs_calls()
        .iter()
        .filter(|call| call.action == "PutSnapshotBlock")
        .map(|call| call.params["BlockIndex"].parse().unwrap())
        .collect();
    assert_eq!(put.len(), changed.len(), "each once: {put:?} {changed:?}");
    assert_eq!(put.into_iter().collect::<BTreeSet<_>>(), changed);
    // Of a GiB with 8 MiB of a file system.
    assert!((1..16).contains(&changed.len()), "{changed:?}");
    let volumes: Vec<_> = world.server.calls();
    let volumes = volumes.iter().filter(|call| {
        call.service == "imds" || call.action.contains("Volume") || call.action.contains("Instance")
    });
    assert_eq!(volumes.count(), 0, "{}", calls(&world));
    // The next one finds in the cache what was read before, and sends nothing but its own.
    let first = read(&world);
    let kept = cached_blocks(&world, &base);
    // A prefetch may be under way as a bake ends: the block is read, and not cached. What was sent was
    // compared with the base's blocks first, and so was read.
    let needed: BTreeSet<u32> = changed.intersection(&contents(&world, &base)).copied().collect();
    assert!(!needed.is_empty() && needed.is_subset(&kept), "{needed:?} {kept:?}\n{}", calls(&world));
    assert!(kept.is_subset(&first), "{kept:?} {first:?}");
    world.local.write("other/image.toml", &format!("name = \"other\"\nfrom = \"{base}\"\n"));
    world.server.forget_calls();
    let other = world.start(world.bake_blocks("other")).end(HANGS, "warm");
    assert_eq!(other.code(), Some(0), "{}", other.err);
    assert_read_once(&world, &base, &kept);
    world.server.forget_calls();
    let hit = bake(&world, "hit");
    assert_eq!((hit.image(), count(&world, "StartSnapshot")), (Some(image), 0), "{}", calls(&world));
}

/// `oven`, with a state of the test's own, in a mount namespace where a script was run before.
fn contained(world: &Ec2World, script: &str, args: &[&str]) -> Run {
    world.local.write("state/.keep", "");
    std::fs::create_dir_all("/var/lib/oven").unwrap();
    let script = format!("set -e; mount --bind state /var/lib/oven; {script}; exec \"$@\"");
    let oven = world.plain_elsewhere(args);
    let mut contained = std::process::Command::new("unshare");
    contained.args(["--mount", "sh", "-c", &script, "sh"]).arg(oven.get_program()).args(oven.get_args());
    contained.env_clear().current_dir(world.local.dir.path());
    contained.envs(oven.get_envs().filter_map(|(name, value)| Some((name, value?))));
    world.start(contained)
}

#[test]
fn a_container_with_nothing_but_loop_fuse_and_mount_bakes() {
    let base = std::env::var_os("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test ec2");
    let world = Ec2World::on(Path::new(&base), ServerOptions::default());
    // IAM grants what `oven policy` prints, and so nothing about volumes.
    let policy = world.start(world.plain_elsewhere(&["policy"])).end(HANGS, "policy");
    let policy: serde_json::Value = serde_json::from_str(&policy.out).unwrap();
    let text = policy.to_string();
    for action in ["CreateVolume", "AttachVolume", "DetachVolume", "ModifyInstanceAttribute"] {
        assert!(!text.contains(action), "{action}: {text}");
    }
    world.server.set(|options| options.policy = Some(policy));
    // A /dev with four nodes: what a container has.
    let script = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/zero c 1 5; \
                  mknod -m 666 /dev/urandom c 1 9; mknod -m 666 /dev/random c 1 8";
    let ended = contained(&world, script, &["bake", "image"]).end(HANGS, "contained");
    let told = || format!("{}\n{}\n{}", ended.out, ended.err, calls(&world));
    assert_eq!(ended.code(), Some(0), "{}", told());
    let refused = |call: &&Call| call.answer.contains("Unauthorized") || call.answer.contains("AccessDenied");
    let refused: Vec<_> = world.server.calls().into_iter().filter(|call| refused(&call)).collect();
    assert!(refused.is_empty(), "{refused:#?}");
    assert!(world.server.calls().iter().all(|call| call.service != "imds"), "{}", told());
    world.assert_one(ended.out.trim(), &told());
}

#[test]
fn d1_a_public_base_is_copied_once_and_that_is_said_before() {
    let world = Ec2World::tiny(ServerOptions::default());
    world.server.with_world(|world| {
        for snapshot in world.snapshots.values_mut() {
            (snapshot.common.owner, snapshot.public) = (VENDOR.to_owned(), true);
        }
    });
    world.server.set(|options| options.delays.copying = 300 * MILLI);
    let mut run = world.start(world.bake_blocks("image"));
    // Said before it happens.
    world.until_called(&mut run, "copy", |call| call.action == "CopySnapshot" && !call.dry_run);
    let told = run.printed();
    assert!(told.contains("into this account, because") && told.contains("GiB"), "{told}");
    let ended = run.end(HANGS, "copied");
    let told = || format!("{:?}\n{}\n{}", ended.code(), ended.err, calls(&world));
    assert_eq!(ended.code(), Some(0), "{}", told());
    assert_eq!(&tree(&data(&world, ended.image().unwrap())), expected(), "{}", told());
    world.local.write("other/image.toml", &format!("name = \"other\"\nfrom = \"{}\"\n", world.base()));
    let other = world.start(world.bake_blocks("other")).end(HANGS, "other");
    assert_eq!(
        (other.code(), count(&world, "CopySnapshot")),
        (Some(0), 1),
        "{}\n{}",
        other.err,
        calls(&world)
    );
    assert!(!other.err.contains("into this account, because"), "it is there already: {}", other.err);
    // The copy is a result: no sweep removes it.
    let before = world.made();
    assert_eq!((before.images.len(), before.snapshots.len()), (2, 3), "{before:#?}");
    let swept = world.start(world.plain_elsewhere(&["sweep"])).end(HANGS, "sweep");
    assert_eq!((swept.code(), world.made()), (Some(0), before), "{}", swept.err);
    world.local.assert_no_traces("copied");
}

#[test]
fn d1_an_unusable_key_of_the_base_is_named() {
    let key = "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555";
    let world = Ec2World::tiny(ServerOptions::default());
    let set = |key: Option<&str>| {
        world.server.with_world(|world| {
            for snapshot in world.snapshots.values_mut().filter(|snapshot| snapshot.common.seeded) {
                (snapshot.encrypted, snapshot.key) = (key.is_some(), key.map(str::to_owned));
            }
        });
    };
    set(Some(key));
    let ended = bake(&world, "key");
    let told = || format!("{:?}\n{}\n{}", ended.code(), ended.err, calls(&world));
    assert_eq!(ended.code(), Some(6), "{}", told());
    assert!(ended.err.contains("key"), "{}", told());
    assert!(world.made().snapshots.is_empty(), "{}", told());
    set(None);
    assert_recovers(&world, "key");
}

#[test]
fn d2_tokens_that_expire_are_asked_for_again() {
    let invalid = |reason: &str| error(&format!("ValidationException:{reason}"));
    let grounds = [
        faulty(vec![Fault::new("GetSnapshotBlock", 2, invalid("INVALID_BLOCK_TOKEN"))]),
        with(|options| {
            (options.direct.page, options.direct.empty_pages) = (Some(2), 1);
            options.faults = vec![Fault::new("ListSnapshotBlocks", 3, invalid("INVALID_PAGE_TOKEN"))];
        }),
        with(|options| {
            (options.direct.block_tokens, options.direct.page) = (120 * MILLI, Some(2));
            options.latencies.insert("GetSnapshotBlock".into(), (20, 60));
        }),
    ];
    each(&grounds, |world| assert_heals(world, "tokens"));
}

#[test]
fn d3_a_flipped_bit_is_read_again_and_then_reported() {
    assert_heals(&faulty(vec![Fault::new("GetSnapshotBlock", 1, What::Flipped).times(2)]), "twice");
    let world = faulty(vec![Fault::new("GetSnapshotBlock", 1, What::Flipped).times(10_000)]);
    fails(&world, &["block "], "always");
}

#[test]
fn d4_a_put_is_sent_again_where_that_may_help_and_else_not() {
    let put = |what: What| Fault::new("PutSnapshotBlock", 2, what);
    let passing = [
        What::DropBefore,
        What::DropAfter,
        What::HangAfter,
        What::StatusBefore(503),
        What::StatusAfter(500),
        error("RequestThrottledException"),
        error("ThrottlingException"),
        What::ErrorSaying("ValidationException".into(), "Failed to read block data".into()),
    ];
    each(&passing, |what| assert_heals(&faulty(vec![put(what.clone()).times(2)]), &format!("{what:?}")));
    let world = faulty(vec![put(error("ValidationException:INVALID_BLOCK")).times(10_000)]);
    fails(&world, &["INVALID_BLOCK"], "refused");
    let world = faulty(vec![put(error("ValidationException:INVALID_BLOCK")).times(10_000)]);
    bake(&world, "refused");
    let refused: Vec<_> = world.server.ebs_calls();
    let refused = refused.iter().filter(|call| call.answer.contains("INVALID_BLOCK"));
    let mut indexes: Vec<_> = refused.map(|call| call.params["BlockIndex"].clone()).collect();
    let all = indexes.len();
    indexes.dedup();
    assert_eq!(indexes.len(), all, "each was sent once: {}", calls(&world));
}

#[test]
fn d5_limits_are_waited_for() {
    let limit = error("ConcurrentLimitExceededException");
    assert_heals(&faulty(vec![Fault::new("StartSnapshot", 1, limit.clone()).times(2)]), "start");
    assert_heals(&faulty(vec![Fault::new("PutSnapshotBlock", 1, limit).times(5)]), "put");
    assert_heals(
        &with(|options| {
            let few = (2.0, 30.0);
            options.direct.throttle =
                Some(oven_ec2_server::DirectThrottle { gets: few, puts: few, lists: few, snapshots: few });
        }),
        "throttled",
    );
}

#[test]
fn d7_a_lost_completion_is_looked_up_and_a_refused_one_is_the_end() {
    let complete = |what: What| Fault::new("CompleteSnapshot", 1, what);
    let lost =
        [What::DropBefore, What::DropAfter, What::HangAfter, What::StatusBefore(500), What::StatusAfter(503)];
    each(&lost, |what| assert_heals(&faulty(vec![complete(what.clone())]), &format!("{what:?}")));
    assert_heals(&with(|options| options.delays.completing = 200 * MILLI), "it takes its time");
    let wrong = error("ValidationException:INVALID_PARAMETER_VALUE");
    fails(&faulty(vec![complete(wrong)]), &["INVALID_PARAMETER_VALUE"], "a wrong checksum");
}

#[test]
fn d8_an_expired_snapshot_is_uploaded_again() {
    // One block hangs for longer than a pending snapshot lives without a call, and nobody else is as slow.
    let world = with(|options| {
        options.direct.timeout = 3000 * MILLI;
        options.faults = vec![Fault::new("PutSnapshotBlock", 1, What::HangBefore)];
    });
    let mut command = world.bake_blocks("image");
    command.env("OVEN_TEST_CALL", "5");
    let ended = world.start(command).end(HANGS, "expired");
    assert_whole(&world, &ended, "expired");
    assert_eq!(count(&world, "StartSnapshot"), 2, "{}", calls(&world));
    // And if that takes too long, too, it is the end.
    let world = with(|options| {
        options.direct.timeout = MILLI;
        options.latencies.insert("PutSnapshotBlock".into(), (20, 20));
    });
    fails(&world, &["expired"], "always");
}

/// Somebody deletes it while the bake is at work.
#[test]
fn d8_a_snapshot_that_is_swept_during_a_bake_is_uploaded_again() {
    let world = with(|options| _ = options.latencies.insert("PutSnapshotBlock".into(), (300, 500)));
    let mut run = world.start(world.bake_blocks("image"));
    world.until_called(&mut run, "swept", |call| call.action == "StartSnapshot");
    let made = world.made().snapshots;
    world.send(&format!("Action=DeleteSnapshot&SnapshotId={}", made[0].id));
    let ended = run.end(HANGS, "swept");
    assert_whole(&world, &ended, "swept");
    assert_eq!((made.len(), count(&world, "StartSnapshot")), (1, 2), "{}", calls(&world));
}

#[test]
fn d9_a_raw_disk_that_changes_while_it_is_imported_is_no_image() {
    let world = with(|options| _ = options.latencies.insert("PutSnapshotBlock".into(), (150, 300)));
    let raw = world.local.path("disk.raw");
    std::fs::copy(tiny_base(), &raw).unwrap();
    let import = |world: &Ec2World| contained(world, "true", &["import", "disk.raw", "--name", "changes"]);
    let mut run = import(&world);
    world.until_called(&mut run, "import", |call| call.action == "PutSnapshotBlock");
    File::options().write(true).open(&raw).unwrap().write_all_at(b"changed", 5 << 20).unwrap();
    let ended = run.end(HANGS, "changed");
    let told = || format!("{:?}\n{}\n{}", ended.code(), ended.err, calls(&world));
    assert_eq!(ended.code(), Some(2), "{}", told());
    assert!(ended.err.contains("disk.raw was changed while it was read"), "{}", told());
    let made = world.made();
    assert!(made.images.is_empty() && made.snapshots.is_empty(), "{made:#?}\n{}", told());
    let ended = import(&world).end(HANGS, "unchanged");
    assert_eq!(ended.code(), Some(0), "{}\n{}", ended.err, calls(&world));
    assert!(differ(&data(&world, ended.out.trim()), &data(&world, &world.base())).contains(&10));
}
