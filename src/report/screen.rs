//! Standard error, for people: lines, and on a terminal a last one, updated in place, that says what is under way.

use rustix::termios::tcgetwinsize;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often what is under way is drawn anew: fast enough to look alive, and no work.
const TICK: Duration = Duration::from_millis(200);
/// A step that is done within this has only its own line.
const SHORT: Duration = Duration::from_millis(300);
/// Without a terminal a long step says so once in this time: systems that run builds take silence for a hang.
const REMINDER: Duration = Duration::from_secs(60);
/// A terminal that does not know its width.
const USUAL_WIDTH: usize = 80;

/// A handle on standard error that several bakes, and the listener for signals, share. Cheap to clone.
#[derive(Clone)]
pub struct Screen(Arc<Shared>);

struct Shared {
    kind: Kind,
    state: Mutex<State>,
    /// Told when a step begins.
    begun: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Terminal {
        color: bool,
    },
    Plain,
    /// What is printed is shown, what is under way is not.
    Still,
}

#[derive(Default)]
struct State {
    under_way: Vec<UnderWay>,
    next: u64,
    /// What is drawn on the terminal's last line.
    drawn: String,
    ticking: bool,
}

struct UnderWay {
    id: u64,
    what: String,
    /// The last line of its output.
    output: String,
    started: Instant,
    reminders: u32,
}

/// Ways to set a word off.
#[derive(Debug, Clone, Copy)]
pub enum Ink {
    Red,
    Yellow,
    Green,
    Dim,
}

impl Screen {
    /// `still`: never say what is under way.
    pub fn new(still: bool) -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let able = std::io::stderr().is_terminal() && set("TERM").is_some_and(|term| term != "dumb");
        let kind = match (still, able) {
            (true, _) => Kind::Still,
            // https://no-color.org
            (false, true) => Kind::Terminal { color: set("NO_COLOR").is_none() },
            (false, false) => Kind::Plain,
        };
        Self(Arc::new(Shared { kind, state: Mutex::default(), begun: Condvar::new() }))
    }

    /// Whether lines may move and have colours.
    pub fn is_terminal(&self) -> bool {
        matches!(self.0.kind, Kind::Terminal { .. })
    }

    pub fn paint(&self, ink: Ink, text: &str) -> String {
        let code = match ink {
            Ink::Red => "1;31",
            Ink::Yellow => "33",
            Ink::Green => "32",
            Ink::Dim => "2",
        };
        match self.0.kind {
            Kind::Terminal { color: true } => format!("\x1b[{code}m{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }

    /// Prints lines that stay. A reader that went away is no reason to leave a bake half-done.
    pub fn print(&self, lines: &str) {
        let mut state = self.state();
        let erase = self.erase(&mut state);
        write(&format!("{erase}{lines}\n"));
        self.draw(&mut state);
    }

    /// A step begins; the answer is for [`Screen::heard`] and [`Screen::end`].
    pub fn begin(&self, what: String) -> u64 {
        let mut state = self.state();
        let (id, started) = (state.next, Instant::now());
        state.next += 1;
        state.under_way.push(UnderWay { id, what, output: String::new(), started, reminders: 0 });
        if self.0.kind != Kind::Still && !std::mem::replace(&mut state.ticking, true) {
            let screen = self.clone();
            // A thread, since the runtime's only one may be busy. Without it nothing moves, that is all.
            _ = std::thread::Builder::new().name("screen".into()).spawn(move || screen.tick());
        }
        self.0.begun.notify_one();
        id
    }

    /// A line of a step's output.
    pub fn heard(&self, id: u64, line: &str) {
        if !self.is_terminal() || line.trim().is_empty() {
            return;
        }
        if let Some(step) = self.state().under_way.iter_mut().find(|step| step.id == id) {
            step.output.clear();
            step.output.extend(line.trim().chars().map(|c| if c == '\t' { ' ' } else { c }).take(200));
        }
    }

    pub fn end(&self, id: u64) {
        let mut state = self.state();
        let erase = self.erase(&mut state);
        state.under_way.retain(|step| step.id != id);
        write(&erase);
        self.draw(&mut state);
    }

    /// As long as the process lives: draws what is under way, or reminds of it.
    fn tick(&self) {
        let mut state = self.state();
        loop {
            let begun = &self.0.begun;
            state =
                begun.wait_while(state, |s| s.under_way.is_empty()).unwrap_or_else(PoisonError::into_inner);
            let waited = begun.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
            self.draw(&mut state);
            self.remind(&mut state);
        }
    }

    fn draw(&self, state: &mut State) {
        if !self.is_terminal() {
            return;
        }
        let line = line(&state.under_way, Instant::now(), width(), |text| self.paint(Ink::Dim, text));
        if line != state.drawn {
            let erase = self.erase(state);
            // Cut off at the edge, so that there is one line to erase, however wide its letters are.
            let drawn = if line.is_empty() { String::new() } else { format!("\x1b[?7l{line}\x1b[?7h") };
            write(&format!("{erase}{drawn}"));
            state.drawn = line;
        }
    }

    fn remind(&self, state: &mut State) {
        if self.0.kind != Kind::Plain {
            return;
        }
        for step in &mut state.under_way {
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
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
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

/// `  … installing 2 packages  12 s  Unpacking curl (7.88.1) ...`; several steps side by side without their output.
/// Empty if there is nothing that takes a while.
fn line(steps: &[UnderWay], now: Instant, width: usize, dim: impl Fn(&str) -> String) -> String {
    let long: Vec<_> = steps.iter().filter(|step| now.duration_since(step.started) >= SHORT).collect();
    let said = |step: &UnderWay| format!("{}  {} s", step.what, now.duration_since(step.started).as_secs());
    let said: Vec<_> = long.iter().map(|step| said(step)).collect();
    if said.is_empty() {
        return String::new();
    }
    let cut = |text: &str, room: usize| text.chars().take(room).collect::<String>();
    let text = cut(&format!("  … {}", said.join(" · ")), width);
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

    fn step(what: &str, output: &str, seconds: u64) -> UnderWay {
        let started = Instant::now() - Duration::from_secs(seconds);
        UnderWay { id: 0, what: what.into(), output: output.into(), started, reminders: 0 }
    }

    #[test]
    fn what_is_under_way_fits_a_line() {
        let said = |steps: &[UnderWay], width| line(steps, Instant::now(), width, |text| format!("<{text}>"));
        assert_eq!(said(&[], 80), "");
        assert_eq!(said(&[step("testing", "", 0)], 80), "", "too short to be told");
        assert_eq!(said(&[step("testing", "", 3)], 80), "  … testing  3 s");
        assert_eq!(said(&[step("testing", "ok", 3)], 80), "  … testing  3 s  <ok>");
        assert_eq!(said(&[step("testing", "a long line", 3)], 24), "  … testing  3 s  <a long>");
        assert_eq!(said(&[step("testing", "a long line", 3)], 9), "  … testi");
        let two = [step("web: testing", "ok", 3), step("db: installing", "", 75)];
        assert_eq!(said(&two, 80), "  … web: testing  3 s · db: installing  75 s");
    }
}
