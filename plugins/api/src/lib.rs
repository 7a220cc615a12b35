//! The contract between oven and its distro plugins.
//!
//! A plugin is a pure function: it is told what an image is ([`Job`]) and answers what to do there ([`Plan`]).
//! It runs nothing, mounts nothing and holds nothing; oven executes the plan in a contained root. The same types
//! are spoken as JSON by a plugin that is an executable ([`wire`]): [`serve`] makes one of a [`Distro`]. What a plugin
//! has to hold to is tried by [`check()`], whatever it is written in.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub mod check;
mod os_release;
mod valid;
pub mod wire;

pub use check::check;
pub use os_release::OsRelease;
pub use valid::{faults_of_claims, faults_of_plan};
pub use wire::serve;

/// How sure a plugin is that an image is its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Claim {
    /// Not this plugin's.
    #[default]
    No,
    /// A relative (`ID_LIKE`): taken where nobody claims it exactly.
    Family,
    /// `ID` is one that this plugin was written for.
    Exact,
}

/// A plugin's answer to `claims`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    pub claim: Claim,
    /// Absolute paths in the image; the [`Job`] will say of each whether the image has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub look_for: Vec<String>,
    /// Absolute paths of small text files in the image; the [`Job`] will hold what they say, those that are there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub read: Vec<String>,
}

/// A distribution: what is its own, and how packages are put into it.
pub trait Distro {
    /// A short name, as a definition's `distro = "…"` spells it: `debian`.
    fn id(&self) -> &str;
    /// Whether an image with this os-release is this plugin's.
    fn claims(&self, os: &OsRelease) -> Claims;
    /// What to do for a job. Deterministic: the same job gives the same plan.
    fn plan(&self, job: &Job) -> Result<Plan, Refused>;
}

/// What a definition wants of an image, as a distro sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    pub os_release: OsRelease,
    /// `x86_64` or `arm64`, as clouds say it.
    pub architecture: String,
    /// For each path of [`Claims::look_for`]: does the image have it?
    #[serde(default)]
    pub present: BTreeMap<String, bool>,
    /// For each path of [`Claims::read`] that the image has: its text.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub texts: BTreeMap<String, String>,
    /// In the definition's order.
    #[serde(default)]
    pub packages: Vec<Package>,
    /// Which installed packages are brought up to date first.
    #[serde(default)]
    pub upgrade: Upgrade,
    /// Sources of packages beside the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repositories: Vec<Repository>,
    /// Packages that no upgrade changes, neither this bake's nor a later one on an instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hold: Vec<String>,
    /// Answers to what packages ask when they are installed: debconf's `PACKAGE QUESTION TYPE VALUE`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub debconf: Vec<String>,
    /// Programs that the definition's provisioners need and the image lacks, for this bake alone: `ansible-playbook`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Install what packages merely recommend, too.
    #[serde(default)]
    pub recommends: bool,
    /// What happens to a configuration file that both the image and a package changed.
    #[serde(default)]
    pub conffiles: Conffiles,
    /// The definition says `network = true`: install steps have the network too.
    #[serde(default)]
    pub network: bool,
    /// A mirror that replaces the image's own archive while packages are fetched, for this bake alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<String>,
    /// Certificates (PEM) to trust while packages are fetched: a path that fetch steps see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<String>,
}

/// Which installed packages are brought up to date.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upgrade {
    #[default]
    None,
    /// Those with a fault that their distribution calls one of security.
    Security,
    All,
}

/// A source of packages beside the image's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repository {
    /// Names the file that describes it in the image: letters, digits, `-`, `_` and `.`.
    pub name: String,
    pub url: String,
    /// The OpenPGP key that signs it, ASCII-armoured. Without one the source is not signed, and the definition says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Debian's: `bookworm`. A flat repository has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suite: Option<String>,
    /// Debian's: `main`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<String>,
    /// It stays in the image; else it is there for this bake alone.
    pub keep: bool,
}

/// What happens to a configuration file that both the image and a package changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Conffiles {
    /// The image's stays.
    #[default]
    Keep,
    /// The package's wins.
    Replace,
}

/// A package that a definition asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Package {
    /// From the image's repositories.
    Named {
        name: String,
        /// An exact version, or a pattern with `*`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        version: Option<String>,
    },
    /// A set of packages that the repositories define: a group of dnf's, a pattern of zypper's.
    Group { name: String },
    /// A package file that is visible at `path` in every step.
    File { path: String, name: String, version: String, architecture: String },
}

/// What to do in the image: data, so that it can be printed, hashed and compared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Files that are there only while steps run. Those below `/etc` are there for the plan's own steps alone: the
    /// definition's scripts see the image's configuration, and may change it.
    #[serde(default)]
    pub shims: Vec<Shim>,
    /// Files that are put into the image before the first step, and stay there: below [`FILE_PLACES`], root's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<Shim>,
    /// In the order in which they run; phases never go back.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// Commands (without network, after all steps but clean) whose output is kept with the image, by name.
    /// `packages` prints a line for each package, of columns separated by tabs: name, version, architecture and, as
    /// far as [`Plan::expect`] is to be checked, state and what it provides (separated by commas). The first three are
    /// kept. `held` prints, a line each, the names of the packages that no upgrade changes: those of the base are told
    /// before the first step, and a definition that asks for another version of one is refused.
    #[serde(default)]
    pub facts: BTreeMap<String, Vec<String>>,
    /// What the fact `packages` has to show, before the steps and after them.
    #[serde(default)]
    pub expect: Expect,
    /// What lines of a failed step's output mean, the most telling first.
    #[serde(default)]
    pub troubles: Vec<Trouble>,
    /// Lines of a step's output that are a failure even where the step ended with 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Trouble>,
    /// Lines of a step's output that are no failure, and that whoever bakes should know of: each is told once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<Trouble>,
    /// Directories that the package manager downloads into. oven keeps them on the builder, from bake to bake.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caches: Vec<Cache>,
    /// How [`Job::tools`] are brought and taken away again. A plugin that cannot leaves it out, and the definition has
    /// to ask for their packages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Tools>,
}

