//! `oven import` and `oven export` in AWS: by blocks, without an instance, without root, and by the least role.

#![allow(clippy::disallowed_methods, reason = "a test has no runtime to block")]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oven::cloud::iam_policy::{DiskAccess, policy};
use oven::cloud::tag;
use oven::ids::Architecture;
use oven_ec2_server::{Call, Direct, Fault, Server, ServerOptions, What};
use oven_testing::ring;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const BLOCK: u64 = 512 << 10;
const MILLI: Duration = Duration::from_millis(1);

struct ImportFixture {
    server: Server,
    dir: tempfile::TempDir,
    _ring: ring::Shared,
}

impl ImportFixture {
    fn new(options: ServerOptions) -> Self {
        let options = ServerOptions { policy: Some(policy(DiskAccess::Direct, None, &[])), ..options };
        // In memory, where there is a place for it: nothing has to survive a crash.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let server = Server::start(&dir.path().join("region"), options).unwrap();
        Self { server, dir, _ring: ring::shared() }
    }

    fn with(faults: &[Fault]) -> Self {
        Self::new(ServerOptions { faults: faults.to_vec(), ..ServerOptions::default() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
        command
            .env_clear()
            .env("HOME", self.dir.path())
            .env("AWS_ENDPOINT_URL", self.server.endpoint())
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT", self.server.imds())
            .env("OVEN_CLOUD", "aws")
            .env("OVEN_REGION", "us-east-1")
            .current_dir(&self.dir)
            .args(args);
        command
    }

    fn expect(&self, code: i32, args: &[&str]) -> (String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&stdout), text(&stderr));
        assert_eq!(status.code(), Some(code), "oven {args:?}\n{out}\n{err}\n{}", self.calls_text());
        (out.trim().to_owned(), err)
    }

    /// A disk with a file system's mark in the first block, and these blocks of data.
    fn raw(&self, name: &str, size: u64, blocks: impl IntoIterator<Item = u64>) {
        let file = File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in
            [(1080, &[0x53, 0xef][..]), (1024 + 96, &[0x40, 0, 0, 0]), (1024 + 24, &[2, 0, 0, 0])]
        {
            file.write_all_at(bytes, offset).unwrap();
        }
        // No two pages of it are alike.
        let mut data = vec![1; BLOCK as usize];
        for index in blocks {
            for page in 0..BLOCK / 4096 {
                let at = (page * 4096) as usize;
                data[at..at + 16].copy_from_slice(&[index.to_le_bytes(), page.to_le_bytes()].concat());
            }
            file.write_all_at(&data, index * BLOCK).unwrap();
        }
    }

    fn calls(&self, action: &str) -> Vec<Call> {
        self.server.calls().into_iter().filter(|call| call.action == action).collect()
    }

    fn calls_text(&self) -> String {
        let calls = self.server.calls();
        calls.iter().map(|call| format!("{} {}\n", call.action, call.answer)).collect()
    }

    /// What calls left: snapshots with their states, and images.
    fn left(&self) -> (Vec<String>, usize) {
        let made = self.server.ledger().made();
        (made.snapshots.into_iter().map(|snapshot| snapshot.state).collect(), made.images.len())
    }

