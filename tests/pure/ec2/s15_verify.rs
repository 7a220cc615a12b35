//! S15.5 to S16: what was registered is read back, and is what it was to be.

use super::case::{End, case, error, is_of, prove, says};
use super::fixture::{Ec2Fixture, MILLI, image_tags, options};
use oven::error::Kind;
use oven_ec2_server::world::{Image, Mapping};
use oven_ec2_server::{Fault, Turn, What};

fn turns(turn: Turn) -> Fault {
    Fault::new("RegisterImage", 1, What::Turns(turn))
}

/// A base with all that can be inherited.
fn rich(image: &mut Image) {
    image.boot_mode = Some("uefi".into());
    image.tpm = Some("v2.0".into());
    image.imds = Some("v2.0".into());
    (image.ena, image.sriov) = (Some(true), Some("simple".into()));
    image.mappings[0].kind.volume_type = "gp3".into();
    (image.mappings[0].kind.iops, image.mappings[0].kind.throughput) = (Some(4000), Some(500));
    let kind = oven_ec2_server::world::Kind { volume_type: "gp3".into(), ..Default::default() };
    image.mappings.push(Mapping {
        device: "/dev/sdb".into(),
        size: Some(9),
        kind,
        delete_on_termination: false,
        ..Mapping::default()
    });
}

fn fixture(fault: Option<Fault>) -> Ec2Fixture {
    let fixture = Ec2Fixture::new(options(fault.into_iter().collect()));
    fixture.server.with_world(|world| {
        world.snapshots.values_mut().for_each(|s| s.size = 8);
        let base = world.images.values_mut().next().unwrap();
        base.mappings[0].size = Some(8);
        rich(base);
    });
    fixture
}

/// Row 15.5: everything is inherited.
#[tokio::test]
async fn r15_5_inherited() {
    let fixture = fixture(None);
    let image = fixture.bake().await.0.result.unwrap();
    fixture.holds_one(&image, "15.5");
    fixture.server.with_world(|world| {
        let base = world.images.values().find(|i| i.common.seeded).unwrap();
        let new = &world.images[&image.id.0];
        let of = |i: &Image| {
            (
                i.boot_mode.clone(),
                i.tpm.clone(),
                i.imds.clone(),
                i.ena,
                i.sriov.clone(),
                i.architecture.clone(),
            )
        };
        assert_eq!(of(new), of(base));
        assert_eq!(new.mappings.len(), 2);
        assert_eq!(new.mappings[1].device, "/dev/sdb");
        assert_eq!((new.mappings[0].kind.iops, new.mappings[0].kind.throughput), (Some(4000), Some(500)));
        assert!(new.mappings[0].delete_on_termination && !new.mappings[1].delete_on_termination);
        assert_eq!(new.description.as_deref(), Some("a web server"));
    });
}

/// Row 15.5: what got lost is named field by field, and the image goes.
#[tokio::test]
async fn r15_5_lost() {
    let fixture = fixture(Some(turns(Turn::Plain)));
    let (ended, _) = fixture.bake().await;
    let error = ended.result.unwrap_err();
    is_of(&error, Kind::Cloud);
    let all = [
        "boot mode is not set, not uefi",
        "ENA support is off",
        "SR-IOV",
        "TPM",
        "IMDS",
        "/dev/sdb is not mapped",
        "deregistered",
    ];
    says(&error, &all, "15.5");
    assert_eq!((ended.leftovers.len(), fixture.count("DeregisterImage")), (0, 1));
    fixture.holds_nothing("15.5");
}

/// Row S16: billed otherwise than its base.
#[tokio::test]
async fn r16_billing() {
    let texts = &["billed as Windows (RunInstances:0002)", "Linux/UNIX", "deregistered"];
    prove([case("16", &[turns(Turn::Billed)], End::Fails(texts)).count("DeregisterImage", 1)]).await;
    // A base with a licence: an image of its snapshot alone has none.
    let fixture = Ec2Fixture::new(options(Vec::new()));
    fixture.server.with_world(|world| {
        let base = world.images.values_mut().next().unwrap();
        base.platform_details = "Red Hat Enterprise Linux".into();
        base.usage_operation = "RunInstances:0010".into();
    });
    let (ended, _) = fixture.bake().await;
    says(&ended.result.unwrap_err(), &["RunInstances:0010", "Red Hat", "deregistered"], "16");
    fixture.holds_nothing("16");
}

/// Row 15.6: tags that got lost are set again, and without them nothing is a success.
#[tokio::test]
async fn r15_6_untagged() {
    prove([
        case("15.6", &[turns(Turn::Untagged)], End::Baked).count("CreateTags", 1),
        case(
            "15.6 lost",
            &[turns(Turn::Untagged), Fault::new("CreateTags", 1, What::DropBefore)],
            End::Baked,
        )
        .count("CreateTags", 2),
        case("15.6 lost", &[turns(Turn::Untagged), Fault::new("CreateTags", 1, What::DropAfter)], End::Baked)
            .count("CreateTags", 2),
        // Read before they show.
        case(
            "15.6 stale",
            &[turns(Turn::Untagged), Fault::new("DescribeImages", 3, What::Stale).times(2)],
            End::Baked,
        ),
    ])
    .await;
    // An image that cannot be tagged is ours all the same: by its snapshot, which it must not outlive.
    let denied = [turns(Turn::Untagged), error("CreateTags", 1, "UnauthorizedOperation").times(9)];
    prove([case("15.6 denied", &denied, End::Fails(&["CreateTags", "UnauthorizedOperation", "(request "]))])
        .await;
    let fixture = Ec2Fixture::with(&[turns(Turn::Untagged)]);
    fixture.bake().await.0.result.unwrap();
    let tags = fixture.made().images[0].tags.clone();
    assert!(image_tags().iter().all(|(key, value)| tags.get(key) == Some(value)), "{tags:?}");
}

/// Row 15.8: available three times in a row, or not yet.
#[tokio::test]
async fn r15_8_flapping() {
    // The looks are the second DescribeImages and on.
    for at in [2, 3, 4] {
        // The volume is removed in the background: not now, or a stale answer would be one from before that.
        let beside = Fault::new("DescribeVolumes", 4, What::Late(500));
        let fixture = Ec2Fixture::with(&[Fault::new("DescribeImages", at, What::Stale), beside]);
        let image = fixture.bake().await.0.result.unwrap();
        fixture.holds_one(&image, "15.8");
        let looks = fixture.count("DescribeImages") - 1;
        assert_eq!(looks, 3 + 3, "three side by side, one of them stale; and three more");
    }
    let slow = case("15.8 slow", &[], End::Baked).set(|o| o.delays.image = 200 * MILLI);
    prove([slow]).await;
}
