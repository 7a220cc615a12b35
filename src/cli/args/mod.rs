//! The types of the command line.

mod examples;
mod global;

pub use global::{ColorArg, GlobalArgs, ProgressArg};

use crate::bake::options::{self, BakeOptions};
use crate::bake::secrets::PermittedSecrets;
use crate::definition::{GivenVars, given};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;
use std::time::Duration;

/// oven bakes Amazon Machine Images without booting an instance. It copies the disk of a base image, installs packages
/// and runs scripts in a sandbox on the copy, takes a snapshot, and registers the snapshot as an AMI. It bakes the same
/// definition on the same base only once. If the image exists, oven prints its id.
#[derive(Debug, Parser)]
#[command(name = "oven", version, max_term_width = 80, propagate_version = true, after_help = examples::EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalArgs,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Bake definitions, parents first. If the image of a definition exists, it is not baked again
    #[command(after_help = examples::BAKE)]
    Bake(BakeArgs),
    /// Show whether the image of a definition exists, or why a bake would make a new one. With --os-release, print the
    /// plugin's plan instead
    #[command(after_help = examples::PLAN)]
    Plan(PlanArgs),
    /// Check definitions, their files and their settings. Needs neither root nor a cloud
    #[command(after_help = examples::VALIDATE)]
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
    #[command(after_help = examples::IMPORT)]
    Import(ImportArgs),
    /// Write the disk of an image or a snapshot to a file, as a raw disk image
    #[command(after_help = examples::EXPORT)]
    Export(ExportArgs),
    /// Open a sandboxed shell in a copy of an image, or on the disk of a failed run
    #[command(after_help = examples::SHELL)]
    Shell(ShellArgs),
    /// Remove the leftovers of runs whose oven process no longer exists
    #[command(after_help = examples::SWEEP)]
    Sweep(SweepArgs),
    /// Check whether this machine can bake, and list everything that it lacks
    Doctor,
    /// Print the minimal IAM policy for the role of a builder in AWS
    #[command(after_help = examples::POLICY)]
    Policy(PolicyArgs),
    /// Print completions for a shell
    #[command(after_help = examples::COMPLETIONS)]
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
    /// Set a variable in each definition that declares it in `[vars]`. May be repeated
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
    /// Permit the definitions to use this secret, an environment variable. With this flag, and in CI (`CI` is set),
    /// every other secret is refused. May be repeated
    #[arg(long = "secret", value_name = "NAME")]
    secrets: Vec<String>,
}

impl SecretArgs {
    pub fn permitted(&self) -> anyhow::Result<PermittedSecrets> {
        PermittedSecrets::new(&self.secrets, std::env::var_os("CI").as_deref())
    }
}

/// How a bake handles existing images and failures.
#[derive(Debug, Clone, Default, Args)]
pub struct BakeFlags {
    /// Bake even if the image exists. The name of the new image also contains the run's id
    #[arg(long)]
    pub force: bool,
    /// If a failed or incomplete image that oven created has the same name, deregister it
    #[arg(long)]
    pub replace_failed: bool,
    /// Also accept an existing image with the same ami_config_checksum tag, even if its base differs. TOOL names
    /// another tool that sets this tag. The only value stands for GumGum's AMI Bakery
    #[arg(long, value_enum, value_name = "TOOL", conflicts_with = "vars")]
    pub compat: Option<CompatTool>,
    /// If a step fails, do not delete the disk. Inspect it with `oven shell RUN`
    #[arg(long)]
    pub keep_on_failure: bool,
    /// Read the finished snapshot back and compare it with the blocks that oven sent. Needs --disks direct
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
    /// Also accept an existing image with the same ami_config_checksum tag, even if its base differs. TOOL names
    /// another tool that sets this tag. The only value stands for GumGum's AMI Bakery
    #[arg(long, value_enum, value_name = "TOOL", conflicts_with = "vars")]
    pub compat: Option<CompatTool>,
    /// Also list the steps that a bake would run. Reads the disk of the base image, and so needs root
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
    /// Print the plugin's plan for an image with this os-release file. Needs neither root nor a cloud
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub os_release: Option<PathBuf>,
    /// With --os-release: assume that the image has this path. The plugin finds no other paths. May be repeated
    /// [without --has: it finds every path that it looks for]
    #[arg(long, value_name = "PATH", requires = "os_release")]
    pub has: Vec<String>,
    /// With --os-release: assume that the image has the text file PATH, with the content of the local FILE. May be
    /// repeated
    #[arg(long, value_name = "PATH=FILE", requires = "os_release", value_parser = text_file)]
    pub text: Vec<(String, PathBuf)>,
    /// The architecture: x86_64 or arm64 [default: this machine's]
    #[arg(long, value_name = "ARCH", requires = "os_release")]
    pub arch: Option<String>,
    /// With --os-release: print the request to the plugin, not the plan
    #[arg(long, requires = "os_release")]
    pub request: bool,
}

