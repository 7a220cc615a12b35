//! EC2's manners, one by one.

use crate::support::{TestServer, eventually, http, pause};
use oven_ec2_server::{Delays, Limits, ServerOptions, Throttle};
use std::time::Duration;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[test]
fn a_bake_goes_through() {
    let ground = TestServer::plain();
    let images = ground.good("DescribeImages", &[("ImageId.1", &ground.image)]);
    assert_eq!(images.get("snapshotId").unwrap(), ground.snapshot);
    assert_eq!(images.get("imageState").unwrap(), "available");
    let tags = [
        ("TagSpecification.1.ResourceType", "volume"),
        ("TagSpecification.1.Tag.1.Key", "oven:run"),
        ("TagSpecification.1.Tag.1.Value", "r"),
    ];
    let zone = [("AvailabilityZone", "us-east-1a"), ("SnapshotId", &ground.snapshot), ("VolumeType", "gp3")];
    let created = ground.good("CreateVolume", &[&zone[..], &tags].concat());
    assert_eq!(created.get("status").unwrap(), "creating");
    let volume = created.get("volumeId").unwrap();
    assert_eq!(ground.state_of(&volume), "available");
    assert_eq!(ground.attach(&volume, "/dev/sdf").get("status").unwrap(), "attaching");
    assert_eq!(ground.state_of(&volume), "in-use attached");
    ground.good(
        "ModifyInstanceAttribute",
        &[
            ("InstanceId", ground.builder()),
            ("BlockDeviceMapping.1.DeviceName", "/dev/sdf"),
            ("BlockDeviceMapping.1.Ebs.DeleteOnTermination", "true"),
        ],
    );
    let instance = ground.good("DescribeInstances", &[("InstanceId.1", ground.builder())]);
    assert!(
        instance.all("volumeId").contains(&volume) && instance.all("deleteOnTermination") == ["true", "true"],
        "{}",
        instance.body
    );
    assert_eq!(ground.good("DetachVolume", &[("VolumeId", &volume)]).get("status").unwrap(), "detaching");
    eventually("detached", || ground.state_of(&volume) == "available");
    let snapshot = ground.good("CreateSnapshot", &[("VolumeId", &volume)]).get("snapshotId").unwrap();
    assert_eq!(
        ground.good("DescribeSnapshots", &[("SnapshotId.1", &snapshot)]).get("status").unwrap(),
        "completed"
    );
    let image_tags = [
        ("TagSpecification.1.ResourceType", "image"),
        ("TagSpecification.1.Tag.1.Key", "a"),
        ("TagSpecification.1.Tag.1.Value", "<1>"),
    ];
    let image = ground.register("web-1", &snapshot, &image_tags).get("imageId").unwrap();
    ground.good("DeleteVolume", &[("VolumeId", &volume)]);
    let found = ground.good(
        "DescribeImages",
        &[("Owner.1", "self"), ("Filter.1.Name", "tag:a"), ("Filter.1.Value.1", "<1>")],
    );
    assert_eq!(found.all("imageId"), [image.as_str()]);
    assert_eq!(found.get("platformDetails").unwrap(), "Linux/UNIX");
    let ledger = ground.server.ledger().made();
    assert!(ledger.volumes.is_empty(), "{ledger:?}");
    assert_eq!((ledger.snapshots.len(), ledger.images.len()), (1, 1));
    assert_eq!(
        (&ledger.images[0].id, &ledger.images[0].of, ledger.images[0].name.as_str()),
        (&image, &snapshot, "web-1")
    );
    assert_eq!(std::fs::metadata(ledger.snapshots[0].data.as_ref().unwrap()).unwrap().len(), 1 << 30);
    assert_eq!(ground.server.ledger().snapshots.len(), 2);
}

#[test]
fn a_token_makes_one_volume() {
    let ground = TestServer::plain();
    let params = |token: &'static str, size: &'static str| {
        [
            ("AvailabilityZone", "us-east-1a"),
            ("SnapshotId", ground.snapshot.as_str()),
            ("ClientToken", token),
            ("Size", size),
        ]
    };
    let first = ground.good("CreateVolume", &params("t", "1")).get("volumeId").unwrap();
    assert_eq!(ground.good("CreateVolume", &params("t", "1")).get("volumeId").unwrap(), first);
    assert_eq!(ground.refused("CreateVolume", &params("t", "2")), "IdempotentParameterMismatch");
    let mut elsewhere = params("t", "1");
    elsewhere[0].1 = "us-east-1b";
    assert_eq!(ground.good("CreateVolume", &elsewhere).get("volumeId").unwrap(), first);
    assert_ne!(ground.good("CreateVolume", &params("u", "1")).get("volumeId").unwrap(), first);
    assert_ne!(ground.good("CreateVolume", &params("", "1")).get("volumeId").unwrap(), first);
    assert_eq!(ground.server.ledger().volumes.len(), 3);
    let long = "x".repeat(65);
    let params = [
        ("AvailabilityZone", "us-east-1a"),
        ("SnapshotId", ground.snapshot.as_str()),
        ("ClientToken", long.as_str()),
    ];
    assert_eq!(ground.refused("CreateVolume", &params), "InvalidParameterValue");
}

