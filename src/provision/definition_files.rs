//! Places the definition's files in the image.

use crate::config::template;
use crate::definition::{Definition, File};
use crate::error::{Kind, hint_of, mistakes_of};
use crate::image::accounts::Accounts;
use crate::image::tree::ImageTree;
use crate::sys::fds::{PathRefusal, changed, open_file_within};
use crate::text::count;
use anyhow::{Context, Result};
use rustix::fs::FileType;
use std::collections::BTreeSet;

/// The phase of the steps that place files.
pub const FILES_PHASE: &str = "files";

/// The title of the step that places this number of files, before the scripts or after them.
pub fn title(files: usize, after_run: bool) -> String {
    format!("placing {}{}", count(files, "file"), if after_run { " after the scripts" } else { "" })
}

/// The maximal number of mistakes that an error lists.
const MAX_MISTAKES: usize = 20;

/// Places every `[[file]]` that is placed after the scripts, or before. `unmounted` lists the mount points whose file
/// systems this kernel cannot mount. The error lists the mistakes of all these files.
pub fn place_files(
    inside: &ImageTree,
    image: &Definition,
    unmounted: &[impl AsRef<std::path::Path>],
    after_run: bool,
) -> Result<()> {
    let accounts = Accounts::read(inside)?;
    let mut wrong = Vec::new();
    for file in image.files.iter().filter(|file| file.after_run == after_run) {
        let placed = place_one(inside, image, file, unmounted, &accounts)
            .with_context(|| format!("placing {} as {}", file.source.display(), file.target));
        match placed {
            Err(error) if Kind::of(&error) == Kind::Definition => wrong.push(error),
            placed => placed?,
        }
        if wrong.len() == MAX_MISTAKES {
            break;
        }
    }
    match wrong.len() {
        0 => Ok(()),
        1 => Err(wrong.remove(0)),
        _ => Err(joined(&wrong)),
    }
}

/// Makes one error of several. Its hint is that of the first, and each mistake has its own.
fn joined(errors: &[anyhow::Error]) -> anyhow::Error {
    let mistakes: Vec<_> = errors.iter().flat_map(mistakes_of).collect();
    let messages: Vec<_> = mistakes.iter().map(|mistake| mistake.message.as_str()).collect();
    let failure = Kind::Definition.failure(messages.join("\n"));
    let hints: BTreeSet<_> = errors.iter().filter_map(hint_of).collect();
    let hints: Vec<_> = hints.iter().map(String::as_str).collect();
    let failure = if hints.is_empty() { failure } else { failure.hint(hints.join("\n")) };
    failure.with_mistakes(mistakes).into()
}

fn place_one(
    inside: &ImageTree,
    image: &Definition,
    file: &File,
    unmounted: &[impl AsRef<std::path::Path>],
    accounts: &Accounts,
) -> Result<()> {
    let invalid = |key: &str, why: String| {
        let place = image.place_of_file(file, key);
        Kind::Definition.failure(format!("{place}: {why}")).at(&place)
    };
    let target = &file.target;
    if let Some(dir) = unmounted.iter().find(|dir| std::path::Path::new(target).starts_with(dir)) {
        let why = format!(
            "{target} cannot be written, because this kernel cannot mount the file system of {}",
            dir.as_ref().display()
        );
        return Err(invalid("target", why).into());
    }
    // If the target itself is a symlink, the file replaces the symlink. The symlink is not followed.
    if kind(inside, target)? == Some(FileType::Directory) {
        let why = format!("{target} is a directory in the image");
        let hint = "Add the file's name to `target`, which is the path of the file and not of its directory.";
        return Err(invalid("target", why).hint(hint).into());
    }
    let unknown = |key: &str, name: &str| {
        let account = if key == "owner" { "user" } else { "group" };
        let why = format!("the image has no {account} `{name}`");
        invalid(key, why).hint(match (file.after_run, image.runs.is_empty()) {
            (true, _) => {
                "Add the package that creates this account to `packages`, add a [[run]] that creates it, or use a \
                 numeric id."
            }
            // Without scripts, `after` does not help.
            (false, true) => "Add the package that creates this account to `packages`, or use a numeric id.",
            (false, false) => {
                "Add the package that creates this account to `packages`, or use a numeric id. If a [[run]] or an \
                 [[ansible]] creates it, set `after = \"run\"` in this [[file]]."
            }
        })
    };
    let uid = accounts.user(&file.owner).ok_or_else(|| unknown("owner", &file.owner))?;
    let gid = accounts.group(&file.group).ok_or_else(|| unknown("group", &file.group))?;
    let mut source = open_file_within(&file.source, &image.project).map_err(|refused| match refused {
        PathRefusal::Special(_) => invalid("source", "it is no longer a regular file".into()).into(),
        refused => changed(&file.source, refused),
    })?;
    if file.template {
        let text = template::read(&mut source, &file.source);
        let text = text.and_then(|text| template::render(&text, &file.source, &image.vars.values()));
        let wrong = |what: String| invalid("source", what);
        let text = text.map_err(|error| error.or_mistake(wrong))?;
        return inside.write(target, text.as_bytes(), file.mode, uid, gid);
    }
    inside.write_from(target, &mut source, file.mode, uid, gid)
}

