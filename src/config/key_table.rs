//! Tables of keys: what a TOML file may say, as data. The parser works from them ([`crate::config::toml_reader`]), and
//! the reference
//! pages and the JSON Schemas are generated from them (`tests/pure/docs`).

use std::borrow::Cow;
use std::fmt;

/// One table of a TOML file: its keys, and what holds between them.
#[derive(Debug)]
pub struct Section {
    /// As messages name it: `[disk]`. Empty at the top of the file.
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
    /// What a message says after "it should be"; empty: what the type of the value says.
    pub expected: &'static str,
    /// The key has to be there. The text is what a message says after "is missing: ".
    pub required: Option<&'static str>,
    pub default: DefaultValue,
    /// What the key means: plain sentences in Markdown.
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
    /// `[[key]]`, as often as it is written.
    Tables(&'static Section),
    /// A table whose keys are the user's own.
    Map(&'static UserTable),
    /// One of several types.
    Either(&'static [ValueType]),
    Anything,
}

/// What a schema can say about a text. The parser's own checks say more.
#[derive(Debug)]
pub struct TextRule {
    /// A regular expression without look-around; empty: any text.
    pub pattern: &'static str,
    /// Another one, which may not match; empty: none.
    pub never: &'static str,
    /// Texts that it may not be. `LD_*` stands for all that begin with `LD_`.
    pub reserved: &'static [&'static str],
    /// The longest, in characters; 0: any length.
    pub most: usize,
}

/// What an array holds.
#[derive(Debug)]
pub struct ArrayRule {
    pub element: ValueType,
    /// What the first element is, besides.
    pub first: Option<&'static ValueType>,
    pub least: usize,
    /// No element may be there twice.
    pub unique: bool,
}

/// A table whose keys are the user's own.
#[derive(Debug)]
pub struct UserTable {
    /// As messages name it: `[tags]`.
    pub header: &'static str,
    pub names: TextRule,
    pub values: ValueType,
    pub least: usize,
    /// How many entries there may be; 0: any number.
    pub most: usize,
}

/// What holds if the key is not there.
#[derive(Debug)]
pub enum DefaultValue {
    /// Nothing.
    None,
    Is(Literal),
    /// What a sentence says, such as "the directory's name".
    Said(&'static str),
}

/// A value in a table of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Literal {
    Boolean(bool),
    Integer(u64),
    Text(&'static str),
}

/// What holds between the keys of a table.
#[derive(Debug)]
pub enum KeyRule {
    /// Exactly one of these keys is there.
    OneOf(&'static [&'static str]),
    /// The first key is there with none of the others.
    Excludes(&'static str, &'static [&'static str]),
    /// The first key needs the second one with this value beside it.
    Needs(&'static str, &'static str, Literal),
    /// The first key has to be there, unless the second one has this value; then it may not be there.
    Unless(&'static str, &'static str, Literal),
    /// Where the key has this value, these conditions hold.
    When(&'static str, Literal, &'static [Condition]),
}

/// What a value of one key demands of another one.
#[derive(Debug)]
pub enum Condition {
    Absent(&'static str),
    Present(&'static str),
    /// If it is there, it is between these two.
    Within(&'static str, u64, u64),
    /// If it is there, it is this.
    Is(&'static str, Literal),
}

/// Any text. Also a rule to take the fields from that another one does not set.
pub const ANY_TEXT: TextRule = TextRule { pattern: "", never: "", reserved: &[], most: 0 };
/// A default.
pub const NO: DefaultValue = DefaultValue::Is(Literal::Boolean(false));
/// A key to take the fields from that another one does not set.
pub const KEY: TomlKey = TomlKey {
    name: "",
    value: ValueType::Anything,
    expected: "",
    required: None,
    default: DefaultValue::None,
    doc: "",
    example: "",
};

/// A text that matches a pattern.
pub const fn text(pattern: &'static str) -> ValueType {
    ValueType::Text(TextRule { pattern, ..ANY_TEXT })
}

impl Section {
    pub fn key(&self, name: &str) -> Option<&'static TomlKey> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// The keys' names, sorted.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.keys.iter().map(|key| key.name).collect();
        names.sort_unstable();
        names
    }

    /// The keys of which exactly one has to be there.
    pub fn one_of(&self) -> &'static [&'static str] {
        let keys = |rule: &KeyRule| if let KeyRule::OneOf(keys) = rule { Some(*keys) } else { None };
        self.rules.iter().find_map(keys).unwrap_or(&[])
    }
}

impl TomlKey {
    /// What the value should be, for messages.
    pub fn expected(&self) -> Cow<'static, str> {
        if self.expected.is_empty() { self.value.expected() } else { self.expected.into() }
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
            Self::Integer { least, unit, .. } => format!("an integer ({unit}), such as {}", least + 7).into(),
            Self::Table(section) => format!("a table: {}", section.header).into(),
            Self::Map(table) => format!("a table: {}", table.header).into(),
            Self::Tables(section) => {
                format!("one or more tables, each under a header {}", section.header).into()
            }
            Self::Text(_) | Self::Array(_) | Self::Either(_) | Self::Anything => "of another type".into(),
        }
    }

    /// The words that it may be.
    pub fn words(&self) -> &'static [&'static str] {
        match self {
            Self::Words(words) => words,
            Self::Either(types) => {
                types.iter().map(Self::words).find(|words| !words.is_empty()).unwrap_or(&[])
            }
            _ => &[],
        }
    }

    /// The table that it may be, or hold.
    pub fn section(&self) -> Option<&'static Section> {
        match self {
            Self::Table(section) | Self::Tables(section) => Some(section),
            Self::Array(array) => array.element.section(),
            Self::Either(types) => types.iter().find_map(Self::section),
            _ => None,
        }
    }

    /// The table with the user's own keys that it may be.
    pub fn user_table(&self) -> Option<&'static UserTable> {
        if let Self::Map(table) = self { Some(table) } else { None }
    }
}

impl Condition {
    /// The key that it is about.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Absent(key) | Self::Present(key) | Self::Within(key, ..) | Self::Is(key, _) => key,
        }
    }
}

/// As TOML spells it.
impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boolean(truth) => write!(f, "{truth}"),
            Self::Integer(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}
