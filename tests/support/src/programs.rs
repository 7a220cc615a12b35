//! Finds the programs under test, and the directory for data that are created once.
//!
//! Cargo passes both paths to a test by `env!`, but not to a library. So they are derived from the path of the test's
//! own program: the programs of a profile are in one directory, and the tests are in `deps` below it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

static PROFILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let test = std::env::current_exe().expect("a test has a program");
    let dir = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    dir.to_owned()
});

/// Returns the path of `oven`, or of a program of tests/programs. Cargo builds them before the tests of the package
/// `oven`.
pub fn program(name: &str) -> PathBuf {
    let path = PROFILE.join(name);
    assert!(path.exists(), "{} is not built: run the test by cargo", path.display());
    path
}

pub fn oven() -> PathBuf {
    program("oven")
}

/// Returns the path of the program for bakes with faults.
pub fn test_bake() -> PathBuf {
    program("oven-test-bake")
}

/// Returns the path of the program for bakes with faults on the EC2-shaped server.
pub fn test_ec2() -> PathBuf {
    program("oven-test-ec2")
}

/// Returns the directory for data that take long to create (Cargo's `CARGO_TARGET_TMPDIR`).
pub fn cache_dir() -> PathBuf {
    let dir = PROFILE.parent().expect("target").join("tmp");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// Returns the arguments with which a test's own program runs one of its tests and shows the test's output. This is for
/// a test that needs its own process. `module` is `module_path!()`.
pub fn own_test(module: &str, name: &str) -> [String; 3] {
    // Removes the crate's name.
    let module = module.split_once("::").map_or("", |(_, module)| module);
    let path = if module.is_empty() { name.to_owned() } else { format!("{module}::{name}") };
    ["--exact".to_owned(), path, "--nocapture".to_owned()]
}

/// Writes a program that a test executes immediately afterwards.
///
/// Another process writes it. If this process wrote it, every process that another test starts meanwhile would inherit
/// the open descriptor, until it executes its own program. But a file that somebody has open for writing cannot be
/// executed (ETXTBSY).
pub fn write_program(path: &Path, text: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", "cat > \"$0\" && chmod 755 \"$0\""]).arg(path).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "writing {}", path.display());
}

/// Copies a program that a test executes immediately afterwards (see [`write_program`]).
pub fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "copying {} to {}", from.display(), to.display());
}
