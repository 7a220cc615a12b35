//! A definition: a directory with `image.toml` and the files that it names. `read` calls the code that reads and checks
//! each key. The header of `keys/mod.rs` says which check is where.

mod attributes;
mod budget;
mod clean;
mod from;
pub mod graph;
pub mod keys;
mod packages;
mod paths;
mod refusal;
mod repositories;
mod scripts;
#[cfg(test)]
mod tests;
pub(crate) mod validate;
mod vars;

use crate::cloud::{BaseRef, Tags, VolumeKind};
use crate::config::template;
use crate::config::toml_reader;
use crate::config::toml_reader::{Table, until_stopped};
use crate::error::{Kind, Place};
use crate::text::escape_name;
use anyhow::Result;
pub use attributes::{RegistrationSettings, misfits};
use budget::Budget;
pub use keys::{DEFAULT_TYPE, UEFI};
use oven_distro::{Conffiles, Repository, Upgrade};
use paths::Sources;
pub use scripts::{Playbook, Program, Script, ScriptKind};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use toml::de::DeValue;
pub use vars::{GivenVars, Vars, given};
pub(crate) use vars::{free_name, variable_name};

/// The file that makes a directory a definition.
pub const FILE: &str = "image.toml";
/// The hint of an error for a directory that does not exist.
pub(crate) const DIRECTORY_HINT: &str = "A definition is a directory with an image.toml.";

/// The base of a definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseSource {
    Image(BaseRef),
    /// The parent definition's directory: the path in image.toml, joined to the directory of this definition.
    Parent(PathBuf),
}

/// A package that a definition requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PackageRequest {
    Named {
        name: String,
        version: Option<String>,
        /// The suite of an apt repository that the package comes from.
        suite: Option<String>,
    },
    Group {
        name: String,
    },
    File {
        source: PathBuf,
        package: crate::formats::package::PackageFile,
    },
    /// A package file that is downloaded before the plugin plans the installation ([`crate::bake::download`]).
    Url {
        url: String,
        /// Lower-case hexadecimal.
        sha256: String,
        file: Option<DownloadedFile>,
    },
}

/// A package file that was downloaded to this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownloadedFile {
    pub source: PathBuf,
    pub package: crate::formats::package::PackageFile,
}

/// `[[file]]`: a file that is copied into the image after the packages are installed, or after the scripts ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// A path on this machine, in the definition's directory or in one of its `inputs`.
    pub source: PathBuf,
    /// An absolute path in the image.
    pub target: String,
    /// Permission bits. The default is 0755 if the source is executable, else 0644.
    pub mode: u32,
    /// A user's name or number in the image. The default is root.
    pub owner: String,
    pub group: String,
    /// Whether the file is a template, in which `{{ name }}` stands for a variable.
    pub template: bool,
    /// Whether the file is placed after all `[[run]]` and `[[ansible]]`, and not before.
    pub after_run: bool,
}

impl Default for BaseSource {
    fn default() -> Self {
        Self::Parent(PathBuf::new())
    }
}

/// A definition, read and checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Definition {
    /// The definition's directory, as the user spelt it.
    pub dir: PathBuf,
    /// The canonical path of the project directory. All files of the definition must be below this directory. This
    /// includes the files in `inputs` and the targets of symbolic links.
    pub project: PathBuf,
    /// The definition's name. The names of its images begin with it.
    pub name: String,
    /// True if image.toml sets no name. In that case `name` is the name of the definition's directory.
    pub name_is_default: bool,
    pub description: String,
    pub from: BaseSource,
    pub packages: Vec<PackageRequest>,
    pub repositories: Vec<Repository>,
    pub hold: Vec<String>,
    /// `PACKAGE QUESTION TYPE VALUE`
    pub debconf: Vec<String>,
    pub files: Vec<File>,
    /// `[[run]]` and `[[ansible]]`, in the order of the file.
    pub runs: Vec<Script>,
    pub tests: Vec<Script>,
    pub vars: Vars,
    pub size_gib: Option<u64>,
    /// The attributes that `[disk]` sets for the image's root volume. The volume on which the bake works also gets
    /// them.
    pub volume: VolumeKind,
    /// Whether steps can write to the device nodes of the image's disk. Tests never can.
    pub disk_writable: bool,
    /// `[image]`
    pub registered: RegistrationSettings,
    pub tags: Tags,
    /// Paths relative to `dir`, as image.toml spells them.
    pub inputs: Vec<String>,
    /// The plugin's name. `None` stands for the plugin that claims the base image.
    pub distro: Option<String>,
    pub upgrade: Upgrade,
    pub recommends: bool,
    pub conffiles: Conffiles,
    /// How files get their SELinux labels if the image enables SELinux.
    pub selinux: Selinux,
    pub network: bool,
    /// Whether steps that have the network can reach the builder's metadata service, and through it the builder's
    /// credentials.
    pub imds: bool,
    /// `[clean] keep`: paths that the clean-up does not change. The lint, which is the check after the clean-up,
    /// accepts them.
    pub keep: Vec<String>,
    /// `[clean] remove`: paths that the clean-up removes.
    pub remove: Vec<String>,
}

