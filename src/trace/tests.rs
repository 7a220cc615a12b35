use super::*;

fn create(path: &Path) -> Result<Trace> {
    Trace::create(path, |_| None)
}

fn trace() -> (tempfile::TempDir, Trace) {
    let dir = tempfile::tempdir().unwrap();
    let trace = create(&dir.path().join("trace.json")).unwrap();
    (dir, trace)
}

/// Returns all events. Panics if the file is not valid JSON.
fn events(dir: &tempfile::TempDir) -> Vec<Value> {
    let text = std::fs::read(dir.path().join("trace.json")).unwrap();
    let mut trace: Value = serde_json::from_slice(&text).expect("the file is JSON at any time");
    serde_json::from_value(trace["traceEvents"].take()).unwrap()
}

/// Returns all spans as (lane, name, from, to), in the order of the file.
fn spans(dir: &tempfile::TempDir) -> Vec<(u64, String, u64, u64)> {
    let of = |event: &Value| {
        let (ts, dur) = (event["ts"].as_u64().unwrap(), event["dur"].as_u64().unwrap());
        (event["tid"].as_u64().unwrap(), event["name"].as_str().unwrap().to_owned(), ts, ts + dur)
    };
    events(dir).iter().filter(|event| event["ph"] == "X").map(of).collect()
}

#[test]
fn the_file_is_valid_after_every_event() {
    let (dir, trace) = trace();
    assert!(events(&dir).is_empty());
    let track = trace.track("web");
    let outer = track.span(Lane::Steps, "outer");
    assert!(spans(&dir).is_empty(), "it is written when it ends");
    let inner = track.within(outer.id(), Lane::Steps, "inner");
    drop(inner);
    assert_eq!(spans(&dir).len(), 1);
    // If oven were killed at this point, the file would be valid and would contain the span that has ended.
    let names: Vec<_> = events(&dir).iter().map(|event| event["name"].clone()).collect();
    assert_eq!(names, ["process_name", "process_sort_index", "thread_name", "thread_sort_index", "inner"]);
    drop(outer);
    let spans = spans(&dir);
    let ((lane, _, from, to), (outer_lane, _, begin, end)) = (&spans[0], &spans[1]);
    assert!(lane == outer_lane && begin <= from && to <= end, "{spans:?}");
}

#[test]
fn overlapping_spans_are_on_different_lanes() {
    let (dir, trace) = trace();
    let (one, two) = (trace.track("one"), trace.track("two"));
    let root = one.span(Lane::Steps, "root");
    let first = one.within(root.id(), Lane::Steps, "first");
    let concurrent = one.within(root.id(), Lane::Steps, "concurrent");
    let call = one.span(Lane::Ec2, "call");
    let other = one.span(Lane::Ec2, "other call");
    drop(call);
    let third = one.span(Lane::Ec2, "third call");
    let elsewhere = two.span(Lane::Steps, "elsewhere");
    drop((first, concurrent, other, third, elsewhere, root));
    let lane = |name: &str| spans(&dir).iter().find(|span| span.1 == name).map(|span| span.0).unwrap();
    assert_eq!(lane("root"), lane("first"));
    assert_ne!(lane("first"), lane("concurrent"));
    assert_eq!(lane("third call"), lane("call"), "a lane is used again");
    assert_ne!(lane("other call"), lane("call"));
    let tracks: std::collections::BTreeSet<_> =
        events(&dir).iter().map(|event| event["pid"].as_u64().unwrap()).collect();
    assert_eq!(tracks.len(), 2);
}

#[test]
fn a_span_ends_the_spans_inside_of_it() {
    let (dir, trace) = trace();
    let track = trace.track("web");
    let outer = track.span(Lane::Steps, "outer");
    let inner = track.within(outer.id(), Lane::Steps, "inner");
    drop(outer);
    assert_eq!(spans(&dir).len(), 2);
    drop(inner);
    assert_eq!(spans(&dir).len(), 2, "a span is written once");
    let open = track.span(Lane::Waits, "a volume");
    trace.end().unwrap();
    let last = events(&dir).pop().unwrap();
    assert_eq!((&last["name"], &last["args"]["unfinished"]), (&json!("a volume"), &json!(true)));
    drop(open);
    track.mark("too late");
    assert_eq!(events(&dir).pop().unwrap(), last);
}

#[test]
fn secrets_are_masked_before_names_are_cut_off() {
    let (dir, trace) = trace();
    let secret = "hunter2-9f8e7d6c";
    let track = trace.track("web");
    let padding = "x".repeat(NAME_MAX - 4);
    let mut span = track.span(Lane::Steps, &format!("{padding}{secret}"));
    track.hide(&Secrets::of_test(&[("TOKEN", secret)]));
    span.add_arg("argv", format!("sh -c 'echo {secret}\x1b[2J'"));
    span.add_arg("many", json!([{"deep": secret}]));
    drop(span);
    track.mark(secret);
    let text = std::fs::read_to_string(dir.path().join("trace.json")).unwrap();
    assert!(!text.contains("hunt") && !text.contains('\x1b') && !text.contains("\\u001b"), "{text}");
    assert!(text.contains(&format!("{padding}***")) && text.contains("echo ***"), "{text}");
}

