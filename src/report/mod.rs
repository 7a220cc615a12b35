//! The output of oven: lines for people or a stream of JSON events. Each run (the bake of one image) also has a log
//! file with everything.

pub mod events;
mod lines;
mod log;
mod progress;
mod screen;
pub mod stdout;
mod summary;
mod terminal;
#[cfg(test)]
mod tests;

use crate::text::{escape_json, escape_name, indent_continuations, without_control_characters};
pub use progress::{Amount, Progress};
pub use screen::{ColorMode, Display, ProgressMode, Screen, TextStyle};
pub use summary::{BakeSummary, PackageChanges};

use crate::error;
use crate::error::Kind;
use crate::secrets::Secrets;
use crate::sys::tasks::{self, TaskProgress};
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
    /// The packages that the work changed, if it reported them.
    packages: RefCell<Option<PackageChanges>>,
    /// Secrets to mask in every line. All reports of a process share them, because all secrets come from the same
    /// environment.
    secrets: Rc<RefCell<Secrets>>,
    trace: Option<Trace>,
    /// The image's track in the trace.
    track: Track,
    /// The span of the whole work, and the spans of the running steps. The last one is the parent of new spans. Steps
    /// may overlap, so a step need not end before the steps that began earlier.
    spans: RefCell<Vec<SpanId>>,
}

/// A running step. If it is dropped before [`Step::done`] is called, the step counts as not finished.
pub struct Step {
    report: Report,
    phase: String,
    what: String,
    started: Instant,
    id: u64,
    span: Span,
    progress: Rc<StepProgress>,
}

/// Running work that is no step. It is shown until this value is dropped.
pub struct Activity {
    screen: Screen,
    id: u64,
}

impl Drop for Activity {
    fn drop(&mut self) {
        self.screen.end(self.id);
    }
}

