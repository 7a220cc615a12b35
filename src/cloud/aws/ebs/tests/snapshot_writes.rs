//! Tests that snapshots are written correctly even if an answer is lost. D4 to D8 are rows of `tests/FAULTS.md`.

use super::*;
use crate::cloud::aws::ec2::volumes::client_token;
use std::sync::Arc;

fn spec(parent: Option<&str>) -> NewSnapshot {
    NewSnapshot {
        parent: parent.map(|id| SnapshotId(id.to_owned())),
        size_gib: 8,
        description: "web".into(),
        run: run(),
        tags: [("role".to_owned(), "web".to_owned())].into(),
        encrypted: true,
        kms_key: Some("arn:aws:kms:eu-test-1:123456789012:key/k".into()),
    }
}

/// Writes two blocks and completes the snapshot.
async fn write(ebs: &Ebs, id: &SnapshotId) -> Result<()> {
    for (index, byte) in [(5, 6), (9, 7)] {
        ebs.put(id, index, vec![byte; BLOCK].into(), digest(byte)).await?;
    }
    let all = Sha256::new().chain_update(digest(6)).chain_update(digest(7)).finalize();
    ebs.complete(id, 2, all.into()).await
}

async fn whole(ebs: &Ebs) -> Result<SnapshotId> {
    let id = ebs.start(&spec(Some(BASE))).await?;
    write(ebs, &id).await.map(|()| id)
}

fn is_expired(error: &anyhow::Error) -> bool {
    error.downcast_ref::<SnapshotExpired>().is_some()
}

#[tokio::test]
async fn a_child_is_started_filled_and_sealed() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let id = whole(&ebs).await.unwrap();
    let stored = fake.with(|world| world.snapshots[&id.0].clone());
    assert_eq!((stored.state, stored.size), ("completed", 8));
    assert!(stored.blocks.keys().eq([&5, &9]) && stored.blocks[&5] == vec![6; BLOCK]);
    assert_eq!(stored.tags["role"], "web");
    assert_eq!(stored.tags[tag::RUN], RUN);
    assert!(stored.tags.contains_key(tag::OWNER));
    let request = fake.of("StartSnapshot")[0].json();
    assert_eq!(request["ParentSnapshotId"], BASE);
    assert_eq!(request["ClientToken"], client_token(&run(), "direct", 1));
    assert_eq!((request["Timeout"].as_u64(), request.get("Encrypted")), (Some(374), None));
    // A second start of the same run makes another snapshot.
    let other = ebs.start(&spec(None)).await.unwrap();
    assert_ne!(other, id);
    let request = fake.of("StartSnapshot")[1].json();
    assert_eq!(request["Encrypted"], true);
    assert_eq!(request["KmsKeyArn"], "arn:aws:kms:eu-test-1:123456789012:key/k");
    assert_eq!(request.get("ParentSnapshotId"), None);
    // Both snapshots are removed, whether they are pending or complete.
    ebs.ensure_no_snapshots(&run()).await.unwrap();
    assert!(fake.left().is_empty());
}

#[tokio::test]
async fn a_key_without_a_parent_is_given_by_its_arn() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let error =
        ebs.start(&NewSnapshot { kms_key: Some("alias/web".into()), ..spec(None) }).await.unwrap_err();
    assert_eq!(Kind::of(&error), Kind::Definition);
    assert!(fake.left().is_empty());
    // A child always uses its parent's key, even if another key is requested.
    ebs.start(&NewSnapshot { kms_key: Some("alias/web".into()), ..spec(Some(BASE)) }).await.unwrap();
}

#[tokio::test]
async fn a_start_whose_answer_is_lost_creates_one_snapshot() {
    for reply in [Reply::Lost, Reply::Drop, Reply::Refuse(500, "InternalServerException", "", "")] {
        let dir = dir();
        let (ebs, fake) = ebs(dir.path(), move |request, nth| {
            if (request.action.as_str(), nth) == ("StartSnapshot", 0) { reply.clone() } else { Reply::Right }
        })
        .await;
        let id = whole(&ebs).await.unwrap();
        assert_eq!(fake.left(), [id.0]);
        let tokens: Vec<_> =
            fake.of("StartSnapshot").iter().map(|r| r.json()["ClientToken"].clone()).collect();
        assert!(tokens.len() == 2 && tokens[0] == tokens[1]);
    }
}

