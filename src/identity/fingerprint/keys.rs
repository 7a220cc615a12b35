//! The digests of the keys of image.toml. They are stored with an image, so that a later plan can say which key changed.
//! They are not part of the fingerprint.

use crate::config::key_table::ValueType;
use crate::definition::keys::IMAGE_TOML;
use crate::identity::checksum::hex;
use crate::text::shorten_name;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, BTreeSet};
use toml::de::{DeTable, DeValue};

/// The maximal number of keys. If a file has more, each array of tables has only one digest.
const MAX_KEYS: usize = 2000;
/// The maximal number of characters of an array element's name.
const MAX_NAME: usize = 100;
/// The maximal number of characters of a stored name that are shown. Names that oven stored are shorter.
const MAX_SHOWN: usize = 130;
/// The number of hexadecimal digits of a digest.
const DIGITS: usize = 16;
/// The keys by which people know an element of an array of tables.
const NAMES: [&str; 7] = ["target", "name", "script", "command", "bats", "playbook", "source"];
/// The name of the entry for the order of an array's elements. No key has a space.
const ORDER: &str = "the order";

/// The digest of each key, by table and by key. The keys of the top level are in the table with the empty name. The
/// other tables have the names that messages use, such as `[disk]`. An element of an array of tables is a table with a
/// name such as `[[file]] "/etc/motd"`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyDigests(BTreeMap<String, BTreeMap<String, String>>);

impl KeyDigests {
    /// The digests for the text of an image.toml. `None` if it cannot be parsed.
    pub fn of(text: &str) -> Option<Self> {
        let parsed = DeTable::parse(text).ok()?;
        let found = Self::read(parsed.get_ref(), true);
        Some(if found.0.values().map(BTreeMap::len).sum::<usize>() > MAX_KEYS {
            Self::read(parsed.get_ref(), false)
        } else {
            found
        })
    }

    /// `elements` says whether the elements of arrays of tables have own digests.
    fn read(top: &DeTable, elements: bool) -> Self {
        let mut tables: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for (key, value) in top {
            let (key, value) = (key.get_ref().as_ref(), value.get_ref());
            let kind = IMAGE_TOML.key(key).map(|key| &key.value);
            match (kind, value) {
                (Some(ValueType::Table(section)), DeValue::Table(table)) => {
                    tables.insert(section.header.to_owned(), digests(table));
                }
                (Some(ValueType::Map(map)), DeValue::Table(table)) => {
                    tables.insert(map.header.to_owned(), digests(table));
                }
                (Some(ValueType::Tables(section)), DeValue::Array(array)) if elements => {
                    let (mut names, mut order) = (BTreeMap::new(), Sha1::new());
                    for element in array.iter().filter_map(|element| element.get_ref().as_table()) {
                        let name = format!("{} {}", section.header, name(element));
                        let count = names.entry(name.clone()).and_modify(|count| *count += 1).or_insert(1);
                        let name = if *count > 1 { format!("{name} ({count})") } else { name };
                        order.update(format!("{name}\0"));
                        tables.insert(name, digests(element));
                    }
                    let order = BTreeMap::from([(ORDER.to_owned(), short(order))]);
                    tables.insert(section.header.to_owned(), order);
                }
                _ => {
                    tables.entry(String::new()).or_default().insert(key.to_owned(), digest(value));
                }
            }
        }
        Self(tables)
    }

    /// Lists the keys that differ, such as `` `packages` changed ``. `skip` has the tables that are not compared.
    pub fn explain(&self, new: &Self, skip: &[&str]) -> Vec<String> {
        let mut lines = Vec::new();
        let empty = BTreeMap::new();
        let names: BTreeSet<&String> = self.0.keys().chain(new.0.keys()).collect();
        for table in names.into_iter().filter(|table| !skip.contains(&table.as_str())) {
            let (was, is) = (self.0.get(table), new.0.get(table));
            let table = &*shorten_name(table, MAX_SHOWN);
            let is_element = table.starts_with("[[");
            match (was, is) {
                (None, Some(_)) if is_element && table.contains(' ') => lines.push(format!("{table} is new")),
                (Some(_), None) if is_element && table.contains(' ') => {
                    lines.push(format!("{table} was removed"));
                }
                // The order of an array that has no elements in one of the files.
                (None, _) | (_, None) if is_element => {}
                (was, is) => {
                    let (was, is) = (was.unwrap_or(&empty), is.unwrap_or(&empty));
                    compare(&mut lines, table, was, is);
                }
            }
        }
        // If elements were added or removed, their order says nothing more.
        let is_order = |line: &String| line.starts_with(ORDER);
        let array = |line: &str| line.split_once("]]").map(|(header, _)| format!("{header}]]"));
        let resized = lines.iter().filter(|line| line.ends_with(" is new") || line.ends_with(" was removed"));
        let resized: BTreeSet<_> =
            resized.filter(|line| line.starts_with("[[")).filter_map(|line| array(line)).collect();
        lines.retain(|line| !is_order(line) || !resized.iter().any(|header| line.contains(header.as_str())));
        lines
    }
}

