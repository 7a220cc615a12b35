//! Lists the bind mounts by which steps see the definition's directory and its inputs, and builds the command lines
//! that start scripts. The sandbox makes the mounts. The
//! inputs are the additional directories that image.toml lists in `inputs`.

use super::network::CA_FILE;
use crate::definition::Definition;
use crate::error::Kind;
use crate::identity::checksum::MAX_OBJECTS;
use crate::image::cursor::DirectoryCursor;
use crate::sandbox::spec::BindMount;
use crate::sys::fds::{GIT, PathRefusal, changed, open_file_within, open_path};
use crate::sys::signals::is_stop_requested;
use crate::text::escape_name;
use anyhow::{Context, Result};
use oven_distro::Shim;
use rustix::fs::{Dir, FileType, Mode, OFlags};
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// The path at which scripts see the definition's directory. It is their working directory.
pub const DEFINITION_DIR: &str = "/run/oven/definition";
const OVEN: &str = "/run/oven";
/// The directory for inputs whose path relative to the definition is taken or not below `/run/oven`.
const INPUTS: &str = "/run/oven/inputs";
/// The directory for scripts that are symlinks to files outside of the definition and its inputs.
const LINKED: &str = "/run/oven/linked";
/// The number of bytes at the start of a script in which the kernel looks for the interpreter.
const HEAD: u64 = 256;
/// The maximal number of `.git` in a definition's directory or input. The sandbox makes a mount over each. A checkout
/// has one for each submodule.
const MAX_HIDDEN: usize = 1000;
/// The maximal length of a path in bytes that the kernel accepts.
const MAX_PATH: usize = 4095;

/// The directories of a definition, as scripts see them.
#[derive(Debug, PartialEq, Eq)]
pub struct ScriptBinds {
    /// First the definition's own directory, then its inputs, then linked files outside of both.
    pub binds: Vec<BindMount>,
}

/// Returns the read-only mounts through which scripts see the definition's directories. The path of an input relative
/// to the definition is the same as on this machine. So scripts can use paths such as `../common/x`. If the path is
/// taken or not below `/run/oven`, the input is mounted below `INPUTS` instead.
pub fn script_mounts(image: &Definition, shims: &[Shim]) -> Result<ScriptBinds> {
    let bind = |source: PathBuf, target: String| -> Result<BindMount> {
        let hidden = git_entries(&source, &image.project, &is_stop_requested)?;
        Ok(BindMount { source, target, within: Some(image.project.clone()), hidden })
    };
    let directories = visible_directories(image, &image.inputs, shims).into_iter();
    let binds = directories.map(|(directory, target)| bind(canonical(&directory)?, target));
    Ok(ScriptBinds { binds: binds.collect::<Result<_>>()? })
}

/// Returns a bind mount of a definition's directory as it has to be now: it also hides each `.git` that the directory
/// got since the mount was described.
pub fn hide_git(bind: &BindMount) -> Result<BindMount> {
    let hidden = match &bind.within {
        Some(project) if bind.source.is_dir() => git_entries(&bind.source, project, &is_stop_requested)?,
        _ => Vec::new(),
    };
    Ok(BindMount { hidden, ..bind.clone() })
}

/// Returns the directories that scripts see if these are the definition's inputs, each with the path at which scripts see
/// it. The first is the definition's own directory.
pub fn visible_directories(image: &Definition, inputs: &[String], shims: &[Shim]) -> Vec<(PathBuf, String)> {
    let mut seen = vec![(image.dir.clone(), DEFINITION_DIR.to_owned())];
    for (index, input) in inputs.iter().enumerate() {
        let sibling = path_in_image(Path::new(DEFINITION_DIR), Path::new(input));
        let free = sibling.starts_with(OVEN)
            && !seen.iter().any(|(_, target)| overlap(Path::new(target), &sibling))
            && !shims.iter().any(|shim| overlap(Path::new(&shim.path), &sibling))
            && ![CA_FILE, INPUTS, LINKED].iter().any(|taken| overlap(Path::new(taken), &sibling));
        let target = match sibling.to_str() {
            Some(sibling) if free => sibling.to_owned(),
            _ => format!("{INPUTS}/{index}"),
        };
        seen.push((image.dir.join(input), target));
    }
    seen
}

