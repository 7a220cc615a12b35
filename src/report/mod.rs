//! The output of oven: lines for people or a stream of JSON events. Each run (the bake of one image) also has a log
//! file with everything.

pub mod events;
mod log;
mod screen;
pub mod stdout;
#[cfg(test)]
mod tests;

use crate::text::{escape_json, escape_name, indent_continuations, without_control_characters};
pub use screen::{Screen, TextStyle};

use crate::error;
use crate::error::Kind;
use crate::secrets::Secrets;
use crate::trace::{Lane, Span, SpanId, Trace, Track};
use log::LogFile;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

/// How events are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Lines for people on standard error.
    Human,
    /// JSON objects on standard output, one in each line.
    Json,
    /// Nothing is shown. This is for tests, and for verbs (subcommands) that only print a result.
    Silent,
}

/// How much is shown. The log file contains everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Failures and warnings.
    Quiet,
    /// A line for each step.
    Normal,
    /// The steps' own output, and details.
    Verbose,
}

/// If several images are baked, the times of each image are printed in one line. Phases that are shorter than
/// `SHORT_PHASE` are left out of that line.
const SHORT_PHASE: Duration = Duration::from_millis(50);

/// The lines after the first of a text are indented by this. The lines that oven itself adds to an error, such as its
/// hint, are indented by two spaces. So no text can look like one of them.
const CONTINUATION: &str = "    ";

/// The shortest time between two progress events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// A handle for the output, which is cheap to clone. Each bake has its own report ([`Report::for_image`]), so that the
/// lines of several bakes can be distinguished.
#[derive(Clone)]
pub struct Report(Rc<Inner>);

struct Inner {
    style: Style,
    level: Level,
    /// The name of the image that this report is about. Empty outside a bake.
    subject: String,
    /// The text before each line for people. Empty if only one image is baked.
    prefix: String,
    screen: Screen,
    log: RefCell<LogFile>,
    phases: RefCell<Vec<(String, Duration)>>,
    /// The start of the process.
    origin: Instant,
    /// The start of the work that this report is about.
    started: Cell<Instant>,
    /// The id of the running step. A line of output is shown with this step.
    step: Cell<Option<u64>>,
    /// Secrets to mask in every line. All reports of a process share them, because all secrets come from the same
    /// environment.
    secrets: Rc<RefCell<Secrets>>,
    trace: Option<Trace>,
    /// The image's track in the trace.
    track: Track,
    /// The current span of the track: the span of the whole work or of a step. It is the parent of new spans.
    current_span: Cell<Option<SpanId>>,
}

/// A running step. If it is dropped before [`Step::done`] is called, the step counts as not finished.
pub struct Step {
    report: Report,
    phase: String,
    what: String,
    started: Instant,
    id: u64,
    span: Span,
    /// The current span before this step.
    previous_span: Option<SpanId>,
    /// The time of the last progress event.
    last_progress: Cell<Option<Instant>>,
}

/// The span in the trace for the whole work of a report. Dropping this value ends the span.
pub struct WorkSpan {
    report: Report,
    span: Span,
}

impl Report {
    pub fn new(style: Style, level: Level) -> Self {
        Self::traced(style, level, None)
    }

    pub fn traced(style: Style, level: Level, trace: Option<Trace>) -> Self {
        let track = trace.as_ref().map(|trace| trace.track("oven")).unwrap_or_default();
        Self(Rc::new(Inner {
            style,
            level,
            subject: String::new(),
            prefix: String::new(),
            screen: Screen::new(style != Style::Human || level == Level::Quiet),
            log: RefCell::default(),
            phases: RefCell::default(),
            origin: Instant::now(),
            started: Cell::new(Instant::now()),
            step: Cell::new(None),
            secrets: Rc::default(),
            trace,
            track,
            current_span: Cell::new(None),
        }))
    }

    pub fn silent() -> Self {
        Self::new(Style::Silent, Level::Quiet)
    }

