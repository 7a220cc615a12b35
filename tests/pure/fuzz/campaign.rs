//! Runs a target in another process, and reports the inputs that end this process.
//!
//! The process has limits of memory and CPU time, which the kernel enforces. So every fault ends the process: a panic, an
//! overflow (the tests are built with overflow checks), a huge allocation, an endless loop, a stack overflow. The
//! process writes the number of an input to a file before it parses the input. Afterwards another process continues
//! with the next input.

use super::parsers::World;
use super::targets::Target;
use super::{mutate, targets};
use oven_testing::programs::{cache_dir, own_test};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// In a worker: its job.
pub const WORKER: &str = "OVEN_FUZZ_WORKER";
/// The number of findings after which the run of a target ends.
const FINDINGS_MAX: usize = 5;
/// The size of a worker's stack in bytes. The main thread of a program has as much.
const STACK: &str = "8388608";
/// The number of clock ticks in a second, in `/proc`. It is the same on every machine.
const TICKS: u64 = 100;

/// How long a target runs.
#[derive(Clone, Copy)]
pub enum Budget {
    Inputs(u64),
    Time(Duration),
}

pub struct Outcome {
    pub inputs: u64,
    /// The number of inputs that the parser did not reject.
    pub accepted: u64,
    /// The longest time that an input took.
    pub slowest: Duration,
    pub findings: Vec<Finding>,
}

pub struct Finding {
    pub number: u64,
    pub what: String,
    /// The file with the input.
    pub path: PathBuf,
}

/// The counters that a worker shares with its parent, in a file.
#[derive(Default)]
struct Progress {
    /// The number of the input that is being parsed.
    number: u64,
    inputs: u64,
    accepted: u64,
    slowest: u64,
}

impl Progress {
    fn write(&self, file: &File) {
        let numbers = [self.number, self.inputs, self.accepted, self.slowest];
        file.write_all_at(numbers.map(u64::to_le_bytes).as_flattened(), 0).unwrap();
    }

    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (numbers, _) = bytes.as_chunks::<8>();
        let numbers: Vec<_> = numbers.iter().map(|number| u64::from_le_bytes(*number)).collect();
        let [number, inputs, accepted, slowest] = numbers[..] else { return Self::default() };
        Self { number, inputs, accepted, slowest }
    }
}

/// Runs a target until the budget is used up, or until there are `FINDINGS_MAX` findings.
pub fn run(target: &Target, run: u64, budget: Budget) -> Outcome {
    let (seeds, begun) = (mutate::seeds(target), Instant::now());
    let mut outcome = Outcome { inputs: 0, accepted: 0, slowest: Duration::ZERO, findings: Vec::new() };
    let mut first = 0;
    loop {
        let (inputs, time) = match budget {
            Budget::Inputs(inputs) => (inputs.saturating_sub(first), u64::MAX),
            Budget::Time(time) => (u64::MAX, time.saturating_sub(begun.elapsed()).as_millis() as u64),
        };
        if inputs == 0 || time == 0 {
            return outcome;
        }
        let shared = tempfile::NamedTempFile::new().unwrap();
        let job = format!("{} {run} {first} {inputs} {time} {}", target.name, shared.path().display());
        let output = start(&job);
        let progress = Progress::read(shared.path());
        outcome.inputs += progress.inputs;
        outcome.accepted += progress.accepted;
        outcome.slowest = outcome.slowest.max(Duration::from_micros(progress.slowest));
        if output.status.success() {
            return outcome;
        }
        let number = progress.number;
        let path = save(target, run, number, &mutate::input(target, &seeds, run, number));
        outcome.findings.push(Finding { number, what: describe(&output, target), path });
        if outcome.findings.len() == FINDINGS_MAX {
            return outcome;
        }
        first = number + 1;
    }
}

