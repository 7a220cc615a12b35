//! A builder instance as the EC2 tests see it: a server of the test's own, whose volumes are loop devices here, and
//! programs that know of AWS only what is in their environment.

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
/// No bake with the test's short waits takes longer, whatever goes wrong: beyond it hangs.
pub const HANGS: Duration = Duration::from_secs(180);

pub struct Ec2World {
    // The server ends first: it lets go of the loop devices in the world's directory.
    pub server: Server,
    pub local: LocalWorld,
    runs: AtomicUsize,
    /// How long the server may take for a call, in seconds; the bake's own default if it is 0.
    call: u64,
}

/// How a program ended.
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

    /// The image that it answers with.
    pub fn image(&self) -> Option<&str> {
        self.out.lines().find_map(|line| line.strip_prefix("image "))
    }

    /// What it says it left behind, and the command that removes it.
    pub fn left(&self) -> Vec<&str> {
        self.err.lines().filter(|line| line.contains("left behind: ")).collect()
    }
}

/// A program at work; killed if nobody waits for it.
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

    /// Waits until it ends. One that takes longer than `within` hangs.
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
        // What ended already cannot be killed.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

impl Ec2World {
    /// A server with an 8 MiB image, and a definition on it in which there is nothing to do.
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
        // A fiftieth, as the bake's own waits.
        options.limits.between_snapshots /= 50;
        let server = Server::start(&local.region(), options).unwrap();
        let base = server.import(raw, "base", Architecture::HOST).unwrap();
        // It copies disks while EC2's client waits for its answer.
        let call = if raw.metadata().unwrap().len() > 64 << 20 { 20 } else { 0 };
        let world = Self { server, local, runs: AtomicUsize::new(0), call };
        world.define(&base, "");
        world
    }

    /// The definition, on an image.
    pub fn define(&self, base: &str, more: &str) {
        self.local.write("image/image.toml", &format!("name = \"image\"\nfrom = \"{base}\"\n{more}"));
    }

    /// The image that was imported.
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

    /// A bake on an instance. Locks and logs are its own.
    pub fn bake_on(&self, instance: &str) -> Command {
        let mut command = self.command(&test_ec2(), instance);
        command.env("OVEN_TEST_DIR", self.server.dir()).env("OVEN_TEST_STATE", self.local.path(instance));
        if self.call > 0 {
            command.env("OVEN_TEST_CALL", self.call.to_string());
        }
        // Its directory distinguishes its processes and mounts from those of other tests.
        command.arg(self.local.path("image"));
        command
    }

    /// A machine that is no instance: no metadata service answers, and keys are in the environment.
    fn elsewhere(&self, program: &Path) -> Command {
        let mut command = self.command(program, HERE);
        command
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "AKIAELSEWHERE")
            .env("AWS_SECRET_ACCESS_KEY", "secret");
        command
    }

    /// A bake of the definition in this directory, with a disk by its blocks, there.
    pub fn bake_blocks(&self, definition: &str) -> Command {
        let mut command = self.elsewhere(&test_ec2());
        command.env("OVEN_TEST_DIR", self.server.dir()).env("OVEN_TEST_STATE", self.local.path("state"));
        command.env("OVEN_TEST_DIRECT", "1").arg(self.local.path(definition));
        command
    }

    /// The real program, there.
    pub fn plain_elsewhere(&self, args: &[&str]) -> Command {
        let mut command = self.elsewhere(&oven());
        command.args(["--cloud", "aws", "--disks", "direct"]).args(args);
        command
    }

    /// The real program, on the builder.
    pub fn plain(&self, args: &[&str]) -> Command {
        let mut command = self.command(&oven(), HERE);
        command.args(args);
        command
    }

    /// The loop devices that the server has of its volumes: `loop7`.
    pub fn loops_of_volumes(&self) -> BTreeSet<String> {
        let notes = std::fs::read_dir(self.server.dir().join("attached")).into_iter().flatten().flatten();
        // One may vanish between two looks.
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

    /// `oven --cloud aws` on the builder.
    pub fn oven(&self, args: &[&str]) -> Ended {
        self.start(self.plain(&[&["--cloud", "aws"], args].concat())).end(HANGS, "oven")
    }

    pub fn expect(&self, code: i32, args: &[&str]) -> Ended {
        let ended = self.oven(args);
        assert_eq!(ended.code(), Some(code), "oven {args:?}\n{}\n{}", ended.out, ended.err);
        ended
    }

    /// What calls made, once what is being deleted is gone.
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

    /// The EC2 calls so far, for a message.
    pub fn calls(&self) -> String {
        let calls = self.server.ec2_calls();
        let told: Vec<_> = calls.iter().map(|call| format!("{} {}", call.action, call.answer)).collect();
        told.join(", ")
    }

    /// How many EC2 calls there were, dry runs among them. What is looked at several times in a row counts once: how
    /// often
    /// that is depends on how busy the machine is.
    pub fn asked(&self) -> usize {
        let mut calls = self.server.calls();
        calls.retain(|call| call.service == "ec2");
        calls.dedup_by(|one, other| one.action.starts_with("Describe") && one.action == other.action);
        calls.len()
    }

    /// Waits for a call that comes.
    pub fn until_called(&self, run: &mut Run, what: &str, is: impl Fn(&Call) -> bool) {
        let begun = Instant::now();
        while !self.server.calls().iter().any(&is) {
            assert!(!run.is_over(), "{what}: it ended\n{}\n{}", run.printed(), self.calls());
            assert!(begun.elapsed() < HANGS, "{what}: the call never came\n{}", self.calls());
            pause(MILLI);
        }
    }

    /// Exactly one image with its snapshot, all tagged, and nothing else; nothing on this machine either.
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

    /// No volume, and no snapshot but of an image.
    pub fn assert_no_orphans(&self, what: &str) {
        let made = self.made();
        let used: BTreeSet<&String> = made.images.iter().map(|image| &image.of).collect();
        let orphans = made.snapshots.iter().filter(|snapshot| !used.contains(&snapshot.id)).count();
        assert!(made.volumes.is_empty() && orphans == 0, "{what}: {made:#?}\n{}", self.calls());
        assert!(made.images.len() <= 1, "{what}: {made:#?}");
    }

    /// A call by hand; it has to be good.
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

    /// Bakes again, undisturbed: one image, whatever was before.
    pub fn assert_bakes(&self, what: &str) {
        let before: Vec<String> = self.made().images.into_iter().map(|image| image.id).collect();
        let ended = self.bake(what);
        assert_eq!(ended.code(), Some(0), "{what}: the next bake: {}\n{}", ended.err, self.calls());
        let image = ended.image().unwrap();
        assert!(before.iter().all(|id| id == image), "{what}: {image} after {before:?}");
        self.assert_one(image, what);
    }

    /// What a killed client asked for last is done, or never will be.
    pub fn settles(&self) {
        let (begun, mut idle) = (Instant::now(), 0);
        while idle < 20 {
            idle = if self.server.is_idle() { idle + 1 } else { 0 };
            assert!(begun.elapsed() < HANGS, "the server is at work: {}", self.calls());
            pause(5 * MILLI);
        }
    }

    /// Things that are none of ours: untagged, of somebody's tool, of a living process here; and, with `elsewhere`, of
    /// another instance that is running.
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
                // One of two is of a snapshot of its own.
                if n % 2 == 0 {
                    foreign.mappings[0].snapshot = Some(snapshot.common.id.clone());
                }
                world.volumes.insert(volume.common.id.clone(), volume);
                world.snapshots.insert(snapshot.common.id.clone(), snapshot);
                world.images.insert(foreign.common.id.clone(), foreign);
            }
        });
    }

    /// What was there without a call.
    pub fn foreign(&self) -> BTreeSet<String> {
        let all = self.server.ledger();
        let all = [all.volumes, all.snapshots, all.images].concat();
        all.into_iter()
            .filter(|entry| entry.seeded)
            .map(|entry| format!("{} {}", entry.id, entry.state))
            .collect()
    }
}
