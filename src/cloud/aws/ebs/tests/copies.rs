//! Tests when a base's snapshot can be the parent of a new snapshot, and that a copy is created only once. D1 is a row
//! of `tests/FAULTS.md`.

use super::*;

const KEY: &str = "arn:aws:kms:eu-test-1:123456789012:key/k";

fn kind(encrypted: Option<bool>, kms_key: Option<&str>) -> VolumeKind {
    VolumeKind { encrypted, kms_key: kms_key.map(str::to_owned), ..Default::default() }
}

/// D1.
#[tokio::test]
async fn a_base_is_a_parent_or_copied_or_uploaded() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &APART, "self");
    let parent_of_base = async |has: Option<&str>, kind: VolumeKind| {
        fake.with(|world| world.snapshots.get_mut(BASE).unwrap().key = has.map(str::to_owned));
        match ebs.parent(&base, &kind).await.unwrap() {
            ParentUse::UseAsParent => "itself".to_owned(),
            ParentUse::CopyFirst { why } => format!("copy: {why}"),
            ParentUse::FullUpload { why } => format!("whole: {why}"),
        }
    };
    assert_eq!(parent_of_base(None, kind(None, None)).await, "itself");
    assert_eq!(parent_of_base(None, kind(Some(false), None)).await, "itself");
    assert_eq!(parent_of_base(Some(KEY), kind(None, None)).await, "itself");
    assert_eq!(parent_of_base(Some(KEY), kind(Some(true), None)).await, "itself");
    assert_eq!(parent_of_base(Some(KEY), kind(Some(true), Some(KEY))).await, "itself");
    assert_eq!(parent_of_base(Some(KEY), kind(Some(true), Some("k"))).await, "itself");
    let parent = parent_of_base(Some(KEY), kind(Some(true), Some("alias/web"))).await;
    assert_eq!(
        parent,
        format!("copy: it is encrypted with {KEY}, and the image must be encrypted with alias/web")
    );
    let parent = parent_of_base(None, kind(Some(true), Some("k"))).await;
    assert_eq!(parent, "copy: it is not encrypted, and the image must be encrypted with k");
    let parent = parent_of_base(None, kind(Some(true), None)).await;
    assert_eq!(parent, "copy: it is not encrypted, and the image must be");
    let parent = parent_of_base(Some(KEY), kind(Some(false), None)).await;
    assert_eq!(parent, "whole: it is encrypted, and the image must not be");
    fake.with(|world| world.encrypts = true);
    assert_eq!(parent_of_base(Some(KEY), kind(None, None)).await, "itself");
    assert!(parent_of_base(None, kind(None, None)).await.contains("this account encrypts by default"));
}

/// D1.
#[tokio::test]
async fn a_snapshot_of_others_is_copied_and_one_that_is_not_shared_is_not_found() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    for (owner, part) in
        [("all", "it is a public snapshot of 123456789012"), ("private", "it belongs to 123456789012")]
    {
        let base = fake.add(BASE, &APART, owner);
        match ebs.parent(&base, &kind(None, None)).await.unwrap() {
            ParentUse::CopyFirst { why } => assert!(why.starts_with(part), "{why}"),
            other => panic!("{owner}: {other:?}"),
        }
    }
    let base = fake.add(BASE, &APART, "nobody");
    let error = ebs.parent(&base, &kind(None, None)).await.unwrap_err();
    assert_eq!(Kind::of(&error), Kind::NotFound);
    assert!(crate::error::hint_of(&error).unwrap().contains("copy-image"));
}

#[tokio::test]
async fn an_incomplete_base_is_no_parent() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &APART, "self");
    fake.with(|world| world.snapshots.get_mut(BASE).unwrap().state = "pending");
    let error = ebs.parent(&base, &kind(None, None)).await.unwrap_err();
    assert!(format!("{error:#}").ends_with("the snapshot is pending, not completed"), "{error:#}");
}

