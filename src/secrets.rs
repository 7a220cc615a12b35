//! Secrets of a definition's scripts. They are read from oven's environment, passed only to the environment of scripts
//! that name them, masked in all output, and searched for in the image.
//!
//! A secret is found as plain text and in common encodings: in JSON, quoted for a shell, in a URL, in base64. Secrets
//! that were compressed, encrypted or changed in any other way are not found.

use crate::error::{Kind, Mistake, hint_of, mistakes_of};
use crate::text::without_control_characters;
use anyhow::Result;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::sync::Arc;

/// The replacement of a masked secret.
pub const MASK: &str = "***";
/// The minimal length of a secret, in bytes. A shorter value occurs in many words. Masking it would make the output
/// unreadable, and readers could guess the value from the masked words.
const MIN: usize = 4;
/// The maximal length of a secret, in bytes. A larger value is probably a mistake. The kernel's limit for an
/// environment variable is 128 KiB.
const MAX: usize = 64 << 10;
/// The minimal length, in bytes, of a line that is searched for on its own. A secret with several lines, such as a key,
/// is also searched for line by line. A shorter line is not searched for on its own, because a file may contain it by
/// chance.
const LINE_MIN: usize = 16;

/// Secret values by name, and the texts to search for. Cheap to clone. The `Debug` form shows only the names.
#[derive(Clone, Default)]
pub struct Secrets(Arc<Inner>);

#[derive(Default)]
struct Inner {
    values: BTreeMap<String, String>,
    /// Texts to mask, the longest first.
    masked: Vec<String>,
    /// Texts that must not be in the image, each with the name of its secret.
    sought: Vec<(Vec<u8>, String)>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.values.keys()).finish()
    }
}

impl Secrets {
    pub fn new(values: BTreeMap<String, String>) -> Self {
        let (mut masked, mut sought) = (BTreeSet::new(), Vec::new());
        for (name, value) in &values {
            let whole = value.trim_matches(['\n', '\r']);
            let lines = whole.split(['\n', '\r']).map(str::trim);
            // Lines such as `-----BEGIN …` are not secret, because they are in every key.
            let lines: Vec<_> = lines.filter(|line| !line.starts_with("-----")).collect();
            for encoded in std::iter::once(whole).chain(lines.iter().copied()).flat_map(encodings) {
                // Escape sequences and control characters are removed from a step's output before it is shown. So the
                // secret is also masked without them.
                masked.insert(encoded.chars().filter(|c| !c.is_control() || *c == '\t').collect());
                masked.insert(without_control_characters(&encoded).replace('\n', ""));
                masked.insert(encoded);
            }
            let lines = lines.into_iter().filter(|line| line.len() >= LINE_MIN && *line != whole);
            let encoded: BTreeSet<_> = std::iter::once(whole).chain(lines).flat_map(encodings).collect();
            sought.extend(encoded.into_iter().map(|text| (text.into_bytes(), name.clone())));
        }
        let mut masked: Vec<_> = masked.into_iter().filter(|text| text.len() >= MIN).collect();
        masked.sort_by_key(|text| std::cmp::Reverse(text.len()));
        Self(Arc::new(Inner { values, masked, sought }))
    }

