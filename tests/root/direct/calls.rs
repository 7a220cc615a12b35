//! Disks served by their blocks: a fault at every call that reads or writes them, before its effect and after it, and
//! SIGKILL at every one and at any time: what is left, and what the next bake makes.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oven_testing::direct::bake::{assert_recovers, assert_whole, bake, command, line};
use oven_testing::{Dice, LocalWorld, each, full, pause, seeds, stderr};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Within which a stopped bake has to be gone: ten seconds, and half as many for a busy machine.
const STOP: Duration = Duration::from_secs(15);
/// No bake of the tiny image takes longer, whatever goes wrong: beyond it hangs.
const HANGS: Duration = Duration::from_secs(180);
/// Blocks that a bake of the tiny image reads, more or less: some are prefetched.
const READS: usize = 6;
/// The base and the image.
const IMAGES: usize = 2;

struct Happy {
    calls: usize,
    reads: usize,
    took: Duration,
}

fn happy() -> Happy {
    let world = LocalWorld::tiny();
    let start = Instant::now();
    let baked = bake(&world, &[]);
    let took = start.elapsed();
    assert_whole(&world, &baked, IMAGES, "happy");
    world.assert_no_traces("happy");
    let count = |word: &str| line(&baked, word).unwrap().parse().unwrap();
    let happy = Happy { calls: count("calls"), reads: count("reads"), took };
    // To look up, to list, to open, to start, to put, to complete, to register.
    assert!(happy.calls >= 9 && happy.reads >= 3, "{} calls, {} reads", happy.calls, happy.reads);
    happy
}

/// Every call, before and after; of them a sample, unless all are asked for.
fn places(what: &str, most: usize) -> Vec<String> {
    let Happy { calls, reads, .. } = happy();
    let calls = (1..=calls).map(|call| call.to_string());
    let calls = calls.chain((1..=reads).map(|read| format!("read-{read}")));
    let mut places: Vec<_> =
        calls.flat_map(|call| ["before", "after"].map(|when| format!("{call}:{when}:{what}"))).collect();
    let mut dice = Dice(seeds(1, 0, 1)[0]);
    while !full() && places.len() > most {
        places.swap_remove(dice.roll(places.len()));
    }
    places
}

/// Whether a bake that said this made fewer calls than that: not every one writes the same blocks, and so many of them.
fn ended_before(said: &str, what: &str) -> bool {
    let of = |text: &str| text.parse::<usize>().ok();
    let made = said.lines().find_map(|line| of(line.strip_prefix("calls ")?.trim()));
    let asked = what.split(':').next().and_then(of);
    made.zip(asked).is_some_and(|(made, asked)| made < asked)
}

#[test]
fn an_error_at_every_call() {
    each(&places("error", 8), |what| {
        let world = LocalWorld::tiny();
        let output = bake(&world, std::slice::from_ref(what));
        let (code, told) = (output.status.code(), stderr(&output));
        match code {
            // A block that is prefetched is read again.
            Some(0) => {
                let before = ended_before(&String::from_utf8_lossy(&output.stdout), what);
                assert!(what.starts_with("read-") || before, "{what}: {told}");
            }
            // A step may have been the first to see that a block is unavailable; the cause is reported all the same.
            Some(5) => {
                assert!(what.starts_with("read-") && told.contains("injected fault"), "{what}: {told}")
            }
            // A call that pays a debt may fail: then the image is there, and the message says what is left.
            Some(6) => assert!(told.contains("injected fault"), "{what}: {told}"),
            Some(7) => assert!(told.contains(" sweep --run "), "{what}: {told}"),
            _ => panic!("{what}: {code:?} {told}"),
        }
        assert_recovers(&world, IMAGES, what);
    });
}

#[test]
fn sigkill_at_every_call() {
    each(&places("kill", 8), |what| {
        let world = LocalWorld::tiny();
        let output = bake(&world, std::slice::from_ref(what));
        // One block more or less is prefetched.
        let before = ended_before(&String::from_utf8_lossy(&output.stdout), what);
        let was = output.status.code().is_none() || what.starts_with("read-") || before;
        assert!(was, "{what}: {}", stderr(&output));
        assert_recovers(&world, IMAGES, what);
    });
}

