//! A step's output as lines.

/// A line longer than that comes in pieces.
const LONGEST: usize = 16 << 10;
/// More output than that is thrown away: a log, not a transfer.
const MOST: usize = 64 << 20;

/// Cuts bytes into lines, without what would steer a terminal.
pub struct Lines {
    rest: Vec<u8>,
    budget: usize,
}

impl Lines {
    pub fn new() -> Self {
        Self { rest: Vec::new(), budget: MOST }
    }

    pub fn add(&mut self, bytes: &[u8], on_line: &mut dyn FnMut(&str)) {
        if self.budget == 0 {
            return;
        }
        let taken = &bytes[..bytes.len().min(self.budget)];
        self.budget -= taken.len();
        for byte in taken {
            if *byte == b'\n' {
                self.flush(on_line);
            } else {
                self.rest.push(*byte);
                if self.rest.len() >= LONGEST {
                    self.flush_long(on_line);
                }
            }
        }
        if self.budget == 0 {
            self.finish(on_line);
            on_line(&format!("(output cut: more than {} MiB)", MOST >> 20));
        }
    }

    /// What remains without an end of line.
    pub fn finish(&mut self, on_line: &mut dyn FnMut(&str)) {
        if !self.rest.is_empty() {
            self.flush(on_line);
        }
    }

    /// Cuts before a character that is not whole yet.
    fn flush_long(&mut self, on_line: &mut dyn FnMut(&str)) {
        let start = (1..=3.min(self.rest.len())).find(|back| self.rest[self.rest.len() - back] >= 0xc0);
        let whole = match start {
            Some(back) if std::str::from_utf8(&self.rest[self.rest.len() - back..]).is_err() => {
                self.rest.len() - back
            }
            _ => self.rest.len(),
        };
        let tail = self.rest.split_off(whole);
        self.flush(on_line);
        self.rest = tail;
    }

    fn flush(&mut self, on_line: &mut dyn FnMut(&str)) {
        let text = String::from_utf8_lossy(&self.rest);
        // A carriage return starts the line anew: what a terminal would show in the end is what is kept.
        let text = text.trim_end_matches('\r');
        let text = text.rsplit('\r').next().unwrap_or_default();
        if text.chars().any(|c| c.is_control() && c != '\t') {
            on_line(&text.chars().filter(|c| !c.is_control() || *c == '\t').collect::<String>());
        } else {
            on_line(text);
        }
        self.rest.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let (mut lines, mut seen) = (Lines::new(), Vec::new());
        for piece in pieces {
            lines.add(piece, &mut |line| seen.push(line.to_owned()));
        }
        lines.finish(&mut |line| seen.push(line.to_owned()));
        seen
    }

    #[test]
    fn lines_are_whole_and_the_last_needs_no_end() {
        assert_eq!(lines(&[b"a", b"b\nc\r\n", b"\nd"]), ["ab", "c", "", "d"]);
    }

    #[test]
    fn what_steers_a_terminal_is_left_out() {
        assert_eq!(lines(&[b"\x1b[31mred\x1b[0m\x07\tx\n", b"(5%\r(10%\r\n"]), ["[31mred[0m\tx", "(10%"]);
        assert_eq!(lines(&["\u{9b}31m".as_bytes(), b"\xff\n"]), ["31m\u{fffd}"]);
    }

    #[test]
    fn long_lines_are_split_between_characters() {
        let long = "é".repeat(LONGEST);
        let seen = lines(&[b"x", long.as_bytes()]);
        assert!(seen.iter().all(|line| line.len() <= LONGEST && !line.contains('\u{fffd}')));
        assert_eq!(seen.concat(), format!("x{long}"));
    }

    #[test]
    fn a_flood_is_cut_once() {
        let (mut lines, mut bytes, mut last) = (Lines::new(), 0, String::new());
        let flood = [b'y', b'\n'].repeat(1 << 20);
        for _ in 0..40 {
            lines.add(&flood, &mut |line| {
                bytes += line.len() + 1;
                line.clone_into(&mut last);
            });
        }
        assert!(bytes <= MOST + 64, "{bytes}");
        assert_eq!(last, "(output cut: more than 64 MiB)");
    }
}
