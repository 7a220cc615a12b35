//! Tests how oven handles EC2's answers, especially errors and lost answers.

mod register;
mod snapshots;
mod volumes;

use super::fake::{Calls, INSTANCE, Reply, Request, connected, ec2, ok, refuse};
use super::*;
use crate::cloud::iam_policy;
use crate::cloud::iam_policy::DiskAccess;
use crate::cloud::{Attributes, ImageState, PermissionVerdict, VolumeKind};
use crate::error::hint_of;
use crate::ids::Architecture;
use crate::undo::{Debt, Due};
use aws_config::credential_process::CredentialProcessProvider;
use std::sync::{Arc, Mutex};

const VOLUME: &str = "vol-0123456789abcdef0";
const SNAPSHOT: &str = "snap-0123456789abcdef0";
const BASE_SNAPSHOT: &str = "snap-0aaaaaaaaaaaaaaaa";
const IMAGE: &str = "ami-0123456789abcdef0";
const OTHER_IMAGE: &str = "ami-0bbbbbbbbbbbbbbbb";
const RUN: &str = "0123456789abcdef0123456789abcdef";

fn some_base() -> Base {
    Base {
        id: ImageId(OTHER_IMAGE.into()),
        name: "base".into(),
        snapshot: SnapshotId(BASE_SNAPSHOT.into()),
        architecture: Architecture::X86_64,
        size_gib: 8,
        root_device: "/dev/xvda".into(),
        attributes: Attributes::default(),
    }
}

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

/// Returns the tags with which this run's image is registered.
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

/// Answers for a volume that is created, attached, detached and deleted without errors. `state` contains the state of
/// the volume and the state of its attachment.
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
async fn a_finished_image_is_found_with_one_call() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |_, _| ok(ours("available"))).await;
    let key =
        BakeKey { checksum: "c".into(), fingerprint: Some("f".into()), architecture: Architecture::X86_64 };
    assert_eq!(ec2.find(&key).await.unwrap().unwrap().id.0, IMAGE);
    assert_eq!(calls.names(), ["DescribeImages"]);
    let sent = &calls.all()[0];
    assert_eq!(sent.filter(&format!("tag:{}", tag::CHECKSUM)), Some("c"));
    assert_eq!(sent.filter(&format!("tag:{}", tag::FINGERPRINT)), Some("f"));
    assert_eq!(sent.get("Owner.1"), "self");
    // The fake EC2 ignores the filter, and returns an image with another fingerprint. oven must not use this image.
    let other = BakeKey { fingerprint: Some("g".into()), ..key };
    assert_eq!(ec2.find(&other).await.unwrap(), None);
}

#[tokio::test]
async fn pending_images_are_waited_for() {
    let dir = dir();
    let (ec2, _) = ec2(dir.path(), |_, nth| ok(ours(if nth < 3 { "pending" } else { "available" }))).await;
    let key = BakeKey { checksum: "c".into(), fingerprint: None, architecture: Architecture::X86_64 };
    assert_eq!(ec2.find(&key).await.unwrap().unwrap().state, ImageState::Available);
}

#[tokio::test]
async fn throttling_is_retried_and_a_dead_endpoint_is_reported() {
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

/// On a busy instance, the metadata service may return the credentials only after the SDK has stopped waiting.
#[tokio::test]
async fn late_credentials_are_asked_for_again() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |_, _| ok("<imagesSet/>")).await;
    let asked = dir.path().join("asked");
    let keys = r#"{"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "b"}"#;
    let late = format!("echo >> {0}; [ $(wc -l < {0}) -gt 2 ] && echo '{keys}'", asked.display());
    let config =
        ec2.0.config.borrow().to_builder().credentials_provider(CredentialProcessProvider::new(late));
    ec2.0.config.replace(config.build());
    ec2.renew();
    ec2.images(None).await.unwrap();
    assert_eq!((std::fs::read(asked).unwrap().len(), count(&calls, "DescribeImages")), (3, 1));
}

