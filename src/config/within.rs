//! Resolves a path of a project without looking at anything outside of the project. So an error about a path of a
//! stranger's definition does not tell which files this machine has.

use crate::sys::fds::{GIT, PathRefusal};
use std::ffi::OsString;
use std::io;
use std::path::{Component, Path, PathBuf};

/// The maximal number of symbolic links in a path, as in the kernel.
const MAX_LINKS: usize = 40;

/// Returns the canonical path of a file or directory that exists. `path` is relative to `start`. `start` and `project`
/// are canonical paths of directories, and `start` is below `project`. The directories above the project exist, so
/// `path` may lead through them. As soon as it leads to another place outside, the result is
/// [`PathRefusal::Outside`], with a path that was not examined.
pub(crate) fn resolve_within(start: &Path, path: &Path, project: &Path) -> Result<PathBuf, PathRefusal> {
    let failed = |errno: i32| PathRefusal::Io(io::Error::from_raw_os_error(errno));
    let (mut at, mut rest, mut links) = (start.to_owned(), reversed(path), 0);
    while let Some(part) = rest.pop() {
        if part == "/" {
            at = PathBuf::from("/");
            continue;
        }
        if part == ".." {
            if !at.is_dir() {
                return Err(failed(libc::ENOTDIR));
            }
            at.pop();
            continue;
        }
        let next = at.join(&part);
        if project.starts_with(&next) {
            at = next;
            continue;
        }
        if !next.starts_with(project) {
            return Err(PathRefusal::Outside(rest.iter().rev().fold(next, |path, part| path.join(part))));
        }
        if part == GIT {
            return Err(PathRefusal::InGit(next));
        }
        if !next.symlink_metadata().map_err(PathRefusal::Io)?.is_symlink() {
            at = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(failed(libc::ELOOP));
        }
        rest.extend(reversed(&next.read_link().map_err(PathRefusal::Io)?));
    }
    if at.starts_with(project) { Ok(at) } else { Err(PathRefusal::Outside(at)) }
}

/// The parts of a path, the last one first, without `.`.
fn reversed(path: &Path) -> Vec<OsString> {
    let parts = path.components().rev().filter(|part| *part != Component::CurDir);
    parts.map(|part| part.as_os_str().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_path_is_resolved_like_the_kernel_does_it() {
        let top = tempfile::tempdir().unwrap();
        let project = top.path().canonicalize().unwrap().join("project");
        let web = project.join("web");
        fs::create_dir_all(web.join("a/b")).unwrap();
        fs::write(web.join("file"), "").unwrap();
        for (link, target) in [
            ("up", "..".to_owned()),
            ("chain", "up/web/a".to_owned()),
            ("absolute", web.join("a").display().to_string()),
            ("around", "../../project/web/file".to_owned()),
            ("loop", "loop".to_owned()),
            ("dangling", "gone".to_owned()),
        ] {
            symlink(target, web.join(link)).unwrap();
        }
        let absolute = web.join("absolute/b").display().to_string();
        for path in [
            "",
            ".",
            "file",
            "a/b",
            "./a/./b/../..",
            "..",
            "up",
            "chain/b",
            "absolute/b",
            "around",
            "../web/up/web",
            "../../project/web",
            &absolute,
            "loop",
            "dangling",
            "gone/x",
            "file/..",
            "file/x",
        ] {
            let kernel = fs::canonicalize(web.join(path)).map_err(|error| error.raw_os_error());
            let resolved = resolve_within(&web, Path::new(path), &project).map_err(|refused| match refused {
                PathRefusal::Io(error) => error.raw_os_error(),
                other => panic!("{path}: {other}"),
            });
            assert_eq!(resolved, kernel, "{path}");
        }
    }

    #[test]
    fn nothing_outside_is_looked_at() {
        let top = tempfile::tempdir().unwrap();
        let real = top.path().canonicalize().unwrap();
        let web = real.join("project/web");
        fs::create_dir_all(&web).unwrap();
        fs::create_dir_all(real.join("outside/dir")).unwrap();
        fs::write(real.join("outside/file"), "").unwrap();
        for name in
            ["outside/dir", "outside/file", "outside/gone", "outside/file/x", "gone", "outside/dir/../x"]
        {
            let outside = real.join(name);
            symlink(&outside, web.join("link")).unwrap();
            let back = format!("../../{name}/../../project/web");
            for path in [&*outside.display().to_string(), &*format!("../../{name}"), "link", "link/x", &*back]
            {
                let refused = resolve_within(&web, Path::new(path), &real.join("project")).unwrap_err();
                let PathRefusal::Outside(place) = refused else { panic!("{path}: {refused}") };
                assert!(place.starts_with(real.join(name.split('/').next().unwrap())), "{path}: {place:?}");
            }
            fs::remove_file(web.join("link")).unwrap();
        }
        let refused = resolve_within(&web, Path::new("../.."), &real.join("project")).unwrap_err();
        assert!(matches!(&refused, PathRefusal::Outside(place) if *place == real), "{refused}");
        let refused = resolve_within(&web, Path::new("../.git/gone"), &real.join("project")).unwrap_err();
        assert!(matches!(refused, PathRefusal::InGit(_)), "{refused}");
    }
}
