//! The known plugins, and the choice of the plugin for an image.

pub mod executable;
pub mod sandboxed_plugin;
mod search_path;
#[cfg(test)]
mod tests;

use crate::definition::Definition;
use crate::error::{Kind, Place};
use crate::text::escape_name;
use anyhow::{Context, Result};
use executable::ExecutablePlugin;
use oven_distro::check::{InProcess, Speaker};
use oven_distro::{Claim, Claims, Distro, Job, OsRelease, Plan, Refused};
use std::fmt;
use std::path::{Path, PathBuf};

pub use search_path::PLUGIN_DIRECTORIES;

/// Where a plugin came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    BuiltIn,
    /// From one of the [`PLUGIN_DIRECTORIES`].
    Installed(PathBuf),
    /// Given on the command line with `--plugin`.
    Given(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuiltIn => f.write_str("built in"),
            Self::Installed(path) => write!(f, "{}", path.display()),
            Self::Given(path) => write!(f, "--plugin {}", path.display()),
        }
    }
}

/// A plugin of any origin.
pub struct KnownPlugin {
    pub id: String,
    pub origin: Origin,
    plugin: Plugin,
}

enum Plugin {
    BuiltIn(Box<dyn Distro>),
    Program(Box<ExecutablePlugin>),
}

impl KnownPlugin {
    /// Errors: `Machine` if the plugin does not answer as the contract requires.
    pub fn claims(&self, os: &OsRelease) -> Result<Claims> {
        match &self.plugin {
            Plugin::BuiltIn(distro) => Ok(distro.claims(os)),
            Plugin::Program(program) => program.claims(os),
        }
    }

    /// Errors: `Definition` if the plugin refuses the job, `Machine` if it does not answer as the contract requires.
    pub fn plan(&self, job: &Job) -> Result<Plan> {
        self.plan_for(job, None)
    }

    /// Like [`Self::plan`], for the job of a definition. If the plugin refuses it, the error has the place in image.toml.
    pub fn plan_for(&self, job: &Job, image: Option<&Definition>) -> Result<Plan> {
        let plan = match &self.plugin {
            Plugin::BuiltIn(distro) => distro.plan(job),
            Plugin::Program(program) => program.plan(job)?,
        };
        plan.map_err(|refusal| match image.and_then(|image| image.place_of_refusal(&refusal.0)) {
            Some(place) => Kind::Definition.failure(format!("{place}: {refusal}")).at(&place).into(),
            None => refused(refusal),
        })
    }

    /// The interface through which the conformance suite calls the plugin.
    pub fn speaker(&self) -> Box<dyn Speaker + '_> {
        match &self.plugin {
            Plugin::BuiltIn(distro) => Box::new(InProcess(&**distro)),
            Plugin::Program(program) => Box::new(&**program),
        }
    }

    /// The reason why the last run had no sandbox. `None` if the run had a sandbox, or the plugin is built in.
    pub fn missing_sandbox_reason(&self) -> Option<&'static str> {
        match &self.plugin {
            Plugin::BuiltIn(_) => None,
            Plugin::Program(program) => program.missing_sandbox_reason(),
        }
    }

    /// The SHA-256 of an executable plugin's file, in hexadecimal digits. `None` for a built-in plugin.
    pub fn digest(&self) -> Option<String> {
        match &self.plugin {
            Plugin::BuiltIn(_) => None,
            Plugin::Program(program) => Some(program.digest()),
        }
    }
}

/// The error if a plugin refuses a definition.
pub fn refused(refused: Refused) -> anyhow::Error {
    Kind::Definition.error(refused).context("planning the installation")
}

/// All known plugins.
#[derive(Default)]
pub struct PluginRegistry {
    known: Vec<KnownPlugin>,
    /// The rejected files of the plugin directories, each with the reason.
    refused: Vec<(PathBuf, String)>,
}

impl PluginRegistry {
    pub fn built_in(distros: Vec<Box<dyn Distro>>) -> Self {
        let known = distros.into_iter().map(|distro| KnownPlugin {
            id: distro.id().to_owned(),
            origin: Origin::BuiltIn,
            plugin: Plugin::BuiltIn(distro),
        });
        Self { known: known.collect(), refused: Vec::new() }
    }

    /// Adds the plugins of the directories. If several have the same name, the first one is used and the others are
    /// listed as refused. A file that is not trusted is also listed as refused. Such a file is never run.
    pub fn add_installed(mut self, directories: &[PathBuf], helper: &Path) -> Self {
        for file in search_path::find_plugins(directories) {
            let id = search_path::plugin_name(&file.path);
            let added = file.program.and_then(|program| {
                self.add(
                    Origin::Installed(file.path.clone()),
                    &id?,
                    ExecutablePlugin::new(&file.path, program, helper),
                )
            });
            if let Err(why) = added {
                self.refused.push((file.path, why));
            }
        }
        self
    }

