//! `from`: the base of a definition.

use super::keys::SPELLINGS;
use super::paths::Sources;
use super::{BaseSource, FILE, validate};
use crate::cloud::BaseRef;
use crate::cloud::ec2_rules::{IMAGE_NAME_LENGTH, is_image_name_character};
use crate::config::toml_reader::Table;
use crate::ids::ImageId;
use crate::sys::fds::PathRefusal;
use crate::text::escape_name;
use std::path::Path;
use toml::de::DeValue;

/// Owners that EC2 accepts instead of an account's 12 digits.
const OWNERS: [&str; 4] = ["self", "amazon", "aws-marketplace", "aws-backup-vault"];

pub fn read(top: &Table, sources: &Sources) -> Option<BaseSource> {
    let at = top.value("from")?;
    match at.value {
        DeValue::String(text) => top.check("from", at.line, string(text, sources)),
        DeValue::Table(_) => {
            let table = top.table("from")?;
            Some(BaseSource::Image(image(&table)?))
        }
        _ => top.mistyped("from", &at),
    }
}

fn string(text: &str, sources: &Sources) -> Result<BaseSource, String> {
    if text.starts_with("ami-") && !text.contains('/') {
        return id(text).map(|id| BaseSource::Image(BaseRef::Id(id)));
    }
    if !(text.contains('/') || matches!(text, "." | "..")) {
        return Err(format!("is {text:?}. Allowed are: {SPELLINGS}"));
    }
    let parent = sources.path(text);
    let what = match sources.resolve(Path::new(text)) {
        Ok(real) if real.join(FILE).symlink_metadata().is_ok() => return Ok(BaseSource::Parent(parent)),
        // Only `BakeOrder` knows whether the user named this directory, too. If not, it refuses the parent.
        Err(PathRefusal::Outside(_)) => return Ok(BaseSource::Parent(parent)),
        Ok(real) if real.is_dir() => "has no image.toml".to_owned(),
        Ok(_) => "is not a directory".to_owned(),
        Err(PathRefusal::Io(_)) => "does not exist".to_owned(),
        Err(refused) => return Err(format!("is {text:?}, which {refused}")),
    };
    Err(format!("is {text:?}, but {} {what}", escape_name(&parent)))
}

fn id(text: &str) -> Result<ImageId, String> {
    let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    match text.strip_prefix("ami-") {
        Some(digits) if matches!(digits.len(), 8 | 17) && digits.bytes().all(hex) => Ok(ImageId(text.into())),
        _ => Err(format!("is {text:?}: an image's id is `ami-`, followed by 17 (or 8) digits of 0-9a-f")),
    }
}

fn image(table: &Table) -> Option<BaseRef> {
    let mut ways = table.one_of().iter().filter(|way| table.has(way));
    let Some(way) = ways.next() else {
        table.none_of("`from` needs one of `id`, `name`, `ssm` or `tag`");
        return None;
    };
    let line_of = |key: &str| table.value(key).map_or(table.line, |at| at.line);
    if let Some(other) = ways.next() {
        table.mistake(line_of(other), format!("`from` has both `{way}` and `{other}`: remove one"));
        return None;
    }
    if table.has("owner") && !matches!(*way, "name" | "tag") {
        return table.wrong("owner", line_of("owner"), "works only with `name` or `tag`: remove it");
    }
    let owner = if table.has("owner") {
        let at = table.string("owner");
        // A wrong owner is reported here. The other keys are still checked.
        at.and_then(|at| table.check("owner", at.line, account(at.value)))
    } else {
        None
    };
    let deprecated = table.flag("deprecated");
    let base = match *way {
        "id" => {
            let at = table.string("id")?;
            BaseRef::Id(table.check("id", at.line, id(at.value))?)
        }
        "ssm" => {
            let at = table.string("ssm")?;
            BaseRef::Ssm(table.check("ssm", at.line, parameter(at.value))?)
        }
        "tag" => {
            let (key, value) = tag(table)?;
            BaseRef::Tag { key, value, owner }
        }
        _ => {
            let at = table.string("name")?;
            BaseRef::Name { name: table.check("name", at.line, pattern(at.value))?, owner }
        }
    };
    Some(if deprecated { BaseRef::Deprecated(Box::new(base)) } else { base })
}

/// Reads `tag = { role = "base" }`. The value is a table, as in `[tags]`. A string such as `role=base` would be
/// ambiguous, because a tag's key may contain any separator.
fn tag(from: &Table) -> Option<(String, String)> {
    let at = from.value("tag")?;
    if let DeValue::String(text) = at.value {
        let spelt = text.split_once('=').map_or((&**text, "…"), |(key, value)| (key.trim(), value.trim()));
        let what =
            format!("is a string: it should be a table of one tag, {{ {:?} = {:?} }}", spelt.0, spelt.1);
        return from.wrong("tag", at.line, what);
    }
    if !at.value.is_table() {
        return from.mistyped("tag", &at);
    }
    let table = from.user_table("tag")?;
    let mut entries = table.entries();
    match (entries.next(), entries.next()) {
        (Some((key, value)), None) => {
            let DeValue::String(text) = value.value else {
                return table.wrong_type(key.value, &value, "a quoted string");
            };
            table.check(key.value, key.line, validate::searched_tag(key.value, text))?;
            Some((key.value.to_owned(), text.to_string()))
        }
        (first, _) => {
            let count = if first.is_some() { "several tags" } else { "no tag" };
            let expected = from.key("tag").expected();
            from.wrong("tag", at.line, format!("has {count}: it should be {expected}"))
        }
    }
}

fn parameter(name: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "/_.-:".contains(c);
    if name.is_empty() || name.len() > 2048 || !name.chars().all(good) {
        Err(format!("is {name:?}: it should be a parameter's name, such as \"/aws/service/…\""))
    } else {
        Ok(name.into())
    }
}

fn pattern(name: &str) -> Result<String, String> {
    let good = |c: &char| is_image_name_character(*c) || "*?".contains(*c);
    match name.chars().find(|c| !good(c)) {
        Some(bad) => Err(format!("is {name:?}: an image's name cannot contain the character {bad:?}")),
        None if name.trim().is_empty() => Err("is empty: it should be an image's name".into()),
        None if name.len() > IMAGE_NAME_LENGTH.1 => {
            Err(format!("is longer than {} characters, the limit of an image's name", IMAGE_NAME_LENGTH.1))
        }
        None => Ok(name.into()),
    }
}

fn account(owner: &str) -> Result<String, String> {
    if OWNERS.contains(&owner) || owner.len() == 12 && owner.bytes().all(|b| b.is_ascii_digit()) {
        Ok(owner.into())
    } else {
        Err(format!("is {owner:?}: it should be an account's 12 digits, \"self\" or \"amazon\""))
    }
}
