//! Loads definitions with all their parents, and sorts them so that parents come first.

use crate::config::toml_reader::{listed, nearest};
use crate::config::within::resolve_within;
use crate::definition::budget::Budget;
use crate::definition::{BaseSource, Definition, GivenVars};
use crate::error::{Kind, Place};
use crate::sys::fds::PathRefusal;
use crate::text::{ShortList, escape_name};
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

/// The maximal number of definitions that the user did not name, and that are loaded as parents.
const MAX_PARENTS: usize = 64;
/// The maximal number of variables that a hint lists.
const MAX_VARIABLES: usize = 20;

/// Definitions, in an order in which they can be baked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BakeOrder {
    /// Parents come before their children.
    pub images: Vec<Definition>,
    /// For each image, the index of its parent in `images`. `None` if the image is based on an image of the cloud.
    pub parent: Vec<Option<usize>>,
    /// For each image, whether the user named it. The other images were loaded only as parents.
    pub named: Vec<bool>,
}

impl BakeOrder {
    /// Loads these definitions and their parents. A directory that is spelled in several ways is loaded once. Errors:
    /// [`Kind::Definition`], with files and keys, if two definitions have the same name or if definitions form a cycle.
    pub fn load(directories: &[impl AsRef<Path>]) -> Result<Self> {
        Self::load_with(directories, &GivenVars::new())
    }

    /// Like [`Self::load`], but with values of variables from the command line. A value is set in each definition that
    /// declares the variable. Errors: also [`Kind::Usage`] if `given` has a variable that no definition declares.
    pub fn load_with(directories: &[impl AsRef<Path>], given: &GivenVars) -> Result<Self> {
        Self::load_or_list_wrong(directories, given).map_err(|failure| failure.error)
    }

    /// Like [`Self::load_with`], but a failure also lists all errors, and the definitions that are themselves wrong.
    pub fn load_or_list_wrong(
        directories: &[impl AsRef<Path>],
        given: &GivenVars,
    ) -> Result<Self, LoadFailure> {
        let mut loader = Loader { given: given.clone(), ..Loader::default() };
        let ended = loader.load_all(directories);
        let (mut errors, wrong) = (std::mem::take(&mut loader.errors), std::mem::take(&mut loader.wrong));
        errors.extend(ended.err());
        if errors.is_empty() {
            let images = loader.images.clone();
            return loader.into_order().map_err(|error| LoadFailure::new(vec![error], wrong, images));
        }
        Err(LoadFailure::new(errors, wrong, loader.images))
    }
}

/// Why definitions could not be loaded.
#[derive(Debug)]
pub struct LoadFailure {
    /// The first failure.
    pub error: anyhow::Error,
    /// The other failures.
    pub others: Vec<anyhow::Error>,
    /// The directories of the definitions that have mistakes themselves. Other definitions of the same command line may
    /// be right.
    pub wrong: Vec<PathBuf>,
    /// The definitions that have no mistakes themselves.
    pub images: Vec<Definition>,
}

impl LoadFailure {
    /// `errors` has at least one element.
    fn new(mut errors: Vec<anyhow::Error>, wrong: Vec<PathBuf>, images: Vec<Definition>) -> Self {
        Self { error: errors.remove(0), others: errors, wrong, images }
    }
}

#[derive(Default)]
struct Loader {
    given: GivenVars,
    /// What is read of all parents together. A definition that the user named has its own budget.
    parents: Budget,
    /// Indexes of `images` by canonical path.
    known: HashMap<PathBuf, usize>,
    images: Vec<Definition>,
    /// For each image, the index of its parent in `images`. This vector is shorter than `images` until all parents are
    /// loaded.
    parent: Vec<Option<usize>>,
    named: Vec<bool>,
    /// The directories of definitions that have mistakes.
    wrong: Vec<PathBuf>,
    /// The canonical paths of `wrong`.
    failed: BTreeSet<PathBuf>,
    /// The mistakes of definitions, in the order in which they were found.
    errors: Vec<anyhow::Error>,
}

