//! The flags of every verb.

use super::values::Words;
use crate::config::overrides::Overrides;
use crate::config::project::{cloud_names, disk_names};
use crate::report::{ColorMode, Display, ProgressMode};
use clap::{Args, ValueEnum, ValueHint};
use std::path::PathBuf;

/// Flags of every verb. They may be before or after the verb.
#[derive(Debug, Clone, Args)]
pub struct GlobalArgs {
    /// The cloud: `local` (default) or `aws`.
    ///
    /// `local` is a local region: a directory that contains images.
    #[arg(
        long,
        global = true,
        value_name = "CLOUD",
        env = "OVEN_CLOUD",
        hide_env_values = true,
        hide_possible_values = true,
        value_parser = Words::new(cloud_names())
    )]
    pub cloud: Option<String>,
    /// The name of the region [default in AWS: the builder's region]
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        env = "OVEN_REGION",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub region: Option<String>,
    /// The directory of the local region [default: /var/lib/oven/region]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "OVEN_REGION_DIR",
        hide_env_values = true,
        hide_short_help = true,
        value_hint = ValueHint::DirPath
    )]
    pub region_dir: Option<PathBuf>,
    /// The builder's instance id.
    ///
    /// It is needed if the metadata service is not reachable.
    #[arg(
        long,
        global = true,
        value_name = "ID",
        env = "OVEN_INSTANCE_ID",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub instance_id: Option<String>,
    /// The builder's availability zone.
    ///
    /// It is needed if the metadata service is not reachable.
    #[arg(
        long,
        global = true,
        value_name = "ZONE",
        env = "OVEN_ZONE",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub zone: Option<String>,
    /// Disks: `attached` (default) or `direct`.
    ///
    /// How a bake accesses its disk. `attached` creates a volume and attaches it. `direct` creates no volume; it reads
    /// and writes only the needed blocks (in AWS, with the EBS direct APIs).
    #[arg(
        long,
        global = true,
        value_name = "HOW",
        env = "OVEN_DISKS",
        hide_env_values = true,
        hide_possible_values = true,
        value_parser = Words::new(disk_names())
    )]
    pub disks: Option<String>,
    /// Also use this distro plugin. May be repeated
    #[arg(long, global = true, value_name = "PATH", hide_short_help = true, value_hint = ValueHint::FilePath)]
    pub plugin: Vec<PathBuf>,
    /// Write a Chrome trace of the run to this file. Open it with ui.perfetto.dev
    #[arg(long, global = true, value_name = "FILE", hide_short_help = true, value_hint = ValueHint::FilePath)]
    pub trace: Option<PathBuf>,
    /// Print a stream of JSON events on standard output. The last event is the result
    #[arg(long, global = true, hide_short_help = true)]
    pub json: bool,
    /// How to show running steps: `auto`, `plain` or `tty`.
    ///
    /// `tty` redraws lines in place, `plain` prints a line every 30 seconds, and `auto` chooses `tty` if standard error
    /// is a terminal.
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "HOW",
        default_value_t,
        hide_possible_values = true,
        hide_short_help = true
    )]
    pub progress: ProgressArg,
    /// Whether to use colours: `auto`, `always` or `never`.
    ///
    /// `auto` uses them if standard error is a terminal, unless NO_COLOR is set. CLICOLOR_FORCE=1 uses them without a
    /// terminal, too.
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "WHEN",
        default_value_t,
        hide_possible_values = true,
        hide_short_help = true
    )]
    pub color: ColorArg,
    /// Show the output of each step, and the time of each line
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Show only warnings and errors
    #[arg(short, long, global = true, hide_short_help = true, conflicts_with = "verbose")]
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
