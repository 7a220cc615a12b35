//! What a person sees while packages are downloaded from a slow mirror.

use super::archive::{Archive, Key};
use oven_testing::{ImageReader, LocalWorld, Terminal, pause};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const PACKAGES: usize = 65;
/// The size of a package in bytes.
const SIZE: usize = 150_000;
const RATE: u64 = 1_500_000;
const CAPTURE_INTERVAL: Duration = Duration::from_millis(500);
/// The longest time for which the screen may stay the same while bytes arrive.
const STANDSTILL: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(180);
const MARK: &str = "$ oven bake";

fn name(index: usize) -> String {
    match index % 3 {
        0 => format!("lib{index}"),
        1 => format!("library-of-middle-length-{index}"),
        _ => format!("linux-image-6.1.0-{index:02}-cloud-amd64"),
    }
}

/// Builds a package with a file of `SIZE` bytes.
fn build(dir: &Path, name: &str) -> std::path::PathBuf {
    let tree = dir.join(name);
    fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    fs::create_dir_all(tree.join("usr/share")).unwrap();
    let control = format!(
        "Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Test <test@example.org>\nDescription: a test\n"
    );
    fs::write(tree.join("DEBIAN/control"), control).unwrap();
    fs::write(tree.join("usr/share").join(name), vec![b'x'; SIZE]).unwrap();
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

/// The screen from time to time, until the program ends.
fn captures(terminal: &mut Terminal) -> Vec<(Instant, Vec<String>)> {
    let (mut all, begun) = (Vec::new(), Instant::now());
    while !terminal.has_ended() {
        assert!(begun.elapsed() < PATIENCE, "{:#?}", terminal.rows());
        all.push((Instant::now(), terminal.rows()));
        pause(CAPTURE_INTERVAL);
    }
    all
}

/// Whether a row shows a download, with its counted packages or the package's name.
fn is_download(row: &str) -> bool {
    let last = row.split_whitespace().last().unwrap_or_default();
    let has_name = || (0..PACKAGES).any(|index| last == name(index));
    row.starts_with("  … ") && (row.contains(&format!("/{PACKAGES}")) || has_name())
}

/// Checks the captures during the downloads. `lines` is the highest number of lines of running steps.
fn check(captures: &[(Instant, Vec<String>)], columns: u16, lines: usize) {
    let names: Vec<_> = (0..PACKAGES).map(name).collect();
    let during: Vec<_> =
        captures.iter().filter(|(_, rows)| rows.iter().any(|row| is_download(row))).collect();
    assert!(during.len() >= 6, "{columns} columns: only {} captures of a download", during.len());
    for (_, rows) in &during {
        let screen = format!("{columns} columns: {rows:#?}");
        assert_eq!(rows[0], MARK, "it scrolled: {screen}");
        let running = rows.iter().filter(|row| row.starts_with("  … ")).count();
        assert!((1..=lines).contains(&running), "{screen}");
        for row in rows.iter().filter(|row| is_download(row)) {
            let last = row.split_whitespace().last().unwrap();
            let has_name = last.chars().next().is_some_and(|c| c == 'l');
            let fits = names.iter().any(|name| last == name);
            assert!(fits || !has_name && !row.contains("lib") && !row.contains("linux-"), "{screen}");
        }
    }
    let mut since = during[0];
    for capture in &during {
        if capture.1 != since.1 {
            since = capture;
        }
        let time = capture.0.duration_since(since.0);
        assert!(time <= STANDSTILL, "{columns} columns: the screen stood still for {time:?}: {:#?}", since.1);
    }
}

#[test]
fn a_slow_download_moves_at_every_width() {
    let (archive, key) = archive(RATE);
    for columns in [40, 80, 200] {
        let world = world(&archive, &key, &["web"]);
        let mut terminal = Terminal::open(world.command(&["bake", "web"]), columns, 24, MARK);
        let captures = captures(&mut terminal);
        let (code, all) = terminal.end();
        assert_eq!(code, Some(0), "{all:#?}");
        check(&captures, columns, 2);
        let numbers = |row: &String| row.contains(" MB/s") && row.contains("/10 MB") && row.contains("~");
        let shown =
            captures.iter().flat_map(|(_, rows)| rows).filter(|row| is_download(row) && numbers(row)).count();
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
        assert!(!text.contains("  … "), "a line of a running step remained: {text}");
        assert_eq!(text.matches("✓ downloading 65 packages").count(), 1, "{text}");
    }
}

#[test]
fn four_slow_downloads_fit_twelve_rows() {
    let (archive, key) = archive(4 * RATE);
    let names = ["a", "b", "c", "d"];
    let world = world(&archive, &key, &names);
    let command = world.command(&[&["bake", "--jobs", "4"][..], &names].concat());
    let mut terminal = Terminal::open(command, 80, 12, MARK);
    let captures = captures(&mut terminal);
    let (code, all) = terminal.end();
    assert_eq!(code, Some(0), "{all:#?}");
    check(&captures, 80, 11);
    let most = captures.iter().map(|(_, rows)| rows.iter().filter(|row| is_download(row)).count()).max();
    assert_eq!(most, Some(4), "each image has its line");
    let text = all.join("\n");
    for image in names {
        assert!(
            text.contains(&format!("{image}  baked  ")) || text.contains(&format!("  {image}")),
            "{text}"
        );
    }
    assert!(text.contains(", packages: 65 installed"), "{text}");
}

#[test]
fn without_a_terminal_the_log_has_lines_and_no_cursor_movements() {
    let (archive, key) = archive(0);
    let world = world(&archive, &key, &["web"]);
    let (out, err) = world.expect(0, &["bake", "web"]);
    assert!(out.starts_with("ami-") && !err.contains('\x1b'), "{err}");
    assert!(err.contains("  downloading 65 packages and dependencies ("), "{err}");
    let log = fs::read_dir(world.region().join("logs")).unwrap().flatten().next().unwrap();
    let log = fs::read_to_string(log.path()).unwrap();
    assert!(
        log.contains("Unpacking lib0") && !log.contains("dlstatus:") && !log.contains("pmstatus:"),
        "{log}"
    );
    assert!(log.contains("packages: 65 installed"), "{log}");
    // The events have the numbers.
    world.expect(0, &["--json", "bake", "--force", "web"]);
}
