//! Checks that scripts can follow the symbolic links of a definition. Scripts see only the definition's directory and its
//! `inputs`, at other paths than on this machine.

use crate::config::within::resolve_within;
use crate::definition::{Definition, FILE, PackageRequest, Program};
use crate::error::{Kind, Mistake, Place};
use crate::identity::fingerprint::DefinitionLink;
use crate::provision::script_mounts::{path_in_image, visible_directories};
use crate::sys::fds::{PathRefusal, changed};
use crate::text::{ShortList, escape_name};
use anyhow::Result;
use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

/// The maximal number of links, and of directories for `inputs`, that a message lists.
const MAX_LISTED: usize = 10;
/// The maximal number of links that do not work, and for which `inputs` are searched. A definition of a stranger may have
/// very many.
const MAX_REMEDIES: usize = 1000;

/// Returns a warning if scripts cannot follow some of these links. It has the `inputs` with which they could. A link that
/// image.toml itself names is left out, because oven reads it on this machine. Errors: [`Kind::Definition`] if a link is
/// absolute, because a script would find a file of the image there.
pub fn check(image: &Definition, links: &[DefinitionLink]) -> Result<Option<String>> {
    refuse_absolute(links)?;
    let named = named_files(image);
    let here = View::of(image, image.inputs.clone())?;
    let links = links.iter().filter(|link| !named.contains(&*link.path));
    let remedies = links.map(|link| here.remedy(link).map(|remedy| (link, remedy)));
    let remedies = remedies.filter(|remedy| !matches!(remedy, Ok((_, Remedy::None)))).take(MAX_REMEDIES);
    let (mut served, mut hopeless) = (ShortList::new(MAX_LISTED), ShortList::new(MAX_LISTED));
    let mut missing: BTreeSet<String> = BTreeSet::new();
    for remedy in remedies {
        let (link, remedy) = remedy?;
        let shown = || format!("{} -> {}", escape_name(&link.path), escape_name(&link.target));
        match remedy {
            Remedy::None => {}
            Remedy::Input(input) => {
                served.add(shown);
                missing.insert(input);
            }
            Remedy::Copy => hopeless.add(shown),
        }
    }
    let place = match &image.inputs[..] {
        [] => format!("{}:1: `inputs` is not set", escape_name(&image.dir.join(FILE))),
        _ => format!("{} lacks directories", image.place("inputs", None)),
    };
    let cannot = "so scripts and tests cannot follow these links out of the definition";
    let mut texts = Vec::new();
    if !served.is_empty() {
        // A directory that is below another one in the list is served by it.
        let below = |input: &String| {
            missing.iter().any(|other| other != input && Path::new(input).starts_with(other))
        };
        let all = image.inputs.iter().chain(missing.iter().filter(|input| !below(input)));
        let mut inputs = ShortList::new(MAX_LISTED);
        all.for_each(|input| inputs.add(|| format!("{input:?}")));
        texts.push(format!("{place}, {cannot}: {}. Set inputs = [{}]", served.join(", "), inputs.join(", ")));
    }
    if !hopeless.is_empty() {
        texts.push(format!(
            "{}: scripts and tests cannot follow these links, and no `inputs` can change this: {}. Copy their targets into \
             the definition, or into a directory next to it",
            escape_name(&image.dir),
            hopeless.join(", ")
        ));
    }
    Ok(Some(texts.join("\n")).filter(|text| !text.is_empty()))
}

fn refuse_absolute(links: &[DefinitionLink]) -> Result<()> {
    let (mut texts, mut mistakes) = (ShortList::new(MAX_LISTED), Vec::new());
    for link in links.iter().filter(|link| link.target.is_absolute()) {
        let place = Place::new(escape_name(&link.path), None, None, "");
        let target = escape_name(&link.target);
        let message = format!(
            "{place}: is a link to the absolute path {target}, at which scripts find a file of the image"
        );
        texts.add(|| message.clone());
        if mistakes.len() < MAX_LISTED {
            mistakes.push(Mistake { place: Some(place), message, hint: None });
        }
    }
    if texts.is_empty() {
        return Ok(());
    }
    Err(Kind::Definition
        .failure(texts.join("\n"))
        .with_mistakes(mistakes)
        .hint("Replace the link by a copy, or by a relative link to a file in the definition or in its `inputs`.")
        .into())
}

/// The files that image.toml names, and that oven reads on this machine.
fn named_files(image: &Definition) -> BTreeSet<PathBuf> {
    let mut named: BTreeSet<PathBuf> = image.files.iter().map(|file| file.source.clone()).collect();
    for request in &image.packages {
        if let PackageRequest::File { source, .. } = request {
            named.insert(source.clone());
        }
    }
    for script in image.runs.iter().chain(&image.tests) {
        match &script.program {
            Program::Script(path) | Program::Bats(path) => _ = named.insert(image.dir.join(path)),
            Program::Playbook(playbook) => _ = named.insert(image.dir.join(&playbook.path)),
            Program::Command(_) => {}
        }
    }
    named
}

