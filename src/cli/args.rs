//! The command line: types only.

use crate::bake::options::{self, BakeOptions};
use crate::config::overrides::Overrides;
use crate::definition::{Given, given};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;
use std::time::Duration;

/// Bakes Amazon Machine Images natively: a base image's disk, packages installed in a contained chroot, a snapshot,
/// an AMI. The same definition on the same base is baked once; asked again, oven answers with the image that exists.
#[derive(Debug, Parser)]
#[command(name = "oven", version, max_term_width = 80, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

const EXIT_CODES: &str = "Exit codes: 0 baked or already baked, 2 usage, 3 definition, 4 not found,\n\
    5 a step failed, 6 cloud, 7 baked but something left behind, 8 this machine\n\
    lacks something (see `oven doctor`), 130 interrupted.";

/// Flags that every verb takes, before it or after it.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The cloud to bake in: `aws`, or `local`, a region that is a directory
    #[arg(
        long,
        global = true,
        value_name = "CLOUD",
        env = "OVEN_CLOUD",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub cloud: Option<String>,
    /// The region's name
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        env = "OVEN_REGION",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub region: Option<String>,
    /// The directory that the local region is [default: /var/lib/oven/region]
    #[arg(long, global = true, value_name = "DIR", env = "OVEN_REGION_DIR", hide_env_values = true, value_hint = ValueHint::DirPath, help_heading = "Global options")]
    pub region_dir: Option<PathBuf>,
    /// The builder's instance id, where its metadata cannot be asked
    #[arg(long, global = true, value_name = "ID", env = "OVEN_INSTANCE_ID", help_heading = "Global options")]
    pub instance_id: Option<String>,
    /// The builder's availability zone, likewise
    #[arg(long, global = true, value_name = "ZONE", env = "OVEN_ZONE", help_heading = "Global options")]
    pub zone: Option<String>,
    /// How a bake gets its disk: `attached`, a volume, or `direct`, block by block
    #[arg(
        long,
        global = true,
        value_name = "HOW",
        env = "OVEN_DISKS",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub disks: Option<String>,
    /// A distro plugin to use beside those that `oven plugin list` lists
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath, help_heading = "Global options")]
    pub plugin: Vec<PathBuf>,
    /// Write a Chrome trace of the run into this file: open it in ui.perfetto.dev
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Global options")]
    pub trace: Option<PathBuf>,
    /// A stream of JSON events on standard output, a result object last
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Show the output of steps
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub verbose: bool,
    /// Show warnings and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub quiet: bool,
}