fn start(job: &str) -> Output {
    let module = module_path!().rsplit_once("::").map_or("", |(parent, _)| parent);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(own_test(module, "damaged_input_harms_no_parser"));
    // A backtrace needs more memory than the worker has. If an allocation fails in it, the worker hangs.
    command.env(WORKER, job).env("RUST_MIN_STACK", STACK).env("RUST_BACKTRACE", "0").output().unwrap()
}

fn save(target: &Target, run: u64, number: u64, input: &[u8]) -> PathBuf {
    let dir = cache_dir().join("fuzz");
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(format!("{}-{run}-{number}", target.name));
    std::fs::write(&path, input).unwrap();
    path
}

/// Describes how a worker ended.
fn describe(output: &Output, target: &Target) -> String {
    if output.status.signal() == Some(rustix::process::Signal::XCPU.as_raw()) {
        return format!("it needs more than {} s of CPU time", target.seconds);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let telling = ["panicked at", "memory allocation of", "overflowed its stack"];
    let at = lines.iter().position(|line| telling.iter().any(|words| line.contains(words)));
    let first = at.unwrap_or(lines.len().saturating_sub(1));
    let shown = lines[first..].iter().take(2).copied().collect::<Vec<_>>().join(": ");
    format!("{} ({shown})", output.status)
}

/// The body of a worker.
pub fn work(job: &str) {
    let fields: Vec<_> = job.splitn(6, ' ').collect();
    let [name, run, first, inputs, time, shared] = fields[..] else { panic!("{job}") };
    let number = |text: &str| text.parse::<u64>().unwrap();
    let target = targets::find(name);
    let (seeds, mut world) = (mutate::seeds(target), World::new());
    let shared = File::options().write(true).open(shared).unwrap();
    let (begun, mut limited) = (Instant::now(), None::<Instant>);
    let mut progress = Progress::default();
    limit_memory(target);
    for input in number(first)..number(first).saturating_add(number(inputs)) {
        if begun.elapsed().as_millis() >= number(time).into() {
            break;
        }
        if limited.is_none_or(|then| then.elapsed() >= Duration::from_secs(1)) {
            limit_time(target);
            limited = Some(Instant::now());
        }
        progress.number = input;
        progress.write(&shared);
        let bytes = mutate::input(target, &seeds, number(run), input);
        let parsing = Instant::now();
        progress.accepted += u64::from((target.parse)(&mut world, &bytes));
        progress.slowest = progress.slowest.max(parsing.elapsed().as_micros() as u64);
        progress.inputs += 1;
    }
    progress.write(&shared);
}

/// Parses one input in this process, with the same limits.
pub fn repeat(target: &Target, input: &Path) {
    let bytes = std::fs::read(input).unwrap_or_else(|error| panic!("{}: {error}", input.display()));
    let mut world = World::new();
    limit_memory(target);
    limit_time(target);
    let accepted = (target.parse)(&mut world, &bytes);
    println!("{}: {}", target.name, if accepted { "accepted" } else { "rejected" });
}

/// Limits this process's memory to the memory that it has now, and the target's limit.
fn limit_memory(target: &Target) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmData:")?.trim().strip_suffix(" kB"));
    let now = kib.unwrap().trim().parse::<u64>().unwrap() << 10;
    set_limit(Resource::Data, now + (target.memory_mib << 20));
    set_limit(Resource::Core, 0);
}

/// Limits this process's CPU time to the time that it has used, and the target's limit.
fn limit_time(target: &Target) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks = |index: usize| fields.split(' ').nth(index).unwrap().parse::<u64>().unwrap();
    // The fields of user time and system time (proc_pid_stat(5)).
    let used = (ticks(11) + ticks(12)).div_ceil(TICKS);
    set_limit(Resource::Cpu, used + target.seconds);
}

fn set_limit(resource: Resource, limit: u64) {
    let maximum = getrlimit(resource).maximum;
    let current = Some(maximum.map_or(limit, |maximum| maximum.min(limit)));
    setrlimit(resource, Rlimit { current, maximum }).unwrap();
}
