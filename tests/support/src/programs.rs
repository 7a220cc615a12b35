//! Where the programs under test are, and what is made once and cached next to them.
//!
//! Cargo gives both to a test by `env!`, and not to a library. They are found from the test's own program: the
//! programs of a profile are in one directory, and the tests in `deps` below it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

static PROFILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let test = std::env::current_exe().expect("a test has a program");
    let dir = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    dir.to_owned()
});

/// `oven`, or a program of tests/programs. Cargo builds them before the tests of the package `oven`.
pub fn program(name: &str) -> PathBuf {
    let path = PROFILE.join(name);
    assert!(path.exists(), "{} is not built: run the test by cargo", path.display());
    path
}

pub fn oven() -> PathBuf {
    program("oven")
}

/// The bakes with faults.
pub fn test_bake() -> PathBuf {
    program("oven-test-bake")
}

/// Those on the EC2-shaped server.
pub fn test_ec2() -> PathBuf {
    program("oven-test-ec2")
}

/// What takes long to make is cached here: Cargo's `CARGO_TARGET_TMPDIR`.
pub fn cache_dir() -> PathBuf {
    let dir = PROFILE.parent().expect("target").join("tmp");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// The arguments by which a test's own program runs one of its tests and shows what that prints: a test that needs a
/// process of its own is run so. `module`: `module_path!()`.
pub fn own_test(module: &str, name: &str) -> [String; 3] {
    // Without the crate's name.
    let module = module.split_once("::").map_or("", |(_, module)| module);
    let path = if module.is_empty() { name.to_owned() } else { format!("{module}::{name}") };
    ["--exact".to_owned(), path, "--nocapture".to_owned()]
}

/// Writes a program that a test runs a moment later.
///
/// Another process does it. A descriptor of this one would be in every process that another test begins meanwhile,
/// until
/// that executes its program; and what somebody has open for writing cannot be executed (ETXTBSY).
pub fn write_program(path: &Path, text: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", "cat > \"$0\" && chmod 755 \"$0\""]).arg(path).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "writing {}", path.display());
}

/// Copies a program that a test runs a moment later: see [`write_program`].
pub fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "copying {} to {}", from.display(), to.display());
}