impl Global {
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

/// What nobody finds out by reading the list of options.
mod examples {
    pub const BAKE: &str = "Examples:
  oven bake web                     the AMI's id on standard output
  oven bake base web db -j 3        parents first, the others side by side
  oven bake --keep-on-failure web   then: oven shell RUN, oven sweep --kept";
    pub const PLAN: &str = "Examples:
  oven plan web                                    hit or miss
  oven plan --os-release debian.txt web            what would be run in a Debian
  oven plan --os-release void.txt --plugin void.py web";
    pub const CHECK: &str = "Golden plans are pairs of files in NAME.golden beside NAME.py: CASE.request.json,\n\
        which `oven plan --request` writes, and CASE.answer.json, which --bless writes.";
    pub const NEW: &str = "Examples:
  oven plugin new void                             void.py and void.golden/
  oven plugin new void --lang sh                   void.sh, which needs jq";
    pub const IMPORT: &str = "Examples:
  scripts/make-base debian-12.raw   in oven's own sources
  oven import debian-12.raw --name debian-12-base
  qemu-img convert -O raw debian-12.qcow2 debian-12.raw";
    pub const EXPORT: &str = "Examples:
  oven export ami-0123456789abcdef0 disk.raw
  qemu-img convert -O qcow2 disk.raw disk.qcow2

Every block is verified. The file is there once it is whole, and sparse.";
    pub const SHELL: &str = "Examples:
  oven shell ami-0123456789abcdef0
  oven shell --network 1f2e3d4c -- apt-get update

Its exit code is the shell's. What a shell in an image changes is thrown away;
on the disk of a run it stays, until `oven sweep --kept` removes the disk.";
    pub const SWEEP: &str = "Runs whose process is at work are never touched. Disks that --keep-on-failure\n\
        kept stay without --kept.";
    pub const POLICY: &str = "Examples:
  oven policy > oven.json
  aws iam put-role-policy --role-name builder --policy-name oven \\
      --policy-document file://oven.json

What is made has to carry a run's tag, and only what carries one is changed or
removed. With --disks the policy is for bakes that get their disks so, and else
for all. It takes neither credentials nor the network.";
    pub const COMPLETIONS: &str = "Examples:
  oven completions bash > /etc/bash_completion.d/oven
  oven completions zsh > /usr/local/share/zsh/site-functions/_oven
  oven completions fish > ~/.config/fish/completions/oven.fish";
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Bake definitions, parents first; what is baked already is only looked up
    #[command(after_help = examples::BAKE)]
    Bake(Bake),
    /// Say whether a bake would be a hit or a miss, and why; or print a plugin's plan
    #[command(after_help = examples::PLAN)]
    Plan(Plan),
    /// List distro plugins, try one, or begin a new one
    #[command(subcommand)]
    Plugin(Plugin),
    /// Print the ami_config_checksum of definitions or directories
    Checksum(Checksum),
    /// List images, show one, or remove some
    #[command(subcommand)]
    Images(Images),
    /// Make a base image of a raw disk image
    #[command(after_help = examples::IMPORT)]
    Import(Import),
    /// Write the disk of an image, or a snapshot, to a raw disk image
    #[command(after_help = examples::EXPORT)]
    Export(Export),
    /// Open a contained shell in a copy of an image, or on the disk that a failed run kept
    #[command(after_help = examples::SHELL)]
    Shell(Shell),
    /// Remove what runs left behind whose process is gone
    #[command(after_help = examples::SWEEP)]
    Sweep(Sweep),
    /// Try what a bake needs, and say all that this machine lacks
    Doctor,
    /// Print the least IAM policy for a builder's role in AWS
    #[command(after_help = examples::POLICY)]
    Policy(Policy),
    /// Print a shell's completions
    #[command(after_help = examples::COMPLETIONS)]
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Args)]
pub struct Bake {
    /// Definitions: directories with an image.toml
    #[arg(required = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub definitions: Vec<PathBuf>,
    #[command(flatten)]
    pub vars: Vars,
    #[command(flatten)]
    pub options: BakeFlags,
    /// How many independent images are baked at a time
    #[arg(short, long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub jobs: u16,
}

/// Values for what definitions leave open.
#[derive(Debug, Clone, Default, Args)]
pub struct Vars {
    /// Give a variable of `[vars]` this value, in each definition that declares it
    #[arg(long = "var", value_name = "NAME=VALUE", value_parser = given, conflicts_with = "compat")]
    vars: Vec<(String, String)>,
}

impl Vars {
    /// Of one that is given twice, the last.
    pub fn given(&self) -> Given {
        self.vars.iter().cloned().collect()
    }
}

