//! Snapshots that are written, whatever is lost.

use super::*;
use crate::cloud::aws::ec2::volumes::token;
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

/// Two blocks, sealed.
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
    error.downcast_ref::<Expired>().is_some()
}

#[tokio::test]
async fn a_child_is_started_filled_and_sealed() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let id = whole(&ebs).await.unwrap();
    let kept = fake.with(|world| world.snapshots[&id.0].clone());
    assert_eq!((kept.state, kept.size), ("completed", 8));
    assert!(kept.blocks.keys().eq([&5, &9]) && kept.blocks[&5] == vec![6; BLOCK]);
    assert_eq!(kept.tags["role"], "web");
    assert_eq!(kept.tags[tag::RUN], RUN);
    assert!(kept.tags.contains_key(tag::OWNER));
    let asked = fake.of("StartSnapshot")[0].json();
    assert_eq!(asked["ParentSnapshotId"], BASE);
    assert_eq!(asked["ClientToken"], token(&run(), "direct", 1));
    assert_eq!((asked["Timeout"].as_u64(), asked.get("Encrypted")), (Some(374), None));
    // Another one of the same run is another one.
    let other = ebs.start(&spec(None)).await.unwrap();
    assert_ne!(other, id);
    let asked = fake.of("StartSnapshot")[1].json();
    assert_eq!(asked["Encrypted"], true);
    assert_eq!(asked["KmsKeyArn"], "arn:aws:kms:eu-test-1:123456789012:key/k");
    assert_eq!(asked.get("ParentSnapshotId"), None);
    // Pending or not, they go.
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
    // A child takes its parent's, whatever is said.
    ebs.start(&NewSnapshot { kms_key: Some("alias/web".into()), ..spec(Some(BASE)) }).await.unwrap();
}

#[tokio::test]
async fn a_start_whose_answer_is_lost_makes_one_snapshot() {
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

/// It is known by its token, even where no tag shows it.
#[tokio::test]
async fn what_a_lost_start_made_is_found_when_the_debt_is_paid() {
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
    let (asked, left) = (fake.count("StartSnapshot"), fake.left());
    assert!(left.len() == 1 && asked > 2, "{left:?} {asked}");
    // EBS is back.
    let missing = 200 - asked;
    fake.with(|world| {
        let again = world.calls.iter().find(|call| call.action == "StartSnapshot").unwrap().clone();
        world.calls.extend(std::iter::repeat_n(again, missing));
    });
    ebs.ensure_no_snapshots(&run()).await.unwrap();
    assert!(fake.left().is_empty());
}

#[tokio::test]
async fn a_start_that_is_stopped_in_the_middle_is_paid_for() {
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
    let asked = spec(Some(BASE));
    tokio::select! {
        started = ebs.start(&asked) => panic!("{started:?}"),
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
async fn a_put_is_sent_again_where_that_may_help() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, nth| match (request.action.as_str(), nth) {
        ("PutSnapshotBlock", 0) => Reply::Lost,
        ("PutSnapshotBlock", 1) => refuse("ValidationException", "Failed to read block data"),
        ("PutSnapshotBlock", 2) => refuse("RequestThrottledException", "slow down"),
        ("PutSnapshotBlock", 3) => refuse("ThrottlingException", "slow down"),
        ("PutSnapshotBlock", 4) => Reply::Refuse(503, "InternalServerException", "", ""),
        // It is so new that not all of EBS knows it.
        ("PutSnapshotBlock", 5) => Reply::Refuse(404, "ResourceNotFoundException", "", "SNAPSHOT_NOT_FOUND"),
        _ => Reply::Right,
    })
    .await;
    let id = whole(&ebs).await.unwrap();
    assert_eq!(fake.count("PutSnapshotBlock"), 6 + 2);
    assert_eq!(fake.with(|world| world.snapshots[&id.0].state), "completed");
}

/// D4: any other ValidationException is final.
#[tokio::test]
async fn a_put_that_is_refused_is_sent_once() {
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

/// D5: whoever is told that there are too many waits, and all of them arrive.
#[tokio::test]
async fn puts_that_are_throttled_all_arrive() {
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

/// D7: a lost answer.
#[tokio::test]
async fn a_lost_completion_is_looked_up_and_never_fails_what_is_complete() {
    // It did its work, or nothing; and it is at once complete, or still at work.
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
    // Sealed, and still pending when it is looked at: the second call is refused, and that is no failure.
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
        fake.with(|world| world.snapshots.values_mut().for_each(|kept| kept.state = "completed"));
    };
    let (id, ()) = tokio::join!(whole(&ebs), ends);
    assert_eq!(fake.left(), [id.unwrap().0]);
}

/// D7: what is counted or summed up wrongly is deleted.
#[tokio::test]
async fn a_wrong_count_or_checksum_ends_it() {
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

/// D8: told as what is to be written once more, wherever it shows.
#[tokio::test]
async fn a_snapshot_that_expired_is_told_and_deleted() {
    // While blocks are put.
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let id = ebs.start(&spec(Some(BASE))).await.unwrap();
    ebs.put(&id, 5, vec![6; BLOCK].into(), digest(6)).await.unwrap();
    fake.with(|world| world.snapshots.get_mut(&id.0).unwrap().state = "error");
    let again = write(&ebs, &id).await.unwrap_err();
    assert!(is_expired(&again), "{again:#}");
    // When it is sealed.
    let error = ebs.complete(&id, 1, digest(6)).await.unwrap_err();
    assert!(is_expired(&error), "{error:#}");
    assert!(fake.left().is_empty());
    // And after that.
    fake.with(|world| world.ends = "error");
    let error = whole(&ebs).await.unwrap_err();
    assert!(is_expired(&error) && format!("{error:#}").contains("in the state error"), "{error:#}");
    assert!(fake.left().is_empty());
    // Another one of the same run.
    fake.with(|world| world.ends = "completed");
    let id = whole(&ebs).await.unwrap();
    assert_eq!(fake.left(), [id.0]);
}

/// As whoever sweeps deletes one that began long ago.
#[tokio::test]
async fn a_snapshot_that_is_gone_is_to_be_written_once_more() {
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
