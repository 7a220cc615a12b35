//! A step that has the operator's terminal.

use super::{HELPER, MINUTE, block_on};
use oven::sandbox;
use oven_testing::BusyboxImage;
use oven_testing::busybox_image::spec_in;
use oven_testing::programs::own_test;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Not a test of its own: the process that has a terminal in the next one.
#[test]
fn parent_with_a_terminal() {
    let Some(root) = std::env::var_os("OVEN_STEP_TERMINAL") else { return };
    let script = "[ -t 0 ] && [ -t 1 ] && echo terminal $TERM; trap 'echo interrupted; while [ ! -e /tmp/go ]; do sleep 0.02; done; exit 7' INT; echo ready; \
         while :; do sleep 0.05; done";
    let mut spec = spec_in(Path::new(&root), &["sh", "-c", script]);
    spec.interactive = true;
    let stdin = rustix::stdio::stdin();
    let before = rustix::termios::tcgetpgrp(stdin).unwrap();
    let exit = block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |_| ())).unwrap();
    let after = rustix::termios::tcgetpgrp(stdin).unwrap();
    let unread = rustix::io::ioctl_fionread(stdin).unwrap();
    println!("ended: {:?} {}, unread: {unread}", exit.status, before == after);
}

#[test]
fn an_interactive_step_has_the_terminal_and_its_signals() {
    let image = BusyboxImage::new();
    let program = std::env::current_exe().unwrap();
    let arguments = own_test(module_path!(), "parent_with_a_terminal").join(" ");
    let command = format!("{} {arguments}", program.display());
    let mut terminal = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .env("OVEN_STEP_TERMINAL", image.root())
        .env("TERM", "vt220")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test needs script, of util-linux");
    let mut keys = terminal.stdin.take().unwrap();
    let mut seen = Vec::new();
    for line in BufReader::new(terminal.stdout.take().unwrap()).lines().map_while(Result::ok) {
        let line = line.trim_end().to_owned();
        if line.ends_with("ready") {
            keys.write_all(b"\x03").unwrap();
            keys.flush().unwrap();
        }
        if line.ends_with("interrupted") {
            // As a terminal answers when it is asked what it is.
            keys.write_all(b"\x1b[?62;c\n").unwrap();
            keys.flush().unwrap();
        }
        // It is there: the terminal shows it.
        if line.contains("?62;c") {
            fs::write(image.path("tmp/go"), "").unwrap();
        }
        seen.push(line);
    }
    terminal.wait().unwrap();
    let text = seen.join("\n");
    assert!(text.contains("terminal vt220"), "{text}");
    assert!(text.contains("interrupted"), "{text}");
    assert!(text.contains("ended: Exited(7) true, unread: 0"), "{text}");
}
