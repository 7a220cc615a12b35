//! Where a bake takes place: settings become a cloud, disks and distros here, and nowhere else.

use crate::ask;
use crate::cli::{Global, Wish};
use crate::cloud::local::Region;
use crate::cloud::{Architecture, Base, BaseRef, Cloud, Image, ImageId, ImageSpec, RunId, SnapshotId, Tags};
use crate::definition::Definition;
use crate::disk::attached::Attached;
use crate::disk::{Disk, Disks};
use crate::distros::{self, Registry};
use crate::download;
use crate::error::Kind;
use crate::machine;
use crate::report::Report;
use crate::root::Root;
use crate::root::execute::{Guard, Work};
use crate::secrets::Secrets;
use crate::settings::{AWS, Overrides, Settings};
use crate::undo::{Policy, Undo};
use anyhow::{Context, Result};
use oven_distro::{Distro, Plan};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Where the local region is unless something else is said: the system's state directory (file-hierarchy(7)).
const REGION_DIR: &str = "/var/lib/oven/region";

/// For logs, locks and documents of a bake on AWS.
#[cfg(feature = "aws")]
const STATE_DIR: &str = "/var/lib/oven";

/// With less than this a volume cannot grow.
const FULL: u64 = 64 << 20;

/// All that a bake needs to know of its surroundings. Cheap to clone.
#[derive(Clone)]
pub struct Site {
    pub cloud: Rc<dyn Cloud>,
    pub disks: Rc<dyn Disks>,
    pub distros: Rc<Registry>,
    /// The program that steps are run by: this one, re-executed.
    pub helper: PathBuf,
    /// For mount points: private to this process where `main` made it so.
    pub scratch: PathBuf,
    /// For logs and locks.
    pub state: PathBuf,
    pub settings: Rc<Settings>,
    pub report: Report,
    /// The local region, where the cloud is one: images are imported into it, and removed from it.
    pub region: Option<Region>,
}

/// What a verb does with the cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Attaches volumes: this has to be a builder instance, in AWS.
    Builds,
    /// Has to tell whose processes are this machine's, if it is an instance at all.
    Sweeps,
    /// Only asks.
    Looks,
}

impl Site {
    /// The site that `settings` describe.
    pub async fn new(settings: Settings, report: Report, used: Use) -> Result<Self> {
        if settings.cloud == AWS {
            return Self::on_aws(settings, report, used).await;
        }
        let state = settings.region_dir.clone().unwrap_or_else(|| REGION_DIR.into());
        let region = Region::open(&state)?;
        let disks = Rc::new(Attached::new(Rc::new(region.clone())));
        Self::with(Rc::new(region.clone()), disks, state, settings, report, Some(region))
    }

    #[cfg(feature = "aws")]
    async fn on_aws(settings: Settings, report: Report, used: Use) -> Result<Self> {
        use crate::cloud::{VolumeId, ec2, instance, nvme};
        let (instance_id, zone) = (settings.instance_id.clone(), settings.zone.clone());
        let given = instance::Given { instance_id, zone, region: settings.region.clone() };
        let (sys, dev) = (Path::new("/sys"), Path::new("/dev"));
        let instance = match used {
            Use::Builds if !nvme::has_nvme(sys) => {
                let failure = Kind::Machine
                    .failure("this machine has no NVMe disks: oven finds a volume by its NVMe serial");
                return Err(failure.hint("Bake on an instance of the Nitro system.").into());
            }
            Use::Builds => Some(instance::who_am_i(given).await.context("asking which instance this is")?),
            Use::Sweeps => instance::who_am_i(given).await.ok(),
            Use::Looks => None,
        };
        let (instance_id, zone, at) =
            instance.map(|i| (Some(i.id), Some(i.zone), Some(i.region))).unwrap_or_default();
        let state = PathBuf::from(STATE_DIR);
        let cloud = ec2::Ec2::connect(ec2::Options {
            region: settings.region.clone().or(at),
            instance_id,
            zone,
            documents: state.join("aws"),
            devices: Rc::new(move |volume: &VolumeId| nvme::find(sys, dev, volume)),
            pace: ec2::Pace::default(),
        })
        .await?;
        let disks = Rc::new(Attached::new(Rc::new(cloud.clone())));
        Self::with(Rc::new(cloud), disks, state, settings, report, None)
    }

    #[cfg(not(feature = "aws"))]
    #[allow(clippy::unused_async, reason = "as with the feature")]
    async fn on_aws(_: Settings, _: Report, _: Use) -> Result<Self> {
        Err(Kind::Usage
            .failure("this oven was built without EC2")
            .hint("Build it with the feature `aws`.")
            .into())
    }