#[tokio::test]
async fn permissions_are_checked_once_a_day() {
    let dir = tempfile::tempdir().unwrap();
    let here = "<reservationSet><item><instancesSet><item><instanceId>i-0123456789abcdef0</instanceId><instanceState>\
                <name>running</name></instanceState><placement><availabilityZone>eu-test-1a</availabilityZone></placement>\
                </item></instancesSet></item></reservationSet>";
    let yes = move |request: &Request, _| match request.action.as_str() {
        "DescribeInstances" => ok(here),
        _ => Reply::Error(412, "DryRunOperation", "would have succeeded".into()),
    };
    let (granted, calls) = ec2(dir.path(), yes).await;
    granted.ensure_permitted(&some_base()).await.unwrap();
    granted.ensure_permitted(&some_base()).await.unwrap();
    // The instance is checked each time.
    assert_eq!(calls.names(), ["DescribeInstances", "CreateVolume", "RegisterImage", "DescribeInstances"]);
    // The DryRun has to name an existing snapshot. Otherwise EC2 may report only that the snapshot does not exist.
    assert_eq!(calls.all()[1].get("SnapshotId"), BASE_SNAPSHOT);
    assert_eq!(calls.all()[2].get("BlockDeviceMapping.1.Ebs.SnapshotId"), BASE_SNAPSHOT);
    assert!(calls.all()[1..3].iter().all(|request| request.get("DryRun") == "true"));
    // Another process finds the cached result once it has signed a request with the same key.
    let (again, calls) = ec2(dir.path(), move |request, _| match request.action.as_str() {
        "DescribeImages" => ok("<imagesSet/>"),
        "DescribeInstances" => ok(here),
        action => panic!("{action}"),
    })
    .await;
    again.images(None).await.unwrap();
    again.ensure_permitted(&some_base()).await.unwrap();
    assert_eq!(calls.names(), ["DescribeImages", "DescribeInstances"]);
    let other = tempfile::tempdir().unwrap();
    let (refused, _) = ec2(other.path(), move |request, _| match request.action.as_str() {
        "DescribeInstances" if request.get("DryRun").is_empty() => ok(here),
        "RegisterImage" => Reply::Error(403, "UnauthorizedOperation", "You are not authorized".into()),
        _ => Reply::Error(412, "DryRunOperation", "yes".into()),
    })
    .await;
    let error = refused.ensure_permitted(&some_base()).await.unwrap_err();
    assert_eq!(error.to_string(), "the role lacks permissions: ec2:RegisterImage");
    assert_eq!(Kind::of(&error), Kind::Cloud);
    let all = refused.permissions().await.unwrap();
    assert_eq!(all.len(), iam_policy::actions(DiskAccess::Attached).len());
    let missing: Vec<&str> = all
        .iter()
        .filter(|p| p.verdict == crate::cloud::PermissionVerdict::Missing)
        .map(|p| p.action.as_str())
        .collect();
    assert_eq!(missing, ["ec2:RegisterImage"]);
}

/// A DryRun names resources that do not exist. oven does not wait until they exist.
#[tokio::test]
async fn each_permission_is_checked_with_one_call() {
    let dir = tempfile::tempdir().unwrap();
    let (ec2, calls) = ec2(dir.path(), |request, _| match request.action.as_str() {
        "ModifyInstanceAttribute" => {
            refuse("InvalidInstanceAttributeValue", "No device is currently mapped at /dev/sdf")
        }
        "DeleteVolume" => refuse("InvalidVolume.NotFound", "no"),
        "RegisterImage" => refuse("InvalidSnapshot.NotFound", "no"),
        "DetachVolume" => refuse("IncorrectState", "it is creating"),
        _ => Reply::Error(412, "DryRunOperation", "yes".into()),
    })
    .await;
    let all = ec2.permissions().await.unwrap();
    let known = |p: &&Permission| p.verdict == crate::cloud::PermissionVerdict::Granted;
    // Five permissions are unknown. Four errors say nothing about the permission, and SSM is not configured.
    assert_eq!(all.len() - all.iter().filter(known).count(), 5, "{all:?}");
    assert_eq!(calls.all().len(), iam_policy::actions(DiskAccess::Attached).len() - 1);
}