    #[cfg(test)]
    pub fn of_test(values: &[(&str, &str)]) -> Self {
        Self::new(values.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
    }

    /// The secrets of `self` and of `others`.
    pub fn with(&self, others: &Self) -> Self {
        let mut values = self.0.values.clone();
        values.extend(others.0.values.clone());
        Self::new(values)
    }

    pub fn is_empty(&self) -> bool {
        self.0.values.is_empty()
    }

    /// The secrets with these names, as environment variables.
    pub fn environment(&self, names: &[String]) -> BTreeMap<String, String> {
        let pairs = names.iter().filter_map(|name| Some((name.clone(), self.0.values.get(name)?.clone())));
        pairs.collect()
    }

    /// The text with `***` in place of every secret.
    pub fn mask<'t>(&self, text: &'t str) -> Cow<'t, str> {
        let mut masked = Cow::Borrowed(text);
        for secret in &self.0.masked {
            if masked.contains(secret.as_str()) {
                masked = Cow::Owned(masked.replace(secret.as_str(), MASK));
            }
        }
        masked
    }

    /// Masks all texts of a JSON value.
    pub fn mask_json(&self, value: &mut serde_json::Value) {
        use serde_json::Value;
        match value {
            Value::String(text) => {
                if let Cow::Owned(masked) = self.mask(text) {
                    *text = masked;
                }
            }
            Value::Array(elements) => elements.iter_mut().for_each(|element| self.mask_json(element)),
            Value::Object(fields) => fields.values_mut().for_each(|field| self.mask_json(field)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// Returns the same failure, with secrets masked in the message and in the hint.
    pub fn mask_error(&self, error: anyhow::Error) -> anyhow::Error {
        let (text, hint) = (format!("{error:#}"), hint_of(&error));
        let masked = self.mask(&text);
        let masked_hint = hint.as_deref().map(|hint| self.mask(hint));
        if masked == text && masked_hint.as_deref() == hint.as_deref() {
            return error;
        }
        let mistakes = mistakes_of(&error).into_iter().map(|mistake| Mistake {
            message: self.mask(&mistake.message).into_owned(),
            hint: mistake.hint.map(|hint| self.mask(&hint).into_owned()),
            place: mistake.place,
        });
        let failure = Kind::of(&error).failure(masked).with_mistakes(mistakes.collect());
        match masked_hint {
            Some(hint) => failure.hint(hint).into(),
            None => failure.into(),
        }
    }

    /// The length of the longest masked text, in bytes; 0 if there is none.
    pub fn longest_masked(&self) -> usize {
        self.0.masked.first().map_or(0, String::len)
    }

    /// If a text to mask begins before position `at` and ends after it, returns the range of this text.
    pub fn masked_range_across(&self, bytes: &[u8], at: usize) -> Option<(usize, usize)> {
        self.0.masked.iter().find_map(|secret| {
            let from = at.saturating_sub(secret.len() - 1);
            let to = (at + secret.len() - 1).min(bytes.len());
            let found = memchr::memmem::find(bytes.get(from..to)?, secret.as_bytes())?;
            Some((from + found, from + found + secret.len()))
        })
    }

    /// The length of the longest text to search for in the image, in bytes.
    pub fn longest_searched(&self) -> usize {
        self.0.sought.iter().map(|(text, _)| text.len()).max().unwrap_or_default()
    }

    /// If the bytes contain a secret in plain text or in an encoding, returns the name of the secret.
    pub fn find(&self, bytes: &[u8]) -> Option<&str> {
        let found = self.0.sought.iter().find(|(text, _)| memchr::memmem::find(bytes, text).is_some());
        found.map(|(_, name)| name.as_str())
    }
}

pub fn check_value(value: Option<OsString>) -> Result<String, String> {
    let Some(value) = value else { return Err("is not set in oven's environment".into()) };
    let value = value.into_string().map_err(|_| "is not UTF-8".to_owned())?;
    match value.trim().len() {
        0 => Err("is empty".into()),
        1..MIN => {
            Err(format!("is shorter than {MIN} characters, which is too short to be masked in the log"))
        }
        _ if value.len() > MAX => Err(format!("is longer than {} KiB", MAX >> 10)),
        _ => Ok(value),
    }
}

/// A text, and its common encodings.
fn encodings(text: &str) -> Vec<String> {
    let json = serde_json::to_string(text).unwrap_or_default();
    let json = json.strip_prefix('"').and_then(|json| json.strip_suffix('"')).unwrap_or_default();
    let mut all = vec![
        text.to_owned(),
        json.to_owned(),
        escape_non_ascii(json),
        text.replace('\'', r"'\''"),
        percent_encode(text, b"-_.~"),
        percent_encode(text, b"-_.~/"),
        percent_encode(text, b"-_.~ ").replace(' ', "+"),
    ];
    // Base64 encodes groups of three bytes. So the encoding of a text depends on the text's offset in its first group.
    // There are three offsets.
    all.extend((0..3).map(|offset| base64(text.as_bytes(), offset)));
    // A very short encoding would be found in other text by chance.
    all.retain(|encoded| encoded == text || encoded.len() >= MIN.max(text.len()));
    all
}

/// Escapes non-ASCII characters, as Python does in JSON.
fn escape_non_ascii(json: &str) -> String {
    let one = |c: char| match c.is_ascii() {
        true => c.to_string(),
        false => c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
    };
    json.chars().map(one).collect()
}

fn percent_encode(text: &str, plain: &[u8]) -> String {
    let one = |byte: u8| match byte.is_ascii_alphanumeric() || plain.contains(&byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(one).collect()
}

/// Returns the base64 characters of `bytes` if `offset` other bytes precede them in their first group. The first or the
/// last character is left out if it also contains bits of a neighbouring byte.
fn base64(bytes: &[u8], offset: usize) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (first, last) = ((offset * 8).div_ceil(6), (offset + bytes.len()) * 8 / 6);
    let bit = |at: usize| bytes[at / 8 - offset] >> (7 - at % 8) & 1;
    let sextet = |character: usize| (0..6).fold(0, |value, i| value << 1 | bit(character * 6 + i));
    (first..last).map(|character| char::from(ALPHABET[usize::from(sextet(character))])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(values: &[(&str, &str)]) -> Secrets {
        Secrets::of_test(values)
    }

    #[test]
    fn a_secret_is_masked_in_common_encodings() {
        let secrets = secrets(&[("TOKEN", "it's \"5/6\" + ü\\"), ("OTHER", "it's \"5/6\"")]);
        for text in [
            "it's \"5/6\" + ü\\",
            r#"it's \"5/6\" + ü\\"#,
            r#"it's \"5/6\" + \u00fc\\"#,
            r#"'it'\''s "5/6" + ü\'"#,
            "it%27s%20%225%2F6%22%20%2B%20%C3%BC%5C",
            "it%27s+%225%2F6%22+%2B+%C3%BC%5C",
        ] {
            let masked = secrets.mask(text);
            assert!(masked.contains("***") && !masked.contains('5') && !masked.contains("it"), "{masked}");
        }
        assert_eq!(secrets.mask("nothing of it"), "nothing of it");
        assert!(!format!("{secrets:?}").contains('5'));
    }

    #[test]
    fn base64_is_found_wherever_it_begins() {
        let secrets = secrets(&[("TOKEN", "hunter2-hunter2")]);
        // The secret alone, and with one, two and three bytes before it. The second text is the output of: printf
        // xhunter2-hunter2y | base64
        for text in [
            "aHVudGVyMi1odW50ZXIyCg==",
            "eGh1bnRlcjItaHVudGVyMnk=",
            "eHhodW50ZXIyLWh1bnRlcjJ5",
            "eHh4aHVudGVyMi1odW50ZXIyeXk=",
        ] {
            assert!(secrets.mask(text).contains("***"), "{text}");
            assert_eq!(secrets.find(text.as_bytes()), Some("TOKEN"), "{text}");
        }
    }

    #[test]
    fn a_key_is_masked_line_by_line_and_searched_for_by_its_long_lines() {
        let key = "-----BEGIN KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ\nshort\n-----END KEY-----\n";
        let secrets = secrets(&[("KEY", key)]);
        assert_eq!(secrets.mask("a MC4CAQAwBQYDK2VwBCIEIJ b short"), "a *** b ***");
        assert_eq!(secrets.mask("-----BEGIN KEY-----"), "-----BEGIN KEY-----");
        assert_eq!(secrets.find(b"xMC4CAQAwBQYDK2VwBCIEIJ"), Some("KEY"));
        assert_eq!(secrets.find(b"short -----BEGIN KEY-----"), None);
        assert_eq!(secrets.find(key.trim().as_bytes()), Some("KEY"));
    }

    #[test]
    fn an_error_and_an_object_are_masked_and_keep_their_kind() {
        let secrets = secrets(&[("TOKEN", "hunter2")]);
        let error = Kind::NotFound.failure("no hunter2").hint("Look for hunter2.").into();
        let masked = secrets.mask_error(anyhow::Error::context(error, "opening hunter2"));
        assert_eq!(format!("{masked:#}"), "opening ***: no ***");
        assert_eq!((Kind::of(&masked), hint_of(&masked).as_deref()), (Kind::NotFound, Some("Look for ***.")));
        let mut object = serde_json::json!({"a": ["hunter2", 1], "b": {"c": "xhunter2"}});
        secrets.mask_json(&mut object);
        assert_eq!(object, serde_json::json!({"a": ["***", 1], "b": {"c": "x***"}}));
    }

    #[test]
    fn a_secret_across_a_position_is_found() {
        let secrets = secrets(&[("TOKEN", "hunter2")]);
        assert_eq!(secrets.masked_range_across(b"aahunter2bb", 4), Some((2, 9)));
        assert_eq!(secrets.masked_range_across(b"aahunter2bb", 2), None, "it begins there");
        assert_eq!(secrets.masked_range_across(b"aahunter2bb", 9), None, "it ends there");
        assert_eq!(secrets.longest_masked(), "hunter2".len().max(base64(b"hunter2", 0).len()));
        assert_eq!(Secrets::default().longest_masked(), 0);
    }

    #[test]
    fn invalid_secrets_are_refused_without_printing_them() {
        for (value, what) in [(None, "not set"), (Some(""), "empty"), (Some(" \n"), "empty")] {
            assert!(check_value(value.map(OsString::from)).unwrap_err().contains(what));
        }
        let error = check_value(Some("abc".into())).unwrap_err();
        assert!(error.contains("shorter than 4") && !error.contains("abc"), "{error}");
        assert!(check_value(Some("x".repeat(MAX + 1).into())).is_err());
        assert!(check_value(Some("abcd".into())).is_ok());
    }
}
