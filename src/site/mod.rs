//! The site of a bake: its cloud, disks and plugins. Only this module makes them from settings.

#[cfg(feature = "aws")]
mod aws;
mod local;

pub use local::region_dir;

use crate::cloud::block_api::BlockApi;
use crate::cloud::{Cloud, Volumes};
use crate::config::overrides::Overrides;
use crate::config::project::{AWS, Settings};
use crate::definition::Definition;
use crate::disk::DiskStrategy;
use crate::disk::attached_disk::AttachedDisks;
use crate::disk::direct::DirectDisks;
use crate::disk::strategy::SelectedDisks;
use crate::distros;
use crate::distros::PluginRegistry;
use crate::error::Kind;
use crate::ids::RunId;
use crate::provision::context::EgressGuard;
use crate::report::Report;
use crate::sys::state_files;
use crate::text::shell_quote;
use crate::undo::UndoPolicy;
use anyhow::{Context, Result};
use oven_distro::Distro;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The directory of the logs in the state directory.
pub const LOGS: &str = "logs";
/// The directory of the locks of bakes in the state directory.
pub const LOCKS: &str = "locks";
/// A disk with less free space than this, in bytes, is regarded as full.
const FULL: u64 = 64 << 20;

/// The cloud, the disks, the plugins and the directories that a verb works with. Cheap to clone.
#[derive(Clone)]
pub struct Site {
    pub cloud: Rc<dyn Cloud>,
    pub disks: Rc<dyn DiskStrategy>,
    pub distros: Rc<PluginRegistry>,
    /// The program that runs steps: oven's own executable.
    pub helper: PathBuf,
    /// The directory for mount points. It is private to this process if the verb mounted a private tmpfs.
    pub scratch: PathBuf,
    /// The directory for logs and locks.
    pub state: PathBuf,
    pub settings: Rc<Settings>,
    pub report: Report,
    /// The block API of the cloud, which reads and writes snapshots without a volume.
    pub blocks: Rc<dyn BlockApi>,
}

/// The results of checks: a description of each check, and its error if it failed.
pub type Findings = Vec<(String, Result<()>)>;

/// How a verb uses the cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// The verb bakes. In AWS with attached volumes, this machine has to be an EC2 instance.
    Builds,
    /// The verb removes leftovers of killed bakes (`oven sweep`). If this machine is an EC2 instance, its id is
    /// determined, because the id is part of the owner of each resource ([`crate::owner`]).
    Sweeps,
    /// The verb needs no builder instance: it reads, exports or removes images. It works on any machine.
    Looks,
    /// The verb imports an image (`oven import`). This is the only verb that makes a local region.
    Imports,
    /// The verb checks whether this machine can bake (`oven doctor`), and changes nothing.
    Checks,
}

impl Site {
    /// Makes the site that `settings` describe.
    pub async fn new(settings: Settings, report: Report, used: Use) -> Result<Self> {
        if settings.cloud == AWS {
            #[cfg(feature = "aws")]
            return aws::site(settings, report, used).await;
            #[cfg(not(feature = "aws"))]
            return Err(Kind::Usage
                .failure("this oven was built without EC2")
                .hint("Build it with the feature `aws`.")
                .into());
        }
        local::site(settings, report, used)
    }

    /// Makes the site of a cloud. `state` is the state directory of this machine.
    fn with<C, B>(
        cloud: Rc<C>,
        blocks: Rc<B>,
        state: PathBuf,
        settings: Settings,
        report: Report,
    ) -> Result<Self>
    where
        C: Cloud + Volumes + 'static,
        B: BlockApi + 'static,
    {
        let helper = helper()?;
        let direct = DirectDisks::new(blocks.clone(), &state, settings.cache_gib, &helper, &report);
        let disks = SelectedDisks {
            strategy: settings.disks(),
            attached: Rc::new(AttachedDisks::new(cloud.clone())),
            direct: Rc::new(direct),
            state: state.clone(),
        };
        Ok(Self {
            cloud,
            disks: Rc::new(disks),
            distros: Rc::new(plugins(&[], &helper)?),
            helper,
            scratch: crate::sys::private_tmpfs::DIR.into(),
            state,
            settings: Rc::new(settings),
            report,
            blocks,
        })
    }

