//! Bakes of a disk of 8 MiB without a volume: a fault at every call, blocks that cannot be read, SIGKILL at every call
//! and at any time. What is left, and that the next bake succeeds.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oven::cloud::block_api::BlockApi;
use oven::cloud::local::Region;
use oven::disk::direct::block_cache::BlockCache;
use oven::ids::SnapshotId;
use oven_testing::{LocalWorld, full, pause, stderr, until};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Within which whatever was stopped has to be gone: ten seconds, and half as many for a busy machine.
const STOP: Duration = Duration::from_secs(15);

/// The small baker, with faults.
fn baker(world: &LocalWorld, fault: Option<&str>, reader: Option<&str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven-test-bake"));
    command.arg(world.region()).arg(world.path("image")).args(fault).current_dir(world.dir.path());
    command.env("OVEN_TEST_DIRECT", "1").envs(reader.map(|reader| ("OVEN_TEST_READER", reader)));
    command
}

fn number(output: &Output, word: &str) -> usize {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{word}: {text}{}", stderr(output))).parse().unwrap()
}

fn assert_whole(world: &LocalWorld, what: &str) {
    let files = world.files();
    let count = |dir: &str| files.iter().filter(|f| f.starts_with(dir) && f.ends_with(".json")).count();
    let counts = (count("images/"), count("snapshots/"), count("volumes/"), count("kept/"));
    assert_eq!(counts, (2, 2, 0, 0), "{what}: {files:#?}");
    let snapshots = files.iter().filter(|f| f.starts_with("snapshots/"));
    let odd: Vec<_> = snapshots.filter(|f| !f.ends_with(".json") && !f.ends_with(".img")).collect();
    assert!(odd.iter().all(|file| file.ends_with(".put")), "{what}: {odd:?}");
    assert!(!files.iter().any(|f| f.contains("tmp") || f.starts_with("kept/")), "{what}: {files:#?}");
}

fn assert_recovers(world: &LocalWorld, what: &str) {
    world.assert_no_traces(what);
    world.expect(0, &["sweep"]);
    let next = baker(world, None, None).output().unwrap();
    assert_eq!(next.status.code(), Some(0), "{what}: the next bake: {}", stderr(&next));
    world.assert_no_traces(what);
    assert_whole(world, what);
}

/// How many of the base's blocks are in the cache, and how many are not.
fn blocks_of_the_base(world: &LocalWorld) -> (usize, usize) {
    let dir = world.region().join("blocks");
    let cache = fs::read_dir(&dir).unwrap().next().unwrap().unwrap();
    let snapshot = SnapshotId(cache.file_name().into_string().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let region = Region::open(&world.region()).unwrap();
    let blocks = runtime.block_on(region.contents(&snapshot)).unwrap().blocks;
    let cached = BlockCache::new(&dir, u64::MAX).open_snapshot(&snapshot).unwrap();
    let kept = blocks.iter().filter(|index| cached.verified(*index).is_some()).count();
    (kept, blocks.len() as usize - kept)
}

/// Whether a process, or one of its steps, waits in the kernel for a disk.
fn waits(pid: u32) -> Option<()> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let children = |task: &fs::DirEntry| {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
    };
    let state = |task: &fs::DirEntry| fs::read_to_string(task.path().join("stat")).unwrap_or_default();
    tasks.into_iter().find_map(|task| {
        let waiting = state(&task).contains(") D ");
        if waiting { Some(()) } else { children(&task).into_iter().find_map(waits) }
    })
}

fn happy() -> Output {
    let world = LocalWorld::tiny();
    let happy = baker(&world, None, None).output().unwrap();
    assert_eq!(happy.status.code(), Some(0), "{}", stderr(&happy));
    assert_whole(&world, "happy");
    world.assert_no_traces("happy");
    // Again, with a cache: nothing is read that it has. (A prefetch may not have come to its end.)
    let (kept, rest) = blocks_of_the_base(&world);
    let mut again = baker(&world, None, None);
    let again = again.env("OVEN_TEST_FORCE", "1").output().unwrap();
    assert_eq!(again.status.code(), Some(0), "{}", stderr(&again));
    let (first, second) = (number(&happy, "reads"), number(&again, "reads"));
    assert!(
        kept > 0 && kept <= first && second <= rest,
        "{first} and {second} were read, {kept} cached and {rest} not"
    );
    happy
}

/// Not every bake writes the same blocks, and so many of them.
fn ended_before(output: &Output, call: usize) -> bool {
    output.status.code() == Some(0) && number(output, "calls") < call
}

/// All calls of a bake, before and after their effect; a sample has each call once.
fn faults(what: &str) -> Vec<(usize, String)> {
    let full = full();
    let calls = (1..=number(&happy(), "calls")).flat_map(|call| [(call, "before"), (call, "after")]);
    let calls = calls.filter(|(call, when)| full || (call % 2 == 0) == (*when == "after"));
    calls.map(|(call, when)| (call, format!("{call}:{when}:{what}"))).collect()
}

