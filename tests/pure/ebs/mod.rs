//! EBS direct as oven uses it, against the EC2-shaped server: whole snapshots read, written and removed, with its
//! manners and its limits, on no instance at all. What counts is what the server has in the end.

mod fixture;

use fixture::{
    CHANGES, EbsFixture, GivenBlocks, MILLI, are_expired, block, image, is_the_child, none, rebake, rules,
    shared, spec, wait_until,
};
use oven::cloud::block_api::{BlockApi, ParentUse, SnapshotExpired};
use oven::cloud::iam_policy::{DiskAccess, policy};
use oven::cloud::{Cloud, Tags, VolumeKind, tag};
use oven::error::hint_of;
use oven::ids::BLOCK;
use oven::ids::{RunId, SnapshotId};
use oven::transfer::download::verify;
use oven::transfer::upload::upload;

use oven::undo::scope;
use oven_ec2_server::{Delays, Direct, DirectThrottle, Fault, ServerOptions, Turn, What};
use sha2::{Digest as _, Sha256};
use std::time::{Duration, Instant};

/// With the least role that such bakes need, and on no instance.
#[tokio::test]
async fn a_child_is_written_and_registered_with_the_least_role() {
    let options =
        ServerOptions { policy: Some(policy(DiskAccess::Direct, None, &[])), ..ServerOptions::default() };
    let fixture = EbsFixture::new("child", options).await;
    let (ebs, ec2, run) = (fixture.ebs(), fixture.ec2(), RunId::new());
    let ended = scope(rules(), std::future::pending(), async |undo| {
        ec2.ensure_permitted(&fixture.base).await?;
        let id = rebake(&fixture, &ebs, &run).await?;
        ec2.register(&id, &image(&fixture, &run), &undo).await
    })
    .await;
    let baked = ended.result.unwrap();
    is_the_child(&fixture, &ebs, &baked.snapshot).await;
    let entry = &fixture.made()[0];
    assert_eq!((entry.id.as_str(), entry.state.as_str()), (&*baked.snapshot.0, "completed"));
    assert_eq!((entry.tags["role"].as_str(), &entry.tags[tag::RUN]), ("web", &run.0));
    // It is a result now.
    ebs.ensure_no_snapshots(&run).await.unwrap();
    assert_eq!(fixture.made().len(), 1);
    assert_eq!(fixture.count("PutSnapshotBlock"), CHANGES.len());
    // Of a failed bake it is removed, complete or not.
    let (other, pending) = (RunId::new(), RunId::new());
    rebake(&fixture, &ebs, &other).await.unwrap();
    ebs.start(&spec(&fixture, None, &pending)).await.unwrap();
    assert_eq!(fixture.made().len(), 3);
    for run in [&other, &pending] {
        ebs.ensure_no_snapshots(run).await.unwrap();
    }
    assert_eq!(fixture.made().len(), 1);
    let refused =
        fixture.server.calls().into_iter().find(|call| {
            call.answer.contains("UnauthorizedOperation") || call.answer.contains("AccessDenied")
        });
    assert!(refused.is_none(), "{refused:?}");
    assert_eq!((fixture.count("DescribeInstances"), fixture.count("CreateVolume")), (0, 0));
}

