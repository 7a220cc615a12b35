//! Rust sources, read as text: which files belong to a crate, and which parts of them are code.

use crate::layers::{literal_end, modules_around, without_comments_and_literals};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The files of a crate by the paths of their modules: its root file, and those that `mod` declares, from there on.
pub fn module_files(root: &Path) -> BTreeMap<Vec<String>, PathBuf> {
    let mut found = BTreeMap::new();
    let mut unread = vec![(Vec::new(), root.to_owned())];
    while let Some((module, file)) = unread.pop() {
        let file = file.canonicalize().unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let parent = file.parent().unwrap();
        let is_mod_rs = module.is_empty() || file.ends_with("mod.rs");
        let dir = if is_mod_rs { parent.to_owned() } else { file.with_extension("") };
        for Declaration { names, path } in declarations(&fs::read_to_string(&file).unwrap()) {
            let stem = names.iter().fold(dir.clone(), |dir, name| dir.join(name));
            let alone = stem.with_extension("rs");
            let below = match path {
                Some(path) => parent.join(path),
                None if alone.is_file() => alone,
                None => stem.join("mod.rs"),
            };
            unread.push((module.iter().cloned().chain(names).collect(), below));
        }
        found.insert(module, file);
    }
    found
}

/// `mod name;`
struct Declaration {
    /// The inline modules around it, and its own name.
    names: Vec<String>,
    /// Its `#[path = "…"]`.
    path: Option<String>,
}

fn declarations(text: &str) -> Vec<Declaration> {
    let code = without_comments_and_literals(text);
    let declared = module_items(&code).filter(|(.., after)| after.starts_with(';'));
    declared
        .map(|(at, name, _)| {
            // Its attributes are between the item before it and itself.
            let start = code[..at].rfind([';', '{', '}']).map_or(0, |end| end + 1);
            let path = text[start..at].split_once("#[path = \"").and_then(|(_, rest)| rest.split_once('"'));
            let names = modules_around(&code, at).into_iter().chain([name.to_owned()]).collect();
            Declaration { names, path: path.map(|(path, _)| path.to_owned()) }
        })
        .collect()
}

/// The functions with `#[test]` or `#[tokio::test]`, with the inline modules around them: `tests::a_test`.
pub fn tests(text: &str) -> Vec<String> {
    let code = without_comments_and_literals(text);
    let marks = ["#[test]", "#[tokio::test"].into_iter().flat_map(|mark| code.match_indices(mark));
    let names = marks.filter_map(|(at, _)| {
        let name = code[at..].split_once("fn ")?.1.split(['(', '<']).next()?;
        Some(modules_around(&code, at).into_iter().chain([name.to_owned()]).collect::<Vec<_>>().join("::"))
    });
    names.collect()
}

/// The string literals, as the program has them.
pub fn string_literals(text: &str) -> Vec<String> {
    let bytes = text.as_bytes();
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let end = literal_end(bytes, at).unwrap_or(at).max(at + 1);
        let literal = &bytes[at..end];
        if literal.len() > 2 && literal[0] == b'"' {
            found.push(unescaped(&text[at + 1..end - 1]));
        } else if literal.len() > 2 && literal[0] == b'r' {
            let hashes = literal[1..].iter().take_while(|byte| **byte == b'#').count();
            found.push(text[at + hashes + 2..end - hashes - 1].to_owned());
        }
        at = end;
    }
    found
}

/// Escapes as Rust has them; those of numbers stay as they are.
fn unescaped(text: &str) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let mut chars = after.chars();
        match chars.next() {
            // The line goes on at its next word.
            Some('\n') => {
                rest = after.trim_start();
                continue;
            }
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            Some('r') => out.push('\r'),
            Some('0') => out.push('\0'),
            Some(quoted @ ('"' | '\'' | '\\')) => out.push(quoted),
            other => {
                out.push('\\');
                out.extend(other);
            }
        }
        rest = chars.as_str();
    }
    out + rest
}

/// Each `mod name`: its offset, its name, and what follows.
fn module_items(code: &str) -> impl Iterator<Item = (usize, &str, &str)> {
    code.match_indices("mod ").filter_map(|(at, _)| {
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        let rest = &code[at + 4..];
        let (name, after) = rest.split_at(rest.find(|c: char| !is_name(c)).unwrap_or(rest.len()));
        let is_item = !name.is_empty() && !code[..at].ends_with(is_name);
        is_item.then(|| (at, name, after.trim_start()))
    })
}
