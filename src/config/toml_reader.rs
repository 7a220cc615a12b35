//! A TOML file, read by hand: serde says what it expected, people want to know where, which key, and what to do.
//!
//! Reading goes on after a mistake, so that one run tells them all.

use crate::error::Kind;
use anyhow::Result;
use std::cell::RefCell;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Far more than anybody writes by hand: a wrong file is refused before it fills the memory.
const MAX_BYTES: u64 = 1 << 20;
/// More mistakes than this are only counted.
const MAX_MISTAKES: usize = 20;

/// A file under examination, and what was found wrong in it.
pub(crate) struct Document {
    /// Where each line ends.
    ends: Vec<usize>,
    /// The keys at the top.
    known: &'static [&'static str],
    mistakes: RefCell<Vec<(usize, String)>>,
}

/// A table whose keys are all known.
pub(crate) struct Table<'d, 't> {
    document: &'d Document,
    /// As a header spells it: `[disk]`; empty at the top.
    header: &'static str,
    entries: &'d DeTable<'t>,
    pub line: usize,
}

/// What an array of strings and tables holds.
pub(crate) enum Element<'d, 't> {
    Text(At<&'d str>),
    Table(Table<'d, 't>),
}

/// A value, and the line it is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct At<T> {
    pub value: T,
    pub line: usize,
}

/// The text of a file of settings: a regular file of a sane size, in UTF-8.
pub(crate) fn read_text(file: &Path) -> Result<String> {
    let wrong = |what: String| Kind::Definition.error(format!("{}: {what}", file.display()));
    let mut open = std::fs::File::options();
    // A FIFO must not block us.
    std::os::unix::fs::OpenOptionsExt::custom_flags(open.read(true), libc::O_NONBLOCK | libc::O_NOCTTY);
    let opened = open.open(file).map_err(|e| wrong(format!("cannot be read: {e}")))?;
    let metadata = opened.metadata().map_err(|e| wrong(e.to_string()))?;
    if !metadata.is_file() {
        return Err(wrong(format!("is {}, not a file", kind_of(&metadata))));
    }
    let mut bytes = Vec::new();
    opened.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| wrong(format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(wrong("is larger than 1 MiB: that is no file of settings".into()));
    }
    String::from_utf8(bytes).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = good.iter().filter(|b| **b == b'\n').count() + 1;
        Kind::Definition.error(format!("{}:{line}: not UTF-8", file.display()))
    })
}

/// What something is, with its article: `a directory`.
pub(crate) fn kind_of(metadata: &std::fs::Metadata) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    let kind = metadata.file_type();
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () if kind.is_block_device() || kind.is_char_device() => "a device",
        () => "a file",
    }
}

/// Reads a whole document. `known` are the keys of its top.
pub(crate) fn read<'t, T>(
    file: &Path,
    text: &'t str,
    known: &'static [&'static str],
    read: impl FnOnce(&Table<'_, 't>) -> T,
) -> Result<T> {
    let ends = text.match_indices('\n').map(|(at, _)| at).collect();
    let document = Document { ends, known, mistakes: RefCell::default() };
    let parsed = DeTable::parse(text).map_err(|e| {
        let line = e.span().map_or(1, |span| document.line(span.start));
        Kind::Definition.error(format!("{}:{line}: {}", file.display(), syntax(text, line, e.message())))
    })?;
    let top = document.table("", parsed.get_ref(), known, 1);
    let value = read(&top);
    let mut mistakes = document.mistakes.take();
    if mistakes.is_empty() {
        return Ok(value);
    }
    mistakes.sort_by_key(|(line, _)| *line);
    let more = mistakes.len().saturating_sub(MAX_MISTAKES);
    let mut lines: Vec<String> = mistakes
        .iter()
        .take(MAX_MISTAKES)
        .map(|(line, what)| format!("{}:{line}: {what}", file.display()))
        .collect();
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    Err(Kind::Definition.error(lines.join("\n")))
}

/// A mistake of syntax: the parser knows neither the key nor what people commonly get wrong.
fn syntax(text: &str, line: usize, message: &str) -> String {
    let content = text.lines().nth(line - 1).unwrap_or_default().trim();
    let Some((key, value)) = content.split_once('=') else {
        let shown: String = content.chars().take(40).collect();
        return format!("{message} (in {shown:?})");
    };
    let (key, value): (String, _) = (key.trim().chars().take(40).collect(), value.trim());
    let number = |c: char| c.is_ascii_digit() || "+-".contains(c);
    let advice = match value.chars().next() {
        // The value itself is not shown: it may be a secret.
        Some('0') if message.contains("leading zero") => ": a mode is written in quotes, \"0644\"",
        Some(c) if !number(c) && !"\"'[{#".contains(c) && !["true", "false"].contains(&value) => {
            ": a text is written in quotes"
        }
        _ => "",
    };
    format!("`{}`: {message}{advice}", key.escape_debug())
}

