//! The lines at the bottom of a terminal that are redrawn in place. `indicatif` moves the cursor.

use crate::sys::lock::lock_mutex;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use rustix::termios::tcgetwinsize;
use std::fmt::Write as _;
use std::io;
use std::sync::{Arc, Mutex};

/// The assumed size of a terminal that does not report its size.
const USUAL_SIZE: (usize, usize) = (80, 24);

/// The columns and rows of the terminal.
pub fn size() -> (usize, usize) {
    let (columns, rows) =
        tcgetwinsize(std::io::stderr()).map_or((0, 0), |size| (size.ws_col.into(), size.ws_row.into()));
    let or = |number, usual| if number == 0 { usual } else { number };
    (or(columns, USUAL_SIZE.0), or(rows, USUAL_SIZE.1))
}

/// Collects what `indicatif` draws, so that each change of the screen is a single write.
#[derive(Debug, Clone, Default)]
struct Canvas(Arc<Mutex<String>>);

impl Canvas {
    fn add(&self, text: &str) -> io::Result<()> {
        lock_mutex(&self.0).push_str(text);
        Ok(())
    }

    fn move_cursor(&self, n: usize, letter: char) -> io::Result<()> {
        if n > 0 {
            _ = write!(lock_mutex(&self.0), "\x1b[{n}{letter}");
        }
        Ok(())
    }

    fn take(&self) -> String {
        std::mem::take(&mut lock_mutex(&self.0))
    }
}

impl TermLike for Canvas {
    fn width(&self) -> u16 {
        u16::try_from(size().0).unwrap_or(u16::MAX)
    }

    fn height(&self) -> u16 {
        u16::try_from(size().1).unwrap_or(u16::MAX)
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.add(&format!("{text}\n"))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.add(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.add("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(()) // `TerminalLines` writes
    }
}

/// The lines of the running steps. Each function returns what has to be written to the terminal.
pub struct TerminalLines {
    canvas: Canvas,
    multi: MultiProgress,
    bars: Vec<ProgressBar>,
    /// The lines that the terminal shows.
    drawn: Vec<String>,
}

impl Default for TerminalLines {
    fn default() -> Self {
        let canvas = Canvas::default();
        let target = ProgressDrawTarget::term_like(Box::new(canvas.clone()));
        let multi = MultiProgress::with_draw_target(target);
        Self { canvas, multi, bars: Vec::new(), drawn: Vec::new() }
    }
}

impl TerminalLines {
    /// Shows these lines in place of the earlier lines. No line may be wider than the terminal.
    pub fn draw(&mut self, lines: Vec<String>) -> String {
        while self.bars.len() > lines.len()
            && let Some(bar) = self.bars.pop()
        {
            bar.finish_and_clear();
            self.multi.remove(&bar);
        }
        for (index, line) in lines.iter().enumerate() {
            if self.drawn.get(index) == Some(line) && index < self.bars.len() {
                continue;
            }
            match self.bars.get(index) {
                Some(bar) => bar.set_message(line.clone()),
                None => {
                    let bar = ProgressBar::no_length().with_message(line.clone());
                    if let Ok(style) = ProgressStyle::with_template("{msg}") {
                        bar.set_style(style);
                    }
                    let bar = self.multi.add(bar);
                    bar.tick();
                    self.bars.push(bar);
                }
            }
        }
        self.drawn = lines;
        self.take()
    }

    /// Prints a text above the lines.
    pub fn print(&mut self, text: &str) -> String {
        self.multi.suspend(|| self.canvas.add(&format!("{text}\n"))).unwrap_or_default();
        self.take()
    }
    /// Returns what has to be written. It ends at the begin of the last line. After a line that is as wide as the
    /// terminal, the `^C` of a user would begin a new line, and the earlier one would not be removed.
    fn take(&self) -> String {
        let text = self.canvas.take();
        if text.is_empty() || self.drawn.is_empty() { text } else { text + "\r" }
    }
}
