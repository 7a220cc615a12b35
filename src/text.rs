//! Formatting of text that people read.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

pub fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

/// A list for an error: the first items, and the number of the others. The others are not in memory.
pub struct ShortList {
    first: Vec<String>,
    max: usize,
    more: usize,
}

impl ShortList {
    pub fn new(max: usize) -> Self {
        Self { first: Vec::new(), max, more: 0 }
    }

    /// Adds an item. `item` is not called if the list is full.
    pub fn add(&mut self, item: impl FnOnce() -> String) {
        match self.first.len() < self.max {
            true => self.first.push(item()),
            false => self.more += 1,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// Joins the items. If there are more than `max`, the last part is `and N more`.
    pub fn join(mut self, separator: &str) -> String {
        if self.more > 0 {
            self.first.push(format!("and {} more", self.more));
        }
        self.first.join(separator)
    }
}

/// Joins the first `max` items. If there are more items, the last part is `and N more`.
pub fn list_first(items: &[String], max: usize, separator: &str) -> String {
    let shown = &items[..items.len().min(max)];
    let more = items.len() - shown.len();
    let mut list = shown.join(separator);
    if more > 0 {
        list += &format!("{separator}and {more} more");
    }
    list
}

/// Quotes a word for a shell, if necessary. A word with invisible characters is quoted as `$'…'`, so that a terminal
/// shows the whole word.
pub fn shell_quote(word: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+@%=:,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return Cow::Borrowed(word);
    }
    if !word.chars().any(is_unprintable) {
        return Cow::Owned(format!("'{}'", word.replace('\'', r"'\''")));
    }
    let escape = |c: char| match c {
        '\n' => r"\n".to_owned(),
        '\t' => r"\t".to_owned(),
        '\'' | '\\' => format!("\\{c}"),
        c if !is_unprintable(c) => c.to_string(),
        c if c.is_ascii() => format!("\\x{:02x}", u32::from(c)),
        c => format!("\\U{:08x}", u32::from(c)),
    };
    Cow::Owned(format!("$'{}'", word.chars().map(escape).collect::<String>()))
}

/// Quotes the words of a command for a shell.
pub fn shell_command<W: AsRef<str>>(words: &[W]) -> String {
    words.iter().map(|word| shell_quote(word.as_ref())).collect::<Vec<_>>().join(" ")
}

/// The maximum length of an escape sequence with a text, such as the title of a window. Longer texts are not part of the
/// sequence, so that a sequence without an end cannot hide the rest of a line.
const SEQUENCE_TEXT_MAX: usize = 4096;
/// The maximum length of the parameters of a control sequence.
const PARAMETERS_MAX: usize = 64;

/// Removes all escape sequences and all invisible characters: control characters, and the characters that change the
/// direction of text or have no width. Only tabs and newlines are not removed.
pub fn without_control_characters(text: &str) -> Cow<'_, str> {
    if !text.contains(|c| is_unprintable(c) && !matches!(c, '\t' | '\n')) {
        return Cow::Borrowed(text);
    }
    let mut filter = EscapeFilter::default();
    Cow::Owned(text.chars().filter(|c| filter.passes(*c) || *c == '\n').collect())
}

/// Returns whether a character has no visible form: a control character, a character that ends a line, or one that
/// Unicode calls ignorable (`Default_Ignorable_Code_Point`). The last kind includes the characters that change the
/// direction of text, that have no width, and that look like a space although they are letters.
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// Returns a name or another text that oven did not write, such as the path of a file in an image, in a form that can
/// be printed: newlines and other invisible characters are escaped as in Rust, and bytes that are not UTF-8 as `\xNN`.
pub fn escape_name<N: AsRef<OsStr> + ?Sized>(name: &N) -> String {
    let mut escaped = String::new();
    for chunk in name.as_ref().as_encoded_bytes().utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\n' | '\r' | '\t' => escaped.extend(c.escape_default()),
                c if is_unprintable(c) => escaped.extend(c.escape_unicode()),
                c => escaped.push(c),
            }
        }
        chunk.invalid().iter().for_each(|byte| escaped += &format!("\\x{byte:02x}"));
    }
    escaped
}

