//! A cloud whose nth call fails, hangs or kills the process, before or after its effect.

use anyhow::{Result, bail};
use async_trait::async_trait;
use oven::cloud::block_api::{BlockApi, NewSnapshot, ParentUse, SnapshotContents, SnapshotReader};
use oven::cloud::*;
use oven::device::Device;
use oven::error::Kind;
use oven::ids::Digest;
use oven::ids::{ImageId, RunId, SnapshotId, VolumeId};
use oven::undo::Undo;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Before,
    After,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Error,
    Kill,
    Hang,
}

/// `3:after:kill`; or `read-3:after:kill`, of the blocks that are read, which several threads do.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub read: bool,
    pub call: usize,
    pub when: When,
    pub what: What,
}

impl FromStr for Fault {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> Result<Self> {
        let parts: Vec<_> = text.split(':').collect();
        let [call, when, what] = parts[..] else { bail!("CALL:WHEN:WHAT, not {text}") };
        let when = if when == "before" { When::Before } else { When::After };
        let what = match what {
            "error" => What::Error,
            "kill" => What::Kill,
            "hang" => What::Hang,
            _ => bail!("error, kill or hang, not {what}"),
        };
        let (read, call) = call.strip_prefix("read-").map_or((false, call), |call| (true, call));
        Ok(Self { read, call: call.parse()?, when, what })
    }
}

/// Counts calls over all traits, and strikes once with each fault.
pub struct Faulty<T> {
    inner: T,
    faults: Vec<Fault>,
    calls: Cell<usize>,
    /// `OVEN_TEST_READER`.
    reading: Option<String>,
    reads: Arc<AtomicUsize>,
    whole: bool,
}

impl<T> Faulty<T> {
    pub fn new(inner: T, faults: Vec<Fault>) -> Self {
        let reading = std::env::var("OVEN_TEST_READER").ok();
        Self { inner, faults, calls: Cell::new(0), reading, reads: Arc::default(), whole: false }
    }

    /// No snapshot can have children: all of it is sent.
    pub fn whole(self, whole: bool) -> Self {
        Self { whole, ..self }
    }

    pub fn calls(&self) -> usize {
        self.calls.get()
    }

    /// Of blocks.
    pub fn reads(&self) -> usize {
        self.reads.load(Ordering::Relaxed)
    }

    async fn around<R>(&self, name: &str, call: impl Future<Output = Result<R>>) -> Result<R> {
        let number = self.calls.get() + 1;
        self.calls.set(number);
        self.strike(name, number, When::Before).await?;
        let result = call.await;
        self.strike(name, number, When::After).await?;
        result
    }

    async fn strike(&self, name: &str, number: usize, when: When) -> Result<()> {
        match find(&self.faults, false, number, when) {
            Some(What::Error) => Err(Kind::Cloud.error(format!("injected fault {when:?} {name}"))),
            Some(What::Kill) => {
                kill()?;
                std::future::pending().await
            }
            Some(What::Hang) => {
                println!("hanging");
                std::future::pending().await
            }
            None => Ok(()),
        }
    }
}

fn find(faults: &[Fault], read: bool, number: usize, when: When) -> Option<What> {
    let is = |fault: &&Fault| (fault.read, fault.call, fault.when) == (read, number, when);
    faults.iter().find(is).map(|fault| fault.what)
}

fn kill() -> Result<()> {
    Ok(nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL)?)
}

/// The same of blocks that are read.
struct FaultyReader {
    inner: Arc<dyn SnapshotReader>,
    faults: Vec<Fault>,
    /// From the nth on: `fail:3`, `hang:3`.
    reading: Option<String>,
    reads: Arc<AtomicUsize>,
}

impl FaultyReader {
    fn strike(&self, number: usize, when: When) -> Result<()> {
        match find(&self.faults, true, number, when) {
            Some(What::Error) => Err(Kind::Cloud.error(format!("injected fault {when:?} read"))),
            Some(What::Kill) => {
                kill()?;
                forever()
            }
            Some(What::Hang) => {
                println!("hanging");
                forever()
            }
            None => Ok(()),
        }
    }
}

fn forever() -> ! {
    loop {
        std::thread::park();
    }
}

impl SnapshotReader for FaultyReader {
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        let number = self.reads.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some((what, from)) = self.reading.as_deref().and_then(|fault| fault.split_once(':'))
            && number >= from.parse()?
        {
            if what != "hang" {
                return Err(Kind::Cloud.error("the network is away"));
            }
            forever();
        }
        self.strike(number, When::Before)?;
        let result = self.inner.read(index);
        self.strike(number, When::After)?;
        result
    }
}