    /// Makes the site that the flags and the `oven.toml` of these definitions describe.
    pub async fn of(
        overrides: &Overrides,
        definitions: &[Definition],
        report: Report,
        used: Use,
    ) -> Result<Self> {
        let here = PathBuf::from(".");
        let mut dirs = definitions.iter().map(|d| &d.dir);
        let first = Settings::resolve(dirs.next().unwrap_or(&here), overrides)?;
        for dir in dirs {
            let other = Settings::resolve(dir, overrides)?;
            let place = |s: &Settings| {
                (
                    s.cloud.clone(),
                    s.region.clone(),
                    s.region_dir.clone(),
                    s.instance_id.clone(),
                    s.zone.clone(),
                    (s.disks(), s.cache_gib),
                )
            };
            if place(&other) != place(&first) {
                let message = format!(
                    "{} has other settings for cloud, region or disks than the definitions before it",
                    dir.display()
                );
                let hint = "Bake these definitions with separate commands, or give --region-dir.";
                return Err(Kind::Definition.failure(message).hint(hint).into());
            }
        }
        if first.cloud != AWS {
            let dir = local::region_dir(&first);
            refuse_inside(
                "region",
                dir,
                "Choose another directory for the region: --region-dir DIR.",
                definitions,
            )?;
        }
        let mut site = Self::new(first, report, used).await?;
        if !overrides.plugins.is_empty() {
            site.distros = Rc::new(plugins(&overrides.plugins, &site.helper)?);
        }
        for (path, why) in site.distros.refused().iter().filter(|_| matches!(used, Use::Builds | Use::Checks))
        {
            site.report.warn(format!("{} is not used as a plugin: it {why}", path.display()));
        }
        Ok(site)
    }

    /// Checks the requirements of a site. Returns the results, and the site itself if it can be made.
    pub async fn examine(overrides: &Overrides, report: &Report) -> (Findings, Result<Self>) {
        match Settings::resolve(Path::new("."), overrides) {
            #[cfg(feature = "aws")]
            Ok(settings) if settings.cloud == AWS => aws::examine(settings, report.clone()).await,
            _ => (Vec::new(), Self::of(overrides, &[], report.clone(), Use::Checks).await),
        }
    }

    /// Returns the same site with the settings and the report of one of several definitions.
    pub fn for_image(&self, overrides: &Overrides, image: &Definition, report: Report) -> Result<Self> {
        let settings = Rc::new(Settings::resolve(&image.dir, overrides)?);
        Ok(Self { settings, report, ..self.clone() })
    }

    pub fn log(&self, run: &RunId) -> PathBuf {
        self.state.join(LOGS).join(format!("{}.log", run.short()))
    }

    /// Creates an empty directory for the mount points of one bake.
    pub fn scratch(&self, run: &RunId) -> Result<PathBuf> {
        let dir = self.scratch.join(run.short());
        state_files::create_dir(&dir)?;
        Ok(dir)
    }

    pub fn undo_policy(&self, keep_on_failure: bool) -> UndoPolicy {
        let payment = RefCell::new(None);
        let (failed, paying, state) = (self.report.clone(), self.report.clone(), self.state.clone());
        UndoPolicy {
            keep_on_failure,
            on_failure: Box::new(move |error| {
                failed.failure(error);
                // A full disk can be the cause of an error that does not mention it. So the free space is checked.
                if let Some(free) = crate::sys::space::free_space(&state).filter(|free| *free < FULL) {
                    let dir = state.display();
                    failed
                        .warn(format!("only {} MiB are free in {dir}, which may be the reason", free >> 20));
                }
            }),
            on_payment: Box::new(move |what| {
                paying.detail(format!("(removing {what})"));
                payment.replace(Some(paying.activity("clean-up", &format!("removing {what}"))));
            }),
        }
    }

    /// Adds the flags that select this site to a command of oven.
    pub fn command_for_site(&self, command: &str) -> String {
        spelt(&self.settings, &self.state, command)
    }

    /// Returns the guard that keeps steps from the builder's credentials. The guard is required only if this machine
    /// can have credentials for the cloud.
    pub fn egress_guard(&self) -> EgressGuard {
        if self.cloud.has_credentials() { EgressGuard::Required } else { EgressGuard::Wanted }
    }
}

