//! Many plans, drawn: whatever goes wrong, there is one image, or none and nothing else.
//!
//! A sample: fixed seeds and a few fresh ones. `OVEN_TEST_FULL=1` runs all; `OVEN_SEEDS=17..18` runs these.

use super::case::all;
use super::fixture::{Ec2Fixture, MILLI, options};
use oven::error::Kind;
use oven::ids::RunId;

use oven_ec2_server::{Fault, ServerOptions, Turn, What};
use oven_testing::Dice;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// The seeds to run: `fixed`, and so many fresh ones; or all of `full`.
fn seeds(fixed: u64, fresh: u64, full: u64) -> Vec<u64> {
    if let Ok(range) = std::env::var("OVEN_SEEDS") {
        let (from, to) = range.split_once("..").expect("A..B");
        let range: Range<u64> = from.parse().unwrap()..to.parse().unwrap();
        return range.collect();
    }
    if std::env::var("OVEN_TEST_FULL").is_ok_and(|full| full == "1") {
        return (0..full).collect();
    }
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let begin = u64::try_from(time.as_millis()).unwrap();
    (0..fixed).chain((0..fresh).map(|n| begin + n)).collect()
}

const ACTIONS: [&str; 14] = [
    "AttachVolume",
    "CreateSnapshot",
    "CreateTags",
    "CreateVolume",
    "DeleteSnapshot",
    "DeleteVolume",
    "DeregisterImage",
    "DescribeImages",
    "DescribeInstances",
    "DescribeSnapshots",
    "DescribeVolumes",
    "DetachVolume",
    "ModifyInstanceAttribute",
    "RegisterImage",
];

fn what(dice: &mut Dice, action: &str) -> What {
    let passing = [
        What::StatusBefore(500),
        What::StatusAfter(500),
        What::StatusBefore(503),
        What::StatusAfter(503),
        What::DropBefore,
        What::DropAfter,
        What::HangBefore,
        What::HangAfter,
        What::Late(50),
        What::Stale,
        What::Error("RequestLimitExceeded".into()),
        What::Error("InternalError".into()),
        What::ErrorAfter("InternalError".into()),
        What::Error("ExpiredToken".into()),
    ];
    let turns: &[Turn] = match action {
        "CreateVolume" => &[Turn::Failed, Turn::Vanishes, Turn::Untagged],
        "AttachVolume" => &[Turn::Stuck],
        "CreateSnapshot" => &[Turn::Failed, Turn::Untagged],
        "RegisterImage" => &[Turn::Failed, Turn::Untagged, Turn::Plain, Turn::Billed],
        _ => &[],
    };
    let codes: &[&str] = match action {
        "CreateVolume" => {
            &["IdempotentParameterMismatch", "VolumeLimitExceeded", "InsufficientVolumeCapacity"]
        }
        "AttachVolume" => &["VolumeInUse", "AttachmentLimitExceeded", "InvalidVolume.NotFound"],
        "CreateSnapshot" => {
            &["ConcurrentSnapshotLimitExceeded", "SnapshotLimitExceeded", "InvalidVolume.NotFound"]
        }
        "RegisterImage" => &["InvalidSnapshot.NotFound", "UnauthorizedOperation"],
        "DetachVolume" => &["IncorrectState", "InvalidAttachment.NotFound"],
        _ => &[],
    };
    match dice.roll(8) {
        0 if !turns.is_empty() => What::Turns(*dice.of(turns)),
        1 if !codes.is_empty() => What::Error((*dice.of(codes)).into()),
        _ => dice.of(&passing).clone(),
    }
}

/// Up to five faults, and delays of all kinds.
fn plan(dice: &mut Dice, seed: u64) -> ServerOptions {
    let faults = (0..1 + dice.roll(5)).map(|_| {
        let action = *dice.of(&ACTIONS);
        let what = what(dice, action);
        // Many calls come once in a bake: most faults befall the first.
        let nth = if dice.roll(3) > 0 { 1 } else { 1 + dice.roll(4) as u32 };
        Fault::new(action, nth, what).times(1 + (dice.roll(6) / 5) as u32)
    });
    let faults = faults.collect();
    let mut options = options(faults);
    delay(dice, &mut options);
    options.seed = seed;
    options
}

fn delay(dice: &mut Dice, options: &mut ServerOptions) {
    options.visibility_lag = MILLI * dice.roll(60) as u32;
    let delays = &mut options.delays;
    for delay in [
        &mut delays.creating,
        &mut delays.attaching,
        &mut delays.detaching,
        &mut delays.snapshot,
        &mut delays.image,
        &mut delays.deleting,
    ] {
        *delay = MILLI * dice.roll(30) as u32;
    }
}

/// What a plan may make a bake fail with: a refusal, or an ill turn.
fn may_fail(faults: &[Fault]) -> bool {
    let terminal = |fault: &Fault| match &fault.what {
        What::Turns(Turn::Stuck | Turn::Untagged) => fault.count > 1,
        What::Turns(_) => true,
        What::Error(code) => {
            !["RequestLimitExceeded", "InternalError", "ExpiredToken"].contains(&code.as_str())
        }
        _ => false,
    };
    let lost = |fault: &&Fault| {
        let harmless = matches!(fault.what, What::Late(_) | What::Stale);
        fault.action == "CreateSnapshot" && !harmless
    };
    // A snapshot whose call is lost twice is given up.
    faults.iter().any(terminal) || faults.iter().filter(lost).map(|fault| fault.count).sum::<u32>() > 1
}

