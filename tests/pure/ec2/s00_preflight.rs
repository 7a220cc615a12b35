//! S0: what is refused before anything is made: the wrong instance, and bases that cannot be baked on.

use super::case::{is_of, says};
use super::fixture::{Ec2Fixture, INSTANCE, OTHER_INSTANCE, options};
use oven::cloud::{BaseRef, Cloud};
use oven::error::Kind;
use oven::ids::{Architecture, ImageId};

use oven_ec2_server::world::{Image, Mapping};

/// Nothing was made: no call changed anything.
fn untouched(fixture: &Ec2Fixture, what: &str) {
    let reading = |call: &String| call.starts_with("Describe");
    assert!(fixture.calls().iter().all(reading), "{what}: {:?}", fixture.calls());
    fixture.holds_nothing(what);
}

/// Row 0.3: the instance is not there, not running, or in another zone or region than was said.
#[tokio::test]
async fn r0_3_the_wrong_instance() {
    type Change = fn(&mut oven::cloud::aws::ec2::Ec2Options);
    let cases: [(&str, Change, &[&str]); 4] = [
        (
            "another",
            |o| o.instance_id = Some("i-0eeeeeeeeeeeeeeee".into()),
            &["i-0eeeeeeeeeeeeeeee", "us-east-1", "--instance-id"],
        ),
        ("zone", |o| o.zone = Some("us-east-1b".into()), &["us-east-1a", "us-east-1b", "--zone"]),
        ("region", |o| o.zone = Some("eu-west-1a".into()), &["eu-west-1a", "us-east-1"]),
        ("stopped", |o| o.instance_id = Some(OTHER_INSTANCE.into()), &[OTHER_INSTANCE, "stopped"]),
    ];
    for (what, change, texts) in cases {
        let fixture = Ec2Fixture::new(options(Vec::new()));
        fixture.server.with_world(|world| {
            world.instances.get_mut(OTHER_INSTANCE).unwrap().state = "stopped".into();
        });
        let ended = fixture.bake_by(&fixture.ec2_with(change), &oven::ids::RunId::new()).await;
        let error = ended.result.expect_err(what);
        is_of(&error, Kind::Machine);
        says(&error, texts, what);
        untouched(&fixture, what);
    }
    // Who may not ask is not kept from baking.
    let mut denied = options(Vec::new());
    denied.denied.insert("DescribeInstances".into());
    let fixture = Ec2Fixture::new(denied);
    let (ended, _) = fixture.bake().await;
    fixture.holds_one(&ended.result.unwrap(), "DescribeInstances denied");
}

