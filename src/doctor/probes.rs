//! Tries the parts of a bake on empty disks and images. Only a trial shows what a container or a hardened kernel
//! forbids.

use super::checks::Check;
use crate::cloud::block_api::{SnapshotContents, SnapshotReader};
use crate::config::project::StepLimits;
use crate::disk::direct::backing::BackingStore;
use crate::disk::direct::block_cache::BlockCache;
use crate::disk::direct::block_map;
use crate::disk::direct::preserved_disk::WrittenFiles;
use crate::disk::direct::server;
use crate::disk::direct::server::DiskServer;
use crate::ids::SnapshotId;
use crate::ids::{BLOCK, Digest};
use crate::provision::context::EgressGuard;
use crate::sandbox;
use crate::sandbox::spec::{ExitStatus, StepSpec};
use crate::sys::loop_device;
use crate::sys::namespaces;
use crate::sys::private_tmpfs;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The size of the disk in bytes. The disk is small, but valid.
const DISK: u64 = 1 << 20;
/// The time limit of a step that does nothing. Such a step takes milliseconds.
const TIMEOUT: Duration = Duration::from_secs(30);
/// A program that does not exist in the empty image.
const PROGRAM: &str = "/oven-doctor";
const PRIVILEGED: &str = "If oven runs in a container, make the container privileged.";

/// The paths and settings for the trial.
pub struct Probe<'a> {
    /// The path of oven's own executable, which also runs steps.
    pub helper: &'a Path,
    /// The directory of the local region, if there is one.
    pub region: Option<&'a PathBuf>,
    /// Whether volumes are loop devices of a local region.
    pub in_region: bool,
    /// Whether disks are direct, that is, served by oven itself.
    pub direct: bool,
    pub egress: EgressGuard,
}

/// Attaches an empty disk, and runs isolated steps in an empty image. Nothing remains afterwards, because the mounts
/// are private to this process.
pub async fn run(probe: &Probe<'_>) -> Vec<Check> {
    let mut checks = Vec::new();
    let root = create_empty_image();
    checks.push(Check::from_result("private mounts", &root, PRIVILEGED));
    let Ok(root) = root else { return checks };
    if probe.in_region {
        // Without a region, the disk is in the private tmpfs, so that nothing is written to a directory of the user.
        let dir = probe.region.map_or(Path::new(private_tmpfs::DIR), PathBuf::as_path);
        checks.push(Check::from_result("a disk in the region", &attach_disk(dir).await, PRIVILEGED));
    }
    if probe.direct {
        checks.push(Check::from_result("a direct disk", &serve_disk(probe).await, PRIVILEGED));
    }
    for (what, network) in [("a contained step", false), ("a contained step with the network", true)] {
        checks.push(Check::from_result(what, &run_step(probe, &root, network, false).await, PRIVILEGED));
    }
    let throwaway = run_step(probe, &root, false, true).await;
    let note =
        throwaway.as_ref().err().map(|error| format!("images with a [[test]] cannot be baked: {error:#}"));
    checks.push(Check::optional("a contained step of a [[test]]", note.is_none(), &note.unwrap_or_default()));
    checks
}

async fn attach_disk(region: &Path) -> Result<()> {
    let file = tempfile::tempfile_in(region).context("creating a file")?;
    file.set_len(DISK).context("creating a file")?;
    let device = loop_device::attach(&file, "doctor")?;
    loop_device::release(device).await
}

/// Serves and attaches an empty direct disk, without a base.
async fn serve_disk(probe: &Probe<'_>) -> Result<()> {
    let dir = tempfile::tempdir_in(private_tmpfs::DIR).context("creating a directory")?;
    let (id, nothing) =
        (SnapshotId("doctor".to_owned()), SnapshotContents { size_gib: 1, blocks: [].into() });
    let lower = BackingStore::new(
        &id,
        &nothing,
        Arc::new(EmptyBase),
        BlockCache::new(dir.path(), 0).open_snapshot(&id)?,
    );
    let written = WrittenFiles::new(dir.path())?;
    written.upper().set_len(DISK).context("creating a file")?;
    block_map::create(written.marks(), (DISK / BLOCK as u64) as u32, &nothing)?;
    let (helper, name) = (probe.helper, "oven-doctor");
    let spec = server::DiskServerSpec {
        helper,
        name,
        upper: written.upper(),
        marks: written.marks(),
        place: dir.path(),
    };
    let server = DiskServer::start(&spec, &Arc::new(lower))?;
    let device = loop_device::attach(&server.file, "doctor")?;
    loop_device::release(device).await
}

/// A base snapshot without blocks.
struct EmptyBase;
impl SnapshotReader for EmptyBase {
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        bail!("there is no block {index}")
    }
}

/// Creates a root directory with the directories that every image has.
fn create_empty_image() -> Result<PathBuf> {
    namespaces::private_mounts()?;
    private_tmpfs::mount()?;
    let root = Path::new(private_tmpfs::DIR).join("doctor");
    for dir in ["dev", "etc", "proc", "run", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(dir))
            .with_context(|| format!("creating {dir} in {}", root.display()))?;
    }
    Ok(root)
}

async fn run_step(probe: &Probe<'_>, root: &Path, network: bool, throwaway: bool) -> Result<()> {
    let spec = StepSpec {
        root: root.to_owned(),
        argv: vec![PROGRAM.to_owned()],
        env: BTreeMap::new(),
        cwd: "/".to_owned(),
        network,
        fenced: network && probe.egress == EgressGuard::Required,
        resolv_conf: None,
        shims: Vec::new(),
        binds: Vec::new(),
        caches: Vec::new(),
        nodes: Vec::new(),
        disk_writable: false,
        limits: StepLimits::default(),
        audit_socket: false,
        status: false,
        throwaway,
        interactive: false,
    };
    let mut output = Vec::new();
    let exit = sandbox::run(probe.helper, &spec, TIMEOUT, &mut |line| output.push(line.to_owned())).await?;
    match exit.status {
        // 127 means that the program was not found. This is expected, and shows that the step was set up. So the trial
        // succeeded.
        ExitStatus::Exited(127) => Ok(()),
        other => bail!("{other}: {}", output.join(" ")),
    }
}