    /// Makes a separate report for one image. If several images are baked, each line begins with the image's name,
    /// padded to `column` characters.
    pub fn for_image(&self, subject: &str, column: Option<usize>) -> Self {
        let prefix =
            column.map_or(String::new(), |width| format!("{:<1$}", format!("{subject}:"), width + 1));
        let Inner { style, level, screen, origin, secrets, trace, .. } = &*self.0;
        Self(Rc::new(Inner {
            style: *style,
            level: *level,
            subject: subject.to_owned(),
            prefix,
            screen: screen.clone(),
            log: RefCell::default(),
            phases: RefCell::default(),
            origin: *origin,
            started: Cell::new(Instant::now()),
            step: Cell::new(None),
            secrets: secrets.clone(),
            trace: trace.clone(),
            track: trace.as_ref().map(|trace| trace.track(subject)).unwrap_or_default(),
            current_span: Cell::new(None),
        }))
    }

    /// The track of this report's work in the trace.
    pub fn track(&self) -> Track {
        self.0.track.clone()
    }

    /// Begins a span in the trace for the whole work of this report. Spans that begin later are inside of this span.
    pub fn begin_work(&self, what: &str) -> WorkSpan {
        let span = self.0.track.span(Lane::Steps, what);
        self.0.current_span.set(span.id());
        WorkSpan { report: self.clone(), span }
    }

    /// Begins a span for a command of the running step.
    pub fn command(&self, argv: &[String]) -> Span {
        let track = &self.0.track;
        let mut span = track.within(self.0.current_span.get(), Lane::Steps, &argv.join(" "));
        span.add_arg("argv", argv.join(" "));
        span
    }

    /// Ends the trace. Warns if the trace is incomplete.
    pub fn end_trace(&self) {
        if let Some(Err(error)) = self.0.trace.as_ref().map(Trace::end) {
            self.warn(format!("the trace is incomplete: {error:#}"));
        }
    }

    /// From now on, masks these secrets in all reports of this process.
    pub fn mask_secrets(&self, secrets: &Secrets) {
        let both = self.0.secrets.borrow().with(secrets);
        *self.0.secrets.borrow_mut() = both;
        self.0.track.hide(secrets);
    }

    /// Removes escape sequences and invisible characters from a text, and masks secrets in it.
    fn sanitize(&self, text: &str) -> String {
        self.0.secrets.borrow().mask(&without_control_characters(text)).into_owned()
    }

    /// Begins the work of this report, and sets the path of its log file. The file is created when the first step
    /// begins. Its first line contains `about`, a description of the work.
    pub fn log_to(&self, path: &Path, about: &str) {
        self.0.started.set(Instant::now());
        let time = humantime::format_rfc3339_seconds(SystemTime::now());
        let about = escape_name(&self.sanitize(about));
        let head = format!("oven {} at {time}: {about}", env!("CARGO_PKG_VERSION"));
        *self.0.log.borrow_mut() = LogFile::at(path, &head);
    }

    /// The path of the log file, if the file exists.
    pub fn log_path(&self) -> Option<PathBuf> {
        self.0.log.borrow().path().map(Path::to_owned)
    }

    pub fn screen(&self) -> &Screen {
        &self.0.screen
    }

    pub fn style(&self) -> Style {
        self.0.style
    }

    /// Begins a step. `phase` is a single word. Several steps may have the same phase, and the table of times shows
    /// their sum. `what` is a gerund with its object, such as "mounting the disk". Its newlines and tabs are escaped,
    /// because it may contain names and commands, and must be one line.
    pub fn step(&self, phase: &str, what: impl Into<String>) -> Step {
        let what = escape_name(&self.sanitize(&what.into()));
        let begun = self.0.log.borrow_mut().begin();
        if let Err(error) = begun {
            self.warn(format!("the log file of this run cannot be created: {error:#}"));
        }
        self.log("step", &what);
        self.event(json!({"event": "step", "phase": phase, "what": what}));
        let id = self.0.screen.begin(self.prefixed(&what));
        self.0.step.set(Some(id));
        let previous_span = self.0.current_span.get();
        let mut span = self.0.track.within(previous_span, Lane::Steps, &what);
        span.add_arg("phase", phase);
        self.0.current_span.set(span.id());
        Step {
            report: self.clone(),
            phase: phase.to_owned(),
            what,
            started: Instant::now(),
            id,
            last_progress: Cell::default(),
            span,
            previous_span,
        }
    }

    /// Reports a line of a step's output. Escape sequences and invisible characters are removed, because a package must
    /// not be able to control the user's terminal.
    pub fn output(&self, line: &str) {
        let line = self.sanitize(line);
        self.log("out", &line);
        self.event(json!({"event": "output", "line": line}));
        if self.shows(Level::Verbose) {
            self.print(&format!("    {line}"));
        } else if let Some(id) = self.0.step.get() {
            self.0.screen.heard(id, &line);
        }
    }

