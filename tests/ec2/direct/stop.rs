//! Whole bakes by EBS direct against the EC2-shaped server that are asked to end, or killed, anywhere, that have many
//! faults, or company: what is left, and what the next bake makes.

use nix::sys::signal::Signal;
use oven_ec2_server::{Fault, ServerOptions, What};
use oven_testing::direct::bake::expected;
use oven_testing::direct::by_blocks::{assert_heals, assert_recovers, bake, calls, data, error, with};
use oven_testing::disk::tree::tree;
use oven_testing::ec2_world::{HANGS, MILLI, Run};
use oven_testing::{Dice, Ec2World, each, full, pause, seeds};
use std::time::{Duration, Instant};

/// Within which a stopped bake has to be gone: ten seconds, and half as many for a busy machine.
const STOP: Duration = Duration::from_secs(15);

/// Where a bake is held.
struct DirectPlace {
    fault: Fault,
    what: String,
}

/// Each call to EBS of a happy bake, and those around it, before and after; a sample of them.
fn places(most: usize) -> Vec<DirectPlace> {
    let world = Ec2World::tiny(ServerOptions::default());
    assert_heals(&world, "happy");
    let mut places: Vec<DirectPlace> = Vec::new();
    let mut counts = std::collections::BTreeMap::<String, u32>::new();
    for call in world.server.calls().iter().filter(|call| !call.dry_run) {
        let nth = counts.entry(call.action.clone()).or_default();
        *nth += 1;
        for hang in [What::HangBefore, What::HangAfter] {
            let what = format!("{hang:?} in {} {nth}", call.action);
            places.push(DirectPlace { fault: Fault::new(&call.action, *nth, hang), what });
        }
    }
    let mut dice = Dice(seeds(1, 0, 1)[0]);
    while !full() && places.len() > most {
        let at = dice.roll(places.len());
        // In the middle of the upload, always.
        if places[at].fault.action != "PutSnapshotBlock" || places[at].fault.nth != 2 {
            places.swap_remove(at);
        }
    }
    places
}

/// A bake that is held there. `None`: it was not.
fn held(world: &Ec2World, place: &DirectPlace) -> Option<Run> {
    // Whatever is held stays so until the bake is stopped.
    world.server.set(|options| options.faults = vec![place.fault.clone()]);
    let mut run = world.start(world.bake_blocks("image"));
    let begun = Instant::now();
    while !world.server.calls().iter().any(|call| call.answer.contains("Hang")) {
        if run.is_over() {
            // Nobody waits for prefetches and other background work.
            let looks = ["Get", "List", "Describe"].iter().any(|word| place.fault.action.starts_with(word));
            assert!(looks, "{}: it ended\n{}", place.what, run.printed());
            return None;
        }
        assert!(begun.elapsed() < HANGS, "{}: the call never came", place.what);
        pause(MILLI);
    }
    Some(run)
}

#[test]
fn sigterm_at_every_call_leaves_nothing() {
    each(&places(6), |place| {
        let what = format!("SIGTERM at {}", place.what);
        let world = Ec2World::tiny(ServerOptions::default());
        if let Some(run) = held(&world, place) {
            run.signal(Signal::SIGTERM);
            let ended = run.end(STOP, &what);
            let told = || format!("{what}: {:?}\n{}\n{}", ended.code(), ended.err, calls(&world));
            assert!(matches!(ended.code(), Some(0 | 130)), "{}", told());
            assert!(ended.left().is_empty(), "{}", told());
        }
        world.wait_until_idle();
        assert_recovers(&world, &what);
    });
}

#[test]
fn sigkill_at_every_call_is_swept() {
    each(&places(6), |place| {
        let what = format!("SIGKILL at {}", place.what);
        let world = Ec2World::tiny(ServerOptions::default());
        world.plant_foreign(true);
        let foreign = world.foreign();
        if let Some(run) = held(&world, place) {
            run.signal(Signal::SIGKILL);
            assert_eq!(run.end(STOP, &what).code(), None, "{what}");
        }
        world.server.set(|options| options.faults.clear());
        world.wait_until_idle();
        world.local.assert_no_traces(&what);
        let before = world.made();
        let swept = world.start(world.plain_elsewhere(&["sweep"])).end(HANGS, &what);
        let told = || format!("{what}\n{}{}\n{}", swept.out, swept.err, calls(&world));
        assert_eq!(swept.code(), Some(0), "{}", told());
        assert_eq!(
            swept.out.contains("removed "),
            before.snapshots.len() > before.images.len(),
            "{}",
            told()
        );
        assert_eq!(world.foreign(), foreign, "{}", told());
        assert_recovers(&world, &what);
    });
}

