//! What is planned to go wrong does, and nothing else.

use crate::support::{TestServer, eventually, pause};
use oven_ec2_server::{Fault, ServerOptions, Turn, What};

fn with(faults: &[(&str, u32, What)]) -> TestServer {
    let faults = faults.iter().map(|(action, nth, what)| Fault::new(action, *nth, what.clone())).collect();
    TestServer::new(ServerOptions { faults, ..ServerOptions::default() })
}

fn params(ground: &TestServer) -> [(&str, &str); 2] {
    [("AvailabilityZone", "us-east-1a"), ("SnapshotId", &ground.snapshot)]
}

#[test]
fn before_and_after_the_effect() {
    for (what, answer, volumes) in [
        (What::Error("InternalError".into()), Some((500, "InternalError")), 0),
        (What::Error("RequestLimitExceeded".into()), Some((503, "RequestLimitExceeded")), 0),
        (What::ErrorSaying("VolumeLimitExceeded".into(), "no".into()), Some((400, "VolumeLimitExceeded")), 0),
        (What::StatusBefore(503), Some((503, "")), 0),
        (What::ErrorAfter("InternalError".into()), Some((500, "InternalError")), 1),
        (What::StatusAfter(500), Some((500, "")), 1),
        (What::DropBefore, None, 0),
        (What::DropAfter, None, 1),
        (What::Late(100), Some((200, "")), 1),
    ] {
        let ground = with(&[("CreateVolume", 1, what.clone())]);
        let told = ground.try_call("CreateVolume", &params(&ground));
        let told = told.map(|told| (told.status, told.get("Code").unwrap_or_default()));
        assert_eq!(told, answer.map(|(status, code)| (status, code.to_owned())), "{what:?}");
        assert_eq!(ground.server.ledger().volumes.len(), volumes, "{what:?}");
        // Only the first.
        assert_eq!(ground.call("CreateVolume", &params(&ground)).status, 200, "{what:?}");
        assert_eq!(ground.server.calls().len(), 2, "{what:?}");
    }
}

#[test]
fn a_call_that_hangs() {
    for (what, volumes) in [(What::HangBefore, 0), (What::HangAfter, 1)] {
        let ground = with(&[("CreateVolume", 1, what.clone())]);
        let address = ground.server.endpoint();
        let form = format!(
            "Action=CreateVolume&Version=2016-11-15&AvailabilityZone=us-east-1a&SnapshotId={}",
            ground.snapshot
        );
        let headers = "X-Short: 1\r\nAuthorization: AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/ec2/aws4_request, S=0\r\n";
        assert!(crate::support::http(&address, "POST", "/", headers, &form).is_none());
        assert_eq!(ground.server.ledger().volumes.len(), volumes, "{what:?}");
        assert_eq!(ground.call("CreateVolume", &params(&ground)).status, 200);
    }
}

#[test]
fn a_call_takes_effect_if_nobody_waits_for_it() {
    let ground = with(&[("CreateVolume", 1, What::Late(1500))]);
    let form = format!(
        "Action=CreateVolume&Version=2016-11-15&AvailabilityZone=us-east-1a&SnapshotId={}",
        ground.snapshot
    );
    let address = ground.server.endpoint();
    let mut stream = std::net::TcpStream::connect(address.strip_prefix("http://").unwrap()).unwrap();
    let head = "Authorization: AWS4-HMAC-SHA256 Credential=A/20260101/us-east-1/ec2/aws4_request, S=0";
    let request =
        format!("POST / HTTP/1.1\r\nHost: x\r\n{head}\r\nContent-Length: {}\r\n\r\n{form}", form.len());
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    pause(500);
    drop(stream);
    eventually("the volume", || ground.server.ledger().volumes.len() == 1);
}

#[test]
fn a_stale_read_has_the_state_before_the_last_change() {
    let ground = with(&[
        ("DescribeVolumes", 2, What::Stale),
        ("DescribeVolumes", 3, What::Stale),
        ("DescribeImages", 1, What::Stale),
    ]);
    let volume = ground.volume();
    ground.attach(&volume, "/dev/sdf");
    assert_eq!(ground.state_of(&volume), "in-use attached");
    assert_eq!(ground.state_of(&volume), "in-use attaching");
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    eventually("detached", || ground.server.ledger().volumes[0].state == "available");
    assert!(ground.state_of(&volume).starts_with("in-use"));
    assert_eq!(ground.state_of(&volume), "available");
    let snapshot = ground.good("CreateSnapshot", &[("VolumeId", &volume)]).get("snapshotId").unwrap();
    let image = ground.register("web", &snapshot, &[]).get("imageId").unwrap();
    assert_eq!(ground.refused("DescribeImages", &[("ImageId.1", &image)]), "InvalidAMIID.NotFound");
    ground.good("DescribeImages", &[("ImageId.1", &image)]);
}