/// Rows 0.7 and 0.8: a named error for each base that cannot be baked on.
#[tokio::test]
async fn r0_7_r0_8_unfit_bases() {
    type Change = fn(&mut Image);
    let other = |image: &mut Image| {
        image.architecture =
            if Architecture::HOST == Architecture::X86_64 { "arm64" } else { "x86_64" }.into();
    };
    let cases: [(&str, Change, Kind, &[&str]); 12] = [
        (
            "0.7",
            |i| i.product_codes.push("abc".into()),
            Kind::Definition,
            &["product code abc", "only to a stopped instance"],
        ),
        (
            "0.8 deregistered",
            |i| i.common.gone_at = Some(1),
            Kind::NotFound,
            &["InvalidAMIID", "in the region"],
        ),
        ("0.8 disabled", |i| i.disabled = true, Kind::NotFound, &["disabled", "enable-image"]),
        (
            "0.8 failed",
            |i| i.common.turn = Some(oven_ec2_server::Turn::Failed),
            Kind::NotFound,
            &["failed", "planned so"],
        ),
        (
            "0.8 instance store",
            |i| i.root_device_type = "instance-store".into(),
            Kind::Definition,
            &["instance store"],
        ),
        ("0.8 architecture", other, Kind::Definition, &["this builder's is", "image's architecture"]),
        ("0.8 i386", |i| i.architecture = "i386".into(), Kind::Definition, &["i386"]),
        ("0.8 paravirtual", |i| i.virtualization = "paravirtual".into(), Kind::Definition, &["paravirtual"]),
        ("0.8 no root", |i| i.mappings.clear(), Kind::Definition, &["has no mapping for its root device"]),
        (
            "0.8 no root of several",
            |i| {
                i.root_device = "/dev/sdz".into();
                i.mappings.push(Mapping {
                    device: "/dev/sdb".into(),
                    virtual_name: Some("ephemeral0".into()),
                    ..Mapping::default()
                });
            },
            Kind::Definition,
            &["has no mapping for its root device \"/dev/sdz\""],
        ),
        ("0.8 no snapshot", |i| i.mappings[0].snapshot = None, Kind::Definition, &["no snapshot"]),
        (
            "0.8 deprecated",
            |i| i.deprecation = Some("2020-01-01T00:00:00.000Z".into()),
            Kind::Definition,
            &["deprecated", "deprecated = true"],
        ),
    ];
    for (what, change, kind, texts) in cases {
        let fixture = Ec2Fixture::new(options(Vec::new()));
        fixture.server.with_world(|world| change(world.images.values_mut().next().unwrap()));
        let error = fixture.ec2().base(&fixture.base).await.expect_err(what);
        is_of(&error, kind);
        says(&error, texts, what);
        untouched(&fixture, what);
    }
}

/// Row 0.8: somebody else's image that is not shared with us, and one that never was.
#[tokio::test]
async fn r0_8_unavailable_images() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    let never = BaseRef::Id(ImageId("ami-0eeeeeeeeeeeeeeee".into()));
    let error = fixture.ec2().base(&never).await.unwrap_err();
    is_of(&error, Kind::NotFound);
    says(&error, &["ami-0eeeeeeeeeeeeeeee", "is in the region us-east-1", "(request "], "never");
    fixture.server.with_world(|world| {
        let image = world.images.values_mut().next().unwrap();
        image.common.owner = "999999999999".into();
    });
    let error = fixture.ec2().base(&fixture.base).await.unwrap_err();
    is_of(&error, Kind::NotFound);
    says(&error, &["shared with this account", "(request "], "not ours");
    let named = BaseRef::Name { name: "base".into(), owner: Some("self".into()) };
    let error = fixture.ec2().base(&named).await.unwrap_err();
    is_of(&error, Kind::NotFound);
    says(&error, &["no matching image", "Check the owner"], "by name");
    assert_eq!(fixture.calls(), ["DescribeImages"; 3], "asked once each");
    fixture.holds_nothing("bases that are not available");
}

/// Row 0.8: several mappings: the root's counts, and the others are inherited.
#[tokio::test]
async fn r0_8_several_mappings() {
    let fixture = Ec2Fixture::new(options(Vec::new()));
    fixture.server.with_world(|world| {
        let image = world.images.values_mut().next().unwrap();
        let data = Mapping {
            device: "/dev/sdb".into(),
            size: Some(2),
            delete_on_termination: true,
            kind: oven_ec2_server::world::Kind { volume_type: "gp3".into(), ..Default::default() },
            ..Mapping::default()
        };
        let swap = Mapping {
            device: "/dev/sdc".into(),
            virtual_name: Some("ephemeral0".into()),
            ..Mapping::default()
        };
        image.mappings.insert(0, data);
        image.mappings.push(swap);
    });
    let (ended, _) = fixture.bake().await;
    let image = ended.result.unwrap();
    fixture.holds_one(&image, "several mappings");
    let devices = fixture.server.with_world(|world| {
        world.images[&image.id.0].mappings.iter().map(|m| m.device.clone()).collect::<Vec<_>>()
    });
    assert_eq!(devices, ["/dev/xvda", "/dev/sdb", "/dev/sdc"]);
    assert_eq!(fixture.sent("AttachVolume", "InstanceId"), [INSTANCE]);
}
