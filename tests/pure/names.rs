//! Names of modules and public types: what a thing is, in the field's term.

use crate::layers::{rust_files, without_comments_and_literals};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Adverbs, pronouns and participles that are no name alone. Those that end in `ed` or `ing` need not be listed.
const FORBIDDEN: &[&str] = &[
    "ahead", "alike", "alone", "apart", "beside", "chosen", "early", "found", "given", "gone", "held",
    "here", "kept", "known", "late", "left", "lost", "made", "many", "mine", "ours", "others", "sent",
    "shown", "taken", "theirs", "there", "these", "those", "together", "told", "written",
];

/// Words of that form that are the field's terms.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("backing", "the backing store of an overlay"),
    ("ended", "the result of `undo::scope`, with what became of the clean-up"),
    ("mapping", "a block device mapping of an image"),
    ("nothing", "the distribution of test bakes; not a participle"),
    ("provisioning", "the phase of a bake"),
    ("ring", "the lock of a ring of tests; not a participle"),
    ("trimming", "discarding the free space of a file system"),
];

/// Whether a word alone is no name. `word` is in small letters.
fn is_forbidden(word: &str) -> bool {
    FORBIDDEN.contains(&word) || word.ends_with("ed") || word.ends_with("ing")
}

/// `BlockMap` is two words, `Trimming` one; so are `block_map` and `backing`.
fn is_one_word(name: &str) -> bool {
    !name.contains('_') && !name.chars().skip(1).any(char::is_uppercase)
}

/// The names of the public structs, enums, traits, unions and aliases.
fn public_types(code: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for keyword in ["struct ", "enum ", "trait ", "type ", "union "] {
        for (at, _) in code.match_indices(keyword) {
            let before = code[..at].trim_end();
            let visibility = before.rsplit_once("pub").map(|(_, rest)| rest);
            let is_public = visibility.is_some_and(|rest| {
                rest.is_empty() || rest.starts_with('(') && rest.find(')') == Some(rest.len() - 1)
            });
            let name = &code[at + keyword.len()..];
            let name = &name[..name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len())];
            if is_public && !name.is_empty() {
                found.insert(name);
            }
        }
    }
    found
}

/// The names of a path below `src` or `tests` that are modules.
fn modules(file: &Path) -> impl Iterator<Item = String> {
    let path = file.with_extension("");
    let names: Vec<_> = path.iter().map(|name| name.to_str().unwrap().to_owned()).collect();
    names.into_iter().filter(|name| !["src", "tests", "mod", "lib", "main"].contains(&name.as_str()))
}

#[test]
fn modules_and_public_types_have_nouns_as_names() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut wrong, mut used, mut count) = (BTreeSet::new(), BTreeSet::new(), 0);
    let mut check = |name: &str, file: &Path| {
        let word = name.to_lowercase();
        count += 1;
        if is_one_word(name) && is_forbidden(&word) {
            if EXCEPTIONS.iter().any(|(exception, _)| *exception == word) {
                used.insert(word);
            } else {
                wrong.insert(format!("{}: {name}", file.display()));
            }
        }
    };
    for file in rust_files(&root.join("src")).into_iter().chain(rust_files(&root.join("tests"))) {
        let relative = file.strip_prefix(root).unwrap();
        modules(relative).for_each(|name| check(&name, relative));
        if relative.starts_with("src") {
            let code = without_comments_and_literals(&std::fs::read_to_string(&file).unwrap());
            public_types(&code).into_iter().for_each(|name| check(name, relative));
        }
    }
    assert!(count > 500, "only {count} names were found");
    assert!(wrong.is_empty(), "a name says what a thing is: {wrong:#?}");
    let unused: Vec<_> = EXCEPTIONS.iter().filter(|(word, _)| !used.contains(*word)).collect();
    assert!(unused.is_empty(), "exceptions that nothing needs: {unused:?}");
}

/// The servers and trees that unit tests use are named alike.
#[test]
fn public_types_have_unique_names() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in rust_files(&root) {
        let relative = file.strip_prefix(&root).unwrap();
        if modules(relative).any(|name| ["test", "fake"].contains(&name.as_str())) {
            continue;
        }
        let code = without_comments_and_literals(&std::fs::read_to_string(&file).unwrap());
        for name in public_types(&code) {
            files.entry(name.to_owned()).or_default().push(relative.display().to_string());
        }
    }
    assert!(files.len() > 200, "only {} types were found", files.len());
    files.retain(|_, files| files.len() > 1);
    assert!(files.is_empty(), "public types with one name: {files:#?}");
}

#[test]
fn forbidden_names_are_found() {
    let code = "pub struct Kept;\npub(crate) enum BlockMap { A }\npub(in crate::a) trait Cached<T> {}\nstruct Own;\n\
                pub fn f() { struct Inner; }\npub type Told = u8;\nimpl X { type Output = u8; }\n";
    let found: Vec<_> = public_types(code).into_iter().collect();
    assert_eq!(found, ["BlockMap", "Cached", "Kept", "Told"]);
    let forbidden: Vec<_> =
        found.into_iter().filter(|name| is_one_word(name) && is_forbidden(&name.to_lowercase())).collect();
    assert_eq!(forbidden, ["Cached", "Kept", "Told"]);
    assert!(is_one_word("ahead") && !is_one_word("read_ahead") && !is_one_word("PreservedDisk"));
}
