//! A bake that is asked to end, or killed, anywhere: what it leaves, and that `oven sweep` removes that and nothing
//! else. The server ends the suspense: a call that hangs, before its effect or after it, holds the bake in its place.

use nix::sys::signal::Signal;
use oven_ec2_server::{Call, Fault, Ledger, ServerOptions, What};
use oven_testing::ec2_world::{Ended, HANGS, HERE, MILLI, Run, THERE};
use oven_testing::{Dice, Ec2World, each, full, pause, seeds};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Within which a stopped bake has to be gone: ten seconds, and half as many for a busy machine.
const STOP: Duration = Duration::from_secs(15);

/// Whether a call changes something.
fn changes(action: &str) -> bool {
    !action.starts_with("Describe") && !action.contains(' ')
}

/// The calls of a happy bake, in their order, those to the metadata service too; and how long it takes.
fn happy() -> (Vec<Call>, Duration) {
    let world = Ec2World::tiny(ServerOptions::default());
    let ended = world.bake("happy");
    assert_eq!(ended.code(), Some(0), "{}", ended.err);
    world.assert_one(ended.image().unwrap(), "happy");
    let calls = world.server.calls();
    println!("{} calls in {:?}", calls.len(), ended.took);
    (calls, ended.took)
}

/// Where a bake is held.
struct Place {
    fault: Fault,
    what: String,
}

/// Each call that changes something, before and after its effect, and of the others some.
fn places(calls: &[Call]) -> Vec<Place> {
    let mut dice = Dice(seeds(1, 0, 1)[0]);
    // By action: what a bake does concurrently comes in no certain order. Dry runs are counted apart.
    let (mut places, mut count) = (Vec::new(), BTreeMap::new());
    for call in calls {
        let nth = count.entry((call.action.clone(), call.dry_run)).or_insert(0);
        *nth += 1;
        let changing = changes(&call.action) && !call.dry_run;
        let whats = match changing {
            true => vec![What::HangBefore, What::HangAfter],
            false if full() || dice.roll(4) == 0 => vec![What::HangBefore],
            false => Vec::new(),
        };
        for hang in whats {
            let dry = if call.dry_run { " (dry run)" } else { "" };
            let what = format!("{hang:?} in {} {nth}{dry}", call.action);
            let mut fault = Fault::new(&call.action, *nth, hang);
            fault.dry_run = call.dry_run;
            places.push(Place { fault, what });
        }
    }
    places
}

/// A bake that is held there.
fn held(world: &Ec2World, place: &Place) -> Run {
    world.server.set(|options| options.faults = vec![place.fault.clone()]);
    let mut run = world.start(world.bake_on(HERE));
    world.until_called(&mut run, &place.what, |call| call.answer.contains("Hang"));
    world.server.set(|options| options.faults.clear());
    run
}

fn stopped(world: &Ec2World, run: Run, what: &str) -> Ended {
    run.signal(Signal::SIGTERM);
    let asked = Instant::now();
    let ended = run.end(STOP, what);
    world.local.assert_no_traces_but_of(what, || world.loops_of_volumes());
    println!("{what}: {:?} after {:?}", ended.code(), asked.elapsed());
    ended
}

#[test]
fn sigterm_at_every_call_leaves_nothing() {
    let (calls, _) = happy();
    each(&places(&calls), |place| {
        let what = format!("SIGTERM at {}", place.what);
        let world = Ec2World::tiny(ServerOptions::default());
        let ended = stopped(&world, held(&world, place), &what);
        let told = || format!("{what}\n{}\n{}", ended.err, world.calls());
        // One that was done but for its volume says so.
        match ended.code() {
            Some(0) => assert!(ended.image().is_some(), "{}", told()),
            code => assert_eq!(code, Some(130), "{}", told()),
        }
        assert!(ended.left().is_empty(), "{}", told());
        world.assert_no_orphans(&told());
        world.local.assert_no_traces(&what);
        world.assert_bakes(&what);
    });
}

#[test]
fn sigterm_at_any_time_leaves_nothing() {
    let (_, whole) = happy();
    each(&seeds(300, 0, 16), |seed| {
        let delay = whole.mul_f64(Dice(*seed).roll(1000) as f64 / 900.0);
        let what = format!("OVEN_TEST_SEED={seed}: SIGTERM after {delay:?}");
        let world = Ec2World::tiny(ServerOptions::default());
        let run = world.start(world.bake_on(HERE));
        pause(delay);
        let ended = stopped(&world, run, &what);
        let told = || format!("{what}\n{}\n{}", ended.err, world.calls());
        // Without a code: the signal came before anything listened to it, and before anything was done.
        assert!(matches!(ended.code(), Some(0 | 130) | None), "{:?} {}", ended.code(), told());
        assert!(ended.left().is_empty(), "{}", told());
        world.assert_no_orphans(&told());
        world.local.assert_no_traces(&what);
        world.assert_bakes(&what);
    });
}

