//! Tests that a snapshot is created only once, even if an answer is lost.

use super::*;
use crate::sys::tasks::{self, TaskProgress};

/// A fake EC2 with snapshots. For each CreateSnapshot, `script` returns whether a snapshot is created, and the answer.
/// `states` contains the state of the first snapshot, and the state of all later snapshots.
async fn snapshotting(
    dir: &std::path::Path,
    script: impl Fn(usize) -> (bool, Reply) + Send + 'static,
    states: [&'static str; 2],
) -> (Ec2, Calls) {
    let mut there: Vec<(String, &'static str)> = Vec::new();
    let mut made = 0;
    ec2(dir, move |request, nth| match request.action.as_str() {
        "CreateSnapshot" => {
            let (acts, reply) = script(nth);
            if acts {
                there.push((format!("snap-0{made:016}"), states[made.min(1)]));
                made += 1;
            }
            match reply {
                Reply::Ok(_) => ok(format!("<snapshotId>{}</snapshotId>", there.last().unwrap().0)),
                reply => reply,
            }
        }
        "DescribeSnapshots" => {
            let wanted = request.filter("snapshot-id");
            let some: Vec<(&str, &str)> = there
                .iter()
                .map(|(id, state)| (id.as_str(), *state))
                .filter(|(id, _)| wanted.is_none_or(|w| w == *id))
                .collect();
            ok(snapshots(&some))
        }
        "DeleteSnapshot" => {
            there.retain(|(id, _)| id != request.get("SnapshotId"));
            ok("<return>true</return>")
        }
        // The volume is detached while the snapshot is pending.
        "DetachVolume" => ok("<volumeId>vol-1</volumeId>"),
        action => panic!("{action}"),
    })
    .await
}

#[tokio::test]
async fn a_lost_snapshot_is_looked_up_and_never_created_twice() {
    for acted in [true, false] {
        let dir = dir();
        let script = move |nth| if nth == 0 { (acted, Reply::Drop) } else { (true, ok("")) };
        let (ec2, calls) = snapshotting(dir.path(), script, ["completed"; 2]).await;
        let id = ec2.snapshot(&volume_id(), &run(), &Tags::new()).await.unwrap();
        assert_eq!(id.0, "snap-00000000000000000");
        assert_eq!(count(&calls, "CreateSnapshot"), if acted { 1 } else { 2 });
        assert_eq!(count(&calls, "DeleteSnapshot"), 0);
        if !acted {
            assert!(count(&calls, "DescribeSnapshots") >= 3);
        }
    }
}

#[tokio::test]
async fn the_percentage_of_a_snapshot_is_reported() {
    let dir = dir();
    let (ec2, _) = ec2(dir.path(), |request, nth| match request.action.as_str() {
        "CreateSnapshot" => ok("<snapshotId>snap-00000000000000000</snapshotId>"),
        "DescribeSnapshots" => {
            let (state, progress) = [("pending", ""), ("pending", "45%"), ("completed", "100%")][nth.min(2)];
            let ids = snapshots(&[("snap-00000000000000000", state)]);
            ok(ids.replace("<volumeSize>", &format!("<progress>{progress}</progress><volumeSize>")))
        }
        "DetachVolume" => ok("<volumeId>vol-1</volumeId>"),
        action => panic!("{action}"),
    })
    .await;
    let heard = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
    let on_progress = {
        let heard = heard.clone();
        move |progress| heard.borrow_mut().push(progress)
    };
    tasks::listen(on_progress, ec2.snapshot(&volume_id(), &run(), &Tags::new())).await.unwrap();
    let heard = heard.borrow();
    assert!(heard.starts_with(&[TaskProgress::Percent(45), TaskProgress::Percent(100)]), "{heard:?}");
}

#[tokio::test]
async fn a_snapshot_in_error_is_replaced_once() {
    for second in ["completed", "error"] {
        let dir = dir();
        let (ec2, calls) = snapshotting(dir.path(), |_| (true, ok("")), ["error", second]).await;
        let result = ec2.snapshot(&volume_id(), &run(), &Tags::new()).await;
        assert_eq!(result.is_ok(), second == "completed", "{result:?}");
        assert_eq!(count(&calls, "CreateSnapshot"), 2);
        assert_eq!(count(&calls, "DeleteSnapshot"), if second == "completed" { 1 } else { 2 });
    }
}

#[tokio::test]
async fn snapshots_of_one_volume_are_paced() {
    let dir = dir();
    let codes = ["SnapshotCreationPerVolumeRateExceeded", "ConcurrentSnapshotLimitExceeded"];
    let script = move |nth: usize| match codes.get(nth) {
        Some(code) => (false, refuse(code, "slow down")),
        None => (true, ok("")),
    };
    let (ec2, calls) = snapshotting(dir.path(), script, ["completed"; 2]).await;
    let begun = Instant::now();
    ec2.snapshot(&volume_id(), &run(), &Tags::new()).await.unwrap();
    assert_eq!(count(&calls, "CreateSnapshot"), 3);
    assert!(begun.elapsed() >= ec2.timeouts().rate * 2);
    let dir = tempfile::tempdir().unwrap();
    let (ec2, calls) =
        snapshotting(dir.path(), |_| (false, refuse("SnapshotLimitExceeded", "no")), ["completed"; 2]).await;
    assert!(ec2.snapshot(&volume_id(), &run(), &Tags::new()).await.is_err());
    assert_eq!(count(&calls, "CreateSnapshot"), 1);
}

#[tokio::test]
async fn snapshots_of_images_are_not_deleted() {
    for (used, deleted) in [(true, false), (false, true)] {
        let (dir, mut left) = (dir(), 2);
        let (ec2, _) = ec2(dir.path(), move |request, _| match request.action.as_str() {
            "DescribeSnapshots" => ok(snapshots(&[(SNAPSHOT, "completed")])),
            "DescribeImages" if used => ok(ours("available")),
            "DescribeImages" => ok("<imagesSet/>"),
            "DeleteSnapshot" if used || left > 0 => {
                left -= 1;
                refuse("InvalidSnapshot.InUse", "The snapshot is currently in use by ami-1")
            }
            _ => ok("<return>true</return>"),
        })
        .await;
        ec2.ensure_no_snapshots(&run()).await.unwrap();
        assert_ne!(used, deleted);
    }
}