/// The client token identifies the snapshot even if no tag is visible.
#[tokio::test]
async fn the_debt_finds_the_snapshot_of_a_lost_start() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, nth| match request.action.as_str() {
        "StartSnapshot" if nth == 0 => Reply::Lost,
        "StartSnapshot" if nth < 200 => Reply::Drop,
        "DescribeSnapshots" => {
            Reply::Body("<DescribeSnapshotsResponse><snapshotSet/></DescribeSnapshotsResponse>".into())
        }
        _ => Reply::Right,
    })
    .await;
    assert!(ebs.start(&spec(Some(BASE))).await.is_err());
    let (starts, left) = (fake.count("StartSnapshot"), fake.left());
    assert!(left.len() == 1 && starts > 2, "{left:?} {starts}");
    // From now on, EBS answers again.
    let missing = 200 - starts;
    fake.with(|world| {
        let again = world.calls.iter().find(|call| call.action == "StartSnapshot").unwrap().clone();
        world.calls.extend(std::iter::repeat_n(again, missing));
    });
    ebs.ensure_no_snapshots(&run()).await.unwrap();
    assert!(fake.left().is_empty());
}

#[tokio::test]
async fn the_debt_removes_the_snapshot_of_a_cancelled_start() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, _| match request.action.as_str() {
        "StartSnapshot" => Reply::Late,
        _ => Reply::Right,
    })
    .await;
    let stop = async {
        while fake.count("StartSnapshot") == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let new = spec(Some(BASE));
    tokio::select! {
        started = ebs.start(&new) => panic!("{started:?}"),
        () = stop => {}
    }
    assert_eq!(fake.left().len(), 1);
    ebs.ensure_no_snapshots(&run()).await.unwrap();
    assert_eq!((fake.count("StartSnapshot"), fake.left().len()), (1, 0));
}

#[tokio::test]
async fn starts_wait_for_other_pending_ones() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, nth| {
        let many = request.action == "StartSnapshot" && nth < 2;
        if many { refuse("ConcurrentLimitExceededException", "too many") } else { Reply::Right }
    })
    .await;
    whole(&ebs).await.unwrap();
    assert_eq!(fake.count("StartSnapshot"), 3);
}

/// D4.
#[tokio::test]
async fn a_put_is_retried_after_transient_errors() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, nth| match (request.action.as_str(), nth) {
        ("PutSnapshotBlock", 0) => Reply::Lost,
        ("PutSnapshotBlock", 1) => refuse("ValidationException", "Failed to read block data"),
        ("PutSnapshotBlock", 2) => refuse("RequestThrottledException", "slow down"),
        ("PutSnapshotBlock", 3) => refuse("ThrottlingException", "slow down"),
        ("PutSnapshotBlock", 4) => Reply::Refuse(503, "InternalServerException", "", ""),
        // The snapshot is so new that not every server of EBS knows it.
        ("PutSnapshotBlock", 5) => Reply::Refuse(404, "ResourceNotFoundException", "", "SNAPSHOT_NOT_FOUND"),
        _ => Reply::Right,
    })
    .await;
    let id = whole(&ebs).await.unwrap();
    assert_eq!(fake.count("PutSnapshotBlock"), 6 + 2);
    assert_eq!(fake.with(|world| world.snapshots[&id.0].state), "completed");
}

/// D4: a ValidationException is final, unless EBS failed to read the block's data.
#[tokio::test]
async fn a_put_with_a_final_error_is_sent_once() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, _| match request.action.as_str() {
        "PutSnapshotBlock" => Reply::Refuse(400, "ValidationException", "bad", "INVALID_PARAMETER_VALUE"),
        _ => Reply::Right,
    })
    .await;
    let error = whole(&ebs).await.unwrap_err();
    assert!(
        !is_expired(&error) && format!("{error:#}").starts_with("writing block 5 of snap-1"),
        "{error:#}"
    );
    assert_eq!((fake.count("PutSnapshotBlock"), Kind::of(&error)), (1, Kind::Cloud));
    ebs.ensure_no_snapshots(&run()).await.unwrap();
    assert!(fake.left().is_empty());
}