#[test]
fn the_same_token_at_the_same_time_makes_one_volume() {
    let ground = TestServer::plain();
    let params =
        [("AvailabilityZone", "us-east-1a"), ("SnapshotId", ground.snapshot.as_str()), ("ClientToken", "t")];
    let ids: Vec<String> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| ground.good("CreateVolume", &params).get("volumeId").unwrap()))
            .collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(ground.server.ledger().volumes.len(), 1);
}

#[test]
fn a_key_that_may_not_be_used_burns_the_token() {
    let ground = TestServer::plain();
    let params = [
        ("AvailabilityZone", "us-east-1a"),
        ("SnapshotId", ground.snapshot.as_str()),
        ("ClientToken", "t"),
        ("Encrypted", "true"),
        ("KmsKeyId", "alias/other"),
    ];
    let volume = ground.good("CreateVolume", &params).get("volumeId").unwrap();
    assert_eq!(ground.refused("DescribeVolumes", &[("VolumeId.1", &volume)]), "InvalidVolume.NotFound");
    assert_eq!(ground.refused("CreateVolume", &params), "IdempotentParameterMismatch");
    let without = [params[0], params[1], params[4]];
    assert_eq!(ground.refused("CreateVolume", &without), "InvalidParameterDependency");
    let ours = [params[0], params[1], params[3], ("KmsKeyId", "alias/aws/ebs")];
    assert_eq!(ground.good("CreateVolume", &ours).get("encrypted").unwrap(), "true");
}

#[test]
fn states_take_their_time() {
    // For what is asked in between, on a busy machine too.
    let time = ms(1000);
    let delays = Delays {
        creating: time,
        attaching: time,
        detaching: time,
        snapshot: time,
        image: time,
        deleting: time,
        ..Delays::default()
    };
    let ground = TestServer::new(ServerOptions { delays, ..ServerOptions::default() });
    let volume = ground.volume();
    assert_eq!(ground.state_of(&volume), "creating");
    assert_eq!(ground.attach(&volume, "/dev/sdf").get("Code").unwrap(), "IncorrectState");
    assert_eq!(ground.refused("DeleteVolume", &[("VolumeId", &volume)]), "IncorrectState");
    eventually("available", || ground.state_of(&volume) == "available");
    ground.attach(&volume, "/dev/sdf");
    assert_eq!(ground.state_of(&volume), "in-use attaching");
    eventually("attached", || ground.state_of(&volume) == "in-use attached");
    let snapshot = ground.good("CreateSnapshot", &[("VolumeId", &volume)]).get("snapshotId").unwrap();
    assert_eq!(
        ground.good("DescribeSnapshots", &[("SnapshotId.1", &snapshot)]).get("status").unwrap(),
        "pending"
    );
    assert_eq!(ground.register("web", &snapshot, &[]).get("Code").unwrap(), "IncorrectState");
    let made_of_it = [("AvailabilityZone", "us-east-1a"), ("SnapshotId", snapshot.as_str())];
    assert_eq!(ground.refused("CreateVolume", &made_of_it), "IncorrectState");
    assert_eq!(ground.refused("DeleteVolume", &[("VolumeId", &volume)]), "VolumeInUse");
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    assert_eq!(ground.state_of(&volume), "in-use detaching");
    assert_eq!(ground.refused("DeleteVolume", &[("VolumeId", &volume)]), "VolumeInUse");
    eventually("detached", || ground.state_of(&volume) == "available");
    ground.good("DeleteVolume", &[("VolumeId", &volume)]);
    assert_eq!(ground.state_of(&volume), "deleting");
    eventually("gone", || ground.call("DescribeVolumes", &[("VolumeId.1", &volume)]).status == 400);
    eventually("completed", || {
        ground.good("DescribeSnapshots", &[("SnapshotId.1", &snapshot)]).get("status").unwrap() == "completed"
    });
    let image = ground.register("web", &snapshot, &[]).get("imageId").unwrap();
    let state = || ground.good("DescribeImages", &[("ImageId.1", &image)]).get("imageState").unwrap();
    assert_eq!(state(), "pending");
    eventually("available", || state() == "available");
}

#[test]
fn a_new_id_is_not_known_for_a_while() {
    let ground = TestServer::new(ServerOptions { visibility_lag: ms(1500), ..ServerOptions::default() });
    let volume = ground.volume();
    assert_eq!(ground.refused("DescribeVolumes", &[("VolumeId.1", &volume)]), "InvalidVolume.NotFound");
    assert_eq!(ground.attach(&volume, "/dev/sdf").get("Code").unwrap(), "InvalidVolume.NotFound");
    assert!(ground.good("DescribeVolumes", &[]).all("volumeId").is_empty());
    eventually("visible", || ground.good("DescribeVolumes", &[]).all("volumeId") == [volume.clone()]);
    let snapshot = ground.good("CreateSnapshot", &[("VolumeId", &volume)]).get("snapshotId").unwrap();
    assert_eq!(ground.register("web", &snapshot, &[]).get("Code").unwrap(), "InvalidSnapshot.NotFound");
    eventually("visible", || ground.call("DescribeSnapshots", &[("SnapshotId.1", &snapshot)]).status == 200);
    let image = ground.register("web", &snapshot, &[]).get("imageId").unwrap();
    assert_eq!(ground.refused("DescribeImages", &[("ImageId.1", &image)]), "InvalidAMIID.NotFound");
    // The name is taken at once all the same.
    let again = ground.register("web", &snapshot, &[]);
    assert_eq!(again.get("Code").unwrap(), "InvalidAMIName.Duplicate");
    assert_eq!(again.get("Message").unwrap(), format!("AMI name web is already in use by AMI {image}"));
}