impl Loader {
    /// Loads the definitions that the user named, and their parents. Mistakes are recorded. Any other error ends it.
    fn load_all(&mut self, directories: &[impl AsRef<Path>]) -> Result<()> {
        for directory in directories {
            let loaded = self.load(directory.as_ref(), None);
            self.record(loaded)?;
        }
        // `images` grows during the loop, because parents are added to it.
        let mut next = 0;
        while next < self.images.len() {
            let loaded = self.load_parent(next);
            let parent = self.record(loaded)?;
            self.parent.push(parent);
            next += 1;
        }
        let unique = self.refuse_duplicate_names();
        self.record(unique.map(|()| None))?;
        // A definition that could not be read may declare the variable.
        if self.errors.is_empty() { self.refuse_unknown_variables() } else { Ok(()) }
    }

    /// Records a mistake of a definition. Fails with any other error.
    fn record(&mut self, loaded: Result<Option<usize>>) -> Result<Option<usize>> {
        match loaded {
            Err(error) if Kind::of(&error) == Kind::Definition => {
                self.errors.push(error);
                Ok(None)
            }
            other => other,
        }
    }

    /// Loads the parent of a definition, if it has one.
    fn load_parent(&mut self, index: usize) -> Result<Option<usize>> {
        let image = &self.images[index];
        let BaseSource::Parent(directory) = &image.from else { return Ok(None) };
        let place = image.place("from", None);
        self.ensure_parent_in_project(directory, image, &place)?;
        let directory = normalize(directory);
        self.ensure_few_parents(&directory, &place)?;
        self.load(&directory, Some(index)).with_context(|| format!("loading the parent definition ({place})"))
    }

    /// Loads a definition, unless it is already loaded. `child` is the index of the definition whose parent it is.
    /// `None` means that the user named it. Returns `None` if its mistakes were already found.
    fn load(&mut self, directory: &Path, child: Option<usize>) -> Result<Option<usize>> {
        // An error is ignored here, because `load_with` reports it with a better message.
        let real = std::fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
        if self.failed.contains(&real) {
            return Ok(None);
        }
        if let Some(index) = self.known.get(&real) {
            return Ok(Some(*index));
        }
        let image = match child {
            None => Definition::load_with(directory, &self.given),
            Some(child) => {
                let project = &self.images[child].project;
                Definition::load_within(directory, &self.given, Some(project), &self.parents)
            }
        };
        let image = image.inspect_err(|error| {
            if Kind::of(error) == Kind::Definition {
                self.wrong.push(directory.to_owned());
                self.failed.insert(real.clone());
            }
        })?;
        self.images.push(image);
        self.named.push(child.is_none());
        self.known.insert(real, self.images.len() - 1);
        Ok(Some(self.images.len() - 1))
    }

    /// Checks that a parent is in the project of its child, or that the user named it. Otherwise the definition of a
    /// stranger could make oven read any definition of this machine. The error does not depend on what is outside.
    fn ensure_parent_in_project(&self, directory: &Path, child: &Definition, place: &Place) -> Result<()> {
        let start = std::fs::canonicalize(&child.dir).map_err(|e| {
            Kind::Definition.error(format!("{}: cannot be read: {e}", escape_name(&child.dir)))
        })?;
        let spelt = directory.strip_prefix(&child.dir).unwrap_or(directory);
        match resolve_within(&start, spelt, &child.project) {
            // A path with `..` after the first place outside is not looked up: it would tell whether that place exists.
            Err(PathRefusal::Outside(place))
                if place.components().all(|part| part != Component::ParentDir) =>
            {
                if std::fs::canonicalize(&place).is_ok_and(|real| self.known.contains_key(&real)) {
                    return Ok(());
                }
            }
            Err(PathRefusal::Outside(_)) => (),
            // `load` describes other errors.
            _ => return Ok(()),
        }
        let (shown, project) = (escape_name(directory), escape_name(&child.project));
        Err(Kind::Definition
            .failure(format!("{place} names {shown}, which is outside the project {project}"))
            .at(place)
            .hint(format!(
                "If you trust that definition, name its directory on the command line, too: {shown}. Or create an \
                 oven.toml, which may be empty, in a directory that contains both."
            ))
            .into())
    }

