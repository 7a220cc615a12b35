//! What a person sees while packages are downloaded from a slow mirror.

use super::archive::{Archive, Key};
use oven_testing::{ImageReader, LocalWorld, Terminal, full, pause, stderr};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const PACKAGES: usize = 65;
/// The size of a package in bytes.
const SIZE: usize = 50_000;
/// The size of the largest package. At 40 columns there is no room for numbers beside its name.
const LARGE: (&str, usize) = ("linux-image-6.1.0-28-cloud-amd64-dbg", 9_000_000);
const RATE: u64 = 1_500_000;
const CAPTURE_INTERVAL: Duration = Duration::from_millis(500);
/// The screen may stay the same while the mirror sends this many bytes. The mirror needs at least four seconds for them.
/// Some of them may still be in the sockets' buffers, and the machine may be busy.
const STANDSTILL: u64 = 4 * RATE;
const PATIENCE: Duration = Duration::from_secs(180);
const MARK: &str = "$ oven bake";

fn name(index: usize) -> String {
    match index % 3 {
        _ if index == PACKAGES / 2 => LARGE.0.to_owned(),
        0 => format!("lib{index}"),
        1 => format!("library-of-middle-length-{index}"),
        _ => format!("linux-image-6.1.0-{index:02}-cloud-amd64"),
    }
}

/// Builds a package with a file.
fn build(dir: &Path, name: &str) -> std::path::PathBuf {
    let tree = dir.join(name);
    fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    fs::create_dir_all(tree.join("usr/share")).unwrap();
    let control = format!(
        "Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Test <test@example.org>\nDescription: a test\n"
    );
    fs::write(tree.join("DEBIAN/control"), control).unwrap();
    let size = if name == LARGE.0 { LARGE.1 } else { SIZE };
    fs::write(tree.join("usr/share").join(name), vec![b'x'; size]).unwrap();
    let file = dir.join(format!("{name}_1.0_all.deb"));
    let built =
        Command::new("dpkg-deb").args(["--root-owner-group", "-Znone", "-b"]).arg(&tree).arg(&file).output();
    let built = built.unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    file
}

/// A region with a small Debian without other repositories, and the images `names`, which need all packages.
fn world(archive: &Archive, key: &Key, names: &[&str]) -> LocalWorld {
    let world = LocalWorld::empty();
    let raw = world.path("debian.raw");
    let base = std::env::var("OVEN_TEST_TINY").expect("OVEN_TEST_TINY is not set: run scripts/test root");
    assert!(Command::new("cp").arg("--sparse=always").arg(base).arg(&raw).status().unwrap().success());
    let disk = ImageReader::in_file(&raw);
    fs::write(world.path("empty"), "# none\n").unwrap();
    disk.change("rm /etc/apt/sources.list");
    disk.change(&format!("write {} /etc/apt/sources.list", world.path("empty").display()));
    world.expect(0, &["import", raw.to_str().unwrap(), "--name", "base"]);
    fs::remove_file(raw).unwrap();
    let packages: Vec<_> = (0..PACKAGES).map(|index| format!("{:?}", name(index))).collect();
    for image in names {
        let toml = format!(
            "from = {{ name = \"base\" }}\npackages = [{}]\n[[repository]]\nname = \"slow\"\nurl = \"{}\"\nkey = \
             \"key.asc\"\nsuite = \"stable\"\ncomponents = [\"main\"]\n",
            packages.join(", "),
            archive.url("")
        );
        world.write(&format!("{image}/image.toml"), &toml);
        world.write(&format!("{image}/key.asc"), &key.public);
    }
    world
}

fn archive(rate: u64) -> (Archive, Key) {
    let (archive, key, dir) = (Archive::new(), Key::new(), tempfile::tempdir().unwrap());
    let pool: Vec<_> = (0..PACKAGES)
        .map(|index| {
            let file = build(dir.path(), &name(index));
            archive.add(&file, file.file_name().unwrap().to_str().unwrap())
        })
        .collect();
    archive.publish("stable", "", &pool, Some(&key));
    archive.throttle(rate);
    (archive, key)
}

/// What the screen showed at a time.
struct Capture {
    rows: Vec<String>,
    /// How many bytes the mirror had sent.
    sent: u64,
}

/// The screen from time to time, until the program ends.
fn captures(terminal: &mut Terminal, archive: &Archive) -> Vec<Capture> {
    let (mut all, begun) = (Vec::new(), Instant::now());
    while !terminal.has_ended() {
        assert!(begun.elapsed() < PATIENCE, "{:#?}", terminal.rows());
        let sent = archive.sent();
        all.push(Capture { rows: terminal.rows(), sent });
        pause(CAPTURE_INTERVAL);
    }
    all
}

/// Whether a row is the line of a running step.
fn is_running(row: &str) -> bool {
    ["  … ", "  | ", "  / ", "  - ", "  \\ "].iter().any(|mark| row.starts_with(mark))
}

