//! `--trace`: what a run's file holds, however the run ends.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oven_testing::{LocalWorld, stderr};
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

const TOKEN: &str = "hunter2-9f8e7d6c";
/// For what a busy machine may take to come to a point.
const PATIENCE: Duration = Duration::from_secs(60);

/// A region with a small Debian as `small`, and definitions on it, each of which runs a script.
fn world(definitions: &[(&str, &str)]) -> LocalWorld {
    let world = LocalWorld::empty();
    let base = std::env::var("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test root");
    world.expect(0, &["import", &base, "--name", "small"]);
    for (name, script) in definitions {
        let toml = "from = { name = \"small\" }\n[[run]]\nscript = \"s.sh\"\nsecrets = [\"TOKEN\"]\n";
        world.write(&format!("{name}/image.toml"), toml);
        world.write(&format!("{name}/s.sh"), &format!("#!/bin/sh -e\n# {name}\n{script}\n"));
    }
    world
}

struct Span {
    track: String,
    lane: u64,
    name: String,
    from: u64,
    to: u64,
    told: Value,
}

/// What the trace holds. Fails if it is no JSON, holds the secret, or if spans of a lane overlap and do not nest.
fn spans(world: &LocalWorld) -> Vec<Span> {
    let text = std::fs::read_to_string(world.path("trace.json")).unwrap();
    assert!(!text.contains("hunter2") && !text.contains("9f8e7d6c"), "{text}");
    let trace: Value = serde_json::from_str(&text).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let tracks: BTreeMap<_, _> = events
        .iter()
        .filter(|event| event["name"] == "process_name")
        .map(|event| (event["pid"].as_u64().unwrap(), event["args"]["name"].as_str().unwrap().to_owned()))
        .collect();
    let of = |event: &Value| {
        let (ts, dur) = (event["ts"].as_u64().unwrap(), event["dur"].as_u64().unwrap());
        Span {
            track: tracks[&event["pid"].as_u64().unwrap()].clone(),
            lane: event["tid"].as_u64().unwrap(),
            name: event["name"].as_str().unwrap().to_owned(),
            from: ts,
            to: ts + dur,
            told: event["args"].clone(),
        }
    };
    let spans: Vec<_> = events.iter().filter(|event| event["ph"] == "X").map(of).collect();
    for a in &spans {
        for b in spans.iter().filter(|b| (&b.track, b.lane) == (&a.track, a.lane)) {
            let crosses = a.from < b.from && b.from < a.to && a.to < b.to;
            assert!(!crosses, "{} [{}, {}] and {} [{}, {}]", a.name, a.from, a.to, b.name, b.from, b.to);
        }
    }
    spans
}

fn find<'s>(spans: &'s [Span], track: &str, name: &str) -> &'s Span {
    let found: Vec<_> =
        spans.iter().filter(|span| span.track == track && span.name.starts_with(name)).collect();
    let all: Vec<_> = spans.iter().map(|span| format!("{}: {}", span.track, span.name)).collect();
    assert_eq!(found.len(), 1, "{name} of {track} in {all:#?}");
    found[0]
}

