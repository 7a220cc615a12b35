//! The log file of a run (the bake of one image). It is created when the first step begins. A run without steps has no
//! log file.

use crate::sys::state_files;
use crate::text::indent_continuations;
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The maximal number of logs in a directory. 200 logs cover weeks, and need only some MiB.
const MAX_LOGS: usize = 200;
/// The width of the time and the kind before the text of a line.
const INDENT: usize = 18;

#[derive(Default)]
pub enum LogFile {
    #[default]
    None,
    /// The file does not exist yet. `lines` are the lines that were logged before the first step.
    Waiting {
        path: PathBuf,
        lines: Vec<String>,
    },
    Open {
        path: PathBuf,
        file: File,
    },
}

impl LogFile {
    pub fn at(path: &Path, head: &str) -> Self {
        Self::Waiting { path: path.to_owned(), lines: vec![head.to_owned()] }
    }

    /// The path of the file, if it exists already.
    pub fn path(&self) -> Option<&Path> {
        if let Self::Open { path, .. } = self { Some(path) } else { None }
    }

    pub fn line(&mut self, time: Duration, kind: &str, text: &str) {
        // The later lines of a text are indented, so that a text cannot forge a line of the log.
        let text = indent_continuations(text, &" ".repeat(INDENT));
        let line = format!("{:>9.3} {kind:<7} {text}", time.as_secs_f64());
        match self {
            Self::None => {}
            Self::Waiting { lines, .. } => lines.push(line),
            // An error is ignored, because a full disk must not stop the clean-up. The clean-up may free space.
            Self::Open { file, .. } => _ = file.write_all(format!("{line}\n").as_bytes()),
        }
    }

    /// Creates the file if it does not exist yet. In that case, also removes the oldest log files of the directory.
    pub fn begin(&mut self) -> Result<()> {
        let (path, lines) = match std::mem::take(self) {
            Self::Waiting { path, lines } => (path, lines),
            other => {
                *self = other;
                return Ok(());
            }
        };
        if let Some(dir) = path.parent() {
            state_files::create_dir(dir)?;
            // Logs that are being written are among the newest, so they are not removed.
            state_files::remove_oldest(dir, "log", MAX_LOGS - 1);
        }
        let creating = || format!("creating {}", path.display());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND;
        let mut file = state_files::open_file(&path, flags).with_context(creating)?;
        file.write_all(format!("{}\n", lines.join("\n")).as_bytes()).with_context(creating)?;
        *self = Self::Open { path, file };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_created_with_the_first_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/1.log");
        let mut log = LogFile::at(&path, "oven");
        log.line(Duration::ZERO, "note", "waiting");
        assert!(!path.exists() && log.path().is_none());
        log.begin().unwrap();
        log.line(Duration::from_millis(1500), "step", "testing");
        log.begin().unwrap();
        let text = std::fs::read_to_string(log.path().unwrap()).unwrap();
        assert_eq!(text, "oven\n    0.000 note    waiting\n    1.500 step    testing\n");
        log.line(Duration::ZERO, "error", "wrong:\n    0.000 error   forged");
        let text = std::fs::read_to_string(log.path().unwrap()).unwrap();
        assert!(
            text.ends_with("    0.000 error   wrong:\n                      0.000 error   forged\n"),
            "{text}"
        );
    }
}
