//! What oven makes of EC2's answers, the bad ones above all.

use super::fake::{Calls, INSTANCE, Reply, Request, ec2, ok, refuse};
use super::*;
use crate::cloud::{Architecture, Attributes, ImageState, VolumeKind};
use crate::error::hint_of;
use crate::undo::{Debt, Due};
use std::sync::{Arc, Mutex};

const VOLUME: &str = "vol-0123456789abcdef0";
const SNAPSHOT: &str = "snap-0123456789abcdef0";
const BASE_SNAPSHOT: &str = "snap-0aaaaaaaaaaaaaaaa";
const IMAGE: &str = "ami-0123456789abcdef0";
const OTHER_IMAGE: &str = "ami-0bbbbbbbbbbbbbbbb";
const RUN: &str = "0123456789abcdef0123456789abcdef";

fn run() -> RunId {
    RunId(RUN.into())
}

fn volume_id() -> VolumeId {
    VolumeId(VOLUME.into())
}

fn tag_set(tags: &[(&str, &str)]) -> String {
    let items =
        tags.iter().map(|(key, value)| format!("<item><key>{key}</key><value>{value}</value></item>"));
    format!("<tagSet>{}</tagSet>", items.collect::<String>())
}

fn volume(state: &str, attachment: &str) -> String {
    let attachment = match attachment {
        "" => String::new(),
        state => format!(
            "<item><volumeId>{VOLUME}</volumeId><instanceId>{INSTANCE}</instanceId><device>/dev/sdf</device>\
             <status>{state}</status></item>"
        ),
    };
    format!(
        "<volumeSet><item><volumeId>{VOLUME}</volumeId><size>8</size><status>{state}</status>\
         <createTime>2026-01-01T00:00:00.000Z</createTime><attachmentSet>{attachment}</attachmentSet>{}</item></volumeSet>",
        tag_set(&[(tag::RUN, RUN)])
    )
}

fn snapshots(ids: &[(&str, &str)]) -> String {
    let items = ids.iter().enumerate().map(|(i, (id, state))| {
        format!(
            "<item><snapshotId>{id}</snapshotId><volumeId>{VOLUME}</volumeId><status>{state}</status>\
             <startTime>2026-01-01T00:00:0{i}.000Z</startTime><volumeSize>8</volumeSize>{}</item>",
            tag_set(&[(tag::RUN, RUN)])
        )
    });
    format!("<snapshotSet>{}</snapshotSet>", items.collect::<String>())
}

fn image(id: &str, snapshot: &str, state: &str, tags: &[(&str, &str)]) -> String {
    format!(
        "<imagesSet><item><imageId>{id}</imageId><imageState>{state}</imageState><name>web-1</name>\
         <architecture>x86_64</architecture><virtualizationType>hvm</virtualizationType>\
         <rootDeviceName>/dev/xvda</rootDeviceName><rootDeviceType>ebs</rootDeviceType>\
         <creationDate>2026-01-01T00:00:00.000Z</creationDate><platformDetails>Linux/UNIX</platformDetails>\
         <usageOperation>RunInstances</usageOperation><blockDeviceMapping><item><deviceName>/dev/xvda</deviceName>\
         <ebs><snapshotId>{snapshot}</snapshotId><volumeSize>8</volumeSize>\
         <deleteOnTermination>true</deleteOnTermination></ebs></item></blockDeviceMapping>{}</item></imagesSet>",
        tag_set(tags)
    )
}

fn spec() -> VolumeSpec {
    VolumeSpec {
        snapshot: SnapshotId(BASE_SNAPSHOT.into()),
        size_gib: 8,
        kind: VolumeKind::default(),
        run: run(),
        tags: Tags::new(),
    }
}

