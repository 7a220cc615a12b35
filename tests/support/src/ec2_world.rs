//! A builder instance for the EC2 tests. Each test has its own server, whose volumes are loop devices on this machine.
//! The programs know only the AWS that their environment names.

use crate::local_world::{LocalWorld, tiny_base};
use crate::pause;
use crate::programs::{oven, test_ec2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oven::cloud::tag;
use oven::ids::Architecture;
use oven_ec2_server::world::{Common, now};
use oven_ec2_server::{AttachAs, Builder, Call, Ledger, Server, ServerOptions};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

pub const HERE: &str = "i-0123456789abcdef0";
pub const THERE: &str = "i-0fedcba9876543210";
pub const ZONE: &str = "us-east-1a";
pub const MILLI: Duration = Duration::from_millis(1);
/// A bake that takes longer hangs: with the tests' short waits, no bake needs so much time, even with faults.
pub const HANGS: Duration = Duration::from_secs(180);

pub struct Ec2World {
    // This is dropped first, because the server releases the loop devices in the world's directory.
    pub server: Server,
    pub local: LocalWorld,
    runs: AtomicUsize,
    /// The time limit for a call to the server, in seconds. With 0, the bake's default is used.
    call: u64,
}

/// The result of a program that has ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
    pub took: Duration,
}

impl Ended {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Returns the image that the program printed.
    pub fn image(&self) -> Option<&str> {
        self.out.lines().find_map(|line| line.strip_prefix("image "))
    }

    /// Returns the lines about resources that were left behind, with the commands that remove them.
    pub fn left(&self) -> Vec<&str> {
        self.err.lines().filter(|line| line.contains("left behind: ")).collect()
    }
}

/// A running program. It is killed when this value is dropped.
pub struct Run {
    child: Child,
    begun: Instant,
    out: PathBuf,
    err: PathBuf,
}

impl Run {
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub fn printed(&self) -> String {
        std::fs::read_to_string(&self.err).unwrap()
    }

    /// Waits until the program ends. Fails if it takes longer than `within`.
    pub fn end(mut self, within: Duration, what: &str) -> Ended {
        let waiting = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
                let (out, err) = (read(&self.out), read(&self.err));
                return Ended { status, out, err, took: self.begun.elapsed() };
            }
            assert!(waiting.elapsed() < within, "{what}: not over after {within:?}\n{}", self.printed());
            pause(MILLI);
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // This fails if the program has already ended.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

impl Ec2World {
    /// Starts a server with an 8 MiB image, and writes a definition on this image that changes nothing.
    pub fn tiny(options: ServerOptions) -> Self {
        Self::on(&tiny_base(), options)
    }

    pub fn on(raw: &Path, options: ServerOptions) -> Self {
        let local = LocalWorld::empty();
        let record = std::env::var_os("OVEN_TEST_RECORD").map(PathBuf::from);
        let record = record.map(|dir| {
            static NUMBER: AtomicUsize = AtomicUsize::new(0);
            std::fs::create_dir_all(&dir).unwrap();
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let test = std::env::current_exe().unwrap();
            let test = test.file_stem().unwrap().to_string_lossy().into_owned();
            dir.join(format!("{test}-{}-{number}.jsonl", std::process::id()))
        });
        let others = vec![Builder { id: THERE.into(), zone: ZONE.into(), attach: AttachAs::Loop }];
        let mut options = ServerOptions { attach: AttachAs::Loop, others, record, ..options };
        // The tests' bakes wait a fiftieth of the usual time, so the server's limit is also divided by 50.
        options.limits.between_snapshots /= 50;
        let server = Server::start(&local.region(), options).unwrap();
        let base = server.import(raw, "base", Architecture::HOST).unwrap();
        // The server copies a large disk while the EC2 client waits for the response.
        let call = if raw.metadata().unwrap().len() > 64 << 20 { 20 } else { 0 };
        let world = Self { server, local, runs: AtomicUsize::new(0), call };
        world.define(&base, "");
        world
    }

    /// Writes the definition on an image.
    pub fn define(&self, base: &str, more: &str) {
        self.local.write("image/image.toml", &format!("name = \"image\"\nfrom = \"{base}\"\n{more}"));
    }

    /// Returns the imported image.
    pub fn base(&self) -> String {
        self.server.ledger().images.iter().find(|image| image.name == "base").unwrap().id.clone()
    }

    fn command(&self, program: &Path, instance: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.local.dir.path())
            .env("AWS_ENDPOINT_URL", self.server.endpoint())
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", self.server.imds_of(instance).unwrap())
            .current_dir(self.local.dir.path());
        command
    }

    /// Returns the command of a bake on an instance. Each instance has its own locks and logs.
    pub fn bake_on(&self, instance: &str) -> Command {
        let mut command = self.command(&test_ec2(), instance);
        command.env("OVEN_TEST_DIR", self.server.dir()).env("OVEN_TEST_STATE", self.local.path(instance));
        if self.call > 0 {
            command.env("OVEN_TEST_CALL", self.call.to_string());
        }
        // The definition's path distinguishes this bake's processes and mounts from those of other tests.
        command.arg(self.local.path("image"));
        command
    }

