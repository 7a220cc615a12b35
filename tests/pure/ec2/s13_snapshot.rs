//! S13 and S14: one snapshot of what was written, and waited for.

use super::case::{End, all, case, error, lost_after, lost_before, prove, says};
use super::fixture::{Ec2Fixture, MILLI, options, timeouts};
use oven::cloud::aws::ec2::Timeouts;
use oven::ids::RunId;
use oven_ec2_server::world::now;
use oven_ec2_server::{Fault, ServerOptions, Turn, What};
use std::time::{Duration, Instant};

fn create(nth: u32, what: What) -> Fault {
    Fault::new("CreateSnapshot", nth, what)
}

/// Row 13.1: never sent blindly: looked for, by volume and run, at least three times before it is sent again.
#[tokio::test]
async fn r13_1_lost() {
    let before = lost_before()
        .map(|what| case("13.1 before", &[create(1, what)], End::Baked).count("CreateSnapshot", 2));
    let after = lost_after()
        .map(|what| case("13.1 after", &[create(1, what)], End::Baked).count("CreateSnapshot", 1));
    prove(before.into_iter().chain(after)).await;
    for (what, made) in [(What::DropBefore, 1), (What::DropAfter, 1)] {
        let fixture = Ec2Fixture::with(&[create(1, what)]);
        fixture.bake().await.0.result.unwrap();
        assert_eq!(fixture.ever().1, made);
        let calls = fixture.calls();
        let first = calls.iter().position(|call| call == "CreateSnapshot").unwrap();
        let again = calls.iter().rposition(|call| call == "CreateSnapshot").unwrap();
        let looks = calls[first..again].iter().filter(|call| *call == "DescribeSnapshots").count();
        assert!(first == again || looks >= 3, "{calls:?}");
    }
}

/// Row 13.1: lost twice, before the effect: an end, and nothing is left.
#[tokio::test]
async fn r13_1_lost_for_ever() {
    let lost = create(1, What::DropBefore).times(9);
    prove([case("13.1", &[lost], End::Fails(&["no snapshot is visible"])).count("CreateSnapshot", 2)]).await;
}

/// Row 13.1: the first one shows only when there is a second one: one of them goes.
#[tokio::test]
async fn r13_1_twins() {
    // A call that hangs lasts longer than the lag.
    let lost = lost_after().into_iter().filter(|what| *what != What::HangAfter);
    all(lost.map(|what| async move {
        let mut lagging = options(vec![create(1, what.clone())]);
        lagging.visibility_lag = 800 * MILLI;
        let fixture = Ec2Fixture::new(lagging);
        let ec2 =
            fixture.ec2_with(|o| o.timeouts = Timeouts { lost_answer_window: 100 * MILLI, ..timeouts() });
        let ended = fixture.bake_by(&ec2, &RunId::new()).await;
        assert_eq!(ended.leftovers, []);
        let image = ended.result.unwrap();
        assert_eq!((fixture.count("CreateSnapshot"), fixture.ever().1), (2, 2), "{what:?}");
        fixture.holds_one(&image, "13.1 twins");
    }))
    .await;
}

/// Row 13.2: EC2 takes one snapshot of a volume every so often.
#[tokio::test]
async fn r13_2_too_soon() {
    // The first one fails; the second one comes too soon.
    let failed = create(1, What::Turns(Turn::Failed));
    let code = "SnapshotCreationPerVolumeRateExceeded";
    prove([
        case("13.2", &[failed], End::Baked).set(|o| o.limits.between_snapshots = 500 * MILLI),
        case("13.2", &[error("CreateSnapshot", 1, code).times(3)], End::Baked).count("CreateSnapshot", 4),
        case(
            "13.2 for ever",
            &[error("CreateSnapshot", 1, code).times(999)],
            End::Fails(&["SnapshotCreationPerVolumeRateExceeded", "tried for", "(request "]),
        ),
    ])
    .await;
    let fixture = Ec2Fixture::with(&[error("CreateSnapshot", 1, code)]);
    let begun = Instant::now();
    fixture.bake().await.0.result.unwrap();
    assert!(begun.elapsed() >= timeouts().rate, "not before EC2 would take it");
}