    /// Reports something that the user should know, but that needs no action.
    pub fn note(&self, text: impl AsRef<str>) {
        self.message("note", text.as_ref(), Level::Normal);
    }

    pub fn warn(&self, text: impl AsRef<str>) {
        self.message("warning", text.as_ref(), Level::Quiet);
    }

    pub fn detail(&self, text: impl AsRef<str>) {
        self.message("detail", text.as_ref(), Level::Verbose);
    }

    /// Reports a failure: the cause, what to do, and the path of the log. An interrupt is only logged and sent as an
    /// event, and is not printed for people.
    pub fn failure(&self, failure: &anyhow::Error) {
        // The message is sanitized, because it may contain names of an image's files.
        let (text, kind) = (self.sanitize(&format!("{failure:#}")), Kind::of(failure));
        let hint = error::hint_of(failure).map(|hint| self.sanitize(&hint));
        self.log("error", &text);
        if let Some(hint) = &hint {
            self.log("hint", hint);
        }
        let log = self.log_path();
        for mut event in events::errors(failure) {
            for field in ["message", "hint", "file", "key"] {
                if let Some(text) = event[field].as_str() {
                    event[field] = json!(self.sanitize(text));
                }
            }
            event["event"] = json!("error");
            event["log"] = json!(log.as_ref().map(|log| log.to_string_lossy()));
            self.event(event);
        }
        if !self.shows(Level::Quiet) || kind == Kind::Interrupted {
            return;
        }
        let label = self.0.screen.paint(TextStyle::Red, "error:");
        self.print(&failure_lines(&label, &text, hint.as_deref(), log.as_deref()));
    }

    /// Prints a failure for people in every style: it is the failure to write the result.
    pub fn failure_on_screen(&self, failure: &anyhow::Error) {
        let (label, text) =
            (self.0.screen.paint(TextStyle::Red, "error:"), self.sanitize(&format!("{failure:#}")));
        self.0.screen.print(&failure_lines(&label, &text, error::hint_of(failure).as_deref(), None));
    }

    /// Writes an object to the JSON stream. Does nothing if the style is not `Json`.
    pub fn event(&self, mut event: Value) {
        if self.0.style != Style::Json {
            return;
        }
        self.0.secrets.borrow().mask_json(&mut event);
        if !self.0.subject.is_empty() {
            event["image"] = json!(self.0.subject);
        }
        event["format"] = json!(events::FORMAT);
        event["at_ms"] = json!(self.0.origin.elapsed().as_millis() as u64);
        stdout::write_line(&escape_json(&event.to_string()));
    }

    /// The phases and their times, in the order of their first step.
    pub fn phases(&self) -> Vec<(String, Duration)> {
        self.0.phases.borrow().clone()
    }

    /// Prints the table of phase times, or one line if several images are baked.
    pub fn times(&self) {
        let phases = self.phases();
        let total = self.0.started.get().elapsed();
        let rows: Vec<_> = phases.iter().map(|(p, t)| (p.as_str(), *t)).chain([("total", total)]).collect();
        for (phase, time) in &rows {
            self.log("time", &format!("{phase:<10} {:>8.2} s", time.as_secs_f64()));
        }
        if self.shows(Level::Normal) {
            if self.0.prefix.is_empty() {
                for (phase, time) in &rows {
                    self.print(&format!("{phase:>12} {:>8.2} s", time.as_secs_f64()));
                }
            } else {
                let long_phases = phases.iter().filter(|(_, time)| *time >= SHORT_PHASE);
                let words = long_phases.map(|(phase, time)| format!("{phase} {:.1}", time.as_secs_f64()));
                let words = words.collect::<Vec<_>>().join(", ");
                self.print(&format!("  {:.1} s in total: {words}", total.as_secs_f64()));
            }
        }
        let mut event = self.times_to_json();
        event["event"] = json!("times");
        self.event(event);
    }

    /// The times of the phases so far, and the time since the work began, in milliseconds.
    pub fn times_to_json(&self) -> Value {
        let milliseconds = |time: Duration| time.as_millis() as u64;
        let phases = self.phases().into_iter().map(|(phase, time)| (phase, json!(milliseconds(time))));
        let phases: serde_json::Map<_, _> = phases.collect();
        json!({"phases_ms": phases, "total_ms": milliseconds(self.0.started.get().elapsed())})
    }