fn image_spec() -> ImageSpec {
    ImageSpec {
        name: "web-1".into(),
        description: String::new(),
        architecture: Architecture::X86_64,
        root_device: "/dev/xvda".into(),
        size_gib: 8,
        attributes: Attributes {
            billing: Some(("Linux/UNIX".into(), "RunInstances".into())),
            ..Default::default()
        },
        tags: [(tag::FINGERPRINT, "f"), (tag::CHECKSUM, "c")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into(),
        run: run(),
        documents: [("packages".to_owned(), "nginx".to_owned())].into(),
    }
}

/// The tags that our image is registered with.
fn our_tags(owner: &str) -> Vec<(&'static str, String)> {
    vec![
        (tag::FINGERPRINT, "f".to_owned()),
        (tag::CHECKSUM, "c".to_owned()),
        (tag::RUN, RUN.to_owned()),
        (tag::OWNER, owner.to_owned()),
    ]
}

fn ours(state: &str) -> String {
    let tags = our_tags(&Owner::on(INSTANCE).to_string());
    let tags: Vec<(&str, &str)> = tags.iter().map(|(k, v)| (*k, v.as_str())).collect();
    image(IMAGE, SNAPSHOT, state, &tags)
}

fn snapshot_debt(undo: &Undo) {
    undo.owe(Debt {
        due: Due::OnFailure,
        what: "the snapshot".into(),
        command: "none".into(),
        pay: Box::new(|| Box::pin(std::future::ready(Ok(())))),
        keep: None,
    });
}

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn count(calls: &Calls, action: &str) -> usize {
    calls.of(action).len()
}

/// A volume of the usual kind: created, attached, detached, deleted.
fn manners(request: &Request, state: &mut (&'static str, &'static str)) -> Reply {
    match request.action.as_str() {
        "CreateVolume" => {
            *state = ("available", "");
            ok(format!("<volumeId>{VOLUME}</volumeId><status>creating</status>"))
        }
        "DescribeVolumes" if state.0.is_empty() => ok("<volumeSet/>"),
        "DescribeVolumes" => match request.filter("attachment.instance-id") {
            Some(_) if state.1.is_empty() => ok("<volumeSet/>"),
            _ => ok(volume(state.0, state.1)),
        },
        "AttachVolume" => {
            *state = ("in-use", "attached");
            ok(format!("<volumeId>{VOLUME}</volumeId><status>attaching</status>"))
        }
        "DetachVolume" => {
            *state = ("available", "");
            ok("<status>detaching</status>")
        }
        "DeleteVolume" => {
            *state = ("", "");
            ok("<return>true</return>")
        }
        "ModifyInstanceAttribute" | "CreateTags" | "DeleteSnapshot" | "DeregisterImage" => {
            ok("<return>true</return>")
        }
        action => panic!("{action}"),
    }
}

#[tokio::test]
async fn a_volume_lives_and_ends() {
    let (dir, mut state) = (dir(), ("", ""));
    let (ec2, calls) = ec2(dir.path(), move |request, _| manners(request, &mut state)).await;
    let id = ec2.create(&spec()).await.unwrap();
    let device = ec2.attach(&id).await.unwrap();
    assert_eq!((id, device.serial.as_str()), (volume_id(), VOLUME));
    drop(device);
    ec2.ensure_no_volumes(&run()).await.unwrap();
    let expected = [
        "CreateVolume",
        "DescribeVolumes",
        "DescribeVolumes",
        "AttachVolume",
        "DescribeVolumes",
        "ModifyInstanceAttribute",
        "DescribeVolumes",
        "DetachVolume",
        "DescribeVolumes",
        "DeleteVolume",
    ];
    assert_eq!(calls.names(), expected);
    let created = &calls.of("CreateVolume")[0];
    assert_eq!((created.get("AvailabilityZone"), created.get("Size")), ("eu-test-1a", "8"));
    assert_eq!(created.get("TagSpecification.1.ResourceType"), "volume");
    assert_eq!(created.get("ClientToken").len(), 64);
    let owner = created.params.values().find(|value| value.starts_with(INSTANCE)).expect("the owner's tag");
    assert!(owner.parse::<Owner>().is_ok());
    let ends = &calls.of("ModifyInstanceAttribute")[0];
    assert_eq!(ends.get("BlockDeviceMapping.1.Ebs.DeleteOnTermination"), "true");
    // Again, and nothing is there: nothing is deleted.
    ec2.ensure_no_volumes(&run()).await.unwrap();
    assert_eq!(count(&calls, "DeleteVolume"), 1);
}

#[tokio::test]
async fn a_lost_create_is_sent_again_with_its_token() {
    let (dir, mut state) = (dir(), ("", ""));
    let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
        ("CreateVolume", 0) => Reply::Drop,
        ("CreateVolume", 1) => Reply::Error(500, "InternalError", "oops".into()),
        ("CreateVolume", 2) => Reply::Error(503, "RequestLimitExceeded", "slow down".into()),
        ("CreateVolume", 3) => Reply::Hang,
        _ => manners(request, &mut state),
    })
    .await;
    ec2.create(&spec()).await.unwrap();
    let tokens: std::collections::BTreeSet<String> =
        calls.of("CreateVolume").iter().map(|request| request.get("ClientToken").to_owned()).collect();
    assert_eq!((count(&calls, "CreateVolume"), tokens.len()), (5, 1));
}