/// Waits until it ends; one that takes too long hangs.
fn end(mut child: Child, within: Duration, what: &str) -> (Option<i32>, String) {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            let mut told = String::new();
            if let Some(mut err) = child.stderr.take() {
                std::io::Read::read_to_string(&mut err, &mut told).unwrap();
            }
            return (status.code(), told);
        }
        if start.elapsed() > within {
            child.kill().unwrap();
            panic!("{what}: not over after {within:?}");
        }
        pause(Duration::from_millis(2));
    }
}

fn start(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

#[test]
fn a_stop_while_a_call_hangs() {
    each(&places("hang", 8), |what| {
        let asked = if what.contains("after") { Signal::SIGINT } else { Signal::SIGTERM };
        let (world, what) = (LocalWorld::tiny(), format!("{what} {asked}"));
        let mut child = start(&mut command(&world, "child", &[what.split(' ').next().unwrap().to_owned()]));
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        out.read_line(&mut said).unwrap();
        if said.trim() != "hanging" {
            // Another one has read that block.
            assert!(what.starts_with("read-") || ended_before(&said, &what), "{what}: {said}");
            assert_eq!(end(child, HANGS, &what).0, Some(0), "{what}");
            return assert_recovers(&world, IMAGES, &what);
        }
        signal(&child, asked);
        let (code, told) = end(child, STOP, &what);
        // A stop that finds the image registered, and a payment hanging, leaves something behind.
        assert!(matches!(code, Some(130 | 7)), "{what}: {code:?} {told}");
        assert_recovers(&world, IMAGES, &what);
    });
}

#[test]
fn sigkill_at_any_time() {
    let whole = happy().took;
    each(&seeds(200, 0, 8), |seed| {
        let delay = whole.mul_f64(Dice(*seed).roll(1000) as f64 / 950.0);
        let (world, what) = (LocalWorld::tiny(), format!("OVEN_TEST_SEED={seed}: SIGKILL after {delay:?}"));
        let mut child = start(&mut command(&world, "child", &[]));
        pause(delay);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_recovers(&world, IMAGES, &what);
    });
}

/// The process that serves a disk to this one.
fn server_of(child: &Child) -> Option<Pid> {
    let all = std::fs::read_dir(format!("/proc/{}/task", child.id())).ok()?.flatten();
    let children = all.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<String> = children.collect();
    let mut pids = children.iter().flat_map(|pids| pids.split_whitespace());
    let serves = |pid: &&str| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command
            .split(|byte| *byte == 0)
            .any(|word| word == oven::disk::direct::server::SERVER_VERB.as_bytes())
    };
    pids.find(serves).map(|pid| Pid::from_raw(pid.parse().unwrap()))
}

#[test]
fn a_disk_whose_server_is_killed_makes_no_image() {
    let whole = happy().took;
    each(&seeds(40, 0, 4), |seed| {
        let delay = whole.mul_f64(Dice(*seed).roll(1000) as f64 / 1500.0);
        let (world, what) = (LocalWorld::tiny(), format!("OVEN_TEST_SEED={seed}: no server after {delay:?}"));
        let child = start(&mut command(&world, "child", &[]));
        let started = Instant::now();
        let server = loop {
            match server_of(&child) {
                Some(server) if started.elapsed() >= delay => break Some(server),
                // It was too fast.
                None if started.elapsed() > delay.max(whole) => break None,
                _ => pause(Duration::from_millis(1)),
            }
        };
        let killed = server.is_some_and(|server| kill(server, Signal::SIGKILL).is_ok());
        let (code, told) = end(child, HANGS, &what);
        match code {
            Some(0) => {}
            _ => {
                assert!(killed && code == Some(8), "{what}: {code:?} {told}");
                assert!(
                    told.contains("the process that serves the disk ended unexpectedly"),
                    "{what}: {told}"
                );
            }
        }
        assert_recovers(&world, IMAGES, &what);
    });
}

/// What befalls a bake, by a seed.
#[derive(Debug)]
struct Plan {
    mode: &'static str,
    faults: Vec<String>,
    /// Milliseconds after its last block that a pending snapshot lives.
    patience: Option<usize>,
    /// A signal to the bake.
    asked: Option<(Signal, f64)>,
    /// SIGKILL for who serves the disk.
    server: Option<f64>,
    /// Another bake was before, so that blocks are in the cache; and so many of its bits are flipped.
    warm: Option<usize>,
}

