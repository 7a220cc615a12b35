//! Volumes as loop devices: needs root.

use crate::support::{TestServer, eventually, pause};
use oven_ec2_server::{AttachAs, Delays, Fault, ServerOptions, Turn, What};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

fn ground(options: ServerOptions) -> TestServer {
    TestServer::new(ServerOptions { attach: AttachAs::Loop, ..options })
}

/// The device that a client would open.
fn node(ground: &TestServer, volume: &str) -> Option<(PathBuf, u64, String)> {
    let text = std::fs::read_to_string(ground.server.attached(volume)).ok()?;
    let note: serde_json::Value = serde_json::from_str(&text).unwrap();
    let device = note["device"].as_str().unwrap().to_owned();
    Some((note["node"].as_str().unwrap().into(), note["rdev"].as_u64().unwrap(), device))
}

fn open(ground: &TestServer, volume: &str) -> File {
    let (path, rdev, _) = node(ground, volume).expect("a device");
    let file = File::options().read(true).write(true).open(path).unwrap();
    assert_eq!(file.metadata().unwrap().rdev(), rdev);
    file
}

#[test]
fn what_is_written_is_in_the_snapshot() {
    let ground = ground(ServerOptions::default());
    let volume = ground.volume();
    ground.attach(&volume, "/dev/sdf");
    assert_eq!(node(&ground, &volume).unwrap().2, "/dev/sdf");
    let mut device = open(&ground, &volume);
    let mut block = [0; 4096];
    device.read_exact(&mut block).unwrap();
    assert_eq!(block, [7; 4096]);
    device.seek(SeekFrom::Start(0)).unwrap();
    device.write_all(&[9; 4096]).unwrap();
    device.sync_all().unwrap();
    drop(device);
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    assert_eq!(ground.state_of(&volume), "available");
    assert!(node(&ground, &volume).is_none());
    let snapshot = ground.good("CreateSnapshot", &[("VolumeId", &volume)]).get("snapshotId").unwrap();
    // Written to again: the snapshot stays as it is.
    ground.attach(&volume, "/dev/sdg");
    open(&ground, &volume).write_all(&[1; 4096]).unwrap();
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    eventually("detached", || ground.state_of(&volume) == "available");
    ground.good("DeleteVolume", &[("VolumeId", &volume)]);
    let data = ground.server.ledger().snapshots.into_iter().find(|s| s.id == snapshot).unwrap().data.unwrap();
    File::open(data).unwrap().read_exact(&mut block).unwrap();
    assert_eq!(block, [9; 4096]);
    let made_of_it = [("AvailabilityZone", "us-east-1a"), ("SnapshotId", snapshot.as_str())];
    let next = ground.good("CreateVolume", &made_of_it).get("volumeId").unwrap();
    ground.attach(&next, "/dev/sdh");
    open(&ground, &next).read_exact(&mut block).unwrap();
    assert_eq!(block, [9; 4096]);
}

#[test]
fn a_volume_that_is_held_is_busy() {
    let ground = ground(ServerOptions::default());
    let volume = ground.volume();
    ground.attach(&volume, "/dev/sdf");
    let device = open(&ground, &volume);
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    assert_eq!(ground.state_of(&volume), "in-use detaching");
    eventually("busy", || ground.state_of(&volume) == "in-use busy");
    assert_eq!(ground.refused("DeleteVolume", &[("VolumeId", &volume)]), "VolumeInUse");
    drop(device);
    eventually("detached", || ground.state_of(&volume) == "available");
    ground.good("DeleteVolume", &[("VolumeId", &volume)]);
    assert!(ground.server.ledger().volumes.is_empty());
}

#[test]
fn the_device_and_the_answer_come_in_any_order() {
    let (soon, late) = (Duration::from_millis(500), Duration::from_millis(3000));
    for (attaching, device, first) in [(soon, late, "answer"), (late, soon, "device")] {
        let delays = Delays { attaching, device, ..Delays::default() };
        let ground = ground(ServerOptions { delays, ..ServerOptions::default() });
        let volume = ground.volume();
        ground.attach(&volume, "/dev/sdf");
        assert!(node(&ground, &volume).is_none());
        let there = || node(&ground, &volume).is_some();
        let told = || ground.state_of(&volume) == "in-use attached";
        eventually(first, || if first == "device" { there() } else { told() });
        assert_eq!((there(), told()), (first == "device", first == "answer"));
        eventually("both", || {
            node(&ground, &volume).is_some() && ground.state_of(&volume) == "in-use attached"
        });
    }
}

#[test]
fn a_device_that_never_comes() {
    let faults = vec![Fault::new("AttachVolume", 1, What::Turns(Turn::NoDevice))];
    let ground = ground(ServerOptions { faults, ..ServerOptions::default() });
    let volume = ground.volume();
    ground.attach(&volume, "/dev/sdf");
    assert_eq!(ground.state_of(&volume), "in-use attached");
    pause(50);
    assert!(node(&ground, &volume).is_none());
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    ground.attach(&volume, "/dev/sdg");
    assert!(node(&ground, &volume).is_some());
}

#[test]
fn a_detach_while_it_attaches() {
    let delays = Delays { attaching: Duration::from_millis(200), ..Delays::default() };
    let ground = ground(ServerOptions { delays, ..ServerOptions::default() });
    let volume = ground.volume();
    ground.attach(&volume, "/dev/sdf");
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    eventually("detached", || ground.state_of(&volume) == "available");
    pause(300);
    assert_eq!(ground.state_of(&volume), "available");
    assert!(node(&ground, &volume).is_none());
    ground.good("DeleteVolume", &[("VolumeId", &volume)]);
}

#[test]
fn a_disk_is_pulled_out_and_an_instance_ends() {
    let ground = ground(ServerOptions::default());
    let (pulled, other) = (ground.volume(), ground.volume());
    ground.attach(&pulled, "/dev/sdf");
    ground.attach(&other, "/dev/sdg");
    let body = format!("{{\"volume\": \"{pulled}\"}}");
    assert_eq!(
        crate::support::http(&ground.server.endpoint(), "POST", "/_oven/pull", "", &body).unwrap().status,
        200
    );
    assert_eq!(ground.state_of(&pulled), "in-use attached");
    assert!(node(&ground, &pulled).is_none() && node(&ground, &other).is_some());
    ground.good("TerminateInstances", &[("InstanceId.1", ground.builder())]);
    assert_eq!(ground.state_of(&pulled), "available");
    assert!(node(&ground, &other).is_none());
}

#[test]
fn a_server_that_ends_lets_go() {
    let ground = ground(ServerOptions::default());
    let volume = ground.volume();
    ground.attach(&volume, "/dev/sdf");
    let (_, rdev, _) = node(&ground, &volume).unwrap();
    let attached = ground.server.attached(&volume);
    let backing = format!("/sys/dev/block/{}:{}/loop/backing_file", rdev >> 8 & 0xfff, rdev & 0xff);
    let region = ground.dir.path().to_str().unwrap().to_owned();
    let bound = || std::fs::read_to_string(&backing).is_ok_and(|file| file.contains(&region));
    assert!(bound(), "{backing}");
    let TestServer { server, dir, .. } = ground;
    drop(server);
    eventually("released", || !bound());
    assert!(!attached.exists());
    let again = oven_ec2_server::Server::start(&dir.path().join("region"), ServerOptions::default()).unwrap();
    assert_eq!(again.ledger().volumes[0].state, "available");
}
