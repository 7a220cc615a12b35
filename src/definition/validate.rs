//! Checks of values that several keys share: names, paths, modes and tags. The header of `keys/mod.rs` says where all
//! other checks of image.toml are. An error is the rest of a sentence that begins with the key.

use crate::cloud::ec2_rules::{
    IMAGE_NAME_LENGTH, MAX_DESCRIPTION, MAX_TAG_KEY, MAX_TAG_VALUE, MAX_TAGS, is_image_name_character,
    is_reserved_tag_key,
};
use crate::cloud::{Tags, tag};
use crate::config::toml_reader::Table;
use crate::text::escape_name;
use std::path::Path;
use toml::de::DeValue;

/// The maximal length of a definition's name. EC2 allows 128 characters for an image's name. oven appends `-` and 12
/// digits of the fingerprint, and with `--force` also `-` and 8 digits of the run's id.
pub const MAX_NAME: usize = IMAGE_NAME_LENGTH.1 - 13 - 9;
/// The tags that oven itself may put on an image. EC2's limit also counts these tags, so the user can set fewer.
const OVEN_TAGS: [&str; 9] = [
    tag::CHECKSUM,
    tag::FINGERPRINT,
    tag::INPUTS,
    tag::NAME,
    tag::BASE,
    tag::RUN,
    tag::OWNER,
    tag::FORCED,
    tag::KEPT,
];
/// The maximal number of tags that the user can set.
pub(super) const MAX_USER_TAGS: usize = MAX_TAGS - OVEN_TAGS.len();
/// When an instance boots, other file systems are mounted on these directories. They would hide a file in the image
/// below these directories.
const COVERED: [&str; 4] = ["/dev", "/proc", "/run", "/sys"];

/// Directories whose content the clean-up removes.
const EMPTIED: [&str; 2] = ["/tmp", "/var/tmp"];

/// Reads the definition's name: `name`, or the last part of the definition's canonical path if `name` is not set.
pub fn name(top: &Table, real: &Path) -> Option<String> {
    if top.has("name") {
        let at = top.string("name")?;
        return top.check("name", at.line, family(at.value));
    }
    let wrong = |what: String| {
        top.mistake(1, format!("{what}; set `name`"));
        None
    };
    let Some(base) = real.file_name() else {
        return wrong("the directory has no name, because it is /".into());
    };
    let Some(text) = base.to_str() else {
        return wrong(format!("the directory's name \"{}\" is not valid UTF-8", escape_name(base)));
    };
    family(text).map_or_else(|what| wrong(format!("the directory's name {text:?} {what}")), Some)
}

/// Checks a definition's name.
fn family(name: &str) -> Result<String, String> {
    match name {
        "" => Err("is empty, but the names of images begin with it".into()),
        _ if !name.chars().all(is_image_name_character) => {
            let bad = name.chars().find(|c| !is_image_name_character(*c)).unwrap_or_default();
            Err(format!(
                "has the character {bad:?}: an image's name can only have ASCII letters, digits, spaces and \
                 ()[]./-'@_"
            ))
        }
        _ if name.trim() != name => Err("begins or ends with a space".into()),
        _ if name.len() > MAX_NAME => Err(format!(
            "has {} characters, but at most {MAX_NAME} are allowed, because an image's name has at most 128 and oven \
             adds a suffix",
            name.len()
        )),
        _ => Ok(name.to_owned()),
    }
}

pub fn description(top: &Table) -> String {
    let Some(at) = top.string("description") else { return String::new() };
    let count = at.value.chars().count();
    let checked = if count > MAX_DESCRIPTION {
        Err(format!("has {count} characters, but at most {MAX_DESCRIPTION} are allowed"))
    } else if at.value.chars().any(char::is_control) {
        Err("has a control character, perhaps a line break: it must be one line".into())
    } else {
        Ok(at.value.to_owned())
    };
    top.check("description", at.line, checked).unwrap_or_default()
}

/// Checks that a path in the image is absolute, without `.`, `..` and empty parts.
pub fn image_path(path: &str) -> Result<String, String> {
    if !path.starts_with('/') {
        return Err(format!("is {path:?}: a path in the image begins with `/`"));
    }
    if path.chars().any(char::is_control) {
        return Err(format!("is {path:?}: a path cannot contain control characters"));
    }
    if path == "/" {
        return Err("is the root of the image: name a path below it".into());
    }
    // One trailing slash is accepted, because people often write it after a directory.
    let parts: Vec<&str> = path.strip_suffix('/').unwrap_or(path)[1..].split('/').collect();
    match parts.iter().find(|part| matches!(**part, "" | "." | "..")) {
        Some(&"") => Err(format!("is {path:?}: replace `//` with `/`")),
        Some(dots) => Err(format!("is {path:?}: write the path without `{dots}`")),
        None => Ok(format!("/{}", parts.join("/"))),
    }
}

