//! S1 and S2: an image that is there already, and what else may hold its name.

use super::case::says;
use super::fixture::{Ec2Fixture, key, options, policy};
use oven::cloud::{BakeKey, Cloud, ImageState, VolumeKind, VolumeSpec, Volumes};
use oven::ids::RunId;
use oven::undo::scope;
use oven_ec2_server::Turn;
use oven_ec2_server::world::now;
use std::future::pending;

async fn baked() -> (Ec2Fixture, oven::cloud::Image) {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let image = fixture.bake().await.0.result.unwrap();
    fixture.server.forget_calls();
    (fixture, image)
}

/// Row 1.1: it is answered, and nothing is changed.
#[tokio::test]
async fn r1_1_available() {
    let (fixture, image) = baked().await;
    assert_eq!(fixture.ec2().find(&key()).await.unwrap(), Some(image.clone()));
    let compat = BakeKey { fingerprint: None, ..key() };
    assert_eq!(fixture.ec2().find(&compat).await.unwrap().map(|found| found.id), Some(image.id.clone()));
    assert_eq!(fixture.calls(), ["DescribeImages", "DescribeImages"]);
    fixture.holds_one(&image, "1.1");
}

/// Row 1.2: it is waited for, and no second one is baked.
#[tokio::test]
async fn r1_2_pending() {
    let (fixture, image) = baked().await;
    fixture
        .server
        .with_world(|world| world.images.get_mut(&image.id.0).unwrap().common.ready_at = now() + 200);
    let found = fixture.ec2().find(&key()).await.unwrap().unwrap();
    assert_eq!((found.id, found.state), (image.id.clone(), ImageState::Available));
    assert!(fixture.calls().iter().all(|call| call == "DescribeImages") && fixture.calls().len() > 2);
    fixture.holds_one(&image, "1.2");
    // It goes away, or fails, while it is waited for: there is none.
    for turn in [Turn::Vanishes, Turn::Failed] {
        fixture.server.with_world(|world| {
            let common = &mut world.images.get_mut(&image.id.0).unwrap().common;
            (common.ready_at, common.turn) = (now() + 50, Some(turn));
        });
        assert_eq!(fixture.ec2().find(&key()).await.unwrap(), None, "{turn:?}");
    }
}

/// Row 1.3: never adopted. What is ours, and failed or without its tags, is replaced where that was asked for.
#[tokio::test]
async fn r1_3_failed_or_incomplete() {
    for untagged in [false, true] {
        let (fixture, image) = baked().await;
        fixture.server.with_world(|world| {
            let common = &mut world.images.get_mut(&image.id.0).unwrap().common;
            if untagged {
                common.tags.remove(oven::cloud::tag::FINGERPRINT);
            } else {
                common.turn = Some(Turn::Failed);
            }
        });
        let ec2 = fixture.ec2();
        assert_eq!(ec2.find(&key()).await.unwrap(), None);
        let (ended, _) = fixture.bake().await;
        says(&ended.result.unwrap_err(), &[&image.id.0, "web-1", "--replace-failed"], "1.3");
        assert_eq!(ended.leftovers, []);
        let made = fixture.made();
        assert_eq!((made.volumes.len(), made.snapshots.len(), made.images.len()), (0, 1, 1));
        assert_eq!(fixture.sent("RegisterImage", "Name"), ["web-1"], "no other name is tried");
        assert_eq!(ec2.replace_failed("web-1").await.unwrap(), Some(image.id.clone()));
        fixture.holds_nothing("replaced");
        fixture.heals("1.3").await;
    }
}

/// Row 1.3: one that works, or is not ours, stays.
#[tokio::test]
async fn r1_3_nothing_else_is_replaced() {
    let (fixture, image) = baked().await;
    let error = fixture.ec2().replace_failed("web-1").await.unwrap_err();
    says(&error, &[&image.id.0, "replaces only images that it created"], "1.3");
    fixture.server.with_world(|world| {
        let common = &mut world.images.get_mut(&image.id.0).unwrap().common;
        common.tags.clear();
        common.turn = Some(Turn::Failed);
    });
    says(
        &fixture.ec2().replace_failed("web-1").await.unwrap_err(),
        &["oven replaces only images that it created"],
        "1.3",
    );
    assert_eq!((fixture.count("DeregisterImage"), fixture.count("DeleteSnapshot")), (0, 0));
}