/// What makes a link work in scripts.
enum Remedy {
    /// Nothing, because it works.
    None,
    /// This directory in `inputs`.
    Input(String),
    /// Only a copy.
    Copy,
}

/// The directories that scripts see.
struct View<'a> {
    image: &'a Definition,
    inputs: Vec<String>,
    /// The canonical path of each directory, and the path at which scripts see it.
    directories: Vec<(PathBuf, String)>,
}

impl<'a> View<'a> {
    fn of(image: &'a Definition, inputs: Vec<String>) -> Result<Self> {
        let directories = visible_directories(image, &inputs, &[]).into_iter().map(|(directory, seen)| {
            let real = std::fs::canonicalize(&directory);
            let real = real.map_err(|error| changed(&directory, PathRefusal::Io(error)))?;
            Ok((real, seen))
        });
        Ok(Self { image, inputs, directories: directories.collect::<Result<_>>()? })
    }

    fn remedy(&self, link: &DefinitionLink) -> Result<Remedy> {
        let top = &self.directories[0].0;
        let relative = link.path.strip_prefix(&self.image.dir).unwrap_or(&link.path);
        // A link that leads out of the project is not followed on this machine, either.
        let real = match resolve_within(top, relative, &self.image.project) {
            Ok(real) => real,
            Err(PathRefusal::Outside(_)) => return Ok(Remedy::Copy),
            // Scripts do not see a `.git`. Any other failure was reported when the files were read.
            Err(_) => return Ok(Remedy::None),
        };
        if self.reaches(link, &real) {
            return Ok(Remedy::None);
        }
        let directory = if real.is_dir() { Some(&*real) } else { real.parent() };
        let input =
            directory.and_then(|directory| relative_path(top, directory)?.to_str().map(str::to_owned));
        let Some(input) = input else { return Ok(Remedy::Copy) };
        let inputs = self.inputs.iter().cloned().chain([input.clone()]).collect();
        let serves = View::of(self.image, inputs)?.reaches(link, &real);
        Ok(if serves { Remedy::Input(input) } else { Remedy::Copy })
    }

    /// Whether a script that follows the link finds the file or directory with this canonical path.
    fn reaches(&self, link: &DefinitionLink, real: &Path) -> bool {
        let Some(Ok(parent)) = link.path.parent().map(std::fs::canonicalize) else { return false };
        let mut seen = self
            .directories
            .iter()
            .filter_map(|(root, seen)| Some(Path::new(seen).join(parent.strip_prefix(root).ok()?)));
        let Some(parent) = seen.next() else { return false };
        let target = path_in_image(&parent, &link.target);
        let mut found = self
            .directories
            .iter()
            .filter_map(|(root, seen)| Some(root.join(target.strip_prefix(seen).ok()?)));
        found.any(|path| std::fs::canonicalize(path).is_ok_and(|path| path == real))
    }
}