#[tokio::test]
async fn a_snapshot_is_copied_once() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &APART, "all");
    let plain = kind(None, None);
    let calls = std::cell::Cell::new(0);
    let tell = || calls.set(calls.get() + 1);
    let (first, second) = tokio::join!(ebs.copied(&base, &plain, &tell), ebs.copied(&base, &plain, &tell));
    let copy = first.unwrap();
    assert_eq!(second.unwrap(), copy);
    assert_eq!(ebs.copied(&base, &plain, &tell).await.unwrap(), copy);
    assert_eq!(calls.get(), 1, "called once by whoever creates the copy, and not once it exists");
    let requests = fake.of("CopySnapshot");
    assert_eq!((requests.len(), requests[0].get("SourceRegion")), (1, "eu-test-1"));
    let tags = fake.with(|world| world.snapshots[&copy.0].tags.clone());
    assert_eq!(tags, [(tag::COPY.to_owned(), BASE.to_owned())].into());
    // The copy is needed by later bakes, so the clean-up does not remove it.
    ebs.ensure_no_snapshots(&run()).await.unwrap();
    assert_eq!(fake.left(), [BASE.to_owned(), copy.0.clone()]);
    // With a KMS key, another copy is created.
    let keyed = ebs.copied(&base, &kind(Some(true), Some(KEY)), &|| ()).await.unwrap();
    assert_ne!(keyed, copy);
    let request = fake.of("CopySnapshot").pop().unwrap();
    assert_eq!((request.get("Encrypted"), request.get("KmsKeyId")), ("true", KEY));
}

#[tokio::test]
async fn a_copy_whose_answer_is_lost_is_found() {
    for (reply, sent) in [(Reply::Lost, 1), (Reply::Drop, 2)] {
        let dir = dir();
        let (ebs, fake) = ebs(dir.path(), move |request, nth| {
            if (request.action.as_str(), nth) == ("CopySnapshot", 0) { reply.clone() } else { Reply::Right }
        })
        .await;
        let base = fake.add(BASE, &APART, "all");
        let copy = ebs.copied(&base, &kind(None, None), &|| ()).await.unwrap();
        assert_eq!((fake.left(), fake.count("CopySnapshot")), (vec![BASE.to_owned(), copy.0], sent));
    }
}

#[tokio::test]
async fn a_pending_copy_is_waited_for() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &APART, "all");
    let other = fake.add("snap-0cccccccccccccccc", &APART, "self");
    fake.with(|world| {
        let copy = world.snapshots.get_mut(&other.0).unwrap();
        (copy.state, copy.tags) = ("pending", [(tag::COPY.to_owned(), BASE.to_owned())].into());
    });
    let ends = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        fake.with(|world| world.snapshots.get_mut(&other.0).unwrap().state = "completed");
    };
    let none = kind(None, None);
    let (copy, ()) = tokio::join!(ebs.copied(&base, &none, &|| ()), ends);
    assert_eq!((copy.unwrap(), fake.count("CopySnapshot")), (other, 0));
}

/// Another builder's copy is older, but it was not visible yet when this builder created a copy.
#[tokio::test]
async fn of_two_copies_the_older_one_is_used_and_ours_deleted() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, nth| match (request.action.as_str(), nth) {
        ("DescribeSnapshots", 0) => {
            Reply::Body("<DescribeSnapshotsResponse><snapshotSet/></DescribeSnapshotsResponse>".into())
        }
        _ => Reply::Right,
    })
    .await;
    let base = fake.add(BASE, &APART, "all");
    let other = fake.add("snap-0cccccccccccccccc", &APART, "self");
    let tags: Tags = [(tag::COPY.to_owned(), BASE.to_owned())].into();
    fake.with(|world| world.snapshots.get_mut(&other.0).unwrap().tags = tags);
    assert_eq!(ebs.copied(&base, &kind(None, None), &|| ()).await.unwrap(), other);
    assert_eq!(fake.count("CopySnapshot"), 1);
    assert_eq!(fake.left(), [BASE.to_owned(), other.0]);
}

#[tokio::test]
async fn a_failed_copy_is_repeated_once() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, _| {
        let full = request.action == "CopySnapshot" && request.get("KmsKeyId") == "full";
        if full {
            refuse("ResourceLimitExceeded", "Too many snapshot copies in progress")
        } else {
            Reply::Right
        }
    })
    .await;
    let base = fake.add(BASE, &APART, "all");
    fake.with(|world| world.ends = "error");
    let error = ebs.copied(&base, &kind(None, None), &|| ()).await.unwrap_err();
    assert!(format!("{error:#}").contains("in the state error"), "{error:#}");
    assert_eq!((fake.count("CopySnapshot"), fake.left()), (2, vec![BASE.to_owned()]));
}