    fn with(
        cloud: Rc<dyn Cloud>,
        disks: Rc<dyn Disks>,
        state: PathBuf,
        settings: Settings,
        report: Report,
        region: Option<Region>,
    ) -> Result<Self> {
        let helper = helper()?;
        Ok(Self {
            cloud,
            disks,
            distros: Rc::new(plugins(&[], &helper)?),
            helper,
            scratch: crate::scratch::DIR.into(),
            state,
            settings: Rc::new(settings),
            report,
            region,
        })
    }

    /// The site that the flags and the `oven.toml` of these definitions describe.
    pub async fn of(global: &Global, definitions: &[Definition], report: Report, used: Use) -> Result<Self> {
        let here = PathBuf::from(".");
        let mut dirs = definitions.iter().map(|d| &d.dir);
        let first = Self::settings(global, dirs.next().unwrap_or(&here))?;
        for dir in dirs {
            let other = Self::settings(global, dir)?;
            let place = |s: &Settings| {
                (
                    s.cloud.clone(),
                    s.region.clone(),
                    s.region_dir.clone(),
                    s.instance_id.clone(),
                    s.zone.clone(),
                )
            };
            if place(&other) != place(&first) {
                let message =
                    format!("{} has another cloud or region than the definitions before it", dir.display());
                let hint = "Bake definitions of different regions one after another, or give --region-dir.";
                return Err(Kind::Definition.failure(message).hint(hint).into());
            }
        }
        if first.cloud != AWS {
            refuse_region_inside(first.region_dir.as_deref().unwrap_or(Path::new(REGION_DIR)), definitions)?;
        }
        let mut site = Self::new(first, report, used).await?;
        if !global.plugin.is_empty() {
            site.distros = Rc::new(plugins(&global.plugin, &site.helper)?);
        }
        for (path, why) in site.distros.refused().iter().filter(|_| used == Use::Builds) {
            site.report.warn(format!("{} is not used as a plugin: it {why}", path.display()));
        }
        Ok(site)
    }

    fn settings(global: &Global, dir: &Path) -> Result<Settings> {
        let overrides = Overrides {
            cloud: global.cloud.clone(),
            region: global.region.clone(),
            region_dir: global.region_dir.clone(),
            instance_id: global.instance_id.clone(),
            zone: global.zone.clone(),
        };
        Settings::for_definition(dir)?.merge(&overrides)
    }

    /// The same site for one of several definitions: its own settings, its own lines.
    pub fn for_image(&self, global: &Global, image: &Definition, report: Report) -> Result<Self> {
        Ok(Self { settings: Rc::new(Self::settings(global, &image.dir)?), report, ..self.clone() })
    }

    pub async fn import(&self, raw: &Path, name: &str, architecture: Architecture) -> Result<Image> {
        self.local("import")?.import(raw, name, architecture, &Tags::new(), &self.report).await
    }

    /// Removes an image, and its snapshot if no other one uses it.
    pub async fn remove(&self, image: &ImageId, snapshot: &SnapshotId) -> Result<()> {
        let region = self.local("images remove")?;
        region.deregister(image).await.with_context(|| format!("deregistering {image}"))?;
        let used = self.cloud.images(None).await?.iter().any(|other| other.snapshot == *snapshot);
        if used { Ok(()) } else { region.delete_snapshot(snapshot).await }
            .with_context(|| format!("deleting {snapshot}, which was that of {image}"))
    }

    fn local(&self, verb: &str) -> Result<&Region> {
        self.region.as_ref().ok_or_else(|| {
            let failure = Kind::Usage.failure(format!("`oven {verb}` is for a local region"));
            failure.hint("In AWS, use its own tools.").into()
        })
    }

    pub fn log(&self, run: &RunId) -> PathBuf {
        self.state.join("logs").join(format!("{}.log", run.short()))
    }

    /// An empty directory for a run's mount points.
    pub fn scratch(&self, run: &RunId) -> Result<PathBuf> {
        let dir = self.scratch.join(run.short());
        std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(dir)
    }

    pub fn policy(&self, wish: &Wish) -> Policy {
        let (failed, paying, state) = (self.report.clone(), self.report.clone(), self.state.clone());
        Policy {
            keep_on_failure: wish.keep_on_failure,
            on_failure: Box::new(move |error| {
                failed.failure(error);
                // A disk that cannot grow any more fails in ways that do not name the reason.
                if let Some(free) = machine::free_space(&state).filter(|free| *free < FULL) {
                    let dir = state.display();
                    failed.warn(format!("only {} MiB are free in {dir}: that may be the reason", free >> 20));
                }
            }),
            on_payment: Box::new(move |what| paying.detail(format!("(removing {what})"))),
        }
    }

    /// A command of ours as it has to be typed to meet this region.
    pub fn spelt(&self, command: &str) -> String {
        let (Some(_), Some(rest)) = (&self.settings.region_dir, command.strip_prefix("oven ")) else {
            return command.to_owned();
        };
        let dir = std::path::absolute(&self.state).unwrap_or_else(|_| self.state.clone());
        let dir = dir.to_string_lossy();
        let plain = dir.chars().all(|c| c.is_alphanumeric() || "/._-+@%".contains(c));
        let dir = if plain { dir.into_owned() } else { format!("'{}'", dir.replace('\'', r"'\''")) };
        format!("oven --region-dir {dir} {rest}")
    }

