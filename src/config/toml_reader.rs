//! Reads TOML files without serde, because serde's errors say only what serde expected. People also need the line, the
//! key, and advice.
//!
//! Reading continues after a mistake, so that one run reports all mistakes.

use crate::config::key_table::{DefaultValue, Literal, Section, TomlKey, UserTable, ValueType};
use crate::config::toml_syntax;
use crate::config::within::resolve_within;
use crate::error::{Failure, Kind, Mistake, Place};
pub(crate) use crate::sys::fds::kind_of;
use crate::sys::fds::{PathRefusal, open_file_within};
use crate::sys::signals::is_stop_requested;
use crate::text::escape_name;
use anyhow::Result;
use std::cell::RefCell;
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The maximal size of a file. Nobody writes a larger file by hand. So a larger file is a mistake, and is refused
/// before it fills the memory.
const MAX_BYTES: u64 = 1 << 20;
/// The maximal number of mistakes that are listed. Further mistakes are only counted.
const MAX_MISTAKES: usize = 20;
/// The maximal number of characters of a mistake. The file may have values of any length.
const MAX_MISTAKE: usize = 2000;

/// A file that is being read, and the mistakes found in it.
pub(crate) struct Document {
    /// The offset of each line's end.
    ends: Vec<usize>,
    /// The keys that the file's top level may have.
    top: &'static Section,
    mistakes: RefCell<Mistakes>,
}

/// The first mistakes of a file, and the number of the others. A file may have very many mistakes, so only the listed
/// ones are in memory.
#[derive(Default)]
struct Mistakes {
    /// Sorted by line.
    first: Vec<FoundMistake>,
    more: usize,
}

struct FoundMistake {
    line: usize,
    /// The key with its table.
    key: Option<String>,
    /// The text after the file and the line.
    what: String,
    /// Advice that ends the text. A file's error contains the same advice only once, because it may be long.
    advice: String,
}

impl Mistakes {
    /// Returns whether a mistake on this line would be listed.
    fn lists(&self, line: usize) -> bool {
        self.first.len() < MAX_MISTAKES || self.first.last().is_some_and(|last| line < last.line)
    }

    fn add(&mut self, line: usize, key: Option<String>, what: &str, advice: String) {
        if !self.lists(line) {
            self.more += 1;
            return;
        }
        let what = shorten(escape_name(what));
        let at = self.first.partition_point(|other| other.line <= line);
        self.first.insert(at, FoundMistake { line, key, what, advice });
        if self.first.len() > MAX_MISTAKES {
            self.first.pop();
            self.more += 1;
        }
    }
}

/// Cuts off a text after [`MAX_MISTAKE`] characters.
fn shorten(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(MAX_MISTAKE) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// A table of a file. Its unknown and missing keys were already recorded as mistakes.
pub(crate) struct Table<'d, 't> {
    document: &'d Document,
    /// The keys that the table may have.
    section: &'static Section,
    /// Set if the user chooses the names of the keys, as in `[tags]`.
    user: Option<&'static UserTable>,
    entries: &'d DeTable<'t>,
    pub line: usize,
}

/// An element of an array of strings and tables.
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

/// Reads a TOML file. It must be a regular file in UTF-8, of at most 1 MiB. It must be inside `project`, the canonical
/// path of a directory, even if a symbolic link leads to it. The file may come from a stranger. So an error does not
/// quote text of a file that cannot be parsed.
pub(crate) fn read_text(file: &Path, project: &Path) -> Result<String> {
    let wrong = |kind: Kind, what: String| {
        let place = Place::new(escape_name(file), None, None, "");
        kind.failure(format!("{place}: {what}")).at(&place)
    };
    let opened = open(file, project).map_err(|refused| match refused {
        PathRefusal::Outside(_) => wrong(Kind::Definition, format!("{refused} {}", escape_name(project))),
        refused => wrong(refused.kind(), refused.to_string()),
    })?;
    let mut bytes = Vec::new();
    opened
        .take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| wrong(Kind::Definition.of_io(&e), format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(wrong(Kind::Definition, "is larger than 1 MiB, the limit for this file".into()).into());
    }
    String::from_utf8(bytes).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = good.iter().filter(|b| **b == b'\n').count() + 1;
        let place = Place::new(escape_name(file), Some(line), None, "");
        Kind::Definition.failure(format!("{place}: the line is not valid UTF-8")).at(&place).into()
    })
}