#[test]
fn names_are_taken_once() {
    let ground = TestServer::plain();
    let snapshot = ground.made_snapshot();
    let image = ground.register("web", &snapshot, &[]).get("imageId").unwrap();
    assert_eq!(ground.register("web", &snapshot, &[]).get("Code").unwrap(), "InvalidAMIName.Duplicate");
    assert_eq!(
        ground.register("debian-12-amd64", &snapshot, &[]).get("Code").unwrap(),
        "InvalidAMIName.Duplicate"
    );
    // Another owner's name is no obstacle.
    ground
        .server
        .with_world(|w| w.images.get_mut(&ground.image).unwrap().common.owner = "999999999999".into());
    assert_eq!(ground.register("debian-12-amd64", &snapshot, &[]).status, 200);
    ground.good("DeregisterImage", &[("ImageId", &image)]);
    assert_eq!(ground.refused("DescribeImages", &[("ImageId.1", &image)]), "InvalidAMIID.NotFound");
    assert_eq!(ground.refused("DeregisterImage", &[("ImageId", &image)]), "InvalidAMIID.Unavailable");
    assert_eq!(ground.register("web", &snapshot, &[]).status, 200);
    for bad in ["ab", "a#b", "ä-web", &"x".repeat(129)] {
        assert_eq!(
            ground.register(bad, &snapshot, &[]).get("Code").unwrap(),
            "InvalidAMIName.Malformed",
            "{bad}"
        );
    }
}

#[test]
fn what_cannot_be_registered_is_refused() {
    let ground = TestServer::plain();
    let snapshot = ground.made_snapshot();
    let code = |more: &[(&str, &str)]| {
        let answer = ground.register("web", &snapshot, more);
        answer.get("Code").unwrap_or_default()
    };
    let ebs = "BlockDeviceMapping.1.Ebs.";
    assert_eq!(code(&[(&format!("{ebs}Encrypted"), "true")]), "InvalidBlockDeviceMapping");
    assert_eq!(code(&[("TpmSupport", "v2.0")]), "InvalidParameterCombination");
    assert_eq!(code(&[("TpmSupport", "v3.0")]), "InvalidParameterValue");
    assert_eq!(code(&[("BootMode", "bios")]), "InvalidParameterValue");
    assert_eq!(
        code(&[("Architecture", "arm64"), ("BootMode", "legacy-bios")]),
        "InvalidParameterCombination"
    );
    assert_eq!(
        code(&[("VirtualizationType", "paravirtual"), ("EnaSupport", "true")]),
        "InvalidParameterCombination"
    );
    assert_eq!(code(&[("RootDeviceName", "/dev/sda1")]), "InvalidBlockDeviceMapping");
    assert_eq!(code(&[("RootDeviceName", "")]), "MissingParameter");
    assert_eq!(
        code(&[("TagSpecification.1.ResourceType", "snapshot"), ("TagSpecification.1.Tag.1.Key", "a")]),
        "InvalidParameterValue"
    );
    assert_eq!(code(&[("ClientToken", "t")]), "UnknownParameter");
    assert_eq!(
        code(&[(&format!("{ebs}VolumeType"), "gp2"), (&format!("{ebs}Iops"), "3000")]),
        "InvalidParameterCombination"
    );
    assert_eq!(code(&[("BillingProduct.1", "bp-1")]), "AuthFailure");
    assert_eq!(code(&[("BlockDeviceMapping.2.DeviceName", "/dev/sdb")]), "InvalidBlockDeviceMapping");
    assert_eq!(code(&[(&format!("{ebs}SnapshotId"), "snap-01234567")]), "InvalidSnapshot.NotFound");
    assert_eq!(code(&[("Description", &"x".repeat(256))]), "InvalidParameterValue");
    assert_eq!(code(&[("DryRun", "true")]), "DryRunOperation");
    assert!(ground.server.ledger().made().images.is_empty());
    // EC2's own defaults are what they are.
    let full = [
        ("Architecture", ""),
        ("VirtualizationType", ""),
        ("BlockDeviceMapping.2.DeviceName", "/dev/sdb"),
        ("BlockDeviceMapping.2.VirtualName", "ephemeral0"),
        ("Description", "d"),
    ];
    let image = ground.register("web", &snapshot, &full).get("imageId").unwrap();
    let told = ground.good("DescribeImages", &[("ImageId.1", &image)]);
    assert_eq!(
        (told.get("architecture").unwrap(), told.get("virtualizationType").unwrap()),
        ("i386".into(), "paravirtual".into())
    );
    assert_eq!(told.all("deviceName"), ["/dev/xvda", "/dev/sdb"]);
    let all = [
        ("BootMode", "uefi"),
        ("TpmSupport", "v2.0"),
        ("ImdsSupport", "v2.0"),
        ("EnaSupport", "true"),
        ("SriovNetSupport", "simple"),
    ];
    let image = ground.register("web-2", &snapshot, &all).get("imageId").unwrap();
    let told = ground.good("DescribeImages", &[("ImageId.1", &image)]);
    for (name, value) in [
        ("bootMode", "uefi"),
        ("tpmSupport", "v2.0"),
        ("imdsSupport", "v2.0"),
        ("enaSupport", "true"),
        ("sriovNetSupport", "simple"),
    ] {
        assert_eq!(told.get(name).unwrap(), value);
    }
}