    /// Returns a command on a machine that is not an instance: no metadata service responds, and the keys are in the
    /// environment.
    fn elsewhere(&self, program: &Path) -> Command {
        let mut command = self.command(program, HERE);
        command
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "AKIAELSEWHERE")
            .env("AWS_SECRET_ACCESS_KEY", "secret");
        command
    }

    /// Returns the command of a bake by EBS direct, on a machine that is not an instance. The definition is in this
    /// directory.
    pub fn bake_blocks(&self, definition: &str) -> Command {
        let mut command = self.elsewhere(&test_ec2());
        command.env("OVEN_TEST_DIR", self.server.dir()).env("OVEN_TEST_STATE", self.local.path("state"));
        command.env("OVEN_TEST_DIRECT", "1").arg(self.local.path(definition));
        command
    }

    /// Returns a command of the real program, on a machine that is not an instance.
    pub fn plain_elsewhere(&self, args: &[&str]) -> Command {
        let mut command = self.elsewhere(&oven());
        command.args(["--cloud", "aws", "--disks", "direct"]).args(args);
        command
    }

    /// Returns a command of the real program, on the builder instance.
    pub fn plain(&self, args: &[&str]) -> Command {
        let mut command = self.command(&oven(), HERE);
        command.args(args);
        command
    }

    /// Returns the loop devices of the server's volumes, such as `loop7`.
    pub fn loops_of_volumes(&self) -> BTreeSet<String> {
        let notes = std::fs::read_dir(self.server.dir().join("attached")).into_iter().flatten().flatten();
        // A file may be removed between listing and reading.
        let notes = notes.filter_map(|note| std::fs::read(note.path()).ok());
        let nodes = notes.filter_map(|note| {
            let note: serde_json::Value = serde_json::from_slice(&note).ok()?;
            Some(note["node"].as_str()?.trim_start_matches("/dev/").to_owned())
        });
        nodes.collect()
    }

    pub fn start(&self, mut command: Command) -> Run {
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let file = |name: &str| {
            let path = self.local.path(&format!("{number}.{name}"));
            (File::create(&path).unwrap(), path)
        };
        let ((to_out, out), (to_err, err)) = (file("out"), file("err"));
        let child = command.stdin(Stdio::null()).stdout(to_out).stderr(to_err).spawn().unwrap();
        Run { child, begun: Instant::now(), out, err }
    }

    pub fn bake(&self, what: &str) -> Ended {
        self.start(self.bake_on(HERE)).end(HANGS, what)
    }

    /// Runs `oven --cloud aws` on the builder instance.
    pub fn oven(&self, args: &[&str]) -> Ended {
        self.start(self.plain(&[&["--cloud", "aws"], args].concat())).end(HANGS, "oven")
    }

    pub fn expect(&self, code: i32, args: &[&str]) -> Ended {
        let ended = self.oven(args);
        assert_eq!(ended.code(), Some(code), "oven {args:?}\n{}\n{}", ended.out, ended.err);
        ended
    }

    /// Returns the resources that calls created. Waits until no volume is being deleted.
    pub fn made(&self) -> Ledger {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let made = self.server.ledger().made();
            if made.volumes.iter().all(|volume| volume.state != "deleting") || Instant::now() > end {
                return made;
            }
            pause(5 * MILLI);
        }
    }

    /// Returns the EC2 calls so far, for a message.
    pub fn calls(&self) -> String {
        let calls = self.server.ec2_calls();
        let told: Vec<_> = calls.iter().map(|call| format!("{} {}", call.action, call.answer)).collect();
        told.join(", ")
    }

    /// Returns the number of EC2 calls, including dry runs. Consecutive calls of the same Describe action count once,
    /// because their number depends on how busy the machine is.
    pub fn asked(&self) -> usize {
        let mut calls = self.server.calls();
        calls.retain(|call| call.service == "ec2");
        calls.dedup_by(|one, other| one.action.starts_with("Describe") && one.action == other.action);
        calls.len()
    }

    /// Waits until the server gets a call for which `is` returns true.
    pub fn until_called(&self, run: &mut Run, what: &str, is: impl Fn(&Call) -> bool) {
        let begun = Instant::now();
        while !self.server.calls().iter().any(&is) {
            assert!(!run.is_over(), "{what}: it ended\n{}\n{}", run.printed(), self.calls());
            assert!(begun.elapsed() < HANGS, "{what}: the call never came\n{}", self.calls());
            pause(MILLI);
        }
    }

    /// Fails unless there is exactly one image with its snapshot, both tagged, and nothing else. Also fails if
    /// something is left on this machine.
    pub fn assert_one(&self, image: &str, what: &str) {
        let made = self.made();
        let about = || format!("{what}: {made:#?}\n{}", self.calls());
        assert!(made.volumes.is_empty(), "{}", about());
        assert_eq!(made.images.len(), 1, "{}", about());
        let only = &made.images[0];
        assert_eq!((only.id.as_str(), only.state.as_str()), (image, "available"), "{}", about());
        let snapshots: Vec<&str> = made.snapshots.iter().map(|snapshot| snapshot.id.as_str()).collect();
        assert_eq!(snapshots, [only.of.as_str()], "{}", about());
        for tags in [&only.tags, &made.snapshots[0].tags] {
            for key in [tag::RUN, tag::OWNER, tag::NAME] {
                assert!(tags.contains_key(key), "{key}: {}", about());
            }
        }
        for key in [tag::CHECKSUM, tag::FINGERPRINT] {
            assert!(only.tags.contains_key(key), "{key}: {}", about());
        }
        self.local.assert_no_traces(what);
    }

    /// Fails if there is a volume, or a snapshot without an image.
    pub fn assert_no_orphans(&self, what: &str) {
        let made = self.made();
        let used: BTreeSet<&String> = made.images.iter().map(|image| &image.of).collect();
        let orphans = made.snapshots.iter().filter(|snapshot| !used.contains(&snapshot.id)).count();
        assert!(made.volumes.is_empty() && orphans == 0, "{what}: {made:#?}\n{}", self.calls());
        assert!(made.images.len() <= 1, "{what}: {made:#?}");
    }

    /// Sends a call without a client. It must succeed.
    pub fn send(&self, form: &str) {
        let form = format!("{form}&Version=2016-11-15");
        let (address, length) = (self.server.endpoint().replace("http://", ""), form.len());
        let text = format!(
            "POST / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n\
             Content-Type: application/x-www-form-urlencoded\r\nAuthorization: AWS4-HMAC-SHA256 \
             Credential=AKIA/20260101/us-east-1/ec2/aws4_request, SignedHeaders=host, Signature=0\r\n\r\n\
             {form}"
        );
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{form}: {answer}");
    }

    /// Bakes again without faults. Afterwards there must be one image, which is the same as before if there was one.
    pub fn assert_bakes(&self, what: &str) {
        let before: Vec<String> = self.made().images.into_iter().map(|image| image.id).collect();
        let ended = self.bake(what);
        assert_eq!(ended.code(), Some(0), "{what}: the next bake: {}\n{}", ended.err, self.calls());
        let image = ended.image().unwrap();
        assert!(before.iter().all(|id| id == image), "{what}: {image} after {before:?}");
        self.assert_one(image, what);
    }

    /// Waits until the server has processed all calls, including the last call of a killed client.
    pub fn wait_until_idle(&self) {
        let (begun, mut idle) = (Instant::now(), 0);
        while idle < 20 {
            idle = if self.server.is_idle() { idle + 1 } else { 0 };
            assert!(begun.elapsed() < HANGS, "the server is at work: {}", self.calls());
            pause(5 * MILLI);
        }
    }

    /// Adds resources that oven must not touch: without tags, with tags of another tool, and of a living process on
    /// this instance. With `elsewhere`, also adds resources of another running instance.
    pub fn plant_foreign(&self, elsewhere: bool) {
        let kinds = if elsewhere { 4 } else { 3 };
        let living = oven::owner::Owner::on(HERE).to_string();
        let running = format!("{THERE}/00000000-0000-0000-0000-000000000000/7/99");
        let tags = |n: usize| -> oven_ec2_server::world::Tags {
            let pairs: &[(&str, &str)] = match n {
                0 => &[],
                1 => &[("Name", "image"), ("role", "oven")],
                2 => &[(tag::RUN, "0000000000000000000000000000aaaa"), (tag::OWNER, &living)],
                _ => &[(tag::RUN, "0000000000000000000000000000bbbb"), (tag::OWNER, &running)],
            };
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let base = self.base();
        self.server.with_world(|world| {
            let image = world.images[&base].clone();
            let snapshot = world.snapshots[&image.mappings[0].snapshot.clone().unwrap()].clone();
            for n in 0..kinds {
                let common = |prefix: &str| Common {
                    id: format!("{prefix}-0000000000000f{n:03}"),
                    tags: tags(n),
                    created: now(),
                    seeded: true,
                    ..image.common.clone()
                };
                let volume = oven_ec2_server::world::Volume {
                    common: common("vol"),
                    size: 1,
                    zone: ZONE.into(),
                    ..Default::default()
                };
                let snapshot =
                    oven_ec2_server::world::Snapshot { common: common("snap"), ..snapshot.clone() };
                let mut foreign = image.clone();
                (foreign.common, foreign.name) = (common("ami"), format!("foreign-{n}"));
                // Every second image has its own snapshot.
                if n % 2 == 0 {
                    foreign.mappings[0].snapshot = Some(snapshot.common.id.clone());
                }
                world.volumes.insert(volume.common.id.clone(), volume);
                world.snapshots.insert(snapshot.common.id.clone(), snapshot);
                world.images.insert(foreign.common.id.clone(), foreign);
            }
        });
    }

    /// Returns the resources that were not created by a call.
    pub fn foreign(&self) -> BTreeSet<String> {
        let all = self.server.ledger();
        let all = [all.volumes, all.snapshots, all.images].concat();
        all.into_iter()
            .filter(|entry| entry.seeded)
            .map(|entry| format!("{} {}", entry.id, entry.state))
            .collect()
    }
}
