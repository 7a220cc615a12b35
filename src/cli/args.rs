//! The types of the command line.

use crate::bake::options::{self, BakeOptions};
use crate::bake::secrets::PermittedSecrets;
use crate::config::overrides::Overrides;
use crate::definition::{GivenVars, given};
use crate::report::{ColorMode, Display, ProgressMode};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;
use std::time::Duration;

/// oven bakes Amazon Machine Images without booting an instance. It copies the disk of a base image, installs packages
/// and runs scripts in a sandbox on the copy, takes a snapshot, and registers the snapshot as an AMI. It bakes the same
/// definition on the same base only once. If the image exists, oven prints its id.
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
    6  the cloud refused a request or failed
    7  the image is baked, but some leftovers could not be removed
    8  this machine lacks something; `oven doctor` lists what is missing
  130  interrupted";

/// Flags of every verb. They may be before or after the verb.
#[derive(Debug, Clone, Args)]
pub struct GlobalArgs {
    /// The cloud to bake in: `aws`, or `local` for a local region, which is a directory [default: local]
    #[arg(
        long,
        global = true,
        value_name = "CLOUD",
        env = "OVEN_CLOUD",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub cloud: Option<String>,
    /// The name of the region [default in AWS: the builder's region]
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
    /// The builder's instance id. It is needed if the metadata service is not reachable
    #[arg(long, global = true, value_name = "ID", env = "OVEN_INSTANCE_ID", help_heading = "Global options")]
    pub instance_id: Option<String>,
    /// The builder's availability zone. It is needed if the metadata service is not reachable
    #[arg(long, global = true, value_name = "ZONE", env = "OVEN_ZONE", help_heading = "Global options")]
    pub zone: Option<String>,
    /// How a bake accesses its disk. `attached` creates a volume and attaches it. `direct` creates no volume; it reads
    /// and writes only the needed blocks (in AWS, with the EBS direct APIs) [default: attached]
    #[arg(
        long,
        global = true,
        value_name = "HOW",
        env = "OVEN_DISKS",
        hide_env_values = true,
        help_heading = "Global options"
    )]
    pub disks: Option<String>,
    /// Also use this distro plugin. May be repeated
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath, help_heading = "Global options")]
    pub plugin: Vec<PathBuf>,
    /// Write a Chrome trace of the run to this file. Open it with ui.perfetto.dev
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Global options")]
    pub trace: Option<PathBuf>,
    /// Print a stream of JSON events on standard output. The last event is the result
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// How to show running steps: `tty` redraws lines in place, `plain` prints a line every 30 seconds, `auto` chooses
    /// `tty` if standard error is a terminal
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "HOW",
        default_value_t,
        hide_possible_values = true,
        help_heading = "Global options"
    )]
    pub progress: ProgressArg,
    /// Whether to use colours: `auto`, `always` or `never`. `auto` uses them if standard error is a terminal, unless
    /// NO_COLOR is set; CLICOLOR_FORCE=1 uses them without a terminal, too
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "WHEN",
        default_value_t,
        hide_possible_values = true,
        help_heading = "Global options"
    )]
    pub color: ColorArg,
    /// Show the output of each step, and the time of each line
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub verbose: bool,
    /// Show only warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub quiet: bool,
}

/// The values of `--progress`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ProgressArg {
    #[default]
    Auto,
    Plain,
    Tty,
}

/// The values of `--color`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorArg {
    #[default]
    Auto,
    Always,
    Never,
}

impl GlobalArgs {
    /// What the flags say about the lines for people.
    pub fn display(&self) -> Display {
        let progress = match self.progress {
            ProgressArg::Auto => ProgressMode::Auto,
            ProgressArg::Plain => ProgressMode::Plain,
            ProgressArg::Tty => ProgressMode::Terminal,
        };
        let color = match self.color {
            ColorArg::Auto => ColorMode::Auto,
            ColorArg::Always => ColorMode::Always,
            ColorArg::Never => ColorMode::Never,
        };
        Display { progress, color }
    }

    /// The values of these flags or of their environment variables. They override oven.toml.
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

/// The examples and remarks at the end of the help texts.
mod examples {
    pub const BAKE: &str = "Examples:
  oven bake web                     print the AMI's id on standard output
  oven bake base web db -j 3        bake parents first, others concurrently
  oven bake --keep-on-failure web   then: oven shell RUN, oven sweep --kept";
    pub const PLAN: &str = "Examples:
  oven plan web                                    already baked? if not, why?
  oven plan --steps web                            the steps that a bake runs
  oven plan --os-release debian.txt web            the steps for that system
  oven plan --os-release void.txt --plugin void.py web";
    pub const VALIDATE: &str = "Examples:
  oven validate web db              check two definitions and their parents
  oven --json validate web          a JSON object for each mistake

Not checked: whether the base image and the packages exist. `oven plan` looks
for the base image, and a bake finds the rest.";
    pub const CHECK: &str = "A golden plan is a pair of files in NAME.golden: CASE.request.json, which\n\
        `oven plan --request` prints, and CASE.answer.json, which --bless writes.";
    pub const NEW: &str = "Examples:
  oven plugin new void              write void.py and void.golden/
  oven plugin new void --lang sh    write void.sh, which needs jq";
    pub const IMPORT: &str = "Examples:
  oven import debian-12.raw --name debian-12-base
  xz -dc debian-12.raw.xz | oven import - --name debian-12-base

A pipe is first copied to a file without a name in $TMPDIR, or in /var/tmp.
The script scripts/make-base in oven's sources makes a Debian image:
scripts/make-base debian-12.raw. If your image has another format, convert it
first: qemu-img convert -O raw debian-12.qcow2 debian-12.raw";
    pub const EXPORT: &str = "Examples:
  oven export ami-0123456789abcdef0 disk.raw
  qemu-img convert -O qcow2 disk.raw disk.qcow2
  oven export ami-0123456789abcdef0 - | zstd > disk.raw.zst

oven verifies every block. The file is sparse. It appears only when complete. A
pipe gets all zeros, and may get a part of the disk before an error is found.";
    pub const SHELL: &str = "Examples:
  oven shell ami-0123456789abcdef0
  oven shell --network 1f2e3d4c -- apt-get update
  oven shell --rerun 1f2e3d4c

A shell on the disk of a run has the files, variables, environment and secrets
of the step that failed. The values of secrets are not stored: set them in
oven's environment.

The exit code is that of the shell. Changes to an image are discarded. Changes
to the disk of a run are preserved until `oven sweep --kept` removes the disk.";
    pub const SWEEP: &str = "oven never removes resources of a run that is known to be active. Disks that\n\
        --keep-on-failure preserved are removed only with --kept. Without --run, the downloads\n\
        that killed bakes left in this machine's package cache are removed, too.";
    pub const POLICY: &str = "Examples:
  oven policy > oven.json
  aws iam put-role-policy --role-name builder --policy-name oven \\
      --policy-document file://oven.json

The policy permits oven to create only resources with oven's tag, and to change
or remove only those. Without --disks, the policy covers bakes with both kinds
of disks. With --disks, it covers only bakes with that kind of disks. The
command needs neither credentials nor a network.";
    pub const COMPLETIONS: &str = "Examples:
  oven completions bash > /etc/bash_completion.d/oven
  oven completions zsh > /usr/local/share/zsh/site-functions/_oven
  oven completions fish > ~/.config/fish/completions/oven.fish";
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
    /// Run the step that failed again, as the bake ran it, instead of a shell
    #[arg(long, conflicts_with_all = ["network", "command"])]
    pub rerun: bool,
    #[command(flatten)]
    pub secrets: SecretArgs,
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