    fn start(&self, args: &[&str]) -> Child {
        self.command(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn wait_for(&self, action: &str, count: usize, child: &mut Child) {
        let end = Instant::now() + Duration::from_secs(60);
        while self.calls(action).len() < count {
            assert!(Instant::now() < end && child.try_wait().unwrap().is_none(), "{}", self.calls_text());
            sleep(MILLI);
        }
    }
}

#[test]
fn a_disk_becomes_an_image_once_and_comes_back() {
    let fixture = ImportFixture::new(ServerOptions::default());
    // A hole of a tebibyte, but for three blocks: who reads it all never ends.
    fixture.raw("disk.raw", (1 << 40) - 1000, [7, 1 << 20]);
    let import = ["import", "disk.raw", "--name", "base", "--boot-mode", "uefi-preferred"];
    let (ami, err) = fixture.expect(0, &[&import[..], &["--verify"]].concat());
    assert!(
        err.contains("uploading disk.raw")
            && err.contains("verifying snap-")
            && err.contains("registering base"),
        "{err}"
    );
    assert_eq!(fixture.left(), (vec!["completed".to_owned()], 1));
    assert_eq!(fixture.calls("PutSnapshotBlock").len(), 3);
    assert_eq!(fixture.calls("GetSnapshotBlock").len(), 3);
    let image = fixture.server.ledger().images.remove(0);
    assert_eq!((image.id.as_str(), image.tags[tag::SOURCE].len()), (ami.as_str(), 64));
    let told = fixture.server.with_world(|world| format!("{:?}", world.images[&ami]));
    for words in ["uefi-preferred", "gp3", "/dev/xvda"] {
        assert!(told.contains(words), "{words}: {told}");
    }

    // The same again: also a copy of it, and as another architecture it is another one.
    fixture.server.forget_calls();
    let (again, err) = fixture.expect(0, &import);
    assert!(again == ami && err.contains("was already imported from this disk"), "{again} {err}");
    fs::rename(fixture.path("disk.raw"), fixture.path("moved.raw")).unwrap();
    assert_eq!(fixture.expect(0, &["import", "moved.raw", "--name", "base", "--verify"]).0, ami);
    let other = if Architecture::HOST == Architecture::Arm64 { "x86_64" } else { "arm64" };
    fixture.expect(6, &["import", "moved.raw", "--name", "base", "--arch", other]);
    fixture.raw("other.raw", 1 << 30, [8]);
    let (_, err) = fixture.expect(6, &["import", "other.raw", "--name", "base"]);
    assert!(
        err.contains(&ami) && err.contains("another --name") && err.contains("deregister-image"),
        "{err}"
    );
    assert!(fixture.calls("StartSnapshot").is_empty(), "{}", fixture.calls_text());

    // Small, so that it can be compared by reading it.
    let (small, _) = fixture.expect(0, &["import", "other.raw", "--name", "small"]);
    fixture.expect(0, &["export", &small, "out.raw"]);
    assert!(fs::read(fixture.path("out.raw")).unwrap() == fs::read(fixture.path("other.raw")).unwrap());
    fixture.expect(2, &["export", &small, "out.raw"]);
}

#[test]
fn a_name_of_another_image_is_rejected_before_anything_is_uploaded() {
    let fixture = ImportFixture::new(ServerOptions::default());
    fixture.raw("disk.raw", 1 << 30, [1]);
    let foreign = fixture.server.import(&fixture.path("disk.raw"), "theirs", Architecture::HOST).unwrap();
    let (_, err) = fixture.expect(6, &["import", "disk.raw", "--name", "theirs"]);
    assert!(err.contains(&foreign) && err.contains("another --name"), "{err}");
    assert!(fixture.calls("StartSnapshot").is_empty());
    fixture.expect(2, &["import", "disk.raw", "--name", "their*"]);
    fixture.expect(0, &["import", "disk.raw", "--name", "base"]);
}

#[test]
fn one_that_expires_is_sent_again_and_leaves_nothing() {
    // The first four blocks take too long.
    let direct = Direct { timeout: Duration::from_millis(3000), ..Direct::default() };
    let faults = vec![Fault::new("PutSnapshotBlock", 1, What::Late(5000)).times(4)];
    let fixture = ImportFixture::new(ServerOptions { direct, faults, ..ServerOptions::default() });
    fixture.raw("disk.raw", 1 << 30, [1, 2, 3]);
    fixture.expect(0, &["import", "disk.raw", "--name", "base", "--verify"]);
    assert_eq!(fixture.calls("StartSnapshot").len(), 2, "{}", fixture.calls_text());
    assert_eq!(fixture.left(), (vec!["completed".to_owned()], 1));
}

#[test]
fn what_fails_for_good_leaves_nothing() {
    let denied = || What::Error("AccessDeniedException".into());
    for (fault, words) in [
        (Fault::new("PutSnapshotBlock", 3, denied()), "block "),
        (Fault::new("CompleteSnapshot", 1, denied()), "completing snap-"),
        (Fault::new("StartSnapshot", 1, denied()), "starting a snapshot"),
        (Fault::new("RegisterImage", 1, What::Error("InvalidParameterValue".into())), "registering snap-"),
        // As it is read back.
        (Fault::new("GetSnapshotBlock", 1, What::Flipped).times(10_000), "does not match its checksum"),
    ] {
        let fixture = ImportFixture::with(std::slice::from_ref(&fault));
        fixture.raw("disk.raw", 1 << 30, 1..40);
        let (_, err) = fixture.expect(6, &["import", "disk.raw", "--name", "base", "--verify"]);
        assert!(
            err.contains(words) && !err.contains("left behind"),
            "{fault:?}: {err}{}",
            fixture.calls_text()
        );
        assert_eq!(fixture.left(), (vec![], 0), "{fault:?}");
    }
}

#[test]
fn whoever_stops_it_leaves_nothing_and_whoever_kills_it_sweeps() {
    // It cannot end before it is stopped.
    let hangs =
        || ImportFixture::with(&[Fault::new("PutSnapshotBlock", 101, What::HangBefore).times(10_000)]);
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let fixture = hangs();
        fixture.raw("disk.raw", 1 << 30, 1..400);
        let mut child = fixture.start(&["import", "disk.raw", "--name", "base"]);
        fixture.wait_for("PutSnapshotBlock", 100, &mut child);
        let stopped = Instant::now();
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        let ended = child.wait_with_output().unwrap();
        if signal == Signal::SIGINT {
            let said = String::from_utf8_lossy(&ended.stderr);
            assert_eq!(ended.status.code(), Some(130), "{said}");
            assert!(said.contains("nothing was left behind"), "{said}");
            assert!(stopped.elapsed() < Duration::from_secs(20), "{:?}", stopped.elapsed());
        } else {
            assert_eq!(fixture.left(), (vec!["pending".to_owned()], 0));
            fixture.expect(0, &["sweep"]);
        }
        assert_eq!(fixture.left(), (vec![], 0), "{signal}");
        fixture.server.set(|options| options.faults.clear());
        fixture.expect(0, &["import", "disk.raw", "--name", "base"]);
    }
}

#[test]
fn a_download_that_fails_or_is_stopped_leaves_no_file() {
    let fixture = ImportFixture::new(ServerOptions::default());
    fixture.raw("disk.raw", 1 << 30, 1..400);
    let (ami, _) = fixture.expect(0, &["import", "disk.raw", "--name", "base"]);
    let files = || fs::read_dir(&fixture.dir).unwrap().count();
    let before = files();
    let export = ["export", ami.as_str(), "out.raw"];
    fixture.server.set(|options| {
        options.faults = vec![Fault::new("GetSnapshotBlock", 1, What::Flipped).times(2)];
    });
    fixture.expect(0, &export);
    fs::remove_file(fixture.path("out.raw")).unwrap();
    fixture.server.set(|options| {
        options.faults = vec![Fault::new("GetSnapshotBlock", 1, What::Flipped).times(10_000)];
    });
    let (_, err) = fixture.expect(6, &export);
    assert!(err.contains("does not match its checksum"), "{err}");
    assert_eq!(files(), before);
    fixture.server.set(|options| {
        // It cannot end before it is stopped.
        options.faults = vec![Fault::new("GetSnapshotBlock", 65, What::HangBefore).times(10_000)];
    });
    fixture.server.forget_calls();
    let mut child = fixture.start(&export);
    fixture.wait_for("GetSnapshotBlock", 64, &mut child);
    let stopped = Instant::now();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(stopped.elapsed() < Duration::from_secs(20), "{:?}", stopped.elapsed());
    assert_eq!(files(), before);
}

/// The most memory that a program ever had, in MiB.
fn peak(mut command: Command) -> u64 {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        // The last look before it ends is some milliseconds old.
        let text = fs::read_to_string(&status).unwrap_or_default();
        let told = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = peak.max(told.map_or(0, |told| told.parse::<u64>().unwrap()) >> 10);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return peak;
        }
        sleep(MILLI);
    }
}

#[test]
fn four_gibibytes_take_little_memory() {
    let fixture = ImportFixture::new(ServerOptions::default());
    // A fourteenth of it is data: 293 MiB.
    fixture.raw("disk.raw", 4 << 30, (1..8192).step_by(14));
    let imported = peak(fixture.command(&["import", "disk.raw", "--name", "base", "--verify"]));
    let id = fixture.server.ledger().images.remove(0).id;
    let exported = peak(fixture.command(&["export", &id, "out.raw"]));
    assert!((1..256).contains(&imported), "importing took {imported} MiB");
    assert!((1..256).contains(&exported), "exporting took {exported} MiB");
    let (again, _) = fixture.expect(0, &["import", "out.raw", "--name", "base"]);
    assert_eq!(again, id, "it is the same disk");
}
