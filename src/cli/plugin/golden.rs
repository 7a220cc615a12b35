//! Golden plans. Each is a pair of files: `CASE.request.json` has the request to a plugin, and `CASE.answer.json` has
//! the plugin's expected answer.

use crate::error::Kind;
use anyhow::{Context, Result};
use oven_distro::check::{self, Case, Speaker};
use oven_distro::wire::{PlanAnswer, PlanRequest};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const REQUEST: &str = ".request.json";
const ANSWER: &str = ".answer.json";

/// Reads the cases of a directory, sorted by name. `asked` is true if the user named the directory. In that case it
/// must exist.
pub fn read(dir: &Path, asked: bool) -> Result<Vec<Case>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !asked => return Ok(Vec::new()),
        Err(error) => return Err(Kind::Usage.error(format!("{}: cannot be read: {error}", dir.display()))),
    };
    let names: BTreeSet<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let cases = names.iter().filter_map(|file| file.strip_suffix(REQUEST)).map(|name| {
        let path = dir.join(format!("{name}{REQUEST}"));
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let wrong = |path: &Path, what: String| Kind::Definition.error(format!("{}: {what}", path.display()));
        let request = PlanRequest::read(&text).map_err(|e| wrong(&path, e.to_string()))?;
        let path = dir.join(format!("{name}{ANSWER}"));
        let answer = match std::fs::read_to_string(&path) {
            Ok(text) => Some(PlanAnswer::read(&text).map_err(|what| wrong(&path, format!("it {what}")))?),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        Ok(Case { name: name.to_owned(), job: request.job, answer })
    });
    cases.collect()
}

/// Writes the answers that have changed. Returns the paths of the written files.
pub fn bless(dir: &Path, cases: &mut [Case], speaker: &dyn Speaker) -> Result<Vec<PathBuf>> {
    let now = check::answers(speaker, cases).map_err(|why| Kind::Definition.failure(why))?;
    let mut written = Vec::new();
    for (case, answer) in cases.iter_mut().zip(now) {
        if case.answer.as_ref() == Some(&answer) {
            continue;
        }
        let path = dir.join(format!("{}{ANSWER}", case.name));
        let stored = check::without_defaults(&PlanAnswer::new(answer.clone()));
        std::fs::write(&path, format!("{stored:#}\n"))
            .with_context(|| format!("writing {}", path.display()))?;
        case.answer = Some(answer);
        written.push(path);
    }
    Ok(written)
}