#[test]
fn sigkill_at_any_time_is_swept() {
    let world = Ec2World::tiny(ServerOptions::default());
    let whole = bake(&world, "happy").took;
    each(&seeds(100, 0, 6), |seed| {
        let mut dice = Dice(*seed);
        let mut options = ServerOptions { seed: seed + 1, ..ServerOptions::default() };
        options.latencies.insert("PutSnapshotBlock".into(), (5, 60));
        options.delays.completing = MILLI * dice.roll(100) as u32;
        let delay = whole.mul_f64(dice.roll(1000) as f64 / 700.0);
        let (world, what) =
            (Ec2World::tiny(options), format!("OVEN_TEST_SEED={seed}: SIGKILL after {delay:?}"));
        let run = world.start(world.bake_blocks("image"));
        pause(delay);
        run.signal(Signal::SIGKILL);
        run.end(STOP, &what);
        world.wait_until_idle();
        world.local.assert_no_traces(&what);
        let swept = world.start(world.plain_elsewhere(&["sweep"])).end(HANGS, &what);
        assert_eq!(swept.code(), Some(0), "{what}: {}", swept.err);
        assert_recovers(&world, &what);
    });
}

/// A plan of faults, and whether it has to heal.
fn plan(seed: u64) -> (ServerOptions, bool) {
    let actions = [
        "ListSnapshotBlocks",
        "GetSnapshotBlock",
        "StartSnapshot",
        "PutSnapshotBlock",
        "CompleteSnapshot",
        "DescribeSnapshots",
        "RegisterImage",
        "DescribeImages",
    ];
    let passing = [
        What::StatusBefore(500),
        What::StatusAfter(503),
        What::DropBefore,
        What::DropAfter,
        What::HangBefore,
        What::HangAfter,
        What::Late(50),
        error("ThrottlingException"),
        error("InternalServerException"),
    ];
    let mut dice = Dice(seed);
    let faults = (0..1 + dice.roll(5)).map(|_| {
        let action = *dice.of(&actions);
        let nth = 1 + dice.roll(4) as u32;
        let is_ec2 = action.starts_with("Describe") || action == "RegisterImage";
        match dice.roll(10) {
            0 if action == "GetSnapshotBlock" => Fault::new(action, nth, What::Flipped),
            _ if is_ec2 => Fault::new(action, nth, dice.of(&passing[..7]).clone()),
            _ => Fault::new(action, nth, dice.of(&passing).clone()).times(1 + dice.roll(2) as u32),
        }
    });
    let faults: Vec<_> = faults.collect();
    let heals = faults.len() == 1;
    let mut options = ServerOptions { faults, seed: seed + 1, ..ServerOptions::default() };
    options.visibility_lag = MILLI * dice.roll(60) as u32;
    options.delays.completing = MILLI * dice.roll(60) as u32;
    options.delays.image = MILLI * dice.roll(40) as u32;
    options.direct.page = (dice.roll(2) == 0).then(|| 1 + dice.roll(5));
    options.direct.empty_pages = dice.roll(3) as u32;
    (options, heals)
}

#[test]
fn random_plans() {
    each(&seeds(200, 4, 3), |seed| {
        let (options, heals) = plan(*seed);
        let what = format!("OVEN_TEST_SEED={seed}: {:?}", options.faults);
        let world = Ec2World::tiny(options);
        let ended = bake(&world, &what);
        let told = || format!("{what}: {:?}\n{}\n{}", ended.code(), ended.err, calls(&world));
        assert!(matches!(ended.code(), Some(0 | 6 | 7)), "{}", told());
        assert!(!heals || ended.code() == Some(0), "it should have healed: {}", told());
        if !ended.left().is_empty() {
            world.server.set(|options| options.faults.clear());
            world.wait_until_idle();
            let swept = world.start(world.plain_elsewhere(&["sweep"])).end(HANGS, &what);
            assert_eq!(swept.code(), Some(0), "{}", swept.err);
        }
        assert_recovers(&world, &told());
    });
}

#[test]
fn two_definitions_on_one_base_at_once_do_not_mix() {
    let world = with(|options| _ = options.latencies.insert("GetSnapshotBlock".into(), (5, 40)));
    let base = world.base();
    for name in ["one", "two"] {
        let toml =
            format!("name = {name:?}\nfrom = \"{base}\"\n[[file]]\nsource = \"f\"\ntarget = \"/etc/f\"\n");
        world.local.write(&format!("{name}/image.toml"), &toml);
        world.local.write(&format!("{name}/f"), name);
    }
    let runs = ["one", "two"].map(|name| world.start(world.bake_blocks(name)));
    let ended = runs.map(|run| run.end(HANGS, "two at once"));
    let mut whole = Vec::new();
    for (ended, name) in ended.iter().zip(["one", "two"]) {
        assert_eq!(ended.code(), Some(0), "{name}: {}\n{}", ended.err, calls(&world));
        let mut tree = tree(&data(&world, ended.image().unwrap()));
        whole.push(tree.remove("etc/f").unwrap());
        assert_eq!(&tree, expected(), "{name}");
    }
    assert_ne!(whole[0], whole[1]);
    let made = world.made();
    assert_eq!((made.images.len(), made.snapshots.len(), made.volumes.len()), (2, 2, 0), "{made:#?}");
    world.local.assert_no_traces("two at once");
}