/// What the cloud does for so long that nobody waits for it.
const LONG: Duration = Duration::from_secs(25);

#[test]
fn unreleased_resources_are_reported_and_swept() {
    let (creating, attaching, detaching) = ("CreateVolume", "AttachVolume", "DetachVolume");
    let cases = [
        (creating, true),
        (attaching, false),
        (detaching, true),
        ("deleting", false),
        ("snapshot", false),
        ("image", false),
    ];
    each(&cases, |(slow, leaves)| {
        let mut options = ServerOptions::default();
        let delays = &mut options.delays;
        let (delay, at) = match *slow {
            "CreateVolume" => (&mut delays.creating, "CreateVolume"),
            "AttachVolume" => (&mut delays.attaching, "AttachVolume"),
            "DetachVolume" => (&mut delays.detaching, "CreateSnapshot"),
            "deleting" => (&mut delays.deleting, "CreateSnapshot"),
            "snapshot" => (&mut delays.snapshot, "CreateSnapshot"),
            _ => (&mut delays.image, "RegisterImage"),
        };
        *delay = LONG;
        let (world, what) = (Ec2World::tiny(options), format!("a long {slow}"));
        let mut run = world.start(world.bake_on(HERE));
        world.until_called(&mut run, &what, |call| call.action == at && !call.dry_run);
        let ended = stopped(&world, run, &what);
        let told = || format!("{what}\n{}\n{}", ended.err, world.calls());
        assert_eq!(ended.code(), Some(130), "{}", told());
        world.server.set(|options| options.delays = Default::default());
        world
            .server
            .with_world(|world| world.images.values_mut().for_each(|image| image.common.ready_at = 0));
        if !leaves {
            assert!(ended.left().is_empty(), "{}", told());
            // What is being deleted is as good as gone: it will be.
            let end = Instant::now() + LONG;
            while world.made().volumes.iter().any(|volume| volume.state == "deleting") && Instant::now() < end
            {
                pause(50 * MILLI);
            }
            world.assert_no_orphans(&told());
            return world.assert_bakes(&what);
        }
        let [left] = ended.left()[..] else { panic!("{}", told()) };
        assert_eq!(world.made().volumes.len(), 1, "{}", told());
        // The very command that was printed.
        let command = left.split("remove it with: oven ").nth(1).unwrap_or_else(|| panic!("{}", told()));
        let args: Vec<&str> = command.split(' ').collect();
        let swept = world.start(world.plain(&args)).end(HANGS, &what);
        assert_eq!(swept.code(), Some(0), "{command}\n{}\n{}", swept.err, told());
        assert!(swept.out.starts_with("removed vol-"), "{}", swept.out);
        world.assert_no_orphans(&told());
        world.assert_bakes(&what);
    });
}

/// With the waits that EC2 needs: a call that does not answer is waited for longer than a user waits.
#[test]
fn unknown_results_after_ten_seconds_are_reported_and_swept() {
    let actions =
        ["CreateVolume", "AttachVolume", "CreateSnapshot", "RegisterImage", "DetachVolume", "DeleteVolume"];
    each(&actions, |action| {
        let (world, what) = (Ec2World::tiny(ServerOptions::default()), format!("{action} never answers"));
        world.server.set(|options| options.faults = vec![Fault::new(action, 1, What::HangAfter)]);
        let mut command = world.bake_on(HERE);
        command.env("OVEN_TEST_SLOW", "1");
        let mut run = world.start(command);
        world.until_called(&mut run, &what, |call| call.answer.contains("Hang"));
        let ended = stopped(&world, run, &what);
        let told = || format!("{what}\n{}\n{}", ended.err, world.calls());
        // Its volume is deleted while the image is registered: the bake may be done by then.
        let done = *action == "DeleteVolume" && ended.code() == Some(7);
        assert!(done || ended.code() == Some(130), "{}", told());
        let made = world.made();
        let orphans = made.volumes.len() + made.snapshots.len() - made.images.len();
        assert!(orphans == 0 || !ended.left().is_empty(), "{}", told());
        if orphans > 0 {
            let command =
                ended.left()[0].split("remove it with: oven ").nth(1).unwrap_or_else(|| panic!("{}", told()));
            let swept = world.start(world.plain(&command.split(' ').collect::<Vec<_>>())).end(HANGS, &what);
            assert_eq!(swept.code(), Some(0), "{command}\n{}\n{}", swept.err, told());
        }
        world.assert_no_orphans(&told());
        world.assert_bakes(&what);
    });
}