/// Opens a file of a project. If it is a link, no place outside of the project is looked at.
fn open(file: &Path, project: &Path) -> Result<File, PathRefusal> {
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let dir = dir.canonicalize().map_err(PathRefusal::Io)?;
    if let Some(name) = file.file_name().filter(|_| dir.starts_with(project)) {
        resolve_within(&dir, Path::new(name), project)?;
    }
    open_file_within(file, project)
}

/// Returns the elements until a signal asks this process to end. Then [`read`] fails.
pub(crate) fn until_stopped<T>(elements: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    elements.into_iter().take_while(|_| !is_stop_requested())
}

/// Parses a file's text and calls `read` with its top level. `top` lists the keys that the top level may have. Errors:
/// [`Kind::Definition`], with file, line and key of every mistake that `read` or this function recorded;
/// [`Kind::Interrupted`] if a signal asked this process to end.
pub(crate) fn read<'t, T>(
    file: &Path,
    text: &'t str,
    top: &'static Section,
    read: impl FnOnce(&Table<'_, 't>) -> T,
) -> Result<T> {
    let ends = text.match_indices('\n').map(|(at, _)| at).collect();
    let document = Document { ends, top, mistakes: RefCell::default() };
    let parsed = DeTable::parse(text).map_err(|e| {
        let start = e.span().map_or(0, |span| span.start);
        let (start, what) = toml_syntax::describe(text, start, e.message());
        let line = document.line(start);
        let place = Place::new(escape_name(file), Some(line), toml_syntax::key_at(text, start), "");
        Kind::Definition.failure(format!("{place}: {what}")).at(&place)
    })?;
    let top = document.table(top, parsed.get_ref(), 1);
    let value = read(&top);
    if is_stop_requested() {
        return Err(Kind::Interrupted.error("interrupted"));
    }
    let mistakes = document.mistakes.take();
    if mistakes.first.is_empty() {
        return Ok(value);
    }
    Err(failure(file, mistakes).into())
}

/// The failure that lists the mistakes of a file.
fn failure(file: &Path, found: Mistakes) -> Failure {
    let file = escape_name(file);
    let mut advice_given = HashSet::new();
    let mistakes = found.first.into_iter().map(|FoundMistake { line, key, mut what, advice }| {
        if !advice.is_empty() && advice_given.insert(advice.clone()) {
            what += &format!(": {advice}");
        }
        let place = Place::new(file.clone(), Some(line), key, "");
        Mistake { message: format!("{place}: {what}"), place: Some(place), hint: None }
    });
    Kind::Definition.failure_of(mistakes.collect(), found.more)
}

/// The line of a key. `path` leads to it from the top level: `name`, `disk.iops`, or `file[1].owner` for a key of the
/// second `[[file]]`. If the path ends in an array, and `pick` accepts one of its elements, the result is the line of the
/// first such element. If an element is a table, `pick` is called with the strings in it. If the last key of the path is
/// missing, the result is the line of its table.
pub(crate) fn line_of(text: &str, path: &str, pick: &dyn Fn(&str) -> bool) -> Option<usize> {
    let parsed = DeTable::parse(text).ok()?;
    let (mut table, mut start) = (Some(parsed.get_ref()), None);
    let mut last = None;
    for part in path.split('.') {
        let (name, index) = match part.strip_suffix(']').and_then(|part| part.split_once('[')) {
            Some((name, index)) => (name, index.parse::<usize>().ok()),
            None => (part, None),
        };
        let Some((key, value)) = table.and_then(|table| table.get_key_value(name)) else { break };
        let element = index.map(|index| value.get_ref().as_array().and_then(|array| array.get(index)));
        let (found, span) = match element {
            None => (value, key.span()),
            Some(Some(element)) => (element, element.span()),
            Some(None) => break,
        };
        (table, start, last) = (found.get_ref().as_table(), Some(span.start), Some(found));
    }
    let picked = |element: &DeValue| match element {
        DeValue::Table(table) => table.values().any(|value| value.get_ref().as_str().is_some_and(pick)),
        other => other.as_str().is_some_and(pick),
    };
    let array = last.and_then(|value| value.get_ref().as_array());
    let element = array.and_then(|array| array.iter().find(|element| picked(element.get_ref())));
    let start = element.map(|element| element.span().start).or(start)?;
    Some(text[..start].matches('\n').count() + 1)
}

