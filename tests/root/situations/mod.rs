//! Packages and systems that need care in a bake, and that other image builders get wrong: one test for each. Needs root
//! and `OVEN_TEST_BASE`. Those that download packages run only with `OVEN_TEST_FULL=1`. Ansible has its tests in
//! `packages::ansible`.

mod packages;
mod systems;

use oven_testing::{ImageReader, full};

/// Returns whether a test that takes long runs.
fn is_full(what: &str) -> bool {
    if !full() {
        eprintln!("skipped: {what} runs with OVEN_TEST_FULL=1");
    }
    full()
}

/// Returns the version of the only kernel whose modules are in the image.
fn kernel(disk: &ImageReader) -> String {
    let kernels = disk.list("/lib/modules");
    assert_eq!(kernels.len(), 1, "{kernels:?}");
    kernels[0].clone()
}

/// Returns the number of an account from `/etc/passwd` or `/etc/group`.
fn number(disk: &ImageReader, file: &str, name: &str) -> u32 {
    let text = disk.read(file).unwrap();
    let line = text.lines().find(|line| line.split(':').next() == Some(name)).expect(&text);
    line.split(':').nth(2).unwrap().parse().unwrap()
}