/// Compares the keys of a table.
fn compare(
    lines: &mut Vec<String>,
    table: &str,
    was: &BTreeMap<String, String>,
    is: &BTreeMap<String, String>,
) {
    let keys: BTreeSet<&String> = was.keys().chain(is.keys()).collect();
    for key in keys {
        let what = match (was.get(key), is.get(key)) {
            (was, is) if was == is => continue,
            (None, _) => "is new",
            (_, None) => "was removed",
            _ => "changed",
        };
        lines.push(match (&*shorten_name(key, MAX_SHOWN), table) {
            (ORDER, _) => format!("{ORDER} of {table} changed"),
            (key, "") => format!("`{key}` {what}"),
            (key, table) => format!("`{key}` of {table} {what}"),
        });
    }
}

fn digests(table: &DeTable) -> BTreeMap<String, String> {
    table.iter().map(|(key, value)| (key.get_ref().to_string(), digest(value.get_ref()))).collect()
}

/// The name of an element of an array of tables. It is stored and printed, so it has only the program of a command: an
/// argument may be a secret.
fn name(element: &DeTable) -> String {
    let text = |value: &DeValue| match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Array(words) => {
            words.iter().next().and_then(|word| word.get_ref().as_str()).map(str::to_owned)
        }
        _ => None,
    };
    let found = NAMES.iter().find_map(|key| element.get(*key)).and_then(|value| text(value.get_ref()));
    let short: String = found.unwrap_or_default().chars().take(MAX_NAME).collect();
    format!("{short:?}")
}

fn digest(value: &DeValue) -> String {
    let mut hasher = Sha1::new();
    update(&mut hasher, value);
    short(hasher)
}

fn short(hasher: Sha1) -> String {
    let mut digits = hex(&hasher.finalize());
    digits.truncate(DIGITS);
    digits
}

