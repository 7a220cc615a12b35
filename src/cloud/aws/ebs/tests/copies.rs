//! What stands between a base and a child, and copies that are made once.

use super::*;

const KEY: &str = "arn:aws:kms:eu-test-1:123456789012:key/k";

fn kind(encrypted: Option<bool>, kms_key: Option<&str>) -> VolumeKind {
    VolumeKind { encrypted, kms_key: kms_key.map(str::to_owned), ..Default::default() }
}

/// D1.
#[tokio::test]
async fn what_stands_between_a_base_and_a_child_is_told() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &APART, "self");
    let asked = async |has: Option<&str>, kind: VolumeKind| {
        fake.with(|world| world.snapshots.get_mut(BASE).unwrap().key = has.map(str::to_owned));
        match ebs.parent(&base, &kind).await.unwrap() {
            Parent::Itself => "itself".to_owned(),
            Parent::Copy { why } => format!("copy: {why}"),
            Parent::Whole { why } => format!("whole: {why}"),
        }
    };
    assert_eq!(asked(None, kind(None, None)).await, "itself");
    assert_eq!(asked(None, kind(Some(false), None)).await, "itself");
    assert_eq!(asked(Some(KEY), kind(None, None)).await, "itself");
    assert_eq!(asked(Some(KEY), kind(Some(true), None)).await, "itself");
    assert_eq!(asked(Some(KEY), kind(Some(true), Some(KEY))).await, "itself");
    assert_eq!(asked(Some(KEY), kind(Some(true), Some("k"))).await, "itself");
    let told = asked(Some(KEY), kind(Some(true), Some("alias/web"))).await;
    assert_eq!(told, format!("copy: it is encrypted with {KEY}, and the image shall be with alias/web"));
    let told = asked(None, kind(Some(true), Some("k"))).await;
    assert_eq!(told, "copy: it is not encrypted, and the image shall be with k");
    let told = asked(None, kind(Some(true), None)).await;
    assert_eq!(told, "copy: it is not encrypted, and the image shall be");
    let told = asked(Some(KEY), kind(Some(false), None)).await;
    assert_eq!(told, "whole: it is encrypted, and the image shall not be");
    fake.with(|world| world.encrypts = true);
    assert_eq!(asked(Some(KEY), kind(None, None)).await, "itself");
    assert!(asked(None, kind(None, None)).await.contains("this account encrypts by default"));
}

/// D1.
#[tokio::test]
async fn a_snapshot_of_others_is_copied_and_one_that_is_not_shared_is_not_found() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    for (owner, part) in [("all", "it is public, and 123456789012's"), ("private", "it is 123456789012's")] {
        let base = fake.add(BASE, &APART, owner);
        match ebs.parent(&base, &kind(None, None)).await.unwrap() {
            Parent::Copy { why } => assert!(why.starts_with(part), "{why}"),
            other => panic!("{owner}: {other:?}"),
        }
    }
    let base = fake.add(BASE, &APART, "nobody");
    let error = ebs.parent(&base, &kind(None, None)).await.unwrap_err();
    assert_eq!(Kind::of(&error), Kind::NotFound);
    assert!(crate::error::hint_of(&error).unwrap().contains("copy-image"));
}

#[tokio::test]
async fn a_base_that_is_not_complete_is_no_parent() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &APART, "self");
    fake.with(|world| world.snapshots.get_mut(BASE).unwrap().state = "pending");
    let error = ebs.parent(&base, &kind(None, None)).await.unwrap_err();
    assert!(format!("{error:#}").ends_with("it is pending, and not completed"), "{error:#}");
}

#[tokio::test]
async fn a_snapshot_is_copied_once() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &APART, "all");
    let plain = kind(None, None);
    let told = std::cell::Cell::new(0);
    let tell = || told.set(told.get() + 1);
    let (first, second) = tokio::join!(ebs.copied(&base, &plain, &tell), ebs.copied(&base, &plain, &tell));
    let copy = first.unwrap();
    assert_eq!(second.unwrap(), copy);
    assert_eq!(ebs.copied(&base, &plain, &tell).await.unwrap(), copy);
    assert_eq!(told.get(), 1, "told by the one who made it, and by nobody once it is there");
    let asked = fake.of("CopySnapshot");
    assert_eq!((asked.len(), asked[0].get("SourceRegion")), (1, "eu-test-1"));
    let tags = fake.with(|world| world.snapshots[&copy.0].tags.clone());
    assert_eq!(tags, [(tag::COPY.to_owned(), BASE.to_owned())].into());
    // It is a result.
    ebs.ensure_no_snapshots(&run()).await.unwrap();
    assert_eq!(fake.left(), [BASE.to_owned(), copy.0.clone()]);
    // With a key it is another one.
    let keyed = ebs.copied(&base, &kind(Some(true), Some(KEY)), &|| ()).await.unwrap();
    assert_ne!(keyed, copy);
    let asked = fake.of("CopySnapshot").pop().unwrap();
    assert_eq!((asked.get("Encrypted"), asked.get("KmsKeyId")), ("true", KEY));
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

/// Another builder's came first, and was not to be seen yet.
#[tokio::test]
async fn of_two_copies_the_older_one_is_used_and_ours_goes() {
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
async fn a_copy_that_fails_is_made_again_once() {
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