    fn message(&self, kind: &str, text: &str, level: Level) {
        let text = self.sanitize(text);
        self.log(kind, &text);
        self.event(json!({"event": kind, "message": text}));
        if self.shows(level) {
            let text = indent_continuations(&text, CONTINUATION);
            let warning = self.0.screen.paint(TextStyle::Yellow, "warning:");
            self.print(&if kind == "warning" { format!("  {warning} {text}") } else { format!("  {text}") });
        }
    }

    fn shows(&self, level: Level) -> bool {
        self.0.style == Style::Human && self.0.level >= level
    }

    fn prefixed(&self, text: &str) -> String {
        let prefix = self.0.prefix.trim_end();
        if prefix.is_empty() { text.to_owned() } else { format!("{prefix} {text}") }
    }

    fn print(&self, lines: &str) {
        if self.0.prefix.is_empty() {
            return self.0.screen.print(lines);
        }
        let lines: Vec<_> = lines.lines().map(|line| format!("{}{line}", self.0.prefix)).collect();
        self.0.screen.print(&lines.join("\n"));
    }

    fn log(&self, kind: &str, text: &str) {
        self.0.log.borrow_mut().line(self.0.started.get().elapsed(), kind, text);
    }
}

/// Returns the lines of a failure for people: the cause, the hint, and the path of the log.
fn failure_lines(label: &str, text: &str, hint: Option<&str>, log: Option<&Path>) -> String {
    let mut lines = format!("{label} {}", indent_continuations(text, CONTINUATION));
    if let Some(hint) = hint {
        lines += &format!("\n  {}", indent_continuations(hint, CONTINUATION));
    }
    if let Some(log) = log {
        lines += &format!("\n  Full log: {}", escape_name(log));
    }
    lines
}

impl Step {
    /// Reports how many bytes are done. `all` is the total number of bytes, if it is known. The progress is shown with
    /// the running step, and sent as an event. A call that follows the previous call too soon is ignored, unless all
    /// bytes are done.
    pub fn progress(&self, done: u64, all: Option<u64>) {
        let is_recent = self.last_progress.get().is_some_and(|time| time.elapsed() < PROGRESS_INTERVAL);
        if is_recent && all != Some(done) {
            return;
        }
        self.last_progress.set(Some(Instant::now()));
        let of = all.map(|all| format!(" of {}", all.div_ceil(1 << 20))).unwrap_or_default();
        self.report.0.screen.heard(self.id, &format!("{}{of} MiB", done >> 20));
        self.report.event(json!({"event": "progress", "phase": self.phase, "bytes": done, "of": all}));
    }

    /// Ends a step that succeeded, and prints a line with its time.
    pub fn done(mut self) {
        self.span.add_arg("done", true);
        let time = self.started.elapsed();
        let (report, screen) = (&self.report, &self.report.0.screen);
        screen.end(self.id);
        report.log("done", &format!("{} ({:.2} s)", self.what, time.as_secs_f64()));
        report.event(
            json!({"event": "done", "phase": self.phase, "what": self.what, "ms": time.as_millis() as u64}),
        );
        if report.shows(Level::Normal) {
            let line = if screen.is_terminal() {
                let time = format!("{:.2} s", time.as_secs_f64());
                format!(
                    "  {} {} {}",
                    screen.paint(TextStyle::Green, "✓"),
                    self.what,
                    screen.paint(TextStyle::Dim, &time)
                )
            } else {
                format!("  {} ({:.2} s)", self.what, time.as_secs_f64())
            };
            report.print(&line);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.report.0.screen.end(self.id);
        self.report.0.step.take();
        self.report.0.current_span.set(self.previous_span);
        let time = self.started.elapsed();
        let mut phases = self.report.0.phases.borrow_mut();
        match phases.iter_mut().find(|(phase, _)| *phase == self.phase) {
            Some((_, sum)) => *sum += time,
            None => phases.push((self.phase.clone(), time)),
        }
    }
}

impl WorkSpan {
    /// Records how the work ended, in one word.
    pub fn ended(mut self, how: &str) {
        self.span.add_arg("ended", how);
    }
}

impl Drop for WorkSpan {
    fn drop(&mut self) {
        self.report.0.current_span.take();
    }
}
