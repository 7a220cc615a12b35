//! A client of a few lines, and a server with a base image.

#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod ebs;

use oven_ec2_server::{Server, ServerOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A server on a directory of its own, with an image of 1 GiB in it.
pub struct TestServer {
    pub server: Server,
    pub image: String,
    pub snapshot: String,
    pub dir: tempfile::TempDir,
}

/// What was answered.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// The text of the first element of this name.
    pub fn get(&self, name: &str) -> Option<String> {
        let (_, rest) = self.body.split_once(&format!("<{name}>"))?;
        Some(rest.split_once(&format!("</{name}>"))?.0.to_owned())
    }

    /// All of them.
    pub fn all(&self, name: &str) -> Vec<String> {
        let open = format!("<{name}>");
        let ends = self.body.split(&open).skip(1);
        ends.filter_map(|rest| Some(rest.split_once(&format!("</{name}>"))?.0.to_owned())).collect()
    }
}

impl TestServer {
    pub fn new(options: ServerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("base.raw");
        std::fs::write(&raw, vec![7; 1 << 20]).unwrap();
        let server = Server::start(&dir.path().join("region"), options).unwrap();
        let image = server.import(&raw, "debian-12-amd64", oven::ids::Architecture::X86_64).unwrap();
        let snapshot = server.with_world(|world| world.images[&image].root_snapshot().unwrap().to_owned());
        Self { server, image, snapshot, dir }
    }

    pub fn plain() -> Self {
        Self::new(ServerOptions::default())
    }

    /// `call("CreateVolume", &[("Size", "1")])`; an empty value leaves the parameter out.
    pub fn call(&self, action: &str, params: &[(&str, &str)]) -> Answer {
        self.try_call(action, params).expect("an answer")
    }

    /// `None`: no answer came within a second.
    pub fn try_call(&self, action: &str, params: &[(&str, &str)]) -> Option<Answer> {
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("Action", action).append_pair("Version", "2016-11-15");
        for (name, value) in params.iter().filter(|(_, value)| !value.is_empty()) {
            form.append_pair(name, value);
        }
        let headers = "Content-Type: application/x-www-form-urlencoded\r\nAuthorization: AWS4-HMAC-SHA256 \
                       Credential=AKIA/20260101/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=0\r\n";
        http(&self.server.endpoint(), "POST", "/", headers, &form.finish())
    }

    /// The answer's code, which has to be an error.
    pub fn refused(&self, action: &str, params: &[(&str, &str)]) -> String {
        let answer = self.call(action, params);
        assert_ne!(answer.status, 200, "{action} {params:?}: {}", answer.body);
        answer.get("Code").unwrap_or(answer.body)
    }

    pub fn good(&self, action: &str, params: &[(&str, &str)]) -> Answer {
        let answer = self.call(action, params);
        assert_eq!(answer.status, 200, "{action} {params:?}: {}", answer.body);
        answer
    }

    pub fn volume(&self) -> String {
        let answer =
            self.good("CreateVolume", &[("AvailabilityZone", "us-east-1a"), ("SnapshotId", &self.snapshot)]);
        answer.get("volumeId").unwrap()
    }

    /// A completed snapshot of a volume that is gone.
    pub fn made_snapshot(&self) -> String {
        let volume = self.volume();
        let snapshot = self.good("CreateSnapshot", &[("VolumeId", &volume)]).get("snapshotId").unwrap();
        self.good("DeleteVolume", &[("VolumeId", &volume)]);
        snapshot
    }

    /// What oven registers an image with, and `more`.
    pub fn register<'a>(&self, name: &'a str, snapshot: &'a str, more: &[(&'a str, &'a str)]) -> Answer {
        let params = [
            ("Name", name),
            ("Architecture", "x86_64"),
            ("VirtualizationType", "hvm"),
            ("RootDeviceName", "/dev/xvda"),
            ("BlockDeviceMapping.1.DeviceName", "/dev/xvda"),
            ("BlockDeviceMapping.1.Ebs.SnapshotId", snapshot),
        ];
        // What is said again is said otherwise.
        let kept = params.iter().filter(|(name, _)| !more.iter().any(|(other, _)| other == name));
        self.call("RegisterImage", &kept.chain(more).copied().collect::<Vec<_>>())
    }

    pub fn builder(&self) -> &'static str {
        "i-0123456789abcdef0"
    }

    pub fn attach(&self, volume: &str, device: &str) -> Answer {
        self.call("AttachVolume", &[("VolumeId", volume), ("InstanceId", self.builder()), ("Device", device)])
    }

    pub fn state_of(&self, volume: &str) -> String {
        self.good("DescribeVolumes", &[("VolumeId.1", volume)]).all("status").join(" ")
    }
}

/// Tries until it is so, for some seconds.
pub fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is() {
        assert!(Instant::now() < end, "{what}");
        pause(5);
    }
}

#[allow(clippy::disallowed_methods, reason = "a test has no runtime to block")]
pub fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

pub fn http(endpoint: &str, method: &str, path: &str, headers: &str, body: &str) -> Option<Answer> {
    let address = endpoint.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(if headers.contains("X-Short") { 1 } else { 30 })))
        .unwrap();
    let length = body.len();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(text.as_bytes()).unwrap();
    let mut answer = String::new();
    // A connection that is closed or silent.
    if stream.read_to_string(&mut answer).is_err() || answer.is_empty() {
        return None;
    }
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    Some(Answer { status: head[9..12].parse().unwrap(), head: head.to_owned(), body: body.to_owned() })
}

pub fn exists(path: &Path) -> bool {
    path.exists()
}