/// A directory that the package manager downloads into: indexes of repositories, and packages.
///
/// Steps see what an earlier bake of the same base left there, in place of what the image has: fetch steps may change it,
/// package code may not, and steps of phase clean see the image's own. Nothing of it is written to the image. The package
/// manager has to ask its repositories whether what is there is still good: oven only makes sure that it is what was
/// downloaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// Absolute, below one of [`CACHE_PLACES`].
    pub path: String,
    pub holds: Holds,
    /// Absolute paths of files and directories that say where packages come from and who signs them: repositories, keys,
    /// credentials. Where any of them differs, as steps see it, so do the caches.
    pub sources: Vec<String>,
}

/// How the files of a cache belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Holds {
    /// One state of repositories: what is wrong with one file is wrong with all.
    Indexes,
    /// Files that each stand for themselves: those of several bakes are put together.
    Packages,
}

/// Where distributions keep what may be removed at any time.
pub const CACHE_PLACES: [&str; 2] = ["/var/cache", "/var/lib"];

/// Programs that are in the image for this bake alone. oven compares what the fact `packages` shows before and after,
/// so it knows what came: the plugin need not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tools {
    /// Download and install them, when [`Plan::steps`] but those of phase clean are done, and if the image lacks them
    /// even then. Of phases fetch and install. What they bring is to count as installed for something else's sake.
    pub steps: Vec<Step>,
    /// Which packages nothing needs any more, when the definition's scripts are done. Of what came, these go.
    pub unneeded: Question,
    /// Remove exactly those packages, and their configuration. An argument with `{name}` in it is repeated for each of
    /// them, `{version}` and `{architecture}` filled in as well.
    pub remove: Vec<Step>,
}

/// A command that answers with lines. It has no network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    pub argv: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// A whole line of the answer: the first `*` stands for a package's name (what follows a `:` in it is passed over).
    /// Other lines mean nothing.
    pub output: String,
}

/// Where a plan may put files to stay: configuration, keys, and what distributions keep beside them. What else belongs
/// into an image, its packages bring.
pub const FILE_PLACES: [&str; 3] = ["/etc", "/usr/lib", "/usr/share"];

/// What the fact `packages` has to show.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// States of a package that is as it should be. A package in any other state fails the bake: before the first
    /// step, because of the base image, and after the last.
    #[serde(default)]
    pub sound: Vec<String>,
    /// States of a package that is not there: its line is passed over.
    #[serde(default)]
    pub absent: Vec<String>,
    /// Packages that have to be there and sound once the plan's steps are done.
    #[serde(default)]
    pub packages: Vec<Wanted>,
}

/// A package that has to be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// A package's name or, where there is no version, a name that an installed package provides.
    pub name: String,
    /// As the package manager spells it; `None`: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// An exact version, or a pattern with `*`; `None`: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// What a line of a failed step's output means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trouble {
    /// The whole line; `*` stands for anything.
    pub output: String,
    /// What was wrong. `{1}` is what the first `*` stood for, `{2}` the second.
    pub means: String,
    /// What the user can do, as a whole sentence; `{1}` as above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The package that image.toml is wrong to ask for, `{1}` as above, empty for no certain one: then trying again
    /// is of no use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
}

/// A file that is bound over `path` while steps run, and never written into the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shim {
    /// Absolute, in the image. Below `/run` it is simply there: steps have a `/run` of their own.
    pub path: String,
    pub content: String,
    /// Permission bits, such as `0o755`.
    pub mode: u32,
}

/// The phases of a plan, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Make the package manager ready.
    Prepare,
    /// Download: with the network, and no package's code.
    Fetch,
    /// Change what is installed already: no network.
    Upgrade,
    /// Install: no network, unless the job says so.
    Install,
    /// Prove that the packages are there.
    Verify,
    /// Remove what the package manager leaves; after the definition's own scripts and tests.
    Clean,
}

/// A command in the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    pub phase: Phase,
    /// What for, in words that go behind a gerund: `refreshing the package index`.
    pub why: String,
    /// The program, found in the image's `PATH`, and its arguments. No shell is involved.
    pub argv: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// How often it is tried again after it failed.
    #[serde(default)]
    pub retries: u32,
    /// What is run, with neither network nor consequence, before it is tried again: a command that drops what the last
    /// try may have spoilt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before_retry: Vec<String>,
    #[serde(default)]
    pub network: bool,
    /// Exit codes beside 0 that are no failure: "done, and a reboot is advised", say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also_good: Vec<u8>,
    /// Of a fetch step that only brings what is not there yet: with the same base, plan and caches it has nothing to do a
    /// second time, and is passed over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
    /// Seconds.
    pub timeout: u64,
}

/// A plugin cannot serve a job: which part of it, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused(pub String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Refused {}
