//! The command line: types only.

use crate::bake::options::{self, BakeOptions};
use crate::config::overrides::Overrides;
use crate::definition::{Given, given};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;
use std::time::Duration;

/// oven bakes Amazon Machine Images without booting an instance. It takes a copy of a base image's disk, installs
/// packages and runs scripts in a contained chroot on it, makes a snapshot, and registers that as an AMI. It bakes the
/// same definition on the same base only once: if the image exists, oven prints its id.
#[derive(Debug, Parser)]
#[command(name = "oven", version, max_term_width = 80, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalArgs,
    #[command(subcommand)]
    pub verb: Verb,
}

const EXIT_CODES: &str = "Exit codes:
    0  success: the image is baked, or was already baked
    2  the command line is wrong
    3  a definition or a setting is wrong
    4  a base image, an image or a run was not found
    5  a step in the image failed
    6  the cloud refused or failed
    7  baked, but some leftovers could not be removed
    8  this machine lacks something: `oven doctor` says what
  130  interrupted";

/// Flags that every verb takes, before it or after it.
#[derive(Debug, Clone, Args)]
pub struct GlobalArgs {
    /// Where to bake: `aws`, or `local` for a region in a directory [default: local]
    #[arg(
        long,
        global = true,
        value_name = "CLOUD",
        env = "OVEN_CLOUD",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub cloud: Option<String>,
    /// The name of the region [default in AWS: the builder's own]
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        env = "OVEN_REGION",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub region: Option<String>,
    /// The directory of the local region [default: /var/lib/oven/region]
    #[arg(long, global = true, value_name = "DIR", env = "OVEN_REGION_DIR", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = "Global options")]
    pub region_dir: Option<PathBuf>,
    /// The builder's instance id, where its metadata service cannot be asked
    #[arg(long, global = true, value_name = "ID", env = "OVEN_INSTANCE_ID", help_heading = "Global options")]
    pub instance_id: Option<String>,
    /// The builder's availability zone, where its metadata service cannot be asked
    #[arg(long, global = true, value_name = "ZONE", env = "OVEN_ZONE", help_heading = "Global options")]
    pub zone: Option<String>,
    /// How a bake gets its disk: `attached` makes a volume and attaches it, `direct` reads and sends single blocks [default:
    /// attached]
    #[arg(
        long,
        global = true,
        value_name = "HOW",
        env = "OVEN_DISKS",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub disks: Option<String>,
    /// Use this distro plugin, too; may be given several times
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath, help_heading = "Global options")]
    pub plugin: Vec<PathBuf>,
    /// Write a Chrome trace of the run to this file, for ui.perfetto.dev
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Global options")]
    pub trace: Option<PathBuf>,
    /// Print a stream of JSON events on standard output; the last one is the result
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Show the output of each step
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub verbose: bool,
    /// Show only warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub quiet: bool,
}

impl GlobalArgs {
    /// What these flags and their environment variables say instead of oven.toml.
    pub fn overrides(&self) -> Overrides {
        Overrides {
            cloud: self.cloud.clone(),
            region: self.region.clone(),
            region_dir: self.region_dir.clone(),
            instance_id: self.instance_id.clone(),
            zone: self.zone.clone(),
            disks: self.disks.clone(),
            plugins: self.plugin.clone(),
        }
    }
}

