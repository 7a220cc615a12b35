//! Steps in a small root directory: what they see, how they end, and what they cannot do. Needs root.

mod attacks;
mod cgroup;
mod costs;
mod egress;
mod endings;
mod host_files;
mod limits;
mod terminal;
mod view;

use oven::sandbox;
use oven::sandbox::spec::{ExitStatus, StepExit, StepSpec};
use oven_distro::Shim;
use oven_testing::{BusyboxImage, ring};
use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const HELPER: &str = env!("CARGO_BIN_EXE_oven");
const NONE: [u32; 0] = [];
const MINUTE: Duration = Duration::from_secs(60);

/// An image with a C program of this directory in it.
fn with_program(source: &str, options: &[&str], name: &str) -> BusyboxImage {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/root/steps").join(source);
    BusyboxImage::with_program(&source, options, name)
}

/// What distinguishes a test's steps from those of others: for their environment.
fn marker(name: &str) -> String {
    marker_of(name, std::process::id())
}

fn marker_of(name: &str, test: u32) -> String {
    format!("oven-{name}-of-{test}-")
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn try_run(spec: &StepSpec, timeout: Duration) -> anyhow::Result<(StepExit, Vec<String>)> {
    let mut lines = Vec::new();
    let exit =
        block_on(sandbox::run(Path::new(HELPER), spec, timeout, &mut |line| lines.push(line.to_owned())))?;
    Ok((exit, lines))
}

fn run(spec: &StepSpec) -> (StepExit, Vec<String>) {
    try_run(spec, MINUTE).unwrap_or_else(|error| panic!("{error:#}"))
}

/// The output of a step that succeeds and leaves nothing.
fn output(spec: &StepSpec) -> Vec<String> {
    let (exit, lines) = run(spec);
    let exit = StepExit { discarded: Vec::new(), ..exit };
    assert_eq!(exit, StepExit::of(ExitStatus::Exited(0)), "{lines:#?}");
    lines
}

/// Processes of this machine that have `marker` in their environment or command line.
fn processes(marker: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let has = |file: &str| {
            let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
            bytes.windows(marker.len()).any(|window| window == marker.as_bytes())
        };
        if pid != std::process::id() && (has("environ") || has("cmdline")) {
            found.push(pid);
        }
    }
    found
}

/// Whether any process has a mount of this image.
fn mounted(image: &BusyboxImage) -> bool {
    let name = image.root().file_name().unwrap().to_str().unwrap().to_owned();
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read_to_string(entry.path().join("mountinfo")).is_ok_and(|table| table.contains(&name))
    })
}

/// A loop device of this test alone.
struct Loop {
    node: PathBuf,
    _file: tempfile::NamedTempFile,
    _ring: ring::Shared,
}
impl Loop {
    fn new(mib: u64) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(mib << 20).unwrap();
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let node = String::from_utf8(made.stdout).unwrap().trim_end().into();
        Self { node, _file: file, _ring: ring::shared() }
    }
    fn rdev(&self) -> u64 {
        fs::metadata(&self.node).unwrap().st_rdev()
    }
}
impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.node).status();
    }
}

fn shim(path: &str, content: &str, mode: u32) -> Shim {
    Shim { path: path.into(), content: content.into(), mode }
}
