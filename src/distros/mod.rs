//! Which plugins there are, and which one an image is for.

pub mod executable;
pub mod sandboxed_plugin;
mod search_path;
#[cfg(test)]
mod tests;

use crate::error::Kind;
use anyhow::{Context, Result};
use executable::Exec;
use oven_distro::check::{InProcess, Speaker};
use oven_distro::{Claim, Claims, Distro, Job, OsRelease, Plan, Refused};
use std::fmt;
use std::path::{Path, PathBuf};

pub use search_path::DIRECTORIES;

/// Where a plugin came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    BuiltIn,
    /// Of one of the [`DIRECTORIES`].
    Installed(PathBuf),
    /// Of the command line.
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

/// A plugin, wherever it is.
pub struct Known {
    pub id: String,
    pub origin: Origin,
    plugin: Plugin,
}

enum Plugin {
    BuiltIn(Box<dyn Distro>),
    Program(Box<Exec>),
}

impl Known {
    /// Errors: `Machine`, a plugin that does not answer as the contract says.
    pub fn claims(&self, os: &OsRelease) -> Result<Claims> {
        match &self.plugin {
            Plugin::BuiltIn(distro) => Ok(distro.claims(os)),
            Plugin::Program(program) => program.claims(os),
        }
    }

    /// Errors: `Definition` if the plugin refuses the job, `Machine` if it does not answer as the contract says.
    pub fn plan(&self, job: &Job) -> Result<Plan> {
        let plan = match &self.plugin {
            Plugin::BuiltIn(distro) => distro.plan(job),
            Plugin::Program(program) => program.plan(job)?,
        };
        plan.map_err(refused)
    }

    /// Who answers for it when it is tried.
    pub fn speaker(&self) -> Box<dyn Speaker + '_> {
        match &self.plugin {
            Plugin::BuiltIn(distro) => Box::new(InProcess(&**distro)),
            Plugin::Program(program) => Box::new(&**program),
        }
    }

    /// Why it ran as the user's own process, if it did.
    pub fn uncontained(&self) -> Option<&'static str> {
        match &self.plugin {
            Plugin::BuiltIn(_) => None,
            Plugin::Program(program) => program.uncontained(),
        }
    }

    /// SHA-256 of a plugin that is not built in, in hexadecimal digits.
    pub fn digest(&self) -> Option<String> {
        match &self.plugin {
            Plugin::BuiltIn(_) => None,
            Plugin::Program(program) => Some(program.digest()),
        }
    }
}

/// A plugin that cannot serve a definition.
pub fn refused(refused: Refused) -> anyhow::Error {
    Kind::Definition.error(refused).context("planning the installation")
}

/// All plugins that this oven knows.
#[derive(Default)]
pub struct Registry {
    known: Vec<Known>,
    /// Files in the directories that are no plugin of ours, and why.
    refused: Vec<(PathBuf, String)>,
}

impl Registry {
    pub fn built_in(distros: Vec<Box<dyn Distro>>) -> Self {
        let known = distros.into_iter().map(|distro| Known {
            id: distro.id().to_owned(),
            origin: Origin::BuiltIn,
            plugin: Plugin::BuiltIn(distro),
        });
        Self { known: known.collect(), refused: Vec::new() }
    }

    /// Adds the plugins of the directories, earlier ones first: a later one of the same name is hidden. A file that is
    /// not trusted is not run, and told.
    pub fn look(mut self, directories: &[PathBuf], helper: &Path) -> Self {
        for file in search_path::look(directories) {
            let id = search_path::name(&file.path);
            let added = file.program.and_then(|program| {
                self.add(Origin::Installed(file.path.clone()), &id?, Exec::new(&file.path, program, helper))
            });
            if let Err(why) = added {
                self.refused.push((file.path, why));
            }
        }
        self
    }

    /// Adds a plugin of the command line, which hides an installed one of its name.
    pub fn give(mut self, path: &Path, helper: &Path) -> Result<Self> {
        let program = search_path::named(path)?;
        let add = search_path::name(path).and_then(|id| {
            self.known.retain(|known| known.id != id || !matches!(known.origin, Origin::Installed(_)));
            self.add(Origin::Given(path.to_owned()), &id, Exec::new(path, program, helper))
        });
        add.map_err(|why| Kind::Usage.failure(format!("the plugin {} {why}", path.display())))?;
        Ok(self)
    }