    /// Checks that a parent is loaded already, or is not one too many.
    fn ensure_few_parents(&self, directory: &Path, place: &Place) -> Result<()> {
        let is_known = std::fs::canonicalize(directory).is_ok_and(|real| self.known.contains_key(&real));
        if is_known || self.named.iter().filter(|named| !**named).count() < MAX_PARENTS {
            return Ok(());
        }
        Err(Kind::Definition
            .failure(format!("{place} needs one more parent, but oven loads at most {MAX_PARENTS} parent definitions"))
            .at(place)
            .hint(
                "Base one of the definitions on an image: `from = \"ami-…\"`. Or name some of the parents on the \
                 command line, too, because these do not count.",
            )
            .into())
    }

    fn refuse_duplicate_names(&self) -> Result<()> {
        let mut names: BTreeMap<&str, &Definition> = BTreeMap::new();
        for image in &self.images {
            let Some(other) = names.insert(&image.name, image) else { continue };
            let shown = |image: &Definition| match image.name_is_default {
                true => format!("{} (the directory's name)", escape_name(&image.dir)),
                false => image.place("name", None).to_string(),
            };
            let (first, second) = (shown(other), shown(image));
            return Err(Kind::Definition
                .failure(format!("two definitions have the name {:?}: {first} and {second}", image.name))
                .at(&image.place("name", None))
                .hint("Each definition needs a unique name, because its images are found by that name. Set `name` in \
                       one of them.")
                .into());
        }
        Ok(())
    }

    fn refuse_unknown_variables(&self) -> Result<()> {
        let declared = || self.images.iter().flat_map(|image| image.vars.declared.keys().map(String::as_str));
        let Some(name) = self.given.keys().find(|name| !declared().any(|known| known == *name)) else {
            return Ok(());
        };
        let known: Vec<_> = declared().collect::<BTreeSet<_>>().into_iter().collect();
        let hint = match nearest(name, &known) {
            Some(similar) => format!("Did you mean `{similar}`?"),
            None if known.is_empty() => {
                "Declare the variable and its default value in [vars] of image.toml.".to_owned()
            }
            None if known.len() <= MAX_VARIABLES => format!("The declared variables are {}.", listed(&known)),
            None => {
                let mut list = ShortList::new(MAX_VARIABLES);
                known.iter().for_each(|name| list.add(|| format!("`{name}`")));
                format!("The declared variables are {}.", list.join(", "))
            }
        };
        Err(Kind::Usage
            .failure(format!("--var {name}: no definition declares this variable"))
            .hint(hint)
            .into())
    }

    /// Sorts the images: parents come first. Apart from this, the images are in the order in which the user named them.
    fn into_order(self) -> Result<BakeOrder> {
        let mut sequence: Vec<usize> = Vec::new();
        // The position of each image in `sequence`.
        let mut positions = vec![None; self.images.len()];
        for start in 0..self.images.len() {
            // Each image has at most one parent. So this loop follows the chain of parents to its end, or to an image
            // that already has a position.
            let mut chain = Vec::new();
            let mut at = Some(start);
            while let Some(index) = at.filter(|index| positions[*index].is_none()) {
                if let Some(begin) = chain.iter().position(|seen| *seen == index) {
                    return Err(self.cycle_error(&chain[begin..]));
                }
                chain.push(index);
                at = self.parent[index];
            }
            for index in chain.into_iter().rev() {
                positions[index] = Some(sequence.len());
                sequence.push(index);
            }
        }
        let mut images: Vec<_> = self.images.into_iter().map(Some).collect();
        Ok(BakeOrder {
            parent: sequence
                .iter()
                .map(|index| self.parent[*index].and_then(|parent| positions[parent]))
                .collect(),
            named: sequence.iter().map(|index| self.named[*index]).collect(),
            images: sequence.iter().filter_map(|index| images[*index].take()).collect(),
        })
    }

    fn cycle_error(&self, chain: &[usize]) -> anyhow::Error {
        let links = chain.iter().enumerate().map(|(i, index)| {
            let parent = &self.images[chain[(i + 1) % chain.len()]];
            (self.images[*index].place("from", None), escape_name(&parent.dir))
        });
        let links: Vec<_> = links.collect();
        let lines: Vec<_> = links.iter().map(|(place, parent)| format!("{place} names {parent}")).collect();
        Kind::Definition
            .failure(format!("the definitions form a cycle:\n{}", lines.join("\n")))
            .at(&links[0].0)
            .hint("Base one of them on an image: `from = \"ami-…\"`.")
            .into()
    }
}

