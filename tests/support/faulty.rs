//! A cloud whose nth call fails, hangs or kills the process, before or after its effect.

use anyhow::{Result, bail};
use async_trait::async_trait;
use oven::cloud::*;
use oven::disk::Device;
use oven::undo::Undo;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::str::FromStr;
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

/// `3:after:kill`.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
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
        Ok(Self { call: call.parse()?, when, what })
    }
}

/// Counts calls over both traits, and strikes once.
pub struct Faulty<T> {
    inner: T,
    fault: Option<Fault>,
    calls: Cell<usize>,
}

impl<T> Faulty<T> {
    pub fn new(inner: T, fault: Option<Fault>) -> Self {
        Self { inner, fault, calls: Cell::new(0) }
    }

    pub fn calls(&self) -> usize {
        self.calls.get()
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
        match self.fault {
            Some(fault) if (fault.call, fault.when) == (number, when) => match fault.what {
                What::Error => bail!("injected fault {when:?} {name}"),
                What::Kill => {
                    nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL)?;
                    std::future::pending().await
                }
                What::Hang => {
                    println!("hanging");
                    std::future::pending().await
                }
            },
            _ => Ok(()),
        }
    }
}

#[async_trait(?Send)]
impl<T: Cloud> Cloud for Faulty<T> {
    async fn base(&self, from: &BaseRef) -> Result<Base> {
        self.around("base", self.inner.base(from)).await
    }
    async fn find(&self, key: &Key) -> Result<Option<Image>> {
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
    async fn stale_runs(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>> {
        self.around("stale_runs", self.inner.stale_runs(older_than)).await
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
        self.around("ensure_no_snapshots", self.inner.ensure_no_snapshots(run)).await
    }
}
