//! The contract between oven and its distro plugins.
//!
//! A plugin is a pure function: it takes a [`Job`], which describes an image and what a definition wants of it, and
//! returns a [`Plan`], which says what to do in the image. It runs nothing, mounts nothing and has no state; oven
//! executes the plan in a contained root. A plugin that is an executable exchanges the same types as JSON ([`wire`]);
//! [`serve`] turns a [`Distro`] into one. [`check()`] tests a plugin in any language against this contract.

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

/// How sure a plugin is that it supports an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Claim {
    /// The plugin does not support the image.
    #[default]
    No,
    /// The image is a relative (`ID_LIKE`). Used if no other plugin claims the image exactly.
    Family,
    /// The plugin was written for this `ID`.
    Exact,
}

/// A plugin's answer to `claims`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    pub claim: Claim,
    /// Absolute paths in the image. The [`Job`] says for each whether the image has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub look_for: Vec<String>,
    /// Absolute paths of small text files in the image. The [`Job`] holds the content of those that exist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub read: Vec<String>,
}

/// A distribution: which images it supports, and how packages are installed there.
pub trait Distro {
    /// A short name, as in a definition's `distro = "…"`: `debian`.
    fn id(&self) -> &str;
    /// Whether the plugin supports an image with this os-release.
    fn claims(&self, os: &OsRelease) -> Claims;
    /// The plan for a job. Deterministic: the same job gives the same plan.
    fn plan(&self, job: &Job) -> Result<Plan, Refused>;
}

/// An image, and what a definition wants of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    pub os_release: OsRelease,
    /// `x86_64` or `arm64`, as the image is registered.
    pub architecture: String,
    /// For each path of [`Claims::look_for`]: whether the image has it.
    #[serde(default)]
    pub present: BTreeMap<String, bool>,
    /// For each path of [`Claims::read`] that the image has: its content.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub texts: BTreeMap<String, String>,
    /// The packages to install, in the definition's order.
    #[serde(default)]
    pub packages: Vec<Package>,
    /// Which installed packages are upgraded first.
    #[serde(default)]
    pub upgrade: Upgrade,
    /// Package repositories in addition to the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repositories: Vec<Repository>,
    /// Packages to hold: no upgrade changes them, neither in this bake nor later on an instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hold: Vec<String>,
    /// Answers to the questions that packages ask during installation: debconf's `PACKAGE QUESTION TYPE VALUE`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub debconf: Vec<String>,
    /// Programs that the definition's provisioners need and the image lacks: `ansible-playbook`. They are installed
    /// for the bake and removed at its end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Also install the packages that the wanted ones merely recommend.
    #[serde(default)]
    pub recommends: bool,
    /// Which version of a configuration file wins if both the image and a package changed it.
    #[serde(default)]
    pub conffiles: Conffiles,
    /// The definition says `network = true`: install steps have the network, too.
    #[serde(default)]
    pub network: bool,
    /// A mirror that replaces the image's own archive while packages are fetched. The image keeps its own
    /// configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<String>,
    /// Certificates (PEM) to trust while packages are fetched: a path that exists in fetch steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<String>,
}

/// Which installed packages are upgraded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upgrade {
    #[default]
    None,
    /// Packages for which the distribution has a security update.
    Security,
    All,
}

/// A package repository in addition to the image's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repository {
    /// The name of its configuration file in the image: letters, digits, `-`, `_` and `.`.
    pub name: String,
    pub url: String,
    /// The OpenPGP key that signs it, ASCII-armoured. `None`: the repository is not signed, and the definition says
    /// so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Debian only: `bookworm`. A flat repository has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suite: Option<String>,
    /// Debian only: `main`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<String>,
    /// Whether it stays in the image; otherwise it exists for this bake alone.
    pub keep: bool,
}

/// Which version of a configuration file wins if both the image and a package changed it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Conffiles {
    /// The image's version.
    #[default]
    Keep,
    /// The package's version.
    Replace,
}

/// A package that a definition asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Package {
    /// A package of the image's repositories.
    Named {
        name: String,
        /// An exact version, or a pattern with `*`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        version: Option<String>,
    },
    /// A set of packages that the repositories define: a group in dnf, a pattern in zypper.
    Group { name: String },
    /// A package file that is visible at `path` in every step.
    File { path: String, name: String, version: String, architecture: String },
}

/// What to do in the image, as data that can be printed, hashed and compared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Files that exist only while steps run. Those below `/etc` exist only in the plan's own steps: the definition's
    /// scripts see the image's configuration, and may change it.
    #[serde(default)]
    pub shims: Vec<Shim>,
    /// Files that are written into the image before the first step, and stay there: below [`FILE_PLACES`], owned by
    /// root.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<Shim>,
    /// The steps, in the order in which they run. Phases never go back.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// Commands whose output is stored with the image, by name. They run without network, after all steps but those of
    /// phase clean. `packages` prints one line for each package, in columns separated by tabs: name, version,
    /// architecture and, if [`Plan::expect`] is to be checked, state and provided names (separated by commas). The
    /// first three columns are stored. `held` prints the names of held packages, one on each line. oven also runs it
    /// before the first step: a definition that asks for another version of a package that the base image holds is
    /// rejected.
    #[serde(default)]
    pub facts: BTreeMap<String, Vec<String>>,
    /// What the fact `packages` has to show, before and after the steps.
    #[serde(default)]
    pub expect: Expect,
    /// What lines of a failed step's output mean, the most specific first.
    #[serde(default)]
    pub troubles: Vec<Trouble>,
    /// Lines of output that mean failure even if the step's exit status is 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Trouble>,
    /// Lines of output that are not a failure, but that the user should know about. Each is reported once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<Trouble>,
    /// Directories that the package manager downloads into, also if this plan downloads nothing. oven caches those that
    /// have sources on the builder from bake to bake. Any file that is in one of them after the steps of phase clean
    /// fails the bake.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caches: Vec<Cache>,
    /// How [`Job::tools`] are installed and removed again. A plugin that does not support tools leaves this out; then
    /// the definition has to list their packages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Tools>,
}

