//! S13 to S19: what is done in the background of a wait. The volume is detached while its snapshot is pending, and
//! deleted while the image is registered; whatever goes wrong with that, the bake is as good as if it had been done at
//! the end.

use super::case::{End, all, case, error, lost_after, lost_before, prove};
use super::fixture::{Ec2Fixture, MILLI, disk_spec, image_spec, options, policy};
use oven::cloud::Cloud;
use oven::disk::DiskStrategy;
use oven::disk::attached_disk::AttachedDisks;
use oven::ids::RunId;

use oven::undo::{UndoPolicy, scope};
use oven_ec2_server::{Fault, ServerOptions, Turn, What};
use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

/// Snapshots and images take a while.
fn slow(options: &mut ServerOptions) {
    options.delays.snapshot = 300 * MILLI;
    options.delays.image = 300 * MILLI;
}

/// A place in the calls of a bake.
fn place(calls: &[String], action: &str, last: bool) -> usize {
    let is = |call: &String| call == action;
    let found = if last { calls.iter().rposition(is) } else { calls.iter().position(is) };
    found.unwrap_or_else(|| panic!("no {action}: {calls:?}"))
}

#[tokio::test]
async fn the_volume_goes_while_the_bake_waits() {
    let mut slowly = options(Vec::new());
    slow(&mut slowly);
    // Detaching is over before the snapshot is: nobody waits for it.
    slowly.delays.detaching = 100 * MILLI;
    let fixture = Ec2Fixture::new(slowly);
    let (ended, _) = fixture.bake().await;
    fixture.holds_one(&ended.result.unwrap(), "background");
    let calls = fixture.calls();
    let at = |action, last| place(&calls, action, last);
    // Not before the snapshot is begun, and not after it is complete.
    assert!(at("CreateSnapshot", false) < at("DetachVolume", false), "{calls:?}");
    assert!(at("DetachVolume", true) < at("DescribeSnapshots", true), "{calls:?}");
    // A snapshot may fail, and is taken again then: the volume is there until it is complete.
    assert!(at("DescribeSnapshots", true) < at("DeleteVolume", false), "{calls:?}");
    assert!(at("DeleteVolume", true) < at("DescribeImages", true), "{calls:?}");
    let once = |action| assert_eq!(fixture.count(action), 1, "{action}: {calls:?}");
    ["DetachVolume", "DeleteVolume", "CreateSnapshot"].into_iter().for_each(once);
    assert_eq!(
        at("DescribeImages", true),
        calls.len() - 1,
        "nothing is waited for after the image: {calls:?}"
    );
}

/// Names in use are asked for once, while the volume is made.
#[tokio::test]
async fn names_are_known_when_the_volume_is_there() {
    let mut slowly = options(Vec::new());
    slowly.delays.creating = 200 * MILLI;
    let fixture = Ec2Fixture::new(slowly);
    fixture.bake().await.0.result.unwrap();
    let of_instance =
        |call: &oven_ec2_server::Call| call.params.values().any(|value| value == "attachment.instance-id");
    let calls = fixture.server.ec2_calls();
    let asked = calls.iter().position(of_instance).unwrap();
    assert_eq!(calls[asked - 1].action, "CreateVolume");
    assert_eq!(calls.iter().filter(|call| of_instance(call)).count(), 1);
    // It fails: they are asked for when they are needed.
    prove([case("4.1", &[error("DescribeVolumes", 1, "InternalError").times(1)], End::Baked)]).await;
}

/// Row 13.5: the snapshot of a volume that is detached by then.
#[tokio::test]
async fn r13_5_a_failed_snapshot_is_replaced_though_the_volume_was_detached() {
    let failed = Fault::new("CreateSnapshot", 1, What::Turns(Turn::Failed));
    prove([case("13.5", &[failed], End::Baked)
        .set(slow)
        .set(|o| o.limits.between_snapshots = Duration::ZERO)
        .count("CreateSnapshot", 2)
        .count("DeleteVolume", 1)])
    .await;
}

