//! S3: the volume is created once, or not at all.

use super::case::{Case, End, case, error, lost_after, lost_before, prove};
use super::fixture::{Ec2Fixture, MILLI, options, timeouts};
use oven::cloud::aws::ec2::Timeouts;
use oven::ids::RunId;
use oven_ec2_server::world::{Snapshot, now};
use oven_ec2_server::{Fault, Turn, What};
use std::time::{Duration, Instant};

/// Row 3.1: sent again with its token, EC2 answers with the one that the first call made.
#[tokio::test]
async fn r3_1_lost() {
    let mut cases = Vec::new();
    for what in lost_before().into_iter().chain(lost_after()) {
        cases.push(
            case("3.1", &[Fault::new("CreateVolume", 1, what.clone())], End::Baked).count("CreateVolume", 2),
        );
        let twice = Fault::new("CreateVolume", 1, what).times(2);
        cases.push(case("3.1 twice", &[twice], End::Baked).count("CreateVolume", 3));
    }
    prove(cases).await;
    for what in lost_after() {
        let fixture = Ec2Fixture::with(&[Fault::new("CreateVolume", 1, what)]);
        fixture.bake().await.0.result.unwrap();
        let tokens = fixture.sent("CreateVolume", "ClientToken");
        assert!(tokens.len() == 2 && tokens[0] == tokens[1], "{tokens:?}");
        assert_eq!(fixture.ever().0, 1);
    }
}

/// Row 3.2: one more token, and never a third.
#[tokio::test]
async fn r3_2_a_token_that_is_burned() {
    let burned = |times| error("CreateVolume", 1, "IdempotentParameterMismatch").times(times);
    prove([
        case("3.2", &[burned(1)], End::Baked).count("CreateVolume", 2),
        case("3.2 for ever", &[burned(99)], End::Fails(&["IdempotentParameterMismatch", "(request "]))
            .count("CreateVolume", 2),
    ])
    .await;
    let fixture = Ec2Fixture::with(&[burned(1)]);
    fixture.bake().await.0.result.unwrap();
    let tokens = fixture.sent("CreateVolume", "ClientToken");
    assert_ne!(tokens[0], tokens[1]);
}

/// Row 3.3: the first of two calls may have made what the second one is refused for.
#[tokio::test]
async fn r3_3_limits() {
    let mut cases = Vec::new();
    for (code, quota) in
        [("VolumeLimitExceeded", "volumes, in TiB"), ("MaxIOPSLimitExceeded", "IOPS for Provisioned")]
    {
        let texts: &'static [&'static str] = Box::leak(Box::new([code, "quota", quota, "(request "]));
        cases
            .push(case("3.3", &[error("CreateVolume", 1, code)], End::Fails(texts)).count("CreateVolume", 1));
        for what in lost_after() {
            let faults = [Fault::new("CreateVolume", 1, what), error("CreateVolume", 2, code)];
            cases.push(case("3.3 after a lost one", &faults, End::Baked).count("CreateVolume", 2));
            // And it does not show at once.
            cases.push(
                case("3.3 after a lost one, with lag", &faults, End::Baked)
                    .set(|o| o.visibility_lag = 100 * MILLI),
            );
        }
    }
    prove(cases).await;
    // EC2's own limit: strangers and all.
    prove([case("3.3", &[], End::Fails(&["VolumeLimitExceeded"])).set(|o| o.limits.volumes = 2)]).await;
}

/// An imported image's snapshot.
fn of_the_base(snapshot: &&mut Snapshot) -> bool {
    snapshot.volume == "vol-ffffffff"
}

