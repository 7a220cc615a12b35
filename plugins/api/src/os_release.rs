use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The fields of an image's `os-release` file (freedesktop.org, os-release(5)), by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OsRelease(pub BTreeMap<String, String>);

impl OsRelease {
    /// Parses shell-style assignments. Other lines are ignored, as os-release(5) requires.
    pub fn parse(text: &str) -> Self {
        let assignments = text.lines().filter_map(|line| {
            let line = line.trim();
            let (key, value) = line.split_once('=')?;
            let is_name = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            is_name.then(|| (key.to_owned(), unquote(value)))
        });
        Self(assignments.collect())
    }

    /// The field `ID`. If it is missing, the result is `linux`, as os-release(5) defines.
    pub fn id(&self) -> &str {
        self.get("ID").unwrap_or("linux")
    }

    /// The words of `ID_LIKE`. The closest relative comes first.
    pub fn id_like(&self) -> impl Iterator<Item = &str> {
        self.get("ID_LIKE").unwrap_or("").split_ascii_whitespace()
    }

    pub fn get(&self, field: &str) -> Option<&str> {
        self.0.get(field).map(String::as_str)
    }
}

fn unquote(value: &str) -> String {
    let value = value.trim();
    if let Some(inner) = value.strip_prefix('\'').and_then(|v| v.strip_suffix('\'')) {
        return inner.to_owned();
    }
    let inner = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
    let mut out = String::new();
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.extend(chars.next()),
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_comments_and_escapes() {
        let os = OsRelease::parse(
            "# c\nID=ubuntu\nID_LIKE=\"debian x\"\nNAME='A \"B\"'\nV=\"a\\$b\"\nbroken\n=x\n",
        );
        assert_eq!(os.id(), "ubuntu");
        assert_eq!(os.id_like().collect::<Vec<_>>(), ["debian", "x"]);
        assert_eq!(os.get("NAME"), Some("A \"B\""));
        assert_eq!(os.get("V"), Some("a$b"));
        assert_eq!(os.0.len(), 4);
    }

    #[test]
    fn an_empty_file_is_linux() {
        assert_eq!(OsRelease::parse("").id(), "linux");
    }
}