#[tokio::test]
async fn a_burned_token_is_followed_by_one_more() {
    let dir = dir();
    let (ec2, calls) =
        ec2(dir.path(), |_, _| refuse("IdempotentParameterMismatch", "other parameters")).await;
    let error = ec2.create(&spec()).await.unwrap_err();
    assert!(error.to_string().contains("IdempotentParameterMismatch"), "{error:#}");
    let tokens: Vec<String> =
        calls.all().iter().map(|request| request.get("ClientToken").to_owned()).collect();
    assert_eq!((tokens.len(), tokens[0] == tokens[1]), (2, false));
}

#[tokio::test]
async fn a_volume_limit_is_looked_behind_by_tag() {
    for there in [true, false] {
        let dir = dir();
        let (ec2, calls) = ec2(dir.path(), move |request, _| match request.action.as_str() {
            "CreateVolume" => refuse("VolumeLimitExceeded", "limit of 20 TiB"),
            _ if there => ok(volume("available", "")),
            _ => ok("<volumeSet/>"),
        })
        .await;
        let result = ec2.create(&spec()).await;
        assert_eq!(count(&calls, "CreateVolume"), 1);
        match result {
            Ok(id) => assert!(there && id == volume_id()),
            Err(error) => {
                assert!(!there && hint_of(&error).unwrap().contains("quota"), "{error:#}");
                assert!(error.to_string().contains("(request req-1)"), "{error:#}");
            }
        }
    }
}

#[tokio::test]
async fn a_volume_in_error_fails_at_once_and_names_kms() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |request, _| match request.action.as_str() {
        "CreateVolume" => ok(format!("<volumeId>{VOLUME}</volumeId>")),
        _ => ok(volume("error", "")),
    })
    .await;
    let error = ec2.create(&spec()).await.unwrap_err();
    assert!(hint_of(&error).unwrap().contains("kms:CreateGrant"), "{error:#}");
    assert_eq!(count(&calls, "DescribeVolumes"), 1);
}

#[tokio::test]
async fn a_new_volume_may_be_invisible_and_must_not_vanish() {
    for vanishes in [false, true] {
        let dir = dir();
        let (ec2, _) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
            ("CreateVolume", _) => ok(format!("<volumeId>{VOLUME}</volumeId>")),
            (_, 0 | 1) => ok("<volumeSet/>"),
            (_, 2) => ok(volume("creating", "")),
            _ if vanishes => ok("<volumeSet/>"),
            _ => ok(volume("available", "")),
        })
        .await;
        match ec2.create(&spec()).await {
            Ok(_) => assert!(!vanishes),
            Err(error) => assert!(vanishes && format!("{error:#}").contains("vanished"), "{error:#}"),
        }
    }
}

#[tokio::test]
async fn a_volume_that_stays_creating_ends_at_the_deadline() {
    let dir = dir();
    let (ec2, _) = ec2(dir.path(), |request, _| match request.action.as_str() {
        "CreateVolume" => ok(format!("<volumeId>{VOLUME}</volumeId>")),
        _ => ok(volume("creating", "")),
    })
    .await;
    let error = format!("{:#}", ec2.create(&spec()).await.unwrap_err());
    assert!(error.contains("still creating") && error.contains(VOLUME), "{error}");
}

#[tokio::test]
async fn a_stopped_create_is_known_to_the_debt() {
    // The story is dropped while CreateVolume is under way; its answer is lost, too.
    let (dir, mut state) = (dir(), ("", ""));
    let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
        ("CreateVolume", 0) => {
            state = ("available", "");
            Reply::Drop
        }
        // The tag is not visible yet.
        ("DescribeVolumes", 0) => ok("<volumeSet/>"),
        _ => manners(request, &mut state),
    })
    .await;
    let spec = spec();
    tokio::select! {
        biased;
        _ = ec2.create(&spec) => panic!("it cannot end so soon"),
        () = tokio::task::yield_now() => {}
    }
    ec2.ensure_no_volumes(&run()).await.unwrap();
    let tokens: Vec<String> =
        calls.of("CreateVolume").iter().map(|request| request.get("ClientToken").to_owned()).collect();
    assert_eq!((tokens.len(), tokens[0] == tokens[1]), (2, true));
    assert_eq!(count(&calls, "DeleteVolume"), 1);
}

#[tokio::test]
async fn names_in_use_are_passed_over() {
    let (dir, mut state) = (dir(), ("available", ""));
    let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
        ("AttachVolume", 0..3) => {
            let name = request.get("Device");
            let text =
                format!("Invalid value '{name}' for unixDevice. Attachment point {name} is already in use");
            refuse("InvalidParameterValue", text)
        }
        _ => manners(request, &mut state),
    })
    .await;
    ec2.attach(&volume_id()).await.unwrap();
    let names: std::collections::BTreeSet<String> =
        calls.of("AttachVolume").iter().map(|request| request.get("Device").to_owned()).collect();
    assert_eq!(names.len(), 4, "each another one");
}

