//! Splits a step's output into lines.

use crate::secrets::Secrets;

/// The maximum length of a line in bytes. A longer line is split.
const LINE_MAX: usize = 16 << 10;
/// The maximum output of a step in bytes. oven discards further output, so that a faulty step cannot fill the log.
const OUTPUT_MAX: usize = 64 << 20;

/// Splits bytes into lines. Removes control characters from the lines, and masks secrets in them.
pub struct OutputLines {
    rest: Vec<u8>,
    budget: usize,
    secrets: Secrets,
}

impl OutputLines {
    pub fn without(secrets: &Secrets) -> Self {
        Self { rest: Vec::new(), budget: OUTPUT_MAX, secrets: secrets.clone() }
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
                // The buffer is longer than a line. So if a secret begins before the cut, the buffer contains the whole
                // secret.
                if self.rest.len() >= LINE_MAX + self.secrets.longest_masked() {
                    self.flush_long(on_line);
                }
            }
        }
        if self.budget == 0 {
            let beginnings = self.secrets.longest_masked().saturating_sub(1);
            self.rest.truncate(self.rest.len().saturating_sub(beginnings));
            self.finish(on_line);
            on_line(&format!("(the output is longer than {} MiB and is cut off)", OUTPUT_MAX >> 20));
        }
    }

    /// If the output does not end with a newline, passes its last line to `on_line`.
    pub fn finish(&mut self, on_line: &mut dyn FnMut(&str)) {
        if !self.rest.is_empty() {
            self.flush(on_line);
        }
    }

    /// Passes the first part of a long line to `on_line`. The line is never cut inside a character or a secret.
    fn flush_long(&mut self, on_line: &mut dyn FnMut(&str)) {
        let start = (1..=3).find(|back| self.rest[LINE_MAX - back] >= 0xc0);
        let whole = match start {
            Some(back) if std::str::from_utf8(&self.rest[LINE_MAX - back..LINE_MAX]).is_err() => {
                LINE_MAX - back
            }
            _ => LINE_MAX,
        };
        let mut whole = whole;
        while let Some((begin, end)) = self.secrets.masked_range_across(&self.rest, whole) {
            whole = if begin == 0 { end } else { begin };
            if begin == 0 {
                break;
            }
        }
        let tail = self.rest.split_off(whole);
        self.flush(on_line);
        self.rest = tail;
    }

    fn flush(&mut self, on_line: &mut dyn FnMut(&str)) {
        let text = String::from_utf8_lossy(&self.rest);
        // In a terminal, the text after a carriage return overwrites the text before it. So only the text after the
        // last carriage return is used.
        let text = text.trim_end_matches('\r');
        let text = text.rsplit('\r').next().unwrap_or_default();
        if text.chars().any(|c| c.is_control() && c != '\t') {
            let text: String = text.chars().filter(|c| !c.is_control() || *c == '\t').collect();
            on_line(&self.secrets.mask(&text));
        } else {
            on_line(&self.secrets.mask(text));
        }
        self.rest.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let (mut lines, mut seen) = (OutputLines::without(&Secrets::default()), Vec::new());
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
    fn control_characters_are_left_out() {
        assert_eq!(lines(&[b"\x1b[31mred\x1b[0m\x07\tx\n", b"(5%\r(10%\r\n"]), ["[31mred[0m\tx", "(10%"]);
        assert_eq!(lines(&["\u{9b}31m".as_bytes(), b"\xff\n"]), ["31m\u{fffd}"]);
    }

    #[test]
    fn long_lines_are_split_between_characters() {
        let long = "é".repeat(LINE_MAX);
        let seen = lines(&[b"x", long.as_bytes()]);
        assert!(seen.iter().all(|line| line.len() <= LINE_MAX && !line.contains('\u{fffd}')));
        assert_eq!(seen.concat(), format!("x{long}"));
    }

    #[test]
    fn a_secret_is_in_no_line_wherever_a_long_one_is_cut() {
        let secrets = Secrets::of_test(&[("TOKEN", "hunter2-hunter2"), ("KEY", "first line\nsecond line")]);
        for before in LINE_MAX - 40..LINE_MAX + 40 {
            let text = format!("{}hunter2-hunter2{}", "x".repeat(before), "y".repeat(LINE_MAX));
            let (mut lines, mut seen) = (OutputLines::without(&secrets), String::new());
            // The text arrives in pieces, as from a pipe.
            for piece in text.as_bytes().chunks(1000) {
                lines.add(piece, &mut |line| seen.push_str(line));
            }
            lines.finish(&mut |line| seen.push_str(line));
            assert_eq!(seen.len(), text.len() - "hunter2-hunter2".len() + 3, "{before}");
            assert!(!seen.contains("hunter"), "{before}");
        }
        let mut seen = Vec::new();
        let mut lines = OutputLines::without(&secrets);
        lines.add(b"a first line\nsecond line b\nhun\x1bter2-hunter2\n", &mut |line| {
            seen.push(line.to_owned())
        });
        assert_eq!(seen, ["a ***", "*** b", "***"]);
    }

    #[test]
    fn a_flood_is_cut_once() {
        let (mut lines, mut bytes, mut last) = (OutputLines::without(&Secrets::default()), 0, String::new());
        let flood = [b'y', b'\n'].repeat(1 << 20);
        for _ in 0..40 {
            lines.add(&flood, &mut |line| {
                bytes += line.len() + 1;
                line.clone_into(&mut last);
            });
        }
        assert!(bytes <= OUTPUT_MAX + 64, "{bytes}");
        assert_eq!(last, "(the output is longer than 64 MiB and is cut off)");
    }
}