impl Document {
    fn line(&self, offset: usize) -> usize {
        self.ends.partition_point(|end| *end < offset) + 1
    }

    /// Makes a table, and records its unknown and missing keys as mistakes.
    fn table<'d, 't>(
        &'d self,
        section: &'static Section,
        entries: &'d DeTable<'t>,
        line: usize,
    ) -> Table<'d, 't> {
        let table = Table { document: self, section, user: None, entries, line };
        let unknown = entries.iter().filter(|(key, _)| section.key(key.get_ref()).is_none());
        for (key, _) in until_stopped(unknown) {
            let name = key.get_ref();
            let line = self.line(key.span().start);
            if !self.mistakes.borrow().lists(line) {
                self.mistakes.borrow_mut().more += 1;
                continue;
            }
            // In TOML, all keys after a header belong to that header's table. So if a key of the top level comes after
            // a header, it becomes an unknown key of that table.
            let advice = if !section.header.is_empty() && self.top.key(name).is_some() {
                "it belongs above the first header of the file".into()
            } else {
                did_you_mean(name, &section.names(), "keys")
            };
            let what = format!("unknown key `{}`{}", name.escape_debug(), table.header_suffix());
            self.mistakes.borrow_mut().add(line, table.path(Some(name)), &what, advice);
        }
        for key in section.keys.iter().filter(|key| !entries.contains_key(key.name)) {
            if let Some(what) = key.required {
                table.missing(key.name, what);
            }
        }
        table
    }
}

/// The known word that is most similar to an unknown word. `None` if no known word is similar.
pub(crate) fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    /// If the similarity is smaller, the words are similar only by chance.
    const ALIKE: f64 = 0.8;
    let similarity = |word: &str| strsim::jaro_winkler(name, word);
    let best = known.iter().copied().max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
    (similarity(best) >= ALIKE).then_some(best)
}

/// Asks whether the user meant the most similar known word. If no word is similar, lists all known words. `what` is a
/// plural noun for the words.
pub(crate) fn did_you_mean(name: &str, known: &[&str], what: &str) -> String {
    match nearest(name, known) {
        Some(word) => format!("did you mean `{word}`?"),
        None if known.len() == 1 => format!("only {} is valid", listed(known)),
        None => format!("the valid {what} are {}", listed(known)),
    }
}

/// Joins names: `a`, `b` and `c`.
pub(crate) fn listed(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}

/// A type of TOML with its article.
fn type_name(value: &DeValue) -> String {
    match value {
        DeValue::Array(_) => "an array".into(),
        DeValue::Integer(_) => "an integer".into(),
        other => format!("a {}", other.type_str()),
    }
}

impl<'d, 't> Table<'d, 't> {
    /// Records a mistake. `what` names the key, what is wrong, and what to do.
    pub fn mistake(&self, line: usize, what: impl AsRef<str>) {
        self.mistake_in(None, line, what);
    }

    /// Like [`Self::mistake`], for a key of this table.
    fn mistake_in(&self, key: Option<&str>, line: usize, what: impl AsRef<str>) {
        self.document.mistakes.borrow_mut().add(line, self.path(key), what.as_ref(), String::new());
    }

    /// A key of this table as programs read it, such as `disk.iops` or `from.tag`. Without a key, the table.
    fn path(&self, key: Option<&str>) -> Option<String> {
        let words = self.header().split(" of ").collect::<Vec<_>>();
        let tables = words.iter().rev().map(|word| word.trim_matches(['[', ']', '`']));
        let key = key.map(|key| shorten(escape_name(key)));
        let parts: Vec<_> = tables.chain(key.as_deref()).filter(|part| !part.is_empty()).collect();
        (!parts.is_empty()).then(|| parts.join("."))
    }