#[tokio::test]
async fn a_lost_attach_is_looked_up() {
    for acted in [true, false] {
        let (dir, mut state) = (dir(), ("available", ""));
        let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
            ("AttachVolume", 0) => {
                if acted {
                    manners(request, &mut state);
                }
                Reply::Drop
            }
            _ => manners(request, &mut state),
        })
        .await;
        ec2.attach(&volume_id()).await.unwrap();
        assert_eq!(count(&calls, "AttachVolume"), if acted { 1 } else { 2 });
    }
}

#[tokio::test]
async fn a_stuck_attach_is_tried_once_under_another_name() {
    for heals in [true, false] {
        let (dir, mut state) = (dir(), ("available", ""));
        let (ec2, calls) = ec2(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
            ("AttachVolume", 1) if heals => manners(request, &mut state),
            ("AttachVolume", _) => {
                state = ("in-use", "attaching");
                ok("<status>attaching</status>")
            }
            _ => manners(request, &mut state),
        })
        .await;
        let result = ec2.attach(&volume_id()).await;
        let names: Vec<String> =
            calls.of("AttachVolume").iter().map(|request| request.get("Device").to_owned()).collect();
        assert_eq!((names.len(), names[0] == names[1]), (2, false));
        assert_eq!(count(&calls, "DetachVolume"), 1);
        match result {
            Ok(_) => assert!(heals),
            Err(error) => assert!(!heals && format!("{error:#}").contains("is stuck"), "{error:#}"),
        }
    }
}

#[tokio::test]
async fn another_instances_volume_is_not_ours() {
    let dir = dir();
    let elsewhere = volume("in-use", "attached").replace(INSTANCE, "i-0ffffffffffffffff");
    let (ec2, calls) = ec2(dir.path(), move |request, _| match request.action.as_str() {
        "AttachVolume" => Reply::Drop,
        _ if request.filter("attachment.instance-id").is_some() => ok("<volumeSet/>"),
        _ => ok(elsewhere.clone()),
    })
    .await;
    let error = format!("{:#}", ec2.attach(&volume_id()).await.unwrap_err());
    assert!(error.contains("attached to i-0fff"), "{error}");
    assert_eq!(count(&calls, "AttachVolume"), 0);
}

#[tokio::test]
async fn a_full_instance_is_told() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |request, _| match request.action.as_str() {
        "AttachVolume" => refuse("AttachmentLimitExceeded", "Too many attachments"),
        _ if request.filter("attachment.instance-id").is_some() => ok(volume("in-use", "attached")),
        _ => ok(volume("available", "")),
    })
    .await;
    let error = ec2.attach(&volume_id()).await.unwrap_err();
    assert!(format!("{error:#}").contains("has 1 volumes attached"), "{error:#}");
    assert!(hint_of(&error).unwrap().contains("--jobs"));
    assert_eq!(count(&calls, "AttachVolume"), 1);
}

