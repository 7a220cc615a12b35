//! Hostile images and hostile definitions, each with the exit code and the words with which its bake has to end.
//!
//! Whatever the outcome: a bake takes at most 256 MiB of memory, ends, leaves nothing on the machine, and changes nothing
//! of the host. A signal ends it at any moment. By default a sample of the images is baked. With `--full`, all of them are
//! baked, and two limits are checked that a busy machine may exceed by chance: a bake takes at most 30 s of CPU time,
//! and one of three bakes ends within 2 s after a signal.

mod definitions;
mod disk;
mod images;

use super::lab::HostileLab;
use disk::Damage;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oven_testing::{Dice, each, full, pause, until};
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The memory that oven's process may take, in KiB.
const MEMORY_MAX: u64 = 256 << 10;
/// The CPU time that oven and the processes of its steps may take.
const CPU_MAX: Duration = Duration::from_secs(30);
/// How long oven may take to end after SIGTERM, and how many bakes are stopped until one ends in this time.
const STOP_MAX: Duration = Duration::from_secs(2);
const STOP_TRIES: u32 = 3;
/// A bake that takes longer is killed, and one that takes longer to end after SIGTERM. Both are far more than is needed,
/// because the machine may be busy.
const KILL_AFTER: Duration = Duration::from_secs(600);
const KILL_AFTER_STOP: Duration = Duration::from_secs(30);
/// The unit of the times in `/proc/PID/stat`, which is the same on all architectures of oven.
const TICKS_PER_SECOND: u64 = 100;
/// The number of images that are baked by default, and of those that are stopped.
const SAMPLE: usize = 30;
const STOPPED: usize = 6;

/// A hostile image, the rest of the definition, and how its bake has to end.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    damage: Damage,
    more: &'static str,
    code: i32,
    words: &'static [&'static str],
}

/// A bake that runs one program, and succeeds.
const PLAIN: Case = Case {
    name: "",
    damage: Damage::Debugfs(&[]),
    more: "[[run]]\ncommand = [\"/bin/true\"]",
    code: 0,
    words: &[],
};

/// What the bakes of a test needed, for whoever reads the test's output.
#[derive(Default)]
struct Costs(Mutex<Vec<(Duration, u64, String)>>);

impl Costs {
    fn add(&self, ended: &Ended, name: &str) {
        self.0.lock().unwrap().push((ended.took, ended.memory, name.to_owned()));
    }
}

impl Drop for Costs {
    fn drop(&mut self) {
        let mut all = self.0.lock().unwrap();
        all.sort();
        all.iter()
            .rev()
            .take(5)
            .for_each(|(took, kib, name)| println!("{took:.1?} {} MiB {name}", kib >> 10));
        all.sort_by_key(|(_, kib, _)| *kib);
        if let Some((_, kib, name)) = all.last() {
            println!("the most memory: {} MiB {name}", kib >> 10);
        }
    }
}

/// A process that ended.
struct Ended {
    output: Output,
    took: Duration,
    /// The most memory that it had, in KiB (`VmHWM`).
    memory: u64,
    /// The CPU time of the process and of its descendants that had ended.
    cpu: Duration,
    /// The time from the signal to the end.
    heard: Option<Duration>,
}

/// A region with a base, and a directory for oven's temporary files.
struct Table {
    lab: HostileLab,
}

impl Table {
    fn on(raw: &Path) -> Self {
        let lab = HostileLab::on(raw);
        fs::create_dir(lab.world.path("tmp")).unwrap();
        Self { lab }
    }

    fn command(&self) -> Command {
        let mut command = self.lab.command();
        command.env("TMPDIR", self.lab.world.path("tmp")).env("TABLE_SECRET", "a-secret-of-this-test");
        command
    }

