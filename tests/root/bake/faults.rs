//! A fault at every cloud call, before and after its effect, and SIGKILL at every one and at any time: what is left.

use oven_testing::{LocalWorld, full, pause, stderr};
use std::fs;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Within which a stopped bake has to be gone: ten seconds, and half as many for a busy machine.
const STOP: Duration = Duration::from_secs(15);

fn bake(world: &LocalWorld, fault: Option<&str>) -> Output {
    command(world, fault).output().unwrap()
}

fn command(world: &LocalWorld, fault: Option<&str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven-test-bake"));
    command.arg(world.region()).arg(world.path("image")).args(fault).current_dir(world.dir.path());
    command
}

fn line<'a>(output: &'a Output, word: &str) -> Option<&'a str> {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' '))
}

/// What a region holds when it holds one base image and one baked image, and nothing else.
fn assert_whole(world: &LocalWorld, what: &str) {
    let files = world.files();
    let count = |dir: &str| files.iter().filter(|f| f.starts_with(dir) && f.ends_with(".json")).count();
    assert_eq!((count("images/"), count("snapshots/"), count("volumes/")), (2, 2, 0), "{what}: {files:#?}");
    let odd: Vec<_> = files.iter().filter(|f| f.contains("tmp") || f.starts_with("volumes/")).collect();
    assert!(odd.is_empty(), "{what}: {odd:?}");
}

/// After any fault: nothing of the run is left on the machine, sweep cleans the region, and the next bake succeeds.
fn assert_recovers(world: &LocalWorld, what: &str) {
    world.assert_no_traces(what);
    world.expect(0, &["sweep"]);
    let next = bake(world, None);
    assert_eq!(next.status.code(), Some(0), "{what}: the next bake: {}", stderr(&next));
    world.assert_no_traces(what);
    assert_whole(world, what);
}

fn calls_of_a_happy_bake() -> usize {
    let world = LocalWorld::tiny();
    let happy = bake(&world, None);
    assert_eq!(happy.status.code(), Some(0), "{}", stderr(&happy));
    assert_whole(&world, "happy");
    world.assert_no_traces("happy");
    line(&happy, "calls").unwrap().parse().unwrap()
}

#[test]
fn an_error_at_every_call() {
    for call in 1..=calls_of_a_happy_bake() {
        for when in ["before", "after"] {
            let (world, what) = (LocalWorld::tiny(), format!("{call}:{when}:error"));
            let output = bake(&world, Some(&what));
            let code = output.status.code();
            // A call that pays a debt may fail: then the image is there, and the message says what is left.
            assert!(matches!(code, Some(6 | 7)), "{what}: {code:?} {}", stderr(&output));
            assert!(stderr(&output).contains("injected fault"), "{what}: {}", stderr(&output));
            if code == Some(7) {
                assert!(stderr(&output).contains(" sweep --run "), "{what}: {}", stderr(&output));
            }
            assert_recovers(&world, &what);
        }
    }
}

#[test]
fn sigkill_at_every_call() {
    for call in 1..=calls_of_a_happy_bake() {
        for when in ["before", "after"] {
            let (world, what) = (LocalWorld::tiny(), format!("{call}:{when}:kill"));
            let output = bake(&world, Some(&what));
            assert_eq!(output.status.code(), None, "{what}: {}", stderr(&output));
            assert_recovers(&world, &what);
        }
    }
}

#[test]
fn sigkill_at_any_time() {
    let world = LocalWorld::tiny();
    let start = Instant::now();
    assert!(bake(&world, None).status.success());
    let whole = start.elapsed();
    let runs = if full() { 200 } else { 25 };
    for i in 0..runs {
        let world = LocalWorld::tiny();
        let delay = whole.mul_f64(f64::from(i) / f64::from(runs));
        let mut child = command(&world, None).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        pause(delay);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_recovers(&world, &format!("SIGKILL after {delay:?}"));
    }
}

