//! The keys that a TOML file may have, as tables. The parser ([`crate::config::toml_reader`]) works from these tables,
//! and the reference pages and the JSON Schemas are generated from them (`tests/pure/docs`).

use std::borrow::Cow;
use std::fmt;

/// One table of a TOML file: its keys, and the rules between keys.
#[derive(Debug)]
pub struct Section {
    /// The table's name in messages, such as `[disk]`. It is empty for the top level of the file.
    pub header: &'static str,
    /// In the order of the reference page.
    pub keys: &'static [TomlKey],
    pub rules: &'static [KeyRule],
}

/// One key of a table.
#[derive(Debug)]
pub struct TomlKey {
    pub name: &'static str,
    pub value: ValueType,
    /// What the value should be. Messages contain this text after "it should be". If it is empty, the text is derived
    /// from `value`.
    pub expected: &'static str,
    /// Set if the key is required. If the key is missing, the message contains this text after "is missing: ".
    pub required: Option<&'static str>,
    pub default: DefaultValue,
    /// The meaning of the key: plain sentences in Markdown.
    pub doc: &'static str,
    /// Lines of TOML, without the table's header.
    pub example: &'static str,
}

/// What the value of a key may be.
#[derive(Debug)]
pub enum ValueType {
    Boolean,
    Text(TextRule),
    /// One of these texts.
    Words(&'static [&'static str]),
    Integer {
        least: u64,
        most: u64,
        unit: &'static str,
    },
    Array(&'static ArrayRule),
    /// `[key]`, or an inline table.
    Table(&'static Section),
    /// Any number of tables `[[key]]`.
    Tables(&'static Section),
    /// A table whose keys the user chooses.
    Map(&'static UserTable),
    /// One of several types.
    Either(&'static [ValueType]),
    Anything,
}

/// The rules for a text, as far as a JSON Schema can express them. The code that reads the key checks these and further
/// rules.
#[derive(Debug)]
pub struct TextRule {
    /// A regular expression without look-around, which the text must match. If it is empty, any text is allowed.
    pub pattern: &'static str,
    /// A regular expression that the text must not match. If it is empty, it is not used.
    pub never: &'static str,
    /// Texts that are not allowed. `LD_*` stands for all texts that begin with `LD_`.
    pub reserved: &'static [&'static str],
    /// The maximal length in characters. 0 allows any length.
    pub most: usize,
}

/// The rules for an array.
#[derive(Debug)]
pub struct ArrayRule {
    pub element: ValueType,
    /// An additional rule for the first element.
    pub first: Option<&'static ValueType>,
    pub least: usize,
    /// Whether all elements must be different.
    pub unique: bool,
}

/// A table whose keys the user chooses.
#[derive(Debug)]
pub struct UserTable {
    /// The table's name in messages, such as `[tags]`.
    pub header: &'static str,
    pub names: TextRule,
    pub values: ValueType,
    pub least: usize,
    /// The maximal number of entries. 0 allows any number.
    pub most: usize,
}

/// The value that applies if a key is not set.
#[derive(Debug)]
pub enum DefaultValue {
    /// There is no default.
    None,
    Is(Literal),
    /// A description of the default, such as "the directory's name".
    Said(&'static str),
}

/// A value of TOML.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Literal {
    Boolean(bool),
    Integer(u64),
    Text(&'static str),
}

/// A rule between the keys of a table.
#[derive(Debug)]
pub enum KeyRule {
    /// Exactly one of these keys must be set.
    OneOf(&'static [&'static str]),
    /// If the first key is set, none of the others may be set.
    Excludes(&'static str, &'static [&'static str]),
    /// If the first key is set, the second key must have this value.
    Needs(&'static str, &'static str, Literal),
    /// If the second key has this value, the first key must not be set. Otherwise the first key must be set.
    Unless(&'static str, &'static str, Literal),
    /// If the key has this value, these conditions must hold.
    When(&'static str, Literal, &'static [Condition]),
}

/// A condition for another key.
#[derive(Debug)]
pub enum Condition {
    Absent(&'static str),
    Present(&'static str),
    /// If the key is set, its value must be in this range. Both ends are included.
    Within(&'static str, u64, u64),
    /// If the key is set, it must have this value.
    Is(&'static str, Literal),
}

/// Allows any text. Other rules use it for the fields that they do not set.
pub const ANY_TEXT: TextRule = TextRule { pattern: "", never: "", reserved: &[], most: 0 };
/// The default `false`.
pub const NO: DefaultValue = DefaultValue::Is(Literal::Boolean(false));
/// Other keys use this one for the fields that they do not set.
pub const KEY: TomlKey = TomlKey {
    name: "",
    value: ValueType::Anything,
    expected: "",
    required: None,
    default: DefaultValue::None,
    doc: "",
    example: "",
};

/// A value that is a text and matches a pattern.
pub const fn text(pattern: &'static str) -> ValueType {
    ValueType::Text(TextRule { pattern, ..ANY_TEXT })
}

impl Section {
    pub fn key(&self, name: &str) -> Option<&'static TomlKey> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// The names of the keys, sorted.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.keys.iter().map(|key| key.name).collect();
        names.sort_unstable();
        names
    }

    /// The keys of which exactly one must be set.
    pub fn one_of(&self) -> &'static [&'static str] {
        let keys = |rule: &KeyRule| if let KeyRule::OneOf(keys) = rule { Some(*keys) } else { None };
        self.rules.iter().find_map(keys).unwrap_or(&[])
    }
}

impl TomlKey {
    /// What the value should be, for messages.
    pub fn expected(&self) -> Cow<'static, str> {
        match &self.value {
            _ if !self.expected.is_empty() => self.expected.into(),
            ValueType::Integer { unit, .. } => {
                let example = self.example.rsplit(' ').next().unwrap_or_default();
                format!("an integer ({unit}), such as {example}").into()
            }
            value => value.expected(),
        }
    }
}

impl TextRule {
    pub fn is_reserved(&self, text: &str) -> bool {
        self.reserved.iter().any(|reserved| match reserved.strip_suffix('*') {
            Some(start) => text.starts_with(start),
            None => text == *reserved,
        })
    }
}

impl ValueType {
    fn expected(&self) -> Cow<'static, str> {
        match self {
            Self::Boolean => "`true` or `false`".into(),
            Self::Words(words) => {
                let quoted: Vec<_> = words.iter().map(|word| format!("{word:?}")).collect();
                quoted.join(" or ").into()
            }
            Self::Table(section) => format!("a table: {}", section.header).into(),
            Self::Map(table) => format!("a table: {}", table.header).into(),
            Self::Tables(section) => {
                format!("one or more tables, each under a header {}", section.header).into()
            }
            Self::Integer { .. } | Self::Text(_) | Self::Array(_) | Self::Either(_) | Self::Anything => {
                "of another type".into()
            }
        }
    }

    /// The allowed words; empty if the value is not a word.
    pub fn words(&self) -> &'static [&'static str] {
        match self {
            Self::Words(words) => words,
            Self::Either(types) => {
                types.iter().map(Self::words).find(|words| !words.is_empty()).unwrap_or(&[])
            }
            _ => &[],
        }
    }

    /// The keys and rules of the table, if the value is a table or contains tables.
    pub fn section(&self) -> Option<&'static Section> {
        match self {
            Self::Table(section) | Self::Tables(section) => Some(section),
            Self::Array(array) => array.element.section(),
            Self::Either(types) => types.iter().find_map(Self::section),
            _ => None,
        }
    }

    /// The rules of the value, if it is a table whose keys the user chooses.
    pub fn user_table(&self) -> Option<&'static UserTable> {
        if let Self::Map(table) = self { Some(table) } else { None }
    }
}

impl Condition {
    /// The key that the condition is for.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Absent(key) | Self::Present(key) | Self::Within(key, ..) | Self::Is(key, _) => key,
        }
    }
}

/// Writes the value as TOML spells it.
impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boolean(truth) => write!(f, "{truth}"),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}