/// For bakes that attach no volumes, oven checks only the permissions that these bakes need. It does not check the
/// instance.
#[tokio::test]
async fn permissions_of_bakes_that_attach_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (ec2, calls) = ec2(dir.path(), |request, _| match request.action.as_str() {
        "CopySnapshot" => Reply::Error(403, "UnauthorizedOperation", "You are not authorized".into()),
        _ => Reply::Error(412, "DryRunOperation", "yes".into()),
    })
    .await;
    let ec2 = ec2.without_volumes();
    ec2.ensure_permitted(&some_base()).await.unwrap();
    ec2.ensure_permitted(&some_base()).await.unwrap();
    assert_eq!(calls.names(), ["RegisterImage"]);
    assert_eq!(calls.all()[0].get("BlockDeviceMapping.1.Ebs.SnapshotId"), BASE_SNAPSHOT);
    let all = ec2.permissions().await.unwrap();
    let mut told: Vec<&str> = all.iter().map(|permission| permission.action.as_str()).collect();
    told.sort();
    assert_eq!(told, iam_policy::actions(DiskAccess::Direct));
    let of = |verdict: &dyn Fn(&PermissionVerdict) -> bool| -> Vec<&str> {
        all.iter().filter(|p| verdict(&p.verdict)).map(|p| p.action.as_str()).collect()
    };
    assert_eq!(of(&|verdict| *verdict == PermissionVerdict::Missing), ["ec2:CopySnapshot"]);
    let unknown =
        of(&|verdict| matches!(verdict, PermissionVerdict::Unknown(why) if why.contains("no DryRun")));
    assert!(unknown.len() == 5 && unknown.iter().all(|action| action.starts_with("ebs:")), "{unknown:?}");
    assert!(calls.all().iter().all(|call| call.get("DryRun") == "true"));
}

#[test]
fn the_policy_permits_every_action() {
    let policy = iam_policy::actions(DiskAccess::Both);
    let mut sent: Vec<String> = client::errors::ACTIONS.iter().map(|action| action.permission()).collect();
    sent.sort();
    assert_eq!(policy, sent);
}

#[tokio::test]
async fn stale_runs_are_those_of_ended_owners() {
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
        // An image uses one of the snapshots.
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
async fn bases_are_looked_up_with_an_owner() {
    let dir = dir();
    let (ec2, calls) = ec2(dir.path(), |_, _| ok(ours("available"))).await;
    let named = |owner: Option<&str>| BaseRef::Name { name: "web-*".into(), owner: owner.map(str::to_owned) };
    let error = ec2.base(&named(None)).await.unwrap_err();
    assert!(hint_of(&error).unwrap().contains("Anybody can publish"));
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

#[tokio::test]
async fn a_base_in_an_ssm_parameter() {
    let from = BaseRef::Ssm("/aws/service/debian/release/12/latest/amd64".into());
    let parameter = |value: &str| format!("{{\"Parameter\": {{\"Value\": {}}}}}", serde_json::json!(value));
    for value in [IMAGE.to_owned(), format!("{{\"image_id\": \"{IMAGE}\"}}")] {
        let (dir, value) = (dir(), parameter(&value));
        let (ec2, calls) = connected(dir.path(), move |request, nth| match (request.action.as_str(), nth) {
            ("GetParameter", 0) => refuse("ThrottlingException", "Rate exceeded"),
            ("GetParameter", _) => ok(value.clone()),
            _ => ok(ours("available").replace("x86_64", Architecture::HOST.as_str())),
        })
        .await;
        assert_eq!(ec2.base(&from).await.unwrap().id.0, IMAGE);
        assert_eq!(calls.names(), ["GetParameter", "GetParameter", "DescribeImages"]);
    }
    for (reply, text) in
        [(None, "parameter does not exist"), (Some(parameter("nonsense")), "not an image id")]
    {
        let dir = dir();
        let (ec2, _) = connected(dir.path(), move |_, _| match &reply {
            Some(value) => ok(value.clone()),
            None => refuse("ParameterNotFound", "no"),
        })
        .await;
        let error = ec2.base(&from).await.unwrap_err();
        assert_eq!(Kind::of(&error), Kind::NotFound);
        assert!(error.to_string().contains(text), "{error:#}");
        if text.contains("parameter") {
            let all = ec2.permissions().await.unwrap();
            assert_eq!(all.last().unwrap().verdict, crate::cloud::PermissionVerdict::Granted);
        }
    }
}
