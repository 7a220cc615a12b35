//! Golden plans. Each is a pair of files: `CASE.request.json` has the request to a plugin, and `CASE.answer.json` has
//! the plugin's expected answer.

use crate::error::Kind;
use crate::sys::fds::{PathRefusal, open_file_within};
use crate::text::escape_name;
use anyhow::{Context, Result};
use oven_distro::check::{self, Case, Speaker};
use oven_distro::wire::{PlanAnswer, PlanRequest};
use std::collections::BTreeSet;
use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const REQUEST: &str = ".request.json";
const ANSWER: &str = ".answer.json";
/// The maximal size of a file in bytes. The answer of a plugin has the same limit.
const FILE_MAX: usize = 4 << 20;
/// The maximal size of all files in bytes. In memory, they can be more than ten times as large.
const ALL_MAX: usize = 8 << 20;
/// The maximal number of cases.
const CASES_MAX: usize = 1000;

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
    let wrong = |path: &Path, what: String| Kind::Definition.error(format!("{}: {what}", escape_name(path)));
    let mut size = 0;
    let mut read = |path: &Path| -> Result<Option<String>> {
        let text = match open_file_within(path, &trusted) {
            Err(PathRefusal::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(refused) => return Err(refused.kind().error(format!("{}: {refused}", escape_name(path)))),
            Ok(file) => read_limited(file, path)?,
        };
        size += text.len();
        if size > ALL_MAX {
            let limit = ALL_MAX >> 20;
            return Err(wrong(dir, format!("the golden plans are larger than {limit} MiB together")));
        }
        Ok(Some(text))
    };
    let mut names = BTreeSet::new();
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        names.extend(name.strip_suffix(REQUEST).map(str::to_owned));
        if names.len() > CASES_MAX {
            return Err(wrong(dir, format!("it has more than {CASES_MAX} golden plans")));
        }
    }
    let cases = names.iter().map(|name| {
        let path = dir.join(format!("{name}{REQUEST}"));
        let text = read(&path)?.ok_or_else(|| wrong(&path, "the file was not found".into()))?;
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

/// Reads a text of at most 4 MiB.
fn read_limited(file: File, path: &Path) -> Result<String> {
    let shown = escape_name(path);
    let mut bytes = Vec::new();
    let read = file.take(FILE_MAX as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|e| Kind::Definition.of_io(&e).error(format!("{shown}: cannot be read: {e}")))?;
    if bytes.len() > FILE_MAX {
        let limit = FILE_MAX >> 20;
        return Err(Kind::Definition
            .error(format!("{shown}: is larger than {limit} MiB, the limit of a golden plan")));
    }
    String::from_utf8(bytes).map_err(|_| Kind::Definition.error(format!("{shown}: is not valid UTF-8")))
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
        write(&path, &format!("{stored:#}\n")).with_context(|| format!("writing {}", escape_name(&path)))?;
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
    fn the_size_and_the_number_of_golden_plans_are_limited() {
        let refused = |write: &dyn Fn(&Path)| {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path());
            let error = read(dir.path(), true).unwrap_err();
            assert_eq!(Kind::of(&error), Kind::Definition, "{error:#}");
            error.to_string()
        };
        let hole = |dir: &Path, name: &str| File::create(dir.join(name)).unwrap().set_len(1 << 40).unwrap();
        let error = refused(&|dir| hole(dir, "a\nerror: b.request.json"));
        assert!(
            error.ends_with("/a\\nerror: b.request.json: is larger than 4 MiB, the limit of a golden plan"),
            "{error}"
        );

        let request =
            serde_json::to_string(&oven_distro::wire::PlanRequest::new(&Default::default())).unwrap();
        let padded = format!("{request}{}", " ".repeat(FILE_MAX - request.len()));
        let error = refused(&|dir| {
            std::fs::write(dir.join("a.request.json"), &request).unwrap();
            hole(dir, "a.answer.json");
        });
        assert!(error.contains("a.answer.json: is larger than 4 MiB"), "{error}");
        let write_padded = |dir: &Path, count: usize| {
            (0..count).for_each(|n| std::fs::write(dir.join(format!("{n}{REQUEST}")), &padded).unwrap());
        };
        let error = refused(&|dir| write_padded(dir, 3));
        assert!(error.ends_with("the golden plans are larger than 8 MiB together"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        write_padded(dir.path(), 2);
        assert_eq!(read(dir.path(), true).unwrap().len(), 2);

        let many = |dir: &Path| {
            (0..=CASES_MAX).for_each(|n| std::fs::write(dir.join(format!("{n}{REQUEST}")), "").unwrap());
        };
        assert!(refused(&many).ends_with("it has more than 1000 golden plans"));
    }

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
