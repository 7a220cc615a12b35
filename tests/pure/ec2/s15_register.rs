//! S15: registered once, under one name.

use super::case::{End, case, error, lost_after, lost_before, prove, says};
use super::fixture::{Ec2Fixture, MILLI, options, timeouts};
use oven::cloud::aws::ec2::Timeouts;
use oven::cloud::{Cloud, tag};
use oven::error::Kind;
use oven::ids::RunId;

use oven::undo::Undo;
use oven_ec2_server::world::{Common, Image, now};
use oven_ec2_server::{Fault, Turn, What};

fn register(nth: u32, what: What) -> Fault {
    Fault::new("RegisterImage", nth, what)
}

/// Row 15.1: looked up by name; its root is our snapshot, or it was never registered.
#[tokio::test]
async fn r15_1_lost() {
    let before = lost_before()
        .map(|what| case("15.1 before", &[register(1, what)], End::Baked).count("RegisterImage", 2));
    let after = lost_after()
        .map(|what| case("15.1 after", &[register(1, what)], End::Baked).count("RegisterImage", 1));
    prove(before.into_iter().chain(after)).await;
}

/// Row 15.1: lost, and invisible: the answer to the second call is that the name is taken, by our own.
#[tokio::test]
async fn r15_1_lost_and_invisible() {
    // A call that hangs lasts longer than the lag.
    prove(lost_after().into_iter().filter(|what| *what != What::HangAfter).map(|what| {
        case("15.1 invisible", &[register(1, what)], End::Baked)
            .set(|o| o.visibility_lag = 800 * MILLI)
            .count("RegisterImage", 2)
    }))
    .await;
}

/// Row 15.1: lost for ever, before the effect.
#[tokio::test]
async fn r15_1_lost_for_ever() {
    let lost = register(1, What::DropBefore).times(99);
    prove([case("15.1", &[lost], End::Fails(&["RegisterImage", "web-1"]))]).await;
}

/// An image of somebody's that has our name.
fn holder(fixture: &Ec2Fixture, change: impl FnOnce(&mut Image)) -> String {
    let id = "ami-0dddddddddddddddd".to_owned();
    fixture.server.with_world(|world| {
        let base = world.images.values().next().unwrap().clone();
        let tags = [
            (tag::RUN, "another"),
            (tag::OWNER, "i-0ccccccccccccccccc/b/1/1"),
            (tag::CHECKSUM, "c"),
            (tag::FINGERPRINT, "f"),
        ];
        let tags = tags.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let common = Common {
            id: id.clone(),
            owner: base.common.owner.clone(),
            tags,
            created: now(),
            ..Common::default()
        };
        let mut image = Image { common, name: "web-1".into(), ..base };
        change(&mut image);
        world.images.insert(id.clone(), image);
    });
    id
}

/// Row 15.2: the same bake, available or on its way: it is the answer, and our own snapshot goes.
#[tokio::test]
async fn r15_2_the_winner_is_adopted() {
    for later in [0, 200] {
        for lag in [0, 150] {
            let fixture = Ec2Fixture::new(options(Vec::new()));
            let id = holder(&fixture, |image| {
                (image.common.ready_at, image.common.visible_at) = (now() + later, now() + lag);
            });
            let (ended, run) = fixture.bake().await;
            assert_eq!(ended.leftovers, []);
            let image = ended.result.unwrap();
            assert_eq!((image.id.0.as_str(), image.was_created_by(&run)), (id.as_str(), false));
            let made = fixture.made();
            assert_eq!((made.volumes.len(), made.snapshots.len(), made.images.len()), (0, 0, 1));
            assert_eq!(fixture.sent("RegisterImage", "Name"), ["web-1"]);
            fixture.is_clean("15.2");
        }
    }
}

/// Row 15.2: anything else under our name is an end, and no other name is tried.
#[tokio::test]
async fn r15_2_taken_by_another() {
    type Change = fn(&mut Image);
    let cases: [(&str, Change, &[&str]); 6] = [
        (
            "fingerprint",
            |i| _ = i.common.tags.insert(tag::FINGERPRINT.into(), "g".into()),
            &["is used by ami-0ddd", "another image"],
        ),
        (
            "checksum",
            |i| _ = i.common.tags.insert(tag::CHECKSUM.into(), "d".into()),
            &["is used by ami-0ddd"],
        ),
        ("foreign", |i| i.common.tags.clear(), &["is used by ami-0ddd"]),
        (
            "failed",
            |i| i.common.turn = Some(Turn::Failed),
            &["used by ami-0ddd", "failed", "--replace-failed"],
        ),
        (
            "failed, and not ours",
            |i| {
                i.common.tags.clear();
                i.common.turn = Some(Turn::Failed);
            },
            &["failed", "oven did not create it"],
        ),
        ("incomplete", |i| _ = i.common.tags.remove(tag::CHECKSUM), &["incomplete", "--replace-failed"]),
    ];
    for (what, change, texts) in cases {
        let fixture = Ec2Fixture::new(options(Vec::new()));
        let id = holder(&fixture, change);
        let (ended, _) = fixture.bake().await;
        assert_eq!(ended.leftovers, [], "{what}");
        let error = ended.result.expect_err(what);
        assert_eq!(Kind::of(&error), Kind::Cloud);
        says(&error, texts, what);
        says(&error, &["InvalidAMIName.Duplicate"], what);
        let made = fixture.made();
        assert_eq!((made.volumes.len(), made.snapshots.len()), (0, 0), "{what}");
        assert_eq!(made.images.iter().map(|i| i.id.clone()).collect::<Vec<_>>(), [id], "{what}");
        assert_eq!(fixture.sent("RegisterImage", "Name"), ["web-1"], "{what}");
        assert_eq!(fixture.count("DeregisterImage"), 0, "{what}");
    }
}