#[test]
fn a_volume_in_use_is_reported_and_swept_later() {
    let world = Ec2World::tiny(ServerOptions::default());
    world.server.set(|options| options.faults = vec![Fault::new("DescribeVolumes", 3, What::HangBefore)]);
    let mut run = world.start(world.bake_on(HERE));
    world.until_called(&mut run, "attached", |call| call.answer.contains("Hang"));
    // Somebody else opens the disk, and keeps it open.
    let node = world.loops_of_volumes().into_iter().next().expect("an attached volume");
    let holder = std::fs::File::open(format!("/dev/{node}")).unwrap();
    world.server.set(|options| options.faults.clear());
    let ended = run.end(HANGS, "busy");
    assert_eq!(ended.code(), Some(7), "{}\n{}", ended.err, world.calls());
    let image = ended.image().expect("it is baked").to_owned();
    assert!(ended.left().len() == 1 && ended.left()[0].contains("busy"), "{}", ended.err);
    drop(holder);
    let swept = world.expect(0, &["sweep"]);
    assert!(swept.out.starts_with("removed vol-"), "{}", swept.out);
    world.assert_one(&image, "busy");
}

/// After SIGKILL: sweep removes what was left, and nothing else; the next bake makes one image.
fn assert_sweeps(world: &Ec2World, what: &str) {
    world.wait_until_idle();
    world.local.assert_no_traces_but_of(what, || world.loops_of_volumes());
    let foreign = world.foreign();
    let before = world.made();
    let swept = world.expect(0, &["sweep"]);
    let told = || format!("{what}\n{}{}\n{}", swept.out, swept.err, world.calls());
    world.assert_no_orphans(&told());
    assert_eq!(world.foreign(), foreign, "{}", told());
    // A result stays.
    let ids = |ledger: &Ledger| ledger.images.iter().map(|image| image.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&world.made()), ids(&before), "{}", told());
    for call in
        world.server.ec2_calls().iter().filter(|call| call.action.starts_with("De") && changes(&call.action))
    {
        let of_ours = |id: &String| !foreign.iter().any(|foreign| foreign.starts_with(id.as_str()));
        assert!(call.params.values().all(of_ours), "{call:?} {}", told());
    }
    let swept_volume = !before.volumes.is_empty();
    assert_eq!(
        swept.out.contains("removed "),
        swept_volume || before.snapshots.len() > before.images.len(),
        "{}",
        told()
    );
    world.assert_bakes(what);
}

#[test]
fn sigkill_at_every_call_is_swept() {
    let (calls, _) = happy();
    each(&places(&calls), |place| {
        let what = format!("SIGKILL at {}", place.what);
        let world = Ec2World::tiny(ServerOptions::default());
        world.plant_foreign(true);
        let run = held(&world, place);
        run.signal(Signal::SIGKILL);
        assert_eq!(run.end(STOP, &what).code(), None, "{what}");
        assert_sweeps(&world, &what);
    });
}

#[test]
fn sigkill_at_any_time_is_swept() {
    let (_, whole) = happy();
    each(&seeds(300, 0, 12), |seed| {
        let mut dice = Dice(*seed);
        let mut options = ServerOptions { seed: seed + 1, ..ServerOptions::default() };
        for delay in [
            &mut options.delays.creating,
            &mut options.delays.attaching,
            &mut options.delays.snapshot,
            &mut options.delays.image,
        ] {
            *delay = MILLI * dice.roll(60) as u32;
        }
        let delay = whole.mul_f64(dice.roll(1000) as f64 / 800.0);
        let what = format!("OVEN_TEST_SEED={seed}: SIGKILL after {delay:?}");
        let world = Ec2World::tiny(options);
        world.plant_foreign(true);
        let run = world.start(world.bake_on(HERE));
        pause(delay);
        run.signal(Signal::SIGKILL);
        run.end(STOP, &what);
        assert_sweeps(&world, &what);
    });
}

#[test]
fn what_a_terminated_builder_left_another_one_sweeps() {
    // Killed with a volume that is not attached yet, with an attached one, and with a snapshot.
    each(&["CreateVolume", "ModifyInstanceAttribute", "CreateSnapshot"], |action| {
        let world = Ec2World::tiny(ServerOptions::default());
        world.plant_foreign(false);
        world.server.set(|options| options.faults = vec![Fault::new(action, 1, What::HangAfter)]);
        let mut run = world.start(world.bake_on(THERE));
        world.until_called(&mut run, action, |call| call.answer.contains("Hang"));
        run.signal(Signal::SIGKILL);
        run.end(STOP, action);
        world.server.set(|options| options.faults.clear());
        // As long as the instance is there, its processes may be.
        let before = world.made();
        let swept = world.expect(0, &["sweep"]);
        assert_eq!((swept.out.as_str(), world.made()), ("", before), "{action}: {}", swept.err);
        world.send(&format!("Action=TerminateInstances&InstanceId.1={THERE}"));
        let foreign = world.foreign();
        let swept = world.expect(0, &["sweep"]);
        world.assert_no_orphans(&format!("{action}: {}", swept.err));
        assert_eq!(world.foreign(), foreign, "{action}: {}", swept.out);
        world.assert_bakes(action);
    });
}