/// Normalizes `examples/web/../base` to `examples/base`, if both are the same directory. (If `examples/web` is a
/// symbolic link, they can be different directories.)
fn normalize(path: &Path) -> PathBuf {
    let mut normalized = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir
                if matches!(normalized.components().next_back(), Some(Component::Normal(_))) =>
            {
                normalized.pop();
            }
            Component::CurDir => (),
            other => normalized.push(other),
        }
    }
    if normalized.as_os_str().is_empty() {
        normalized.push(".");
    }
    let is_same = std::fs::canonicalize(&normalized)
        .ok()
        .is_some_and(|real| std::fs::canonicalize(path).ok() == Some(real));
    if is_same { normalized } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::given;
    use crate::error::hint_of;

    /// Writes definitions. For each definition, `images` has the directory and the text of image.toml.
    fn tree(images: &[(&str, &str)]) -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        for (dir, toml) in images {
            std::fs::create_dir_all(top.path().join(dir)).unwrap();
            let toml = toml.replace("AMI", "ami-0123456789abcdef0");
            std::fs::write(top.path().join(dir).join("image.toml"), toml).unwrap();
        }
        top
    }

    fn order(top: &Path, named: &[&str]) -> Result<BakeOrder, (String, String)> {
        let directories: Vec<_> = named.iter().map(|dir| top.join(dir)).collect();
        BakeOrder::load(&directories).map_err(|e| {
            assert_eq!(Kind::of(&e), Kind::Definition, "{e:#}");
            (format!("{e:#}").replace(top.to_str().unwrap(), "DIR"), hint_of(&e).unwrap_or_default())
        })
    }

    /// For each image: its path below `top`, its parent, and whether it was named.
    fn shape(top: &Path, order: &BakeOrder) -> Vec<(String, Option<usize>, bool)> {
        let relative = |image: &Definition| image.dir.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
        let images = order.images.iter().zip(&order.parent).zip(&order.named);
        images.map(|((image, parent), named)| (relative(image), *parent, *named)).collect()
    }

    #[test]
    fn parents_are_loaded_and_come_first() {
        let top = tree(&[
            ("base", "from = \"AMI\""),
            ("mid", "from = \"../base\""),
            ("web", "from = \"../mid\""),
            ("db", "from = \"../mid/.\""),
            ("other", "from = \"AMI\""),
        ]);
        let found = order(top.path(), &["web", "other", "db/"]).unwrap();
        let expected = [
            ("base", None, false),
            ("mid", Some(0), false),
            ("web", Some(1), true),
            ("other", None, true),
            ("db", Some(1), true),
        ];
        let expected = expected.map(|(dir, parent, named)| (dir.to_owned(), parent, named));
        assert_eq!(shape(top.path(), &found), expected);
    }

    #[test]
    fn one_directory_is_one_definition_however_it_is_spelt() {
        let top = tree(&[("base", "from = \"AMI\""), ("web", "from = \"../base\"")]);
        std::os::unix::fs::symlink("base", top.path().join("alias")).unwrap();
        let found = order(top.path(), &["web", "./alias", "base", "web/../web"]).unwrap();
        let expected = [("alias".to_owned(), None, true), ("web".to_owned(), Some(0), true)];
        assert_eq!(shape(top.path(), &found), expected);
    }

    #[test]
    fn a_symbolic_link_in_the_path_of_a_parent_is_followed() {
        let top = tree(&[("far/base", "from = \"AMI\""), ("far/web", "from = \"../base\"")]);
        std::os::unix::fs::symlink("far/web", top.path().join("web")).unwrap();
        // DIR/web/../base is DIR/far/base. DIR/base does not exist.
        let found = order(top.path(), &["web"]).unwrap();
        assert_eq!(shape(top.path(), &found)[0], ("web/../base".into(), None, false));
    }

    #[test]
    fn a_cycle_names_its_files_and_keys() {
        let top = tree(&[
            ("a", "from = \"../b\""),
            ("b", "name = \"b\"\nfrom = \"../c\""),
            ("c", "from = \"../b\""),
            ("self", "from = \".\""),
        ]);
        let (error, hint) = order(top.path(), &["a"]).unwrap_err();
        assert_eq!(
            error,
            "the definitions form a cycle:\n\
             DIR/b/image.toml:2: `from` names DIR/c\n\
             DIR/c/image.toml:1: `from` names DIR/b"
        );
        assert!(hint.contains("Base one of them on an image"), "{hint}");
        let (error, _) = order(top.path(), &["self"]).unwrap_err();
        assert!(error.ends_with("DIR/self/image.toml:1: `from` names DIR/self"), "{error}");
    }

    #[test]
    fn duplicate_names_are_refused() {
        let top = tree(&[("a/web", "from = \"AMI\""), ("b", "from = \"AMI\"\nname = \"web\"")]);
        let (error, hint) = order(top.path(), &["a/web", "b"]).unwrap_err();
        assert_eq!(
            error,
            "two definitions have the name \"web\": DIR/a/web (the directory's name) and DIR/b/image.toml:2: `name`"
        );
        assert!(hint.contains("Set `name`"), "{hint}");
    }

    #[test]
    fn a_mistake_in_a_parent_names_the_child_too() {
        let top = tree(&[("base", "form = \"AMI\""), ("web", "from = \"../base\"")]);
        let (error, _) = order(top.path(), &["web"]).unwrap_err();
        assert!(
            error.starts_with(
                "loading the parent definition (DIR/web/image.toml:1: `from`): DIR/base/image.toml:1: "
            ),
            "{error}"
        );
    }

    #[test]
    fn a_failure_lists_the_definitions_that_are_wrong_themselves() {
        let top = tree(&[
            ("good", "from = \"AMI\""),
            ("wrong", "frm = 1"),
            ("child", "from = \"../wrong\""),
            ("same", "from = \"AMI\"\nname = \"good\""),
            ("cycle", "from = \".\""),
        ]);
        let (one, unknown) = (given("x=1").unwrap(), "--var x: no definition declares this variable");
        let cases = [
            (vec!["good", "gone"], vec!["gone"], "DIR/gone: directory not found"),
            (vec!["good", "wrong", "gone"], vec!["wrong", "gone"], "DIR/wrong/image.toml:1: "),
            // A definition is wrong only once, even if it is also a parent.
            (vec!["wrong", "./wrong/", "child"], vec!["wrong"], "DIR/wrong/image.toml:1: "),
            // The parent is wrong. Its child is not.
            (vec!["good", "child"], vec!["wrong"], "loading the parent definition (DIR/child/image.toml:1: "),
            (vec!["good", "same"], vec![], "two definitions have the name \"good\""),
            (vec!["good", "cycle"], vec![], "the definitions form a cycle"),
            (vec!["good"], vec![], unknown),
        ];
        for (named, expected, message) in cases {
            let directories: Vec<_> = named.iter().map(|dir| top.path().join(dir)).collect();
            let vars = if message == unknown { GivenVars::from([one.clone()]) } else { GivenVars::new() };
            let failure = BakeOrder::load_or_list_wrong(&directories, &vars).unwrap_err();
            let error = format!("{:#}", failure.error).replace(top.path().to_str().unwrap(), "DIR");
            assert!(error.starts_with(message), "{named:?}: {error}");
            let wrong = failure.wrong.iter().map(|dir| dir.file_name().unwrap().to_str().unwrap());
            assert_eq!(wrong.collect::<Vec<_>>(), expected, "{named:?}");
            assert_eq!(
                failure.others.len(),
                expected.len().saturating_sub(1),
                "{named:?}: {:?}",
                failure.others
            );
        }
    }

    #[test]
    fn an_unknown_variable_has_one_sentence_of_advice() {
        let top = tree(&[("web", "from = \"AMI\"\n[vars]\nversion = \"1\"\nport = \"80\"")]);
        for (name, advice) in [
            ("versoin", "Did you mean `version`?"),
            ("prot", "Did you mean `port`?"),
            ("x", "The declared variables are `port` and `version`."),
        ] {
            let vars = GivenVars::from([(name.to_owned(), String::new())]);
            let error = BakeOrder::load_with(&[top.path().join("web")], &vars).unwrap_err();
            assert_eq!(error.to_string(), format!("--var {name}: no definition declares this variable"));
            assert_eq!(hint_of(&error).as_deref(), Some(advice));
        }
    }

    #[test]
    fn a_long_chain_is_sorted() {
        let images: Vec<_> =
            (0..300).map(|i| (format!("d{i}"), format!("from = \"../d{}\"", i + 1))).collect();
        let mut images: Vec<(&str, &str)> = images.iter().map(|(dir, toml)| (&**dir, &**toml)).collect();
        images.push(("d300", "from = \"AMI\""));
        let top = tree(&images);
        // The user names most of them, because the number of other parents is limited.
        let named: Vec<_> = (0..=300).filter(|i| i % 6 != 1).map(|i| format!("d{i}")).collect();
        let named: Vec<_> = named.iter().map(String::as_str).collect();
        let found = order(top.path(), &named).unwrap();
        assert_eq!(
            (found.images.len(), found.parent[300], found.images[0].name.as_str()),
            (301, Some(299), "d300")
        );
    }

    #[test]
    fn the_parents_together_have_limits() {
        let chain = |count: usize, more: &str| {
            let toml = |i: usize| format!("from = \"../d{}\"\n{more}", i + 1);
            let mut images: Vec<_> = (0..count).map(|i| (format!("d{i}"), toml(i))).collect();
            images.push((format!("d{count}"), format!("from = \"AMI\"\n{more}")));
            let images: Vec<_> = images.iter().map(|(dir, toml)| (&**dir, &**toml)).collect();
            tree(&images)
        };
        let top = chain(64, "");
        assert_eq!(order(top.path(), &["d0"]).unwrap().images.len(), 65);
        let top = chain(65, "");
        let (error, hint) = order(top.path(), &["d0"]).unwrap_err();
        let limit = "DIR/d64/image.toml:1: `from` needs one more parent, but oven loads at most 64 parent definitions";
        assert_eq!(error, limit);
        assert!(hint.contains("name some of the parents on the command line"), "{hint}");
        assert_eq!(order(top.path(), &["d0", "d65"]).unwrap().images.len(), 66);
        // The text of d0 does not count, because the user named it.
        let comment = format!("#{}\n", "x".repeat((1 << 20) - 100));
        let top = chain(4, &comment);
        assert_eq!(order(top.path(), &["d0"]).unwrap().images.len(), 5);
        let top = chain(5, &comment);
        let (error, _) = order(top.path(), &["d0"]).unwrap_err();
        assert!(
            error.ends_with(
                "DIR/d5/image.toml cannot be used, because the files image.toml of a definition, or of all its parent \
                 definitions together, may have at most 4 MiB: use smaller files or fewer parent definitions"
            ),
            "{error}"
        );
    }

    #[test]
    fn a_parent_does_not_widen_the_project() {
        let top = tree(&[("project/web", "from = \"..\""), ("project", "from = \"AMI\"")]);
        let real = top.path().canonicalize().unwrap();
        std::fs::create_dir(top.path().join("sibling")).unwrap();
        std::fs::write(top.path().join("sibling/secret"), "secret").unwrap();
        let found = order(top.path(), &["project/web"]).unwrap();
        assert_eq!(found.images[0].project, real.join("project"));
        assert_eq!(found.images[0].reload().unwrap(), found.images[0]);
        // The user trusts a directory that is on the command line.
        let found = order(top.path(), &["project"]).unwrap();
        assert_eq!(found.images[0].project, real);
        std::os::unix::fs::symlink("../sibling/secret", top.path().join("project/x")).unwrap();
        for more in ["[[file]]\nsource = \"x\"\ntarget = \"/x\"\n", "inputs = [\"../sibling\"]\n"] {
            let toml = format!("from = \"ami-0123456789abcdef0\"\n{more}");
            std::fs::write(top.path().join("project/image.toml"), toml).unwrap();
            let (error, _) = order(top.path(), &["project/web"]).unwrap_err();
            assert!(error.contains("outside the project DIR/project ("), "{error}");
            assert!(order(top.path(), &["project"]).is_ok());
        }
        std::fs::write(top.path().join("project/image.toml"), "from = \"../sibling\"\n").unwrap();
        let (error, _) = order(top.path(), &["project/web"]).unwrap_err();
        assert!(error.contains("sibling, which is outside the project DIR/project"), "{error}");
    }
}