#[test]
fn what_is_used_is_not_deleted() {
    let ground = TestServer::plain();
    let snapshot = ground.made_snapshot();
    let image = ground.register("web", &snapshot, &[]).get("imageId").unwrap();
    assert_eq!(ground.refused("DeleteSnapshot", &[("SnapshotId", &snapshot)]), "InvalidSnapshot.InUse");
    assert_eq!(
        ground.refused("DeleteSnapshot", &[("SnapshotId", &ground.snapshot)]),
        "InvalidSnapshot.InUse"
    );
    ground.good("DeregisterImage", &[("ImageId", &image)]);
    ground.good("DeleteSnapshot", &[("SnapshotId", &snapshot)]);
    assert_eq!(ground.refused("DeleteSnapshot", &[("SnapshotId", &snapshot)]), "InvalidSnapshot.NotFound");
    let snapshot = ground.made_snapshot();
    let image = ground.register("web", &snapshot, &[]).get("imageId").unwrap();
    let both = ground.good("DeregisterImage", &[("ImageId", &image), ("DeleteAssociatedSnapshots", "true")]);
    assert_eq!(
        (both.get("snapshotId").unwrap(), both.get("returnCode").unwrap()),
        (snapshot, "success".into())
    );
    // An image that was imported goes, too.
    ground.good("DeregisterImage", &[("ImageId", &ground.image)]);
    ground.good("DeleteSnapshot", &[("SnapshotId", &ground.snapshot)]);
    assert_eq!(ground.server.ledger(), Default::default());
}

#[test]
fn attaching_is_refused_where_it_cannot_be() {
    let limits = Limits { attachments: 3, ..Limits::default() };
    let ground = TestServer::new(ServerOptions { limits, ..ServerOptions::default() });
    let (one, two, three) = (ground.volume(), ground.volume(), ground.volume());
    let code = |answer: crate::support::Answer| answer.get("Code").unwrap();
    for bad in ["/dev/nvme1n1", "/dev/sdf1", "x"] {
        assert_eq!(code(ground.attach(&one, bad)), "InvalidParameterValue");
    }
    let taken = ground.attach(&one, "/dev/xvda");
    assert!(taken.get("Message").unwrap().contains("Attachment point /dev/xvda is already in use"));
    ground.attach(&one, "/dev/sdf");
    assert_eq!(code(ground.attach(&one, "/dev/sdg")), "VolumeInUse");
    let taken = ground.attach(&two, "/dev/sdf");
    assert_eq!(taken.get("Code").unwrap(), "InvalidParameterValue");
    assert_eq!(
        taken.get("Message").unwrap(),
        "Invalid value '/dev/sdf' for unixDevice. Attachment point /dev/sdf is already in use"
    );
    assert_eq!(ground.attach(&two, "/dev/sdg").status, 200);
    assert_eq!(code(ground.attach(&three, "/dev/sdh")), "AttachmentLimitExceeded");
    ground.good("DetachVolume", &[("VolumeId", &two)]);
    let elsewhere =
        ground.good("CreateVolume", &[("AvailabilityZone", "us-east-1b"), ("SnapshotId", &ground.snapshot)]);
    assert_eq!(
        code(ground.attach(&elsewhere.get("volumeId").unwrap(), "/dev/sdh")),
        "InvalidVolume.ZoneMismatch"
    );
    let other = [("VolumeId", three.as_str()), ("InstanceId", "i-ffffffffffffffff0"), ("Device", "/dev/sdh")];
    assert_eq!(ground.refused("AttachVolume", &other), "InvalidInstanceID.NotFound");
    ground.server.with_world(|w| w.volumes.get_mut(&three).unwrap().product_codes.push("code".into()));
    assert_eq!(code(ground.attach(&three, "/dev/sdh")), "OperationNotPermitted");
    assert_eq!(ground.refused("DetachVolume", &[("VolumeId", &three)]), "IncorrectState");
    assert_eq!(
        ground.refused("DetachVolume", &[("VolumeId", &one), ("Device", "/dev/sdx")]),
        "InvalidAttachment.NotFound"
    );
    let wrong = [
        ("InstanceId", ground.builder()),
        ("BlockDeviceMapping.1.DeviceName", "/dev/sdx"),
        ("BlockDeviceMapping.1.Ebs.DeleteOnTermination", "true"),
    ];
    assert_eq!(ground.refused("ModifyInstanceAttribute", &wrong), "InvalidInstanceAttributeValue");
}

