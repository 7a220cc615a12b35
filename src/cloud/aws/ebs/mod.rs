//! EBS direct: snapshots by their blocks, over AWS's SDK. No type of the SDK leaves this module, and what there is to
//! ask of EC2 about snapshots [`Ec2`] asks.
//!
//! Requests go out from threads of their own (`lanes`), since readers block theirs. One layer sends again (`call`), by
//! EC2's table of error classes: all but CompleteSnapshot may be sent twice, for StartSnapshot has a token, and the
//! same block again overwrites. How fast is limited, and adapts (`limiter`).

mod call;
#[cfg(test)]
mod fake;
mod list;
mod rate_limit;
mod read;
#[cfg(test)]
mod tests;
mod workers;
mod write;

use super::ec2::{APP, Ec2, timeouts};
use crate::cloud::VolumeKind;
use crate::cloud::block_api::{Blocks, Contents, NewSnapshot, Parent, Reader};
use crate::ids::Digest;
use crate::ids::{RunId, SnapshotId};
use anyhow::{Context, Result};
use async_trait::async_trait;
use aws_config::{AppName, BehaviorVersion, Region};
use aws_sdk_ebs::config::{Config, retry::RetryConfig};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use call::Shared;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::OnceCell;

/// EBS direct in the region of an [`Ec2`]. Cheap to clone. It needs no instance.
#[derive(Clone)]
pub struct Ebs {
    ec2: Ec2,
    load: Load,
    /// The threads begin with the first call: who attaches volumes needs none.
    shared: Rc<OnceCell<Arc<Shared>>>,
    starts: Rc<write::Starts>,
}

/// The configuration, made on the thread that it is for.
type Load = Rc<dyn Fn() -> Pin<Box<dyn Future<Output = Config> + Send>>>;

impl Ebs {
    /// Takes credentials and endpoint as `ec2` did. Sends nothing to EBS yet.
    pub fn new(ec2: Ec2) -> Self {
        let (region, pace) = (ec2.region(), *ec2.pace());
        Self::loading(ec2, move || {
            let loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
                .app_name(AppName::new(APP).expect("letters only"))
                .region(Region::new(region.clone()))
                .timeout_config(timeouts(&pace));
            async move { Config::new(&loader.load().await) }
        })
    }

    /// With a ready configuration: for tests. Timeouts and retries are oven's own in any case.
    pub fn with_config(ec2: Ec2, config: Config) -> Self {
        Self::loading(ec2, move || std::future::ready(config.clone()))
    }

    fn loading<F>(ec2: Ec2, load: impl Fn() -> F + 'static) -> Self
    where
        F: Future<Output = Config> + Send + 'static,
    {
        let pace = *ec2.pace();
        let load = Rc::new(move || {
            let config = load();
            let ours = async move {
                let config = config.await.to_builder().retry_config(RetryConfig::disabled());
                config.timeout_config(timeouts(&pace)).build()
            };
            Box::pin(ours) as Pin<Box<dyn Future<Output = Config> + Send>>
        });
        Self { ec2, load, shared: Rc::default(), starts: Rc::default() }
    }

    async fn shared(&self) -> Result<Arc<Shared>> {
        let start = async || {
            let lanes = workers::Lanes::start(|| (self.load)()).await?;
            Ok(Arc::new(Shared::new(lanes, *self.ec2.pace())))
        };
        self.shared.get_or_try_init(start).await.cloned()
    }
}

fn digest_of(base64: &str) -> Option<Digest> {
    STANDARD.decode(base64).ok()?.try_into().ok()
}

fn base64_of(digest: &Digest) -> String {
    STANDARD.encode(digest)
}

#[async_trait(?Send)]
impl Blocks for Ebs {
    async fn contents(&self, snapshot: &SnapshotId) -> Result<Contents> {
        let shared = self.shared().await?;
        let (known, again) = (shared.snapshot(snapshot), shared.clone());
        let listed = shared.lanes.run(|lane| async move { again.contents(&lane, &known).await });
        listed.await.with_context(|| format!("listing the blocks of {snapshot}"))
    }

    async fn reader(&self, snapshot: &SnapshotId) -> Result<Arc<dyn Reader>> {
        let shared = self.shared().await?;
        let snapshot = shared.snapshot(snapshot);
        Ok(Arc::new(read::BlockReader { shared, snapshot }))
    }

    async fn parent(&self, snapshot: &SnapshotId, kind: &VolumeKind) -> Result<Parent> {
        self.ec2.parent_of(snapshot, kind).await.with_context(|| format!("looking at {snapshot}"))
    }

    async fn copied(&self, snapshot: &SnapshotId, kind: &VolumeKind, tell: &dyn Fn()) -> Result<SnapshotId> {
        self.ec2
            .copy_of(snapshot, kind, tell)
            .await
            .with_context(|| format!("copying {snapshot} into this account"))
    }

    async fn start(&self, spec: &NewSnapshot) -> Result<SnapshotId> {
        self.start_snapshot(spec).await.context("starting a snapshot")
    }

    async fn put(&self, snapshot: &SnapshotId, index: u32, data: Arc<[u8]>, digest: Digest) -> Result<()> {
        self.put_block(snapshot, index, data, digest)
            .await
            .with_context(|| format!("writing block {index} of {snapshot}"))
    }

    async fn complete(&self, snapshot: &SnapshotId, count: u32, checksum: Digest) -> Result<()> {
        self.complete_snapshot(snapshot, count, checksum)
            .await
            .with_context(|| format!("completing {snapshot}"))
    }

    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()> {
        self.resolve_starts(run).await?;
        self.ec2.remove_snapshots(run).await
    }
}