fn plan(seed: u64, happy: &Happy) -> Plan {
    let mut dice = Dice(seed);
    let faults = (0..dice.roll(4)).map(|_| {
        let call = match dice.roll(3) {
            0 => format!("read-{}", 1 + dice.roll(READS)),
            _ => (1 + dice.roll(happy.calls + 3)).to_string(),
        };
        let (when, what) = (*dice.of(&["before", "after"]), *dice.of(&["error", "error", "kill", "hang"]));
        format!("{call}:{when}:{what}")
    });
    let faults: Vec<String> = faults.collect();
    let mut at =
        |sides: usize, part: f64| (dice.roll(sides) == 0).then(|| dice.roll(1000) as f64 / 1000.0 * part);
    let asked = at(3, 1.2);
    let server = at(5, 0.8);
    // What hangs is asked to end.
    let asked = asked.or_else(|| faults.iter().any(|fault| fault.ends_with("hang")).then_some(1.5));
    Plan {
        mode: if dice.roll(4) == 0 { "whole" } else { "child" },
        faults,
        patience: (dice.roll(6) == 0).then(|| 1 + dice.roll(40)),
        asked: asked.map(|at| (*dice.of(&[Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL]), at)),
        server,
        warm: (dice.roll(3) == 0).then(|| dice.roll(2) * (1 + dice.roll(20))),
    }
}

/// Flips bits anywhere in the cache.
fn flip(world: &LocalWorld, seed: u64, many: usize) {
    let mut dice = Dice(seed + 7);
    let files: Vec<_> = world.files().into_iter().filter(|file| file.starts_with("blocks/")).collect();
    assert!(!files.is_empty(), "there is no cache");
    for _ in 0..many {
        let path = world.region().join(dice.of(&files));
        let mut bytes = std::fs::read(&path).unwrap();
        let at = dice.roll(bytes.len());
        bytes[at] ^= 1 << dice.roll(8);
        std::fs::write(&path, bytes).unwrap();
    }
}

fn survives(seed: u64, happy: &Happy) {
    let plan = plan(seed, happy);
    let (world, what) = (LocalWorld::tiny(), format!("OVEN_TEST_SEED={seed}: {plan:?}"));
    let mut images = IMAGES;
    if let Some(flips) = plan.warm {
        world.write("warm/image.toml", "name = \"warm\"\nfrom = { name = \"tiny\" }\n");
        let mut warm = Command::new(env!("CARGO_BIN_EXE_oven-test-bake"));
        warm.arg(world.region()).arg(world.path("warm")).env("OVEN_TEST_DIRECT", "child");
        let warm = warm.output().unwrap();
        images += 1;
        assert_whole(&world, &warm, images - 1, "warm");
        flip(&world, seed, flips);
    }
    let mut command = command(&world, plan.mode, &plan.faults);
    if let Some(patience) = plan.patience {
        command.env("OVEN_TEST_PATIENCE", patience.to_string());
    }
    let child = start(&mut command);
    let begun = Instant::now();
    let mut events = Vec::from_iter(plan.asked.map(|(_, at)| (happy.took.mul_f64(at), true)));
    events.extend(plan.server.map(|at| (happy.took.mul_f64(at), false)));
    events.sort();
    for (at, is_asked) in events {
        pause(at.saturating_sub(begun.elapsed()));
        match (is_asked, plan.asked) {
            (true, Some((asked, _))) => signal(&child, asked),
            // It may not be there yet, or not any more.
            _ => _ = server_of(&child).map(|server| kill(server, Signal::SIGKILL)),
        }
    }
    let (code, told) = end(child, HANGS, &what);
    let killed = plan.faults.iter().any(|fault| fault.ends_with("kill")) || plan.asked.is_some();
    match code {
        Some(0 | 5 | 6 | 7 | 8) => {}
        Some(130) => assert!(plan.asked.is_some(), "{what}: {told}"),
        None => assert!(killed, "{what}: {told}"),
        Some(_) => panic!("{what}: {code:?} {told}"),
    }
    let nothing =
        plan.faults.is_empty() && plan.asked.is_none() && plan.server.is_none() && plan.patience.is_none();
    assert!(!nothing || code == Some(0), "{what}: {code:?} {told}");
    assert_recovers(&world, images, &format!("{what}: {code:?} {told}"));
}

#[test]
fn random_plans() {
    let happy = happy();
    each(&seeds(200, 10, 5), |seed| survives(*seed, &happy));
}