#[test]
fn a_name_that_was_just_freed_hangs() {
    let ground =
        TestServer::new(ServerOptions { sticky_names: Duration::from_secs(60), ..ServerOptions::default() });
    let volume = ground.volume();
    ground.attach(&volume, "/dev/sdf");
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    eventually("detached", || ground.state_of(&volume) == "available");
    ground.attach(&volume, "/dev/sdf");
    pause(50);
    assert_eq!(ground.state_of(&volume), "in-use attaching");
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    eventually("detached", || ground.state_of(&volume) == "available");
    ground.attach(&volume, "/dev/sdg");
    assert_eq!(ground.state_of(&volume), "in-use attached");
}

#[test]
fn an_instance_takes_its_volumes_along() {
    let ground = TestServer::plain();
    let (goes, stays) = (ground.volume(), ground.volume());
    ground.attach(&goes, "/dev/sdf");
    ground.attach(&stays, "/dev/sdg");
    let along = [
        ("InstanceId", ground.builder()),
        ("BlockDeviceMapping.1.DeviceName", "/dev/sdf"),
        ("BlockDeviceMapping.1.Ebs.DeleteOnTermination", "true"),
    ];
    ground.good("ModifyInstanceAttribute", &along);
    ground.good("TerminateInstances", &[("InstanceId.1", ground.builder())]);
    let left: Vec<_> = ground.server.ledger().volumes.into_iter().map(|v| (v.id, v.state)).collect();
    assert_eq!(left, [(stays.clone(), "available".to_owned())]);
    assert_eq!(ground.attach(&stays, "/dev/sdf").get("Code").unwrap(), "IncorrectState");
    let gone = ground.good(
        "DescribeInstances",
        &[("Filter.1.Name", "instance-state-name"), ("Filter.1.Value.1", "terminated")],
    );
    assert_eq!(gone.get("instanceId").unwrap(), ground.builder());
}

#[test]
fn tags_have_their_limits() {
    let ground = TestServer::plain();
    let volume = ground.volume();
    let tag = |key: &str, value: &str| {
        ground.call("CreateTags", &[("ResourceId.1", &volume), ("Tag.1.Key", key), ("Tag.1.Value", value)])
    };
    assert_eq!(tag(&"é".repeat(128), &"é".repeat(256)).status, 200);
    for (key, value) in [(&*"k".repeat(129), ""), ("k", &*"v".repeat(257)), ("aws:k", "v"), ("AWS:k", "v")] {
        assert_eq!(tag(key, value).get("Code").unwrap(), "InvalidParameterValue", "{key}");
    }
    for n in 1..50 {
        assert_eq!(tag(&n.to_string(), "").status, 200);
    }
    assert_eq!(tag("50", "").get("Code").unwrap(), "TagLimitExceeded");
    assert_eq!(tag("49", "again").status, 200);
    assert_eq!(ground.server.ledger().volumes[0].tags["49"], "again");
    ground.good("DeleteTags", &[("ResourceId.1", &volume), ("Tag.1.Key", "49"), ("Tag.1.Value", "other")]);
    assert!(ground.server.ledger().volumes[0].tags.contains_key("49"));
    ground.good("DeleteTags", &[("ResourceId.1", &volume), ("Tag.1.Key", "49")]);
    assert!(!ground.server.ledger().volumes[0].tags.contains_key("49"));
    let twice = [
        ("AvailabilityZone", "us-east-1a"),
        ("SnapshotId", ground.snapshot.as_str()),
        ("TagSpecification.1.ResourceType", "volume"),
        ("TagSpecification.1.Tag.1.Key", "a"),
        ("TagSpecification.1.Tag.2.Key", "a"),
    ];
    assert_eq!(ground.refused("CreateVolume", &twice), "InvalidParameterValue");
    let unknown = [("ResourceId.1", "vol-01234567"), ("Tag.1.Key", "a")];
    assert_eq!(ground.refused("CreateTags", &unknown), "InvalidVolume.NotFound");
    // All or nothing.
    let half = [("ResourceId.1", volume.as_str()), ("ResourceId.2", "snap-01234567"), ("Tag.1.Key", "half")];
    assert_eq!(ground.refused("CreateTags", &half), "InvalidSnapshot.NotFound");
    assert!(!ground.server.ledger().volumes[0].tags.contains_key("half"));
}

