//! Explains why two fingerprints differ.

use super::digest;
use super::digest::Depth;
use super::keys::KeyDigests;
use super::{InputFile, Inputs};
use crate::definition;
use crate::text::shorten_name;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;

/// The maximal number of keys of image.toml that are listed.
const MAX_KEYS: usize = 20;
/// The maximal number of characters of a variable's value that are shown.
const VALUE_MAX: usize = 60;
/// The maximal number of characters of a line. A path may have 4096 bytes.
const LINE_MAX: usize = 5000;

/// The inputs of an older image, as far as they are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreviousInputs {
    inputs: Stored<Box<Inputs>>,
    keys: Stored<KeyDigests>,
    /// The digest in the image's tag.
    digest: Option<String>,
}

/// What is known of a document that may be stored with an image.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stored<T> {
    /// It is not stored. For example, another machine baked the image.
    Nothing,
    /// It is stored, but it cannot be parsed.
    Unreadable,
    Read(T),
}

impl<T: DeserializeOwned> Stored<T> {
    fn of(json: Option<&str>) -> Self {
        match json.map(serde_json::from_str) {
            None => Self::Nothing,
            Some(Err(_)) => Self::Unreadable,
            Some(Ok(value)) => Self::Read(value),
        }
    }
}

impl PreviousInputs {
    /// `json` is the JSON that is stored with the image, and `tag` is the digest in its tag. Returns `None` if nothing is
    /// known.
    pub fn of(json: Option<&str>, tag: Option<&str>) -> Option<Self> {
        let inputs = Stored::of(json);
        let is_known = matches!(inputs, Stored::Read(_)) || tag.is_some();
        is_known.then(|| Self { inputs, keys: Stored::Nothing, digest: tag.map(str::to_owned) })
    }

    /// Adds the digests of the keys of image.toml: the JSON that is stored with the image.
    pub fn with_keys(self, json: Option<&str>) -> Self {
        Self { keys: Stored::of(json), ..self }
    }
}

/// Lists the differences, such as `files/nginx.conf changed`. The list is empty if no difference is found. The more
/// detailed source is used: the stored inputs if they can be parsed, otherwise the tag.
pub fn explain(old: &PreviousInputs, new: &Inputs) -> Vec<String> {
    let lines = match &old.inputs {
        Stored::Read(inputs) => {
            let lines = compare(inputs, new).into_iter();
            let keys = |line| match line == file_changed() {
                true => explain_keys(&old.keys, new, inputs.vars == new.vars),
                false => vec![line],
            };
            lines.flat_map(keys).collect()
        }
        Stored::Nothing => explain_by_tag(old, new, "this machine has only the tags of that image"),
        Stored::Unreadable => explain_by_tag(old, new, "its stored inputs cannot be read"),
    };
    // The names come from files that others may have written.
    lines.iter().map(|line| shorten_name(line, LINE_MAX)).collect()
}

/// Compares with the digest in the tag. `reason` says why nothing more is known.
fn explain_by_tag(old: &PreviousInputs, new: &Inputs, reason: &str) -> Vec<String> {
    let Some(old) = old.digest.as_deref().and_then(digest::parse) else {
        return vec!["the inputs of the older image are unknown, because its tag cannot be parsed".into()];
    };
    let whole = (old.depth == Depth::Whole).then(|| "the definition changed".to_owned());
    let add = |line| match line == file_changed() || Some(&line) == whole.as_ref() {
        true => format!("{line} (which key is unknown, because {reason})"),
        false => line,
    };
    compare_with_digest(&old, new).into_iter().map(add).collect()
}

/// The line for a change of image.toml, if its keys are not compared.
fn file_changed() -> String {
    format!("{} changed", definition::FILE)
}

/// Lists the keys of image.toml that changed. `same_vars` says whether the variables have the same values.
fn explain_keys(old: &Stored<KeyDigests>, new: &Inputs, same_vars: bool) -> Vec<String> {
    let (file, changed) = (definition::FILE, file_changed());
    let unknown = |why: &str| vec![format!("{changed} (which key is unknown, because {why})")];
    let (was, is) = match (old, &new.keys) {
        (Stored::Read(was), Some(is)) => (was, is),
        (Stored::Unreadable, _) => return unknown("its stored keys cannot be read"),
        (Stored::Nothing, _) => return unknown("that image was baked by an older oven"),
        (Stored::Read(_), None) => return unknown("the file cannot be parsed again"),
    };
    // A variable whose value changed has its own line.
    let skip: &[&str] = if same_vars { &[] } else { &["[vars]"] };
    let keys = was.explain(is, skip);
    let mut lines: Vec<_> = keys.iter().take(MAX_KEYS).map(|key| format!("{file}: {key}")).collect();
    if keys.len() > MAX_KEYS {
        lines.push(format!("{file}: and {} more", keys.len() - MAX_KEYS));
    }
    match (lines.is_empty(), skip.is_empty()) {
        (false, _) => lines,
        (true, false) => Vec::new(),
        (true, true) => {
            vec![format!("{changed}, but only its comments, its layout or the order of its keys")]
        }
    }
}