/// How files get their SELinux labels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Selinux {
    /// During the bake, by the image's own policy.
    #[default]
    Label,
    /// Each instance labels them when it first boots.
    Autorelabel,
}

impl Definition {
    /// Reads image.toml in `dir`. Checks its content, and checks that all files that it names exist. An error lists
    /// every mistake, each with file, line and key.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::load_with(dir, &GivenVars::new())
    }

    /// Like [`Self::load`], but the values in `given` override the defaults of variables.
    pub fn load_with(dir: &Path, given: &GivenVars) -> Result<Self> {
        Self::load_within(dir, given, None, &Budget::default())
    }

    /// Reads this definition again.
    pub fn reload(&self) -> Result<Self> {
        Self::load_within(&self.dir, &self.vars.given, Some(&self.project), &Budget::default())
    }

    /// Like [`Self::load_with`], but the definition's project is at most `within`, if the definition is in it. This is
    /// the project of the child by which the definition was found.
    fn load_within(dir: &Path, given: &GivenVars, within: Option<&Path>, budget: &Budget) -> Result<Self> {
        let real = directory(dir)?;
        let file = dir.join(FILE);
        let own = paths::project(&real);
        let narrower = within.filter(|within| real.starts_with(within) && within.starts_with(&own));
        let project = narrower.unwrap_or(&own).to_owned();
        let text = toml_reader::read_text(&file, &project)?;
        // `Self::read` returns `None` only if it has recorded a mistake. In that case `toml_reader::read` fails, so the
        // error below is never returned.
        let invalid = |what: &str| Kind::Definition.error(format!("{} {what}", escape_name(&file)));
        budget.add_text(&text).map_err(|what| invalid(&what))?;
        let templates = template::Checker::default();
        let read = toml_reader::read(&file, &text, &keys::IMAGE_TOML, |top| {
            let (sources, inputs) = Sources::new(dir, &real, &project, budget).with_inputs(top);
            Self::read(&sources, inputs, top, given, &templates)
        });
        // If this machine failed, nothing is known about mistakes.
        templates.into_failure()?;
        read?.ok_or_else(|| invalid("is not a valid definition"))
    }

    fn read(
        sources: &Sources,
        inputs: Vec<String>,
        top: &Table,
        given: &GivenVars,
        templates: &template::Checker,
    ) -> Option<Self> {
        let (dir, real) = (&sources.dir, sources.real());
        let vars = Vars::read(top, given);
        let scripts = |kind| scripts::read(top, kind, sources, &vars);
        let mut runs = scripts(ScriptKind::Run);
        runs.extend(scripts(ScriptKind::Ansible));
        runs.sort_by_key(|run| run.line);
        let (files, tests, tags) =
            (read_files(top, sources, &vars, templates), scripts(ScriptKind::Test), validate::tags(top));
        let (size_gib, volume, disk_writable) = attributes::disk(top);
        let (packages, clean) = (packages::read(top, sources), clean::read(top, &files));
        let (name, from) = (validate::name(top, real), from::read(top, sources));
        let definition = Self {
            dir: dir.to_owned(),
            project: sources.project.clone(),
            name_is_default: !top.has("name"),
            description: validate::description(top),
            packages,
            repositories: repositories::read(top, sources),
            hold: repositories::hold(top),
            debconf: repositories::debconf(top),
            files,
            runs,
            tests,
            vars,
            size_gib,
            volume,
            disk_writable,
            registered: attributes::image(top),
            tags,
            inputs,
            distro: read_distro(top),
            upgrade: read_upgrade(top).unwrap_or_default(),
            recommends: top.flag("recommends"),
            conffiles: read_conffiles(top).unwrap_or_default(),
            selinux: read_selinux(top).unwrap_or_default(),
            network: top.flag("network"),
            imds: top.flag("imds"),
            keep: clean.keep,
            remove: clean.remove,
            name: name?,
            from: from?,
        };
        Some(definition)
    }

    /// The directories that the checksum covers: `dir`, and each of `inputs` joined to `dir`.
    pub fn directories(&self) -> Vec<PathBuf> {
        paths::directories(&self.dir, &self.inputs)
    }

    /// The place in image.toml where a package is named: in `packages` or in `hold`. For `None`, the place of `packages`.
    pub fn place_of_package(&self, name: Option<&str>) -> Place {
        let Some(name) = name else { return self.place("packages", None) };
        let bare = |spelt: &str| spelt.split(':').next() == Some(name) || spelt == name;
        let names = |request: &PackageRequest| match request {
            PackageRequest::Named { name: asked, .. } => bare(asked),
            PackageRequest::Group { name: asked } => name.strip_prefix('@') == Some(asked.as_str()),
            PackageRequest::File { package, source } => package.name == name || source == Path::new(name),
            PackageRequest::Url { url, .. } => url == name,
        };
        if let Some(index) = self.packages.iter().position(names) {
            return self.place(&format!("packages[{index}]"), None);
        }
        match self.hold.iter().position(|held| bare(held)) {
            Some(index) => self.place(&format!("hold[{index}]"), None),
            None => self.place("packages", None),
        }
    }

    /// The place of a key of a `[[file]]`.
    pub fn place_of_file(&self, file: &File, key: &str) -> Place {
        match self.files.iter().position(|other| other.target == file.target) {
            Some(index) => self.place(&format!("file[{index}].{key}"), None),
            None => self.place(&format!("file.{key}"), None),
        }
    }

    /// The place of a key of a `[[run]]`, `[[ansible]]` or `[[test]]`. `value` selects an element as in [`Self::place`].
    pub fn place_of_script(&self, script: &Script, key: &str, value: Option<&str>) -> Place {
        let mut scripts = self.runs.iter().chain(&self.tests).filter(|other| other.kind == script.kind);
        let index = scripts.position(|other| other == script);
        let index = index.unwrap_or_default();
        self.place(&format!("{}[{index}].{key}", script.kind.key()), value)
    }

    /// The place of a `[[run]]`, `[[ansible]]` or `[[test]]` in image.toml. Its text is the file and the line.
    pub fn place_of_table(&self, table: &str, line: usize) -> Place {
        Place::new(escape_name(&self.dir.join(FILE)), Some(line), Some(table.to_owned()), "")
    }

    /// The place of a key in image.toml, such as `examples/web/image.toml:4: `packages``. Some mistakes, such as an
    /// unknown package, are found only after the file was read. Messages about them begin with the place. The key
    /// `iops` of `[disk]` is spelt `disk.iops`, and the key `owner` of the second `[[file]]` is `file[1].owner`. If the
    /// key's value is an array, `value` selects the element whose line is returned: one that is this text, or a table
    /// with it. If the key is missing, the line is that of its table. If the file cannot be read, the place has no line.
    pub fn place(&self, path: &str, value: Option<&str>) -> Place {
        let file = self.dir.join(FILE);
        let line = toml_reader::read_text(&file, &self.project)
            .ok()
            .and_then(|text| toml_reader::line_of(&text, path, &|element| value == Some(element)));
        let bare = |part: &str| part.split('[').next().unwrap_or_default().to_owned();
        let what = match path.rsplit_once('.') {
            Some((table, key)) if table.ends_with(']') => format!("`{}` of [[{}]]", bare(key), bare(table)),
            Some((table, key)) => format!("`{}` of [{}]", bare(key), bare(table)),
            None => format!("`{}`", bare(path)),
        };
        let key = path.split('.').map(bare).collect::<Vec<_>>().join(".");
        Place::new(escape_name(&file), line, Some(key), &what)
    }
}

