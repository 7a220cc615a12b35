//! Splits a step's output into lines.

use crate::secrets::{MASK, Secrets};
use crate::text::EscapeFilter;

/// The maximum length of a line in bytes. A longer line is split.
const LINE_MAX: usize = 16 << 10;
/// The maximum output of a step in bytes. oven discards further output, so that a faulty step cannot fill the log.
const OUTPUT_MAX: usize = 64 << 20;

/// Receives a step's output.
pub enum OutputSink<'a> {
    /// Receives the lines of standard output and standard error, in the order in which the step wrote them.
    Lines(&'a mut dyn FnMut(&str)),
    /// Receives standard output as it is, and the lines of standard error. Secrets are masked only in the lines. This
    /// is for programs whose standard output is parsed: warnings on standard error do not get into it.
    Answer { output: &'a mut dyn FnMut(&[u8]), on_line: &'a mut dyn FnMut(&str) },
    /// Like `Lines`, and receives the lines of the status descriptor ([`super::spec::StepSpec::status`]).
    WithStatus { on_line: &'a mut dyn FnMut(&str), on_status: &'a mut dyn FnMut(&str) },
}

impl OutputSink<'_> {
    /// Whether standard error is separate from standard output.
    pub(super) fn separates_errors(&self) -> bool {
        matches!(self, Self::Answer { .. })
    }

    pub(super) fn on_line(&mut self) -> &mut dyn FnMut(&str) {
        match self {
            Self::Lines(on_line) | Self::Answer { on_line, .. } | Self::WithStatus { on_line, .. } => {
                *on_line
            }
        }
    }

    /// Takes bytes from standard output.
    pub(super) fn add_output(&mut self, lines: &mut OutputLines, bytes: &[u8]) {
        match self {
            Self::Lines(on_line) | Self::WithStatus { on_line, .. } => lines.add(bytes, on_line),
            Self::Answer { output, .. } => output(bytes),
        }
    }

    /// Takes bytes from the status descriptor.
    pub(super) fn add_status(&mut self, lines: &mut OutputLines, bytes: &[u8]) {
        if let Self::WithStatus { on_status, .. } = self {
            lines.add(bytes, *on_status);
        }
    }
}

/// Splits bytes into lines, and masks secrets in them. Escape sequences and invisible characters are removed first, so
/// that they cannot hide a secret.
///
/// As in a terminal, a line is shown in its newest state. The text after a carriage return replaces the text before it,
/// and the text after a backspace replaces the character before it.
pub struct OutputLines {
    /// The line so far. If a carriage return replaced text, this begins with the end of the replaced text, because a
    /// secret may begin in the replaced text.
    line: String,
    /// The position in `line` where the newest state begins.
    start: usize,
    /// Whether the next visible character replaces the line.
    returned: bool,
    /// The number of characters that the next visible character replaces.
    backspaces: usize,
    filter: EscapeFilter,
    /// The first bytes of a character whose other bytes have not arrived yet.
    incomplete: Vec<u8>,
    budget: usize,
    secrets: Secrets,
}

impl OutputLines {
    pub fn without(secrets: &Secrets) -> Self {
        Self {
            line: String::new(),
            start: 0,
            returned: false,
            backspaces: 0,
            filter: EscapeFilter::default(),
            incomplete: Vec::new(),
            budget: OUTPUT_MAX,
            secrets: secrets.clone(),
        }
    }

