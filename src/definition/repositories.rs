//! `[[repository]]`, `hold` and `debconf`.

use super::packages::{check_name, package_url};
use super::paths::Sources;
use crate::config::toml_reader::{At, Table, until_stopped};
use crate::text::escape_name;
use oven_distro::Repository;
use std::collections::BTreeMap;
use std::io::Read;

pub(super) const MAX_NAME: usize = 64;
/// The maximal size of a key in bytes. Even a distribution's key that has collected signatures for twenty years has
/// only about 100 KiB.
const MAX_KEY: u64 = 1 << 20;
/// The maximal number of repositories. Nobody uses more than a few.
const MAX_REPOSITORIES: usize = 100;
const BEGIN: &str = "-----BEGIN PGP PUBLIC KEY BLOCK-----";
const END: &str = "-----END PGP PUBLIC KEY BLOCK-----";
const ARMOUR: &str =
    "check it with `gpg --show-keys FILE`, or write a new one with `gpg --export --armor KEYID`";
/// The types of debconf's questions.
const TYPES: [&str; 8] = ["boolean", "error", "multiselect", "note", "password", "select", "string", "text"];
pub(super) const DEBCONF: &str = "an array of answers, such as [\"tzdata tzdata/Areas select Europe\"]";

pub fn read(top: &Table, sources: &Sources) -> Vec<Repository> {
    let mut lines = BTreeMap::new();
    let tables = top.tables("repository");
    if let Some(first) = tables.get(MAX_REPOSITORIES) {
        let count = tables.len();
        top.mistake(
            first.line,
            format!(
                "`repository` has {count} tables, but at most {MAX_REPOSITORIES} are allowed: remove the others"
            ),
        );
    }
    let tables = until_stopped(tables.into_iter().take(MAX_REPOSITORIES));
    let repositories = tables.filter_map(|table| {
        // Another mistake in the table does not hide that its name exists twice.
        let name =
            table.value("name").and_then(|at| Some((at.value.as_str()?.to_ascii_lowercase(), at.line)));
        let repository = read_one(&table, sources);
        let (name, line) = name?;
        match lines.insert(name, line) {
            None => repository,
            Some(first) => {
                table.wrong("name", line, format!("is the same as on line {first}: choose another"))
            }
        }
    });
    repositories.collect()
}

fn read_one(table: &Table, sources: &Sources) -> Option<Repository> {
    let name = table.string("name").and_then(|at| table.check("name", at.line, file_name(at.value)));
    let url = table.string("url").and_then(|at| table.check("url", at.line, package_url(at.value)));
    let suite = table.string("suite").map(|at| table.check("suite", at.line, suite_name(at.value)));
    let components = table.strings("components").into_iter().filter_map(|At { value, line }| {
        let good = is_word(value, "-_./+");
        let checked = if good {
            Ok(value.to_owned())
        } else {
            Err(format!("has {value:?}, which is not a valid component name"))
        };
        table.check("components", line, checked)
    });
    let components = components.collect();
    let keep = table.flag("keep");
    let priority = table.integer("priority").and_then(|n| u16::try_from(n).ok());
    let key = key(table, sources);
    Some(Repository {
        name: name?,
        url: url?,
        key: key?,
        suite: suite.map_or(Some(None), |suite| suite.map(Some))?,
        components,
        keep,
        priority,
    })
}

/// Reads `key`, or `signed = false`. If neither is set, this is an error, so that nobody uses unsigned packages by
/// mistake.
fn key(table: &Table, sources: &Sources) -> Option<Option<String>> {
    let signed = if table.has("signed") { table.boolean("signed")? } else { true };
    match table.string("key") {
        Some(at) if !signed => {
            let line = table.value("signed").map_or(at.line, |at| at.line);
            table.wrong("signed", line, "is `false`, but `key` is set: remove one")
        }
        Some(at) => {
            let source = table.check("key", at.line, sources.file(at.value))?;
            let armoured = sources.open(at.value, &source.path).and_then(|file| {
                let key = armoured(at.value, &source.path, file)?;
                sources.budget.add_key(at.value, &key).map(|()| key)
            });
            Some(Some(table.check("key", at.line, armoured)?))
        }
        None if !signed && !table.has("key") => Some(None),
        None => {
            // A key of the wrong type was reported already. A missing key is reported here.
            if !table.has("key") && !table.misspells("signed") {
                let what = format!(
                    "{}. With `signed = false` no signature is checked: anyone who can change the network traffic \
                     can put anything into the image",
                    table.key("key").expected()
                );
                table.missing("key", what);
            }
            None
        }
    }
}

