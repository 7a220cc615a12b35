//! Reads `[clean]`.

use super::validate::image_path;
use super::{File, Table};
use crate::config::toml_reader::{At, until_stopped};
use crate::text::match_wildcards;
use std::collections::BTreeMap;

/// Directories without which an image does not boot. They are not removed, and neither is everything in them.
const NEEDED: [&str; 17] = [
    "/bin",
    "/boot",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/sbin",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/sbin",
    "/var",
    "/var/lib",
    "/var/lib/dpkg",
    "/var/lib/rpm",
];
/// Directories on which file systems are mounted when an instance boots. They are not removed.
const MOUNT_POINTS: [&str; 4] = ["/dev", "/proc", "/run", "/sys"];

/// The paths of `[clean]`.
#[derive(Default)]
pub struct CleanPaths {
    pub keep: Vec<String>,
    pub remove: Vec<String>,
}

/// Reads `[clean]`. `files` are the files that the definition places in the image.
pub fn read(top: &Table, files: &[File]) -> CleanPaths {
    let Some(table) = top.table("clean") else { return CleanPaths::default() };
    let mut lines = BTreeMap::new();
    let keep = paths(&table, "keep", &mut lines, &|_| Ok(()));
    let check = |path: &str| {
        ensure_not_needed(path)?;
        match files.iter().find(|file| matches(path, &file.target, Depth::Below)) {
            Some(file) => {
                Err(format!("removes {}, which a [[file]] places: remove one of them", file.target))
            }
            None => Ok(()),
        }
    };
    CleanPaths { keep, remove: paths(&table, "remove", &mut lines, &check) }
}

/// The paths of a key. `lines` has the paths that were read before, each with its key and line.
fn paths<'k>(
    table: &Table,
    key: &'k str,
    lines: &mut BTreeMap<String, (&'k str, usize)>,
    check: &dyn Fn(&str) -> Result<(), String>,
) -> Vec<String> {
    let paths = until_stopped(table.strings(key)).filter_map(|At { value, line }| {
        let path = table.check(key, line, image_path(value))?;
        if let Some((other, first)) = lines.get(&path) {
            let what = match *other == key {
                true => format!("has {path} twice (first on line {first}): remove one"),
                false => format!("has {path}, which is also in `{other}` on line {first}: remove one"),
            };
            return table.wrong(key, line, what);
        }
        lines.insert(path.clone(), (key, line));
        table.check(key, line, check(&path)).map(|()| path)
    });
    paths.collect()
}

/// Checks that a pattern does not remove what every image needs.
fn ensure_not_needed(pattern: &str) -> Result<(), String> {
    let first = pattern[1..].split('/').next().unwrap_or_default();
    if first.contains('*') {
        return Err(format!(
            "has {pattern:?}: write the first name without `*`, because the pattern could match directories without \
             which the image does not boot"
        ));
    }
    // `/etc/*` leaves an empty directory.
    let mut whole = pattern;
    while let Some((directory, last)) = whole.rsplit_once('/')
        && last.chars().all(|c| c == '*')
    {
        whole = directory;
    }
    let matched = |known: &[&'static str], pattern: &str| {
        known.iter().copied().find(|directory| matches(pattern, directory, Depth::Same))
    };
    match matched(&NEEDED, whole).or_else(|| matched(&MOUNT_POINTS, pattern)) {
        Some(directory) => Err(format!(
            "has {pattern:?}, but without {directory} the image does not boot: name single files or directories in it"
        )),
        None => Ok(()),
    }
}

#[derive(PartialEq)]
enum Depth {
    Same,
    Below,
}

/// Whether a pattern matches a path, or with [`Depth::Below`] a directory above it.
fn matches(pattern: &str, path: &str, depth: Depth) -> bool {
    let (mut patterns, mut names) = (pattern.split('/'), path.split('/'));
    let matched =
        patterns.all(|pattern| names.next().is_some_and(|name| match_wildcards(pattern, name).is_some()));
    matched && (depth == Depth::Below || names.next().is_none())
}