/// Row 13.3: the first is waited out, the second is a quota.
#[tokio::test]
async fn r13_3_limits() {
    let pending = error("CreateSnapshot", 1, "ConcurrentSnapshotLimitExceeded").times(3);
    prove([
        case("13.3", &[pending], End::Baked).count("CreateSnapshot", 4),
        case("13.3 quota", &[], End::Fails(&["SnapshotLimitExceeded", "quota", "(request "]))
            .set(|o| o.limits.snapshots = 0)
            .count("CreateSnapshot", 1),
    ])
    .await;
}

/// Row 13.4: it does not show at once; for longer than EC2 says, it is not there.
#[tokio::test]
async fn r13_4_not_to_be_seen_yet() {
    let error = error("DescribeSnapshots", 1, "InvalidSnapshot.NotFound").times(3);
    prove([
        case("13.4", &[], End::Baked).set(|o| o.visibility_lag = 400 * MILLI),
        case("13.4 stale", &[Fault::new("DescribeSnapshots", 1, What::Stale).times(4)], End::Baked),
        case("13.4 said", &[error], End::Baked),
    ])
    .await;
    let fixture = Ec2Fixture::with(&[create(1, What::Turns(Turn::Vanishes))]);
    let ec2 = fixture.ec2_with(|o| o.timeouts = Timeouts { visible: 300 * MILLI, ..timeouts() });
    let ended = fixture.bake_by(&ec2, &RunId::new()).await;
    says(&ended.result.unwrap_err(), &["no longer visible", "snap-"], "13.4");
    assert_eq!(ended.leftovers, []);
    fixture.holds_nothing("13.4");
}

/// Row 13.4: one look that does not show it, long after it was made, is a stale answer and no end.
#[tokio::test]
async fn r13_4_a_stale_look_late() {
    const STALE: usize = 45;
    let mut slow = options(vec![Fault::new("DescribeSnapshots", STALE as u32, What::Stale)]);
    slow.delays.snapshot = Duration::from_secs(3600);
    let fixture = Ec2Fixture::new(slow);
    // Long past when the look is made.
    let ec2 = fixture.ec2_with(|o| o.timeouts = Timeouts { visible: 1500 * MILLI, ..timeouts() });
    let run = RunId::new();
    let ready = async {
        while fixture.count("DescribeSnapshots") < STALE + 2 {
            tokio::time::sleep(5 * MILLI).await;
        }
        fixture.server.with_world(|world| world.snapshots.values_mut().for_each(|s| s.common.ready_at = 0));
    };
    let ended = tokio::select! {
        ended = fixture.bake_by(&ec2, &run) => ended,
        () = async { ready.await; std::future::pending().await } => unreachable!("it never ends"),
    };
    fixture.holds_one(&ended.result.unwrap(), "13.4 late");
    assert!(fixture.count("DescribeSnapshots") > STALE);
}

/// Row 9.9: sixty lost calls with the pauses between them are about ten minutes on EC2.
#[tokio::test]
async fn r9_9_the_network_fails_while_it_waits() {
    let lost = |times| Fault::new("DescribeSnapshots", 1, What::DropBefore).times(times);
    prove([case("9.9", &[lost(60)], End::Baked)]).await;
    // A network that does not come back ends the bake.
    let fixture = Ec2Fixture::with(&[lost(9999)]);
    let ec2 = fixture.ec2_with(|o| o.timeouts = Timeouts { outage: 300 * MILLI, ..timeouts() });
    let ended = fixture.bake_by(&ec2, &RunId::new()).await;
    says(&ended.result.unwrap_err(), &["DescribeSnapshots", "tried for"], "9.9");
}

/// Row 13.5: deleted, and one new one; then it is an end.
#[tokio::test]
async fn r13_5_in_error() {
    let failed = |times| create(1, What::Turns(Turn::Failed)).times(times);
    // How soon EC2 takes another one: row 13.2.
    let at_once = |o: &mut ServerOptions| o.limits.between_snapshots = Duration::ZERO;
    prove([
        case("13.5", &[failed(1)], End::Baked)
            .set(at_once)
            .count("CreateSnapshot", 2)
            .count("DeleteSnapshot", 1),
        case("13.5 again", &[failed(9)], End::Fails(&["is in the state error"]))
            .set(at_once)
            .count("CreateSnapshot", 2),
        // Deleting the failed one is refused at first, and for ever: the cause is reported, and nothing is left.
        case(
            "13.5 stuck",
            &[failed(1), error("DeleteSnapshot", 1, "UnauthorizedOperation")],
            End::Fails(&["is in the state error"]),
        ),
    ])
    .await;
}

