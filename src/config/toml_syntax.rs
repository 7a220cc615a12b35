//! Describes syntax errors of TOML files. Values are not shown, because they may be secrets.

/// Describes a syntax error: returns its offset and a text. The parser reports it at `start` with a message. The text adds
/// advice and a snippet of the line, or the column if there is no snippet. Values are not shown, because the file may be
/// another one than the user thinks, and may contain secrets.
pub fn describe(text: &str, start: usize, message: &str) -> (usize, String) {
    match unclosed(text, start, message) {
        Some((end, missing)) => {
            let message = format!("{missing} is missing at the end of the line");
            (end, describe_at(text, end, &message))
        }
        None => (start, describe_at(text, start, message)),
    }
}

/// If the parser finds the next line in an inline table or in an array, the mistake is on the line before. Returns the
/// offset of its last character, and what is missing.
fn unclosed(text: &str, start: usize, message: &str) -> Option<(usize, &'static str)> {
    let missing = match message {
        _ if message.contains("key-value pairs") || message.contains("inline table element") => "`,` or `}`",
        _ if message.contains("array elements") => "`,` or `]`",
        _ => return None,
    };
    let before = text.get(..start)?;
    let is_first = before.rsplit('\n').next().is_some_and(|line| line.trim().is_empty());
    let (end, _) = before.trim_end().char_indices().next_back().filter(|_| is_first)?;
    Some((end, missing))
}

fn describe_at(text: &str, start: usize, message: &str) -> String {
    let (line, column) = line_at(text, start);
    let value = line.split_once('=').map(|(_, value)| value.trim()).unwrap_or_default();
    let number = |c: char| c.is_ascii_digit() || "+-".contains(c);
    let advice = match value.chars().next() {
        Some('0') if message.contains("leading zero") => "; write a mode in quotes, such as \"0644\"",
        Some(c) if !number(c) && !"\"'[{#".contains(c) && !["true", "false"].contains(&value) => {
            "; write a string in quotes"
        }
        _ => "",
    };
    match snippet(line, column) {
        Some(snippet) => format!("not valid TOML: {message}{advice}{snippet}"),
        None => format!("not valid TOML in column {column}: {message}{advice}"),
    }
}

/// The line of an offset, and its column, counted from 1.
fn line_at(text: &str, start: usize) -> (&str, usize) {
    let before = text.get(..start).unwrap_or(text);
    let begin = before.rfind('\n').map_or(0, |end| end + 1);
    (text[begin..].lines().next().unwrap_or_default(), before[begin..].chars().count() + 1)
}

/// The key on the line of an offset, with the table of the nearest header above it. `None` if the line has no key.
pub fn key_at(text: &str, start: usize) -> Option<String> {
    let (line, _) = line_at(text, start);
    if let Some(table) = header(line) {
        return Some(table.to_owned());
    }
    let key = key_of(line)?;
    let before = text.get(..start)?;
    let above = before[..before.rfind('\n').unwrap_or(0)].lines().rev();
    let table = above.map(str::trim).find(|line| line.starts_with('['));
    match table.map(header) {
        None => Some(key.to_owned()),
        Some(table) => Some(format!("{}.{key}", table?)),
    }
}

/// The maximal length of a name in a snippet. Longer words are not names of keys.
const MAX_SHOWN_NAME: usize = 24;

fn is_name(name: &str) -> bool {
    let is_of_key = |c: char| c.is_ascii_lowercase() || matches!(c, '_' | '.');
    (1..=MAX_SHOWN_NAME).contains(&name.len()) && name.chars().all(is_of_key)
}

/// The name before the first `=` of a line, if it looks like a key. Otherwise it may be a secret.
fn key_of(line: &str) -> Option<&str> {
    line.split_once('=').map(|(key, _)| key.trim()).filter(|key| is_name(key))
}

/// The name of the table of which a line is the header, if it looks like a key. The brackets may be incomplete.
fn header(line: &str) -> Option<&str> {
    let line = line.trim();
    let name = line.trim_start_matches('[').trim_end_matches(']');
    Some(name).filter(|name| line.starts_with('[') && is_name(name))
}

/// Returns the start of a line up to its first `=`, or up to the end of a header, and a caret below the column. If the
/// column is after this start, the caret is below its end. Returns `None` if the line does not begin with a name that
/// looks like a key, because then it may be a secret.
fn snippet(line: &str, column: usize) -> Option<String> {
    let text = line.trim_start();
    let shown = match key_of(text) {
        Some(_) => format!("{}= …", text.split_once('=')?.0),
        None => header(text).map(|_| text.trim_end().to_owned())?,
    };
    let indent = line.chars().count() - text.chars().count();
    let caret = (column - 1).saturating_sub(indent).min(shown.chars().count() - 1);
    Some(format!("\n    | {shown}\n    | {}^", " ".repeat(caret)))
}