#[test]
fn others_images_are_seen_as_far_as_they_are_shared() {
    let ground = TestServer::plain();
    let listed = |params: &[(&str, &str)]| ground.good("DescribeImages", params).all("imageId");
    let by_id = || ground.call("DescribeImages", &[("ImageId.1", &ground.image)]);
    let set = |change: fn(&mut oven_ec2_server::world::Image)| {
        ground.server.with_world(|w| change(w.images.get_mut(&ground.image).unwrap()))
    };
    assert_eq!(listed(&[("Owner.1", "self")]), [ground.image.as_str()]);
    set(|image| (image.common.owner, image.owner_alias) = ("136693071363".into(), Some("amazon".into())));
    assert_eq!(by_id().get("Code").unwrap(), "AuthFailure");
    assert!(listed(&[]).is_empty());
    set(|image| image.public = true);
    assert_eq!(by_id().get("isPublic").unwrap(), "true");
    for (owner, seen) in [("self", false), ("amazon", true), ("136693071363", true), ("123456789012", false)]
    {
        assert_eq!(
            !listed(&[("Owner.1", owner), ("Filter.1.Name", "name"), ("Filter.1.Value.1", "debian-*")])
                .is_empty(),
            seen,
            "{owner}"
        );
    }
    assert_eq!(ground.refused("DescribeImages", &[("Owner.1", "Amazon")]), "InvalidUserID.Malformed");
    let attribute = [("ImageId", ground.image.as_str()), ("Attribute", "uefiData")];
    assert_eq!(ground.refused("DescribeImageAttribute", &attribute), "AuthFailure");
    set(|image| image.deprecation = Some("2020-01-01T00:00:00.000Z".into()));
    assert!(listed(&[]).is_empty());
    assert_eq!(listed(&[("IncludeDeprecated", "true")]), [ground.image.as_str()]);
    assert_eq!(by_id().get("deprecationTime").unwrap(), "2020-01-01T00:00:00.000Z");
    set(|image| image.product_codes.push("abc".into()));
    assert_eq!(by_id().get("productCode").unwrap(), "abc");
    set(|image| image.disabled = true);
    assert_eq!(by_id().get("Code").unwrap(), "AuthFailure");
    assert_eq!(ground.refused("DeregisterImage", &attribute[..1]), "AuthFailure");
}

#[test]
fn snapshots_have_a_rate_and_quotas() {
    let limits = Limits {
        between_snapshots: ms(1000),
        pending_snapshots: 2,
        snapshots: 3,
        volumes: 1,
        ..Limits::default()
    };
    let delays = Delays { snapshot: Duration::from_secs(60), ..Delays::default() };
    let ground = TestServer::new(ServerOptions { limits, delays, ..ServerOptions::default() });
    let volume = ground.volume();
    let take = || ground.call("CreateSnapshot", &[("VolumeId", &volume)]).get("Code").unwrap_or_default();
    assert_eq!(take(), "");
    assert_eq!(take(), "SnapshotCreationPerVolumeRateExceeded");
    // Refused for its rate until then, and for nothing else.
    let accepted = || match take().as_str() {
        "" => true,
        code => {
            assert_eq!(code, "SnapshotCreationPerVolumeRateExceeded");
            false
        }
    };
    eventually("a second one", accepted);
    assert_eq!(take(), "ConcurrentSnapshotLimitExceeded");
    ground.server.with_world(|w| w.snapshots.values_mut().for_each(|s| s.common.ready_at = 0));
    eventually("a third one", accepted);
    eventually("one too many", || match take().as_str() {
        "SnapshotLimitExceeded" => true,
        code => {
            assert_eq!(code, "SnapshotCreationPerVolumeRateExceeded");
            false
        }
    });
    let params = [("AvailabilityZone", "us-east-1a"), ("SnapshotId", ground.snapshot.as_str())];
    assert_eq!(ground.refused("CreateVolume", &params), "VolumeLimitExceeded");
}

#[test]
fn permission_is_asked_by_dry_run() {
    let ground = TestServer::plain();
    let volume =
        [("AvailabilityZone", "us-east-1a"), ("SnapshotId", ground.snapshot.as_str()), ("DryRun", "true")];
    let granted = ground.call("CreateVolume", &volume);
    assert_eq!((granted.status, granted.get("Code").unwrap().as_str()), (412, "DryRunOperation"));
    ground.server.set(|options| options.denied = ["CreateVolume".to_owned()].into());
    let denied = ground.call("CreateVolume", &volume);
    assert_eq!((denied.status, denied.get("Code").unwrap().as_str()), (403, "UnauthorizedOperation"));
    assert_eq!(ground.refused("CreateVolume", &volume[..2]), "UnauthorizedOperation");
    // What is not there cannot be judged.
    assert_eq!(
        ground.refused("DeleteVolume", &[("VolumeId", "vol-01234567"), ("DryRun", "true")]),
        "InvalidVolume.NotFound"
    );
    assert_eq!(ground.refused("DescribeImages", &[("DryRun", "true")]), "DryRunOperation");
    // Tags at creation need a permission of their own.
    ground.server.set(|options| options.denied = ["CreateTags".to_owned()].into());
    assert_eq!(ground.refused("CreateVolume", &volume), "DryRunOperation");
    let tagged = [
        &volume[..],
        &[("TagSpecification.1.ResourceType", "volume"), ("TagSpecification.1.Tag.1.Key", "a")],
    ]
    .concat();
    assert_eq!(ground.refused("CreateVolume", &tagged), "UnauthorizedOperation");
    assert!(ground.server.ledger().volumes.is_empty() && ground.server.ec2_calls().len() == 1);
}

