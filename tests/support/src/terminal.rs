//! A terminal on which a program runs, and the screen that a person would see.

use crate::pause;
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::Read;
use std::num::NonZeroU16;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How many lines above the screen are stored.
const SCROLLBACK: usize = 10_000;

/// A program whose standard streams are a terminal.
pub struct Terminal {
    child: Child,
    /// The side of the terminal emulator.
    control: File,
    screen: Arc<Mutex<vt100::Parser>>,
    reader: JoinHandle<()>,
}

/// What remains when the program has ended.
pub struct EndedTerminal {
    pub code: Option<i32>,
    /// All that is on the screen and above it.
    pub rows: Vec<String>,
    pub is_cursor_visible: bool,
}

impl Terminal {
    /// Starts a command on a new terminal, which shows `before` in its first line. If the command does not set TERM, it
    /// is `xterm`.
    pub fn open(mut command: Command, columns: u16, rows: u16, before: &str) -> Self {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&control).unwrap();
        unlockpt(&control).unwrap();
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&control, size).unwrap();
        let name = ptsname(&control, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = open(name.as_c_str(), flags, Mode::empty()).unwrap();
        let copy = || File::from(terminal.try_clone().unwrap());
        command.stdin(copy()).stdout(copy()).stderr(copy());
        if !command.get_envs().any(|(name, _)| name == "TERM") {
            command.env("TERM", "xterm");
        }
        for name in ["NO_COLOR", "CLICOLOR_FORCE"] {
            command.env_remove(name);
        }
        let [rows, columns] = [rows, columns].map(|number| NonZeroU16::new(number).unwrap());
        let mut parser = vt100::Parser::new(rows, columns, SCROLLBACK);
        parser.process(format!("{before}\r\n").as_bytes());
        let screen = Arc::new(Mutex::new(parser));
        let shown = screen.clone();
        let child = command.spawn().unwrap();
        drop((command, terminal)); // when the program has closed the terminal, too, the thread ends
        let control = File::from(control);
        let mut input = control.try_clone().unwrap();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = input.read(&mut buffer) {
                shown.lock().unwrap_or_else(PoisonError::into_inner).process(&buffer[..len]);
            }
        });
        Self { child, control, screen, reader }
    }

    /// The rows of the screen, without blanks at their ends.
    pub fn rows(&self) -> Vec<String> {
        let parser = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        let columns = parser.screen().size().1.get();
        parser.screen().rows(0, columns).map(|row| row.trim_end().to_owned()).collect()
    }

    /// Waits until a text is on the screen.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait_until(text, |rows| rows.iter().any(|row| row.contains(text)));
    }

    /// Waits until the screen is as wanted.
    #[track_caller]
    pub fn wait_until(&self, what: &str, is_wanted: impl Fn(&[String]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_wanted(&self.rows()) {
            assert!(Instant::now() < deadline, "waiting for {what}: {:#?}", self.rows());
            pause(Duration::from_millis(2));
        }
    }

    /// Changes the size of the terminal. It does not wrap the lines again.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.control, size).unwrap();
        let [rows, columns] = [rows, columns].map(|number| NonZeroU16::new(number).unwrap());
        let mut parser = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        parser.screen_mut().set_size(rows, columns);
    }

    /// Interrupts the program, like Ctrl-C, which the terminal shows.
    pub fn interrupt(&self) {
        self.screen.lock().unwrap_or_else(PoisonError::into_inner).process(b"^C");
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    }

    /// Whether the program has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for the end. Returns the exit code, and all that is on the screen and above it.
    pub fn end(self) -> (Option<i32>, Vec<String>) {
        let ended = self.ended();
        (ended.code, ended.rows)
    }

    /// Waits for the end.
    pub fn ended(mut self) -> EndedTerminal {
        let code = self.child.wait().unwrap().code();
        self.reader.join().unwrap();
        let mut parser = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
        let columns = parser.screen().size().1.get();
        let mut all = Vec::new();
        for back in (0..=parser.screen().scrollback_len()).rev() {
            parser.screen_mut().set_scrollback(back);
            let mut rows: Vec<_> =
                parser.screen().rows(0, columns).map(|row| row.trim_end().to_owned()).collect();
            rows.truncate(if back == 0 { rows.len() } else { 1 });
            all.append(&mut rows);
        }
        EndedTerminal { code, rows: all, is_cursor_visible: !parser.screen().hide_cursor() }
    }
}