/// Row 15.2: the holder goes away while it is waited for: the name is ours after all.
#[tokio::test]
async fn r15_2_the_holder_gives_up() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    holder(&fixture, |image| {
        image.common.ready_at = now() + 600;
        image.common.turn = Some(Turn::Vanishes);
    });
    let (ended, run) = fixture.bake().await;
    assert_eq!(ended.leftovers, []);
    let image = ended.result.unwrap();
    assert!(image.was_created_by(&run));
    fixture.holds_one(&image, "15.2");
}

/// Row 15.3: it does not show at once.
#[tokio::test]
async fn r15_3_not_to_be_seen_yet() {
    prove([
        case("15.3", &[], End::Baked).set(|o| o.visibility_lag = 400 * MILLI),
        case("15.3 stale", &[Fault::new("DescribeImages", 2, What::Stale).times(3)], End::Baked),
        case("15.3 said", &[error("DescribeImages", 2, "InvalidAMIID.NotFound").times(2)], End::Baked),
    ])
    .await;
    // For longer than EC2 says, it is not there: somebody deregistered it.
    let fixture = Ec2Fixture::with(&[register(1, What::Turns(Turn::Vanishes))]);
    let ec2 = fixture.ec2_with(|o| o.timeouts = Timeouts { visible: 300 * MILLI, ..timeouts() });
    let begun = std::time::Instant::now();
    let ended = fixture.bake_by(&ec2, &RunId::new()).await;
    says(&ended.result.unwrap_err(), &["ami-", "not visible"], "15.3");
    assert!(begun.elapsed() < std::time::Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(ended.leftovers, []);
    fixture.holds_nothing("15.3");
}

/// Row 15.4: deregistered, with EC2's reason.
#[tokio::test]
async fn r15_4_failed() {
    let failed = register(1, What::Turns(Turn::Failed));
    let texts = &["it is failed", "It was planned so", "deregistered"];
    let delayed = case("15.4 later", std::slice::from_ref(&failed), End::Fails(texts))
        .set(|o| o.delays.image = 100 * MILLI);
    let lost = What::DropAfter;
    let deregister = Fault::new("DeregisterImage", 1, lost);
    prove([
        case("15.4", std::slice::from_ref(&failed), End::Fails(texts)).count("DeregisterImage", 1),
        delayed,
        case("15.4 lost", &[failed, deregister], End::Fails(texts)).count("DeregisterImage", 2),
    ])
    .await;
}

/// Row 15.4: it cannot be deregistered either: the error has the cause, and how to remove it.
#[tokio::test]
async fn r15_4_failed_and_stays() {
    let faults =
        [register(1, What::Turns(Turn::Billed)), error("DeregisterImage", 1, "UnauthorizedOperation")];
    let fixture = Ec2Fixture::with(&faults);
    let (ended, _) = fixture.bake().await;
    let made = fixture.made();
    assert_eq!((made.volumes.len(), made.snapshots.len(), made.images.len()), (0, 1, 1));
    let error = ended.result.unwrap_err();
    says(&error, &["billed as", &made.images[0].id, "aws ec2 deregister-image", "(request "], "15.4");
    // Nothing that is no good may be found by the next bake.
    let found = fixture.ec2().find(&super::fixture::key()).await.unwrap();
    assert_eq!(found, None, "an image that was refused is no hit");
    fixture.is_clean("15.4");
}

/// Row 15.7: refused before anything is sent.
#[tokio::test]
async fn r15_7_what_ec2_would_not_take() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let (ec2, run) = (fixture.ec2(), RunId::new());
    let base = ec2.base(&fixture.base).await.unwrap();
    fixture.server.forget_calls();
    let good = super::fixture::image_spec(&base, &run);
    let many = (0..50).map(|n| (format!("key-{n}"), String::new())).collect();
    let long = [("key".to_owned(), "x".repeat(257))].into();
    let key = [("k".repeat(129), String::new())].into();
    let aws = [("aws:x".to_owned(), String::new())].into();
    let twice = vec![Default::default(); 2];
    let mapped = oven::cloud::Attributes { mappings: twice, ..good.attributes.clone() };
    for (what, spec, text) in [
        ("51 tags", oven::cloud::ImageSpec { tags: many, ..good.clone() }, "tags"),
        ("value", oven::cloud::ImageSpec { tags: long, ..good.clone() }, "key"),
        ("key", oven::cloud::ImageSpec { tags: key, ..good.clone() }, "kkk"),
        ("aws:", oven::cloud::ImageSpec { tags: aws, ..good.clone() }, "aws:"),
        ("name", oven::cloud::ImageSpec { name: "web:1".into(), ..good.clone() }, "web:1"),
        ("short", oven::cloud::ImageSpec { name: "we".into(), ..good.clone() }, "we"),
        ("long", oven::cloud::ImageSpec { name: "w".repeat(129), ..good.clone() }, "128"),
        ("description", oven::cloud::ImageSpec { description: "d".repeat(256), ..good.clone() }, "255"),
        ("mapping", oven::cloud::ImageSpec { attributes: mapped, ..good.clone() }, "twice"),
    ] {
        let error = ec2.register(&base.snapshot, &spec, &Undo::default()).await.expect_err(what);
        says(&error, &[text], what);
    }
    assert_eq!(fixture.calls(), Vec::<String>::new());
}