/// Compares base, snapshot, architecture and format, in this order.
fn compare_common(lines: &mut Vec<String>, old: [&str; 4], new: [&str; 4]) {
    let [base, snapshot, architecture, format] = old;
    if base != new[0] {
        lines.push(format!("the base image changed: {base} -> {}", new[0]));
    } else if snapshot != new[1] {
        lines.push(format!("the snapshot of the base image {base} changed: {snapshot} -> {}", new[1]));
    }
    if architecture != new[2] {
        lines.push(format!("the architecture changed: {architecture} -> {}", new[2]));
    }
    if format != new[3] {
        lines.push(format!("oven's fingerprint format changed: {format} -> {}", new[3]));
    }
}

pub(crate) fn compare(old: &Inputs, new: &Inputs) -> Vec<String> {
    let mut lines = Vec::new();
    let formats = [old.format.to_string(), new.format.to_string()];
    let of = |inputs: &'_ Inputs| (inputs.base.id.0.clone(), inputs.base.snapshot.0.clone());
    let ((old_id, old_snapshot), (new_id, new_snapshot)) = (of(old), of(new));
    compare_common(
        &mut lines,
        [&old_id, &old_snapshot, old.architecture.as_str(), &formats[0]],
        [&new_id, &new_snapshot, new.architecture.as_str(), &formats[1]],
    );
    let paths: BTreeSet<&String> = old.files.keys().chain(new.files.keys()).collect();
    for path in paths {
        match (old.files.get(path), new.files.get(path)) {
            (None, _) => lines.push(format!("{path} is new")),
            (_, None) => lines.push(format!("{path} was removed")),
            (Some(was), Some(is)) => lines.extend(compare_files(path, was, is)),
        }
    }
    let names: BTreeSet<&String> = old.vars.keys().chain(new.vars.keys()).collect();
    for name in names {
        match (old.vars.get(name), new.vars.get(name)) {
            (was, is) if was == is => {}
            (Some(was), Some(is)) => {
                lines.push(format!("the variable {name} changed: {} -> {}", abbreviate(was), abbreviate(is)));
            }
            (None, Some(is)) => lines.push(format!("the variable {name} is new: {}", abbreviate(is))),
            _ => lines.push(format!("the variable {name} was removed")),
        }
    }
    lines
}

/// A variable's value, cut off if it is long.
fn abbreviate(value: &str) -> String {
    let short: String = value.chars().take(VALUE_MAX).collect();
    let more = if short.len() < value.len() { "…" } else { "" };
    format!("{short:?}{more}")
}

fn compare_files(path: &str, was: &InputFile, is: &InputFile) -> Vec<String> {
    let mut lines = Vec::new();
    if was.link != is.link {
        lines.push(match (&was.link, &is.link) {
            (Some(was), Some(is)) => format!("{path} has another target: {was} -> {is}"),
            (None, Some(is)) => format!("{path} is now a link to {is}"),
            (Some(was), None) => format!("{path} is no longer a link to {was}"),
            (None, None) => unreachable!("they differ"),
        });
    }
    if was.sha1 != is.sha1 {
        lines.push(format!("{path} changed"));
    }
    if was.executable != is.executable {
        lines.push(format!("{path} is now {}", if is.executable { "executable" } else { "not executable" }));
    }
    lines
}

fn compare_with_digest(old: &digest::ParsedDigest, new: &Inputs) -> Vec<String> {
    let mut lines = Vec::new();
    compare_common(
        &mut lines,
        [&old.base, &old.snapshot, &old.architecture, &old.format],
        [&new.base.id.0, &new.base.snapshot.0, new.architecture.as_str(), &new.format.to_string()],
    );
    let groups = digest::entries_by_group(new, old.depth);
    let mut seen = BTreeSet::new();
    for (name, (path, content)) in &groups {
        seen.insert(path);
        let shown = match name.strip_prefix(digest::VARIABLES) {
            Some(variable) => variable,
            None if old.depth == Depth::Whole => "the definition",
            None => name,
        };
        match old.entries.get(path) {
            None => lines.push(format!("{shown} is new")),
            Some(was) if was == content => (),
            Some(_) if name.ends_with('/') => lines.push(format!("files below {shown} changed")),
            Some(_) => lines.push(format!("{shown} changed")),
        }
    }
    match old.entries.keys().filter(|path| !seen.contains(path)).count() {
        0 => (),
        1 => lines.push("one file or directory was removed (the tag does not have its name)".into()),
        count => lines
            .push(format!("{count} files or directories were removed (the tag does not have their names)")),
    }
    lines
}
