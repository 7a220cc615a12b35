//! Where a bake takes place: settings become a cloud, disks and distros here, and nowhere else.

use crate::ask;
use crate::cli::{Global, Wish};
use crate::cloud::local::Region;
use crate::cloud::{Architecture, Base, BaseRef, Cloud, Image, ImageSpec, RunId, SnapshotId, Tags};
use crate::definition::Definition;
use crate::disk::attached::Attached;
use crate::disk::{Disk, Disks};
use crate::error::Kind;
use crate::report::Report;
use crate::root::Root;
use crate::root::execute::{Guard, Work};
use crate::settings::{AWS, Overrides, Settings};
use crate::undo::{Policy, Undo};
use anyhow::{Context, Result};
use oven_distro::{Distro, Plan};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Where the local region is unless something else is said: the system's state directory (file-hierarchy(7)).
const REGION_DIR: &str = "/var/lib/oven/region";

/// All that a bake needs to know of its surroundings. Cheap to clone.
#[derive(Clone)]
pub struct Site {
    pub cloud: Rc<dyn Cloud>,
    pub disks: Rc<dyn Disks>,
    pub distros: Rc<[Box<dyn Distro>]>,
    /// The program that steps are run by: this one, re-executed.
    pub helper: PathBuf,
    /// For mount points: private to this process where `main` made it so.
    pub scratch: PathBuf,
    /// For logs and locks.
    pub state: PathBuf,
    pub settings: Rc<Settings>,
    pub report: Report,
    pub region: Region,
}

impl Site {
    /// The site that `settings` describe.
    pub fn new(settings: Settings, report: Report) -> Result<Self> {
        if settings.cloud == AWS {
            return Err(Kind::Cloud.error("this oven cannot bake on EC2 yet"));
        }
        let state = settings.region_dir.clone().unwrap_or_else(|| REGION_DIR.into());
        let region = Region::open(&state)?;
        Ok(Self {
            cloud: Rc::new(region.clone()),
            disks: Rc::new(Attached::new(Rc::new(region.clone()))),
            distros: Rc::from([Box::new(oven_debian::Debian) as Box<dyn Distro>]),
            helper: std::env::current_exe().context("looking for this program")?,
            scratch: crate::scratch::DIR.into(),
            state,
            settings: Rc::new(settings),
            report,
            region,
        })
    }

    /// The site that the flags and the `oven.toml` of these definitions describe.
    pub fn of(global: &Global, definitions: &[Definition], report: Report) -> Result<Self> {
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
        Self::new(first, report)
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
        self.region.import(raw, name, architecture, &Tags::new(), &self.report).await
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
        let (failed, paying) = (self.report.clone(), self.report.clone());
        Policy {
            keep_on_failure: wish.keep_on_failure,
            on_failure: Box::new(move |error| failed.failure(error)),
            on_payment: Box::new(move |what| paying.detail(format!("(removing {what})"))),
        }
    }

    pub async fn resolve(&self, from: &BaseRef) -> Result<Base> {
        self.cloud.base(from).await.context("looking up the base image")
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

    pub fn work<'a>(&'a self, image: &'a Definition, plan: &'a Plan) -> Work<'a> {
        let network = &self.settings.network;
        Work { image, plan, network, guard: self.guard(), helper: &self.helper, report: &self.report }
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