#[test]
fn calls_are_throttled_by_action() {
    let throttle = Throttle { reading: (3.0, 0.0), unfiltered: (1.0, 0.0), changing: (1.0, 0.0) };
    let ground = TestServer::new(ServerOptions { throttle: Some(throttle), ..ServerOptions::default() });
    let all = || ground.call("DescribeVolumes", &[]);
    assert_eq!(all().status, 200);
    let throttled = all();
    assert_eq!((throttled.status, throttled.get("Code").unwrap().as_str()), (503, "RequestLimitExceeded"));
    for _ in 0..3 {
        ground.good("DescribeVolumes", &[("MaxResults", "5")]);
    }
    assert_eq!(ground.refused("DescribeVolumes", &[("MaxResults", "5")]), "RequestLimitExceeded");
    ground.volume();
    let params = [("AvailabilityZone", "us-east-1a"), ("SnapshotId", ground.snapshot.as_str())];
    assert_eq!(ground.refused("CreateVolume", &params), "RequestLimitExceeded");
    assert_eq!(ground.server.ledger().volumes.len(), 1);
}

#[test]
fn lists_come_in_pages() {
    let ground = TestServer::new(ServerOptions { page: Some(2), ..ServerOptions::default() });
    let made: Vec<String> = (0..5).map(|_| ground.volume()).collect();
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let page = ground.good("DescribeVolumes", &[("MaxResults", "5"), ("NextToken", &token)]);
        assert!(page.all("volumeId").len() <= 2);
        seen.extend(page.all("volumeId"));
        match page.get("nextToken") {
            Some(next) => token = next,
            None => break,
        }
    }
    seen.sort();
    assert_eq!(seen, {
        let mut made = made.clone();
        made.sort();
        made
    });
    assert_eq!(ground.good("DescribeVolumes", &[]).all("volumeId").len(), 5);
    assert_eq!(ground.refused("DescribeVolumes", &[("MaxResults", "4")]), "InvalidParameterValue");
    assert_eq!(
        ground.refused("DescribeVolumes", &[("MaxResults", "5"), ("VolumeId.1", &made[0])]),
        "InvalidParameterCombination"
    );
    assert_eq!(
        ground.refused("DescribeVolumes", &[("MaxResults", "5"), ("NextToken", "x")]),
        "InvalidParameterValue"
    );
}

#[test]
fn what_is_not_known_is_refused() {
    let ground = TestServer::plain();
    assert_eq!(ground.refused("DescribeVolumes", &[("Volume.1", "x")]), "UnknownParameter");
    assert_eq!(
        ground.refused("DescribeVolumes", &[("Filter.1.Name", "state"), ("Filter.1.Value.1", "x")]),
        "InvalidParameterValue"
    );
    assert_eq!(ground.refused("RunInstances", &[]), "InvalidAction");
    assert_eq!(ground.refused("DescribeVolumes", &[("VolumeId.1", "volume")]), "InvalidVolumeID.Malformed");
    assert_eq!(ground.refused("CreateVolume", &[("SnapshotId", &ground.snapshot)]), "MissingParameter");
    let zone = [("AvailabilityZone", "eu-west-1a"), ("SnapshotId", ground.snapshot.as_str())];
    assert_eq!(ground.refused("CreateVolume", &zone), "InvalidZone.NotFound");
    assert_eq!(ground.refused("DescribeRegions", &[("RegionName.1", "mars-1")]), "InvalidParameterValue");
    assert_eq!(ground.good("DescribeAvailabilityZones", &[]).all("zoneName"), ["us-east-1a", "us-east-1b"]);
    let form = "Action=DescribeVolumes&Version=2016-11-15";
    let code = |headers: &str| {
        http(&ground.server.endpoint(), "POST", "/", headers, form).unwrap().get("Code").unwrap()
    };
    assert_eq!(code(""), "MissingAuthenticationToken");
    assert_eq!(code("Authorization: Basic x\r\n"), "AuthFailure");
    assert_eq!(
        code(
            "Authorization: AWS4-HMAC-SHA256 Credential=A/20260101/eu-west-1/ec2/aws4_request, Signature=0\r\n"
        ),
        "AuthFailure"
    );
    let signed =
        "Authorization: AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/ec2/aws4_request, Signature=0\r\n";
    let old =
        http(&ground.server.endpoint(), "POST", "/", signed, "Action=DescribeVolumes&Version=2014-10-01")
            .unwrap();
    assert_eq!(old.get("Code").unwrap(), "NoSuchVersion");
}