    pub fn add(&mut self, bytes: &[u8], on_line: &mut dyn FnMut(&str)) {
        if self.budget == 0 {
            return;
        }
        let taken = &bytes[..bytes.len().min(self.budget)];
        self.budget -= taken.len();
        let mut all = std::mem::take(&mut self.incomplete);
        all.extend_from_slice(taken);
        let mut rest = &all[..];
        for chunk in all.utf8_chunks() {
            self.add_text(chunk.valid(), on_line);
            rest = &rest[chunk.valid().len()..];
            // A character at the end may be incomplete, and then its other bytes follow.
            let is_incomplete = std::str::from_utf8(rest)
                .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none());
            if is_incomplete {
                self.incomplete = rest.to_vec();
            } else if !chunk.invalid().is_empty() {
                self.add_char(char::REPLACEMENT_CHARACTER, on_line);
            }
            rest = &rest[chunk.invalid().len()..];
        }
        if self.budget == 0 {
            let beginnings = self.secrets.longest_masked().saturating_sub(1);
            let end =
                self.line.floor_char_boundary(self.line.len().saturating_sub(beginnings)).max(self.start);
            self.line.truncate(end);
            self.incomplete.clear();
            self.finish(on_line);
            on_line(&format!("(the output is longer than {} MiB and is cut off)", OUTPUT_MAX >> 20));
        }
    }

    /// If the output does not end with a newline, passes its last line to `on_line`.
    pub fn finish(&mut self, on_line: &mut dyn FnMut(&str)) {
        if !std::mem::take(&mut self.incomplete).is_empty() {
            self.add_char(char::REPLACEMENT_CHARACTER, on_line);
        }
        if self.length() > 0 {
            self.flush(on_line);
        }
    }

    fn add_text(&mut self, mut text: &str, on_line: &mut dyn FnMut(&str)) {
        while let Some(c) = text.chars().next() {
            // Most output is printable ASCII, which needs no look at each character.
            let is_plain = self.filter.is_idle() && !self.returned && self.backspaces == 0;
            let plain = text.bytes().take_while(|b| is_plain && matches!(b, b' '..=b'~')).count();
            if plain > 0 {
                let (run, rest) = text.split_at(plain.min(self.length_max() - self.length()));
                self.line.push_str(run);
                self.flush_if_long(on_line);
                text = rest;
            } else {
                self.add_char(c, on_line);
                text = &text[c.len_utf8()..];
            }
        }
    }

    fn add_char(&mut self, c: char, on_line: &mut dyn FnMut(&str)) {
        let is_visible = self.filter.passes(c);
        match c {
            '\n' => self.flush(on_line),
            '\r' => self.returned = true,
            '\u{8}' => self.backspaces += 1,
            _ if is_visible => self.push(c, on_line),
            _ => {}
        }
    }

    fn push(&mut self, c: char, on_line: &mut dyn FnMut(&str)) {
        if std::mem::take(&mut self.returned) {
            let context = self.secrets.longest_masked().saturating_sub(1);
            let from = self.line.ceil_char_boundary(self.line.len().saturating_sub(context));
            self.line.drain(..from);
            self.start = self.line.len();
            self.backspaces = 0;
        }
        for _ in 0..std::mem::take(&mut self.backspaces) {
            if self.line.len() > self.start {
                self.line.pop();
            }
        }
        self.line.push(c);
        self.flush_if_long(on_line);
    }

    /// The length of the line's newest state.
    fn length(&self) -> usize {
        self.line.len() - self.start
    }

    /// The length at which a line is split. It is larger than a line. So if a secret begins before the cut, the buffer
    /// contains the whole secret.
    fn length_max(&self) -> usize {
        LINE_MAX + self.secrets.longest_masked()
    }

    fn flush_if_long(&mut self, on_line: &mut dyn FnMut(&str)) {
        if self.length() >= self.length_max() {
            self.flush_long(on_line);
        }
    }

    /// Passes the first part of a long line to `on_line`. The line is never cut inside a character or a secret.
    fn flush_long(&mut self, on_line: &mut dyn FnMut(&str)) {
        let mut cut = self.line.floor_char_boundary(self.start + LINE_MAX);
        while let Some((begin, end)) = self.secrets.masked_range_across(self.line.as_bytes(), cut) {
            cut = if begin <= self.start { end } else { begin };
            if begin <= self.start {
                break;
            }
        }
        let tail = self.line.split_off(cut);
        self.flush(on_line);
        self.line = tail;
    }

    fn flush(&mut self, on_line: &mut dyn FnMut(&str)) {
        // A secret that begins in replaced text is masked, too.
        let across =
            (self.start > 0).then(|| self.secrets.masked_range_across(self.line.as_bytes(), self.start));
        match across.flatten() {
            Some((_, end)) => on_line(&self.secrets.mask(&format!("{MASK}{}", &self.line[end..]))),
            None => on_line(&self.secrets.mask(&self.line[self.start..])),
        }
        self.line.clear();
        (self.start, self.returned, self.backspaces) = (0, false, 0);
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
    fn escape_sequences_are_left_out() {
        for (output, expected) in [
            ("\u{1b}[31mred\u{1b}[0m\u{7}\tx", "red\tx"),
            ("\u{9b}31mred", "red"),
            ("\u{1b}]0;title\u{7}text", "text"),
            ("\u{1b}]0;title\u{1b}\\text", "text"),
            ("a\u{202e}b\u{200b}c\u{feff}", "abc"),
            ("café 🦀\0", "café 🦀"),
        ] {
            // The bytes arrive together, or one by one.
            let line = format!("{output}\n");
            assert_eq!(lines(&[line.as_bytes()]), [expected], "{output:?}");
            let single: Vec<_> = line.as_bytes().chunks(1).collect();
            assert_eq!(lines(&single), [expected], "{output:?}");
        }
        assert_eq!(lines(&[b"\xff\n", b"a\xc3\n", b"b\xc3"]), ["\u{fffd}", "a\u{fffd}", "b\u{fffd}"]);
        assert_eq!(lines(&[b"\x1b]0;no end\nnext\n"]), ["", "next"], "a newline ends a sequence");
        let endless = format!("\u{1b}]{}", "x".repeat(10_000));
        assert!(lines(&[endless.as_bytes()])[0].len() > 5000, "a sequence has a maximum length");
    }

    #[test]
    fn a_line_is_shown_in_its_newest_state() {
        for (output, expected) in [
            ("(5%\r(10%\r\n", "(10%"),
            ("a\r\r\n", "a"),
            ("50 %\r\u{1b}[K100 %\u{1b}[0m\r\n", "100 %"),
            ("10 %\u{8}\u{8}\u{8}\u{8}20 %\n", "20 %"),
            ("|\u{8}/\u{8}-\u{8}\n", "-"),
            ("N\u{8}NA\u{8}AME\n", "NAME"),
            ("\u{8}\u{8}x\n", "x"),
        ] {
            assert_eq!(lines(&[output.as_bytes()]), [expected], "{output:?}");
        }
    }

    #[test]
    fn nothing_in_a_secret_hides_it() {
        let secrets =
            Secrets::of_test(&[("TOKEN", "hunter2-hunter2"), ("COLOR", "\u{1b}[31mred-secret\u{1b}[0m")]);
        let long = format!("{}hunter\u{1b}[1m2-hunter2", "x".repeat(LINE_MAX - 8));
        for (output, expected) in [
            ("hun\u{1b}[31mter2-hun\u{1b}]0;t\u{7}ter2", "***"),
            ("a hunter2\u{9b}1m-\u{200b}hunter2 b", "a *** b"),
            ("hunter2-\rhunter2", "***"),
            ("hunter2-\rhunter2, and\tmore", "***, and\tmore"),
            ("hunter2-hunter2\rok", "ok"),
            ("hunter2-xx\u{8}\u{8}hunter2", "***"),
            ("\u{1b}[31mred-secret\u{1b}[0m", "***"),
        ] {
            let mut seen = Vec::new();
            let mut lines = OutputLines::without(&secrets);
            lines.add(format!("{output}\n").as_bytes(), &mut |line| seen.push(line.to_owned()));
            assert_eq!(seen, [expected], "{output:?}");
        }
        let (mut lines, mut seen) = (OutputLines::without(&secrets), String::new());
        lines.add(long.as_bytes(), &mut |line| seen.push_str(line));
        lines.finish(&mut |line| seen.push_str(line));
        assert_eq!(seen, format!("{}***", "x".repeat(LINE_MAX - 8)));
    }

    #[test]
    fn endless_progress_needs_little_memory() {
        let mut lines = OutputLines::without(&Secrets::of_test(&[("TOKEN", "hunter2-hunter2")]));
        for percent in 0..100_000 {
            lines.add(format!("\r{percent}").as_bytes(), &mut |line| panic!("{line}"));
        }
        assert!(lines.line.len() < 200, "{}", lines.line.len());
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
        lines.add(b"a first line\nsecond line b\nhun\x1b[mter2-hunter2\n", &mut |line| {
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
