//! Golden plans. Each is a pair of files: `CASE.request.json` has the request to a plugin, and `CASE.answer.json` has
//! the plugin's expected answer.

use crate::error::Kind;
use crate::sys::fds::{PathRefusal, open_file_within};
use anyhow::{Context, Result};
use oven_distro::check::{self, Case, Speaker};
use oven_distro::wire::{PlanAnswer, PlanRequest};
use std::collections::BTreeSet;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
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
    // A link in a stranger's checkout must not lead to a file of this machine. The user named either this directory or
    // the plugin, which is in the directory above.
    let trusted = if asked {
        dir
    } else {
        dir.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
    };
    let trusted =
        std::fs::canonicalize(trusted).with_context(|| format!("resolving {}", trusted.display()))?;
    let read = |path: &Path| -> Result<Option<String>> {
        let mut text = String::new();
        match open_file_within(path, &trusted) {
            Err(PathRefusal::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(refused) => return Err(Kind::Definition.error(format!("{}: {refused}", path.display()))),
            Ok(mut file) => {
                file.read_to_string(&mut text).with_context(|| format!("reading {}", path.display()))?
            }
        };
        Ok(Some(text))
    };
    let names: BTreeSet<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let cases = names.iter().filter_map(|file| file.strip_suffix(REQUEST)).map(|name| {
        let path = dir.join(format!("{name}{REQUEST}"));
        let text = read(&path)?.with_context(|| format!("{} was not found", path.display()))?;
        let wrong = |path: &Path, what: String| Kind::Definition.error(format!("{}: {what}", path.display()));
        let request = PlanRequest::read(&text).map_err(|e| wrong(&path, e.to_string()))?;
        let path = dir.join(format!("{name}{ANSWER}"));
        let answer = match read(&path)? {
            Some(text) => Some(PlanAnswer::read(&text).map_err(|what| wrong(&path, format!("it {what}")))?),
            None => None,
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
        write(&path, &format!("{stored:#}\n")).with_context(|| format!("writing {}", path.display()))?;
        case.answer = Some(answer);
        written.push(path);
    }
    Ok(written)
}

/// Writes a temporary file and renames it. If the path is a symlink, for example in somebody else's repository, the
/// symlink is replaced, and its target is not changed.
fn write(path: &Path, text: &str) -> Result<()> {
    let dir = path.parent().context("the file has no directory")?;
    let readable = Permissions::from_mode(0o644);
    let mut file = tempfile::Builder::new().prefix(".golden.").permissions(readable).tempfile_in(dir)?;
    file.write_all(text.as_bytes())?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_replaced_and_its_target_is_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (target, link) = (dir.path().join("target"), dir.path().join("case.answer.json"));
        std::fs::write(&target, "mine").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        write(&link, "{}\n").unwrap();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "mine");
        assert!(link.symlink_metadata().unwrap().is_file());
        assert_eq!(std::fs::read_to_string(&link).unwrap(), "{}\n");
    }
}