/// Like [`escape_name`], but cuts off a name that has more than `max` characters.
pub fn shorten_name<N: AsRef<OsStr> + ?Sized>(name: &N, max: usize) -> String {
    let name = name.as_ref();
    // A character has at most 4 bytes, and its escaped form is not shorter. So the rest is not escaped in vain.
    let bytes = name.as_encoded_bytes();
    let start = &bytes[..bytes.len().min(4 * (max + 1))];
    let escaped = escape_name(OsStr::from_bytes(start));
    match escaped.char_indices().nth(max) {
        Some((end, _)) => format!("{}…", &escaped[..end]),
        None => escaped,
    }
}

/// Escapes the invisible characters of a JSON text that its serialization does not escape. Its value does not change.
pub fn escape_json(json: &str) -> Cow<'_, str> {
    let is_raw = |c: char| is_unprintable(c) && c != '\n';
    if !json.contains(is_raw) {
        return Cow::Borrowed(json);
    }
    let mut escaped = String::new();
    for c in json.chars() {
        match c {
            c if is_raw(c) => {
                c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| escaped += &format!("\\u{unit:04x}"))
            }
            c => escaped.push(c),
        }
    }
    Cow::Owned(escaped)
}

/// Indents every line except the first by `spaces`, unless it is already indented. Then a text that contains newlines
/// cannot look like several messages.
pub fn indent_continuations<'t>(text: &'t str, spaces: &str) -> Cow<'t, str> {
    if !text.contains('\n') {
        return Cow::Borrowed(text);
    }
    let line =
        |line: &str| if line.starts_with(spaces) { line.to_owned() } else { format!("{spaces}{line}") };
    let mut lines = text.split('\n');
    let first = lines.next().unwrap_or_default().to_owned();
    Cow::Owned(lines.fold(first, |text, next| format!("{text}\n{}", line(next))))
}

/// Recognizes the escape sequences of terminals in a stream of characters (ECMA-48): control sequences (CSI), sequences
/// with a text (OSC, DCS, PM, APC, SOS), and short sequences. The introducers of C1 are recognized, too. A newline and a
/// carriage return end every sequence.
#[derive(Debug, Default, Clone, Copy)]
pub struct EscapeFilter(Sequence);

/// The part of a sequence that comes next.
#[derive(Debug, Default, Clone, Copy)]
enum Sequence {
    /// No sequence.
    #[default]
    None,
    /// The character after ESC.
    Begun,
    /// The end of a short sequence with intermediate characters, such as `ESC ( B`.
    Short,
    /// Parameters and the final character of a control sequence. The number is their length.
    Control(usize),
    /// The text of a sequence, which BEL or ST ends. The number is its length.
    Text(usize),
}

impl EscapeFilter {
    /// Returns whether no sequence has begun.
    pub fn is_idle(self) -> bool {
        matches!(self.0, Sequence::None)
    }

    /// Returns whether the next character of the stream is visible: it is not part of a sequence, and it is printable or
    /// a tab.
    pub fn passes(&mut self, c: char) -> bool {
        let (state, is_part) = match (self.0, c) {
            (_, '\u{1b}') => (Sequence::Begun, true),
            (_, '\u{9b}') => (Sequence::Control(0), true),
            (_, '\u{90}' | '\u{98}' | '\u{9d}'..='\u{9f}') => (Sequence::Text(0), true),
            // CAN, SUB, ST and other C1 characters, and the ends of a line.
            (_, '\n' | '\r' | '\u{18}' | '\u{1a}' | '\u{80}'..='\u{9f}') => (Sequence::None, true),
            (Sequence::Begun, '[') => (Sequence::Control(0), true),
            (Sequence::Begun, ']' | 'P' | 'X' | '^' | '_') => (Sequence::Text(0), true),
            (Sequence::Begun | Sequence::Short, ' '..='/') => (Sequence::Short, true),
            (Sequence::Begun | Sequence::Short, '0'..='~') => (Sequence::None, true),
            (Sequence::Control(length), ' '..='?') if length < PARAMETERS_MAX => {
                (Sequence::Control(length + 1), true)
            }
            (Sequence::Control(_), '@'..='~') => (Sequence::None, true),
            (Sequence::Text(_), '\u{7}') => (Sequence::None, true),
            (Sequence::Text(length), _) if length < SEQUENCE_TEXT_MAX => (Sequence::Text(length + 1), true),
            // Any other character is not part of the sequence, which ends before it.
            (_, _) => (Sequence::None, false),
        };
        self.0 = state;
        !is_part && (c == '\t' || !is_unprintable(c))
    }
}