/// Somebody else's public base: copied once, with the same role, and everybody after that uses the copy.
#[tokio::test]
async fn a_public_base_is_copied_once() {
    let options = ServerOptions {
        policy: Some(policy(DiskAccess::Direct, None, &[])),
        delays: Delays { copying: 300 * MILLI, ..Delays::default() },
        ..ServerOptions::default()
    };
    let fixture = EbsFixture::new("public", options).await;
    fixture.given_away(|snapshot| snapshot.public = true);
    // Two processes at once.
    let (one, other) = (fixture.ebs(), fixture.ebs());
    assert!(matches!(
        one.parent(&fixture.base.snapshot, &none()).await.unwrap(),
        ParentUse::CopyFirst { .. }
    ));
    let kind = none();
    let (first, second) = tokio::join!(
        one.copied(&fixture.base.snapshot, &kind, &|| ()),
        other.copied(&fixture.base.snapshot, &kind, &|| ())
    );
    assert_eq!(first.unwrap(), second.unwrap());
    let copies = fixture.made();
    assert_eq!(copies.len(), 1, "{copies:?}");
    assert_eq!(copies[0].tags, Tags::from([(tag::COPY.to_owned(), fixture.base.snapshot.0.clone())]));
    let sent = fixture.count("CopySnapshot");
    let child = rebake(&fixture, &fixture.ebs(), &RunId::new()).await.unwrap();
    is_the_child(&fixture, &one, &child).await;
    assert_eq!((fixture.count("CopySnapshot"), fixture.made().len()), (sent, 2));
    // Nobody sweeps it.
    let stale = fixture.ec2().stale_runs(Some(Duration::ZERO)).await.unwrap();
    assert!(stale.iter().all(|run| !run.resources.contains(&copies[0].id)), "{stale:?}");
}

/// D1: encrypted with a key that we may not use.
#[tokio::test]
async fn an_unusable_key_of_the_base_is_named_with_the_missing_permission() {
    let fixture = EbsFixture::plain("key").await;
    let key = "arn:aws:kms:us-east-1:123456789012:key/0123abcd";
    let id = &fixture.base.snapshot;
    fixture.server.with_world(|world| {
        let snapshot = world.snapshots.get_mut(&id.0).unwrap();
        (snapshot.encrypted, snapshot.key) = (true, Some(key.to_owned()));
    });
    let ebs = fixture.ebs();
    assert_eq!(ebs.parent(id, &none()).await.unwrap(), ParentUse::UseAsParent);
    let error = ebs.contents(id).await.unwrap_err();
    assert!(hint_of(&error).is_some_and(|hint| hint.contains("kms:Decrypt")), "{error:#}");
    assert_eq!(fixture.count("ListSnapshotBlocks"), 1);
    fixture.server.set(|options| {
        options.keys.insert(key.to_owned());
    });
    let child = rebake(&fixture, &ebs, &RunId::new()).await.unwrap();
    fixture.server.with_world(|world| assert_eq!(world.snapshots[&child.0].key.as_deref(), Some(key)));
    // Another key than asked for: by way of a copy, which has it.
    let other = "arn:aws:kms:us-east-1:123456789012:key/ffff";
    fixture.server.set(|options| {
        options.keys.insert(other.to_owned());
    });
    let kind = VolumeKind { encrypted: Some(true), kms_key: Some(other.to_owned()), ..none() };
    assert!(matches!(ebs.parent(id, &kind).await.unwrap(), ParentUse::CopyFirst { .. }));
    let copy = ebs.copied(id, &kind, &|| ()).await.unwrap();
    assert_eq!(ebs.parent(&copy, &kind).await.unwrap(), ParentUse::UseAsParent);
    fixture.server.with_world(|world| assert_eq!(world.snapshots[&copy.0].key.as_deref(), Some(other)));
}

/// An account that encrypts by default takes no unencrypted parent.
#[tokio::test]
async fn a_base_in_an_account_that_encrypts_is_copied() {
    let fixture = EbsFixture::with("encrypts", Direct { encrypts: true, ..Direct::default() }).await;
    let ebs = fixture.ebs();
    assert!(matches!(
        ebs.parent(&fixture.base.snapshot, &none()).await.unwrap(),
        ParentUse::CopyFirst { .. }
    ));
    let child = rebake(&fixture, &ebs, &RunId::new()).await.unwrap();
    fixture.server.with_world(|world| assert!(world.snapshots[&child.0].encrypted));
}

/// Small pages, empty ones between them, and tokens that are good for a moment.
#[tokio::test]
async fn pages_and_tokens() {
    for (page, empty_pages, token) in [(1, 0, 10_000), (1, 1, 10_000), (2, 2, 10_000), (100, 0, 100)] {
        let tokens = token * MILLI;
        let direct = Direct {
            page: Some(page),
            empty_pages,
            block_tokens: tokens,
            page_tokens: tokens,
            ..Direct::default()
        };
        let fixture = EbsFixture::with("pages", direct).await;
        let ebs = fixture.ebs();
        let child = rebake(&fixture, &ebs, &RunId::new()).await.unwrap();
        if token < 10_000 {
            are_expired(&fixture, &child).await;
        }
        is_the_child(&fixture, &ebs, &child).await;
    }
}