/// Examples and remarks for the end of a help text.
mod examples {
    pub const BAKE: &str = "Examples:
  oven bake web                     print the AMI's id on standard output
  oven bake base web db -j 3        bake parents first, others concurrently
  oven bake --keep-on-failure web   then: oven shell RUN, oven sweep --kept";
    pub const PLAN: &str = "Examples:
  oven plan web                                    already baked, or why not
  oven plan --os-release debian.txt web            the steps in such an image
  oven plan --os-release void.txt --plugin void.py web";
    pub const CHECK: &str = "Golden plans are pairs of files in NAME.golden beside NAME.py: CASE.request.json,\n\
        which `oven plan --request` prints, and CASE.answer.json, which --bless writes.";
    pub const NEW: &str = "Examples:
  oven plugin new void              write void.py and void.golden/
  oven plugin new void --lang sh    write void.sh, which needs jq";
    pub const IMPORT: &str = "Examples:
  oven import debian-12.raw --name debian-12-base

oven's sources have a script that makes such an image of Debian:
scripts/make-base debian-12.raw. An image in another format is converted first:
qemu-img convert -O raw debian-12.qcow2 debian-12.raw";
    pub const EXPORT: &str = "Examples:
  oven export ami-0123456789abcdef0 disk.raw
  qemu-img convert -O qcow2 disk.raw disk.qcow2

Every block is verified. The file is sparse, and appears when it is complete.";
    pub const SHELL: &str = "Examples:
  oven shell ami-0123456789abcdef0
  oven shell --network 1f2e3d4c -- apt-get update

The exit code is the shell's. Changes to an image are thrown away. Changes to
the disk of a run stay until `oven sweep --kept` removes that disk.";
    pub const SWEEP: &str = "Runs that are still at work are never touched. Disks that --keep-on-failure\n\
        kept are removed only with --kept.";
    pub const POLICY: &str = "Examples:
  oven policy > oven.json
  aws iam put-role-policy --role-name builder --policy-name oven \\
      --policy-document file://oven.json

By this policy oven has to tag whatever it creates, and may change or remove
only what carries its tag. With --disks the policy covers only bakes of that
kind, otherwise both kinds. The command needs no credentials and no network.";
    pub const COMPLETIONS: &str = "Examples:
  oven completions bash > /etc/bash_completion.d/oven
  oven completions zsh > /usr/local/share/zsh/site-functions/_oven
  oven completions fish > ~/.config/fish/completions/oven.fish";
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Bake definitions, parents first; an image that exists is not baked again
    #[command(after_help = examples::BAKE)]
    Bake(BakeArgs),
    /// Show whether a bake would find its image or make one, and why; or print the plan of a plugin
    #[command(after_help = examples::PLAN)]
    Plan(PlanArgs),
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
    /// Write the disk of an image or a snapshot to a raw disk image
    #[command(after_help = examples::EXPORT)]
    Export(ExportArgs),
    /// Open a contained shell in a copy of an image, or on the disk of a failed run
    #[command(after_help = examples::SHELL)]
    Shell(ShellArgs),
    /// Remove the leftovers of runs whose process has ended
    #[command(after_help = examples::SWEEP)]
    Sweep(SweepArgs),
    /// Check what a bake needs, and list everything that this machine lacks
    Doctor,
    /// Print the minimal IAM policy for the role of a builder in AWS
    #[command(after_help = examples::POLICY)]
    Policy(PolicyArgs),
    /// Print completions for a shell
    #[command(after_help = examples::COMPLETIONS)]
    Completions {
        /// The shell to print them for
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
    pub options: BakeFlags,
    /// How many independent images to bake at a time
    #[arg(short, long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub jobs: u16,
}

/// Values for the variables of definitions.
#[derive(Debug, Clone, Default, Args)]
pub struct VarArgs {
    /// Set a variable of `[vars]` in each definition that declares it; may be given several times
    #[arg(long = "var", value_name = "NAME=VALUE", value_parser = given, conflicts_with = "compat")]
    vars: Vec<(String, String)>,
}

impl VarArgs {
    /// Of one that is given twice, the last.
    pub fn given(&self) -> Given {
        self.vars.iter().cloned().collect()
    }
}

/// How a bake treats images that exist already, and failures.
#[derive(Debug, Clone, Default, Args)]
pub struct BakeFlags {
    /// Bake even if the image exists; the new image gets a name of its own
    #[arg(long)]
    pub force: bool,
    /// Deregister a failed or incomplete image of oven's that has the name
    #[arg(long)]
    pub replace_failed: bool,
    /// Accept an existing image with the same ami_config_checksum, whatever its base is
    #[arg(long, value_enum, value_name = "TOOL")]
    pub compat: Option<CompatTool>,
    /// If a step fails, keep the disk for `oven shell RUN`
    #[arg(long)]
    pub keep_on_failure: bool,
    /// Read the finished snapshot back and compare it with what was sent; needs --disks direct
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
    // AMI Bakery, which only compares its checksum.
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
    /// Accept an existing image with the same ami_config_checksum, whatever its base is
    #[arg(long, value_enum, value_name = "TOOL")]
    pub compat: Option<CompatTool>,
    #[command(flatten)]
    pub on_paper: PaperPlanArgs,
}

#[derive(Debug, Default, Args)]
pub struct PaperPlanArgs {
    /// Print the plugin's plan for an image with this os-release file; needs neither root nor a cloud
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub os_release: Option<PathBuf>,
    /// A path that exists in that image; may be given several times [default: all that the plugin looks for]
    #[arg(long, value_name = "PATH", requires = "os_release")]
    pub has: Vec<String>,
    /// A text file of that image and a file with its content, such as `/etc/x.conf=x.conf`
    #[arg(long, value_name = "PATH=FILE", requires = "os_release", value_parser = text_file)]
    pub text: Vec<(String, PathBuf)>,
    /// The architecture: x86_64 or arm64 [default: this machine's]
    #[arg(long, value_name = "ARCH", requires = "os_release")]
    pub arch: Option<String>,
    /// Print the request to the plugin instead of its answer
    #[arg(long, requires = "os_release")]
    pub request: bool,
}

#[derive(Debug, Subcommand)]
pub enum PluginVerb {
    /// List plugins, where each comes from, and which systems it claims
    List,
    /// Check that a plugin conforms to the contract; needs no root
    #[command(after_help = examples::CHECK)]
    Check(PluginCheckArgs),
    /// Write the skeleton of a plugin, which works, and its tests
    #[command(after_help = examples::NEW)]
    New(PluginNewArgs),
}

#[derive(Debug, Args)]
pub struct PluginCheckArgs {
    /// An executable, or the name of a plugin that `oven plugin list` lists
    #[arg(value_name = "PATH|NAME", value_hint = ValueHint::FilePath)]
    pub what: PathBuf,
    /// The directory of its golden plans [default: NAME.golden beside the plugin]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub golden: Option<PathBuf>,
    /// Write the golden answers again; review what changed
    #[arg(long)]
    pub bless: bool,
}

#[derive(Debug, Args)]
pub struct PluginNewArgs {
    /// The name of the plugin, which is also the ID in its system's os-release
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
    /// The ARN of a KMS key that encrypts disks; may be given several times
    #[arg(long = "kms-key", value_name = "ARN", value_parser = key_arn)]
    pub kms_keys: Vec<String>,
}

/// A policy's resource is a key, never its alias.
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
            "give a key's ARN, such as arn:aws:kms:eu-central-1:123456789012:key/1234abcd-…; of an alias, \
                  `aws kms describe-key --key-id ALIAS` tells it"
                .to_owned(),
        ),
    }
}