/// A fake whose snapshots appear when CreateSnapshot is answered by `script`: whether it acts, and what it answers.
async fn snapshotting(
    dir: &std::path::Path,
    script: impl Fn(usize) -> (bool, Reply) + Send + 'static,
    states: [&'static str; 2],
) -> (Ec2, Calls) {
    let mut there: Vec<(String, &'static str)> = Vec::new();
    let mut made = 0;
    ec2(dir, move |request, nth| match request.action.as_str() {
        "CreateSnapshot" => {
            let (acts, reply) = script(nth);
            if acts {
                there.push((format!("snap-0{made:016}"), states[made.min(1)]));
                made += 1;
            }
            match reply {
                Reply::Ok(_) => ok(format!("<snapshotId>{}</snapshotId>", there.last().unwrap().0)),
                reply => reply,
            }
        }
        "DescribeSnapshots" => {
            let wanted = request.filter("snapshot-id");
            let some: Vec<(&str, &str)> = there
                .iter()
                .map(|(id, state)| (id.as_str(), *state))
                .filter(|(id, _)| wanted.is_none_or(|w| w == *id))
                .collect();
            ok(snapshots(&some))
        }
        "DeleteSnapshot" => {
            there.retain(|(id, _)| id != request.get("SnapshotId"));
            ok("<return>true</return>")
        }
        action => panic!("{action}"),
    })
    .await
}

#[tokio::test]
async fn a_lost_snapshot_is_looked_up_and_never_made_twice() {
    for acted in [true, false] {
        let dir = dir();
        let script = move |nth| if nth == 0 { (acted, Reply::Drop) } else { (true, ok("")) };
        let (ec2, calls) = snapshotting(dir.path(), script, ["completed"; 2]).await;
        let id = ec2.snapshot(&volume_id(), &run(), &Tags::new()).await.unwrap();
        assert_eq!(id.0, "snap-00000000000000000");
        assert_eq!(count(&calls, "CreateSnapshot"), if acted { 1 } else { 2 });
        assert_eq!(count(&calls, "DeleteSnapshot"), 0);
        if !acted {
            assert!(count(&calls, "DescribeSnapshots") >= 3);
        }
    }
}

#[tokio::test]
async fn a_snapshot_in_error_is_replaced_once() {
    for second in ["completed", "error"] {
        let dir = dir();
        let (ec2, calls) = snapshotting(dir.path(), |_| (true, ok("")), ["error", second]).await;
        let result = ec2.snapshot(&volume_id(), &run(), &Tags::new()).await;
        assert_eq!(result.is_ok(), second == "completed", "{result:?}");
        assert_eq!(count(&calls, "CreateSnapshot"), 2);
        assert_eq!(count(&calls, "DeleteSnapshot"), if second == "completed" { 1 } else { 2 });
    }
}

#[tokio::test]
async fn snapshots_of_one_volume_are_paced() {
    let dir = dir();
    let codes = ["SnapshotCreationPerVolumeRateExceeded", "ConcurrentSnapshotLimitExceeded"];
    let script = move |nth: usize| match codes.get(nth) {
        Some(code) => (false, refuse(code, "slow down")),
        None => (true, ok("")),
    };
    let (ec2, calls) = snapshotting(dir.path(), script, ["completed"; 2]).await;
    let begun = Instant::now();
    ec2.snapshot(&volume_id(), &run(), &Tags::new()).await.unwrap();
    assert_eq!(count(&calls, "CreateSnapshot"), 3);
    assert!(begun.elapsed() >= ec2.pace().rate * 2);
    let dir = tempfile::tempdir().unwrap();
    let (ec2, calls) =
        snapshotting(dir.path(), |_| (false, refuse("SnapshotLimitExceeded", "no")), ["completed"; 2]).await;
    assert!(ec2.snapshot(&volume_id(), &run(), &Tags::new()).await.is_err());
    assert_eq!(count(&calls, "CreateSnapshot"), 1);
}

#[tokio::test]
async fn snapshots_of_images_stay() {
    for (used, deleted) in [(true, false), (false, true)] {
        let (dir, mut left) = (dir(), 2);
        let (ec2, _) = ec2(dir.path(), move |request, _| match request.action.as_str() {
            "DescribeSnapshots" => ok(snapshots(&[(SNAPSHOT, "completed")])),
            "DescribeImages" if used => ok(ours("available")),
            "DescribeImages" => ok("<imagesSet/>"),
            "DeleteSnapshot" if used || left > 0 => {
                left -= 1;
                refuse("InvalidSnapshot.InUse", "The snapshot is currently in use by ami-1")
            }
            _ => ok("<return>true</return>"),
        })
        .await;
        ec2.ensure_no_snapshots(&run()).await.unwrap();
        assert_ne!(used, deleted);
    }
}

/// Registers against a script for RegisterImage, with DescribeImages answered by the last argument.
async fn registering(
    register: impl Fn(usize) -> Reply + Send + 'static,
    describe: impl Fn(&Request, usize) -> Reply + Send + 'static,
) -> (Result<Image>, Calls, bool) {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), move |request, nth| match request.action.as_str() {
        "RegisterImage" => register(nth),
        "DescribeImages" => describe(request, nth),
        _ => ok("<return>true</return>"),
    })
    .await;
    let undo = Undo::default();
    snapshot_debt(&undo);
    let image = ec2.register(&SnapshotId(SNAPSHOT.into()), &image_spec(), &undo).await;
    if let Ok(image) = &image {
        let (again, documents) = ec2.image(&image.id).await.unwrap();
        assert_eq!(again.id, image.id);
        assert_eq!(documents.is_empty(), image.id.0 != IMAGE);
    }
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    (image, calls, left == 0)
}