/// D5: throttled puts wait, and all of them succeed.
#[tokio::test]
async fn throttled_puts_all_succeed() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, nth| {
        let many = request.action == "PutSnapshotBlock" && nth % 3 != 2;
        if many { refuse("ConcurrentLimitExceededException", "too many") } else { Reply::Right }
    })
    .await;
    let id = ebs.start(&spec(None)).await.unwrap();
    let data: Arc<[u8]> = vec![1; BLOCK].into();
    let mut puts: Vec<_> = (0..12).map(|i| ebs.put(&id, i, data.clone(), digest(1))).collect();
    std::future::poll_fn(|cx| {
        puts.retain_mut(|put| match put.as_mut().poll(cx) {
            std::task::Poll::Ready(put) => put.map(|()| false).unwrap(),
            std::task::Poll::Pending => true,
        });
        if puts.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    assert_eq!(fake.with(|world| world.snapshots[&id.0].blocks.len()), 12);
    assert!(fake.count("PutSnapshotBlock") > 12);
}

/// D7: the answer to CompleteSnapshot is lost.
#[tokio::test]
async fn a_lost_completion_is_looked_up_and_fails_no_complete_snapshot() {
    // With `Lost`, the first call takes effect. With the other replies, it does not.
    for (reply, ends, sent) in [
        (Reply::Lost, "completed", 1),
        (Reply::Drop, "completed", 2),
        (Reply::Refuse(500, "InternalServerException", "", ""), "completed", 2),
    ] {
        let dir = dir();
        let (ebs, fake) = ebs(dir.path(), move |request, nth| {
            if (request.action.as_str(), nth) == ("CompleteSnapshot", 0) {
                reply.clone()
            } else {
                Reply::Right
            }
        })
        .await;
        fake.with(|world| world.ends = ends);
        let id = whole(&ebs).await.unwrap();
        assert_eq!(fake.left(), [id.0]);
        assert_eq!(fake.count("CompleteSnapshot"), sent);
    }
    // The replies simulate that the first call takes effect, but its answer is lost. The snapshot is still pending when
    // it is polled, and EBS refuses the second call. oven must not report this refusal as an error.
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, nth| match (request.action.as_str(), nth) {
        ("CompleteSnapshot", 0) => Reply::Drop,
        ("CompleteSnapshot", _) => refuse("ValidationException", "The snapshot is sealed"),
        _ => Reply::Right,
    })
    .await;
    let ends = async {
        while fake.count("CompleteSnapshot") < 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        fake.with(|world| world.snapshots.values_mut().for_each(|stored| stored.state = "completed"));
    };
    let (id, ()) = tokio::join!(whole(&ebs), ends);
    assert_eq!(fake.left(), [id.unwrap().0]);
}

/// D7: a snapshot with a wrong count or checksum is deleted.
#[tokio::test]
async fn a_wrong_count_or_checksum_deletes_the_snapshot() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    for (count, checksum) in [(2, digest(6)), (1, digest(7))] {
        let id = ebs.start(&spec(Some(BASE))).await.unwrap();
        ebs.put(&id, 5, vec![6; BLOCK].into(), digest(6)).await.unwrap();
        let error = ebs.complete(&id, count, checksum).await.unwrap_err();
        assert!(!is_expired(&error) && format!("{error:#}").contains("INVALID_PARAMETER_VALUE"), "{error:#}");
        assert!(fake.left().is_empty());
    }
    assert_eq!(fake.count("CompleteSnapshot"), 2);
}

/// D8: each call for an expired snapshot reports that the snapshot has expired, so that a new one is written.
#[tokio::test]
async fn an_expired_snapshot_is_reported_and_deleted() {
    // The snapshot expires between two puts.
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let id = ebs.start(&spec(Some(BASE))).await.unwrap();
    ebs.put(&id, 5, vec![6; BLOCK].into(), digest(6)).await.unwrap();
    fake.with(|world| world.snapshots.get_mut(&id.0).unwrap().state = "error");
    let again = write(&ebs, &id).await.unwrap_err();
    assert!(is_expired(&again), "{again:#}");
    // CompleteSnapshot also reports that the snapshot has expired.
    let error = ebs.complete(&id, 1, digest(6)).await.unwrap_err();
    assert!(is_expired(&error), "{error:#}");
    assert!(fake.left().is_empty());
    // This snapshot fails after CompleteSnapshot has succeeded.
    fake.with(|world| world.ends = "error");
    let error = whole(&ebs).await.unwrap_err();
    assert!(is_expired(&error) && format!("{error:#}").contains("in the state error"), "{error:#}");
    assert!(fake.left().is_empty());
    // Another snapshot of the same run can be completed.
    fake.with(|world| world.ends = "completed");
    let id = whole(&ebs).await.unwrap();
    assert_eq!(fake.left(), [id.0]);
}

/// `oven sweep` deletes the snapshot of a run that began long ago and has not ended.
#[tokio::test]
async fn a_deleted_snapshot_counts_as_expired() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let swept = async || {
        let id = ebs.start(&spec(Some(BASE))).await.unwrap();
        fake.with(|world| world.snapshots.remove(&id.0));
        id
    };
    let error = write(&ebs, &swept().await).await.unwrap_err();
    assert!(is_expired(&error) && format!("{error:#}").contains("was deleted"), "{error:#}");
    let error = ebs.complete(&swept().await, 0, Sha256::digest([]).into()).await.unwrap_err();
    assert!(is_expired(&error), "{error:#}");
    let id = whole(&ebs).await.unwrap();
    assert_eq!(fake.left(), [id.0]);
}
