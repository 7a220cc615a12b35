//! The contract between oven and its distro plugins.
//!
//! A plugin is a pure function. It takes a [`Job`], which describes an image and the requests of a definition. It
//! returns a [`Plan`], which says what to do in the image. A plugin runs nothing, mounts nothing and has no state. oven
//! executes the plan in a sandbox. An executable plugin exchanges the same types as JSON ([`wire`]). [`serve`] turns a
//! [`Distro`] into an executable plugin. [`check()`] tests plugins in any language against this contract.

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
    /// The plugin supports a related distribution, which the image names in `ID_LIKE`. Such a plugin is used only if no
    /// plugin claims the image exactly.
    Family,
    /// The plugin was written for the image's `ID`.
    Exact,
}

/// A plugin's answer to `claims`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    pub claim: Claim,
    /// Absolute paths that the image may have. [`Job::present`] says for each whether the image has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub look_for: Vec<String>,
    /// Absolute paths of small text files that the image may have. [`Job::texts`] has the content of those that exist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub read: Vec<String>,
}

/// A plugin for one or more distributions. It says which images it supports, and plans how packages are installed in
/// them.
pub trait Distro {
    /// A short name, such as `debian`. A definition can select the plugin with this name: `distro = "…"`.
    fn id(&self) -> &str;
    /// Says whether the plugin supports an image with this os-release.
    fn claims(&self, os: &OsRelease) -> Claims;
    /// Makes the plan for a job. The same job must always give the same plan.
    fn plan(&self, job: &Job) -> Result<Plan, Refused>;
}

/// An image, and the requests of a definition.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    pub os_release: OsRelease,
    /// `x86_64` or `arm64`, as in the registration of the image.
    pub architecture: String,
    /// Says for each path of [`Claims::look_for`] whether the image has it.
    #[serde(default)]
    pub present: BTreeMap<String, bool>,
    /// The content of each file of [`Claims::read`] that the image has, by path.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub texts: BTreeMap<String, String>,
    /// The packages to install, in the definition's order.
    #[serde(default)]
    pub packages: Vec<Package>,
    /// Which installed packages are upgraded. This happens before [`Job::packages`] are installed.
    #[serde(default)]
    pub upgrade: Upgrade,
    /// Package repositories in addition to the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub repositories: Vec<Repository>,
    /// Packages to hold. No upgrade may change them, neither in this bake nor later on an instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hold: Vec<String>,
    /// Answers to the questions that Debian packages ask during installation (debconf). The form of a line is `PACKAGE
    /// QUESTION TYPE VALUE`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub debconf: Vec<String>,
    /// Programs that the definition needs and the image lacks, such as `ansible-playbook`. They are installed for the
    /// bake and removed at its end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Whether recommended packages are also installed.
    #[serde(default)]
    pub recommends: bool,
    /// Which version of a configuration file is used if both the image and a new package changed it.
    #[serde(default)]
    pub conffiles: Conffiles,
    /// Whether upgrade and install steps may have the network. It is true if the definition has `network = true`.
    #[serde(default)]
    pub network: bool,
    /// A mirror that replaces the image's own archive while packages are fetched. The repositories that are configured
    /// in the image must stay unchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<String>,
    /// The path of a file with certificates (PEM), which are trusted while packages are fetched. The file exists in
    /// fetch steps.
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
    /// The name of the repository and of its configuration file in the image. It consists of letters, digits, `-`, `_`
    /// and `.`.
    pub name: String,
    pub url: String,
    /// The OpenPGP key that signs the repository, ASCII-armoured. `None` if the definition says that the repository is
    /// not signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The suite, such as `bookworm`. Only for apt. `None` for a flat repository, which has its index files directly at
    /// `url`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suite: Option<String>,
    /// The components, such as `main`. Only for apt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub components: Vec<String>,
    /// Whether the repository stays in the image. Otherwise it exists only during this bake.
    pub keep: bool,
    /// How much its packages are preferred, in the meaning of apt: 1 to [`MAX_PRIORITY`]. Other repositories usually have
    /// 500. `None` leaves it to the package manager.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u16>,
}

/// The largest [`Repository::priority`].
pub const MAX_PRIORITY: u16 = 1000;