#[test]
fn a_stop_while_a_call_hangs() {
    for call in 1..=calls_of_a_happy_bake() {
        for signal in [nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGINT] {
            let (world, what) = (LocalWorld::tiny(), format!("{call}:before:hang"));
            let mut child =
                command(&world, Some(&what)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
            std::io::BufRead::read_line(&mut out, &mut String::new()).unwrap();
            let start = Instant::now();
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
            let status = child.wait().unwrap();
            assert!(start.elapsed() < STOP, "{what} {signal}: {:?}", start.elapsed());
            // A stop that finds the image registered, and a payment hanging, leaves something behind.
            assert!(matches!(status.code(), Some(130 | 7)), "{what} {signal}: {status:?}");
            assert_recovers(&world, &format!("{what} {signal}"));
        }
    }
}

/// Two bakes of one definition, begun together. One image, both answer with it; says how many checked out a disk.
fn two_at_once(state: [&str; 2]) -> usize {
    let world = LocalWorld::tiny();
    let start = |state: &str| {
        let mut command = command(&world, None);
        command.env("OVEN_TEST_STATE", world.path(state)).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let bakes = state.map(start);
    let outputs = bakes.map(|child| child.wait_with_output().unwrap());
    let ids = outputs.each_ref().map(|o| line(o, "image").unwrap_or_else(|| panic!("{}", stderr(o))));
    assert_eq!(ids[0], ids[1]);
    assert!(outputs.iter().all(|o| o.status.success()));
    assert_whole(&world, "two at once");
    world.assert_no_traces("two at once");
    let say = |words: &str| outputs.iter().filter(|o| stderr(o).contains(words)).count();
    assert_eq!(say("already baked"), 1);
    say("checking out")
}

#[test]
fn two_bakes_of_one_definition_make_one_image() {
    assert_eq!(two_at_once(["region", "region"]), 1, "the second one waits for the first");
}

#[test]
fn two_hosts_that_share_a_region_make_one_image() {
    // Neither knows of the other before it registers.
    assert!((0..25).any(|_| two_at_once(["one", "other"]) == 2), "they never met");
}

#[test]
fn force_concerns_what_is_named_and_not_its_parents() {
    let world = LocalWorld::tiny();
    world.write("base/image.toml", "name = \"base\"\nfrom = { name = \"tiny\" }\n");
    world.write("image/image.toml", "name = \"image\"\nfrom = \"../base\"\n");
    let first = bake(&world, None);
    let second = command(&world, None).env("OVEN_TEST_FORCE", "1").output().unwrap();
    assert!(first.status.success() && second.status.success(), "{}{}", stderr(&first), stderr(&second));
    assert_eq!(line(&first, "parent").unwrap(), line(&second, "parent").unwrap());
    assert_ne!(line(&first, "image").unwrap(), line(&second, "image").unwrap());
}

#[test]
fn a_definition_that_changes_while_it_is_baked_makes_no_image() {
    let world = LocalWorld::tiny();
    let image = "name = \"image\"\nfrom = { name = \"tiny\" }\n[[run]]\nscript = \"s.sh\"\nnetwork = true\n";
    world.write("image/image.toml", image);
    // It ends when it is let go, a connection that is closed; and after that at once.
    let gate = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = gate.local_addr().unwrap().port();
    world.write("image/s.sh", &format!("#!/bin/sh\nbusybox nc 127.0.0.1 {port} || true\n"));
    let mut child = command(&world, None).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let volumes = world.region().join("volumes");
    while !volumes.read_dir().is_ok_and(|mut files| files.any(|f| f.unwrap().path().extension().is_some())) {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        pause(Duration::from_millis(5));
    }
    world.write("image/added", "too late\n");
    // Ends with the test's process, if nobody comes.
    std::thread::spawn(move || drop(gate.accept()));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("added is new"), "{}", stderr(&output));
    assert_recovers(&world, "a changed definition");
}

/// The volume is a sparse file. When the disk of the region is full, the step gets an I/O error.
#[test]
fn a_full_disk_of_the_region_is_this_machines_fault() {
    let world = LocalWorld::of("tiny", "ID=debian\nVERSION_ID=\"12\"\n", &[]);
    let step = "busybox dd if=/dev/urandom of=/root/data bs=64k count=40 conv=fsync";
    world.write("image/s.sh", &format!("#!/bin/sh\n{step}\n"));
    world.write("image/image.toml", "from = { name = \"tiny\" }\n[[run]]\nscript = \"s.sh\"\n");
    fs::create_dir(world.path("small")).unwrap();
    // What is free is enough for the volume, and for a part of what the step writes.
    let script = "mount -t tmpfs -o size=64m none small\n\
        cp -a --sparse=always region small/\n\
        base=$(du -k --total small/region/snapshots/*.img | tail -n 1 | cut -f 1)\n\
        free=$(df -k --output=avail small | tail -n 1)\n\
        head -c $((free - base - 1500))k /dev/zero > small/fill\n\
        exec \"$@\"";
    let bake = world.command(&["bake", "image"]);
    let mut small = Command::new("unshare");
    small.args(["--mount", "sh", "-ec", script, "sh"]).arg(bake.get_program());
    small.args(["--region-dir", "small/region", "bake", "image"]).current_dir(world.dir.path());
    let output = small.output().unwrap();
    let told = stderr(&output);
    assert_eq!(output.status.code(), Some(8), "{told}");
    assert!(told.contains("no space is left in") && told.contains("--region-dir"), "{told}");
    world.assert_no_traces(&told);
}