/// Returns the command line of a script. It begins with the interpreter that the script's first line names. The kernel
/// executes only the interpreter. So the script does not need the executable bit, and can be on a file system that is
/// mounted with `noexec`.
pub fn script_command(image: &Definition, script: &Path, seen: &mut ScriptBinds) -> Result<Vec<String>> {
    let path = image.dir.join(script);
    let mut start = Vec::new();
    let file = open_file_within(&path, &image.project).map_err(|refused| changed(&path, refused))?;
    let read = file.take(HEAD).read_to_end(&mut start);
    read.map_err(|error| changed(&path, PathRefusal::Io(error)))?;
    let mut argv = interpreter(&start);
    argv.push(self::script_path(image, script, seen)?);
    Ok(argv)
}

/// Returns the path at which steps see a file of the definition.
pub fn script_path(image: &Definition, script: &Path, seen: &mut ScriptBinds) -> Result<String> {
    let path = canonical(&image.dir.join(script))?;
    let below =
        seen.binds.iter().find_map(|bind| Some((&bind.target, path.strip_prefix(&bind.source).ok()?)));
    let target = match below {
        Some((target, rest)) => Path::new(target).join(rest),
        // The script is a symlink to a file outside of the definition and its inputs. This file is part of the
        // definition's checksum, and is mounted separately.
        None => Path::new(LINKED).join(script.file_name().unwrap_or_default()),
    };
    let Some(text) = target.to_str().map(str::to_owned) else {
        return Err(
            Kind::Definition.error(format!("the name of the script {} is not UTF-8", script.display()))
        );
    };
    if below.is_none() {
        let within = Some(image.project.clone());
        seen.binds.push(BindMount { source: path, target: text.clone(), within, hidden: Vec::new() });
    }
    Ok(text)
}

/// Returns the paths, relative to `top`, of every `.git` below it. Steps must not see them, because a checkout may have
/// a token in `.git/config`. In a worktree and in a submodule, `.git` is a file. Other mounts are not searched, because
/// steps do not see them. `top` must be in `project`.
///
/// Errors: [`Kind::Definition`] if there is too much to search or to hide; [`Kind::Interrupted`] if a signal asked this
/// process to end.
fn git_entries(top: &Path, project: &Path, is_stop_requested: &dyn Fn() -> bool) -> Result<Vec<PathBuf>> {
    let doing = || format!("looking for {GIT} in {}", escape_name(top));
    let opened = open_path(top, Some(project))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(&opened, c".", flags, Mode::empty()).with_context(doing);
    let (path, found) = (PathBuf::new(), Vec::new());
    let mut search = GitSearch { path, objects_left: MAX_OBJECTS, found, is_stop_requested };
    let searched = opened.and_then(|opened| search.run(opened).with_context(doing));
    searched.map_err(|error| Kind::Definition.unless_machine(error))?;
    search.found.sort();
    Ok(search.found)
}

/// A search for every `.git` below a directory.
struct GitSearch<'a> {
    /// The path of the current directory, relative to the top.
    path: PathBuf,
    /// The number of objects that may still be listed.
    objects_left: usize,
    found: Vec<PathBuf>,
    is_stop_requested: &'a dyn Fn() -> bool,
}