/// Checks the path at which a file is placed.
pub fn target(path: &str) -> Result<String, String> {
    let target = image_path(path)?;
    if path.ends_with('/') {
        return Err(format!(
            "is {path:?}: add the file's name, because a target is a file and not a directory"
        ));
    }
    if let Some(dir) = EMPTIED.iter().find(|dir| Path::new(&target).starts_with(dir)) {
        return Err(format!(
            "is below {dir}: oven empties this directory at the end of each bake, so the file would not be in the image"
        ));
    }
    match COVERED.iter().find(|dir| Path::new(&target).starts_with(dir)) {
        Some(dir) => Err(format!(
            "is below {dir}: another file system is mounted there when an instance boots, and hides the file"
        )),
        None => Ok(target),
    }
}

/// Reads permission bits, such as `"0644"`.
pub fn mode(table: &Table) -> Option<u32> {
    let at = table.value("mode")?;
    match at.value {
        DeValue::String(text) => {
            let digits = matches!(text.len(), 3..=4) && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
            let mode = if digits { u32::from_str_radix(text, 8).ok() } else { None };
            let mode = mode.ok_or_else(|| {
                format!("is {text:?}: it should be three or four octal digits, such as \"0644\"")
            });
            table.check("mode", at.line, mode)
        }
        // A number is rejected: the decimal number 644 is the mode 0o1204, which nobody means.
        _ => table.mistyped("mode", &at),
    }
}

/// Reads a user's or a group's name or number. The default is root.
pub fn account(table: &Table, key: &str) -> Option<String> {
    if !table.has(key) {
        return Some("root".into());
    }
    let at = table.string(key)?;
    let name = at.value;
    let number = !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit());
    // 4294967295 is `(uid_t)-1`. It is rejected, because chown leaves the owner unchanged for this number.
    let good = if number {
        name.parse::<u32>().is_ok_and(|id| id != u32::MAX)
    } else {
        name.len() <= 32
            && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
    };
    if good { Some(name.to_owned()) } else { table.unexpected(key, &at) }
}

/// Reads `[tags]`.
pub fn tags(top: &Table) -> Tags {
    let mut tags = Tags::new();
    let Some(table) = top.user_table("tags") else { return tags };
    for (key, value) in table.entries() {
        let name = key.value;
        let checked = tag_key(name);
        let good = table.check(&name.escape_debug().to_string(), key.line, checked).is_some();
        let DeValue::String(text) = value.value else {
            table.wrong_type::<()>(name, &value, "a quoted string");
            continue;
        };
        let count = text.chars().count();
        if count > MAX_TAG_VALUE {
            table.wrong::<()>(
                name,
                value.line,
                format!("has {count} characters, but at most {MAX_TAG_VALUE} are allowed"),
            );
        } else if text.chars().any(char::is_control) {
            table.wrong::<()>(name, value.line, "has a control character, perhaps a line break");
        } else if good {
            tags.insert(name.to_owned(), text.to_string());
        }
    }
    let (count, room) = (table.entries().count(), MAX_USER_TAGS);
    if count > room {
        let needed = OVEN_TAGS.len();
        table.mistake(
            table.line,
            format!(
                "[tags] has {count} tags, but at most {room} are allowed, because EC2 allows {MAX_TAGS} and oven \
                 needs {needed} of them"
            ),
        );
    }
    tags
}

/// Checks a tag by which a base image is searched. Tags that oven sets are allowed. `*` and `?` are rejected, because
/// EC2's filters treat them as wildcards.
pub fn searched_tag(key: &str, value: &str) -> Result<(), String> {
    let (keys, values) = (key.chars().count(), value.chars().count());
    if key.is_empty() {
        Err("is empty, but every tag needs a key".into())
    } else if keys > MAX_TAG_KEY || values > MAX_TAG_VALUE {
        Err(format!(
            "is not a valid tag: a key has at most {MAX_TAG_KEY} characters, and a value at most {MAX_TAG_VALUE}"
        ))
    } else if key.chars().chain(value.chars()).any(char::is_control) {
        Err("has a control character".into())
    } else if value.contains(['*', '?', '\\']) {
        Err(format!("is {value:?}: write the whole value, without `*`, `?` or `\\`"))
    } else {
        Ok(())
    }
}

fn tag_key(key: &str) -> Result<(), String> {
    let count = key.chars().count();
    if key.is_empty() {
        Err("is empty, but every tag needs a key".into())
    } else if count > MAX_TAG_KEY {
        Err(format!("has {count} characters, but a tag's key has at most {MAX_TAG_KEY}"))
    } else if key.chars().any(char::is_control) {
        Err("has a control character".into())
    } else if is_reserved_tag_key(key) {
        Err("begins with `aws:`, which is reserved for AWS".into())
    } else if key.starts_with("oven:") || OVEN_TAGS.contains(&key) {
        Err("is a tag that oven sets itself: choose another key".into())
    } else {
        Ok(())
    }
}
