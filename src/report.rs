//! What the user sees of a run: lines for people, or a stream of JSON events; and a log file that holds everything.

use crate::error::{self, Kind};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How events are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Lines for people on standard error.
    Human,
    /// A JSON object a line on standard output.
    Json,
    /// Nothing: for tests and for verbs that only answer.
    Silent,
}

/// How much is shown; the log file holds everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Failures and warnings.
    Quiet,
    /// A line for each step.
    Normal,
    /// The steps' own output, and details.
    Verbose,
}

/// A handle, cheap to clone. Each bake has its own ([`Report::of`]), so that lines of several do not mix.
#[derive(Clone)]
pub struct Report(Rc<Inner>);

struct Inner {
    style: Style,
    level: Level,
    /// The image that lines are about; empty outside a bake.
    subject: String,
    /// Written before each human line when several bakes run side by side.
    prefix: bool,
    log: RefCell<Option<File>>,
    phases: RefCell<Vec<(String, Duration)>>,
    started: Instant,
}

/// A step under way. Without [`Step::done`] it counts as not finished.
pub struct Step {
    report: Report,
    phase: String,
    what: String,
    started: Instant,
}

impl Report {
    pub fn new(style: Style, level: Level) -> Self {
        Self::build(style, level, String::new(), false)
    }

    pub fn silent() -> Self {
        Self::new(Style::Silent, Level::Quiet)
    }

    /// A report of its own for one image. `prefix`: say the image's name on each line.
    pub fn of(&self, subject: &str, prefix: bool) -> Self {
        Self::build(self.0.style, self.0.level, subject.to_owned(), prefix)
    }

    fn build(style: Style, level: Level, subject: String, prefix: bool) -> Self {
        let (log, phases) = (RefCell::new(None), RefCell::new(Vec::new()));
        Self(Rc::new(Inner { style, level, subject, prefix, log, phases, started: Instant::now() }))
    }

    /// Keeps everything in this file from now on.
    pub fn log_to(&self, path: &Path) -> std::io::Result<()> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        *self.0.log.borrow_mut() = Some(File::options().create(true).append(true).open(path)?);
        Ok(())
    }

    /// Begins a step. `phase` is a single word that the table of times sums by; `what` is a gerund with its object.
    pub fn step(&self, phase: &str, what: impl Into<String>) -> Step {
        let what = printable(&what.into());
        self.log("step", &what);
        self.event(json!({"event": "step", "phase": phase, "what": what}));
        Step { report: self.clone(), phase: phase.to_owned(), what, started: Instant::now() }
    }

    /// A line of a step's output. Control bytes are taken out: a package must not drive the user's terminal.
    pub fn output(&self, line: &str) {
        let line = printable(line);
        self.log("out", &line);
        self.event(json!({"event": "output", "line": line}));
        if self.shows(Level::Verbose) {
            self.print(&format!("    {line}"));
        }
    }

    /// Something that the user should know and need not act upon.
    pub fn note(&self, text: impl AsRef<str>) {
        self.message("note", text.as_ref(), Level::Normal);
    }

    pub fn warn(&self, text: impl AsRef<str>) {
        self.message("warning", text.as_ref(), Level::Quiet);
    }

    pub fn detail(&self, text: impl AsRef<str>) {
        self.message("detail", text.as_ref(), Level::Verbose);
    }

    /// The cause of a failure, with what to do about it.
    pub fn failure(&self, failure: &anyhow::Error) {
        // Names of files of an image may be in it.
        let (text, kind) = (printable(&format!("{failure:#}")), Kind::of(failure));
        let hint = error::hint_of(failure).map(|hint| printable(&hint));
        self.log("error", &text);
        self.event(json!({"event": "error", "kind": kind.name(), "message": text, "hint": hint}));
        if self.shows(Level::Quiet) {
            self.print(&format!("error: {text}"));
            if let Some(hint) = hint {
                self.log("hint", &hint);
                self.print(&format!("  {hint}"));
            }
        }
    }

    /// A line that every style but JSON shows, whatever the level: what a verb was asked for.
    pub fn event(&self, mut event: Value) {
        if self.0.style != Style::Json {
            return;
        }
        if !self.0.subject.is_empty() {
            event["image"] = json!(self.0.subject);
        }
        event["at_ms"] = json!(self.0.started.elapsed().as_millis() as u64);
        // A reader that went away (EPIPE) is no reason to leave a bake half-done.
        _ = writeln!(std::io::stdout().lock(), "{event}");
    }

    /// Phases and how long each took, in the order of their first step.
    pub fn phases(&self) -> Vec<(String, Duration)> {
        self.0.phases.borrow().clone()
    }

    /// The table of phase times.
    pub fn table(&self) {
        let phases = self.phases();
        let total = self.0.started.elapsed();
        for (phase, time) in phases.iter().map(|(p, t)| (p.as_str(), *t)).chain([("total", total)]) {
            self.log("time", &format!("{phase:<10} {:>8.2} s", time.as_secs_f64()));
            if self.shows(Level::Normal) {
                self.print(&format!("{phase:>12} {:>8.2} s", time.as_secs_f64()));
            }
        }
        let times: serde_json::Map<_, _> =
            phases.into_iter().map(|(phase, time)| (phase, json!(time.as_millis() as u64))).collect();
        self.event(json!({"event": "times", "phases_ms": times, "total_ms": total.as_millis() as u64}));
    }

    fn message(&self, kind: &str, text: &str, level: Level) {
        let text = &printable(text);
        self.log(kind, text);
        self.event(json!({"event": kind, "message": text}));
        if self.shows(level) {
            let label = if kind == "warning" { "warning: " } else { "" };
            self.print(&format!("  {label}{text}"));
        }
    }

    fn shows(&self, level: Level) -> bool {
        self.0.style == Style::Human && self.0.level >= level
    }

    fn print(&self, line: &str) {
        let prefix = if self.0.prefix { format!("{}: ", self.0.subject) } else { String::new() };
        _ = writeln!(std::io::stderr().lock(), "{prefix}{line}");
    }

    fn log(&self, kind: &str, text: &str) {
        if let Some(file) = &mut *self.0.log.borrow_mut() {
            // A full disk must not stop the clean-up that would free it.
            _ = writeln!(file, "{:>9.3} {kind:<7} {text}", self.0.started.elapsed().as_secs_f64());
        }
    }
}

/// Without what would drive a terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\t' | '\n')).collect()
}

impl Step {
    /// The step is done: its line, and its time.
    pub fn done(self) {
        let time = self.started.elapsed();
        let report = &self.report;
        report.log("done", &format!("{} ({:.2} s)", self.what, time.as_secs_f64()));
        report.event(
            json!({"event": "done", "phase": self.phase, "what": self.what, "ms": time.as_millis() as u64}),
        );
        if report.shows(Level::Normal) {
            let line = if std::io::stderr().is_terminal() && !report.0.prefix {
                format!("  \x1b[32m✓\x1b[0m {} \x1b[2m{:.2} s\x1b[0m", self.what, time.as_secs_f64())
            } else {
                format!("  {} ({:.2} s)", self.what, time.as_secs_f64())
            };
            report.print(&line);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let time = self.started.elapsed();
        let mut phases = self.report.0.phases.borrow_mut();
        match phases.iter_mut().find(|(phase, _)| *phase == self.phase) {
            Some((_, sum)) => *sum += time,
            None => phases.push((self.phase.clone(), time)),
        }
    }
}