impl GitSearch<'_> {
    /// Searches at any depth, with few open descriptors.
    fn run(&mut self, top: OwnedFd) -> Result<()> {
        let mut cursor = DirectoryCursor::new(top)?;
        // For each directory from the top to the current one, the directories in it that were not searched yet.
        let mut levels = vec![self.list(cursor.dir())?];
        while let Some(directories) = levels.last_mut() {
            match directories.pop() {
                Some(name) if cursor.enter(&name)? => {
                    self.path.push(OsStr::from_bytes(name.as_bytes()));
                    levels.push(self.list(cursor.dir())?);
                }
                Some(_) => {}
                None => {
                    levels.pop();
                    if !levels.is_empty() {
                        cursor.leave()?;
                        self.path.pop();
                    }
                }
            }
        }
        Ok(())
    }

    /// Lists the current directory. Adds its `.git` to `found`, and returns the directories in it.
    fn list(&mut self, dir: &OwnedFd) -> Result<Vec<CString>> {
        let mut directories = Vec::new();
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.count()?;
            if name.to_bytes() == GIT.as_bytes() {
                self.add()?;
            } else if matches!(entry.file_type(), FileType::Directory | FileType::Unknown) {
                directories.push(name.to_owned());
            }
        }
        Ok(directories)
    }

    fn count(&mut self) -> Result<()> {
        if (self.is_stop_requested)() {
            return Err(Kind::Interrupted.error("interrupted"));
        }
        // The checksum has the same limit. So more objects were added during the bake.
        self.objects_left = self.objects_left.checked_sub(1).ok_or_else(|| {
            let what = format!("it has more than {MAX_OBJECTS} files, directories and links");
            Kind::Definition.failure(what).hint("Do not add files during the bake.")
        })?;
        Ok(())
    }

    fn add(&mut self) -> Result<()> {
        let path = self.path.join(GIT);
        let what = match () {
            () if self.found.len() == MAX_HIDDEN => format!("more than {MAX_HIDDEN} of them were found"),
            // The sandbox could not open it, and so could not hide it.
            () if path.as_os_str().len() > MAX_PATH => {
                format!("one has a path of more than {MAX_PATH} bytes")
            }
            () => {
                self.found.push(path);
                return Ok(());
            }
        };
        let hint = format!("Remove it, because oven has to hide each {GIT} of the definition from scripts.");
        Err(Kind::Definition.failure(what).hint(hint).into())
    }
}

/// Returns the canonical path of a file or directory of the definition, which existed when the definition was read.
fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|error| changed(path, PathRefusal::Io(error)))
}

/// Returns the interpreter of a script, and the interpreter's argument if it has one. Returns an empty list for an ELF
/// program.
fn interpreter(start: &[u8]) -> Vec<String> {
    if start.starts_with(b"\x7fELF") {
        return Vec::new();
    }
    let first = start.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let Some(line) = first.strip_prefix(b"#!") else { return vec!["/bin/sh".to_owned()] };
    let line = String::from_utf8_lossy(line);
    // The kernel passes everything after the interpreter as one argument.
    let (program, argument) = match line.trim().split_once([' ', '\t']) {
        Some((program, argument)) => (program, argument.trim()),
        None => (line.trim(), ""),
    };
    [program, argument].iter().filter(|word| !word.is_empty()).map(|word| (*word).to_owned()).collect()
}