/// How a bake treats what exists already, and what it does with a failure.
#[derive(Debug, Clone, Default, Args)]
pub struct BakeFlags {
    /// Bake even if the image exists; the new one gets a name of its own
    #[arg(long)]
    pub force: bool,
    /// Deregister a failed or incomplete image of ours that holds the name
    #[arg(long)]
    pub replace_failed: bool,
    /// Take an image with the same ami_config_checksum as a hit, whatever its base
    #[arg(long, value_enum, value_name = "TOOL")]
    pub compat: Option<Compat>,
    /// If a step fails, keep the disk for `oven shell RUN`
    #[arg(long)]
    pub keep_on_failure: bool,
    /// Read the finished snapshot back, and compare it with what was sent (with --disks direct)
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
pub enum Compat {
    // AMI Bakery, which compares its checksum alone.
    Gumgum,
}

impl From<Compat> for options::Compat {
    fn from(compat: Compat) -> Self {
        match compat {
            Compat::Gumgum => Self::Gumgum,
        }
    }
}

#[derive(Debug, Args)]
pub struct Plan {
    /// Definitions: directories with an image.toml
    #[arg(required_unless_present = "os_release", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub definitions: Vec<PathBuf>,
    #[command(flatten)]
    pub vars: Vars,
    /// Take an image with the same ami_config_checksum as a hit, whatever its base
    #[arg(long, value_enum, value_name = "TOOL")]
    pub compat: Option<Compat>,
    #[command(flatten)]
    pub on_paper: OnPaper,
}

#[derive(Debug, Default, Args)]
pub struct OnPaper {
    /// Print the plan for an image with this os-release file; needs neither root nor cloud
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub os_release: Option<PathBuf>,
    /// A path that this image has [default: all that the plugin looks for]
    #[arg(long, value_name = "PATH", requires = "os_release")]
    pub has: Vec<String>,
    /// A text file of this image, and what it says: `/etc/x.conf=FILE`
    #[arg(long, value_name = "PATH=FILE", requires = "os_release", value_parser = text_file)]
    pub text: Vec<(String, PathBuf)>,
    /// x86_64 or arm64 [default: this machine's]
    #[arg(long, value_name = "ARCH", requires = "os_release")]
    pub arch: Option<String>,
    /// Print what the plugin is asked, not what it answers
    #[arg(long, requires = "os_release")]
    pub request: bool,
}

#[derive(Debug, Subcommand)]
pub enum Plugin {
    /// List plugins: where each came from, what it claims
    List,
    /// Try all that a plugin has to hold to; needs no root
    #[command(after_help = examples::CHECK)]
    Check(PluginCheck),
    /// Write a working plugin, to be changed into yours, with its tests
    #[command(after_help = examples::NEW)]
    New(PluginNew),
}

#[derive(Debug, Args)]
pub struct PluginCheck {
    /// An executable, or the name of a plugin of `oven plugin list`
    #[arg(value_name = "PATH|NAME", value_hint = ValueHint::FilePath)]
    pub what: PathBuf,
    /// The directory of its golden plans [default: NAME.golden beside it]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub golden: Option<PathBuf>,
    /// Write the golden answers anew: look at what changed
    #[arg(long)]
    pub bless: bool,
}

#[derive(Debug, Args)]
pub struct PluginNew {
    /// Its name, and the ID in the os-release of its system
    pub name: String,
    /// What it is written in
    #[arg(long, value_enum, default_value_t = Lang::Python)]
    pub lang: Lang,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Lang {
    Python,
    Sh,
}

#[derive(Debug, Args)]
pub struct Policy {
    /// The ARN of a KMS key that disks are encrypted with; may be given several times
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
pub struct Checksum {
    /// One definition (its inputs included), or exactly these directories
    #[arg(required = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub directories: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Images {
    /// List images, oldest first
    List {
        /// Only this family (a definition's `name`), or the image of this name
        name: Option<String>,
    },
    /// Show an image, its tags and its packages
    Show {
        #[arg(value_name = "AMI")]
        id: String,
    },
    /// Remove images and their snapshots (local region)
    Remove {
        #[arg(required = true, value_name = "AMI")]
        ids: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct Import {
    /// A raw disk image: a file or a block device
    #[arg(value_name = "RAW", value_hint = ValueHint::FilePath)]
    pub raw: PathBuf,
    /// The name of the image to register
    #[arg(long)]
    pub name: String,
    /// x86_64 or arm64 [default: this machine's]
    #[arg(long, value_name = "ARCH")]
    pub arch: Option<String>,
    /// How it boots, in AWS [default: its own, legacy-bios for x86_64 and uefi for arm64]
    #[arg(long, value_name = "MODE", value_parser = ["legacy-bios", "uefi", "uefi-preferred"])]
    pub boot_mode: Option<String>,
    /// Read the snapshot back, and compare it with the raw disk image
    #[arg(long)]
    pub verify: bool,
}

#[derive(Debug, Args)]
pub struct Export {
    /// An image's id (ami-…), or a snapshot's (snap-…)
    #[arg(value_name = "IMAGE|SNAPSHOT")]
    pub what: String,
    /// The file to write
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Replace the file if it is there
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Shell {
    /// An image's id (ami-…), or a run that --keep-on-failure kept
    #[arg(value_name = "IMAGE|RUN")]
    pub what: String,
    /// Give the shell the network
    #[arg(long)]
    pub network: bool,
    /// A command instead of a shell
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Sweep {
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Only this run, even if its process is not known to be gone
    #[arg(long, value_name = "RUN")]
    pub run: Option<String>,
    /// Also what other hosts left longer ago than this: `6h`, `2days`
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub older_than: Option<Duration>,
    /// Also the disks that --keep-on-failure kept
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
