//! Does what a bake does, with nothing in it: what a container or a hardened kernel forbids only shows when it is tried.

use super::Check;
use crate::cloud::SnapshotId;
use crate::cloud::blocks::{BLOCK, Contents, Digest, Reader};
use crate::disk::cache::Cache;
use crate::disk::export::{self, Export};
use crate::disk::kept::Written;
use crate::disk::lower::Lower;
use crate::disk::{loopdev, marks};
use crate::root::execute::Guard;
use crate::root::step::{self, ExitStatus, Spec};
use crate::scratch;
use crate::settings::Strategy;
use crate::site::Site;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The smallest thing that can be a disk.
const DISK: u64 = 1 << 20;
/// A step that does nothing takes milliseconds.
const TIMEOUT: Duration = Duration::from_secs(30);
/// No image has it, and this one has nothing.
const PROGRAM: &str = "/oven-doctor";
const PRIVILEGED: &str = "In a container: run it privileged.";

/// An empty disk in a local region, and contained steps in an empty image. Nothing of it stays; the mounts are this
/// process's own.
pub async fn trial(site: &Site) -> Vec<Check> {
    let mut checks = Vec::new();
    if site.region.is_some() {
        checks.push(Check::tried("a disk in the region", &disk(&site.state).await, PRIVILEGED));
    }
    if site.settings.disks() == Strategy::Direct {
        checks.push(Check::tried("a disk that is served", &served(site).await, PRIVILEGED));
    }
    let root = empty_image();
    checks.push(Check::tried("mounts of its own", &root, PRIVILEGED));
    let Ok(root) = root else { return checks };
    for (what, network) in [("a contained step", false), ("a contained step with the network", true)] {
        checks.push(Check::tried(what, &step(site, &root, network, false).await, PRIVILEGED));
    }
    let throwaway = step(site, &root, false, true).await;
    let note =
        throwaway.as_ref().err().map(|error| format!("no image with a [[test]] can be baked: {error:#}"));
    checks.push(Check::note("a contained step of a [[test]]", note.is_none(), &note.unwrap_or_default()));
    checks
}

async fn disk(region: &Path) -> Result<()> {
    let file = tempfile::tempfile_in(region).context("making a file")?;
    file.set_len(DISK).context("making a file")?;
    let device = loopdev::attach(&file, "doctor")?;
    loopdev::release(device).await
}

/// The same, without a base.
async fn served(site: &Site) -> Result<()> {
    let dir = tempfile::tempdir_in(&site.state).context("making a directory")?;
    let (id, nothing) = (SnapshotId("doctor".to_owned()), Contents { size_gib: 1, blocks: [].into() });
    let lower = Lower::new(&id, &nothing, Arc::new(Nothing), Cache::new(dir.path(), 0).of(&id)?);
    let written = Written::new(dir.path())?;
    written.upper().set_len(DISK).context("making a file")?;
    marks::begin(written.marks(), (DISK / BLOCK as u64) as u32, &nothing)?;
    let (helper, name) = (&site.helper, "oven-doctor");
    let spec =
        export::Spec { helper, name, upper: written.upper(), marks: written.marks(), place: dir.path() };
    let export = Export::start(&spec, &Arc::new(lower))?;
    let device = loopdev::attach(&export.file, "doctor")?;
    loopdev::release(device).await
}

/// A base without blocks.
struct Nothing;
impl Reader for Nothing {
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        bail!("there is no block {index}")
    }
}

/// A mount point with the directories that every image has.
fn empty_image() -> Result<PathBuf> {
    step::private_mounts()?;
    scratch::make()?;
    let root = Path::new(scratch::DIR).join("doctor");
    for dir in ["dev", "etc", "proc", "run", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(dir))
            .with_context(|| format!("making {dir} in {}", root.display()))?;
    }
    Ok(root)
}

async fn step(site: &Site, root: &Path, network: bool, throwaway: bool) -> Result<()> {
    let spec = Spec {
        root: root.to_owned(),
        argv: vec![PROGRAM.to_owned()],
        env: BTreeMap::new(),
        cwd: "/".to_owned(),
        network,
        fenced: network && site.guard() == Guard::Required,
        resolv_conf: None,
        shims: Vec::new(),
        binds: Vec::new(),
        caches: Vec::new(),
        nodes: Vec::new(),
        throwaway,
        interactive: false,
    };
    let mut output = Vec::new();
    let exit = step::run(&site.helper, &spec, TIMEOUT, &mut |line| output.push(line.to_owned())).await?;
    match exit.status {
        // All was made ready for a program that is not there.
        ExitStatus::Exited(127) => Ok(()),
        other => bail!("{other}: {}", output.join(" ")),
    }
}