/// Returns the parts of a text that the `*`s of a pattern match, or `None` if the pattern does not match the whole
/// text. Each `*` matches as little as possible.
pub fn match_wildcards<'t>(pattern: &str, text: &'t str) -> Option<Vec<&'t str>> {
    let mut pieces = pattern.split('*');
    let mut rest = text.strip_prefix(pieces.next()?)?;
    let pieces: Vec<_> = pieces.collect();
    let Some((last, middle)) = pieces.split_last() else { return rest.is_empty().then(Vec::new) };
    let mut found = Vec::new();
    for piece in middle {
        let (before, after) = rest.split_once(piece)?;
        found.push(before);
        rest = after;
    }
    found.push(rest.strip_suffix(last)?);
    Some(found)
}

/// Formats a size in MiB or GiB.
pub fn human_size(bytes: u64) -> String {
    match bytes {
        0..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        let words = ["/bin/sh", "-e", "A=b", "a b", "it's", "", "$x", "a\nb\u{1b}", "\u{202e}\\'ü", "über"];
        let quoted = r"/bin/sh -e A=b 'a b' 'it'\''s' '' '$x' $'a\nb\x1b' $'\U0000202e\\\'ü' über";
        assert_eq!(shell_command(&words), quoted);
    }

    #[test]
    fn a_long_list_ends_with_the_number_of_the_other_items() {
        let items = ["a", "b", "c"].map(str::to_owned);
        assert_eq!(list_first(&items, 3, ", "), "a, b, c");
        assert_eq!(list_first(&items, 2, ", "), "a, b, and 1 more");
        assert_eq!(list_first(&items, 1, "\n    "), "a\n    and 2 more");
        assert_eq!(list_first(&[], 1, ", "), "");
    }

    #[test]
    fn names_are_escaped() {
        use std::os::unix::ffi::OsStrExt;
        for (name, expected) in [
            (&b"/etc/caf\xc3\xa9 \xf0\x9f\xa6\x80"[..], "/etc/café 🦀"),
            (b"x\nerror: forged", r"x\nerror: forged"),
            (b"a\tb\rc", r"a\tb\rc"),
            (b"\x1b[31mred\x07", r"\u{1b}[31mred\u{7}"),
            (b"\x7f\xc2\x9b31m", r"\u{7f}\u{9b}31m"),
            (b"invalid \xff\xc3", r"invalid \xff\xc3"),
            ("gpj.\u{202e}exe".as_bytes(), r"gpj.\u{202e}exe"),
            (
                "\u{2066}a\u{2069}\u{200b}\u{feff}\u{61c}".as_bytes(),
                r"\u{2066}a\u{2069}\u{200b}\u{feff}\u{61c}",
            ),
            ("tag\u{e0041}\u{2028}".as_bytes(), r"tag\u{e0041}\u{2028}"),
            (br"system-systemd\x2dfsck.slice", r"system-systemd\x2dfsck.slice"),
            (b"", ""),
        ] {
            assert_eq!(escape_name(OsStr::from_bytes(name)), expected, "{name:?}");
        }
    }

    #[test]
    fn long_names_are_cut_off_after_whole_characters() {
        for (name, max, expected) in [
            ("abc", 3, "abc"),
            ("abcd", 3, "abc…"),
            ("a🦀🦀🦀", 3, "a🦀🦀…"),
            ("🦀🦀🦀", 3, "🦀🦀🦀"),
            ("\n\n", 3, r"\n\…"),
        ] {
            assert_eq!(shorten_name(name, max), expected, "{name:?}");
        }
    }

    #[test]
    fn invisible_characters_are_unprintable() {
        // `Default_Ignorable_Code_Point` of Unicode 16.
        for (first, last) in [
            (0xad, 0xad),
            (0x34f, 0x34f),
            (0x61c, 0x61c),
            (0x115f, 0x1160),
            (0x17b4, 0x17b5),
            (0x180b, 0x180f),
            (0x200b, 0x200f),
            (0x202a, 0x202e),
            (0x2060, 0x206f),
            (0x3164, 0x3164),
            (0xfe00, 0xfe0f),
            (0xfeff, 0xfeff),
            (0xffa0, 0xffa0),
            (0xfff0, 0xfff8),
            (0x1bca0, 0x1bca3),
            (0x1d173, 0x1d17a),
            (0xe0000, 0xe0fff),
        ] {
            for c in (first..=last).filter_map(char::from_u32) {
                assert!(is_unprintable(c), "{c:?}");
                assert_eq!(without_control_characters(&format!("a{c}b")), "ab");
                assert_eq!(escape_name(&c.to_string()), format!("\\u{{{:x}}}", u32::from(c)));
            }
        }
        for c in "é\u{301}\u{350}\u{200a}\u{2010}\u{1161}한ㄱ🦀\u{e1000}".chars() {
            assert!(!is_unprintable(c), "{c:?}");
        }
    }

    #[test]
    fn whole_escape_sequences_are_removed() {
        let long = format!("\u{1b}]0;{}", "x".repeat(SEQUENCE_TEXT_MAX + 10));
        for (text, expected) in [
            ("plain\ttext\n", "plain\ttext\n"),
            ("\u{1b}[31mred\u{1b}[0m", "red"),
            ("\u{1b}[1;38;2;1;2;3mx\u{1b}[?25l\u{1b}[2K\u{1b}[>4;2m", "x"),
            ("\u{9b}31mred\u{9b}m", "red"),
            ("a\u{1b}]0;title\u{7}b\u{1b}]8;;http://x\u{1b}\\c\u{9d}2;t\u{9c}d", "abcd"),
            ("a\u{1b}Pq#0\u{1b}\\b\u{1b}_apc\u{1b}\\c\u{1b}^pm\u{1b}\\d\u{1b}Xsos\u{1b}\\e", "abcde"),
            ("\u{1b}(Bx\u{1b}7y\u{1b}=z\u{1b}c", "xyz"),
            ("\u{1b}\u{1b}[31mx", "x"),
            ("\u{1b}[31é", "é"),
            ("\u{1b}]0;without an end\nnext", "\nnext"),
            ("\u{1b}[31\nnext", "\nnext"),
            ("\u{1b}", ""),
            ("bell\u{7} del\u{7f} nul\0", "bell del nul"),
            ("a\u{202e}b\u{200b}c", "abc"),
            (&long, "xxxxxxxxxxxx"),
        ] {
            assert_eq!(without_control_characters(text), expected, "{text:?}");
        }
    }

    #[test]
    fn json_is_printable_and_has_the_same_value() {
        let value = serde_json::json!({"name": "a\u{202e}b\u{9b}c\u{e0041}\n\u{7f}é"});
        for text in [value.to_string(), format!("{value:#}")] {
            let escaped = escape_json(&text);
            assert!(!escaped.contains(|c| is_unprintable(c) && c != '\n'), "{escaped}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).unwrap(), value);
        }
    }

    #[test]
    fn lines_after_the_first_are_indented() {
        assert_eq!(indent_continuations("one", "  "), "one");
        assert_eq!(indent_continuations("x\nerror: forged\n    | a", "  "), "x\n  error: forged\n    | a");
    }
}
