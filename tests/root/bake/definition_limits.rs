//! A definition that takes long to read does not delay the end of a bake.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A Debian package whose data is a hole of many GiB. Its digest takes long.
fn huge_package(path: &std::path::Path, data: u64) {
    let member =
        |name: &str, size: u64| format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, "100644");
    let text = b"Package: huge\nVersion: 1\nArchitecture: all\n";
    let mut header = tar::Header::new_gnu();
    header.set_size(text.len() as u64);
    header.set_mode(0o644);
    let mut control = tar::Builder::new(Vec::new());
    control.append_data(&mut header, "control", &text[..]).unwrap();
    let control = control.into_inner().unwrap();
    let mut file = fs::File::create(path).unwrap();
    write!(
        file,
        "!<arch>\n{}2.0\n{}",
        member("debian-binary", 4),
        member("control.tar", control.len() as u64)
    )
    .unwrap();
    file.write_all(&control).unwrap();
    file.write_all(member("data.tar", data).as_bytes()).unwrap();
    let start = file.metadata().unwrap().len();
    file.set_len(start + data).unwrap();
}

/// The number of bytes that a process has read.
fn bytes_read(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse().ok()).unwrap_or_default()
}

#[test]
fn a_bake_hears_sigterm_while_it_reads_package_files() {
    let top = tempfile::tempdir().unwrap();
    fs::create_dir(top.path().join("web")).unwrap();
    fs::write(top.path().join("web/image.toml"), "from = { name = \"base\" }\npackages = [\"./huge.deb\"]\n")
        .unwrap();
    huge_package(&top.path().join("web/huge.deb"), 7_900_000_000);
    let mut command = Command::new(env!("CARGO_BIN_EXE_oven"));
    command.env_clear().env("OVEN_REGION_DIR", "region").current_dir(top.path()).args(["bake", "web"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    oven_testing::until("a read of the package", || {
        assert!(child.try_wait().unwrap().is_none(), "the bake ended by itself");
        (bytes_read(child.id()) >= 64 << 20).then_some(())
    });
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let signalled = Instant::now();
    let output = child.wait_with_output().unwrap();
    // The whole package would take longer.
    assert!(signalled.elapsed() < Duration::from_secs(6), "it took {:?}", signalled.elapsed());
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read_dir(top.path()).unwrap().count(), 1, "the bake left files");
}
