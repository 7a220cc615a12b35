//! The types of the command line.

pub mod environment;
mod examples;
mod global;
mod values;

pub use global::{ColorArg, GlobalArgs, ProgressArg};

use crate::bake::options::{self, BakeOptions};
use crate::bake::secrets::PermittedSecrets;
use crate::definition::{GivenVars, given};
use crate::error::Kind;
use crate::ids::Architecture;
use anyhow::Result;
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::parser::ValueSource;
use clap::{
    Arg, ArgAction, ArgMatches, Args, Command, CommandFactory, Parser, Subcommand, ValueEnum, ValueHint,
};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;
use values::{Words, duration, key_arn, text_file};

/// oven bakes Amazon Machine Images without booting an instance.
///
/// It copies the disk of a base image, installs packages
/// and runs scripts in a sandbox on the copy, takes a snapshot, and registers the snapshot as an AMI. It bakes the same
/// definition on the same base only once. If the image exists, oven prints its id.
#[derive(Debug, Parser)]
#[command(name = "oven", version, max_term_width = 80, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalArgs,
    #[command(subcommand)]
    pub verb: Verb,
}

/// The help of a verb. It does not list the global options.
const VERB_HELP: &str = "{before-help}{about-with-newline}\n{usage-heading} {usage}\n\n{all-args}\n\n\
                         `oven --help` lists the global options.{after-help}";
/// The help of oven. It has no blank line above the usage, so that `oven -h` fits a screen of 24 lines.
const HELP: &str = "{before-help}{about-with-newline}{usage-heading} {usage}\n\n{all-args}{after-help}";

/// Makes the parser of the command line. Each verb has the global options, but its help does not list them.
pub fn command() -> Command {
    let command = Cli::command().mut_args(accept_empty_path);
    let globals = command.get_arguments().filter(|arg| arg.is_global_set());
    let globals: Vec<_> = globals.map(|arg| arg.clone().hide(true)).collect();
    let about = command.get_long_about().map(ToString::to_string).unwrap_or_default();
    let mut command = command
        .help_template(HELP)
        .disable_version_flag(true)
        .arg(version().hide_short_help(true))
        .long_about(format!("{about}\n"))
        .after_long_help(format!("{}\n\n{}", examples::EXIT_CODES, environment::list()))
        .mut_subcommands(|verb| prepare_verb(verb, &globals));
    command.build();
    hide_help_verbs(command)
}

/// Removes the verbs `help` from the lists of verbs, because each help names `--help` already. They still work.
fn hide_help_verbs(command: Command) -> Command {
    let is_help = |verb: &Command| verb.get_name() == "help";
    command.mut_subcommands(|verb| if is_help(&verb) { verb.hide(true) } else { hide_help_verbs(verb) })
}

fn prepare_verb(verb: Command, globals: &[Arg]) -> Command {
    let verb = verb.mut_args(accept_empty_path).args(globals).help_template(VERB_HELP);
    let verb = verb.disable_version_flag(true).arg(version().hide(true));
    verb.mut_subcommands(|verb| prepare_verb(verb, globals))
}

fn version() -> Arg {
    Arg::new("version").short('V').long("version").help("Print version").action(ArgAction::Version)
}

/// Makes clap accept an empty path. [`refuse_empty_values`] refuses it, with a better message.
fn accept_empty_path(arg: Arg) -> Arg {
    if arg.get_value_parser().type_id() == clap::value_parser!(PathBuf).type_id() {
        return arg.value_parser(OsStringValueParser::new().map(PathBuf::from));
    }
    arg
}

