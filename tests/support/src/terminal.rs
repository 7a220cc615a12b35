//! A terminal on which a program runs, and the screen that a person would see.

use crate::until;
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::Read;
use std::num::NonZeroU16;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// How many lines above the screen are stored.
const SCROLLBACK: usize = 10_000;

/// A program whose standard streams are a terminal.
pub struct Terminal {
    child: Child,
    screen: Arc<Mutex<vt100::Parser>>,
    reader: JoinHandle<()>,
}

impl Terminal {
    /// Starts a command on a new terminal, which shows `before` in its first line.
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
        command.stdin(copy()).stdout(copy()).stderr(copy()).env("TERM", "xterm");
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
        let reader = std::thread::spawn(move || {
            let (mut control, mut buffer) = (File::from(control), [0; 4096]);
            while let Ok(len @ 1..) = control.read(&mut buffer) {
                shown.lock().unwrap_or_else(PoisonError::into_inner).process(&buffer[..len]);
            }
        });
        Self { child, screen, reader }
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
        until(text, || self.rows().iter().any(|row| row.contains(text)).then_some(()));
    }

    /// Whether the program has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for the end. Returns the exit code, and all that is on the screen and above it.
    pub fn end(mut self) -> (Option<i32>, Vec<String>) {
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
        (code, all)
    }
}
