//! Writes to standard error, for people. On a terminal, the last lines show the running steps and are redrawn in place.

use super::lines::{RunningStep, reminder, terminal_lines};
use super::progress::{Meter, Progress};
use super::terminal::{self, TerminalLines};
use crate::sys::lock::lock_mutex;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The interval at which the last lines are redrawn.
const TICK: Duration = Duration::from_millis(200);
/// If there is no terminal, a long step prints a line at this interval. Without these lines, a CI system might assume
/// that oven hangs.
const REMINDER: Duration = Duration::from_secs(30);
/// The maximal number of characters of a step's output that are stored for a terminal.
const OUTPUT_MAX: usize = 1000;

/// A handle for writing to standard error. Several bakes and the signal listener share it. Cheap to clone.
#[derive(Clone)]
pub struct Screen(Arc<Shared>);

struct Shared {
    kind: Kind,
    color: bool,
    state: Mutex<State>,
    /// Notified when a step begins.
    step_begun: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Terminal,
    Plain,
    /// Prints lines, but does not show running steps.
    Quiet,
}

/// How the progress of running steps is shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProgressMode {
    /// Like `Terminal` if standard error is a terminal, and otherwise like `Plain`.
    #[default]
    Auto,
    /// Prints a line from time to time.
    Plain,
    /// Redraws lines in place.
    Terminal,
}

/// Whether words have colours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ColorMode {
    /// If standard error is a terminal. The variables `NO_COLOR` and `CLICOLOR_FORCE` change this.
    #[default]
    Auto,
    Always,
    Never,
}

/// What a screen looks like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Display {
    pub progress: ProgressMode,
    pub color: ColorMode,
}

#[derive(Default)]
struct State {
    running: Vec<RunningStep>,
    next: u64,
    terminal: TerminalLines,
    ticking: bool,
}

/// Colours and styles of words.
#[derive(Debug, Clone, Copy)]
pub enum TextStyle {
    Red,
    Yellow,
    Green,
    Dim,
}

/// Reads an environment variable. An empty variable counts as not set.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

impl Display {
    /// Returns the kind of the screen, and whether words have colours. `is_terminal` is whether standard error is a
    /// terminal that can move its cursor.
    fn resolve(self, is_terminal: bool, variable: &dyn Fn(&str) -> Option<OsString>) -> (Kind, bool) {
        let kind = match self.progress {
            ProgressMode::Auto if is_terminal => Kind::Terminal,
            ProgressMode::Terminal => Kind::Terminal,
            ProgressMode::Auto | ProgressMode::Plain => Kind::Plain,
        };
        let color = match self.color {
            ColorMode::Always => true,
            ColorMode::Never => false,
            // https://no-color.org and https://bixense.com/clicolors
            ColorMode::Auto if variable("NO_COLOR").is_some() => false,
            ColorMode::Auto => is_terminal || variable("CLICOLOR_FORCE").is_some_and(|value| value != "0"),
        };
        (kind, color)
    }
}

impl Screen {
    /// If `quiet` is true, running steps are never shown.
    pub fn new(quiet: bool, display: Display) -> Self {
        let is_terminal =
            std::io::stderr().is_terminal() && variable("TERM").is_some_and(|term| term != "dumb");
        let (kind, color) = display.resolve(is_terminal, &variable);
        let kind = if quiet { Kind::Quiet } else { kind };
        Self(Arc::new(Shared { kind, color, state: Mutex::default(), step_begun: Condvar::new() }))
    }

    /// Returns whether lines are redrawn.
    pub fn is_terminal(&self) -> bool {
        self.0.kind == Kind::Terminal
    }