    /// Adds a plugin that was given on the command line. It replaces an installed plugin of the same name.
    pub fn add_given(mut self, path: &Path, helper: &Path) -> Result<Self> {
        let program = search_path::read_given(path)?;
        let add = search_path::plugin_name(path).and_then(|id| {
            self.known.retain(|known| known.id != id || !matches!(known.origin, Origin::Installed(_)));
            self.add(Origin::Given(path.to_owned()), &id, ExecutablePlugin::new(path, program, helper))
        });
        add.map_err(|why| Kind::Usage.failure(format!("the plugin {} {why}", path.display())))?;
        Ok(self)
    }

    fn add(&mut self, origin: Origin, id: &str, program: ExecutablePlugin) -> Result<(), String> {
        match self.known.iter().find(|known| known.id == id) {
            Some(other) if other.origin == Origin::BuiltIn => {
                Err(format!("has the name of the built-in plugin `{id}`: choose another name"))
            }
            Some(other) => Err(format!("is hidden by {}, which has the same name", other.origin)),
            None => {
                let plugin = Plugin::Program(Box::new(program));
                self.known.push(KnownPlugin { id: id.to_owned(), origin, plugin });
                Ok(())
            }
        }
    }

    /// A registry with only one plugin, which was given on the command line. It is for a plugin under development.
    pub fn with_only(path: &Path, helper: &Path) -> Result<Self> {
        Self::default().add_given(path, helper)
    }

    pub fn known(&self) -> &[KnownPlugin] {
        &self.known
    }

    pub fn refused(&self) -> &[(PathBuf, String)] {
        &self.refused
    }

    /// The plugin that a definition names. `place` says in which file, and under which key, the plugin is named.
    pub fn named(&self, id: &str, place: &Place) -> Result<&KnownPlugin> {
        self.known.iter().find(|known| known.id == id).ok_or_else(|| {
            Kind::Definition
                .failure(format!("{place}: there is no plugin {id:?}"))
                .at(place)
                .hint(self.describe())
                .into()
        })
    }

    /// Finds the plugin that the definition names, or else the plugin with the best claim on the image. Also returns
    /// this plugin's claims. Errors: `Definition`, with the plugins' names, if no plugin claims the image, or several
    /// claim it equally; `Machine` if a plugin does not answer.
    pub fn detect(&self, os: &OsRelease, named: Option<(&str, &Place)>) -> Result<(&KnownPlugin, Claims)> {
        if let Some((id, place)) = named {
            let known = self.named(id, place)?;
            let claims = known.claims(os)?;
            if claims.claim == Claim::No {
                let message = format!("{place}: the plugin {id} does not support {}", system_name(os));
                return Err(Kind::Definition.failure(message).at(place).hint(self.describe()).into());
            }
            return Ok((known, claims));
        }
        let (mut claims, mut failures) = (Vec::new(), Vec::new());
        for known in &self.known {
            match known.claims(os) {
                Ok(claim) => claims.push((claim, known)),
                Err(error) => failures.push(error),
            }
        }
        // If a plugin failed, no other plugin is chosen, because the failed one may have the best claim.
        if let Some(error) = failures.pop() {
            return Err(error).with_context(|| format!("looking for a plugin for {}", system_name(os)));
        }
        let best = claims.iter().map(|(answer, _)| answer.claim).max().unwrap_or(Claim::No);
        let mut winners = claims.into_iter().filter(|(answer, _)| answer.claim == best);
        match (best, winners.next(), winners.next()) {
            (Claim::No, ..) | (_, None, _) => {
                let message = format!("no plugin supports the base image, which is {}", system_name(os));
                Err(Kind::Definition.failure(message).hint(self.describe()).into())
            }
            (_, Some((claims, known)), None) => Ok((known, claims)),
            (_, Some((_, one)), Some((_, other))) => {
                let both = format!("{} ({}) and {} ({})", one.id, one.origin, other.id, other.origin);
                let message = format!("two plugins claim {}: {both}", system_name(os));
                let hint = format!("Choose one in image.toml: distro = {:?} or {:?}.", one.id, other.id);
                Err(Kind::Definition.failure(message).hint(hint).into())
            }
        }
    }

    /// Lists the known plugins and the refused files.
    fn describe(&self) -> String {
        let known: Vec<_> = self.known.iter().map(|known| known.id.as_str()).collect();
        let mut text = format!("Known plugins: {}.", known.join(", "));
        for (path, why) in &self.refused {
            text += &format!(" {} is ignored: it {why}.", path.display());
        }
        text
    }
}

/// The name of an image's system, from its os-release.
fn system_name(os: &OsRelease) -> String {
    let name = os.get("PRETTY_NAME").map(|name| format!(", {}", escape_name(name))).unwrap_or_default();
    format!("`{}`{name}", escape_name(os.id()))
}