#[test]
fn counters_are_written_from_time_to_time_and_at_the_end() {
    let (dir, trace) = trace();
    let counter = Arc::new(trace.track("web").counter("bytes fetched"));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let counter = counter.clone();
            std::thread::spawn(move || (0..1000).for_each(|_| counter.add(2)))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    drop(counter);
    let sums: Vec<_> = events(&dir).iter().filter_map(|event| event["args"]["sum"].as_u64()).collect();
    assert_eq!(sums.last(), Some(&8000));
    assert!(sums.len() < 1000, "{} events for 4000 blocks", sums.len());
}

#[tokio::test]
async fn a_future_has_its_track_and_others_have_none() {
    let (dir, trace) = trace();
    Track::here().span(Lane::Ec2, "nowhere").add_arg("a", 1);
    let follow = |name: &'static str| {
        trace.track(name).follow(async move {
            tokio::task::yield_now().await;
            drop(Track::here().span(Lane::Ec2, name));
        })
    };
    tokio::join!(follow("one"), follow("two"));
    // The order of the spans is not defined.
    let named: std::collections::BTreeSet<_> = events(&dir)
        .into_iter()
        .filter(|event| event["ph"] == "X")
        .map(|event| (event["pid"].as_u64().unwrap(), event["name"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(named, [(1, "one".to_owned()), (2, "two".to_owned())].into());
}

#[test]
fn a_write_error_is_reported_at_the_beginning_or_at_the_end_only() {
    for (path, what) in [
        ("/", "Is a directory"),
        ("/no/such/dir/t.json", "No such file"),
        ("/dev/null", "is not a regular file"),
    ] {
        let error = create(Path::new(path)).err().unwrap();
        assert_eq!(Kind::of(&error), Kind::Usage);
        assert!(error.to_string().contains(path) && error.to_string().contains(what), "{error}");
    }
    let (dir, trace) = trace();
    let pipe = dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    let error = create(&pipe).err().unwrap();
    assert_eq!(Kind::of(&error), Kind::Usage, "a pipe without a reader does not block: {error}");
    let track = trace.track("web");
    let path = dir.path().join("trace.json");
    trace.state().file = File::open(&path).unwrap();
    drop(track.span(Lane::Steps, "lost"));
    drop(track.span(Lane::Steps, "lost, too"));
    let error = format!("{:#}", trace.end().unwrap_err());
    assert!(error.contains("Bad file descriptor") && error.contains("trace.json"), "{error}");
    assert!(spans(&dir).is_empty());
}

#[test]
fn a_trace_is_private_and_replaces_only_a_trace() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mode = |name: &str| at(name).metadata().unwrap().permissions().mode() & 0o777;
    let refused = |name: &str, why: &str| {
        let error = create(&at(name)).err().unwrap_or_else(|| panic!("{name} is replaced"));
        assert_eq!(Kind::of(&error), Kind::Usage);
        assert!(error.to_string().contains(why), "{error}");
    };
    drop(create(&at("trace.json")).unwrap());
    assert_eq!(mode("trace.json"), 0o600);
    // A longer trace of an older oven is replaced as a whole.
    let old = std::fs::read_to_string(at("trace.json")).unwrap() + &" ".repeat(5000);
    std::fs::write(at("trace.json"), old).unwrap();
    std::fs::set_permissions(at("trace.json"), Permissions::from_mode(0o644)).unwrap();
    drop(create(&at("trace.json")).unwrap());
    assert_eq!(mode("trace.json"), 0o600);
    let text = std::fs::read_to_string(at("trace.json")).unwrap();
    assert!(text.len() < 1000 && serde_json::from_str::<Value>(&text).is_ok(), "{text}");
    std::fs::write(at("empty"), "").unwrap();
    drop(create(&at("empty")).unwrap());

    for text in ["precious", "{}", "{\"displayTimeUnit\": \"ns\", \"otherData\": "] {
        std::fs::write(at("other"), text).unwrap();
        refused("other", "it exists, and is not a trace of oven");
        assert_eq!(std::fs::read_to_string(at("other")).unwrap(), text);
    }
    symlink(at("other"), at("link")).unwrap();
    symlink(at("trace.json"), at("trace-link")).unwrap();
    symlink(at("nothing"), at("dangling")).unwrap();
    for name in ["link", "trace-link", "dangling"] {
        refused(name, "it is a link");
    }
    assert!(!at("nothing").exists());
    std::fs::hard_link(at("empty"), at("hard")).unwrap();
    refused("hard", "it has another name");
    let theirs = Trace::create(&at("empty"), |_| Some(12345)).err().unwrap();
    assert!(theirs.to_string().ends_with("belongs to user 12345, who is neither you nor root"), "{theirs}");
}
