//! Volumes as disks of a guest, which is played here: it answers as QEMU does.

use crate::support::{TestServer, eventually, pause};
use oven_ec2_server::{AttachAs, ServerOptions};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

#[derive(Default)]
struct Guest {
    /// Files by node, and serial numbers by port.
    nodes: BTreeMap<String, String>,
    ports: BTreeMap<String, Value>,
    /// What it answers, one after the other, before it lets go of a device.
    deaf: Vec<&'static str>,
    /// How often it is asked in vain to let go of a node.
    reading: u32,
    said: Vec<String>,
}

const PORTS: [&str; 3] = ["rp0", "rp1", "rp2"];

impl Guest {
    /// The answer to a command, and an event that comes with it.
    fn answer(&mut self, command: &str, given: &Value) -> (Value, Option<Value>) {
        self.said.push(command.to_owned());
        let text = |name: &str| given[name].as_str().unwrap_or_default().to_owned();
        let fail = |why: String| (json!({"error": {"class": "GenericError", "desc": why}}), None);
        match command {
            "blockdev-add" => {
                let file = given["file"]["filename"].as_str().unwrap().to_owned();
                self.nodes.insert(text("node-name"), file);
            }
            "device_add" => {
                let port = text("bus");
                if !PORTS.contains(&port.as_str()) {
                    return fail(format!("Bus '{port}' not found"));
                }
                assert!(self.nodes.contains_key(&text("drive")) && text("driver") == "nvme");
                if self.ports.contains_key(&port) {
                    if given.get("addr").is_none() {
                        // As QEMU 7.2 does: the device gets a slot where no guest looks for it.
                        return (json!({"return": {}}), None);
                    }
                    return fail("PCI: slot 0 function 0 not available for nvme, in use by nvme,id=x".into());
                }
                self.ports.insert(port, given.clone());
            }
            "device_del" => {
                let id = text("id");
                let Some(port) =
                    self.ports.iter().find(|(_, d)| d["id"] == id.as_str()).map(|(p, _)| p.clone())
                else {
                    return fail(format!("Device '{id}' not found"));
                };
                if let Some(why) = self.deaf.pop() {
                    return fail(why.into());
                }
                self.ports.remove(&port);
                return (
                    json!({"return": {}}),
                    Some(json!({"event": "DEVICE_DELETED", "data": {"device": id}})),
                );
            }
            "blockdev-del" if self.reading > 0 => {
                self.reading -= 1;
                return fail(format!("Node {} is in use", text("node-name")));
            }
            "blockdev-del" => drop(self.nodes.remove(&text("node-name"))),
            _ => {}
        }
        (json!({"return": {}}), None)
    }
}

/// Plays a guest on a socket, one connection after the other.
fn play(socket: &Path) -> Arc<Mutex<Guest>> {
    let guest = Arc::new(Mutex::new(Guest::default()));
    let (listener, played) = (UnixListener::bind(socket).unwrap(), guest.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, guest) = (stream.unwrap(), played.clone());
            let mut write = stream.try_clone().unwrap();
            writeln!(write, "{}", json!({"QMP": {"version": {}, "capabilities": []}})).unwrap();
            for line in BufReader::new(stream).lines() {
                let Ok(line) = line else { break };
                let message: Value = serde_json::from_str(&line).unwrap();
                let command = message["execute"].as_str().unwrap();
                let (answer, event) = guest.lock().unwrap().answer(command, &message["arguments"]);
                if writeln!(write, "{answer}").is_err() {
                    break;
                }
                if let Some(event) = event {
                    pause(30);
                    _ = writeln!(write, "{event}");
                }
            }
        }
    });
    guest
}

fn ground() -> (TestServer, Arc<Mutex<Guest>>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("qmp");
    let guest = play(&socket);
    let options = ServerOptions { attach: AttachAs::Qmp(socket), ..ServerOptions::default() };
    (TestServer::new(options), guest, dir)
}

#[test]
fn a_volume_is_plugged_in_and_out() {
    let (ground, guest, _dir) = ground();
    guest.lock().unwrap().ports.insert("rp0".into(), json!({"id": "another's"}));
    let volume = ground.volume();
    ground.attach(&volume, "/dev/sdf");
    assert_eq!(ground.state_of(&volume), "in-use attached");
    {
        let guest = guest.lock().unwrap();
        assert_eq!(guest.ports["rp1"]["serial"], volume.replace('-', "").as_str());
        let file = guest.nodes.values().next().unwrap();
        assert_eq!(std::fs::metadata(file).unwrap().len(), 1 << 30);
    }
    guest.lock().unwrap().reading = 2;
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    eventually("detached", || ground.state_of(&volume) == "available");
    {
        let guest = guest.lock().unwrap();
        assert!(guest.ports.len() == 1 && guest.nodes.is_empty(), "{:?}", guest.said);
    }
    // A snapshot shares the volume's file, and must not see what is written afterwards.
    let snapshot = ground.good("CreateSnapshot", &[("VolumeId", &volume)]).get("snapshotId").unwrap();
    ground.attach(&volume, "/dev/sdf");
    let file = guest.lock().unwrap().nodes.values().next().unwrap().clone();
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options().write(true).open(file).unwrap(),
        b"new",
        0,
    )
    .unwrap();
    let data = ground.server.ledger().snapshots.into_iter().find(|s| s.id == snapshot).unwrap().data.unwrap();
    let mut start = [0; 3];
    std::io::Read::read_exact(&mut std::fs::File::open(data).unwrap(), &mut start).unwrap();
    assert_eq!(start, [7; 3]);
}

#[test]
fn a_guest_has_so_many_ports() {
    let (ground, guest, _dir) = ground();
    let volumes: Vec<String> = (0..4).map(|_| ground.volume()).collect();
    for (volume, device) in volumes.iter().zip(["/dev/sdf", "/dev/sdg", "/dev/sdh"]) {
        assert_eq!(ground.attach(volume, device).status, 200);
    }
    let full = ground.attach(&volumes[3], "/dev/sdi");
    assert!(full.body.contains("every port of the guest is taken"), "{}", full.body);
    assert_eq!(ground.state_of(&volumes[3]), "available");
    assert_eq!(guest.lock().unwrap().nodes.len(), 3);
    ground.good("DetachVolume", &[("VolumeId", &volumes[1])]);
    eventually("detached", || ground.state_of(&volumes[1]) == "available");
    assert_eq!(ground.attach(&volumes[3], "/dev/sdi").status, 200);
    assert!(guest.lock().unwrap().ports.contains_key("rp1"));
}

#[test]
fn a_guest_that_does_not_hear() {
    let (ground, guest, _dir) = ground();
    let volume = ground.volume();
    ground.attach(&volume, "/dev/sdf");
    guest.lock().unwrap().deaf = vec![
        "Device x is already in the process of unplug",
        "Hot-unplug failed: guest is busy (power indicator blinking)",
    ];
    ground.good("DetachVolume", &[("VolumeId", &volume)]);
    eventually("busy", || ground.state_of(&volume) == "in-use busy");
    eventually("asked again, and detached", || ground.state_of(&volume) == "available");
}
