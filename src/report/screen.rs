//! Writes to standard error, for people. On a terminal, the last line shows the running steps and is redrawn in place.

use crate::sys::lock::lock_mutex;
use rustix::termios::tcgetwinsize;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The interval at which the last line is redrawn.
const TICK: Duration = Duration::from_millis(200);
/// A step that ends within this time is not shown as running.
const SHORT: Duration = Duration::from_millis(300);
/// If there is no terminal, a long step prints a line at this interval. Without these lines, a CI system might assume
/// that oven hangs.
const REMINDER: Duration = Duration::from_secs(60);
/// The assumed width of a terminal that does not report its width.
const USUAL_WIDTH: usize = 80;

/// A handle for writing to standard error. Several bakes and the signal listener share it. Cheap to clone.
#[derive(Clone)]
pub struct Screen(Arc<Shared>);

struct Shared {
    kind: Kind,
    state: Mutex<State>,
    /// Notified when a step begins.
    step_begun: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Terminal {
        color: bool,
    },
    Plain,
    /// Prints lines, but does not show running steps.
    Quiet,
}

#[derive(Default)]
struct State {
    running: Vec<RunningStep>,
    next: u64,
    /// The current content of the terminal's last line.
    drawn: String,
    ticking: bool,
}

struct RunningStep {
    id: u64,
    what: String,
    /// The last line of the step's output.
    output: String,
    started: Instant,
    reminders: u32,
}

/// Colours and styles of words.
#[derive(Debug, Clone, Copy)]
pub enum TextStyle {
    Red,
    Yellow,
    Green,
    Dim,
}