/// The line of a key at the top, or of a table's (`disk.iops`, or `iops` alone), or of what in its array `pick` accepts:
/// a string, or a table that holds such a string.
pub(crate) fn line_of(text: &str, key: &str, pick: &dyn Fn(&str) -> bool) -> Option<usize> {
    let parsed = DeTable::parse(text).ok()?;
    let (top, mut names) = (parsed.get_ref(), key.split('.'));
    let first = names.next()?;
    let below = || top.values().find_map(|value| value.get_ref().as_table()?.get_key_value(first));
    let (mut name, mut value) = top.get_key_value(first).or_else(below)?;
    for key in names {
        // Where the table lacks it, its own line is told.
        match value.get_ref().as_table().and_then(|table| table.get_key_value(key)) {
            Some(found) => (name, value) = found,
            None => break,
        }
    }
    let picked = |element: &DeValue| match element {
        DeValue::Table(table) => table.values().any(|value| value.get_ref().as_str().is_some_and(pick)),
        other => other.as_str().is_some_and(pick),
    };
    let element = value
        .get_ref()
        .as_array()
        .and_then(|array| array.iter().find(|element| picked(element.get_ref())).map(Spanned::span));
    let start = element.unwrap_or_else(|| name.span()).start;
    Some(text[..start].matches('\n').count() + 1)
}

impl Document {
    fn line(&self, offset: usize) -> usize {
        self.ends.partition_point(|end| *end < offset) + 1
    }

    fn table<'d, 't>(
        &'d self,
        header: &'static str,
        entries: &'d DeTable<'t>,
        known: &'static [&'static str],
        line: usize,
    ) -> Table<'d, 't> {
        let table = Table { document: self, header, entries, line };
        for (key, _) in entries.iter().filter(|(key, _)| !known.contains(&&**key.get_ref())) {
            let name = key.get_ref();
            // TOML's own trap: whatever follows a header belongs to it.
            let advice = if !header.is_empty() && self.known.contains(&&**name) {
                "it belongs above the first header of the file".into()
            } else {
                nearest(name, known)
            };
            let line = self.line(key.span().start);
            table.mistake(line, format!("unknown key `{}`{}: {advice}", name.escape_debug(), table.of()));
        }
        table
    }
}

/// What an unknown key may have meant.
pub(crate) fn nearest(name: &str, known: &[&str]) -> String {
    /// Below it, the resemblance is chance: then all the keys are told.
    const ALIKE: f64 = 0.8;
    let alike = |key: &&&str| strsim::jaro_winkler(name, key);
    match known.iter().max_by(|a, b| alike(a).total_cmp(&alike(b))) {
        Some(key) if alike(&key) >= ALIKE => format!("did you mean `{key}`?"),
        _ => format!("known are {}", listed(known)),
    }
}

/// `a`, `b` and `c`.
pub(crate) fn listed(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}

impl<'d, 't> Table<'d, 't> {
    /// Notes a mistake: which key, what is wrong, what to do.
    pub fn mistake(&self, line: usize, what: impl Into<String>) {
        self.document.mistakes.borrow_mut().push((line, what.into()));
    }

    /// The same for the value of a key; answers `None`, so that it ends a reading function.
    pub fn wrong<T>(&self, key: &str, line: usize, what: impl std::fmt::Display) -> Option<T> {
        self.mistake(line, format!("`{key}`{} {what}", self.of()));
        None
    }

    /// Takes what a check answered, or notes what it found wrong.
    pub fn check<T>(&self, key: &str, line: usize, checked: Result<T, String>) -> Option<T> {
        checked.map_or_else(|what| self.wrong(key, line, what), Some)
    }

    /// ` of [disk]`; nothing at the top.
    fn of(&self) -> String {
        if self.header.is_empty() { String::new() } else { format!(" of {}", self.header) }
    }

    /// A mistake if the key is not there.
    pub fn required<T>(&self, key: &str, value: Option<T>, what: &str) -> Option<T> {
        if value.is_none() && !self.entries.contains_key(key) {
            self.mistake(self.line, format!("`{key}`{} is missing: {what}", self.of()));
        }
        value
    }

    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// Any value of a key.
    pub fn value(&self, key: &str) -> Option<At<&'d DeValue<'t>>> {
        self.entries.get(key).map(|value| self.at(value))
    }