/// Where the progress of a step is shown.
struct StepProgress {
    id: u64,
    phase: String,
    /// The time of the last progress event.
    last_event: Cell<Option<Instant>>,
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
        Self::displayed(style, level, trace, Display::default())
    }

    /// Makes the report of a process. `display` is how its lines for people look.
    pub fn displayed(style: Style, level: Level, trace: Option<Trace>, display: Display) -> Self {
        let track = trace.as_ref().map(|trace| trace.track("oven")).unwrap_or_default();
        Self(Rc::new(Inner {
            style,
            level,
            subject: String::new(),
            prefix: String::new(),
            screen: Screen::new(style != Style::Human || level == Level::Quiet, display),
            log: RefCell::default(),
            phases: RefCell::default(),
            origin: Instant::now(),
            started: Cell::new(Instant::now()),
            packages: RefCell::default(),
            secrets: Rc::default(),
            trace,
            track,
            spans: RefCell::default(),
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
            packages: RefCell::default(),
            secrets: secrets.clone(),
            trace: trace.clone(),
            track: trace.as_ref().map(|trace| trace.track(subject)).unwrap_or_default(),
            spans: RefCell::default(),
        }))
    }

    /// The track of this report's work in the trace.
    pub fn track(&self) -> Track {
        self.0.track.clone()
    }

    /// Begins a span in the trace for the whole work of this report. Spans that begin later are inside of this span.
    pub fn begin_work(&self, what: &str) -> WorkSpan {
        let span = self.0.track.span(Lane::Steps, what);
        self.0.spans.borrow_mut().extend(span.id());
        WorkSpan { report: self.clone(), span }
    }

    /// Begins a span for a command, in the span of the step that began last.
    pub fn command(&self, argv: &[String]) -> Span {
        let track = &self.0.track;
        let mut span = track.within(self.last_span(), Lane::Steps, &argv.join(" "));
        span.add_arg("argv", argv.join(" "));
        span
    }

    fn last_span(&self) -> Option<SpanId> {
        self.0.spans.borrow().last().copied()
    }

    fn end_span(&self, span: &Span) {
        self.0.spans.borrow_mut().retain(|running| Some(*running) != span.id());
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
        let id = self.begin_line(phase, &what);
        // Its parent is the whole work. Another step may be running, but that step may end first.
        let whole = self.0.spans.borrow().first().copied();
        let mut span = self.0.track.within(whole, Lane::Steps, &what);
        span.add_arg("phase", phase);
        self.0.spans.borrow_mut().extend(span.id());
        Step {
            report: self.clone(),
            phase: phase.to_owned(),
            what,
            started: Instant::now(),
            id,
            span,
            progress: Rc::new(StepProgress { id, phase: phase.to_owned(), last_event: Cell::default() }),
        }
    }

    /// Shows work that is usually short, while it runs. It has a line only if it takes long, and is neither logged nor
    /// an event.
    pub fn activity(&self, phase: &str, what: &str) -> Activity {
        let id = self.begin_line(phase, &escape_name(&self.sanitize(what)));
        Activity { screen: self.0.screen.clone(), id }
    }

    /// Begins a line of the screen. Returns its id.
    fn begin_line(&self, phase: &str, what: &str) -> u64 {
        let prefix = self.0.prefix.trim_end();
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix} ") };
        self.0.screen.begin(&prefix, phase, what)
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

    /// Logs the times of the phases, and sends them as an event. With `Verbose`, prints them as a table.
    pub fn times(&self) {
        let phases = self.phases();
        let total = self.0.started.get().elapsed();
        let rows: Vec<_> = phases.iter().map(|(p, t)| (p.as_str(), *t)).chain([("total", total)]).collect();
        for (phase, time) in &rows {
            let row = format!("{phase:<10} {:>8.2} s", time.as_secs_f64());
            self.log("time", &row);
            if self.shows(Level::Verbose) {
                self.print(&format!("{phase:>12} {:>8.2} s", time.as_secs_f64()));
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

    /// Reports the packages that differ from the base image. The summary shows them.
    pub fn packages(&self, changes: PackageChanges) {
        if let Some(line) = changes.counts() {
            self.detail(format!("packages: {line}"));
        }
        *self.0.packages.borrow_mut() = Some(changes);
    }

    /// Returns the summary of the work so far.
    pub fn summary(&self) -> BakeSummary {
        BakeSummary {
            packages: self.0.packages.borrow().clone(),
            phases: self.phases(),
            total: self.0.started.get().elapsed(),
        }
    }

    /// Prints a line of the summary.
    pub fn close(&self, line: &str) {
        let line = self.sanitize(line);
        self.log("note", &line);
        if self.shows(Level::Normal) {
            self.print(&format!("  {line}"));
        }
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

    /// Prints lines, each after the image's name. With `Verbose`, each line begins with the time.
    fn print(&self, lines: &str) {
        let time = if self.shows(Level::Verbose) { clock_time() } else { String::new() };
        let begin = format!("{time}{}", self.0.prefix);
        let gap = |line: &str| if self.0.prefix.is_empty() || line.starts_with(' ') { "" } else { " " };
        let lines: Vec<_> = lines.lines().map(|line| format!("{begin}{}{line}", gap(line))).collect();
        self.0.screen.print(&lines.join("\n"));
    }

    fn log(&self, kind: &str, text: &str) {
        self.0.log.borrow_mut().line(self.0.started.get().elapsed(), kind, text);
    }
}

/// Returns the time of day in UTC, such as `19:25:16Z `.
fn clock_time() -> String {
    let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    time.split_once('T').map(|(_, time)| format!("{time} ")).unwrap_or_default()
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
    /// Reports a line of the step's output. Escape sequences and invisible characters are removed, because a package
    /// must not be able to control the user's terminal.
    pub fn output(&self, line: &str) {
        let report = &self.report;
        let line = report.sanitize(line);
        report.log("out", &line);
        report.event(json!({"event": "output", "phase": self.phase, "line": line}));
        if report.shows(Level::Verbose) {
            report.print(&format!("    {line}"));
        } else {
            report.0.screen.show_output(self.id, &line);
        }
    }

    /// Reports how many bytes are done. `all` is the total number of bytes, if it is known.
    pub fn progress(&self, done: u64, all: Option<u64>) {
        self.advance(Progress::of_bytes(done, all));
    }

    /// Runs a part of the step. The bytes that its blocking work counts, and the percentages that it reports, are the
    /// progress of the step.
    pub async fn follow<T>(&self, part: impl Future<Output = T>) -> T {
        let (progress, report) = (self.progress.clone(), self.report.clone());
        let on_progress = move |reported| {
            let reported = match reported {
                TaskProgress::Bytes { done, all } => Progress::of_bytes(done, all),
                TaskProgress::Percent(percent) => Progress { percent: Some(percent), ..Progress::default() },
            };
            progress.advance(&report, reported);
        };
        tasks::listen(on_progress, part).await
    }

    /// Reports how far the step is. The progress is shown with the running step, and sent as an event. There are at most
    /// a few events in a second, and one when everything is done.
    pub fn advance(&self, progress: Progress) {
        self.progress.advance(&self.report, progress);
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
        // If several images are baked on a terminal, only the running steps are shown. Otherwise a line for each step of
        // each image would scroll the messages away.
        let is_shown = report.0.prefix.is_empty() || !screen.is_terminal() || report.shows(Level::Verbose);
        if report.shows(Level::Normal) && is_shown {
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

impl StepProgress {
    fn advance(&self, report: &Report, progress: Progress) {
        let name = report.sanitize(&progress.name);
        let progress = Progress { name: escape_name(&name), ..progress };
        report.0.screen.show_progress(self.id, progress.clone());
        let is_recent = self.last_event.get().is_some_and(|time| time.elapsed() < PROGRESS_INTERVAL);
        if is_recent && !progress.is_complete() {
            return;
        }
        self.last_event.set(Some(Instant::now()));
        let bytes = progress.bytes.unwrap_or(Amount { done: 0, of: None });
        let mut event =
            json!({"event": "progress", "phase": self.phase, "bytes": bytes.done, "of": bytes.of});
        if let Some(items) = progress.items {
            event["items"] = json!(items.done);
            event["items_of"] = json!(items.of);
        }
        if let Some(percent) = progress.percent {
            event["percent"] = json!(percent);
        }
        if !progress.name.is_empty() {
            event["name"] = json!(progress.name);
        }
        report.event(event);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.report.0.screen.end(self.id);
        self.report.end_span(&self.span);
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
        self.report.end_span(&self.span);
    }
}
