//! Definitions that tests have as texts in their sources.

use crate::layers::rust_files;
use crate::rust_source::string_literals;
use oven::definition::keys::IMAGE_TOML;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The string literals in the tests of all rings that are TOML with keys of image.toml, whole or without what a test
/// adds (`from`). Package files are left out: they would have to exist.
///
/// `format!` is read with `x` for each argument. What is not seen: keys and tables that are arguments (`[[{kind}]]`), values
/// for which `x` is wrong, and texts that are put together from several literals.
pub fn definitions(tests: &Path) -> BTreeSet<String> {
    let is_key = |name: &String| IMAGE_TOML.keys.iter().any(|key| key.name == name);
    let mut found = BTreeSet::new();
    for file in rust_files(tests) {
        let literals = string_literals(&fs::read_to_string(file).unwrap());
        for text in literals.iter().flat_map(|text| [text.clone(), formatted(text)]) {
            let text = without_package_files(&text);
            let Ok(Value::Object(top)) = toml::from_str::<Value>(&text) else { continue };
            if top.is_empty() || !top.keys().all(is_key) {
                continue;
            }
            let from = if top.contains_key("from") { "" } else { "from = \"ami-0123456789abcdef0\"\n" };
            found.insert(format!("{from}{text}"));
        }
    }
    found
}

/// As `format!` makes it, with `x` for each argument.
fn formatted(text: &str) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let (brace, after) = (&rest[at..=at], &rest[at + 1..]);
        rest = match after.strip_prefix(brace) {
            Some(after) => {
                out.push_str(brace);
                after
            }
            None => {
                out.push('x');
                after.split_once('}').map_or("", |(_, rest)| rest)
            }
        };
    }
    out + rest
}

/// `["jq", "./site.deb"]` becomes `["jq", ]`.
fn without_package_files(text: &str) -> String {
    let mut parts = text.split("\"./");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.split_once('"').map_or("", |(_, rest)| rest);
        out.push_str(rest.strip_prefix(", ").unwrap_or(rest));
    }
    out
}

/// Makes the files and directories that a definition in `dir` names.
pub fn make_files(dir: &Path, definition: &Value) {
    make_files_of(dir, "", definition);
}

fn make_files_of(dir: &Path, key: &str, value: &Value) {
    match value {
        Value::Object(table) => table.iter().for_each(|(key, value)| make_files_of(dir, key, value)),
        Value::Array(values) => values.iter().for_each(|value| make_files_of(dir, key, value)),
        Value::String(path) if !path.starts_with('/') => {
            let path = dir.join(path);
            match key {
                "source" | "script" | "playbook" | "bats" => write(&path, "#!/bin/sh\n"),
                "key" => write(&path, super::PGP_KEY),
                "inputs" => fs::create_dir_all(&path).unwrap(),
                "from" if path.starts_with(dir.join("..")) => {
                    write(&path.join("image.toml"), "from = \"ami-01234567\"\n");
                }
                _ => {}
            }
        }
        _ => {}
    }
}

/// Writes a file that does not exist yet.
fn write(path: &Path, text: &str) {
    if !path.exists() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}