/// Refuses empty values of flags, of arguments and of environment variables that stand for flags. An empty value is a
/// mistake in most cases, such as an unset variable in a script. The command of `oven shell` may contain empty words.
///
/// Errors: [`Kind::Usage`]
pub fn refuse_empty_values(command: &Command, matches: &ArgMatches) -> Result<()> {
    for arg in command.get_arguments().filter(|arg| !arg.is_last_set()) {
        let id = arg.get_id().as_str();
        let values = matches.try_get_raw(id).ok().flatten();
        if !values.is_some_and(|mut values| values.any(OsStr::is_empty)) {
            continue;
        }
        let by_variable = matches.value_source(id) == Some(ValueSource::EnvVariable);
        let (what, hint) = match (arg.get_long(), arg.get_env().filter(|_| by_variable)) {
            (Some(long), Some(variable)) => {
                let variable = variable.to_string_lossy();
                let hint =
                    format!("Set {variable} to a value, as for --{long}, or unset it: unset {variable}");
                (format!("the environment variable {variable} is empty"), hint)
            }
            (Some(long), None) => {
                (format!("the value of --{long} is empty"), format!("Give --{long} a value, or omit it."))
            }
            (None, _) => {
                (format!("the argument {arg} is empty"), "Is a variable of the script not set?".to_owned())
            }
        };
        return Err(Kind::Usage.failure(what).hint(hint).into());
    }
    let Some((name, matches)) = matches.subcommand() else { return Ok(()) };
    command.find_subcommand(name).map_or(Ok(()), |verb| refuse_empty_values(verb, matches))
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Bake definitions, parents first, unless their images exist.
    ///
    /// If the image of a definition exists, it is not baked again, and its id is printed.
    #[command(after_long_help = examples::BAKE)]
    Bake(BakeArgs),
    /// Show whether an image exists, or why a bake would make a new one.
    ///
    /// Nothing is changed. With --os-release, print the plugin's plan instead.
    #[command(after_long_help = examples::PLAN)]
    Plan(PlanArgs),
    /// Check definitions, their files and their settings.
    ///
    /// Needs neither root nor a cloud.
    #[command(after_long_help = examples::VALIDATE)]
    Validate(ValidateArgs),
    /// List distro plugins, check one, or start a new one
    #[command(subcommand)]
    Plugin(PluginVerb),
    /// Print the ami_config_checksum of definitions or directories
    Checksum(ChecksumArgs),
    /// List images, show one, or remove some
    #[command(subcommand)]
    Images(ImagesVerb),
    /// Make a base image from a raw disk image
    #[command(after_long_help = examples::IMPORT)]
    Import(ImportArgs),
    /// Write the disk of an image or a snapshot to a file.
    ///
    /// The file is a raw disk image.
    #[command(after_long_help = examples::EXPORT)]
    Export(ExportArgs),
    /// Open a shell in a copy of an image, or on a failed run's disk.
    ///
    /// The shell runs in a sandbox, like a step of a bake.
    #[command(after_long_help = examples::SHELL)]
    Shell(ShellArgs),
    /// Remove the leftovers of runs whose oven process no longer exists
    #[command(after_long_help = examples::SWEEP)]
    Sweep(SweepArgs),
    /// Check whether this machine can bake.
    ///
    /// Lists everything that the machine lacks.
    Doctor,
    /// Print the minimal IAM policy for the role of a builder in AWS
    #[command(after_long_help = examples::POLICY)]
    Policy(PolicyArgs),
    /// Print completions for a shell
    #[command(after_long_help = examples::COMPLETIONS)]
    Completions {
        /// The shell whose completions are printed
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub struct BakeArgs {
    /// Definitions: each is a directory with an image.toml
    #[arg(required = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub definitions: Vec<PathBuf>,
    #[command(flatten)]
    pub vars: VarArgs,
    #[command(flatten)]
    pub secrets: SecretArgs,
    #[command(flatten)]
    pub options: BakeFlags,
    /// The maximum number of images to bake concurrently
    #[arg(short, long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub jobs: u16,
}

/// Values for the variables of definitions.
#[derive(Debug, Clone, Default, Args)]
pub struct VarArgs {
    /// Set a variable of `[vars]`.
    ///
    /// It is set in each definition that declares it. May be repeated.
    #[arg(long = "var", value_name = "NAME=VALUE", value_parser = given)]
    vars: Vec<(String, String)>,
}

impl VarArgs {
    /// The values by name. If a variable is given twice, the last value counts.
    pub fn given(&self) -> GivenVars {
        self.vars.iter().cloned().collect()
    }
}

/// The secrets that definitions may use.
#[derive(Debug, Clone, Default, Args)]
pub struct SecretArgs {
    /// Permit the use of this secret, an environment variable.
    ///
    /// With this flag, and in CI (`CI` is set), every other secret is refused. May be
    /// repeated.
    #[arg(long = "secret", value_name = "NAME")]
    secrets: Vec<String>,
}

impl SecretArgs {
    pub fn are_given(&self) -> bool {
        !self.secrets.is_empty()
    }

    pub fn permitted(&self) -> anyhow::Result<PermittedSecrets> {
        PermittedSecrets::new(&self.secrets, std::env::var_os("CI").as_deref())
    }
}

/// How a bake handles existing images and failures.
#[derive(Debug, Clone, Default, Args)]
pub struct BakeFlags {
    /// Bake even if the image exists.
    ///
    /// The name of the new image also contains the run's id.
    #[arg(long)]
    pub force: bool,
    /// Deregister a failed image with the same name.
    ///
    /// Only a failed or incomplete image that oven created is deregistered.
    #[arg(long)]
    pub replace_failed: bool,
    /// Also accept images of another tool: `gumgum`.
    ///
    /// An existing image with the same ami_config_checksum tag is accepted, even if its base differs. TOOL names another
    /// tool that sets this tag. The only value stands for GumGum's AMI Bakery.
    #[arg(long, value_enum, value_name = "TOOL", hide_possible_values = true, conflicts_with = "vars")]
    pub compat: Option<CompatTool>,
    /// If a step fails, do not delete the disk.
    ///
    /// Inspect it with `oven shell RUN`.
    #[arg(long)]
    pub keep_on_failure: bool,
    /// Read the snapshot back and compare it. Needs --disks direct.
    ///
    /// The blocks of the finished snapshot are compared with those that oven sent.
    #[arg(long)]
    pub verify: bool,
}

impl From<&BakeFlags> for BakeOptions {
    fn from(flags: &BakeFlags) -> Self {
        let BakeFlags { force, replace_failed, compat, keep_on_failure, verify } = flags.clone();
        Self { force, replace_failed, compat: compat.map(Into::into), keep_on_failure, verify }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CompatTool {
    // GumGum's AMI Bakery. It compares only the tag ami_config_checksum.
    Gumgum,
}

impl From<CompatTool> for options::Compat {
    fn from(compat: CompatTool) -> Self {
        match compat {
            CompatTool::Gumgum => Self::Gumgum,
        }
    }
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Definitions: each is a directory with an image.toml
    #[arg(required_unless_present = "os_release", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub definitions: Vec<PathBuf>,
    #[command(flatten)]
    pub vars: VarArgs,
    #[command(flatten)]
    pub secrets: SecretArgs,
    /// Also accept images of another tool: `gumgum`.
    ///
    /// An existing image with the same ami_config_checksum tag is accepted, even if its base differs. TOOL names another
    /// tool that sets this tag. The only value stands for GumGum's AMI Bakery.
    #[arg(long, value_enum, value_name = "TOOL", hide_possible_values = true, conflicts_with = "vars")]
    pub compat: Option<CompatTool>,
    /// Also list the steps that a bake would run. Needs root.
    ///
    /// For this, oven reads the disk of the base image.
    #[arg(long, conflicts_with = "os_release")]
    pub steps: bool,
    #[command(flatten)]
    pub os_release_plan: OsReleasePlanArgs,
}

#[derive(Debug, Args)]
pub struct ValidateArgs {
    /// Definitions: each is a directory with an image.toml
    #[arg(required = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub definitions: Vec<PathBuf>,
    #[command(flatten)]
    pub vars: VarArgs,
    #[command(flatten)]
    pub secrets: SecretArgs,
}

#[derive(Debug, Default, Args)]
pub struct OsReleasePlanArgs {
    /// Print the plan for an image with this os-release file.
    ///
    /// The plan is made by the plugin. This needs neither root nor a cloud.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub os_release: Option<PathBuf>,
    /// With --os-release: assume that the image has this path. The plugin finds no other paths. May be repeated
    /// [without --has: it finds every path that it looks for]
    #[arg(long, value_name = "PATH", requires = "os_release", hide_short_help = true)]
    pub has: Vec<String>,
    /// With --os-release: assume that the image has the text file PATH, with the content of the local FILE. May be
    /// repeated
    #[arg(long, value_name = "PATH=FILE", requires = "os_release", hide_short_help = true, value_parser = text_file)]
    pub text: Vec<(String, PathBuf)>,
    /// The architecture: x86_64 or arm64 [default: this machine's]
    #[arg(
        long,
        value_name = "ARCH",
        requires = "os_release",
        hide_short_help = true,
        hide_possible_values = true,
        value_parser = architectures()
    )]
    pub arch: Option<String>,
    /// With --os-release: print the request to the plugin, not the plan
    #[arg(long, requires = "os_release", hide_short_help = true)]
    pub request: bool,
}

#[derive(Debug, Subcommand)]
pub enum PluginVerb {
    /// List plugins, each with its origin and the systems that it claims
    List,
    /// Check that a plugin conforms to the contract. Does not need root
    #[command(after_long_help = examples::CHECK)]
    Check(PluginCheckArgs),
    /// Write a working skeleton of a plugin, and its tests
    #[command(after_long_help = examples::NEW)]
    New(PluginNewArgs),
}

#[derive(Debug, Args)]
pub struct PluginCheckArgs {
    /// An executable, or the name of a plugin that `oven plugin list` lists
    #[arg(value_name = "PATH|NAME", value_hint = ValueHint::FilePath)]
    pub what: PathBuf,
    /// The directory of the plugin's golden plans.
    ///
    /// The default is NAME.golden in the directory of the plugin.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub golden: Option<PathBuf>,
    /// Overwrite the golden answers with the plugin's current answers. Review the changes
    #[arg(long)]
    pub bless: bool,
}

#[derive(Debug, Args)]
pub struct PluginNewArgs {
    /// The name of the plugin. It is also the ID in the os-release file of its distribution
    pub name: String,
    /// The language of the plugin
    #[arg(long, value_enum, default_value_t = Lang::Python)]
    pub lang: Lang,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Lang {
    Python,
    Sh,
}

#[derive(Debug, Args)]
pub struct PolicyArgs {
    /// The ARN of a KMS key that encrypts disks. May be repeated
    #[arg(long = "kms-key", value_name = "ARN", value_parser = key_arn)]
    pub kms_keys: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ChecksumArgs {
    /// One definition, or several directories.
    ///
    /// The checksum of one definition includes its `inputs`. The checksum of several directories does not.
    #[arg(required = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub directories: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum ImagesVerb {
    /// List images, oldest first
    List {
        /// Only images with this name.
        ///
        /// It is the `name` of definitions in image.toml, or the AMI name of one image.
        name: Option<String>,
    },
    /// Show an image, its tags and its packages
    Show {
        /// The image's id
        #[arg(value_name = "AMI")]
        id: String,
    },
    /// Remove images and their snapshots. Only for local regions
    Remove {
        /// The images' ids
        #[arg(required = true, value_name = "AMI")]
        ids: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The raw disk image: a file, a block device, or `-` for standard input
    #[arg(value_name = "RAW", value_hint = ValueHint::FilePath)]
    pub raw: PathBuf,
    /// The name of the image to register
    #[arg(long)]
    pub name: String,
    /// The architecture: x86_64 or arm64 [default: this machine's]
    #[arg(long, value_name = "ARCH", hide_possible_values = true, value_parser = architectures())]
    pub arch: Option<String>,
    /// The boot mode of its instances in AWS.
    ///
    /// The default is legacy-bios for x86_64, and uefi for arm64.
    #[arg(long, value_name = "MODE", value_parser = ["legacy-bios", "uefi", "uefi-preferred"])]
    pub boot_mode: Option<String>,
    /// Read the snapshot back and compare it with the raw disk image
    #[arg(long)]
    pub verify: bool,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The id of an image (ami-…) or of a snapshot (snap-…)
    #[arg(value_name = "IMAGE|SNAPSHOT")]
    pub what: String,
    /// The file to write, or `-` for standard output
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct ShellArgs {
    /// The id of an image (ami-…), or of a run whose disk --keep-on-failure preserved
    #[arg(value_name = "IMAGE|RUN")]
    pub what: String,
    /// Give the shell access to the network
    #[arg(long)]
    pub network: bool,
    /// Run the step that failed again, as the bake ran it, instead of a shell
    #[arg(long, conflicts_with_all = ["network", "command"])]
    pub rerun: bool,
    #[command(flatten)]
    pub secrets: SecretArgs,
    /// The command to run instead of a shell
    #[arg(last = true, value_name = "COMMAND", value_hint = ValueHint::CommandName)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct SweepArgs {
    /// Only list the leftovers, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Remove only the leftovers of this run.
    ///
    /// This also works if oven cannot determine whether the process of the run still exists, for example on another host.
    #[arg(long, value_name = "RUN")]
    pub run: Option<String>,
    /// Also remove older leftovers of other hosts.
    ///
    /// TIME is their minimal age, such as `6h` or `2days`.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub older_than: Option<Duration>,
    /// Also remove disks that --keep-on-failure preserved
    #[arg(long)]
    pub kept: bool,
}

/// The words for an architecture.
fn architectures() -> Words {
    Words::new([Architecture::X86_64, Architecture::Arm64].map(Architecture::as_str))
}

#[cfg(test)]
mod tests;