#[derive(Debug, Args)]
pub struct ChecksumArgs {
    /// One definition, whose `inputs` are included; or several directories, taken as they are
    #[arg(required = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub directories: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum ImagesVerb {
    /// List images, oldest first
    List {
        /// Only images of this family (the `name` in image.toml), or the image of this name
        name: Option<String>,
    },
    /// Show an image, its tags and its packages
    Show {
        /// The image's id
        #[arg(value_name = "AMI")]
        id: String,
    },
    /// Remove images and their snapshots, in a local region
    Remove {
        /// The images' ids
        #[arg(required = true, value_name = "AMI")]
        ids: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The raw disk image: a file or a block device
    #[arg(value_name = "RAW", value_hint = ValueHint::FilePath)]
    pub raw: PathBuf,
    /// The name of the image to register
    #[arg(long)]
    pub name: String,
    /// The architecture: x86_64 or arm64 [default: this machine's]
    #[arg(long, value_name = "ARCH")]
    pub arch: Option<String>,
    /// How its instances boot in AWS [default: legacy-bios for x86_64, uefi for arm64]
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
    /// The file to write
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct ShellArgs {
    /// The id of an image (ami-…), or of a run whose disk --keep-on-failure kept
    #[arg(value_name = "IMAGE|RUN")]
    pub what: String,
    /// Give the shell access to the network
    #[arg(long)]
    pub network: bool,
    /// A command to run instead of a shell
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct SweepArgs {
    /// Only list what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Only this run, even if its process may not have ended
    #[arg(long, value_name = "RUN")]
    pub run: Option<String>,
    /// Also the leftovers of other hosts that are older than this, such as `6h` or `2days`
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub older_than: Option<Duration>,
    /// Also remove disks that --keep-on-failure kept
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