#[test]
fn an_error_at_every_call() {
    for (call, what) in faults("error") {
        let world = LocalWorld::tiny();
        let output = baker(&world, Some(&what), None).output().unwrap();
        let (code, err) = (output.status.code(), stderr(&output));
        if ended_before(&output, call) {
            continue;
        }
        assert!(matches!(code, Some(6 | 7)) && err.contains("injected fault"), "{what}: {code:?} {err}");
        assert_recovers(&world, &what);
    }
}

#[test]
fn sigkill_at_every_call() {
    for (call, what) in faults("kill") {
        let world = LocalWorld::tiny();
        let output = baker(&world, Some(&what), None).output().unwrap();
        if ended_before(&output, call) {
            continue;
        }
        assert_eq!(output.status.code(), None, "{what}: {}", stderr(&output));
        assert_recovers(&world, &what);
    }
}

#[test]
fn sigkill_at_any_time() {
    let start = Instant::now();
    happy();
    let whole = start.elapsed();
    let runs = if full() { 200 } else { 12 };
    for i in 0..runs {
        let world = LocalWorld::tiny();
        let delay = whole.mul_f64(f64::from(i) / f64::from(runs));
        let mut command = baker(&world, None, None);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        pause(delay);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_recovers(&world, &format!("SIGKILL after {delay:?}"));
    }
}

#[test]
fn an_unreadable_block_is_reported_with_its_cause() {
    let reads = number(&happy(), "reads");
    for from in [1, reads / 2, reads] {
        let (world, reader) = (LocalWorld::tiny(), format!("fail:{from}"));
        let output = baker(&world, None, Some(&reader)).output().unwrap();
        let err = stderr(&output);
        if output.status.code() != Some(0) {
            assert_eq!(output.status.code(), Some(6), "{reader}: {err}");
            let told = err.contains("reading block ") && err.contains(" of snap-");
            assert!(told && err.contains("the network is away"), "{reader}: {err}");
        }
        assert!(from > 1 || output.status.code() != Some(0), "{reader}: {err}");
        assert_recovers_from(&world, &reader, output.status.code() == Some(0));
    }
}

/// A bake that could do without the block made its image.
fn assert_recovers_from(world: &LocalWorld, what: &str, baked: bool) {
    assert!(!baked || world.files().iter().filter(|f| f.starts_with("images/")).count() == 2, "{what}");
    assert_recovers(world, what);
}

/// The thread with which the disk's server ends has nothing whose end may wait for the disk: no loop device, no mount.
/// Any thread may be the last one of a process that is killed, and then it is the one that closes what is open.
fn assert_stands_alone(pid: u32) {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path());
    let is_it = |task: &PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm == "disk\n");
    let watches: Vec<PathBuf> = tasks.filter(is_it).collect();
    let [watch] = &watches[..] else { panic!("{watches:?}") };
    let open = fs::read_dir(watch.join("fd")).unwrap();
    let open: Vec<PathBuf> = open.map(|fd| fs::read_link(fd.unwrap().path()).unwrap()).collect();
    let other =
        |path: &PathBuf| *path != Path::new("/dev/null") && !path.to_string_lossy().contains("[pidfd]");
    assert!(!open.iter().any(other), "{open:?}");
    assert_eq!(fs::read_to_string(watch.join("mountinfo")).unwrap().lines().count(), 1);
}

#[test]
fn a_killed_bake_that_waits_for_a_block_ends() {
    let world = LocalWorld::tiny();
    let mut command = baker(&world, None, Some("hang:1"));
    let mut bake = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("the loop device", || (!world.loops().is_empty()).then_some(()));
    until("somebody who waits for it", || waits(bake.id()));
    assert_stands_alone(bake.id());
    let start = Instant::now();
    kill(Pid::from_raw(bake.id() as i32), Signal::SIGKILL).unwrap();
    bake.wait().unwrap();
    world.assert_no_traces("killed while it waited");
    assert!(start.elapsed() < STOP, "{:?}", start.elapsed());
    assert_recovers(&world, "killed while it waited");
}

#[test]
fn a_stopped_bake_that_waits_for_a_block_ends() {
    // While it is mounted, and while the runtime's own thread looks into it.
    for from in 1..=4 {
        let (world, reader) = (LocalWorld::tiny(), format!("hang:{from}"));
        let mut command = baker(&world, None, Some(&reader));
        let mut bake = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        until("the loop device", || (!world.loops().is_empty()).then_some(()));
        until("somebody who waits for it", || waits(bake.id()));
        let start = Instant::now();
        kill(Pid::from_raw(bake.id() as i32), Signal::SIGTERM).unwrap();
        let status = bake.wait().unwrap();
        assert!(start.elapsed() < STOP, "{reader}: {:?}", start.elapsed());
        assert_eq!(status.code(), Some(130), "{reader}");
        assert_recovers(&world, &reader);
    }
}
