//! Unmounting what a moment ago somebody still stood in.

use crate::pause;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A process that was killed holds a mount until the kernel has removed it, and one that was begun at the same time by
/// another test may have a copy of a descriptor until it executes its program.
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
