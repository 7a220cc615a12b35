//! Writes a trace of one execution of oven. It shows how long each part took, and which parts ran concurrently. The
//! file has Chrome's Trace Event Format (JSON), which Perfetto and chrome://tracing can show.
//!
//! Each image has a [`Track`], which consists of lanes. Two spans on one lane are nested or do not overlap. Concurrent
//! spans of a track are on different lanes. The file is valid JSON after every write, so the trace can be used even if
//! oven was killed. Without `--trace`, this module does nothing.

mod lanes;
#[cfg(test)]
mod tests;

use crate::error::Kind;
use crate::secrets::Secrets;
use crate::text::{escape_name, without_control_characters};
use anyhow::{Context, Result};
use lanes::{EndedSpan, Lanes};
use serde_json::{Map, Value, json};
use std::fs::{File, Metadata, Permissions};
use std::future::Future;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// The shortest time between two events of a counter. Without this limit, a bake would write thousands of events, one
/// for each block.
const COUNTER_INTERVAL: Duration = Duration::from_millis(50);
/// The maximum length of a name in characters. Longer names are cut off. For example, the name of a command's span
/// contains the command's arguments, which may be a whole script.
const NAME_MAX: usize = 120;
/// The maximum length of a span's other texts.
const TEXT_MAX: usize = 2000;

/// The end of the file. Each event overwrites the old end, and a new end follows the event.
const END: &str = "\n]}\n";

/// The beginning of the file. oven replaces an existing file only if it is empty or has this beginning.
const BEGINNING: &str = "{\"displayTimeUnit\": \"ms\", \"otherData\": ";
/// Traces contain command lines and paths, which other users need not know.
const FILE_MODE: u32 = 0o600;

/// Returns the owner of a file if the owner is another user.
type ForeignOwner = fn(&Metadata) -> Option<u32>;

/// A trace file. Clones write to the same file.
#[derive(Clone)]
pub struct Trace(Arc<Shared>);

struct Shared {
    path: PathBuf,
    origin: Instant,
    state: Mutex<State>,
}

struct State {
    file: File,
    /// The position of the next event, where [`END`] is now.
    end: u64,
    events: u64,
    /// The first write error. After this error, nothing more is written.
    broken: Option<std::io::Error>,
    lanes: Lanes,
    tracks: u32,
    secrets: Secrets,
    ended: bool,
}

/// The track of one image, or of the whole execution of oven. The default track writes nothing.
#[derive(Clone, Default)]
pub struct Track(Option<(Trace, u32)>);

/// A kind of lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Spans of a bake, of its steps, and of the steps' commands.
    Steps,
    /// Spans in which a bake waits for a resource or for another process.
    Waits,
    Ec2,
    Ebs,
}

impl Lane {
    fn name(self) -> &'static str {
        match self {
            Self::Steps => "steps",
            Self::Waits => "waiting for",
            Self::Ec2 => "EC2",
            Self::Ebs => "EBS direct",
        }
    }
}

/// The id of a span. Spans that begin inside of this span use it as the id of their parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanId(u64);

/// A span of time. The span ends when this value is dropped.
#[must_use = "it ends when it is dropped"]
#[derive(Default)]
pub struct Span {
    of: Option<(Trace, SpanId)>,
    args: Map<String, Value>,
}

/// A growing sum, shown as a curve.
pub struct Counter {
    track: Track,
    name: &'static str,
    sum: AtomicU64,
    /// The time of the last event, since the beginning of the trace.
    written: Mutex<Option<Duration>>,
}

tokio::task_local! {
    static CURRENT_TRACK: Track;
}

impl Trace {
    /// Creates the file, which only this user can read. An older trace is replaced, but no other file is, and no symlink
    /// is followed. `foreign_owner` returns the owner of a file if this is another user. Errors: [`Kind::Usage`] if the
    /// file cannot be written.
    pub fn create(path: &Path, foreign_owner: ForeignOwner) -> Result<Self> {
        let file = open(path, foreign_owner).map_err(|why| {
            Kind::Usage
                .failure(format!("{}: {why}", escape_name(path)))
                .hint("Choose another file for --trace.")
        })?;
        let about = json!({
            "program": format!("oven {}", env!("CARGO_PKG_VERSION")),
            "began": humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        });
        let head = format!("{BEGINNING}{about}, \"traceEvents\": [");
        let write = || {
            file.set_permissions(Permissions::from_mode(FILE_MODE))?;
            file.set_len(0)?;
            file.write_all_at(format!("{head}{END}").as_bytes(), 0)
        };
        write().with_context(|| format!("writing {}", path.display()))?;
        let state = State {
            file,
            end: head.len() as u64,
            events: 0,
            broken: None,
            lanes: Lanes::default(),
            tracks: 0,
            secrets: Secrets::default(),
            ended: false,
        };
        let shared = Shared { path: path.to_owned(), origin: Instant::now(), state: Mutex::new(state) };
        Ok(Self(Arc::new(shared)))
    }