/// Reads the blocks of an ASCII-armoured key, without the text around them.
fn armoured(spelt: &str, path: &std::path::Path, file: std::fs::File) -> Result<String, String> {
    let unread =
        |error: std::io::Error| format!("names {spelt:?}, but {} cannot be read: {error}", escape_name(path));
    let mut bytes = Vec::new();
    file.take(MAX_KEY + 1).read_to_end(&mut bytes).map_err(unread)?;
    if bytes.len() as u64 > MAX_KEY {
        return Err(format!("is {spelt:?}, which is larger than 1 MiB, the limit for a key"));
    }
    let text = String::from_utf8_lossy(&bytes);
    if text.contains("PGP PRIVATE KEY BLOCK") {
        return Err(format!(
            "is {spelt:?}, which is a private key: use the public key, and do not pass on the private one"
        ));
    }
    // A binary key begins with one of these bytes, the headers of a public-key packet.
    if matches!(bytes.first(), Some(0x98..=0x9a | 0xc6)) {
        let how = "`gpg --no-default-keyring --keyring ./FILE --export --armor` converts it";
        return Err(format!("is {spelt:?}, which is a binary key, but must be ASCII-armoured: {how}"));
    }
    let (mut blocks, mut inside, mut blank) = (String::new(), false, false);
    for line in text.lines().map(str::trim_end) {
        if line == BEGIN {
            (inside, blank) = (true, false);
        }
        if inside {
            if line.chars().any(char::is_control) {
                break;
            }
            blank |= line.is_empty();
            blocks += line;
            blocks.push('\n');
        }
        if line == END && inside {
            if !blank {
                return Err(format!("is {spelt:?}, whose key has no empty line after its header: {ARMOUR}"));
            }
            inside = false;
        }
    }
    if blocks.is_empty() {
        return Err(format!("is {spelt:?}, which contains no ASCII-armoured OpenPGP key: {ARMOUR}"));
    }
    if inside {
        return Err(format!("is {spelt:?}, whose key is incomplete: {ARMOUR}"));
    }
    Ok(blocks)
}

/// Checks a repository's name. It is used as a file name, and as the name of a section in dnf's configuration.
fn file_name(name: &str) -> Result<String, String> {
    if is_word(name, "-_.") && name.len() <= MAX_NAME {
        return Ok(name.to_owned());
    }
    Err(format!(
        "is {name:?}: use at most {MAX_NAME} letters, digits, `-`, `_` and `.`, and begin with a letter or a digit"
    ))
}

fn suite_name(suite: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_./+~".contains(c);
    let plain = !suite.starts_with('/') && !suite.split('/').any(|part| part == "..");
    if !suite.is_empty() && plain && suite.chars().all(good) {
        return Ok(suite.to_owned());
    }
    Err(format!("is {suite:?}: it should be a suite's name, such as \"bookworm\""))
}

fn is_word(text: &str, also: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || also.contains(c))
}

pub fn hold(top: &Table) -> Vec<String> {
    let mut lines = BTreeMap::new();
    let names = top.strings("hold").into_iter();
    let names = names.filter_map(|At { value, line }| {
        if value.contains('=') {
            let what = format!("has {value:?}: list only names here, and pin a version in `packages`");
            return top.wrong("hold", line, what);
        }
        top.check("hold", line, check_name(value, value))?;
        match lines.insert(value, line) {
            None => Some(value.to_owned()),
            Some(first) => {
                top.wrong("hold", line, format!("has {value} twice (first on line {first}): remove one"))
            }
        }
    });
    names.collect()
}

pub fn debconf(top: &Table) -> Vec<String> {
    let answers = top.strings("debconf").into_iter();
    answers.filter_map(|at| top.check("debconf", at.line, answer(at.value))).collect()
}

/// Checks an answer for debconf. An error never shows the answer's value, because it may be a password.
fn answer(text: &str) -> Result<String, String> {
    // One space separates the value from the type, as in debconf-set-selections. Further spaces are part of the value.
    let mut rest = text;
    let mut next = || {
        let (word, after) = rest.trim_start().split_once([' ', '\t']).unwrap_or((rest.trim_start(), ""));
        rest = after;
        word
    };
    let (package, question, kind) = (next(), next(), next());
    let value = rest;
    let shown = format!("{package} {question}");
    if question.is_empty() || kind.is_empty() {
        return Err(format!(
            "has {shown:?}: write a package, a question, a type and a value, such as \"tzdata tzdata/Areas select \
             Europe\""
        ));
    }
    if !is_word(package, "+-.:") {
        return Err(format!("has {shown:?}: it must begin with a package name"));
    }
    if !TYPES.contains(&kind) {
        let known = crate::config::toml_reader::listed(&TYPES);
        return Err(format!("has {shown:?} with the type {kind:?}: the valid types are {known}"));
    }
    if text.chars().any(|c| c.is_control() && c != '\t') || value.ends_with('\\') {
        return Err(format!(
            "has {shown:?}, whose value has a control character or ends with `\\`: it must be one line"
        ));
    }
    Ok(format!("{package} {question} {kind} {value}"))
}