/// The path of `to`, relative to `from`. Both are canonical. `None` if `from` contains `to`.
fn relative_path(from: &Path, to: &Path) -> Option<PathBuf> {
    let common = from.components().zip(to.components()).take_while(|(one, other)| one == other).count();
    let up = from.components().skip(common).map(|_| Component::ParentDir);
    let path: PathBuf = up.chain(to.components().skip(common)).collect();
    path.starts_with("..").then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::hint_of;
    use crate::identity::fingerprint::read_links;
    use std::os::unix::fs::symlink;

    const FROM: &str = "from = \"ami-01234567\"\n";

    fn project(toml: &str, links: &[(&str, &str)]) -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        for dir in ["p/.git", "p/web/files", "p/shared-x/sub", "p/common", "p/web2", "outside"] {
            std::fs::create_dir_all(top.path().join(dir)).unwrap();
        }
        for file in ["p/shared-x/conf", "p/shared-x/sub/deep", "p/common/tool", "p/loose", "p/web/files/own"]
        {
            std::fs::write(top.path().join(file), "#!/bin/sh\n").unwrap();
        }
        std::fs::write(top.path().join("p/web/image.toml"), format!("{FROM}{toml}")).unwrap();
        for (link, target) in links {
            let target = target.replace("TOP", top.path().to_str().unwrap());
            symlink(target, top.path().join("p/web").join(link)).unwrap();
        }
        top
    }

    /// The warning, or the error. `DIR` stands for the definition's directory.
    fn checked(top: &tempfile::TempDir) -> Result<Option<String>, String> {
        let dir = top.path().join("p/web");
        let image = Definition::load(&dir).unwrap();
        let shown = |text: String| text.replace(dir.to_str().unwrap(), "DIR");
        let checked = read_links(&image).and_then(|links| check(&image, &links));
        checked.map(|warning| warning.map(shown)).map_err(|error| {
            assert_eq!(Kind::of(&error), Kind::Definition);
            shown(format!("{error:#}\n{}", hint_of(&error).unwrap_or_default()))
        })
    }

    #[test]
    fn links_out_of_the_definition_are_told_with_the_inputs_that_serve_them() {
        let unset = "DIR/image.toml:1: `inputs` is not set, so scripts and tests cannot follow these links out of the \
                     definition: ";
        let cases: &[(&[(&str, &str)], String)] = &[
            (&[("conf", "../shared-x/conf")], format!("{unset}DIR/conf -> ../shared-x/conf. Set inputs = [\"../shared-x\"]")),
            (&[("roles", "../shared-x")], format!("{unset}DIR/roles -> ../shared-x. Set inputs = [\"../shared-x\"]")),
            (
                &[("files/deep", "../../shared-x/sub/deep")],
                format!("{unset}DIR/files/deep -> ../../shared-x/sub/deep. Set inputs = [\"../shared-x/sub\"]"),
            ),
            (
                &[("a", "../shared-x/sub"), ("b", "../shared-x/conf"), ("c", "../common/tool"), ("d", "files/own")],
                format!(
                    "{unset}DIR/a -> ../shared-x/sub, DIR/b -> ../shared-x/conf, DIR/c -> ../common/tool. Set inputs = \
                     [\"../common\", \"../shared-x\"]"
                ),
            ),
            // A way around that ends in the definition works here, but not in scripts.
            (
                &[("around", "../../p/web/files")],
                "DIR: scripts and tests cannot follow these links, and no `inputs` can change this: DIR/around -> \
                 ../../p/web/files. Copy their targets into the definition, or into a directory next to it"
                    .to_owned(),
            ),
            // Scripts do not see the definition's directory by its name.
            (&[("here", "../web/files")], "no `inputs` can change this: DIR/here -> ../web/files. Copy".to_owned()),
            (&[("loose", "../loose")], "no `inputs` can change this: DIR/loose -> ../loose. Copy".to_owned()),
            (&[("far", "../../outside")], "no `inputs` can change this: DIR/far -> ../../outside. Copy".to_owned()),
        ];
        for (links, expected) in cases {
            let top = project("", links);
            let warning = checked(&top).unwrap().unwrap_or_default();
            assert!(warning.contains(&**expected), "{links:?}: {warning}");
            // With the `inputs` that the warning names, there is no warning any more.
            if let Some((_, inputs)) = warning.split_once("Set ") {
                assert_eq!(checked(&project(inputs, links)), Ok(None), "{links:?}");
            }
        }
    }

    #[test]
    fn a_message_lists_few_links_and_few_inputs() {
        let top = project("", &[]);
        for i in 10..70 {
            let dir = format!("p/dir{i}");
            std::fs::create_dir(top.path().join(&dir)).unwrap();
            std::fs::write(top.path().join(&dir).join("conf"), "").unwrap();
            symlink(format!("../dir{i}/conf"), top.path().join(format!("p/web/conf{i}"))).unwrap();
        }
        let warning = checked(&top).unwrap().unwrap();
        assert!(
            warning.contains("DIR/conf19 -> ../dir19/conf, and 50 more. Set inputs = [\"../dir10\""),
            "{warning}"
        );
        assert!(warning.ends_with("\"../dir19\", and 50 more]"), "{warning}");
    }

    #[test]
    fn existing_inputs_stay_and_their_line_is_named() {
        let top = project(
            "\ninputs = [\"../common\"]\n",
            &[("tool", "../common/tool"), ("conf", "../shared-x/conf")],
        );
        let warning = checked(&top).unwrap().unwrap();
        assert!(warning.starts_with("DIR/image.toml:3: `inputs` lacks directories, so scripts"), "{warning}");
        assert!(
            warning
                .ends_with(": DIR/conf -> ../shared-x/conf. Set inputs = [\"../common\", \"../shared-x\"]")
        );
    }

    #[test]
    fn links_that_work_and_links_that_oven_reads_itself_are_not_told() {
        let named = "[[file]]\nsource = \"conf\"\ntarget = \"/etc/x\"\n[[run]]\nscript = \"tool\"\n";
        let (conf, tool) = (("conf", "../shared-x/conf"), ("tool", "../common/tool"));
        assert_eq!(checked(&project(named, &[conf, tool])), Ok(None));
        let inside = [("own", "files/own"), ("files/up", "../image.toml"), ("to-files", "files")];
        assert_eq!(checked(&project("", &inside)), Ok(None));
        // Files whose names begin with a dot do not count.
        assert_eq!(checked(&project("", &[(".lock", "user@host.1:2")])), Ok(None));
    }

    #[test]
    fn absolute_links_are_refused() {
        for (link, target) in [
            ("files/abs", "TOP/p/shared-x/conf"),
            ("own", "TOP/p/web/files/own"),
            ("dir", "TOP/p/shared-x"),
            ("etc", "/etc"),
        ] {
            let top = project("inputs = [\"../shared-x\"]\n", &[(link, target)]);
            let error = checked(&top).unwrap_err();
            let start = format!("DIR/{link}: is a link to the absolute path ");
            assert!(error.starts_with(&start) && error.contains("a relative link to a file"), "{error}");
        }
        // The link leads out of the project, so that it is refused before it is followed.
        let error = checked(&project("", &[("p", "/etc/passwd")])).unwrap_err();
        assert!(
            error.starts_with("DIR/p: is a symbolic link that ") && error.contains("Replace the link"),
            "{error}"
        );
    }
}
