//! `from`: what a definition stands on.

use super::{FILE, From};
use crate::cloud::{BaseRef, ImageId};
use crate::document::Table;
use std::path::Path;
use toml::de::DeValue;

const SPELLINGS: &str = "\"ami-…\" (an image), \"../base\" (another definition), { name = \"debian-12-*\", owner = \
                         \"136693071363\" } or { ssm = \"/aws/service/…\" } (the newest that matches)";
/// What EC2 knows as an owner besides a 12-digit account.
const OWNERS: [&str; 4] = ["self", "amazon", "aws-marketplace", "aws-backup-vault"];

pub fn read(top: &Table, dir: &Path) -> Option<From> {
    let at = top.required("from", top.value("from"), &format!("write {SPELLINGS}"))?;
    match at.value {
        DeValue::String(text) => top.check("from", at.line, string(text, dir)),
        DeValue::Table(_) => {
            let table = top.table("from", "`from`", &["name", "owner", "ssm"])?;
            Some(From::Image(image(&table)?))
        }
        _ => top.wrong_type("from", &at, SPELLINGS),
    }
}

fn string(text: &str, dir: &Path) -> Result<From, String> {
    if let Some(digits) = text.strip_prefix("ami-").filter(|digits| !digits.contains('/')) {
        let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        return if matches!(digits.len(), 8 | 17) && digits.bytes().all(hex) {
            Ok(From::Image(BaseRef::Id(ImageId(text.into()))))
        } else {
            Err(format!("is {text:?}: an image's id is `ami-` and 17 digits of 0-9a-f"))
        };
    }
    if !(text.contains('/') || matches!(text, "." | "..")) {
        return Err(format!("is {text:?}, which is none of {SPELLINGS}"));
    }
    let parent = dir.join(text);
    if !parent.join(FILE).exists() {
        let what = if parent.is_dir() { "has no image.toml" } else { "is no directory" };
        return Err(format!("is {text:?}, but {} {what}", parent.display()));
    }
    Ok(From::Parent(parent))
}

fn image(table: &Table) -> Option<BaseRef> {
    if table.has("ssm") {
        let ssm = table.string("ssm", "a parameter's name, such as \"/aws/service/…\"");
        if let Some(other) = ["name", "owner"].into_iter().find(|key| table.has(key)) {
            return table.wrong(other, table.line, "does not go with `ssm`: leave one of them out");
        }
        let at = ssm?;
        let good = |c: char| c.is_ascii_alphanumeric() || "/_.-:".contains(c);
        if at.value.is_empty() || at.value.len() > 2048 || !at.value.chars().all(good) {
            let what =
                format!("is {:?}: it should be a parameter's name, such as \"/aws/service/…\"", at.value);
            return table.wrong("ssm", at.line, what);
        }
        return Some(BaseRef::Ssm(at.value.into()));
    }
    let name = table.string("name", "an image's name, which may have `*` and `?`");
    let owner =
        table.has("owner").then(|| table.string("owner", "an account's 12 digits in quotes, or \"self\""));
    let name = table.required("name", name, "`from` needs it, or `ssm`");
    let name = name.and_then(|at| table.check("name", at.line, pattern(at.value)));
    let owner = owner.map(|at| at.and_then(|at| table.check("owner", at.line, account(at.value))));
    Some(BaseRef::Name {
        name: name?,
        owner: match owner {
            None => None,
            Some(owner) => Some(owner?),
        },
    })
}

fn pattern(name: &str) -> Result<String, String> {
    let good = |c: &char| c.is_ascii_alphanumeric() || " ()[]./-'@_*?".contains(*c);
    match name.chars().find(|c| !good(c)) {
        Some(bad) => Err(format!("is {name:?}: no image's name has the character {bad:?}")),
        None if name.trim().is_empty() => Err("is empty: it should be an image's name".into()),
        None if name.len() > 128 => Err("is longer than any image's name (128 characters)".into()),
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