#[test]
fn parameters_identity_and_control() {
    let ground = TestServer::plain();
    let ssm = |body: &str| {
        let headers = "Content-Type: application/x-amz-json-1.1\r\nX-Amz-Target: AmazonSSM.GetParameter\r\n";
        http(&ground.server.endpoint(), "POST", "/", headers, body).unwrap()
    };
    let missing = ssm(r#"{"Name": "/aws/service/debian"}"#);
    assert_eq!(missing.status, 400);
    assert!(missing.body.contains("ParameterNotFound"), "{}", missing.body);
    ground.server.set(|o| drop(o.parameters.insert("/aws/service/debian".into(), ground.image.clone())));
    assert!(ssm(r#"{"Name": "/aws/service/debian", "WithDecryption": false}"#).body.contains(&ground.image));
    assert!(ssm(r#"{"Name": "/aws/service/debian", "Other": 1}"#).body.contains("SerializationException"));
    ground.server.set(|o| o.denied = ["ssm:GetParameter".to_owned()].into());
    assert!(ssm(r#"{"Name": "/aws/service/debian"}"#).body.contains("AccessDenied"));
    let control = |method: &str, path: &str, body: &str| {
        http(&ground.server.endpoint(), method, path, "", body).unwrap()
    };
    assert!(control("GET", "/_oven/ledger", "").body.contains(&ground.image));
    assert!(control("GET", "/_oven/calls", "").body.contains("GetParameter"));
    let faults =
        r#"{"faults": [{"action": "DescribeVolumes", "nth": 1, "what": {"error": "InternalError"}}]}"#;
    assert_eq!(control("POST", "/_oven/options", faults).status, 200);
    assert_eq!(ground.refused("DescribeVolumes", &[]), "InternalError");
    assert_eq!(control("POST", "/_oven/options", r#"{"fault": []}"#).status, 400);
    let token = http(
        &ground.server.imds(),
        "PUT",
        "/latest/api/token",
        "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n",
        "",
    )
    .unwrap();
    // The SDKs take no token without it.
    assert!(token.head.contains("x-aws-ec2-metadata-token-ttl-seconds: 60"), "{}", token.head);
    let header = format!("X-aws-ec2-metadata-token: {}\r\n", token.body);
    let id = http(&ground.server.imds(), "GET", "/latest/meta-data/instance-id", &header, "").unwrap();
    assert_eq!(id.body, ground.builder());
}

#[test]
fn a_server_begins_where_the_last_one_ended() {
    let ground = TestServer::plain();
    let snapshot = ground.made_snapshot();
    let image = ground.register("web", &snapshot, &[]).get("imageId").unwrap();
    let TestServer { server, dir, .. } = ground;
    drop(server);
    let again = oven_ec2_server::Server::start(&dir.path().join("region"), ServerOptions::default()).unwrap();
    let made = again.ledger().made();
    assert_eq!((made.images[0].id.clone(), made.snapshots[0].id.clone()), (image, snapshot));
}

#[test]
fn product_codes_follow_and_billing_does_not() {
    let limits = Limits { images: 1, ..Limits::default() };
    let ground = TestServer::new(ServerOptions { limits, ..ServerOptions::default() });
    ground.server.with_world(|w| {
        w.snapshots.get_mut(&ground.snapshot).unwrap().product_codes = vec!["code".into()];
        w.images.get_mut(&ground.image).unwrap().usage_operation = "RunInstances:0010".into();
    });
    let snapshot = ground.made_snapshot();
    let image = ground.register("web", &snapshot, &[]).get("imageId").unwrap();
    let told = ground.good("DescribeImages", &[("ImageId.1", &image)]);
    assert_eq!(
        (told.get("productCode").unwrap(), told.get("usageOperation").unwrap()),
        ("code".into(), "RunInstances".into())
    );
    assert_eq!(ground.register("web-2", &snapshot, &[]).get("Code").unwrap(), "AMIQuotaExceeded");
}

#[test]
fn every_instance_has_its_own_imds() {
    use oven_ec2_server::{AttachAs, Builder};
    let other =
        Builder { id: "i-0fedcba9876543210".into(), zone: "us-east-1b".into(), attach: AttachAs::Nothing };
    let ground = TestServer::new(ServerOptions {
        others: vec![other.clone()],
        role: None,
        ..ServerOptions::default()
    });
    let ask = |imds: &str, path: &str| {
        let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
        let token = http(imds, "PUT", "/latest/api/token", ttl, "").unwrap().body;
        http(imds, "GET", path, &format!("X-aws-ec2-metadata-token: {token}\r\n"), "").unwrap()
    };
    let imds = ground.server.imds_of(&other.id).unwrap();
    assert_eq!(ask(&imds, "/latest/meta-data/instance-id").body, other.id);
    assert_eq!(ask(&imds, "/latest/meta-data/placement/availability-zone").body, "us-east-1b");
    assert_eq!(ask(&ground.server.imds(), "/latest/meta-data/instance-id").body, ground.builder());
    // Without a role there are no keys.
    assert_eq!(ask(&imds, "/latest/meta-data/iam/security-credentials/").status, 404);
    let there =
        ground.good("CreateVolume", &[("AvailabilityZone", "us-east-1b"), ("SnapshotId", &ground.snapshot)]);
    let here = [("VolumeId", there.get("volumeId").unwrap())];
    let attach =
        [("VolumeId", here[0].1.as_str()), ("InstanceId", other.id.as_str()), ("Device", "/dev/sdf")];
    assert_eq!(ground.good("AttachVolume", &attach).get("instanceId").unwrap(), other.id);
}