/// Row 3.4: a missing snapshot is reported by the first answer; one that we made may not show yet.
#[tokio::test]
async fn r3_4_the_base_snapshot_is_not_there() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    fixture.server.with_world(|world| {
        world.snapshots.values_mut().filter(of_the_base).for_each(|s| s.common.gone_at = Some(1));
    });
    let (ended, _) = fixture.bake().await;
    super::case::says(&ended.result.unwrap_err(), &["InvalidSnapshot.NotFound", "(request "], "3.4");
    assert_eq!((fixture.count("CreateVolume"), fixture.ever().0), (1, 0));
    // A base that this process baked just now.
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let ec2 = fixture.ec2();
    let base = fixture.bake_by(&ec2, &RunId::new()).await.result.unwrap();
    fixture.server.with_world(|world| {
        let later = now() + 300;
        world.snapshots.get_mut(&base.snapshot.0).unwrap().common.visible_at = later;
        world.images.get_mut(&base.id.0).unwrap().common.visible_at = later;
        world.images.get_mut(&base.id.0).unwrap().name = "parent".into();
    });
    fixture.server.forget_calls();
    let (server, dir) = (&fixture.server, &fixture.dir);
    let from = oven::cloud::BaseRef::Id(base.id.clone());
    let found = oven::cloud::Cloud::base(&ec2, &from).await.unwrap();
    assert_eq!((found.id, found.snapshot), (base.id, base.snapshot));
    assert!(server.ec2_calls().len() > 1 && dir.path().exists());
}

/// Row 3.5: waited for, and not for ever.
#[tokio::test]
async fn r3_5_the_base_snapshot_is_pending() {
    for (after, baked) in [(Some(300), true), (None, false)] {
        let fixture = Ec2Fixture::new(options(Vec::new()));
        fixture.server.with_world(|world| {
            for snapshot in world.snapshots.values_mut().filter(of_the_base) {
                snapshot.common.ready_at = after.map_or(u64::MAX, |ms| now() + ms);
            }
        });
        let (ended, _) = fixture.bake().await;
        assert_eq!(ended.leftovers, []);
        match ended.result {
            Ok(image) if baked => fixture.holds_one(&image, "3.5"),
            Err(error) if !baked => {
                super::case::says(&error, &["IncorrectState", "pending", "tried for", "(request "], "3.5");
                fixture.server.with_world(|world| {
                    world.snapshots.values_mut().filter(of_the_base).for_each(|s| s.common.ready_at = 0);
                });
                fixture.holds_nothing("3.5");
            }
            result => panic!("{baked}: {result:?}"),
        }
    }
}

/// Row 3.6: what failed or vanished is reported within a few polls, with the hint at KMS.
#[tokio::test]
async fn r3_6_failed_or_vanished() {
    for (turn, text) in [(Turn::Failed, "it is error"), (Turn::Vanishes, "vanished")] {
        for delay in [0, 60] {
            let mut slow = options(vec![Fault::new("CreateVolume", 1, What::Turns(turn))]);
            slow.delays.creating = MILLI * delay;
            let fixture = Ec2Fixture::new(slow);
            let (ended, _) = fixture.bake().await;
            let error = ended.result.unwrap_err();
            super::case::says(&error, &[text, "KMS", "kms:CreateGrant"], "3.6");
            // Three looks that do not show it, and a few while it is created; more the later a busy machine wakes it.
            // At its deadline there are more than fifty.
            assert!(fixture.count("DescribeVolumes") < 50, "{turn:?}: {:?}", fixture.calls());
            assert_eq!(ended.leftovers, []);
            fixture.holds_nothing("3.6");
            fixture.heals("3.6").await;
        }
    }
}

/// Row 3.6: its token is burned, as that of one that vanished, and it only does not show yet: it is removed once it
/// does.
#[tokio::test]
async fn r3_6_failed_and_not_to_be_seen_yet() {
    let mut lagging = options(vec![Fault::new("CreateVolume", 1, What::Turns(Turn::Failed))]);
    lagging.visibility_lag = 200 * MILLI;
    let fixture = Ec2Fixture::new(lagging);
    // The third look comes after 100 ms.
    let ec2 = fixture
        .ec2_with(|o| o.timeouts = Timeouts { first_poll: 50 * MILLI, max_poll: 50 * MILLI, ..timeouts() });
    let ended = fixture.bake_by(&ec2, &RunId::new()).await;
    super::case::says(&ended.result.unwrap_err(), &["kms:CreateGrant"], "3.6");
    assert_eq!(ended.leftovers, []);
    let begun = Instant::now();
    // The server shows it as gone a moment later.
    while !fixture.made().volumes.is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", fixture.made());
        tokio::time::sleep(MILLI).await;
    }
    fixture.holds_nothing("3.6");
    fixture.heals("3.6").await;
}

