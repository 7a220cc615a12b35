//! Unmounts file systems that were in use a moment ago.

use crate::pause;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Unmounts a file system, and tries again while it is busy. The kernel needs time to remove a killed process. And a
/// process that another test starts at the same time may have a copy of a descriptor until it executes its program.
pub fn unmount(at: &Path) {
    for _ in 0..40 {
        let done = Command::new("umount").arg(at).output().unwrap();
        if done.status.success() {
            return;
        }
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(said.contains("busy"), "{said}");
        pause(Duration::from_millis(50));
    }
    panic!("{} is busy", at.display());
}