async fn drawn(seed: u64, ends: Rc<RefCell<BTreeMap<&'static str, u32>>>) {
    let ended_as = |end| *ends.borrow_mut().entry(end).or_default() += 1;
    let mut dice = Dice(seed);
    let options = plan(&mut dice, seed);
    // Some are stopped in the middle.
    let stop = (dice.roll(4) == 0).then(|| MILLI * dice.roll(250) as u32);
    let faults = options.faults.clone();
    let what = format!("OVEN_SEEDS={seed}..{}: stopped after {stop:?}, {faults:?}", seed + 1);
    let fixture = Ec2Fixture::new(options);
    let (ec2, run) = (fixture.ec2(), RunId::new());
    let stopping = async {
        match stop {
            Some(after) => tokio::time::sleep(after).await,
            None => std::future::pending().await,
        }
    };
    let ended = fixture.bake_until(&ec2, &run, stopping).await;
    // A few refusals belong to any bake that is stopped; most are planned.
    let spoilt = fixture.server.ec2_calls().iter().filter(|call| call.answer != "200").count() as u32;
    *ends.borrow_mut().entry("calls that went wrong").or_default() += spoilt;
    let left = |ended: &oven::undo::Ended<oven::cloud::Image>| {
        assert_eq!(ended.leftovers, [], "{what}: {:?}\n{}", ended.result, fixture.calls().join(" "));
    };
    left(&ended);
    match ended.result {
        Ok(image) => {
            assert!(image.was_created_by(&run), "{what}");
            ended_as("baked");
            return fixture.holds_one(&image, &what);
        }
        Err(error) if Kind::of(&error) == Kind::Interrupted => {
            assert!(stop.is_some(), "{what}: {error:#}");
            ended_as("stopped");
            // Registered before it was stopped, it is a result.
            let made = fixture.made();
            assert_eq!(made.volumes, [], "{what}\n{}", fixture.calls().join(" "));
            assert_eq!(
                made.snapshots.len(),
                made.images.len(),
                "{what}: {made:#?}\n{}",
                fixture.calls().join(" ")
            );
            assert!(made.images.len() <= 1, "{what}: {made:#?}");
            fixture.is_clean(&what);
            if made.images.iter().any(|image| image.tags.is_empty() || image.state == "failed")
                || may_fail(&faults)
            {
                return;
            }
        }
        Err(error) => {
            assert!(may_fail(&faults), "{what}: {error:#}\n{}", fixture.calls().join(" "));
            fixture.holds_nothing(&format!("{what}: {error:#}"));
            ended_as("failed");
        }
    }
    fixture.heals(&what).await;
}

#[tokio::test]
async fn random_plans() {
    let seeds = seeds(40, 10, 1000);
    println!("{} plans, up to seed {:?}", seeds.len(), seeds.last());
    let all_of = if seeds.len() < 20 { 0 } else { seeds.len() };
    let ends = Rc::default();
    all(seeds.into_iter().map(|seed| drawn(seed, Rc::clone(&ends)))).await;
    println!("{:?}", ends.borrow());
    let baked = ends.borrow().get("baked").copied().unwrap_or(0) as usize;
    assert!(baked * 3 > all_of, "most faults are borne: {ends:?}");
}

/// Two builders of one definition, each with its own run, at a server with delays of all kinds.
async fn two(seed: u64) {
    let mut dice = Dice(!seed);
    let mut options = options(Vec::new());
    delay(&mut dice, &mut options);
    options.delays.answer = MILLI * dice.roll(6) as u32;
    options.seed = seed + 1;
    let (later, what) = (MILLI * dice.roll(80) as u32, format!("OVEN_SEEDS={seed}..{}", seed + 1));
    let fixture = Ec2Fixture::new(options);
    let (a, b) = (RunId::new(), RunId::new());
    // Two processes: each knows what it made itself.
    let (one, other) = (fixture.ec2(), fixture.ec2());
    let second = async {
        tokio::time::sleep(later).await;
        fixture.bake_by(&other, &b).await
    };
    let (first, second) = tokio::join!(fixture.bake_by(&one, &a), second);
    assert!(
        first.leftovers.is_empty() && second.leftovers.is_empty(),
        "{what}: {:?} {:?}",
        first.leftovers,
        second.leftovers
    );
    let of = |ended: oven::undo::Ended<oven::cloud::Image>| {
        ended.result.unwrap_or_else(|error| panic!("{what}: {error:#}\n{}", fixture.calls().join(" ")))
    };
    let (first, second) = (of(first), of(second));
    assert_eq!(first.id, second.id, "{what}");
    assert!(first.was_created_by(&a) || first.was_created_by(&b), "{what}");
    fixture.holds_one(&first, &what);
    assert_eq!(fixture.ever().2, 1, "{what}: no image but this one, ever");
}

#[tokio::test]
async fn two_builders() {
    let seeds = seeds(15, 5, 200);
    println!("{} pairs, up to seed {:?}", seeds.len(), seeds.last());
    all(seeds.into_iter().map(two)).await;
}