/// Which version of a configuration file is used if both the image and a new package changed it.
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
        /// The suite of a repository that the package comes from. Only for apt.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        suite: Option<String>,
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
    /// Files that exist only while steps run. The definition's scripts also see these files, except the files below
    /// `/etc`. There, a script sees the image's own configuration, because a script may change the configuration.
    #[serde(default)]
    pub shims: Vec<Shim>,
    /// Files that are written into the image before the first step, and stay there. They must be below one of
    /// [`FILE_PLACES`]. Their owner is root.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<Shim>,
    /// The steps, in the order in which they run. The phases must be in the order of [`Phase`].
    #[serde(default)]
    pub steps: Vec<Step>,
    /// Facts: commands whose output is stored with the image, by name. They run without network, after all steps except
    /// those of phase clean. oven reads only their standard output.
    ///
    /// The fact `packages` prints one line for each package. Columns are separated by tabs. The first three columns are
    /// name, version and architecture. Only these three are stored. If [`Plan::expect`] is not empty, two columns
    /// follow: the package's state, and the names that the package provides (separated by commas). Empty lines are
    /// ignored. If any other line does not have this form, the bake fails and shows the line.
    ///
    /// The fact `held` prints the names of held packages, one on each line. oven also runs it before the first step. If
    /// the base image holds a package, a definition that asks for another version of this package is rejected.
    #[serde(default)]
    pub facts: BTreeMap<String, Vec<String>>,
    /// The expected output of the fact `packages`, before and after the steps.
    #[serde(default)]
    pub expect: Expect,
    /// Explanations of lines in a failed step's output. The most specific explanation must come first.
    #[serde(default)]
    pub troubles: Vec<Trouble>,
    /// Lines of output that mean a failure even if the step's exit status is 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<Trouble>,
    /// Lines of output that are not a failure, but that the user should know. Each is reported once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<Trouble>,
    /// Lines that say how far a step is. The first line that matches counts. If there are any, descriptor 3 of each step
    /// of the plan is a pipe, whatever the phase is, to which its command may write such lines. oven does not log the lines
    /// of this pipe. Other commands of the plan, such as [`Step::before_retry`] and those of facts, have no such pipe.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub progress: Vec<ProgressLine>,
    /// Directories into which the package manager downloads. They must be listed even if this plan downloads nothing.
    /// If a directory has `sources`, oven caches it on the builder for later bakes. If a file remains in a directory
    /// after the steps of phase clean, the bake fails.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caches: Vec<Cache>,
    /// A command that prints the versions of the package `{name}` that can be installed, one on each line, the best first.
    /// It runs without the network if a step fails because of a package whose version the definition sets. It is empty if
    /// the plugin does not support this.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<String>,
    /// How [`Job::tools`] are installed and removed again. `None` if the plugin does not support this. In that case the
    /// definition has to list the packages of the tools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Tools>,
}

/// A directory into which the package manager downloads indexes of repositories or packages.
///
/// oven caches what earlier bakes on the same base image downloaded. Steps see this cache in place of the image's
/// directory. Only steps of phase clean see the image's own directory. Fetch steps can change the cache, while steps
/// that run code of packages cannot. The definition's scripts can write to it too, but only this bake sees what they
/// write. The cache is never written to the image. The package manager has to ask its repositories whether cached files
/// are still current. oven only ensures that the files did not change after they were downloaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// The directory's absolute path, below one of [`CACHE_PLACES`].
    pub path: String,
    pub holds: Holds,
    /// Absolute paths of files and directories that define where packages come from and who signs them: repositories,
    /// keys, credentials. If one of these files has changed since an earlier bake, the cache of that bake is not used.
    /// Without sources, nothing is cached: steps see the image's own directory, and oven only verifies that no files
    /// remain in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
}

/// How the files of a cache depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Holds {
    /// All files together describe one state of the repositories. One bad file makes the whole cache unusable.
    Indexes,
    /// The files are independent of each other. So the files of several bakes are merged.
    Packages,
}

/// Directories in which a plan may declare caches.
pub const CACHE_PLACES: [&str; 2] = ["/var/cache", "/var/lib"];