    /// The table's name in messages.
    fn header(&self) -> &'static str {
        self.user.map_or(self.section.header, |table| table.header)
    }

    /// Records a mistake in the value of a key. Returns `None`, so that a caller can return the result of this call.
    pub fn wrong<T>(&self, key: &str, line: usize, what: impl std::fmt::Display) -> Option<T> {
        self.mistake_in(Some(key), line, format!("`{key}`{} {what}", self.header_suffix()));
        None
    }

    /// Returns the value of `checked`, or records its error as a mistake.
    pub fn check<T>(&self, key: &str, line: usize, checked: Result<T, String>) -> Option<T> {
        checked.map_or_else(|what| self.wrong(key, line, what), Some)
    }

    /// ` of [disk]`, or nothing at the top level.
    fn header_suffix(&self) -> String {
        let header = self.header();
        if header.is_empty() { String::new() } else { format!(" of {header}") }
    }

    /// Records that a key is missing, unless it is misspelt. (If a required key is missing, this is recorded without this
    /// call.)
    pub fn missing(&self, key: &str, what: impl std::fmt::Display) {
        if self.misspells(key) {
            return;
        }
        let what = format!("`{key}`{} is missing: {what}", self.header_suffix());
        self.mistake_in(Some(key), self.line, what);
    }

    /// Whether the table has an unknown key that is probably a misspelling of `key`. It was recorded as a mistake, so
    /// nothing that follows from the missing key is recorded.
    pub fn misspells(&self, key: &str) -> bool {
        let names = self.section.names();
        let mut unknown = self.entries.keys().filter(|name| self.section.key(name.get_ref()).is_none());
        unknown.any(|name| nearest(name.get_ref(), &names) == Some(key))
    }

    /// The row of a key in the table of keys.
    pub fn key(&self, name: &str) -> &'static TomlKey {
        self.section.key(name).expect("each key that is read is in the table of keys")
    }

    /// The keys of which exactly one has to be set.
    pub fn one_of(&self) -> &'static [&'static str] {
        self.section.one_of()
    }

    /// Records that none of the keys in [`Self::one_of`] is set. If the table has an unknown key, the user probably
    /// mistyped one of these keys. In that case nothing is recorded, because the unknown key already is a mistake.
    pub fn none_of(&self, what: &str) {
        if self.entries.keys().all(|key| self.section.key(key.get_ref()).is_some()) {
            self.mistake(self.line, what);
        }
    }

    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The value of a key, of any type.
    pub fn value(&self, key: &str) -> Option<At<&'d DeValue<'t>>> {
        self.entries.get(key).map(|value| self.at(value))
    }

    fn at<'v>(&self, value: &'v Spanned<DeValue<'t>>) -> At<&'v DeValue<'t>> {
        At { value: value.get_ref(), line: self.document.line(value.span().start) }
    }

    /// Records that the value of a key is of the wrong type.
    pub fn mistyped<T>(&self, key: &str, at: &At<&DeValue>) -> Option<T> {
        self.wrong_type(key, at, &self.key(key).expected())
    }

    /// Records that an element of a key's array is of the wrong type.
    fn mistyped_element<T>(&self, key: &str, at: &At<&DeValue>) -> Option<T> {
        let (is, expected) = (type_name(at.value), self.key(key).expected());
        self.wrong(key, at.line, format_args!("has {is}: it should be {expected}"))
    }

    /// Records that the value of a key is of the right type, but not allowed.
    pub fn unexpected<T>(&self, key: &str, at: &At<&str>) -> Option<T> {
        self.wrong(key, at.line, format_args!("is {:?}: it should be {}", at.value, self.key(key).expected()))
    }

    /// Records a value of the wrong type. `expected` says what the value should be, with an example.
    pub fn wrong_type<T>(&self, key: &str, at: &At<&DeValue>, expected: &str) -> Option<T> {
        self.wrong(key, at.line, format_args!("is {}: it should be {expected}", type_name(at.value)))
    }

    pub fn string(&self, key: &str) -> Option<At<&'d str>> {
        let at = self.value(key)?;
        match at.value {
            DeValue::String(text) => Some(At { value: text, line: at.line }),
            _ => self.mistyped(key, &at),
        }
    }

    /// The value of a key that allows only certain words.
    pub fn word(&self, key: &str) -> Option<At<&'static str>> {
        let at = self.string(key)?;
        match self.key(key).value.words().iter().find(|word| **word == at.value) {
            Some(word) => Some(At { value: word, line: at.line }),
            None => self.unexpected(key, &at),
        }
    }

    pub fn boolean(&self, key: &str) -> Option<bool> {
        let at = self.value(key)?;
        at.value.as_bool().or_else(|| self.mistyped(key, &at))
    }

    /// Like [`Self::boolean`], but returns the key's default if the key is not set.
    pub fn flag(&self, key: &str) -> bool {
        let default = matches!(self.key(key).default, DefaultValue::Is(Literal::Boolean(true)));
        self.boolean(key).unwrap_or(default)
    }

    /// A number within the bounds of the key.
    pub fn integer(&self, key: &str) -> Option<u64> {
        let at = self.value(key)?;
        let ValueType::Integer { least, most, unit } = &self.key(key).value else { return None };
        let DeValue::Integer(integer) = at.value else { return self.mistyped(key, &at) };
        let number = i128::from_str_radix(integer.as_str(), integer.radix()).ok();
        number.and_then(|n| u64::try_from(n).ok()).filter(|n| (least..=most).contains(&n)).or_else(|| {
            self.wrong(key, at.line, format_args!("is {integer}: it should be {least} to {most} {unit}"))
        })
    }

    /// Like [`Self::integer`], but returns the key's default if the key is not set.
    pub fn number(&self, key: &str) -> u64 {
        let default = if let DefaultValue::Is(Literal::Integer(n)) = self.key(key).default { n } else { 0 };
        self.integer(key).unwrap_or(default)
    }

    /// The elements of an array, or the key's `[[tables]]`.
    fn array(&self, key: &str) -> Vec<At<&'d DeValue<'t>>> {
        let Some(at) = self.value(key) else { return Vec::new() };
        match at.value.as_array() {
            Some(array) => array.iter().map(|element| self.at(element)).collect(),
            None => self.mistyped(key, &at).unwrap_or_default(),
        }
    }

    /// An array of strings, each with its line.
    pub fn strings(&self, key: &str) -> Vec<At<&'d str>> {
        let strings = self.array(key).into_iter().filter_map(|at| match at.value {
            DeValue::String(text) => Some(At { value: &**text, line: at.line }),
            _ => self.mistyped_element(key, &at),
        });
        strings.collect()
    }

    /// An array of strings and inline tables.
    pub fn elements(&self, key: &str) -> Vec<Element<'d, 't>> {
        let elements = self.array(key).into_iter().filter_map(|at| match at.value {
            DeValue::String(text) => Some(Element::Text(At { value: &**text, line: at.line })),
            DeValue::Table(_) => self.section_of(key, &at).map(Element::Table),
            _ => self.mistyped_element(key, &at),
        });
        elements.collect()
    }

    /// The table `[key]`, or the key's inline table.
    pub fn table(&self, key: &str) -> Option<Table<'d, 't>> {
        self.section_of(key, &self.value(key)?)
    }

    /// All tables `[[key]]`.
    pub fn tables(&self, key: &str) -> Vec<Table<'d, 't>> {
        self.array(key).iter().filter_map(|at| self.section_of(key, at)).collect()
    }

    fn section_of(&self, key: &str, at: &At<&'d DeValue<'t>>) -> Option<Table<'d, 't>> {
        match (at.value, self.key(key).value.section()) {
            (DeValue::Table(entries), Some(section)) => Some(self.document.table(section, entries, at.line)),
            _ => self.mistyped(key, at),
        }
    }

    /// Every entry of a table whose keys the user chooses: the key and the value, each with its line.
    pub fn entries(&self) -> impl Iterator<Item = (At<&'d str>, At<&'d DeValue<'t>>)> + use<'_, 'd, 't> {
        self.entries.iter().map(|(key, value)| {
            (At { value: &**key.get_ref(), line: self.document.line(key.span().start) }, self.at(value))
        })
    }

    /// A table whose keys the user chooses.
    pub fn user_table(&self, key: &str) -> Option<Table<'d, 't>> {
        let at = self.value(key)?;
        match (at.value, self.key(key).value.user_table()) {
            (DeValue::Table(entries), user @ Some(_)) => {
                Some(Table { document: self.document, section: self.section, user, entries, line: at.line })
            }
            _ => self.mistyped(key, &at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_this_machine_cannot_read_is_not_the_definitions_fault() {
        let kind = |file: &str| Kind::of(&read_text(Path::new(file), Path::new("/proc")).unwrap_err());
        // Reading this file at its beginning fails with EIO.
        assert_eq!(kind("/proc/self/mem"), Kind::Machine);
        assert_eq!(kind("/proc/self/missing"), Kind::Definition);
    }
}