/// A directory that the package manager downloads into: indexes of repositories, and packages.
///
/// Steps see the cache of earlier bakes of the same base in place of the image's directory. Fetch steps may change it,
/// package code may not, and steps of phase clean see the image's own directory. Nothing of the cache is written to
/// the image. The package manager has to ask its repositories whether cached files are still current; oven only
/// ensures that they are unchanged since they were downloaded.
///
/// Steps of phase clean have to empty the image's own directory, since a script may have downloaded something. oven
/// verifies that only directories remain in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// Absolute, below one of [`CACHE_PLACES`].
    pub path: String,
    pub holds: Holds,
    /// Absolute paths of files and directories that define where packages come from and who signs them: repositories,
    /// keys, credentials. If one of them differs, as steps see it, another cache is used. Without sources, nothing is
    /// cached: steps see the image's own directory, and oven only verifies that no files remain in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
}

/// How the files of a cache depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Holds {
    /// Together they describe one state of the repositories: one bad file makes the whole cache unusable.
    Indexes,
    /// Each file is independent of the others: the files of several bakes are merged.
    Packages,
}

/// Directories in which a plan may declare caches.
pub const CACHE_PLACES: [&str; 2] = ["/var/cache", "/var/lib"];

/// Programs that are in the image for this bake alone. oven compares the fact `packages` before and after, and so
/// knows which packages were added: the plugin need not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tools {
    /// Steps of phases fetch and install that download and install them. They run after [`Plan::steps`] (except phase
    /// clean), if the image still lacks the programs. Their packages have to be marked as installed automatically, as
    /// a dependency is.
    pub steps: Vec<Step>,
    /// Asks which packages are no longer needed after the definition's scripts. Of the added packages, these are
    /// removed.
    pub unneeded: Question,
    /// Steps that remove exactly those packages and their configuration. An argument that contains `{name}` is
    /// repeated for each package; `{version}` and `{architecture}` are filled in as well.
    pub remove: Vec<Step>,
}

/// A command whose output is a list. It has no network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    pub argv: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Pattern of a whole output line. The first `*` stands for a package's name (a `:` in it, and what follows, is
    /// dropped). Other lines are ignored.
    pub output: String,
}

/// Directories in which a plan may write files that stay: configuration, keys, and data that distributions keep with
/// them. Everything else in an image comes from packages.
pub const FILE_PLACES: [&str; 3] = ["/etc", "/usr/lib", "/usr/share"];

/// What the fact `packages` has to show.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// States of a healthy package. Any other state fails the bake: before the first step, as a fault of the base
    /// image, and after the last one.
    #[serde(default)]
    pub sound: Vec<String>,
    /// States of a package that is not installed: its line is ignored.
    #[serde(default)]
    pub absent: Vec<String>,
    /// Packages that have to be installed and healthy after the plan's steps.
    #[serde(default)]
    pub packages: Vec<Wanted>,
}

/// A package that has to be installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// The package's name or, if there is no version, a name that an installed package provides.
    pub name: String,
    /// In the package manager's spelling; `None`: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// An exact version, or a pattern with `*`; `None`: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// What a line of a step's output means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trouble {
    /// Pattern of the whole line; `*` stands for any text.
    pub output: String,
    /// What was wrong. `{1}` is the text of the first `*`, `{2}` of the second.
    pub means: String,
    /// What the user can do, as a whole sentence; `{1}` as above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Set if image.toml is at fault, so that retrying is useless: the package that it should not ask for (`{1}` as
    /// above), or empty if no single package is at fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
}

/// A file. As a shim it is mounted over `path` while steps run, and never written into the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shim {
    /// Absolute path in the image. A shim below `/run` needs no file to cover: steps have a `/run` of their own.
    pub path: String,
    pub content: String,
    /// Permission bits, such as `0o755`.
    pub mode: u32,
}

/// The phases of a plan, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Prepare the package manager.
    Prepare,
    /// Download: with the network, and without running any package's code.
    Fetch,
    /// Upgrade installed packages: no network.
    Upgrade,
    /// Install: no network, unless the job says so.
    Install,
    /// Verify that the packages are installed.
    Verify,
    /// Remove the package manager's leftovers; runs after the definition's own scripts and tests.
    Clean,
}

/// A command in the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    pub phase: Phase,
    /// What the step does, as a gerund with its object: `refreshing the package index`.
    pub why: String,
    /// The program, found in the image's `PATH`, and its arguments. No shell is involved.
    pub argv: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// How often the step is retried after a failure.
    #[serde(default)]
    pub retries: u32,
    /// A command that runs before each retry, without network, and whose failure is ignored. It drops what the failed
    /// attempt may have damaged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before_retry: Vec<String>,
    #[serde(default)]
    pub network: bool,
    /// Exit codes other than 0 that mean success: "done, and a reboot is advised", for example.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also_good: Vec<u8>,
    /// The fetch step only downloads what is missing. With the same base, plan and caches it has nothing to do a
    /// second time, and is skipped.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
    /// Seconds.
    pub timeout: u64,
}

/// A plugin does not support a job: which part of it, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused(pub String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Refused {}