    pub fn paint(&self, ink: TextStyle, text: &str) -> String {
        let code = match ink {
            TextStyle::Red => "1;31",
            TextStyle::Yellow => "33",
            TextStyle::Green => "32",
            TextStyle::Dim => "2",
        };
        if self.0.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Prints lines that are not redrawn later. If standard error is a closed pipe, the bake continues.
    pub fn print(&self, lines: &str) {
        let mut state = self.state();
        if self.is_terminal() {
            let text = state.terminal.print(lines);
            write(&text);
        } else {
            write(&format!("{lines}\n"));
        }
    }

    /// Begins a step. Returns the step's id for the other functions. `prefix` is the text before the step's title.
    pub fn begin(&self, prefix: &str, phase: &str, what: &str) -> u64 {
        let mut state = self.state();
        let (id, started) = (state.next, Instant::now());
        state.next += 1;
        state.running.push(RunningStep {
            id,
            prefix: prefix.to_owned(),
            phase: phase.to_owned(),
            what: what.to_owned(),
            output: String::new(),
            meter: Meter::default(),
            started,
            reminders: 0,
        });
        if self.0.kind != Kind::Quiet && !std::mem::replace(&mut state.ticking, true) {
            let screen = self.clone();
            // This needs a thread, because the runtime's only thread may be busy. If the new thread cannot be started,
            // the last lines are redrawn only when a step ends.
            _ = std::thread::Builder::new().name("screen".into()).spawn(move || screen.tick());
        }
        self.0.step_begun.notify_one();
        id
    }

    /// Shows a line of a step's output.
    pub fn show_output(&self, id: u64, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        self.change(id, |step| {
            step.output.clear();
            step.output.extend(line.trim().chars().map(|c| if c == '\t' { ' ' } else { c }).take(OUTPUT_MAX));
        });
    }

    /// Shows how far a step is.
    pub fn show_progress(&self, id: u64, progress: Progress) {
        self.change(id, |step| step.meter.set(progress, Instant::now()));
    }

    fn change(&self, id: u64, change: impl FnOnce(&mut RunningStep)) {
        if self.0.kind != Kind::Quiet
            && let Some(step) = self.state().running.iter_mut().find(|step| step.id == id)
        {
            change(step);
        }
    }

    pub fn end(&self, id: u64) {
        let mut state = self.state();
        state.running.retain(|step| step.id != id);
        self.draw(&mut state);
    }

    /// Redraws the last lines, or prints reminders, until the process ends.
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
        if self.is_terminal() {
            let dim = |text: &str| self.paint(TextStyle::Dim, text);
            let lines = terminal_lines(&state.running, Instant::now(), terminal::size(), &dim);
            let text = state.terminal.draw(lines);
            write(&text);
        }
    }

    fn remind(&self, state: &mut State) {
        if self.0.kind != Kind::Plain {
            return;
        }
        let now = Instant::now();
        for step in &mut state.running {
            if now.duration_since(step.started) >= REMINDER * (step.reminders + 1) {
                step.reminders += 1;
                write(&format!("{}\n", reminder(step, now)));
            }
        }
    }

    /// Returns the title and the last output of each running step.
    #[cfg(test)]
    pub fn running(&self) -> Vec<(String, String)> {
        self.state().running.iter().map(|step| (step.what.clone(), step.output.clone())).collect()
    }

    /// Returns the name of each running step's current item.
    #[cfg(test)]
    pub fn names(&self) -> Vec<String> {
        self.state().running.iter().map(|step| step.meter.progress.name.clone()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(
        progress: ProgressMode,
        color: ColorMode,
        is_terminal: bool,
        set: &[(&str, &str)],
    ) -> (Kind, bool) {
        let variable = |name: &str| {
            set.iter().find(|(variable, _)| *variable == name).map(|(_, value)| OsString::from(value))
        };
        Display { progress, color }.resolve(is_terminal, &variable)
    }

    #[test]
    fn flags_precede_variables_and_these_precede_the_terminal() {
        use ColorMode::{Always, Auto, Never};
        let color = |mode, is_terminal, set: &[_]| resolved(ProgressMode::Auto, mode, is_terminal, set).1;
        let (no, force) = (("NO_COLOR", "1"), ("CLICOLOR_FORCE", "1"));
        assert!(color(Auto, true, &[]) && !color(Auto, false, &[]));
        assert!(!color(Auto, true, &[no]) && color(Auto, false, &[force]));
        assert!(!color(Auto, false, &[("CLICOLOR_FORCE", "0")]));
        assert!(!color(Auto, true, &[no, force]), "NO_COLOR precedes CLICOLOR_FORCE");
        assert!(color(Always, false, &[no]) && !color(Never, true, &[force]));
    }

    #[test]
    fn the_mode_decides_whether_lines_are_redrawn() {
        let kind = |mode, is_terminal| resolved(mode, ColorMode::Auto, is_terminal, &[]).0;
        assert_eq!([true, false].map(|is| kind(ProgressMode::Auto, is)), [Kind::Terminal, Kind::Plain]);
        assert_eq!([true, false].map(|is| kind(ProgressMode::Plain, is)), [Kind::Plain, Kind::Plain]);
        assert_eq!(
            [true, false].map(|is| kind(ProgressMode::Terminal, is)),
            [Kind::Terminal, Kind::Terminal]
        );
    }
}