/// Row 13.7: what goes wrong with the detach or the delete in the background is made good at the end.
#[tokio::test]
async fn r13_7_what_fails_in_the_background_is_done_at_the_end() {
    let mut cases = Vec::new();
    for action in ["DetachVolume", "DeleteVolume"] {
        for what in lost_before().into_iter().chain(lost_after()) {
            cases.push(case("13.7", &[Fault::new(action, 1, what)], End::Baked).set(slow));
        }
        for code in ["UnauthorizedOperation", "RequestLimitExceeded", "VolumeInUse", "IncorrectState"] {
            cases.push(case("13.7", &[error(action, 1, code)], End::Baked).set(slow));
        }
    }
    // And the look that comes before deleting: the one after those for the attachment.
    let denied = |nth| error("DescribeVolumes", nth, "UnauthorizedOperation");
    cases.push(case("13.7", &[denied(4)], End::Baked).set(slow));
    prove(cases).await;
}

/// Row 19.1: the bake fails while its volume is removed: nothing is left, and it was removed once.
#[tokio::test]
async fn r19_1_a_bake_that_fails_during_background_work() {
    let refused = error("RegisterImage", 1, "InvalidParameterValue");
    prove([case("19.1", &[refused], End::Fails(&["InvalidParameterValue"]))
        .set(slow)
        .count("DeleteVolume", 1)])
    .await;
}

/// Row 20.1: stopped while it is detached or deleted.
#[tokio::test]
async fn r20_1_stopped_during_background_work() {
    let mut cases = Vec::new();
    for action in ["DetachVolume", "DeleteVolume"] {
        for what in [What::HangBefore, What::HangAfter, What::Late(50), What::DropAfter] {
            cases.push(async move {
                let fault = Fault::new(action, 1, what);
                let what = format!("{fault:?}");
                let mut slowly = options(vec![fault]);
                slow(&mut slowly);
                let fixture = Rc::new(Ec2Fixture::new(slowly));
                let (ec2, run, called) = (fixture.ec2(), RunId::new(), fixture.clone());
                let stop = async move {
                    while called.count(action) == 0 {
                        tokio::time::sleep(MILLI).await;
                    }
                };
                let ended = fixture.bake_until(&ec2, &run, stop).await;
                assert!(ended.result.is_err(), "{what}");
                assert_eq!(ended.leftovers, [], "{what}: {}", fixture.calls().join(" "));
                // An image that was registered by then is a result.
                let made = fixture.made();
                assert_eq!(made.volumes, [], "{what}");
                assert_eq!(made.snapshots.len(), made.images.len(), "{what}");
                fixture.server.set(|now| now.faults.clear());
                let (ended, _) = fixture.bake().await;
                fixture.holds_one(&ended.result.unwrap(), &what);
            });
        }
    }
    all(cases).await;
}

/// A disk that may have to be preserved exists as long as the bake may fail.
#[tokio::test]
async fn a_disk_that_may_be_preserved_is_not_deleted_in_the_background() {
    for fails in [true, false] {
        let faults = fails.then(|| error("RegisterImage", 1, "InvalidParameterValue"));
        let mut slowly = options(faults.into_iter().collect());
        slow(&mut slowly);
        let fixture = Ec2Fixture::new(slowly);
        let (ec2, run) = (fixture.ec2(), RunId::new());
        let disks = AttachedDisks::new(Rc::new(ec2.clone()));
        let keeping = UndoPolicy { keep_on_failure: true, ..policy() };
        let ended = scope(keeping, pending(), async |undo| {
            let base = ec2.base(&fixture.base).await?;
            let disk = disks.checkout(&base, &disk_spec(), &run, &undo).await?;
            let snapshot = disk.commit(&undo, &|_, _| ()).await?;
            ec2.register(&snapshot, &image_spec(&base, &run), &undo).await
        })
        .await;
        assert_eq!(ended.leftovers, []);
        assert_eq!((ended.result.is_err(), ended.preserved.len()), (fails, usize::from(fails)));
        let volumes: Vec<String> = fixture.made().volumes.into_iter().map(|volume| volume.state).collect();
        assert_eq!(volumes, if fails { vec!["available"] } else { vec![] });
        assert_eq!(fixture.count("DeleteVolume"), usize::from(!fails));
    }
}