    fn at<'v>(&self, value: &'v Spanned<DeValue<'t>>) -> At<&'v DeValue<'t>> {
        At { value: value.get_ref(), line: self.document.line(value.span().start) }
    }

    /// Of the wrong type: `expected` says what it should be, with an example.
    pub fn wrong_type<T>(&self, key: &str, at: &At<&DeValue>, expected: &str) -> Option<T> {
        let is = match at.value {
            DeValue::Array(_) => "an array".into(),
            DeValue::Integer(_) => "an integer".into(),
            other => format!("a {}", other.type_str()),
        };
        self.wrong(key, at.line, format_args!("is {is}: it should be {expected}"))
    }

    pub fn string(&self, key: &str, expected: &str) -> Option<At<&'d str>> {
        let at = self.value(key)?;
        match at.value {
            DeValue::String(text) => Some(At { value: text, line: at.line }),
            _ => self.wrong_type(key, &at, expected),
        }
    }

    pub fn boolean(&self, key: &str) -> Option<bool> {
        let at = self.value(key)?;
        at.value.as_bool().or_else(|| self.wrong_type(key, &at, "`true` or `false`"))
    }

    pub fn integer(&self, key: &str, range: RangeInclusive<u64>, unit: &str) -> Option<u64> {
        let (low, high) = (range.start(), range.end());
        let at = self.value(key)?;
        let DeValue::Integer(integer) = at.value else {
            return self.wrong_type(key, &at, &format!("a number of {unit}, such as {}", low + 7));
        };
        let number = i128::from_str_radix(integer.as_str(), integer.radix()).ok();
        number.and_then(|n| u64::try_from(n).ok()).filter(|n| range.contains(n)).or_else(|| {
            self.wrong(key, at.line, format_args!("is {integer}: it should be {low} to {high} {unit}"))
        })
    }

    /// An array of strings; each has its line.
    pub fn strings(&self, key: &str, expected: &str) -> Vec<At<&'d str>> {
        let Some(at) = self.value(key) else { return Vec::new() };
        let Some(array) = at.value.as_array() else {
            return self.wrong_type(key, &at, expected).unwrap_or_default();
        };
        let strings = array.iter().filter_map(|element| {
            let at = self.at(element);
            match at.value {
                DeValue::String(text) => Some(At { value: &**text, line: at.line }),
                _ => self.wrong_type(key, &at, expected),
            }
        });
        strings.collect()
    }

    /// An array of strings and inline tables. `header`: what a message calls such a table; `known`: its keys.
    pub fn elements(
        &self,
        key: &str,
        expected: &str,
        header: &'static str,
        known: &'static [&'static str],
    ) -> Vec<Element<'d, 't>> {
        let Some(at) = self.value(key) else { return Vec::new() };
        let Some(array) = at.value.as_array() else {
            return self.wrong_type(key, &at, expected).unwrap_or_default();
        };
        let elements = array.iter().filter_map(|element| {
            let at = self.at(element);
            match at.value {
                DeValue::String(text) => Some(Element::Text(At { value: &**text, line: at.line })),
                DeValue::Table(entries) => {
                    Some(Element::Table(self.document.table(header, entries, known, at.line)))
                }
                _ => self.wrong_type(key, &at, expected),
            }
        });
        elements.collect()
    }

    /// `[key]`, or an inline table.
    pub fn table(
        &self,
        key: &str,
        header: &'static str,
        known: &'static [&'static str],
    ) -> Option<Table<'d, 't>> {
        let at = self.value(key)?;
        match at.value {
            DeValue::Table(entries) => Some(self.document.table(header, entries, known, at.line)),
            _ => self.wrong_type(key, &at, &format!("a table: {header}")),
        }
    }

    /// `[[key]]`, as often as it is written.
    pub fn tables(
        &self,
        key: &str,
        header: &'static str,
        known: &'static [&'static str],
    ) -> Vec<Table<'d, 't>> {
        let Some(at) = self.value(key) else { return Vec::new() };
        let expected = format!("one or more tables, each under a header {header}");
        let Some(array) = at.value.as_array() else {
            return self.wrong_type(key, &at, &expected).unwrap_or_default();
        };
        let tables = array.iter().filter_map(|element| {
            let at = self.at(element);
            match at.value {
                DeValue::Table(entries) => Some(self.document.table(header, entries, known, at.line)),
                _ => self.wrong_type(key, &at, &expected),
            }
        });
        tables.collect()
    }

    /// Every entry, for a table whose keys are the user's own: key, line of the key, value.
    pub fn entries(&self) -> impl Iterator<Item = (At<&'d str>, At<&'d DeValue<'t>>)> + use<'_, 'd, 't> {
        self.entries.iter().map(|(key, value)| {
            (At { value: &**key.get_ref(), line: self.document.line(key.span().start) }, self.at(value))
        })
    }

    /// A table with the user's own keys.
    pub fn free_table(&self, key: &str, header: &'static str) -> Option<Table<'d, 't>> {
        let at = self.value(key)?;
        match at.value {
            DeValue::Table(entries) => {
                Some(Table { document: self.document, header, entries, line: at.line })
            }
            _ => self.wrong_type(key, &at, &format!("a table: {header}")),
        }
    }
}