/// The project of a directory: see [`Definition::project`]. A link in the directory must not lead out of the project.
pub fn project_of(dir: &Path) -> Option<PathBuf> {
    std::fs::canonicalize(dir).ok().map(|real| paths::project(&real))
}

/// The canonical path of a directory, which must contain an image.toml.
fn directory(dir: &Path) -> Result<PathBuf> {
    let shown = escape_name(dir);
    let real = std::fs::canonicalize(dir).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Kind::Definition.failure(format!("{shown}: directory not found")).hint(DIRECTORY_HINT)
        }
        _ => Kind::Definition.failure(format!("{shown}: cannot be read: {e}")),
    })?;
    if !real.is_dir() {
        let failure = Kind::Definition.failure(format!("{shown} is a file, but a definition is a directory"));
        let parent = dir.parent().filter(|_| dir.file_name().is_some_and(|name| name == FILE));
        let Some(parent) = parent else { return Err(failure.into()) };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        return Err(failure.hint(format!("Give the directory of that file: {}", escape_name(parent))).into());
    }
    if std::fs::symlink_metadata(real.join(FILE)).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        let place = Place::new(escape_name(&dir.join(FILE)), None, None, "");
        return Err(Kind::Definition
            .failure(format!("{place}: file not found"))
            .at(&place)
            .hint(format!(
                "A definition is a directory with an {FILE}, which needs at least `from = \"ami-…\"`."
            ))
            .into());
    }
    Ok(real)
}