/// Row 3.6: a key that may not be used.
#[tokio::test]
async fn r3_6_a_key_that_may_not_be_used() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    fixture.server.set(|o| o.keys.clear());
    fixture.server.with_world(|world| world.snapshots.values_mut().for_each(|s| s.encrypted = true));
    let (ended, _) = fixture.bake().await;
    super::case::says(&ended.result.unwrap_err(), &["vanished", "kms:CreateGrant"], "3.6");
    assert_eq!(ended.leftovers, []);
}

/// Row 3.7: after its deadline a volume that stays `creating` is deleted, and the bake fails.
#[tokio::test]
async fn r3_7_stuck_creating() {
    let fixture = Ec2Fixture::with(&[Fault::new("CreateVolume", 1, What::Turns(Turn::Stuck))]);
    let ec2 = fixture.ec2_with(|o| o.timeouts = Timeouts { created: 300 * MILLI, ..timeouts() });
    let begun = Instant::now();
    let ended = fixture.bake_by(&ec2, &RunId::new()).await;
    super::case::says(&ended.result.unwrap_err(), &["still creating", "300ms"], "3.7");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(ended.leftovers, []);
    fixture.holds_nothing("3.7");
    fixture.heals("3.7").await;
}

/// Row 3.8: refused once, and nothing else is tried in its place.
#[tokio::test]
async fn r3_8_terminal() {
    let fails = |code: &'static str, texts: &'static [&'static str]| -> Case {
        case("3.8", &[error("CreateVolume", 1, code).times(9)], End::Fails(texts)).count("CreateVolume", 1)
    };
    prove([
        fails("InsufficientVolumeCapacity", &["InsufficientVolumeCapacity", "another zone", "(request "]),
        fails("InvalidZone.NotFound", &["InvalidZone.NotFound", "oven doctor", "(request "]),
        fails("UnknownVolumeType", &["UnknownVolumeType", "(request "]),
        fails("InvalidParameterValue", &["InvalidParameterValue", "(request "]),
    ])
    .await;
}

/// Row 3.9: with every third call refused, a bake still succeeds, by no more than twice the calls.
#[tokio::test]
async fn r3_9_a_storm() {
    let happy = Ec2Fixture::new(options(Vec::new()));
    happy.bake().await.0.result.unwrap();
    let most = happy.calls().len() * 2;
    let (happy, storm) = (happy, |seed: u64| async move {
        let mut dice = oven_testing::Dice(seed);
        let faults: Vec<Fault> = (1..200)
            .filter(|_| dice.roll(10) < 3)
            .map(|nth| error("*", nth, "RequestLimitExceeded"))
            .collect();
        let fixture = Ec2Fixture::with(&faults);
        let (ended, _) = fixture.bake().await;
        assert_eq!(ended.leftovers, [], "seed {seed}");
        fixture.holds_one(&ended.result.unwrap(), "3.9");
        assert!(fixture.calls().len() <= most, "seed {seed}: {} calls, of {most}", fixture.calls().len());
    });
    drop(happy);
    super::case::all((0..12).map(storm)).await;
}

/// Row 3.9: EC2's token buckets, small ones.
#[tokio::test]
async fn r3_9_empty_buckets() {
    let throttle =
        oven_ec2_server::Throttle { reading: (1.0, 20.0), unfiltered: (1.0, 1.0), changing: (1.0, 10.0) };
    prove([case("3.9", &[], End::Baked).set(|o| o.throttle = Some(throttle))]).await;
    // Throttled for ever: an end, and the code.
    let fault = error("CreateVolume", 1, "RequestLimitExceeded").times(10_000);
    prove([case("3.9 for ever", &[fault], End::Fails(&["RequestLimitExceeded", "tried for", "(request "]))])
        .await;
}