    /// Runs the bake, and sends it SIGTERM after `stop`.
    fn run(&self, name: &str, stop: Option<Duration>) -> Ended {
        let [out, err] = ["out", "err"].map(|file| self.lab.world.path(file));
        let mut command = self.command();
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        let (start, mut child) = (Instant::now(), command.spawn().unwrap());
        let pid = child.id();
        let (mut memory, mut cpu, mut signalled) = (0, Duration::ZERO, None);
        let status = loop {
            memory = memory.max(peak_memory(pid));
            cpu = cpu.max(cpu_time(pid));
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if let (Some(stop), None) = (stop, signalled)
                && start.elapsed() >= stop
            {
                kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGTERM).unwrap();
                signalled = Some(Instant::now());
            }
            let late = signalled.is_some_and(|at: Instant| at.elapsed() > KILL_AFTER_STOP);
            if late || start.elapsed() > KILL_AFTER {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("{name}: it did not end\n{}", String::from_utf8_lossy(&fs::read(err).unwrap()));
            }
            pause(Duration::from_millis(5));
        };
        let output = Output { status, stdout: fs::read(out).unwrap(), stderr: fs::read(err).unwrap() };
        Ended { output, took: start.elapsed(), memory, cpu, heard: signalled.map(|at| at.elapsed()) }
    }

    /// Checks how a bake ended, and what is left of it. `code` is `None` if the bake was stopped.
    fn check(&self, name: &str, ended: &Ended, code: Option<i32>, words: &[&str]) {
        let baked = self.lab.ended(&ended.output, ended.took);
        let said = format!("{name}: {:?} in {:.1?}\n{}", baked.code, ended.took, baked.err);
        match (code, baked.code) {
            (Some(code), _) => assert_eq!(baked.code, Some(code), "{said}"),
            // It may have ended by itself before the signal.
            (None, Some(0 | 3 | 5 | 130)) => {}
            // Before it listens for signals, a signal ends it immediately. It has created nothing then.
            (None, None) => assert_eq!(ended.output.status.signal(), Some(libc::SIGTERM), "{said}"),
            (None, _) => panic!("{said}"),
        }
        for word in words {
            assert!(baked.err.contains(word), "no \"{word}\" in\n{said}");
        }
        // If the signal arrives during the registration, the image may exist. It is complete, and the next bake finds it.
        let may_be_registered = code.is_none() && baked.err.contains("taking the snapshot (");
        if baked.code != Some(0) && !may_be_registered {
            self.lab.assert_no_image(&baked);
        }
        assert!(!full() || ended.cpu <= CPU_MAX, "{:.1?} of CPU time: {said}", ended.cpu);
        assert!(ended.memory <= MEMORY_MAX, "{} MiB of memory: {said}", ended.memory >> 10);
        assert!(!baked.err.contains(['\x1b', '\x07', '\u{202e}']), "{said}");
        assert!(!baked.err.lines().any(|line| line.starts_with("error: forged")), "{said}");
        let left: Vec<_> = fs::read_dir(self.lab.world.path("tmp")).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?} {said}");
    }
}

/// The most memory that a process has had, in KiB; 0 if it has ended.
fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
}

/// The CPU time that a process and its descendants that have ended have taken; zero if it has ended.
fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // `utime`, `stime`, `cutime` and `cstime` are the 14th to 17th field. The second one may contain blanks.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().skip(11).take(4);
    let ticks: u64 = fields.map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
}

fn with_disk<T>(case: &Case, test: impl FnOnce(&Table) -> T) -> T {
    let dir = tempfile::Builder::new().prefix("oven-disk.").tempdir().unwrap();
    let table = Table::on(&disk::make(dir.path(), case.damage));
    let more = case.more;
    table.lab.world.write("image/image.toml", &format!("from = {{ name = \"base\" }}\n{more}\n"));
    test(&table)
}

/// Chooses `count` of all cases, always the same ones. With `--full` it chooses all.
fn sample<T: Clone>(all: &[T], count: usize, seed: u64) -> Vec<T> {
    if full() {
        return all.to_vec();
    }
    let (mut rest, mut dice) = (all.to_vec(), Dice(seed));
    (0..count.min(all.len())).map(|_| rest.swap_remove(dice.roll(rest.len()))).collect()
}

