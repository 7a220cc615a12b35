//! What went wrong beneath a file system, which itself only learns that something did.

use super::overlay::lock;
use crate::error::Kind;
use std::sync::{Arc, Mutex};

/// The first cause; what follows from it says less. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Trouble(Arc<Mutex<Option<anyhow::Error>>>);

impl Trouble {
    pub fn add(&self, error: anyhow::Error) {
        lock(&self.0).get_or_insert(error);
    }

    /// Once: who has it tells it.
    pub fn take(&self) -> Option<anyhow::Error> {
        lock(&self.0).take()
    }
}

/// An error of this machine's own disk, while doing something (a gerund, which names the place).
pub fn full(error: std::io::Error, doing: &str) -> anyhow::Error {
    let hint = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "Free space there. Nothing was kept of the bake.",
        _ => "The kernel's log (dmesg) may say more.",
    };
    anyhow::Error::from(Kind::Machine.failure(&error).hint(hint)).context(doing.to_owned())
}