#[derive(Debug, Subcommand)]
pub enum PluginVerb {
    /// List plugins, each with its origin and the systems that it claims
    List,
    /// Check that a plugin conforms to the contract. Does not need root
    #[command(after_help = examples::CHECK)]
    Check(PluginCheckArgs),
    /// Write a working skeleton of a plugin, and its tests
    #[command(after_help = examples::NEW)]
    New(PluginNewArgs),
}

#[derive(Debug, Args)]
pub struct PluginCheckArgs {
    /// An executable, or the name of a plugin that `oven plugin list` lists
    #[arg(value_name = "PATH|NAME", value_hint = ValueHint::FilePath)]
    pub what: PathBuf,
    /// The directory of the plugin's golden plans [default: NAME.golden in the directory of the plugin]
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

/// Accepts only the ARN of a key, because an alias cannot be a resource in a policy.
fn key_arn(text: &str) -> Result<String, String> {
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    match parts[..] {
        ["arn", partition, "kms", region, account, key]
            if partition.starts_with("aws")
                && !region.is_empty()
                && account.len() == 12
                && account.bytes().all(|b| b.is_ascii_digit())
                && key.strip_prefix("key/").is_some_and(|id| !id.is_empty()) =>
        {
            Ok(text.to_owned())
        }
        _ => Err(
            "give the ARN of a key, such as arn:aws:kms:eu-central-1:123456789012:key/1234abcd-…; `aws kms \
             describe-key --key-id ALIAS` prints the ARN of the key of an alias"
                .to_owned(),
        ),
    }
}

#[derive(Debug, Args)]
pub struct ChecksumArgs {
    /// One definition, whose `inputs` are included, or several directories, of which no `inputs` are included
    #[arg(required = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub directories: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum ImagesVerb {
    /// List images, oldest first
    List {
        /// Only images of the definitions with this `name` in image.toml, or the image with this AMI name
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
    #[arg(long, value_name = "ARCH")]
    pub arch: Option<String>,
    /// The boot mode of its instances in AWS [default: legacy-bios for x86_64, uefi for arm64]
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
    /// The command to run instead of a shell
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct SweepArgs {
    /// Only list the leftovers, and remove nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Remove only the leftovers of this run. This also works if oven cannot determine whether the process of the run
    /// still exists, for example on another host
    #[arg(long, value_name = "RUN")]
    pub run: Option<String>,
    /// Also remove leftovers of other hosts if they are older than this, such as `6h` or `2days`
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub older_than: Option<Duration>,
    /// Also remove disks that --keep-on-failure preserved
    #[arg(long)]
    pub kept: bool,
}

fn text_file(text: &str) -> Result<(String, PathBuf), String> {
    let parts = text.split_once('=').filter(|(path, file)| path.starts_with('/') && !file.is_empty());
    let parts = parts.ok_or("give a path in the image and a file, such as `/etc/x.conf=x.conf`")?;
    Ok((parts.0.to_owned(), parts.1.into()))
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| "give a number and a unit, such as `6h` or `2days`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_fits_80_columns() {
        let mut command = Cli::command();
        command.clone().debug_assert();
        command.build();
        let mut commands = vec![command];
        while let Some(mut command) = commands.pop() {
            let help = command.render_long_help().to_string();
            let long = help.lines().find(|line| line.chars().count() > 80);
            assert_eq!(long, None, "in the help of {}", command.get_name());
            commands.extend(command.get_subcommands().cloned());
        }
    }

    #[test]
    fn global_flags_go_before_and_after_the_verb() {
        for line in ["oven --region-dir R --json bake web", "oven bake web --region-dir R --json"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!((cli.global.region_dir, cli.global.json), (Some("R".into()), true));
        }
    }
}