#[tokio::test]
async fn a_new_image_is_seen_three_times_in_a_row() {
    let describe = |_: &Request, nth: usize| match nth {
        0 => ok("<imagesSet/>"),
        1 => ok(ours("available")),
        2 => ok(ours("pending")),
        _ => ok(ours("available")),
    };
    let (image, calls, _) = registering(|_| ok(format!("<imageId>{IMAGE}</imageId>")), describe).await;
    assert_eq!(image.unwrap().state, ImageState::Available);
    // And the look of the test itself.
    assert_eq!(count(&calls, "DescribeImages"), 3 + 3 + 1);
    let sent = &calls.of("RegisterImage")[0];
    assert_eq!((sent.get("Architecture"), sent.get("VirtualizationType")), ("x86_64", "hvm"));
    assert_eq!(sent.get("BlockDeviceMapping.1.Ebs.SnapshotId"), SNAPSHOT);
    assert_eq!(sent.get("TagSpecification.1.ResourceType"), "image");
}

#[tokio::test]
async fn a_lost_register_is_looked_up_by_name() {
    let (image, calls, _) = registering(|_| Reply::Drop, |_, _| ok(ours("available"))).await;
    assert_eq!(image.unwrap().id.0, IMAGE);
    assert_eq!(count(&calls, "RegisterImage"), 1);
    // It did nothing: sent again, once the name is seen to be free.
    let register = |nth| if nth == 0 { Reply::Drop } else { ok(format!("<imageId>{IMAGE}</imageId>")) };
    let describe = |request: &Request, _| match request.filter("name") {
        Some(_) => ok("<imagesSet/>"),
        None => ok(ours("available")),
    };
    let (image, calls, _) = registering(register, describe).await;
    assert_eq!(image.unwrap().id.0, IMAGE);
    assert_eq!(count(&calls, "RegisterImage"), 2);
}

#[tokio::test]
async fn the_winner_of_a_name_is_adopted() {
    let duplicate = |_| {
        refuse("InvalidAMIName.Duplicate", format!("AMI name web-1 is already in use by AMI {OTHER_IMAGE}"))
    };
    let theirs = [(tag::FINGERPRINT, "f"), (tag::CHECKSUM, "c"), (tag::RUN, "other")];
    let describe = move |_: &Request, nth: usize| match nth {
        0 => ok("<imagesSet/>"),
        1 | 2 => ok(image(OTHER_IMAGE, BASE_SNAPSHOT, "pending", &theirs)),
        _ => ok(image(OTHER_IMAGE, BASE_SNAPSHOT, "available", &theirs)),
    };
    let (adopted, calls, clean) = registering(duplicate, describe).await;
    let adopted = adopted.unwrap();
    assert_eq!((adopted.id.0.as_str(), adopted.made_by(&run())), (OTHER_IMAGE, false));
    assert_eq!(count(&calls, "RegisterImage"), 1);
    assert!(clean, "our documents are gone");
    // Another definition's image: refused, and no other name is tried.
    let others = [(tag::FINGERPRINT, "g"), (tag::CHECKSUM, "c"), (tag::RUN, "other")];
    let describe = move |_: &Request, _| ok(image(OTHER_IMAGE, BASE_SNAPSHOT, "available", &others));
    let (refused, calls, _) = registering(duplicate, describe).await;
    let error = format!("{:#}", refused.unwrap_err());
    assert!(error.contains("is taken by"), "{error}");
    assert_eq!((count(&calls, "RegisterImage"), count(&calls, "DeregisterImage")), (1, 0));
}

#[tokio::test]
async fn lost_tags_are_set_again_and_a_wrong_image_is_deregistered() {
    let register = |_| ok(format!("<imageId>{IMAGE}</imageId>"));
    let describe = |_: &Request, nth: usize| {
        if nth == 0 { ok(image(IMAGE, SNAPSHOT, "available", &[])) } else { ok(ours("available")) }
    };
    let (image_, calls, _) = registering(register, describe).await;
    image_.unwrap();
    assert_eq!(count(&calls, "CreateTags"), 1);
    // Never tagged.
    let (result, calls, _) = registering(register, |_, _| ok(image(IMAGE, SNAPSHOT, "available", &[]))).await;
    assert!(format!("{:#}", result.unwrap_err()).contains("lacks the tags"));
    assert_eq!((count(&calls, "CreateTags"), count(&calls, "DeregisterImage")), (3, 1));
    // Of another snapshot; billed otherwise; failed.
    for (from, to, text) in [
        (SNAPSHOT, BASE_SNAPSHOT, "the snapshot of /dev/xvda"),
        ("Linux/UNIX", "SUSE Linux", "billed as SUSE Linux"),
        ("available", "failed", "it is failed"),
    ] {
        let (result, calls, clean) =
            registering(register, move |_, _| ok(ours("available").replace(from, to))).await;
        let error = format!("{:#}", result.unwrap_err());
        assert!(error.contains(text) && error.contains("deregistered again"), "{error}");
        assert_eq!(count(&calls, "DeregisterImage"), 1);
        assert!(clean);
    }
}