#[test]
fn what_is_made_turns_out_badly() {
    let turns = |turn| What::Turns(turn);
    let ground = with(&[
        ("CreateVolume", 1, turns(Turn::Failed)),
        ("CreateVolume", 2, turns(Turn::Stuck)),
        ("CreateVolume", 3, turns(Turn::Vanishes)),
        ("CreateVolume", 4, turns(Turn::Untagged)),
        ("AttachVolume", 1, turns(Turn::Stuck)),
        ("DetachVolume", 2, turns(Turn::Busy)),
        ("CreateSnapshot", 1, turns(Turn::Failed)),
        ("RegisterImage", 1, turns(Turn::Failed)),
        ("RegisterImage", 2, turns(Turn::Plain)),
        ("RegisterImage", 3, turns(Turn::Billed)),
        ("RegisterImage", 4, turns(Turn::Untagged)),
    ]);
    let (failed, stuck, vanished) = (ground.volume(), ground.volume(), ground.volume());
    assert_eq!(ground.state_of(&failed), "error");
    assert_eq!(ground.state_of(&stuck), "creating");
    assert_eq!(ground.refused("DescribeVolumes", &[("VolumeId.1", &vanished)]), "InvalidVolume.NotFound");
    ground.good("DeleteVolume", &[("VolumeId", &failed)]);
    ground.good("DeleteVolume", &[("VolumeId", &stuck)]);
    let tags = |kind: &'static str| {
        [
            ("TagSpecification.1.ResourceType", kind),
            ("TagSpecification.1.Tag.1.Key", "a"),
            ("TagSpecification.1.Tag.1.Value", "b"),
        ]
    };
    let volume = ground
        .good("CreateVolume", &[&params(&ground)[..], &tags("volume")].concat())
        .get("volumeId")
        .unwrap();
    assert!(ground.server.ledger().volumes[0].tags.is_empty());
    ground.attach(&volume, "/dev/sdf");
    pause(50);
    assert_eq!(ground.state_of(&volume), "in-use attaching");
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    eventually("detached", || ground.state_of(&volume) == "available");
    ground.attach(&volume, "/dev/sdf");
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    assert_eq!(ground.state_of(&volume), "in-use busy");
    ground.good("DetachVolume", &[("VolumeId", &volume), ("Force", "true")]);
    eventually("detached", || ground.state_of(&volume) == "available");
    let snapshot = ground.good("CreateSnapshot", &[("VolumeId", &volume)]).get("snapshotId").unwrap();
    let told = ground.good("DescribeSnapshots", &[("SnapshotId.1", &snapshot)]);
    assert_eq!(told.get("status").unwrap(), "error");
    assert!(told.get("statusMessage").is_some());
    let snapshot = ground.made_snapshot();
    let register = |name: &'static str| {
        let more = [&tags("image")[..], &[("BootMode", "uefi")]].concat();
        let image = ground.register(name, &snapshot, &more).get("imageId").unwrap();
        ground.good("DescribeImages", &[("ImageId.1", &image)])
    };
    let failed = register("failed");
    assert_eq!(failed.get("imageState").unwrap(), "failed");
    assert!(failed.get("stateReason").is_some());
    let plain = register("plain");
    assert_eq!((plain.get("bootMode"), plain.get("imageState").unwrap()), (None, "available".into()));
    assert_eq!(register("billed").get("usageOperation").unwrap(), "RunInstances:0002");
    assert!(register("untagged").get("tagSet").unwrap().is_empty());
    let good = register("good");
    assert_eq!((good.get("bootMode").unwrap(), good.get("key").unwrap()), ("uefi".into(), "a".into()));
}

#[test]
fn dry_runs_are_counted_apart() {
    let faults = vec![Fault::new("CreateVolume", 1, What::Error("InternalError".into()))];
    let ground = TestServer::new(ServerOptions { faults, ..ServerOptions::default() });
    let dry = [&params(&ground)[..], &[("DryRun", "true")]].concat();
    assert_eq!(ground.refused("CreateVolume", &dry), "DryRunOperation");
    assert_eq!(ground.refused("CreateVolume", &params(&ground)), "InternalError");
    ground
        .server
        .set(|o| o.faults = vec![Fault::new("CreateVolume", 1, What::Error("Unavailable".into())).dry()]);
    ground.server.forget_calls();
    assert_eq!(ground.refused("CreateVolume", &dry), "Unavailable");
    assert_eq!(ground.server.calls().len(), 1);
}

#[test]
fn keys_grow_old_and_clocks_differ() {
    let ground = TestServer::new(ServerOptions { calls_per_key: Some(2), ..ServerOptions::default() });
    for _ in 0..2 {
        ground.good("DescribeVolumes", &[]);
    }
    assert_eq!(ground.refused("DescribeVolumes", &[]), "ExpiredToken");
    ground.server.set(|o| (o.calls_per_key, o.clock_ahead) = (None, -299));
    ground.good("DescribeVolumes", &[]);
    ground.server.set(|o| o.clock_ahead = 301);
    let told = ground.call("DescribeVolumes", &[]);
    assert_eq!(told.get("Code").unwrap(), "RequestExpired");
    assert!(told.head.contains("Date: ") && told.head.contains(" GMT"), "{}", told.head);
    assert!(
        told.head.contains(&format!("x-amzn-requestid: {}", told.get("RequestID").unwrap())),
        "{}",
        told.head
    );
}

#[test]
fn a_seed_draws_delays() {
    let delays =
        oven_ec2_server::Delays { creating: std::time::Duration::from_secs(1000), ..Default::default() };
    let drawn = |seed| {
        let ground = TestServer::new(ServerOptions { delays, seed, ..ServerOptions::default() });
        let ready: Vec<u64> = (0..3)
            .map(|_| ground.volume())
            .map(|id| {
                ground.server.with_world(|w| w.volumes[&id].common.ready_at - w.volumes[&id].common.created)
            })
            .collect();
        ready
    };
    assert_eq!(drawn(0), [1_000_000; 3]);
    assert_eq!(drawn(7), drawn(7));
    assert_ne!(drawn(7), drawn(8));
    assert!(drawn(7).iter().all(|ms| *ms <= 1_000_000));
}
