//! Reference pages of TOML files: a heading for each key.

use oven::config::key_table::{
    ArrayRule, Condition, DefaultValue, KeyRule, Section, TextRule, TomlKey, ValueType,
};
use oven::config::project::keys::OVEN_TOML;
use oven::definition::keys::IMAGE_TOML;
use std::fmt::Write;

pub const GENERATED: &str = "<!-- Generated: `OVEN_BLESS=1 cargo test --test pure docs` writes this page from the tables in the code. -->\n";

pub fn image_toml() -> String {
    page(
        "image.toml",
        "A definition is a directory with an `image.toml`. This page lists every key of that file. An unknown key is an \
         error that names the nearest known one.\n\nAll files of the directory count: if one of them changes, the next \
         bake makes a new image. Only `from` is required.\n\nEditors complete and check the file by \
         [`schema/image.schema.json`](../../schema/image.schema.json): begin it with `#:schema PATH`, as in \
         `#:schema ./image.schema.json`.",
        &IMAGE_TOML,
    )
}

pub fn oven_toml() -> String {
    page(
        "oven.toml",
        "`oven.toml` holds the settings of a project. oven reads the nearest one: it searches the definition's directory \
         first, and then each directory above. Put it above the definitions, because in a definition's own directory it \
         counts as one of its files. No key is required, and neither is the file.\n\nFlags override environment \
         variables, and these override the file. A file that belongs neither to you nor to root is rejected.\n\nEditors \
         complete and check the file by [`schema/oven.schema.json`](../../schema/oven.schema.json): begin it with \
         `#:schema PATH`.",
        &OVEN_TOML,
    )
}

fn page(title: &str, about: &str, top: &Section) -> String {
    let mut text = format!("{GENERATED}\n# {title}\n\n{about}\n");
    contents(&mut text, top);
    for key in top.keys {
        one(&mut text, "##", "", "", key);
    }
    text
}

/// The keys, each with a link.
fn contents(text: &mut String, top: &Section) {
    text.push('\n');
    for key in top.keys {
        _ = write!(text, "- {}", link("", key.name));
        if let Some(section) = below(key) {
            let names = section.keys.iter().map(|below| link(key.name, below.name));
            _ = write!(text, ": {}", names.collect::<Vec<_>>().join(", "));
        }
        text.push('\n');
    }
}

fn link(parent: &str, name: &str) -> String {
    // As GitHub makes them of headings: without dots and quotes.
    format!("[`{name}`](#{parent}{name})")
}

/// The table that has headings of its own under a key.
fn below(key: &TomlKey) -> Option<&'static Section> {
    key.value.section()
}

fn one(text: &mut String, level: &str, parent: &str, header: &str, key: &TomlKey) {
    let name = if parent.is_empty() { key.name.to_owned() } else { format!("{parent}.{}", key.name) };
    _ = write!(text, "\n{level} `{name}`\n\n- Type: {}\n", type_of(&key.value));
    match (&key.default, key.required) {
        (_, Some(_)) => text.push_str("- Required\n"),
        (DefaultValue::Is(literal), _) => _ = writeln!(text, "- Default: `{literal}`"),
        (DefaultValue::Said(what), _) => _ = writeln!(text, "- Default: {what}"),
        (DefaultValue::None, _) => text.push_str("- Default: none\n"),
    }
    _ = write!(text, "\n{}\n", key.doc);
    if let Some(reserved) = reserved(&key.value) {
        _ = write!(text, "\n{reserved}\n");
    }
    let header = if header.starts_with('[') { format!("{header}\n") } else { String::new() };
    _ = write!(text, "\n```toml\n{header}{}\n```\n", key.example);
    let Some(section) = below(key) else { return };
    if !section.rules.is_empty() {
        text.push('\n');
    }
    for rule in section.rules {
        _ = writeln!(text, "- {}", sentence(rule));
    }
    for below in section.keys {
        one(text, "###", key.name, section.header, below);
    }
}

/// The names that a user's own keys may not have, where the text of the key does not say them already.
fn reserved(value: &ValueType) -> Option<String> {
    match value {
        ValueType::Map(table) if table.names.reserved.len() > 2 => {
            let words: Vec<_> = table.names.reserved.iter().map(|word| format!("`{word}`")).collect();
            Some(format!("Rejected names: {}.", words.join(", ")))
        }
        ValueType::Array(ArrayRule { element: ValueType::Text(rule), .. }) if !rule.reserved.is_empty() => {
            Some("Names that [`vars`](#vars) rejects are rejected here, too.".into())
        }
        _ => None,
    }
}

fn type_of(value: &ValueType) -> String {
    match value {
        ValueType::Boolean => "`true` or `false`".into(),
        ValueType::Text(TextRule { most: 0, .. }) => "text".into(),
        ValueType::Text(TextRule { most, .. }) => format!("text of at most {most} characters"),
        ValueType::Words(words) => either(words.iter().map(|word| format!("`{word:?}`")).collect()),
        ValueType::Integer { most, unit, .. } if *most >= u32::MAX.into() => format!("integer, in {unit}"),
        ValueType::Integer { least, most, unit } => format!("integer, {least} to {most} {unit}"),
        ValueType::Array(array) => match &array.element {
            ValueType::Either(_) => "array of texts and tables".into(),
            _ => "array of texts".into(),
        },
        ValueType::Table(_) => "table".into(),
        ValueType::Tables(table) => format!("any number of tables, each under a header `{}`", table.header),
        ValueType::Map(table) => match table.values {
            ValueType::Anything => "table with names of your own".into(),
            _ => "table of texts, with names of your own".into(),
        },
        ValueType::Either(types) => either(types.iter().map(type_of).collect()),
        ValueType::Anything => "any value".into(),
    }
}

fn either(words: Vec<String>) -> String {
    listed(&words, "or")
}

fn listed(words: &[String], and: &str) -> String {
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} {and} {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

fn sentence(rule: &KeyRule) -> String {
    let quoted = |keys: &[&str]| keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>();
    match rule {
        KeyRule::OneOf(keys) => format!("Exactly one of {} has to be set.", listed(&quoted(keys), "and")),
        KeyRule::Excludes(key, others) => {
            format!("`{key}` cannot be set together with {}.", listed(&quoted(others), "or"))
        }
        KeyRule::Needs(key, other, value) => format!("`{key}` needs `{other} = {value}`."),
        KeyRule::Unless(key, other, value) => {
            format!("`{key}` has to be set, unless `{other} = {value}`; then it cannot be set.")
        }
        KeyRule::When(key, value, conditions) => {
            let conditions = conditions.iter().map(|condition| match condition {
                Condition::Absent(other) => format!("`{other}` cannot be set"),
                Condition::Present(other) => format!("`{other}` has to be set"),
                Condition::Within(other, low, high) => format!("`{other}` is {low} to {high}"),
                Condition::Is(other, value) => format!("`{other}`, if it is set, is `{value}`"),
            });
            let conditions: Vec<_> = conditions.collect();
            format!("With `{key} = {value}`: {}.", listed(&conditions, "and"))
        }
    }
}