#[tokio::test]
async fn a_hit_is_one_call() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |_, _| ok(ours("available"))).await;
    let key = Key { checksum: "c".into(), fingerprint: Some("f".into()), architecture: Architecture::X86_64 };
    assert_eq!(ec2.find(&key).await.unwrap().unwrap().id.0, IMAGE);
    assert_eq!(calls.names(), ["DescribeImages"]);
    let sent = &calls.all()[0];
    assert_eq!(sent.filter(&format!("tag:{}", tag::CHECKSUM)), Some("c"));
    assert_eq!(sent.filter(&format!("tag:{}", tag::FINGERPRINT)), Some("f"));
    assert_eq!(sent.get("Owner.1"), "self");
    // A server that ignores filters is not believed.
    let other = Key { fingerprint: Some("g".into()), ..key };
    assert_eq!(ec2.find(&other).await.unwrap(), None);
}

#[tokio::test]
async fn what_is_pending_is_waited_for() {
    let dir = dir();
    let (ec2, _) = ec2(dir.path(), |_, nth| ok(ours(if nth < 3 { "pending" } else { "available" }))).await;
    let key = Key { checksum: "c".into(), fingerprint: None, architecture: Architecture::X86_64 };
    assert_eq!(ec2.find(&key).await.unwrap().unwrap().state, ImageState::Available);
}

#[tokio::test]
async fn throttling_is_borne_and_a_dead_endpoint_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let (busy, calls) = ec2(dir.path(), |_, nth| match nth {
        0..5 => Reply::Error(503, "RequestLimitExceeded", "no".into()),
        5 => Reply::Error(502, "", String::new()),
        6 => Reply::Hang,
        _ => ok("<imagesSet/>"),
    })
    .await;
    assert_eq!(busy.images(None).await.unwrap(), []);
    assert_eq!(count(&calls, "DescribeImages"), 8);
    let (dead, _) = ec2(dir.path(), |_, _| Reply::Drop).await;
    let error = dead.images(None).await.unwrap_err();
    assert!(hint_of(&error).unwrap().contains("endpoint"), "{error:#}");
}

#[tokio::test]
async fn expired_credentials_are_renewed() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |_, nth| match nth {
        0 => refuse("ExpiredToken", "old"),
        _ => ok("<imagesSet/>"),
    })
    .await;
    ec2.images(None).await.unwrap();
    assert_eq!(count(&calls, "DescribeImages"), 2);
}

#[tokio::test]
async fn permissions_are_asked_for_once_a_day() {
    let dir = tempfile::tempdir().unwrap();
    let yes = |_: &Request, _| Reply::Error(412, "DryRunOperation", "would have succeeded".into());
    let (granted, calls) = ec2(dir.path(), yes).await;
    granted.ensure_permitted().await.unwrap();
    granted.ensure_permitted().await.unwrap();
    assert_eq!(calls.names(), ["CreateVolume", "RegisterImage"]);
    assert!(calls.all().iter().all(|request| request.get("DryRun") == "true"));
    // Another process, which has signed something: the same key.
    let (again, calls) = ec2(dir.path(), |request, _| match request.action.as_str() {
        "DescribeImages" => ok("<imagesSet/>"),
        action => panic!("{action}"),
    })
    .await;
    again.images(None).await.unwrap();
    again.ensure_permitted().await.unwrap();
    assert_eq!(calls.names(), ["DescribeImages"]);
    let other = tempfile::tempdir().unwrap();
    let (refused, _) = ec2(other.path(), |request, _| match request.action.as_str() {
        "RegisterImage" => Reply::Error(403, "UnauthorizedOperation", "You are not authorized".into()),
        _ => Reply::Error(412, "DryRunOperation", "yes".into()),
    })
    .await;
    let error = refused.ensure_permitted().await.unwrap_err();
    assert_eq!(error.to_string(), "the role may not ec2:RegisterImage");
    assert_eq!(Kind::of(&error), Kind::Cloud);
    let all = refused.permissions().await.unwrap();
    assert_eq!(all.len(), class::ACTIONS.len());
    let missing: Vec<&str> = all
        .iter()
        .filter(|p| p.verdict == crate::cloud::Verdict::Missing)
        .map(|p| p.action.as_str())
        .collect();
    assert_eq!(missing, ["ec2:RegisterImage"]);
}

#[test]
fn the_policy_permits_every_action() {
    let policy = crate::cloud::policy::actions();
    let prefix = |action: &str| if action == "GetParameter" { "ssm" } else { "ec2" };
    let mut sent: Vec<String> =
        class::ACTIONS.iter().map(|action| format!("{}:{}", prefix(action.name), action.name)).collect();
    sent.sort();
    assert_eq!(policy, sent);
}