#[allow(clippy::disallowed_methods, reason = "a test has no runtime to block")]
fn pause(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

fn assert_inside(inner: &Span, outer: &Span) {
    let nested = inner.lane == outer.lane && outer.from <= inner.from && inner.to <= outer.to;
    assert!(nested, "{} is not inside of {}", inner.name, outer.name);
}

#[test]
fn a_bake_is_traced_from_its_steps_to_their_commands() {
    let world = world(&[("web", "echo $TOKEN"), ("db", "true")]);
    let args = ["bake", "web", "db", "--trace", "trace.json"];
    let output = world.command(&args).env("TOKEN", TOKEN).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let all = spans(&world);
    for track in ["web", "db"] {
        let whole = find(&all, track, "baking ");
        assert_eq!(whole.told["ended"], "baked");
        for step in ["checking out the disk", "running s.sh", "taking the snapshot", "registering "] {
            let step = find(&all, track, step);
            assert_inside(step, whole);
            assert_eq!(step.told["done"], true);
        }
        let step = find(&all, track, "running s.sh");
        let commands = all.iter().filter(|span| span.track == track && span.told["argv"].is_string());
        let inside: Vec<_> = commands.filter(|span| span.from >= step.from && span.to <= step.to).collect();
        assert!(inside.iter().any(|span| span.name.contains("s.sh")), "no command of the script");
        inside.iter().for_each(|span| assert_inside(span, step));
    }
    // The table of times and the trace say the same. They look at the clock one after the other, and a busy machine may
    // do something else in between, but not every time.
    let mut differ = Vec::new();
    for _ in 0..8 {
        differ = differences(&world);
        if differ.is_empty() {
            break;
        }
    }
    assert!(differ.is_empty(), "{differ:?}");
}

/// By how much a bake's table of times and its trace differ, phase by phase.
fn differences(world: &LocalWorld) -> Vec<String> {
    let output = world.command(&["--json", "bake", "--force", "web", "--trace", "trace.json"]);
    let output = { output }.env("TOKEN", TOKEN).output().unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let times = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let times = { times }.find(|event| event["event"] == "times").unwrap();
    let (all, phases) = (spans(world), times["phases_ms"].as_object().unwrap());
    assert!(!phases.is_empty(), "{times}");
    let told = phases.iter().filter_map(|(phase, ms)| {
        let sum: u64 = all.iter().filter(|s| s.told["phase"] == *phase).map(|s| s.to - s.from).sum();
        let same = (sum / 1000).abs_diff(ms.as_u64().unwrap()) <= 20;
        (!same).then(|| format!("{phase}: {sum} us and {ms} ms"))
    });
    told.collect()
}

#[test]
fn a_bake_that_fails_is_traced_until_then() {
    let world = world(&[("web", "echo \"$TOKEN\" >&2; exit 3")]);
    let output =
        world.command(&["bake", "web", "--trace", "trace.json"]).env("TOKEN", TOKEN).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    let all = spans(&world);
    assert_eq!(find(&all, "web", "baking web").told["ended"], "step");
    let step = find(&all, "web", "running s.sh");
    assert!(step.told["done"].is_null());
    let command = all.iter().find(|span| span.told["status"].as_str().is_some_and(|s| s.contains('3')));
    assert_inside(command.expect("the command's status"), step);
}

#[test]
fn a_bake_that_is_stopped_or_killed_leaves_a_trace_that_can_be_read() {
    let world = world(&[("web", "sleep 100")]);
    for (signal, code) in [(Signal::SIGTERM, Some(130)), (Signal::SIGKILL, None)] {
        let mut command = world.command(&["bake", "web", "--trace", "trace.json"]);
        let mut child =
            command.env("TOKEN", TOKEN).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        // Once the bake has come to its steps.
        let start = Instant::now();
        let path = world.path("trace.json");
        while !std::fs::read_to_string(&path).is_ok_and(|text| text.contains("checking out")) {
            assert!(start.elapsed() < PATIENCE, "no step in the trace");
            pause(10);
        }
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), code);
        let all = spans(&world);
        assert_eq!(find(&all, "web", "checking out").told["done"], true);
        let whole = all.iter().find(|span| span.name.starts_with("baking"));
        match code {
            Some(_) => assert_eq!(whole.expect("it ended").told["ended"], "interrupted"),
            None => assert!(whole.is_none(), "nobody ended it"),
        }
        let start = Instant::now();
        while !world.traces().is_empty() {
            assert!(start.elapsed() < PATIENCE, "{:?}", world.traces());
            pause(50);
        }
        world.expect(0, &["sweep"]);
        world.assert_no_traces(signal.as_str());
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_trace_is_no_part_of_a_definition_and_has_to_be_a_file() {
    let world = world(&[("web", "true")]);
    let (_, error) = world.expect(3, &["bake", "web", "--trace", "web/trace.json"]);
    assert!(error.contains("the trace web/trace.json is inside the directory web"), "{error}");
    assert!(!world.path("web/trace.json").exists());
    let (_, error) = world.expect(2, &["bake", "web", "--trace", "/dev/null"]);
    assert!(error.contains("/dev/null: it is not a regular file"), "{error}");
    let (out, _) = world.expect(2, &["bake", "web", "--json", "--trace", "/no/such/t.json"]);
    let last: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!(last["exit_code"], 2, "{last}");
}