    fn add(&mut self, origin: Origin, id: &str, program: Exec) -> Result<(), String> {
        match self.known.iter().find(|known| known.id == id) {
            Some(other) if other.origin == Origin::BuiltIn => {
                Err(format!("has the name of a plugin that is built in, `{id}`: give it another"))
            }
            Some(other) => Err(format!("is hidden by {}, which has the same name", other.origin)),
            None => {
                let plugin = Plugin::Program(Box::new(program));
                self.known.push(Known { id: id.to_owned(), origin, plugin });
                Ok(())
            }
        }
    }

    /// A plugin that somebody is about to change: it hides no other.
    pub fn alone(path: &Path, helper: &Path) -> Result<Self> {
        Self::default().give(path, helper)
    }

    pub fn known(&self) -> &[Known] {
        &self.known
    }

    pub fn refused(&self) -> &[(PathBuf, String)] {
        &self.refused
    }

    /// The plugin that a definition names. `place`: where it does.
    pub fn named(&self, id: &str, place: &str) -> Result<&Known> {
        self.known.iter().find(|known| known.id == id).ok_or_else(|| {
            Kind::Definition.failure(format!("{place}: there is no plugin {id:?}")).hint(self.told()).into()
        })
    }

    /// The one plugin with the best claim on an image, or the one that the definition names, with its claims. None, or
    /// several that claim it alike, are errors that name them.
    pub fn detect(&self, os: &OsRelease, named: Option<(&str, &str)>) -> Result<(&Known, Claims)> {
        if let Some((id, place)) = named {
            let known = self.named(id, place)?;
            let claims = known.claims(os)?;
            if claims.claim == Claim::No {
                let message = format!("{place}: the plugin {id} says that {} is not its own", spelt(os));
                return Err(Kind::Definition.failure(message).hint(self.told()).into());
            }
            return Ok((known, claims));
        }
        let (mut claims, mut silent) = (Vec::new(), Vec::new());
        for known in &self.known {
            match known.claims(os) {
                Ok(its) => claims.push((its, known)),
                Err(error) => silent.push(error),
            }
        }
        // Whoever does not answer may have been the right one: nobody else is taken for it.
        if let Some(error) = silent.pop() {
            return Err(error).with_context(|| format!("looking for a plugin for {}", spelt(os)));
        }
        let best = claims.iter().map(|(its, _)| its.claim).max().unwrap_or(Claim::No);
        let mut winners = claims.into_iter().filter(|(its, _)| its.claim == best);
        match (best, winners.next(), winners.next()) {
            (Claim::No, ..) | (_, None, _) => {
                let message = format!("the base image is {}: no plugin knows it", spelt(os));
                Err(Kind::Definition.failure(message).hint(self.told()).into())
            }
            (_, Some((claims, known)), None) => Ok((known, claims)),
            (_, Some((_, one)), Some((_, other))) => {
                let both = format!("{} ({}) and {} ({})", one.id, one.origin, other.id, other.origin);
                let message = format!("two plugins claim {}: {both}", spelt(os));
                let hint =
                    format!("Say in image.toml which one it is: distro = {:?} or {:?}.", one.id, other.id);
                Err(Kind::Definition.failure(message).hint(hint).into())
            }
        }
    }

    /// Which plugins there are, and which files are none.
    fn told(&self) -> String {
        let known: Vec<_> = self.known.iter().map(|known| known.id.as_str()).collect();
        let mut told = format!("Known are: {}.", known.join(", "));
        for (path, why) in &self.refused {
            told += &format!(" {} is passed over: it {why}.", path.display());
        }
        told
    }
}

/// An image as its os-release calls it.
fn spelt(os: &OsRelease) -> String {
    let name = os.get("PRETTY_NAME").map(|name| format!(", {name}")).unwrap_or_default();
    format!("`{}`{name}", os.id())
}