/// The installation and the removal of programs that are in the image only during this bake. oven compares the fact
/// `packages` before and after the installation to find out which packages were added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tools {
    /// Steps of the phases fetch and install, which download and install the programs. They run after [`Plan::steps`]
    /// but before the steps of phase clean, and only if the image still lacks the programs. The steps have to mark the
    /// packages as automatically installed, as the package manager does with dependencies.
    pub steps: Vec<Step>,
    /// The command that lists packages which are no longer needed. oven runs this command after the definition's
    /// scripts. Then oven removes those of the listed packages that were added for this bake.
    pub unneeded: Question,
    /// Steps that remove exactly the packages that oven selects, and their configuration. An argument that contains
    /// `{name}` is repeated for each package. `{version}` and `{architecture}` are also replaced.
    pub remove: Vec<Step>,
}

/// A command whose output is a list. It has no network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    pub argv: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The pattern of a whole line of output. The first `*` stands for a package's name; a `:` in the name and
    /// everything after it are ignored. Lines that do not match are ignored.
    pub output: String,
}

/// Directories in which a plan may write files that stay in the image: configuration, keys, and similar data. All other
/// files of an image come from packages.
pub const FILE_PLACES: [&str; 3] = ["/etc", "/usr/lib", "/usr/share"];

/// The expected output of the fact `packages`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// The states of a healthy package. If a package is in any other state, the bake fails. oven checks this before the
    /// first step and after the last step. If the first check fails, the base image is at fault.
    #[serde(default)]
    pub sound: Vec<String>,
    /// The states of a package that is not installed. Lines with these states are ignored.
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
    /// The architecture as the package manager spells it. `None` allows any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// An exact version, or a pattern with `*`. `None` allows any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// The explanation of a line in a step's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trouble {
    /// The pattern of the whole line. `*` stands for any text.
    pub output: String,
    /// What was wrong. `{1}` stands for the text that the first `*` matched, `{2}` for the second.
    pub means: String,
    /// What the user can do, as a whole sentence. `{1}` has the same meaning as in `means`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Set if a retry is useless, because image.toml has to be changed. The value is the package that image.toml should
    /// not ask for, or empty if no single package is the cause. `{1}` has the same meaning as in `means`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
}

/// A line of a step's output, or of its descriptor 3, that says how far the step is. In the fields, `{1}` stands for the
/// text that the first `*` of `output` matched. Numbers may have a unit, such as `88.1 MB` or `300 KiB`; other text
/// after a number is ignored. If a field begins with `+`, as in `+1`, its number is added to the number so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProgressLine {
    /// The pattern of the whole line. `*` stands for any text.
    pub output: String,
    /// The phases of the steps that print the line. If it is empty, all steps may print it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<Phase>,
    /// The number of items that are done, such as packages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done: Option<String>,
    /// The number of all items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<String>,
    /// What the items are, in the plural.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// The number of bytes that are done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<String>,
    /// The number of all bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<String>,
    /// The percentage that is done: of the bytes, if their number is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<String>,
    /// The name of the item that is in progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A file of [`Plan::shims`] or [`Plan::files`]. A file of `shims` replaces the image's file while steps run, and does
/// not stay in the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shim {
    /// The absolute path. The image need not have this file. A path below `/run` is not in the image, because steps
    /// have a separate `/run`.
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
    /// Download. These steps have the network and run no code of packages.
    Fetch,
    /// Upgrade installed packages, without the network unless [`Job::network`] is set.
    Upgrade,
    /// Install packages, without the network unless [`Job::network`] is set.
    Install,
    /// Verify that the packages are installed.
    Verify,
    /// Remove the package manager's leftovers. These steps run after the definition's own scripts and tests.
    Clean,
}

/// A command in the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    pub phase: Phase,
    /// What the step does: a gerund with its object, such as `refreshing the package index`.
    pub why: String,
    /// The program, found in the image's `PATH`, and its arguments. No shell is involved.
    pub argv: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The maximal number of retries if the step fails.
    #[serde(default)]
    pub retries: u32,
    /// A command that runs before each retry, without network. It removes files that the failed attempt may have
    /// damaged. Its failure is ignored.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before_retry: Vec<String>,
    #[serde(default)]
    pub network: bool,
    /// Exit codes other than 0 that mean success, such as the code for "done, and a reboot is advised".
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also_good: Vec<u8>,
    /// Whether this fetch step downloads only missing files. If a later bake has the same base, plan and caches, such a
    /// step has nothing to do. So oven skips it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
    /// The time limit in seconds.
    pub timeout: u64,
}

/// The reason why a plugin does not support a job. It names the part of the job that is not supported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused(pub String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Refused {}