/// Row 13.6: a deadline, by size; the snapshot and its progress are reported.
#[tokio::test]
async fn r13_6_stuck() {
    let fixture = Ec2Fixture::with(&[create(1, What::Turns(Turn::Stuck))]);
    let short = Timeouts { snapshot: 400 * MILLI, snapshot_gib: 10 * MILLI, ..timeouts() };
    let ec2 = fixture.ec2_with(|o| o.timeouts = short);
    let begun = Instant::now();
    let ended = fixture.bake_by(&ec2, &RunId::new()).await;
    says(&ended.result.unwrap_err(), &["snap-", "400ms", "pending", "%"], "13.6");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(ended.leftovers, []);
    fixture.holds_nothing("13.6");
    fixture.heals("13.6").await;
}

/// Row 13.7: the volume stays busy: the snapshot and its image stand, and the volume is reported as a leftover.
#[tokio::test]
async fn r13_7_a_busy_volume() {
    let fixture = Ec2Fixture::with(&[Fault::new("DetachVolume", 1, What::Turns(Turn::Busy))]);
    let (ended, run) = fixture.bake().await;
    let image = ended.result.unwrap();
    assert_eq!(ended.leftovers.len(), 1, "{:?}", ended.leftovers);
    let left = ended.leftovers[0].to_string();
    assert!(left.contains("busy") && left.contains(&format!("oven sweep --run {run}")), "{left}");
    let made = fixture.made();
    assert_eq!((made.volumes.len(), made.snapshots.len(), made.images.len()), (1, 1, 1));
    assert_eq!(
        (made.images[0].id.as_str(), made.images[0].state.as_str()),
        (image.id.0.as_str(), "available")
    );
    assert_eq!(made.volumes[0].tags.get(oven::cloud::tag::RUN), Some(&run.0));
    assert!(left.contains(&made.volumes[0].id), "{left}");
    fixture.is_clean("13.7");
    // What used it lets go: sweeping removes it, and the image stays.
    fixture.server.with_world(|world| {
        world.volumes.values_mut().filter(|v| !v.common.seeded).for_each(|v| v.attachment = None)
    });
    let disks = oven::disk::attached_disk::AttachedDisks::new(std::rc::Rc::new(fixture.ec2()));
    oven::disk::DiskStrategy::forget(&disks, &run).await.unwrap();
    fixture.holds_one(&image, "13.7");
}

/// Row 13.7: a detach that fails for a while, or is lost.
#[tokio::test]
async fn r13_7_detaching_goes_wrong() {
    let lost = lost_before().into_iter().chain(lost_after());
    let faults = lost.map(|what| Fault::new("DetachVolume", 1, what));
    let codes = ["IncorrectState", "InvalidAttachment.NotFound", "InvalidVolume.NotFound"];
    let told = codes.into_iter().map(|code| error("DetachVolume", 1, code));
    prove(faults.chain(told).map(|fault| case("13.7", &[fault], End::Baked))).await;
}

/// Row 13.8: somebody deletes the volume: before the snapshot that is an end, and after it nothing.
#[tokio::test]
async fn r13_8_the_volume_is_deleted() {
    for after in [false, true] {
        let mut slow = options(vec![]);
        slow.delays.snapshot = 200 * MILLI;
        // Nobody takes it before it is attached.
        slow.faults.push(Fault::new("CreateSnapshot", 1, What::Late(100)));
        let fixture = Ec2Fixture::new(slow);
        let thief = async {
            loop {
                tokio::time::sleep(MILLI).await;
                let ready =
                    if after { fixture.ever().1 == 1 } else { fixture.count("ModifyInstanceAttribute") == 1 };
                if ready {
                    break;
                }
            }
            fixture.server.with_world(|world| {
                for volume in world.volumes.values_mut().filter(|v| !v.common.seeded) {
                    (volume.attachment, volume.common.gone_at) = (None, Some(now()));
                }
            });
        };
        let ((ended, _), ()) = tokio::join!(fixture.bake(), thief);
        assert_eq!(ended.leftovers, []);
        match ended.result {
            Ok(image) => {
                assert!(after);
                fixture.holds_one(&image, "13.8");
            }
            Err(error) => {
                assert!(!after, "{error:#}");
                says(&error, &["InvalidVolume.NotFound", "(request "], "13.8");
                fixture.holds_nothing("13.8");
            }
        }
    }
}