/// Returns the environment variables of scripts, in addition to those of every step.
pub fn environment(image: &Definition, kind: &str, seen: &ScriptBinds) -> BTreeMap<String, String> {
    let inputs: Vec<_> =
        seen.binds.iter().skip(1).take(image.inputs.len()).map(|b| b.target.as_str()).collect();
    [
        // The name of the image.
        ("OVEN_NAME", image.name.as_str()),
        // `run`, `ansible` or `test`.
        ("OVEN_PHASE", kind),
        // The definition's directory, which is the working directory.
        ("OVEN_DEFINITION", DEFINITION_DIR),
        // The definition's inputs in their order, separated by colons.
        ("OVEN_INPUTS", &inputs.join(":")),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// Joins paths as texts. Symlinks are not followed, and `..` removes the name before it.
pub fn path_in_image(base: &Path, path: &Path) -> PathBuf {
    let mut joined = base.to_owned();
    for part in path.components() {
        match part {
            Component::Normal(name) => joined.push(name),
            Component::ParentDir => _ = joined.pop(),
            _ => {}
        }
    }
    joined
}

fn overlap(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn project() -> (tempfile::TempDir, Definition) {
        let temp = tempfile::tempdir().unwrap();
        for dir in ["web", "common/deep", "apt.conf"] {
            std::fs::create_dir_all(temp.path().join(dir)).unwrap();
        }
        for file in ["web/setup.sh", "common/deep/x.sh", "elsewhere.sh"] {
            std::fs::write(temp.path().join(file), "#!/bin/sh -e\n").unwrap();
        }
        symlink("../elsewhere.sh", temp.path().join("web/linked.sh")).unwrap();
        // The same directory, by a path that is not below /run/oven for a step.
        let real = temp.path().canonicalize().unwrap();
        let up = "../".repeat(real.components().count());
        let by_root = format!("{up}{}", real.join("common/deep").strip_prefix("/").unwrap().display());
        let image = crate::provision::test::definition(&temp.path().join("web"), |image| {
            image.inputs = vec!["../common".into(), "../apt.conf".into(), by_root];
        });
        (temp, image)
    }

    fn shim() -> Shim {
        Shim { path: "/run/oven/apt.conf".into(), content: String::new(), mode: 0o644 }
    }

    #[test]
    fn inputs_are_next_to_the_definition_unless_the_name_is_taken() {
        let (temp, image) = project();
        let seen = script_mounts(&image, &[shim()]).unwrap();
        let targets: Vec<_> = seen.binds.iter().map(|bind| bind.target.as_str()).collect();
        assert_eq!(targets, [DEFINITION_DIR, "/run/oven/common", "/run/oven/inputs/1", "/run/oven/inputs/2"]);
        assert_eq!(seen.binds[1].source, temp.path().canonicalize().unwrap().join("common"));
        let environment = environment(&image, "test", &seen);
        assert_eq!(environment["OVEN_INPUTS"], "/run/oven/common:/run/oven/inputs/1:/run/oven/inputs/2");
        assert_eq!(environment["OVEN_PHASE"], "test");
    }

    #[test]
    fn a_script_is_found_in_the_definition_in_an_input_and_by_a_link() {
        let (_temp, mut image) = project();
        image.inputs.truncate(1);
        let mut seen = script_mounts(&image, &[]).unwrap();
        let mut of = |script: &str| script_command(&image, Path::new(script), &mut seen).unwrap().join(" ");
        assert_eq!(of("setup.sh"), "/bin/sh -e /run/oven/definition/setup.sh");
        assert_eq!(of("../common/deep/x.sh"), "/bin/sh -e /run/oven/common/deep/x.sh");
        assert_eq!(of("linked.sh"), "/bin/sh -e /run/oven/linked/linked.sh");
        assert!(seen.binds.last().unwrap().source.ends_with("elsewhere.sh"));
    }

    #[test]
    fn every_git_directory_and_file_is_hidden() {
        let (temp, mut image) = project();
        for dir in ["web/.git", "web/a/.git/modules/.git", "common/deep/.git"] {
            std::fs::create_dir_all(temp.path().join(dir)).unwrap();
        }
        std::fs::create_dir(temp.path().join("web/b")).unwrap();
        std::fs::write(temp.path().join("web/b/.git"), "gitdir: ../.git/worktrees/b").unwrap();
        symlink("a/.git", temp.path().join("web/a/git-link")).unwrap();
        image.inputs = vec!["../common".into()];
        let seen = script_mounts(&image, &[]).unwrap();
        let hidden = |index: usize| seen.binds[index].hidden.clone();
        assert_eq!(hidden(0), [".git", "a/.git", "b/.git"].map(PathBuf::from));
        assert_eq!(hidden(1), [PathBuf::from("deep/.git")]);
    }

    #[test]
    fn a_deep_tree_is_searched() {
        let temp = tempfile::tempdir().unwrap();
        // The path of the last directory is longer than the kernel accepts. So each directory is made by the one above.
        let mut dir = open_path(temp.path(), None).unwrap();
        for depth in 0..3000 {
            rustix::fs::mkdirat(&dir, c"d", Mode::RWXU).unwrap();
            dir = rustix::fs::openat(&dir, c"d", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
            if depth == 1000 {
                rustix::fs::mkdirat(&dir, c".git", Mode::RWXU).unwrap();
            }
        }
        let project = temp.path().canonicalize().unwrap();
        let search = || git_entries(&project, &project, &|| false);
        assert_eq!(search().unwrap(), [PathBuf::from(format!("{}.git", "d/".repeat(1001)))]);
        rustix::fs::mkdirat(&dir, c".git", Mode::RWXU).unwrap();
        let error = search().unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Definition);
        assert!(format!("{error:#}").contains("one has a path of more than 4095 bytes"), "{error:#}");
        crate::image::remove::remove_directory(&project.join("d"), &|| false).unwrap();
    }

    #[test]
    fn a_search_ends_at_a_limit_and_at_a_signal() {
        let temp = tempfile::tempdir().unwrap();
        let project = temp.path().canonicalize().unwrap();
        for n in 0..=MAX_HIDDEN {
            std::fs::create_dir_all(project.join(format!("{n}/.git"))).unwrap();
        }
        let error = git_entries(&project, &project, &|| false).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Definition);
        assert!(format!("{error:#}").ends_with(": more than 1000 of them were found"), "{error:#}");
        std::fs::remove_dir(project.join("0/.git")).unwrap();
        assert_eq!(git_entries(&project, &project, &|| false).unwrap().len(), MAX_HIDDEN);

        let found = |objects_left: usize| {
            let (path, found) = (PathBuf::new(), Vec::new());
            let mut search = GitSearch { path, objects_left, found, is_stop_requested: &|| false };
            search.run(std::fs::File::open(&project).unwrap().into()).map(|()| search.found.len())
        };
        // There are 1001 directories, and 1000 `.git` in them.
        assert_eq!(found(2 * MAX_HIDDEN + 1).unwrap(), MAX_HIDDEN);
        let error = found(2 * MAX_HIDDEN).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Definition);
        assert!(error.to_string().contains("more than 100000 files"), "{error:#}");

        let asked = std::cell::Cell::new(0);
        let stop_at_tenth = || asked.replace(asked.get() + 1) == 10;
        let error = git_entries(&project, &project, &stop_at_tenth).unwrap_err();
        assert_eq!((Kind::of(&error), asked.get()), (Kind::Interrupted, 11));
    }

    #[test]
    fn what_vanished_since_the_definition_was_read_is_the_definitions_fault() {
        let (temp, mut image) = project();
        image.inputs.truncate(1);
        let mut seen = script_mounts(&image, &[]).unwrap();
        let gone = Path::new("gone.sh");
        for error in [
            script_command(&image, gone, &mut seen).unwrap_err(),
            script_path(&image, gone, &mut seen).unwrap_err(),
        ] {
            assert_eq!(Kind::of(&error), Kind::Definition, "{error:#}");
            assert!(error.to_string().contains("web/gone.sh cannot be read: "), "{error:#}");
        }
        std::fs::rename(temp.path().join("common"), temp.path().join("moved")).unwrap();
        assert_eq!(Kind::of(&script_mounts(&image, &[]).unwrap_err()), Kind::Definition);
        // The definition's directory itself is outside the project now.
        image.project = temp.path().join("elsewhere");
        let error = script_mounts(&image, &[]).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Definition, "{error:#}");
        assert!(error.to_string().contains("outside the project"), "{error:#}");
    }

    #[test]
    fn interpreters() {
        assert_eq!(interpreter(b"#!/usr/bin/env python3 -u\nx"), ["/usr/bin/env", "python3 -u"]);
        assert_eq!(interpreter(b"#! /bin/bash"), ["/bin/bash"]);
        assert_eq!(interpreter(b"echo"), ["/bin/sh"]);
        assert_eq!(interpreter(b"\x7fELF\x02"), [""; 0]);
    }
}
