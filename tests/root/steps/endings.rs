//! How a step ends: by itself, by a signal, by its time or with oven; and that nothing of it lives on.

use super::{
    HELPER, Loop, MINUTE, NONE, block_on, marker, marker_of, mounted, output, processes, run, shim, try_run,
};
use oven::sandbox;
use oven::sandbox::output::OutputSink;
use oven::sandbox::spec::{ExitStatus, StepExit, StepSpec};
use oven::secrets::Secrets;
use oven::sys::namespaces;
use oven_testing::BusyboxImage;
use oven_testing::busybox_image::spec_in;
use oven_testing::programs::{own_test, write_program};
use oven_testing::ring;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use sys_mount::Mount;

#[test]
fn exit_codes_and_signals_are_reported() {
    let image = BusyboxImage::new();
    let status = |argv: &[&str]| run(&image.spec(argv));
    assert_eq!(status(&["true"]).0.status, ExitStatus::Exited(0));
    assert_eq!(status(&["sh", "-c", "exit 42"]).0.status, ExitStatus::Exited(42));
    assert_eq!(status(&["sh", "-c", "kill -9 $$"]).0.status, ExitStatus::Signaled(9));
    assert_eq!(status(&["sh", "-c", "kill -15 $$"]).0.status.to_string(), "killed by SIGTERM");
    let (exit, lines) = status(&["no-such-program"]);
    assert_eq!(exit.status, ExitStatus::Exited(127));
    assert_eq!(lines, ["oven: no-such-program: the program was not found in the image"]);
    write_program(&image.path("bin/orphan"), "#!/bin/no-such-shell\n");
    let (exit, lines) = status(&["orphan"]);
    assert_eq!(exit.status, ExitStatus::Exited(126));
    assert!(lines[0].contains("its interpreter is not in the image"), "{lines:?}");
    fs::write(image.path("bin/plain"), "").unwrap();
    assert_eq!(status(&["plain"]).0.status, ExitStatus::Exited(126));
}

#[test]
fn output_is_lines_in_order_and_bounded() {
    let image = BusyboxImage::new();
    let lines = output(&image.shell("echo one; echo two >&2; printf three"));
    assert_eq!(lines, ["one", "two", "three"]);
    let (mut bytes, mut last) = (0, String::new());
    let spec = image.shell(
        "yes 0123456789012345678901234567890123456789012345678901234567890123456789 | head -c 200000000",
    );
    let exit = block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |line| {
        bytes += line.len() + 1;
        line.clone_into(&mut last);
    }));
    assert!(exit.unwrap().status.success());
    assert_eq!(last, "(the output is longer than 64 MiB and is cut off)");
    assert!(bytes < 65 << 20, "{bytes}");
}

#[test]
fn an_answer_is_standard_output_alone() {
    let image = BusyboxImage::new();
    let ask = |script: &str| {
        let (mut answer, mut lines) = (Vec::new(), Vec::new());
        let mut sink = OutputSink::Answer {
            output: &mut |bytes| answer.extend_from_slice(bytes),
            on_line: &mut |line| lines.push(line.to_owned()),
        };
        let (spec, secrets) = (image.shell(script), Secrets::default());
        let exit =
            block_on(sandbox::run_with(Path::new(HELPER), &spec, &secrets, MINUTE, &mut sink)).unwrap();
        assert_eq!(exit.status, ExitStatus::Exited(0));
        (answer, lines)
    };
    let (answer, lines) = ask("echo one; echo 'warning: x' >&2; printf 'two\\r\\n\\n\\377'; echo again >&2");
    assert_eq!(answer, b"one\ntwo\r\n\n\xff");
    assert_eq!(lines, ["warning: x", "again"]);
    // Both pipes are read, even if one of them is full. A line may be longer than the lines of other steps.
    let (answer, lines) =
        ask("head -c 3000000 /dev/zero | tr '\\0' x; yes warning | head -n 100000 >&2; echo end");
    assert_eq!((answer.len(), lines.len()), (3_000_004, 100_000));
    let (answer, lines) = ask("exec 2>&-; echo one");
    assert_eq!((answer.as_slice(), lines.len()), (&b"one\n"[..], 0));
}

#[test]
fn daemons_are_killed_and_named() {
    let image = BusyboxImage::new();
    let marker = &marker("daemon-1");
    let mut spec = image.shell(
        // It ends when all of them are what they become: one that was only forked has its parent's name.
        "(setsid sleep 1000 >/dev/null 2>&1 &); (trap '' HUP; sleep 1001 &) ; setsid sh -c 'trap : TERM HUP; sleep 1002; :' & \
         n=0; while [ $n != 3 ]; do n=0; for file in /proc/[0-9]*/comm; do read name < $file && [ $name = sleep ] && n=$((n+1)); done; done 2>/dev/null; \
         echo done",
    );
    spec.env.insert("MARKER".into(), marker.into());
    let started = Instant::now();
    let (exit, lines) = run(&spec);
    assert_eq!(exit.status, ExitStatus::Exited(0));
    assert_eq!(lines, ["done"]);
    let mut left = exit.surviving_processes;
    left.sort();
    assert_eq!(left, ["sh", "sleep", "sleep", "sleep"]);
    assert!(started.elapsed() < MINUTE / 2, "standard output held open hung the step");
    assert_eq!(processes(marker), NONE);
    assert!(!mounted(&image));
}

#[test]
fn what_ends_a_moment_later_is_no_daemon() {
    let image = BusyboxImage::new();
    // It wakes when the program is gone.
    let script =
        "busybox mkfifo /root/end; (read nothing < /root/end; echo late) & exec 3> /root/end; echo early";
    assert_eq!(output(&image.shell(script)), ["early", "late"]);
}