fn kind(inside: &ImageTree, path: &str) -> Result<Option<FileType>> {
    Ok(inside.metadata(path)?.map(|stat| FileType::from_raw_mode(stat.st_mode)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::accounts::HOMES_MAX;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::{Path, PathBuf};

    fn image(dir: &Path, target: &str, owner: &str) -> Definition {
        std::fs::write(dir.join("motd"), "hello\n").unwrap();
        let file = File {
            source: dir.join("motd"),
            target: target.into(),
            mode: 0o640,
            owner: owner.into(),
            group: owner.into(),
            template: false,
            after_run: false,
        };
        crate::provision::test::definition(dir, |image| {
            image.files = vec![file.clone()];
        })
    }

    /// Returns the id of this process's user. Without root, a test can create files only for this user.
    fn me() -> String {
        rustix::process::getuid().as_raw().to_string()
    }

    fn tree() -> (tempfile::TempDir, ImageTree, PathBuf) {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("root");
        std::fs::create_dir_all(root.join("etc/motd.d")).unwrap();
        let inside = ImageTree::open_dir(&root).unwrap();
        (temp, inside, root)
    }

    #[test]
    fn a_file_gets_its_place_and_mode() {
        let (temp, inside, root) = tree();
        let unmounted: [&Path; 0] = [];
        for target in ["/etc/motd", "/srv/new/motd"] {
            place_files(&inside, &image(temp.path(), target, &me()), &unmounted, false).unwrap();
            let placed = root.join(&target[1..]);
            assert_eq!(std::fs::read_to_string(&placed).unwrap(), "hello\n");
            assert_eq!(placed.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
        }
    }

    #[test]
    fn symlinks_do_not_lead_out_of_the_image() {
        let (temp, inside, root) = tree();
        let canary = temp.path().join("canary");
        std::fs::write(&canary, "host").unwrap();
        symlink(&canary, root.join("etc/motd")).unwrap();
        symlink(temp.path(), root.join("out")).unwrap();
        symlink("etc", root.join("in")).unwrap();
        let unmounted: [&Path; 0] = [];
        place_files(&inside, &image(temp.path(), "/etc/motd", &me()), &unmounted, false).unwrap();
        assert!(root.join("etc/motd").symlink_metadata().unwrap().is_file(), "the link was replaced");
        _ = place_files(&inside, &image(temp.path(), "/out/canary", &me()), &unmounted, false);
        place_files(&inside, &image(temp.path(), "/in/issue", &me()), &unmounted, false).unwrap();
        assert!(root.join("etc/issue").exists());
        assert_eq!(std::fs::read_to_string(&canary).unwrap(), "host");
    }

    #[test]
    fn an_impossible_target_is_an_error_with_its_key() {
        let (temp, inside, _) = tree();
        let unmounted = [Path::new("/boot/efi")];
        for (target, owner, word) in [
            ("/etc/motd.d", "0", "is a directory"),
            ("/boot/efi/motd", "0", "cannot mount"),
            ("/etc/motd", "nobody-here", "no user `nobody-here`"),
        ] {
            let error =
                place_files(&inside, &image(temp.path(), target, owner), &unmounted, false).unwrap_err();
            assert_eq!(Kind::of(&error), Kind::Definition);
            let text = format!("{error:#}");
            assert!(text.contains(word) && text.contains("image.toml"), "{text}");
        }
    }

    #[test]
    fn files_after_the_scripts_are_placed_separately() {
        let (temp, inside, root) = tree();
        let mut image = image(temp.path(), "/etc/before", &me());
        let after = File { target: "/etc/after".into(), after_run: true, ..image.files[0].clone() };
        image.files.push(after);
        let unmounted: [&Path; 0] = [];
        let placed = || ["before", "after"].map(|name| root.join("etc").join(name).exists());
        place_files(&inside, &image, &unmounted, false).unwrap();
        assert_eq!(placed(), [true, false]);
        place_files(&inside, &image, &unmounted, true).unwrap();
        assert_eq!(placed(), [true, true]);
        let titles = [false, true].map(|after_run| title(1, after_run));
        assert_eq!(titles, ["placing 1 file", "placing 1 file after the scripts"]);
    }

    #[test]
    fn a_missing_account_is_on_the_line_of_its_file_and_the_hint_names_after() {
        let (temp, inside, _) = tree();
        let run = "[[run]]\ncommand = [\"useradd\", \"app\"]\n";
        let file = "[[file]]\nsource = \"motd\"\ntarget = \"/etc/motd\"\n";
        std::fs::write(temp.path().join("motd"), "hello\n").unwrap();
        let cases = [
            (format!("{run}{file}owner = \"app\"\n"), 7, "owner", true),
            (format!("{run}{file}owner = \"0\"\ngroup = \"app\"\n"), 8, "group", true),
            (format!("{file}owner = \"app\"\n"), 5, "owner", false),
            (format!("{file}owner = \"app\"\nafter = \"run\"\n{run}"), 5, "owner", false),
        ];
        for (toml, line, key, names_after) in cases {
            // The key `owner` of `from` is on the first line.
            let toml = format!("from = {{ name = \"debian\", owner = \"self\" }}\n{toml}");
            std::fs::write(temp.path().join("image.toml"), &toml).unwrap();
            let image = Definition::load(temp.path()).unwrap();
            let unmounted: [&Path; 0] = [];
            let error = place_files(&inside, &image, &unmounted, image.files[0].after_run).unwrap_err();
            let (text, hint) = (format!("{error:#}"), crate::error::hint_of(&error).unwrap());
            assert!(
                text.contains(&format!("image.toml:{line}: `{key}` of [[file]]: the image has no ")),
                "{text}"
            );
            assert_eq!(hint.contains("set `after = \"run\"`"), names_after, "{hint}");
            assert_eq!(hint.contains("add a [[run]] that creates it"), image.files[0].after_run, "{hint}");
        }
    }

    #[test]
    fn all_mistakes_of_the_files_are_reported_together() {
        let (temp, inside, root) = tree();
        let me = me();
        let file = |target: &str, owner: &str| {
            format!(
                "[[file]]\nsource = \"motd\"\ntarget = \"{target}\"\nowner = \"{owner}\"\ngroup = \"{me}\"\n"
            )
        };
        std::fs::write(temp.path().join("motd"), "hello\n").unwrap();
        let files = [
            file("/etc/a", "app"),
            file("/etc/b", &me),
            file("/etc/motd.d", &me),
            file("/etc/c", "other"),
            format!("{}after = \"run\"\n", file("/etc/d", "late")),
        ];
        let toml = format!("from = \"ami-0123456789abcdef0\"\n{}", files.concat());
        std::fs::write(temp.path().join("image.toml"), &toml).unwrap();
        let image = Definition::load(temp.path()).unwrap();
        let unmounted: [&Path; 0] = [];
        let error = place_files(&inside, &image, &unmounted, false).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Definition);
        let text = format!("{error:#}");
        assert_eq!(text.lines().count(), 3, "{text}");
        let found: Vec<_> = mistakes_of(&error)
            .into_iter()
            .map(|mistake| {
                let place = mistake.place.unwrap();
                assert!(text.contains(&mistake.message), "{text}");
                (place.line.unwrap(), place.key.unwrap(), mistake.hint.unwrap().contains("`packages`"))
            })
            .collect();
        let keys: Vec<_> =
            found.iter().map(|(line, key, _)| (*line, key.rsplit('.').next().unwrap())).collect();
        assert_eq!(keys, [(5, "owner"), (14, "target"), (20, "owner")], "{found:?}");
        assert_eq!(found.iter().map(|(.., packages)| *packages).collect::<Vec<_>>(), [true, false, true]);
        let hint = hint_of(&error).unwrap();
        assert_eq!(hint.matches("`packages`").count(), 1, "{hint}");
        // What is placed is of no use, because the bake fails. But a later mistake can depend on it.
        assert!(root.join("etc/b").exists() && !root.join("etc/a").exists());
        let error = place_files(&inside, &image, &unmounted, true).unwrap_err();
        assert!(format!("{error:#}").contains("no user `late`"), "{error:#}");
    }

    #[test]
    fn a_source_that_vanished_is_the_definitions_fault() {
        let (temp, inside, root) = tree();
        let mut image = image(temp.path(), "/etc/motd", &me());
        for template in [false, true] {
            image.files[0].template = template;
            _ = std::fs::remove_file(temp.path().join("motd"));
            let unmounted: [&Path; 0] = [];
            let error = place_files(&inside, &image, &unmounted, false).unwrap_err();
            assert_eq!(Kind::of(&error), Kind::Definition, "{error:#}");
            assert!(format!("{error:#}").contains("motd cannot be read: "), "{error:#}");
            assert!(!root.join("etc/motd").exists());
        }
    }

    #[test]
    fn accounts_are_the_images() {
        let (_temp, inside, root) = tree();
        std::fs::write(root.join("etc/passwd"), "www:x:1033:33::/var/www:/bin/sh\nbad\nq:x:no:1::rel:\n")
            .unwrap();
        std::fs::write(root.join("etc/group"), "www:x:1034:\n").unwrap();
        let accounts = Accounts::read(&inside).unwrap();
        assert_eq!((accounts.user("www"), accounts.group("www")), (Some(1033), Some(1034)));
        assert_eq!((accounts.user("root"), accounts.user("7"), accounts.user("q")), (Some(0), Some(7), None));
        assert_eq!(accounts.homes().unwrap(), ["/var/www"]);
        let homes = |count| (0..count).map(|home| format!("x:x:1:1::/h/{home}:\n")).collect::<String>();
        for (count, are_listed) in [(HOMES_MAX, true), (HOMES_MAX + 1, false)] {
            std::fs::write(root.join("etc/passwd"), homes(count)).unwrap();
            assert_eq!(Accounts::read(&inside).unwrap().homes().is_some(), are_listed);
        }
    }
}