fn running(rows: &[String]) -> usize {
    rows.iter().filter(|row| is_running(row)).count()
}

/// Whether a row shows a download, with its counted packages or the package's name.
fn is_download(row: &str) -> bool {
    let last = row.split_whitespace().last().unwrap_or_default();
    let has_name = || (0..PACKAGES).any(|index| last == name(index));
    is_running(row) && (row.contains(&format!("/{PACKAGES}")) || has_name())
}

/// Checks the captures during the downloads. `lines` is the highest number of lines of running steps.
fn check(captures: &[Capture], columns: u16, lines: usize) {
    let names: Vec<_> = (0..PACKAGES).map(name).collect();
    let during: Vec<_> =
        captures.iter().filter(|capture| capture.rows.iter().any(|row| is_download(row))).collect();
    assert!(during.len() >= 4, "{columns} columns: only {} captures of a download", during.len());
    eprintln!("{columns} columns: {:#?}", during[during.len() / 2].rows);
    for Capture { rows, .. } in &during {
        let screen = format!("{columns} columns: {rows:#?}");
        assert_eq!(rows[0], MARK, "it scrolled: {screen}");
        assert!((1..=lines).contains(&running(rows)), "{screen}");
        for row in rows.iter().filter(|row| is_download(row)) {
            let last = row.split_whitespace().last().unwrap();
            let has_name = last.chars().next().is_some_and(|c| c == 'l');
            let fits = names.iter().any(|name| last == name);
            assert!(fits || !has_name && !row.contains("lib") && !row.contains("linux-"), "{screen}");
        }
    }
    let mut since = during[0];
    for capture in &during {
        if capture.rows != since.rows {
            since = capture;
        }
        let sent = capture.sent - since.sent;
        assert!(sent <= STANDSTILL, "{columns} columns: {sent} bytes came meanwhile: {:#?}", since.rows);
    }
}

/// A sample is the narrowest terminal. The others are tried with `--full`.
#[test]
fn a_slow_download_moves_at_every_width() {
    let (archive, key) = archive(RATE);
    let widths = [40, 80, 200];
    for columns in if full() { &widths[..] } else { &widths[..1] } {
        let (columns, world) = (*columns, world(&archive, &key, &["web"]));
        let mut terminal = Terminal::open(world.command(&["bake", "web"]), columns, 24, MARK);
        let captures = captures(&mut terminal, &archive);
        let (code, all) = terminal.end();
        assert_eq!(code, Some(0), "{all:#?}");
        check(&captures, columns, 2);
        let numbers = |row: &String| row.contains(" MB/s") && row.contains(" MB  ") && row.contains("~");
        let rows = captures.iter().flat_map(|capture| &capture.rows);
        let shown = rows.filter(|row| is_download(row) && numbers(row)).count();
        assert_eq!(
            shown > 0,
            columns > 40,
            "{columns} columns: numbers of bytes, the rate and the remaining time"
        );
        // The end is one screen: what came out, its size, the packages, the time.
        let text = all.join("\n");
        for words in ["baked: ami-", "size: ", "packages: 65 installed", "installed: ", "time: "] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(running(&all), 0, "a line of a running step remained: {text}");
        assert_eq!(text.matches("✓ downloading 65 packages").count(), 1, "{text}");
        let begin = all.iter().position(|row| row.contains("baked: ami-")).unwrap();
        let end = all.iter().rposition(|row| !row.is_empty()).unwrap();
        assert!(end - begin < 23, "the end does not fit the screen: {text}");
    }
}

#[test]
fn four_slow_downloads_fit_twelve_rows() {
    if !full() {
        eprintln!("not asked for: --jobs 4 is tried with --full");
        return;
    }
    let (archive, key) = archive(RATE);
    let names = ["a", "b", "c", "d"];
    let world = world(&archive, &key, &names);
    let command = world.command(&[&["bake", "--jobs", "4"][..], &names].concat());
    let mut terminal = Terminal::open(command, 80, 12, MARK);
    let captures = captures(&mut terminal, &archive);
    let (code, all) = terminal.end();
    assert_eq!(code, Some(0), "{all:#?}");
    check(&captures, 80, 11);
    let downloads = |capture: &Capture| capture.rows.iter().filter(|row| is_download(row)).count();
    assert_eq!(captures.iter().map(downloads).max(), Some(4), "each image has its line");
    let text = all.join("\n");
    for image in names {
        assert!(
            text.contains(&format!("{image}  baked  ")) || text.contains(&format!("  {image}")),
            "{text}"
        );
    }
    assert!(text.contains(", packages: 65 installed"), "{text}");
}