#[async_trait(?Send)]
impl<T: Cloud> Cloud for Faulty<T> {
    async fn base(&self, from: &BaseRef) -> Result<Base> {
        self.around("base", self.inner.base(from)).await
    }
    async fn find(&self, key: &BakeKey) -> Result<Option<Image>> {
        self.around("find", self.inner.find(key)).await
    }
    async fn register(&self, snapshot: &SnapshotId, spec: &ImageSpec, undo: &Undo) -> Result<Image> {
        self.around("register", self.inner.register(snapshot, spec, undo)).await
    }
    async fn images(&self, family: Option<&str>) -> Result<Vec<Image>> {
        self.around("images", self.inner.images(family)).await
    }
    async fn image(&self, id: &ImageId) -> Result<(Image, BTreeMap<String, String>)> {
        self.around("image", self.inner.image(id)).await
    }
    async fn replace_failed(&self, name: &str) -> Result<Option<ImageId>> {
        self.around("replace_failed", self.inner.replace_failed(name)).await
    }
    async fn remove(&self, id: &ImageId, snapshot: &SnapshotId) -> Result<()> {
        self.around("remove", self.inner.remove(id, snapshot)).await
    }
    fn removal_command(&self, id: &ImageId) -> String {
        self.inner.removal_command(id)
    }
    async fn stale_runs(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>> {
        self.around("stale_runs", self.inner.stale_runs(older_than)).await
    }
    fn has_credentials(&self) -> bool {
        self.inner.has_credentials()
    }
}

#[async_trait(?Send)]
impl<T: Volumes> Volumes for Faulty<T> {
    async fn create(&self, spec: &VolumeSpec) -> Result<VolumeId> {
        self.around("create", self.inner.create(spec)).await
    }
    async fn attach(&self, volume: &VolumeId) -> Result<Device> {
        self.around("attach", self.inner.attach(volume)).await
    }
    async fn snapshot(&self, volume: &VolumeId, run: &RunId, tags: &Tags) -> Result<SnapshotId> {
        self.around("snapshot", self.inner.snapshot(volume, run, tags)).await
    }
    async fn keep(&self, run: &RunId) -> Result<Vec<VolumeId>> {
        self.around("keep", self.inner.keep(run)).await
    }
    async fn kept(&self, run: &RunId) -> Result<Option<VolumeId>> {
        self.around("kept", self.inner.kept(run)).await
    }
    async fn ensure_no_volumes(&self, run: &RunId) -> Result<()> {
        self.around("ensure_no_volumes", self.inner.ensure_no_volumes(run)).await
    }
    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()> {
        self.around("ensure_no_snapshots", Volumes::ensure_no_snapshots(&self.inner, run)).await
    }
}

#[async_trait(?Send)]
impl<T: BlockApi> BlockApi for Faulty<T> {
    async fn contents(&self, snapshot: &SnapshotId) -> Result<SnapshotContents> {
        self.around("contents", self.inner.contents(snapshot)).await
    }
    async fn reader(&self, snapshot: &SnapshotId) -> Result<Arc<dyn SnapshotReader>> {
        let inner = self.around("reader", self.inner.reader(snapshot)).await?;
        let (faults, reading, reads) = (self.faults.clone(), self.reading.clone(), self.reads.clone());
        Ok(Arc::new(FaultyReader { inner, faults, reading, reads }))
    }
    async fn parent(&self, snapshot: &SnapshotId, kind: &VolumeKind) -> Result<ParentUse> {
        let parent = self.around("parent", self.inner.parent(snapshot, kind)).await?;
        Ok(if self.whole { ParentUse::FullUpload { why: "the test says so".to_owned() } } else { parent })
    }
    async fn copied(&self, snapshot: &SnapshotId, kind: &VolumeKind, tell: &dyn Fn()) -> Result<SnapshotId> {
        self.around("copied", self.inner.copied(snapshot, kind, tell)).await
    }
    async fn start(&self, spec: &NewSnapshot) -> Result<SnapshotId> {
        self.around("start", self.inner.start(spec)).await
    }
    async fn put(&self, snapshot: &SnapshotId, index: u32, data: Arc<[u8]>, digest: Digest) -> Result<()> {
        self.around("put", self.inner.put(snapshot, index, data, digest)).await
    }
    async fn complete(&self, snapshot: &SnapshotId, count: u32, checksum: Digest) -> Result<()> {
        self.around("complete", self.inner.complete(snapshot, count, checksum)).await
    }
    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()> {
        self.around("ensure_no_snapshots", BlockApi::ensure_no_snapshots(&self.inner, run)).await
    }
}