#[tokio::test]
async fn stale_runs_are_those_of_owners_that_are_gone() {
    let gone = Owner { boot: "another".into(), ..Owner::on(INSTANCE) }.to_string();
    let living = Owner::on(INSTANCE).to_string();
    let volume = |run: &str, owner: &str, id: &str| {
        format!(
            "<item><volumeId>{id}</volumeId><status>available</status><createTime>2026-01-01T00:00:00.000Z</createTime>{}</item>",
            tag_set(&[(tag::RUN, run), (tag::OWNER, owner)])
        )
    };
    let volumes = format!(
        "<volumeSet>{}{}{}{}</volumeSet>",
        volume("gone", &gone, "vol-00000000000000001"),
        volume("living", &living, "vol-00000000000000002"),
        volume("terminated", "i-0aaaaaaaaaaaaaaaa/b/1/1", "vol-00000000000000003"),
        volume("elsewhere", "i-0bbbbbbbbbbbbbbbb/b/1/1", "vol-00000000000000004"),
    );
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), move |request, _| match request.action.as_str() {
        "DescribeVolumes" => ok(volumes.clone()),
        "DescribeSnapshots" => ok(snapshots(&[(SNAPSHOT, "completed"), (BASE_SNAPSHOT, "completed")])),
        // One of the snapshots is an image's.
        "DescribeImages" => ok(ours("available")),
        "DescribeInstances" => ok("<reservationSet><item><instancesSet><item><instanceId>i-0bbbbbbbbbbbbbbbb</instanceId>\
            <instanceState><name>running</name></instanceState></item></instancesSet></item></reservationSet>"),
        action => panic!("{action}"),
    })
    .await;
    let stale = ec2.stale_runs(None).await.unwrap();
    let runs: Vec<&str> = stale.iter().map(|stale| stale.run.0.as_str()).collect();
    assert_eq!(runs, ["gone", "terminated"]);
    assert!(calls.all().iter().all(|request| request.params.keys().any(|key| key.starts_with("Filter."))));
    let all = ec2.stale_runs(Some(Duration::from_secs(1))).await.unwrap();
    let runs: Vec<&str> = all.iter().map(|stale| stale.run.0.as_str()).collect();
    assert_eq!(runs, [RUN, "elsewhere", "gone", "terminated"]);
    assert_eq!(all[0].resources, [BASE_SNAPSHOT]);
}

#[tokio::test]
async fn only_failed_images_of_ours_are_replaced() {
    let seen = Arc::new(Mutex::new(ours("failed")));
    let (dir, now) = (dir(), seen.clone());
    let (ec2, calls) = ec2(dir.path(), move |request, _| match request.action.as_str() {
        "DescribeImages" => ok(now.lock().unwrap().clone()),
        "DescribeSnapshots" => ok(snapshots(&[(SNAPSHOT, "completed")])),
        _ => ok("<return>true</return>"),
    })
    .await;
    assert_eq!(ec2.replace_failed("web-1").await.unwrap(), Some(ImageId(IMAGE.into())));
    assert_eq!((count(&calls, "DeregisterImage"), count(&calls, "DeleteSnapshot")), (1, 1));
    assert_eq!(ec2.replace_failed("web-2").await.unwrap(), None);
    *seen.lock().unwrap() = ours("available");
    assert!(ec2.replace_failed("web-1").await.is_err());
    assert_eq!(count(&calls, "DeregisterImage"), 1);
}

#[tokio::test]
async fn bases_are_looked_up_with_an_owner() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |_, _| ok(ours("available"))).await;
    let named = |owner: Option<&str>| BaseRef::Name { name: "web-*".into(), owner: owner.map(str::to_owned) };
    let error = ec2.base(&named(None)).await.unwrap_err();
    assert!(hint_of(&error).unwrap().contains("Anybody may publish"));
    assert_eq!((Kind::of(&error), calls.all().len()), (Kind::Definition, 0));
    if Architecture::HOST == Architecture::X86_64 {
        let base = ec2.base(&named(Some("136693071363"))).await.unwrap();
        assert_eq!(base.snapshot.0, SNAPSHOT);
    }
    assert_eq!(calls.all()[0].get("Owner.1"), "136693071363");
    assert_eq!(calls.all()[0].filter("name"), Some("web-*"));
    let unknown = ec2.base(&BaseRef::Id(ImageId("ami-0".into()))).await.unwrap_err();
    assert_eq!(Kind::of(&unknown), Kind::NotFound);
}