fn read_files(top: &Table, sources: &Sources, vars: &Vars, templates: &template::Checker) -> Vec<File> {
    let mut targets = BTreeMap::new();
    // With an incomplete set of variables, a template that is right cannot be rendered.
    let (vars, can_render) = (vars.values(), !vars.has_mistakes);
    let files = until_stopped(top.tables("file")).filter_map(|table| {
        let (source, target) = (table.string("source"), table.string("target"));
        let template = table.flag("template");
        let source = source.and_then(|at| {
            let source = table.check("source", at.line, sources.file(at.value))?;
            let check = || templates.check(&source.path, &sources.project, &vars);
            let rendered = if template && can_render { sources.budget.render(check) } else { Ok(()) };
            table.check("source", at.line, rendered).map(|()| source)
        });
        let target = target.and_then(|at| {
            let target = table.check("target", at.line, validate::target(at.value))?;
            match targets.insert(target.clone(), at.line) {
                None => Some(target),
                Some(first) => {
                    table.wrong("target", at.line, format!("is the same as on line {first}: remove one"))
                }
            }
        });
        let mode = if table.has("mode") { Some(validate::mode(&table)) } else { None };
        let (owner, group) = (validate::account(&table, "owner"), validate::account(&table, "group"));
        let after_run = table.word("after").is_some_and(|at| at.value == "run");
        let source = source?;
        let default = if source.executable { 0o755 } else { 0o644 };
        Some(File {
            target: target?,
            mode: mode.unwrap_or(Some(default))?,
            owner: owner?,
            group: group?,
            source: source.path,
            template,
            after_run,
        })
    });
    files.collect()
}

fn read_distro(top: &Table) -> Option<String> {
    let at = top.string("distro")?;
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
    let good = !at.value.is_empty() && at.value.chars().all(plain);
    if good { Some(at.value.to_owned()) } else { top.unexpected("distro", &at) }
}

fn read_upgrade(top: &Table) -> Option<Upgrade> {
    let at = top.value("upgrade")?;
    match at.value {
        DeValue::Boolean(all) => Some(if *all { Upgrade::All } else { Upgrade::None }),
        DeValue::String(_) => top.word("upgrade").map(|_| Upgrade::Security),
        _ => top.mistyped("upgrade", &at),
    }
}

fn read_conffiles(top: &Table) -> Option<Conffiles> {
    let replace = top.word("conffiles")?.value == "replace";
    Some(if replace { Conffiles::Replace } else { Conffiles::Keep })
}

fn read_selinux(top: &Table) -> Option<Selinux> {
    let later = top.word("selinux")?.value == "autorelabel";
    Some(if later { Selinux::Autorelabel } else { Selinux::Label })
}
