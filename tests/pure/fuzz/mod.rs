//! Feeds damaged input to the parsers that read an image, a definition, a plugin's answer or a region.
//!
//! An input is a seed with random changes. Seeds are small real files in `tests/data/fuzz`. The name of the target, the
//! number of the run and the number of the input determine an input, so every finding can be repeated.
//!
//! The parsers run in another process, which the kernel limits in memory and CPU time ([`campaign`]). Without arguments,
//! the tests run a sample with a fixed number. `scripts/fuzz` runs for minutes, with another number each time.

mod campaign;
mod disks;
mod mutate;
mod parsers;
mod targets;

use campaign::{Budget, Outcome, WORKER};
use oven_testing::full;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::num::NonZero;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use targets::{TARGETS, Target};

/// The number of inputs of each target in the sample.
const SAMPLE: u64 = 500;
/// The run number of the sample.
const SAMPLE_RUN: u64 = 1;

/// Set by `scripts/fuzz`: the minutes that a run takes.
const MINUTES: &str = "OVEN_FUZZ_MINUTES";
/// Set by `scripts/fuzz`: the names of the targets, separated by spaces. Without them, all targets run.
const NAMES: &str = "OVEN_FUZZ_TARGETS";
/// Set by `scripts/fuzz`: the run number.
const RUN: &str = "OVEN_FUZZ_RUN";
/// Set by `scripts/fuzz`: the path of the only input.
const INPUT: &str = "OVEN_FUZZ_INPUT";

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Returns the targets that `scripts/fuzz` was asked for, or all targets.
fn chosen() -> Vec<&'static Target> {
    let names = variable(NAMES).unwrap_or_default();
    let names: Vec<_> = names.split_whitespace().collect();
    let known = || TARGETS.iter().map(|target| target.name).collect::<Vec<_>>().join(" ");
    for name in &names {
        assert!(TARGETS.iter().any(|target| target.name == *name), "no target is {name}: {}", known());
    }
    TARGETS.iter().filter(|target| names.is_empty() || names.contains(&target.name)).collect()
}

#[test]
fn damaged_input_harms_no_parser() {
    if let Ok(job) = std::env::var(WORKER) {
        return campaign::work(&job);
    }
    let targets = chosen();
    if let Some(input) = variable(INPUT) {
        let [target] = targets[..] else { panic!("an input needs exactly one target") };
        return campaign::repeat(target, Path::new(&input));
    }
    let minutes: Option<f64> = variable(MINUTES).map(|text| text.parse().expect("a number of minutes"));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let run = match (variable(RUN), minutes) {
        (Some(run), _) => run.parse().expect("a run number"),
        (None, Some(_)) => now(),
        (None, None) => SAMPLE_RUN,
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    // If there are fewer targets than threads, each target runs several times, with other numbers.
    let copies = minutes.map_or(1, |_| threads.div_ceil(targets.len()));
    let tasks: Vec<_> =
        (run..).take(copies).flat_map(|run| targets.iter().map(move |target| (*target, run))).collect();
    let budget = match minutes {
        Some(minutes) => {
            Budget::Time(Duration::from_secs_f64(minutes * 60.0 * threads as f64 / tasks.len() as f64))
        }
        None => Budget::Inputs(if full() { 100 * SAMPLE } else { SAMPLE }),
    };
    println!("run {run}");
    let outcomes = run_all(&tasks, budget, threads);
    let mut found = String::new();
    for ((target, run), outcome) in tasks.iter().zip(&outcomes) {
        let Outcome { inputs, accepted, slowest, findings } = outcome;
        let (name, slowest) = (target.name, slowest.as_secs_f64());
        println!(
            "{name:16} {inputs:>9} inputs, {accepted:>9} accepted, slowest {slowest:.3} s, {} findings",
            findings.len()
        );
        for finding in findings {
            let path = finding.path.display();
            writeln!(found, "{name}, run {run}, input {}: {}", finding.number, finding.what).unwrap();
            writeln!(found, "    repeat it: scripts/fuzz --input {path} {name}").unwrap();
        }
        assert!(*inputs > 0 || !findings.is_empty(), "{name}: no input was parsed");
    }
    println!("{} inputs", outcomes.iter().map(|outcome| outcome.inputs).sum::<u64>());
    assert!(found.is_empty(), "findings:\n{found}");
}

/// Runs targets, each with its run number, on this many threads. The outcomes have the order of the tasks.
fn run_all(tasks: &[(&Target, u64)], budget: Budget, threads: usize) -> Vec<Outcome> {
    let queue = Mutex::new(tasks.iter().enumerate());
    let next = || queue.lock().unwrap().next();
    let outcomes = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((index, (target, run))) = next() {
                    let outcome = campaign::run(target, *run, budget);
                    outcomes.lock().unwrap().push((index, outcome));
                }
            });
        }
    });
    let mut outcomes = outcomes.into_inner().unwrap();
    outcomes.sort_by_key(|(index, _)| *index);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

#[test]
fn every_seed_is_accepted() {
    for target in TARGETS {
        let seeds = mutate::seeds(target);
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        let mut world = parsers::World::new();
        for seed in seeds {
            assert!((target.parse)(&mut world, &seed.bytes), "{}: {}", target.name, seed.path.display());
        }
    }
}

#[test]
fn every_kind_of_finding_is_reported() {
    for (target, what) in [
        (&targets::PANICS, "panicked at"),
        (&targets::ALLOCATES, "memory allocation of"),
        (&targets::LOOPS, "needs more than 1 s of CPU time"),
        (&targets::RECURSES, "overflowed its stack"),
    ] {
        let seeds = mutate::seeds(target);
        let has_fault =
            |number: &u64| mutate::input(target, &seeds, SAMPLE_RUN, *number).contains(&targets::FAULT);
        let number = (0..).find(has_fault).unwrap();
        let outcome = campaign::run(target, SAMPLE_RUN, Budget::Inputs(number + 1));
        let [finding] = &outcome.findings[..] else { panic!("{} findings", outcome.findings.len()) };
        assert_eq!((finding.number, outcome.inputs), (number, number), "{}", target.name);
        assert!(finding.what.contains(what), "{what:?} is not in {:?}", finding.what);
        assert!(std::fs::read(&finding.path).unwrap().contains(&targets::FAULT), "another input was saved");
    }
}

#[test]
fn a_run_continues_after_a_finding() {
    let outcome = campaign::run(&targets::PANICS, SAMPLE_RUN, Budget::Inputs(100));
    let numbers: BTreeSet<_> = outcome.findings.iter().map(|finding| finding.number).collect();
    assert!(numbers.len() > 1 && numbers.len() == outcome.findings.len(), "{numbers:?}");
}

#[test]
fn an_input_depends_only_on_its_numbers() {
    let target = &TARGETS[0];
    let seeds = mutate::seeds(target);
    let inputs = |run| (0..200).map(|number| mutate::input(target, &seeds, run, number)).collect::<Vec<_>>();
    let (first, again, other) = (inputs(1), inputs(1), inputs(2));
    assert_eq!(first, again);
    let differ = first.iter().zip(&other).filter(|(a, b)| a != b).count();
    assert!(differ > 150, "only {differ} of 200 inputs differ");
    let distinct: BTreeSet<_> = first.iter().collect();
    assert!(distinct.len() > 180, "only {} of 200 inputs are distinct", distinct.len());
}