    /// Creates a track.
    pub fn track(&self, name: &str) -> Track {
        let mut state = self.state();
        state.tracks += 1;
        let pid = state.tracks;
        state.event(json!({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}));
        state
            .event(json!({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}));
        Track(Some((self.clone(), pid)))
    }

    /// Masks these secrets in all later events.
    pub fn hide(&self, secrets: &Secrets) {
        let mut state = self.state();
        state.secrets = state.secrets.with(secrets);
    }

    /// Ends all open spans. Fails if an event could not be written.
    pub fn end(&self) -> Result<()> {
        let now = self.now();
        let mut state = self.state();
        let open = state.lanes.end_all();
        open.into_iter().for_each(|ended| state.span(ended, now));
        state.ended = true;
        match state.broken.take() {
            None => Ok(()),
            Some(error) => Err(error).with_context(|| format!("writing {}", self.0.path.display())),
        }
    }

    fn now(&self) -> Duration {
        self.0.origin.elapsed()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens the file of a trace, or creates it. Does not change an existing file. On failure, returns the reason.
fn open(path: &Path, foreign_owner: ForeignOwner) -> Result<File, String> {
    // With O_NONBLOCK, opening a pipe without a reader fails instead of blocking.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut options = File::options();
    options.read(true).write(true).mode(FILE_MODE).custom_flags(flags);
    let file = match options.clone().create_new(true).open(path) {
        Ok(file) => return Ok(file),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => options.open(path).map_err(|error| {
            let is_link = error.raw_os_error() == Some(libc::ELOOP);
            if is_link { "it is a link".to_owned() } else { error.to_string() }
        })?,
        Err(error) => return Err(error.to_string()),
    };
    let found = file.metadata().map_err(|error| error.to_string())?;
    if !found.is_file() {
        return Err(
            "it is not a regular file, and oven rewrites the end of a trace while it grows".to_owned()
        );
    }
    if let Some(owner) = foreign_owner(&found) {
        return Err(format!("it belongs to user {owner}, who is neither you nor root"));
    }
    if found.nlink() > 1 {
        return Err("it has another name (a hard link)".to_owned());
    }
    let mut beginning = vec![0; BEGINNING.len()];
    let is_trace = file.read_exact_at(&mut beginning, 0).is_ok() && beginning == BEGINNING.as_bytes();
    if found.len() > 0 && !is_trace {
        return Err("it exists, and is not a trace of oven".to_owned());
    }
    Ok(file)
}

impl State {
    fn event(&mut self, mut event: Value) {
        if self.ended || self.broken.is_some() {
            return;
        }
        self.secrets.mask_json(&mut event);
        let text = format!("{}{event}", if self.events == 0 { "\n" } else { ",\n" });
        match self.file.write_all_at(format!("{text}{END}").as_bytes(), self.end) {
            Ok(()) => (self.end, self.events) = (self.end + text.len() as u64, self.events + 1),
            // A full disk must not stop a bake, nor the clean-up that would free space. So only the trace ends here,
            // and its file is still valid.
            Err(error) => {
                self.broken = Some(error);
                _ = self.file.write_all_at(END.as_bytes(), self.end);
                _ = self.file.set_len(self.end + END.len() as u64);
            }
        }
    }

    fn span(&mut self, ended: EndedSpan, now: Duration) {
        let EndedSpan { pid, tid, name, began, args } = ended;
        let event = json!({
            "ph": "X", "pid": pid, "tid": tid, "name": self.short(&name, NAME_MAX),
            "ts": micros(began), "dur": micros(now) - micros(began), "args": args,
        });
        self.event(event);
    }

    /// Masks secrets, and then cuts off the end of a long text. In the opposite order, part of a secret could remain.
    fn short(&self, text: &str, max: usize) -> String {
        let text = without_control_characters(text);
        let masked = self.secrets.mask(&text);
        match masked.char_indices().nth(max) {
            Some((at, _)) => format!("{}…", &masked[..at]),
            None => masked.into_owned(),
        }
    }
}

/// Rounds down to whole microseconds. The end of a span and the start of the next one are rounded in the same way, so
/// that they never overlap because of a rounding error.
fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}

impl Track {
    /// Returns the track of the current future (see [`Track::follow`]), or the default track if the future has none. A
    /// new thread has no current track, so its track must be passed to it.
    pub fn here() -> Self {
        CURRENT_TRACK.try_with(Clone::clone).unwrap_or_default()
    }