/// Adds a value so that different values give different bytes, and another spelling of a value gives the same bytes.
fn update(hasher: &mut Sha1, value: &DeValue) {
    let mut text = |kind: char, text: &str| hasher.update(format!("{kind}{}:{text}", text.len()));
    match value {
        DeValue::String(value) => text('s', value),
        DeValue::Integer(value) => match i128::from_str_radix(value.as_str(), value.radix()) {
            Ok(number) => text('i', &number.to_string()),
            Err(_) => text('i', value.as_str()),
        },
        DeValue::Float(value) => text('f', value.as_str()),
        DeValue::Boolean(value) => text('b', &value.to_string()),
        DeValue::Datetime(value) => text('d', &value.to_string()),
        DeValue::Array(values) => {
            text('a', &values.len().to_string());
            values.iter().for_each(|value| update(hasher, value.get_ref()));
        }
        DeValue::Table(table) => {
            text('t', &table.len().to_string());
            let sorted: BTreeMap<_, _> =
                table.iter().map(|(key, value)| (key.get_ref(), value.get_ref())).collect();
            for (key, value) in sorted {
                hasher.update(format!("k{}:{key}", key.len()));
                update(hasher, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(old: &str, new: &str) -> Vec<String> {
        KeyDigests::of(old).unwrap().explain(&KeyDigests::of(new).unwrap(), &[])
    }

    #[test]
    fn each_key_that_changed_is_named() {
        let cases: [(&str, &str, &[&str]); 12] = [
            ("packages = ['a']", "packages = [ \"a\", ] # the same", &[]),
            ("packages = ['a']", "packages = ['a', 'b']", &["`packages` changed"]),
            ("packages = ['ab']", "packages = ['a', 'b']", &["`packages` changed"]),
            ("upgrade = true", "recommends = true", &["`recommends` is new", "`upgrade` was removed"]),
            ("from = { name = 'a' }", "from = { name = 'b' }", &["`from` changed"]),
            ("from = { name = 'a' }", "from = '../a'", &["`from` changed"]),
            ("disk.size_gib = 4", "[disk]\nsize_gib = 0x4\niops = 3000", &["`iops` of [disk] is new"]),
            ("[disk]\nsize_gib = 4", "", &["`size_gib` of [disk] was removed"]),
            ("[tags]\n\"a b\" = 'x'", "tags = { 'a b' = 'y' }", &["`a b` of [tags] changed"]),
            (
                "[[file]]\nsource = 'a'\ntarget = '/a'\n[[file]]\nsource = 'b'\ntarget = '/b'",
                "[[file]]\nsource = 'a'\ntarget = '/a'\nmode = '0600'\n[[file]]\nsource = 'c'\ntarget = '/c'",
                &[
                    "`mode` of [[file]] \"/a\" is new",
                    "[[file]] \"/b\" was removed",
                    "[[file]] \"/c\" is new",
                ],
            ),
            (
                "[[run]]\ncommand = ['a', 'b']\n[[run]]\nscript = 'c'",
                "[[run]]\nscript = 'c'\n[[run]]\ncommand = ['a', 'b']\nnetwork = true",
                &["the order of [[run]] changed", "`network` of [[run]] \"a\" is new"],
            ),
            (
                "[[test]]\nscript = 'a'",
                "[[test]]\nscript = 'a'\n[[test]]\nscript = 'a'\n[[run]]\nscript = 'b'",
                &["[[run]] \"b\" is new", "[[test]] \"a\" (2) is new"],
            ),
        ];
        for (old, new, expected) in cases {
            assert_eq!(explained(old, new), expected, "{old}\nand {new}");
        }
        assert_eq!(KeyDigests::of("a = "), None);
    }

    /// The digests are stored in the region, and their names are printed.
    #[test]
    fn names_have_no_values_that_may_be_secret() {
        let old = "[tags]\nteam = 'hunter2'\n[vars]\nport = 'hunter2'\n\
                   [[run]]\ncommand = ['sh', '-c', 'echo Bearer hunter2']\n\
                   [[run]]\ncommand = ['sh', 'hunter2']\nenv = { TOKEN = 'hunter2' }\n\
                   [[run]]\nscript = 'a.sh'\nargs = ['hunter2']\n\
                   [[ansible]]\nplaybook = 'site.yml'\nvars = { password = 'hunter2' }\ntags = ['hunter2']\n\
                   [[test]]\ncommand = ['curl', 'https://user:hunter2@example.org']\n\
                   [[repository]]\nname = 'own'\nurl = 'https://user:hunter2@example.org'\n\
                   [[file]]\nsource = 'a'\ntarget = '/a'\nowner = 'hunter2'\n";
        let digests = KeyDigests::of(old).unwrap();
        assert!(!serde_json::to_string(&digests).unwrap().contains("hunter2"), "{digests:?}");
        let new = old.replace("['sh', 'hunter2']", "['sh', 'hunter3']");
        assert_eq!(explained(old, &new), ["`command` of [[run]] \"sh\" (2) changed"]);
        let removed = explained(old, "");
        assert!(removed.contains(&"[[run]] \"sh\" was removed".to_owned()), "{removed:?}");
        assert!(!removed.concat().contains("hunter2"), "{removed:?}");
    }

    #[test]
    fn a_file_with_very_many_keys_has_a_digest_for_each_array() {
        let file = |count: usize, target: &str| -> String {
            (0..count).map(|i| format!("[[file]]\nsource = 'x'\ntarget = '/{target}{i}'\n")).collect()
        };
        assert_eq!(explained(&file(900, "a"), &file(900, "b")).len(), 1800);
        assert_eq!(explained(&file(1100, "a"), &file(1100, "b")), ["`file` changed"]);
        assert_eq!(explained(&file(1100, "a"), &file(1100, "a")), Vec::<String>::new());
    }
}