/// A step that says `up` and takes too long: how it ended, its output, and how long that took once its time was over.
/// It gets more time if it was ended before it said so.
fn timed_out(spec: &StepSpec, millis: u64) -> (StepExit, Vec<String>, Duration) {
    let mut timeout = Duration::from_millis(millis);
    loop {
        let started = Instant::now();
        let (exit, lines) = try_run(spec, timeout).unwrap();
        let took = started.elapsed().saturating_sub(timeout);
        if lines.first().is_some_and(|line| line == "up") || timeout > MINUTE {
            return (exit, lines, took);
        }
        timeout *= 4;
    }
}

#[test]
fn a_step_that_takes_too_long_is_ended() {
    let image = BusyboxImage::new();
    let marker = &marker("timeout-1");
    let mut spec = image.shell("trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done");
    spec.env.insert("MARKER".into(), marker.into());
    let (exit, lines, took) = timed_out(&spec, 400);
    assert_eq!((exit.status, lines), (ExitStatus::TimedOut, vec!["up".to_owned(), "bye".to_owned()]));
    // Nobody waits for the grace of one that ignores it.
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!(processes(marker), NONE);
}

#[test]
fn a_step_that_ignores_sigterm_is_killed() {
    let image = BusyboxImage::new();
    let marker = &marker("timeout-2");
    let mut spec =
        image.shell("trap '' TERM INT HUP; echo up; (setsid sleep 1000 &); while :; do sleep 1; done");
    spec.env.insert("MARKER".into(), marker.into());
    let (exit, _, took) = timed_out(&spec, 200);
    assert_eq!(exit.status, ExitStatus::TimedOut);
    assert!(took > Duration::from_secs(10) && took < Duration::from_secs(30), "{took:?}");
    assert_eq!(processes(marker), NONE);
    assert!(!mounted(&image));
}

#[test]
fn dropping_the_future_kills_all_and_waits() {
    let image = BusyboxImage::new();
    let before = image.listing();
    let marker = &marker("drop-1");
    let mut spec = image.shell("(setsid sh -c \"trap '' TERM; sleep 1000\" &); echo up; sleep 1000");
    spec.env.insert("MARKER".into(), marker.into());
    spec.shims.push(shim("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755));
    for delay in [0, 1, 2, 3, 5, 8, 13, 200] {
        block_on(async {
            let mut ignore = |_: &str| ();
            let run = sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut ignore);
            let ended = tokio::time::timeout(Duration::from_millis(delay), run).await;
            assert!(ended.is_err(), "it should still run");
            assert_eq!(processes(marker), NONE, "after {delay} ms");
            assert!(!mounted(&image), "after {delay} ms");
            assert_eq!(image.listing(), before, "after {delay} ms");
        });
    }
}

/// Not a test of its own: the process that the next test kills.
#[test]
fn parent_that_is_killed() {
    let Some(root) = std::env::var_os("OVEN_STEP_PARENT") else { return };
    let mut spec = spec_in(Path::new(&root), &["sh", "-c", "(setsid sleep 1000 &); echo up; sleep 1000"]);
    spec.env.insert("MARKER".into(), marker("parent"));
    let run = block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |line| println!("{line}")));
    panic!("the step ended: {run:?}");
}

#[test]
fn sigkill_of_oven_kills_the_step() {
    let image = BusyboxImage::new();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(own_test(module_path!(), "parent_that_is_killed"))
        .env("OVEN_STEP_PARENT", image.root())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let marker = &marker_of("parent", parent.id());
    let lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.ends_with("up")), "the step did not start");
    // One that executes a program at this moment has no environment.
    let up = Instant::now();
    while processes(marker).len() < 2 {
        assert!(up.elapsed() < MINUTE, "{:?}", processes(marker));
        std::thread::yield_now();
    }
    parent.kill().unwrap();
    assert_eq!(parent.wait().unwrap().signal(), Some(9));
    let killed = Instant::now();
    while !processes(marker).is_empty() || mounted(&image) {
        assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", processes(marker));
        std::thread::yield_now();
    }
}

/// What a bake does between steps and the commit: nothing may hold the disk for a moment longer than the step lives.
#[test]
fn the_disk_is_free_when_a_step_has_ended() {
    // A process that another test begins has a copy of an open descriptor for a moment.
    let _ring = ring::exclusive();
    let disk = Loop::new(32);
    let made = Command::new("mkfs.ext4").arg("-q").arg(&disk.node).status().unwrap();
    assert!(made.success());
    let template = BusyboxImage::new();
    let copied = |to: &Path| {
        let from = template.root().join(".");
        assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
    };
    let place = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let test = scope.spawn(|| {
            namespaces::private_mounts().unwrap();
            for turn in 0..10 {
                Mount::builder().fstype("ext4").mount(&disk.node, place.path()).unwrap();
                if turn == 0 {
                    copied(place.path());
                }
                let mut spec = template.shell("(setsid sleep 1000 &) ; sleep 0.01; touch /root/file");
                spec.root = place.path().to_owned();
                spec.throwaway = turn % 2 == 1;
                if turn < 6 {
                    run(&spec);
                } else {
                    spec.argv = vec!["sleep".into(), "1000".into()];
                    let mut ignore = |_: &str| ();
                    block_on(async {
                        let run = sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut ignore);
                        assert!(tokio::time::timeout(Duration::from_millis(4 * turn), run).await.is_err());
                    });
                }
                rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::empty()).unwrap();
                let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL;
                rustix::fs::open(&disk.node, flags, rustix::fs::Mode::empty())
                    .unwrap_or_else(|error| panic!("held in turn {turn}: {error}"));
            }
        });
        test.join().unwrap();
    });
}