impl Screen {
    /// If `quiet` is true, running steps are never shown.
    pub fn new(quiet: bool) -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let is_capable = std::io::stderr().is_terminal() && set("TERM").is_some_and(|term| term != "dumb");
        let kind = match (quiet, is_capable) {
            (true, _) => Kind::Quiet,
            // https://no-color.org
            (false, true) => Kind::Terminal { color: set("NO_COLOR").is_none() },
            (false, false) => Kind::Plain,
        };
        Self(Arc::new(Shared { kind, state: Mutex::default(), step_begun: Condvar::new() }))
    }

    /// Returns whether lines can be redrawn and may have colours.
    pub fn is_terminal(&self) -> bool {
        matches!(self.0.kind, Kind::Terminal { .. })
    }

    pub fn paint(&self, ink: TextStyle, text: &str) -> String {
        let code = match ink {
            TextStyle::Red => "1;31",
            TextStyle::Yellow => "33",
            TextStyle::Green => "32",
            TextStyle::Dim => "2",
        };
        match self.0.kind {
            Kind::Terminal { color: true } => format!("\x1b[{code}m{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }

    /// Prints lines that are not redrawn later. If standard error is a closed pipe, the bake continues.
    pub fn print(&self, lines: &str) {
        let mut state = self.state();
        let erase = self.erase(&mut state);
        write(&format!("{erase}{lines}\n"));
        self.draw(&mut state);
    }

    /// Begins a step. Returns the step's id, for [`Screen::heard`] and [`Screen::end`].
    pub fn begin(&self, what: String) -> u64 {
        let mut state = self.state();
        let (id, started) = (state.next, Instant::now());
        state.next += 1;
        state.running.push(RunningStep { id, what, output: String::new(), started, reminders: 0 });
        if self.0.kind != Kind::Quiet && !std::mem::replace(&mut state.ticking, true) {
            let screen = self.clone();
            // This needs a thread, because the runtime's only thread may be busy. If the new thread cannot be started,
            // the last line is redrawn only when lines are printed or a step ends.
            _ = std::thread::Builder::new().name("screen".into()).spawn(move || screen.tick());
        }
        self.0.step_begun.notify_one();
        id
    }

    /// Shows a line of a step's output.
    pub fn heard(&self, id: u64, line: &str) {
        if !self.is_terminal() || line.trim().is_empty() {
            return;
        }
        if let Some(step) = self.state().running.iter_mut().find(|step| step.id == id) {
            step.output.clear();
            step.output.extend(line.trim().chars().map(|c| if c == '\t' { ' ' } else { c }).take(200));
        }
    }

    pub fn end(&self, id: u64) {
        let mut state = self.state();
        let erase = self.erase(&mut state);
        state.running.retain(|step| step.id != id);
        write(&erase);
        self.draw(&mut state);
    }

    /// Redraws the last line, or prints reminders, until the process ends.
    fn tick(&self) {
        let mut state = self.state();
        loop {
            let step_begun = &self.0.step_begun;
            state = step_begun
                .wait_while(state, |s| s.running.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            let waited = step_begun.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
            self.draw(&mut state);
            self.remind(&mut state);
        }
    }

    fn draw(&self, state: &mut State) {
        if !self.is_terminal() {
            return;
        }
        let line = line(&state.running, Instant::now(), width(), |text| self.paint(TextStyle::Dim, text));
        if line != state.drawn {
            let erase = self.erase(state);
            // The terminal's line wrap is turned off, because only one line is erased later. With line wrap, a line
            // with wide characters could become two lines.
            let drawn = if line.is_empty() { String::new() } else { format!("\x1b[?7l{line}\x1b[?7h") };
            write(&format!("{erase}{drawn}"));
            state.drawn = line;
        }
    }

    fn remind(&self, state: &mut State) {
        if self.0.kind != Kind::Plain {
            return;
        }
        for step in &mut state.running {
            let time = step.started.elapsed();
            if time >= REMINDER * (step.reminders + 1) {
                step.reminders += 1;
                write(&format!("  still {} ({} s)\n", step.what, time.as_secs()));
            }
        }
    }

    fn erase(&self, state: &mut State) -> String {
        if std::mem::take(&mut state.drawn).is_empty() { String::new() } else { "\r\x1b[2K".to_owned() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock_mutex(&self.0.state)
    }
}

fn write(text: &str) {
    if !text.is_empty() {
        _ = std::io::stderr().lock().write_all(text.as_bytes());
    }
}

fn width() -> usize {
    let columns = tcgetwinsize(std::io::stderr()).map_or(0, |size| size.ws_col.into());
    if columns == 0 { USUAL_WIDTH } else { columns }
}

/// Returns the last line, such as ` … installing 2 packages 12 s Unpacking curl (7.88.1) ...`. If several steps run
/// concurrently, their output is not shown. Returns an empty text if no step has run for [`SHORT`].
fn line(steps: &[RunningStep], now: Instant, width: usize, dim: impl Fn(&str) -> String) -> String {
    let long: Vec<_> = steps.iter().filter(|step| now.duration_since(step.started) >= SHORT).collect();
    let describe =
        |step: &RunningStep| format!("{}  {} s", step.what, now.duration_since(step.started).as_secs());
    let descriptions: Vec<_> = long.iter().map(|step| describe(step)).collect();
    if descriptions.is_empty() {
        return String::new();
    }
    let cut = |text: &str, room: usize| text.chars().take(room).collect::<String>();
    let text = cut(&format!("  … {}", descriptions.join(" · ")), width);
    let room = width.saturating_sub(text.chars().count() + 2);
    match long[..] {
        [step] if !step.output.is_empty() && room > 0 => {
            format!("{text}  {}", dim(&cut(&step.output, room)))
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(what: &str, output: &str, seconds: u64) -> RunningStep {
        let started = Instant::now() - Duration::from_secs(seconds);
        RunningStep { id: 0, what: what.into(), output: output.into(), started, reminders: 0 }
    }

    #[test]
    fn running_steps_fit_a_line() {
        let shown =
            |steps: &[RunningStep], width| line(steps, Instant::now(), width, |text| format!("<{text}>"));
        assert_eq!(shown(&[], 80), "");
        assert_eq!(shown(&[step("testing", "", 0)], 80), "", "too short to be shown");
        assert_eq!(shown(&[step("testing", "", 3)], 80), "  … testing  3 s");
        assert_eq!(shown(&[step("testing", "ok", 3)], 80), "  … testing  3 s  <ok>");
        assert_eq!(shown(&[step("testing", "a long line", 3)], 24), "  … testing  3 s  <a long>");
        assert_eq!(shown(&[step("testing", "a long line", 3)], 9), "  … testi");
        let two = [step("web: testing", "ok", 3), step("db: installing", "", 75)];
        assert_eq!(shown(&two, 80), "  … web: testing  3 s · db: installing  75 s");
    }
}