/// D5: a server that takes 40 puts and 40 gets a second, and has no patience.
#[tokio::test]
async fn a_throttled_service_gets_all_of_it() {
    let throttle = DirectThrottle { puts: (10.0, 40.0), gets: (10.0, 40.0), ..DirectThrottle::EBS };
    let fixture =
        EbsFixture::with("throttled", Direct { throttle: Some(throttle), ..Direct::default() }).await;
    let (ebs, run) = (fixture.ebs(), RunId::new());
    let blocks: Vec<(u32, u8)> = (0..40).map(|index| (index, index as u8 + 1)).collect();
    let begun = Instant::now();
    let sent =
        upload(&ebs, &spec(&fixture, None, &run), GivenBlocks::new(&blocks), &|_, _| ()).await.unwrap();
    verify(&ebs, &sent.snapshot, &sent.blocks, None).await.unwrap();
    assert!(begun.elapsed() >= 1000 * MILLI, "{:?}", begun.elapsed());
    let refused = fixture.server.calls().iter().filter(|call| call.answer.contains("Throttled")).count();
    assert!(refused > 0 && fixture.made().len() == 1, "{refused}");
}

/// D4 and D7 again, with a server that acts, and with every call of a kind lost once.
#[tokio::test]
async fn lost_answers_and_lost_calls() {
    for action in
        ["ListSnapshotBlocks", "StartSnapshot", "PutSnapshotBlock", "CompleteSnapshot", "GetSnapshotBlock"]
    {
        for what in [What::DropBefore, What::DropAfter, What::Error("InternalServerException".into())] {
            let faults = vec![Fault::new(action, 1, what.clone()), Fault::new(action, 3, what.clone())];
            let fixture = EbsFixture::new("lost", ServerOptions { faults, ..ServerOptions::default() }).await;
            let (ebs, run) = (fixture.ebs(), RunId::new());
            let child = rebake(&fixture, &ebs, &run).await.unwrap();
            is_the_child(&fixture, &ebs, &child).await;
            assert_eq!(fixture.made().len(), 1, "{action} {what:?}");
            ebs.ensure_no_snapshots(&run).await.unwrap();
            assert_eq!(fixture.made().len(), 0, "{action} {what:?}");
        }
    }
}

/// D3: a bit that flips on the way.
#[tokio::test]
async fn a_flipped_bit() {
    for (times, good) in [(3, true), (4, false)] {
        let faults = vec![Fault::new("GetSnapshotBlock", 1, What::Flipped).times(times)];
        let fixture = EbsFixture::new("flipped", ServerOptions { faults, ..ServerOptions::default() }).await;
        let reader = fixture.ebs().reader(&fixture.base.snapshot).await.unwrap();
        let read = tokio::task::spawn_blocking(move || reader.read(1)).await.unwrap();
        assert_eq!(read.is_ok(), good, "{read:?}");
        assert!(read.ok().is_none_or(|(data, _)| data == vec![2; BLOCK]));
        assert_eq!(fixture.count("GetSnapshotBlock"), 4);
    }
}