    /// Runs the future with this track as its current track.
    pub async fn follow<F: Future>(self, future: F) -> F::Output {
        CURRENT_TRACK.scope(self, future).await
    }

    pub fn span(&self, lane: Lane, name: &str) -> Span {
        self.begin(lane, name, None)
    }

    /// Begins a span inside of `parent`. If `parent` has ended or contains a running span, the new span is on another
    /// lane.
    pub fn within(&self, parent: Option<SpanId>, lane: Lane, name: &str) -> Span {
        self.begin(lane, name, parent)
    }

    fn begin(&self, lane: Lane, name: &str, parent: Option<SpanId>) -> Span {
        let Some((trace, pid)) = &self.0 else { return Span::default() };
        let now = trace.now();
        let mut state = trace.state();
        let (id, new) = state.lanes.begin(*pid, lane, parent.map(|parent| parent.0), name, now);
        if let Some((tid, name)) = new {
            state.event(
                json!({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}),
            );
            // Without this event, viewers sort the lanes by name.
            let order = json!({"sort_index": tid});
            state.event(
                json!({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": order}),
            );
        }
        Span { of: Some((trace.clone(), SpanId(id))), args: Map::new() }
    }

    /// Records an event without a duration.
    pub fn mark(&self, name: &str) {
        let Some((trace, pid)) = &self.0 else { return };
        let now = trace.now();
        let mut state = trace.state();
        let name = state.short(name, NAME_MAX);
        state.event(json!({"ph": "i", "s": "p", "pid": pid, "tid": 0, "name": name, "ts": micros(now)}));
    }

    pub fn counter(&self, name: &'static str) -> Counter {
        Counter { track: self.clone(), name, sum: AtomicU64::new(0), written: Mutex::new(None) }
    }

    pub fn hide(&self, secrets: &Secrets) {
        if let Some((trace, _)) = &self.0 {
            trace.hide(secrets);
        }
    }
}

impl Span {
    pub fn id(&self) -> Option<SpanId> {
        self.of.as_ref().map(|(_, id)| *id)
    }

    /// Adds a value that is shown with the span.
    pub fn add_arg(&mut self, key: &str, value: impl Into<Value>) {
        let Some((trace, _)) = &self.of else { return };
        let value = match value.into() {
            Value::String(text) => trace.state().short(&text, TEXT_MAX).into(),
            other => other,
        };
        self.args.insert(key.to_owned(), value);
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some((trace, id)) = self.of.take() else { return };
        let now = trace.now();
        let mut state = trace.state();
        let ended = state.lanes.end(id.0, std::mem::take(&mut self.args));
        ended.into_iter().for_each(|ended| state.span(ended, now));
    }
}

impl Counter {
    pub fn add(&self, more: u64) {
        let sum = self.sum.fetch_add(more, Ordering::Relaxed) + more;
        let Some((trace, _)) = &self.track.0 else { return };
        let now = trace.now();
        // If another thread is writing an event of this counter, no second event is needed.
        let Ok(mut written) = self.written.try_lock() else { return };
        if written.is_none_or(|last| now >= last + COUNTER_INTERVAL) {
            *written = Some(now);
            self.write(sum, now);
        }
    }

    pub fn sum(&self) -> u64 {
        self.sum.load(Ordering::Relaxed)
    }

    fn write(&self, sum: u64, now: Duration) {
        let Some((trace, pid)) = &self.track.0 else { return };
        let args = json!({"sum": sum});
        let event =
            json!({"ph": "C", "pid": pid, "tid": 0, "name": self.name, "ts": micros(now), "args": args});
        trace.state().event(event);
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let Some((trace, _)) = &self.track.0 else { return };
        if self.sum() > 0 {
            self.write(self.sum(), trace.now());
        }
    }
}