/// A definition whose script fails.
fn write_failing(world: &LocalWorld) {
    let toml = "from = { name = \"base\" }\n[[run]]\nscript = \"fail.sh\"\n";
    world.write("bad/image.toml", toml);
    world.write("bad/fail.sh", "#!/bin/sh\necho it cannot work\nexit 1\n");
}

#[test]
fn an_error_stands_above_the_lines_and_an_interrupt_leaves_none() {
    let (archive, key) = archive(RATE / 4);
    let world = world(&archive, &key, &["web"]);
    write_failing(&world);
    let terminal = Terminal::open(world.command(&["bake", "--jobs", "2", "web", "bad"]), 40, 24, MARK);
    let is_error = |row: &String| row.contains("bad: error: ");
    terminal.wait_until("an error and a download", |rows| {
        rows.iter().any(is_error) && rows.iter().any(|row| is_download(row))
    });
    let rows = terminal.rows();
    let first = rows.iter().position(|row| is_running(row)).unwrap();
    assert!(rows.iter().rposition(is_error).unwrap() < first, "{rows:#?}");
    for (columns, height) in [(60, 24), (30, 5), (40, 24)] {
        terminal.resize(columns, height);
        terminal.wait_until("a line for the new size", |rows| {
            let lines: Vec<_> = rows.iter().filter(|row| is_running(row)).collect();
            lines.len() == 1 && lines[0].contains("web")
        });
    }
    terminal.interrupt();
    let ended = terminal.ended();
    let text = ended.rows.join("\n");
    assert_ne!(ended.code, Some(0), "{text}");
    assert!(ended.is_cursor_visible && running(&ended.rows) == 0, "{text}");
    assert!(text.contains("it cannot work"), "{text}");
}

#[test]
fn without_a_terminal_the_log_has_lines_and_no_cursor_movements() {
    // So a whole download takes longer than the interval of the lines.
    let (archive, key) = archive(if full() { 350_000 } else { 0 });
    let world = world(&archive, &key, &["web"]);
    let (out, err) = world.expect(0, &["bake", "web"]);
    assert!(out.starts_with("ami-") && !err.contains('\x1b'), "{err}");
    assert!(err.contains("  downloading 65 packages and dependencies ("), "{err}");
    let mut lines = err.lines().filter(|line| line.starts_with("  still downloading 65 packages"));
    let has_numbers = |line: &str| line.contains("/65 packages, ") && line.contains(" MB, ");
    assert!(!full() || lines.any(has_numbers), "{err}");
    eprintln!("{err}");
    let log = fs::read_dir(world.region().join("logs")).unwrap().flatten().next().unwrap();
    let log = fs::read_to_string(log.path()).unwrap();
    assert!(
        log.contains("Unpacking lib0") && !log.contains("dlstatus:") && !log.contains("pmstatus:"),
        "{log}"
    );
    assert!(log.contains("packages: 65 installed"), "{log}");
    archive.throttle(0);
    // The events have the numbers, and standard error has nothing.
    let (out, err) = world.expect(0, &["--json", "bake", "--force", "web"]);
    let events: Vec<serde_json::Value> =
        out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect();
    assert!(events.iter().any(|event| event["event"] == "result"), "{out}");
    assert_eq!(err, "");
    if full() {
        modes(&world);
    }
}

/// Options and variables for the display.
fn modes(world: &LocalWorld) {
    write_failing(world);
    let bake = |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = world.command(&[args, &["bake", "--force", "web"][..]].concat());
        let output = command.envs(variables.iter().copied()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stderr(&output)
    };
    let redrawn = bake(&["--progress", "tty"], &[("NO_COLOR", "1")]);
    assert!(redrawn.contains("\x1b[") && !redrawn.contains("\x1b[32m"), "{redrawn}");
    assert_eq!(bake(&["-q"], &[]), "");
    let verbose = bake(&["-v"], &[]);
    let has_time = |line: &str| line.len() > 9 && line.as_bytes()[8] == b'Z' && line.as_bytes()[2] == b':';
    assert!(verbose.lines().all(has_time), "{verbose}");
    assert!(verbose.contains(" install ") && verbose.contains(" total "), "{verbose}");
    let bad = |variables: &[(&str, &str)]| {
        stderr(&world.command(&["bake", "bad"]).envs(variables.iter().copied()).output().unwrap())
    };
    let (plain, colored) = (bad(&[]), bad(&[("CLICOLOR_FORCE", "1")]));
    assert!(plain.contains("error: ") && !plain.contains('\x1b'), "{plain}");
    assert!(colored.contains("\x1b[1;31merror:\x1b[0m"), "{colored}");
    let mut command = world.command(&["bake", "--force", "web"]);
    command.env("TERM", "dumb");
    let (code, rows) = Terminal::open(command, 80, 24, MARK).end();
    assert_eq!((code, running(&rows)), (Some(0), 0), "{rows:#?}");
    assert!(rows.iter().any(|row| row.contains("  installing 65 packages (")), "{rows:#?}");
}