/// D8: given up while blocks are sent, and after they were sealed: written again, and one is left.
#[tokio::test]
async fn an_expired_snapshot_is_written_again() {
    let faults = vec![Fault::new("StartSnapshot", 1, What::Turns(Turn::Failed))];
    let sealed = ServerOptions { faults, ..ServerOptions::default() };
    let fixture = EbsFixture::new("failed", sealed).await;
    let (ebs, run) = (fixture.ebs(), RunId::new());
    let child = rebake(&fixture, &ebs, &run).await.unwrap();
    is_the_child(&fixture, &ebs, &child).await;
    assert_eq!(fixture.made().len(), 1);
    assert_eq!(fixture.count("StartSnapshot"), 2);
    // Between two blocks.
    let fixture = EbsFixture::with("expired", Direct { timeout: 3000 * MILLI, ..Direct::default() }).await;
    let (ebs, run) = (fixture.ebs(), RunId::new());
    let id = ebs.start(&spec(&fixture, None, &run)).await.unwrap();
    let (data, digest) = (block(1), Sha256::digest(block(1)).into());
    ebs.put(&id, 0, data.clone(), digest).await.unwrap();
    let state =
        || fixture.server.ledger().snapshots.into_iter().find(|entry| entry.id == id.0).unwrap().state;
    wait_until("the snapshot is given up", || state() == "error").await;
    let error = ebs.put(&id, 1, data, digest).await.unwrap_err();
    assert!(error.chain().any(|cause| cause.is::<SnapshotExpired>()), "{error:#}");
    let error = ebs.complete(&id, 1, Sha256::digest(digest).into()).await.unwrap_err();
    assert!(error.chain().any(|cause| cause.is::<SnapshotExpired>()), "{error:#}");
    assert_eq!(fixture.made().len(), 0);
}

/// A process that was killed while it sent: a sweep finds what it began, and removes it.
#[tokio::test]
async fn a_pending_snapshot_of_a_dead_run_is_swept() {
    let fixture = EbsFixture::plain("swept").await;
    let (ebs, run) = (fixture.ebs(), RunId::new());
    let id = ebs.start(&spec(&fixture, Some(&fixture.base.snapshot), &run)).await.unwrap();
    ebs.put(&id, 5, block(5), Sha256::digest(block(5)).into()).await.unwrap();
    let stale = async |older_than| fixture.ec2().stale_runs(older_than).await.unwrap();
    assert_eq!(stale(None).await, []);
    // It is this process's; another boot's is not.
    fixture.server.with_world(|world| {
        let tags = &mut world.snapshots.get_mut(&id.0).unwrap().common.tags;
        let mut owner: oven::owner::Owner = tags[tag::OWNER].parse().unwrap();
        owner.boot = "another".into();
        tags.insert(tag::OWNER.to_owned(), owner.to_string());
    });
    let found = stale(None).await;
    assert_eq!((found.len(), &found[0].run, &found[0].resources), (1, &run, &vec![id.0.clone()]));
    // By another process, which knows of no start.
    fixture.ebs().ensure_no_snapshots(&run).await.unwrap();
    assert_eq!(fixture.made().len(), 0);
}

/// A role for bakes by blocks does nothing to what oven did not start.
#[tokio::test]
async fn what_is_not_ours_stays_as_it_is() {
    let options =
        ServerOptions { policy: Some(policy(DiskAccess::Direct, None, &[])), ..ServerOptions::default() };
    let fixture = EbsFixture::new("theirs", options).await;
    let client = aws_sdk_ebs::Client::new(&shared(&fixture.server));
    let start = client.start_snapshot().volume_size(1).send().await;
    assert!(format!("{start:?}").contains("AccessDenied"), "{start:?}");
    // Somebody's pending snapshot.
    fixture.server.set(|options| options.policy = None);
    let theirs = client.start_snapshot().volume_size(1).send().await.unwrap().snapshot_id.unwrap();
    fixture.server.set(|options| options.policy = Some(policy(DiskAccess::Direct, None, &[])));
    let ebs = fixture.ebs();
    let id = SnapshotId(theirs);
    let put = ebs.put(&id, 0, block(1), Sha256::digest(block(1)).into()).await.unwrap_err();
    assert!(format!("{put:#}").contains("AccessDenied"), "{put:#}");
    let delete =
        aws_sdk_ec2::Client::new(&shared(&fixture.server)).delete_snapshot().snapshot_id(&id.0).send();
    assert!(format!("{:?}", delete.await).contains("UnauthorizedOperation"));
    assert_eq!(fixture.made().iter().filter(|entry| entry.id == id.0).count(), 1);
}