    /// The base image of a definition.
    pub async fn resolve(&self, image: &Definition, from: &BaseRef) -> Result<Base> {
        let base = self.cloud.base(from).await.with_context(|| image.place("from", None))?;
        match image.size_gib {
            Some(size) if size < base.size_gib => {
                let place = image.place("size_gib", None);
                let message = format!(
                    "{place} is {size}, less than the {} GiB of {} ({})",
                    base.size_gib, base.id, base.name
                );
                Err(Kind::Definition.failure(message).hint("A disk can grow, and not shrink.").into())
            }
            _ => Ok(base),
        }
    }

    pub async fn checkout(
        &self,
        base: &Base,
        image: &Definition,
        run: &RunId,
        undo: &Rc<Undo>,
    ) -> Result<Box<dyn Disk>> {
        let step = self.report.step("checkout", format!("checking out the disk of {}", base.id));
        let disk = self.disks.checkout(base, &ask::disk(image, base, run)?, run, undo).await?;
        step.done();
        Ok(disk)
    }

    /// The definition with its packages by URL, downloaded.
    pub async fn download(&self, image: &Definition) -> Result<Definition> {
        let dir = self.state.join(download::DIR);
        let dir = std::path::absolute(&dir).with_context(|| format!("looking for {}", dir.display()))?;
        download::packages(image, &dir, &self.settings.network, &self.report).await
    }

    pub fn work<'a>(&'a self, image: &'a Definition, plan: &'a Plan, secrets: &'a Secrets) -> Work<'a> {
        let network = &self.settings.network;
        Work {
            image,
            plan,
            network,
            secrets,
            guard: self.guard(),
            helper: &self.helper,
            report: &self.report,
        }
    }

    /// What the definition's scripts are told in confidence, which is told nowhere else from now on.
    pub fn secrets(&self, image: &Definition) -> Result<Secrets> {
        let secrets = Secrets::of(image)?;
        self.report.hide(&secrets);
        Ok(secrets)
    }

    /// What keeps steps from the builder's credentials.
    pub fn guard(&self) -> Guard {
        if self.settings.cloud == AWS { Guard::Required } else { Guard::Wanted }
    }

    pub async fn close(&self, root: Root<'_>) -> Result<()> {
        let step = self.report.step("release", "unmounting, and proving that the disk is free");
        root.close().await?;
        step.done();
        Ok(())
    }

    pub async fn commit(&self, disk: Box<dyn Disk>, undo: &Rc<Undo>) -> Result<SnapshotId> {
        let step = self.report.step("snapshot", "taking the snapshot");
        let snapshot = disk.commit(undo).await.context("taking the snapshot")?;
        step.done();
        Ok(snapshot)
    }

    pub async fn register(&self, snapshot: &SnapshotId, spec: &ImageSpec, undo: &Undo) -> Result<Image> {
        let step = self.report.step("register", format!("registering {}", spec.name));
        let image = self
            .cloud
            .register(snapshot, spec, undo)
            .await
            .with_context(|| format!("registering {snapshot}"))?;
        step.done();
        Ok(image)
    }
}

/// This program, which is its own helper.
pub fn helper() -> Result<PathBuf> {
    std::env::current_exe().context("looking for this program")
}

/// All plugins: those that are built in, those of the directories, and these of the command line.
pub fn plugins(given: &[PathBuf], helper: &Path) -> Result<Registry> {
    let directories: Vec<_> = distros::DIRECTORIES.iter().map(PathBuf::from).collect();
    let installed = Registry::built_in(built_in()).look(&directories, helper);
    given.iter().try_fold(installed, |registry, path| registry.give(path, helper))
}

fn built_in() -> Vec<Box<dyn Distro>> {
    vec![Box::new(oven_debian::Debian), Box::new(oven_redhat::RedHat), Box::new(oven_suse::Suse)]
}

/// Every file of a definition counts: a region in it would make each bake a new one.
fn refuse_region_inside(region: &Path, definitions: &[Definition]) -> Result<()> {
    let absolute =
        std::path::absolute(region).with_context(|| format!("looking for {}", region.display()))?;
    // It may not be there yet.
    let real = absolute.ancestors().find_map(|dir| dir.canonicalize().ok()).unwrap_or_default();
    for dir in definitions.iter().flat_map(Definition::directories) {
        if dir.canonicalize().is_ok_and(|dir| real.starts_with(dir)) {
            let message = format!(
                "the region {} is inside of {}, whose files all count",
                region.display(),
                dir.display()
            );
            return Err(Kind::Definition
                .failure(message)
                .hint("Keep the region elsewhere: --region-dir DIR.")
                .into());
        }
    }
    Ok(())
}