fn bake_all(cases: &[Case]) {
    let (costs, cpu) = (Costs::default(), Mutex::new(Duration::ZERO));
    each(cases, |case| {
        with_disk(case, |table| {
            let ended = table.run(case.name, None);
            costs.add(&ended, case.name);
            table.check(case.name, &ended, Some(case.code), case.words);
            *cpu.lock().unwrap() += ended.cpu;
        });
    });
    assert!(cpu.into_inner().unwrap() > Duration::ZERO, "no CPU time was measured");
}

#[test]
fn hostile_images() {
    let all = images::all();
    assert!(all.len() >= 60, "{}", all.len());
    bake_all(&sample(&all, SAMPLE, 12));
}

#[test]
fn hostile_definitions() {
    let all = definitions::all();
    assert!(all.len() >= 30, "{}", all.len());
    let costs = Costs::default();
    each(&all, |case| {
        let table = Table::on(&disk::whole());
        (case.make)(&table.lab.world.path("image"));
        let ended = table.run(case.name, None);
        costs.add(&ended, case.name);
        table.check(case.name, &ended, Some(case.code), case.words);
    });
}

#[test]
fn a_signal_ends_the_bake_of_a_hostile_image() {
    let cases: Vec<_> = [images::all(), images::bounds()].concat().into_iter().enumerate().collect();
    let slowest = Mutex::new(Duration::ZERO);
    each(&sample(&cases, STOPPED, 21), |(number, case)| {
        // The signal comes at any moment of the time that the bake takes on this machine.
        let whole = with_disk(case, |table| {
            let ended = table.run(case.name, None);
            table.check(case.name, &ended, Some(case.code), case.words);
            ended.took
        });
        with_disk(case, |table| {
            let stop = whole.mul_f64(Dice(*number as u64).roll(1000) as f64 / 1000.0);
            let mut fastest = Duration::MAX;
            for _ in 0..STOP_TRIES {
                let ended = table.run(case.name, Some(stop));
                table.check(&format!("{}, stopped after {stop:?}", case.name), &ended, None, &[]);
                fastest = fastest.min(ended.heard.unwrap_or_default());
                if fastest <= STOP_MAX || !full() {
                    break;
                }
            }
            assert!(!full() || fastest <= STOP_MAX, "{}, stopped after {stop:?}: {fastest:?}", case.name);
            let mut slowest = slowest.lock().unwrap();
            *slowest = (*slowest).max(fastest);
        });
    });
    println!("the slowest end after a signal: {:?}", slowest.lock().unwrap());
}

/// What needs bounds in memory and time.
#[test]
fn images_without_bounds() {
    bake_all(&images::bounds());
}

/// The bake reads a file of the definition for many minutes.
#[test]
fn a_signal_ends_the_bake_of_a_hostile_definition() {
    let table = Table::on(&disk::whole());
    let image = table.lab.world.path("image");
    disk::write(&image, "image.toml", "from = { name = \"base\" }\n");
    disk::hole(&image, "hole", 1 << 40);
    let child = table.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (pid, start) = (child.id(), Instant::now());
    until("a read of the hole", || {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files.filter_map(|fd| fs::read_link(fd.path()).ok()).find(|file| file.ends_with("image/hole"))
    });
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGTERM).unwrap();
    let stopped = Instant::now();
    let output = child.wait_with_output().unwrap();
    let (took, heard) = (start.elapsed(), stopped.elapsed());
    let baked = table.lab.ended(&output, took);
    table.lab.failed(&baked, 130, &["interrupted"]);
    // Without the stop, the read would take longer than this.
    assert!(heard < Duration::from_secs(10), "it ended {heard:?} after the signal");
    println!("it ended {heard:?} after the signal");
}