/// Row 1.3: another checksum, fingerprint or architecture is another image.
#[tokio::test]
async fn r1_3_every_part_of_the_key_counts() {
    let (fixture, _) = baked().await;
    for other in [
        BakeKey { checksum: "d".into(), ..key() },
        BakeKey { fingerprint: Some("g".into()), ..key() },
        // What EC2's filters take for a pattern.
        BakeKey { fingerprint: Some("*".into()), ..key() },
        BakeKey { checksum: "?".into(), ..key() },
    ] {
        assert_eq!(fixture.ec2().find(&other).await.unwrap(), None, "{other:?}");
    }
}

/// Row 1.4: the newest of two.
#[tokio::test]
async fn r1_4_two_of_them() {
    let (fixture, image) = baked().await;
    fixture.server.with_world(|world| {
        let mut twin = world.images[&image.id.0].clone();
        twin.common.id = "ami-0dddddddddddddddd".into();
        twin.name = "web-1-forced".into();
        twin.common.created += 1000;
        world.images.insert(twin.common.id.clone(), twin);
    });
    for _ in 0..3 {
        let found = fixture.ec2().find(&key()).await.unwrap().unwrap();
        assert_eq!(found.id.0, "ami-0dddddddddddddddd");
    }
}

/// Row 1.5: the first one's image cannot be seen yet: the name stops the second one, which adopts it.
#[tokio::test]
async fn r1_5_invisible_for_a_while() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let first = fixture.bake().await.0.result.unwrap();
    fixture
        .server
        .with_world(|world| world.images.get_mut(&first.id.0).unwrap().common.visible_at = now() + 500);
    assert_eq!(fixture.ec2().find(&key()).await.unwrap(), None);
    let (ended, _) = fixture.bake().await;
    assert_eq!(ended.result.unwrap().id, first.id);
    assert_eq!(ended.leftovers, []);
    fixture.holds_one(&first, "1.5");
    assert_eq!(fixture.ever(), (2, 2, 1));
}

/// Row 1.7: two builders in a row that did not see each other: the second one's snapshot and volume go. (Many at once,
/// with all kinds of delays: `many`.)
#[tokio::test]
async fn r1_7_the_loser_cleans_up() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let (one, two) = (fixture.ec2(), fixture.ec2());
    let (a, b) = (RunId::new(), RunId::new());
    let (first, second) = tokio::join!(fixture.bake_by(&one, &a), fixture.bake_by(&two, &b));
    assert_eq!((&first.leftovers, &second.leftovers), (&vec![], &vec![]));
    let (first, second) = (first.result.unwrap(), second.result.unwrap());
    assert_eq!(first.id, second.id);
    assert!(first.was_created_by(&a) != first.was_created_by(&b));
    fixture.holds_one(&first, "1.7");
    assert_eq!(fixture.ever(), (2, 2, 1));
}

/// Row 1.8: a token is of the run: two runs of a definition never share a volume, and one run has one.
#[tokio::test]
async fn r1_8_tokens_are_of_the_run() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let ec2 = fixture.ec2();
    let base = ec2.base(&fixture.base).await.unwrap();
    let spec = |run: &RunId| VolumeSpec {
        snapshot: base.snapshot.clone(),
        size_gib: base.size_gib,
        kind: VolumeKind::default(),
        run: run.clone(),
        tags: Default::default(),
    };
    let (a, b) = (RunId::new(), RunId::new());
    let ended = scope(policy(), pending(), async |_| {
        let (first, again) = (ec2.create(&spec(&a)).await?, ec2.create(&spec(&a)).await?);
        Ok((first, again, ec2.create(&spec(&b)).await?))
    });
    let (first, again, other) = ended.await.result.unwrap();
    assert!(first == again && first != other);
    for run in [&a, &b] {
        ec2.ensure_no_volumes(run).await.unwrap();
    }
    fixture.holds_nothing("1.8");
}