/// The program that runs steps: oven's own executable.
pub fn helper() -> Result<PathBuf> {
    std::env::current_exe().context("finding the executable of oven")
}

/// All plugins: the built-in plugins, the plugins in the plugin directories, and the `given` plugins of the command
/// line.
pub fn plugins(given: &[PathBuf], helper: &Path) -> Result<PluginRegistry> {
    let directories: Vec<_> = distros::PLUGIN_DIRECTORIES.iter().map(PathBuf::from).collect();
    let installed = PluginRegistry::built_in(built_in()).add_installed(&directories, helper);
    given.iter().try_fold(installed, |registry, path| registry.add_given(path, helper))
}

fn built_in() -> Vec<Box<dyn Distro>> {
    vec![Box::new(oven_debian::Debian), Box::new(oven_redhat::RedHat), Box::new(oven_suse::Suse)]
}

/// Adds the flags that select this site to a command `oven …`. The flags are needed if the user runs the command in
/// another environment or directory, where an environment variable or the oven.toml may be missing.
fn spelt(settings: &Settings, state: &Path, command: &str) -> String {
    let Some(rest) = command.strip_prefix("oven ") else { return command.to_owned() };
    let mut flags = Vec::new();
    if settings.cloud == AWS {
        flags.push(("--cloud", AWS.to_owned()));
        let given = [
            ("--region", &settings.region),
            ("--instance-id", &settings.instance_id),
            ("--zone", &settings.zone),
        ];
        flags.extend(given.into_iter().filter_map(|(flag, value)| Some((flag, value.clone()?))));
    } else if settings.region_dir.is_some() {
        let dir = std::path::absolute(state).unwrap_or_else(|_| state.to_owned());
        flags.push(("--region-dir", dir.to_string_lossy().into_owned()));
    }
    flags.extend(settings.disks.map(|disks| ("--disks", disks.as_str().to_owned())));
    let flags: String = flags.iter().map(|(flag, value)| format!("{flag} {} ", shell_quote(value))).collect();
    format!("oven {flags}{rest}")
}

/// Rejects a path that is inside one of these definitions. All files in a definition are part of its fingerprint. So a
/// file that each bake changes would cause a new image each time.
pub fn refuse_inside(what: &str, path: &Path, hint: &str, definitions: &[Definition]) -> Result<()> {
    let absolute = std::path::absolute(path).with_context(|| format!("looking for {}", path.display()))?;
    // The path may not exist yet. So the nearest parent that exists is checked.
    let real = absolute.ancestors().find_map(|dir| dir.canonicalize().ok()).unwrap_or_default();
    for dir in definitions.iter().flat_map(Definition::directories) {
        if dir.canonicalize().is_ok_and(|dir| real.starts_with(dir)) {
            let (path, dir) = (path.display(), dir.display());
            let message = format!(
                "the {what} {path} is inside the directory {dir}, and all files of that directory are part of the \
                 definition"
            );
            return Err(Kind::Definition.failure(message).hint(hint).into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::project::Strategy;

    #[test]
    fn a_command_says_where() {
        let typed = |settings: &Settings| spelt(settings, Path::new("/var/x y"), "oven sweep --run 1f");
        let local = Settings::default();
        assert_eq!(typed(&local), "oven sweep --run 1f");
        let elsewhere = Settings { region_dir: Some("x y".into()), ..local.clone() };
        assert_eq!(typed(&elsewhere), "oven --region-dir '/var/x y' sweep --run 1f");
        let aws = Settings { cloud: AWS.into(), ..elsewhere };
        assert_eq!(typed(&aws), "oven --cloud aws sweep --run 1f");
        let (id, zone) = (Some("i-0123456789abcdef0".into()), Some("eu-west-1a".into()));
        let given = Settings { region: Some("eu-west-1".into()), instance_id: id, zone, ..aws };
        assert_eq!(
            typed(&given),
            "oven --cloud aws --region eu-west-1 --instance-id i-0123456789abcdef0 --zone eu-west-1a sweep --run 1f"
        );
        let direct = Settings { disks: Some(Strategy::Direct), ..local };
        assert_eq!(typed(&direct), "oven --disks direct sweep --run 1f");
        assert_eq!(spelt(&given, Path::new("/"), "rm x"), "rm x");
    }
}
