//! Implements [`BlockApi`] with EBS direct, AWS's API for the blocks of snapshots. Requests are sent with AWS's SDK. No
//! type of the SDK leaves this module. Some calls for snapshots exist only in EC2's API. [`Ec2`] sends these calls.
//!
//! The module `workers` sends the requests from separate threads, because a thread that reads a block is blocked until
//! the block arrives. Only the module `call` retries calls. It classifies errors by the same table as EC2's errors. All
//! calls except CompleteSnapshot are idempotent: StartSnapshot has a client token, and a second put of a block
//! overwrites the first. The module `rate_limit` limits the rate of the calls, and lowers the limit if EBS refuses
//! calls.

mod call;
#[cfg(test)]
mod fake;
mod list;
mod rate_limit;
mod read;
#[cfg(test)]
mod tests;
mod tokens;
mod workers;
mod write;

use super::ec2::{APP_NAME, Ec2, sdk_timeouts};
use crate::cloud::VolumeKind;
use crate::cloud::block_api::{BlockApi, NewSnapshot, ParentUse, SnapshotContents, SnapshotReader};
use crate::ids::Digest;
use crate::ids::{RunId, SnapshotId};
use anyhow::{Context, Result};
use async_trait::async_trait;
use aws_config::{AppName, BehaviorVersion, Region};
use aws_sdk_ebs::config::{Config, retry::RetryConfig};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use call::EbsState;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::OnceCell;

/// EBS direct in the region of an [`Ec2`]. It is cheap to clone. It also works on a machine that is not an EC2
/// instance.
#[derive(Clone)]
pub struct Ebs {
    ec2: Ec2,
    load_config: LoadConfig,
    /// The worker threads are started by the first call and not by `new`, because bakes that attach volumes do not need
    /// them.
    shared: Rc<OnceCell<Arc<EbsState>>>,
    starts: Rc<write::SnapshotStarts>,
}

/// Returns a future that loads the configuration. The future runs on the thread that uses the configuration.
type LoadConfig = Rc<dyn Fn() -> Pin<Box<dyn Future<Output = Config> + Send>>>;

impl Ebs {
    /// Uses the credentials and the endpoint that `ec2` uses. This sends no request to EBS.
    pub fn new(ec2: Ec2) -> Self {
        let (region, timeouts) = (ec2.region(), *ec2.timeouts());
        Self::with_loader(ec2, move || {
            let loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
                .app_name(AppName::new(APP_NAME).expect("letters only"))
                .region(Region::new(region.clone()))
                .timeout_config(sdk_timeouts(&timeouts));
            async move { Config::new(&loader.load().await) }
        })
    }

    /// Uses this configuration, but with oven's timeouts and without the SDK's retries. This is for tests.
    pub fn with_config(ec2: Ec2, config: Config) -> Self {
        Self::with_loader(ec2, move || std::future::ready(config.clone()))
    }

    fn with_loader<F>(ec2: Ec2, load_config: impl Fn() -> F + 'static) -> Self
    where
        F: Future<Output = Config> + Send + 'static,
    {
        let timeouts = *ec2.timeouts();
        let load_config = Rc::new(move || {
            let config = load_config();
            let with_timeouts = async move {
                let config = config.await.to_builder().retry_config(RetryConfig::disabled());
                config.timeout_config(sdk_timeouts(&timeouts)).build()
            };
            Box::pin(with_timeouts) as Pin<Box<dyn Future<Output = Config> + Send>>
        });
        Self { ec2, load_config, shared: Rc::default(), starts: Rc::default() }
    }

    async fn shared(&self) -> Result<Arc<EbsState>> {
        let start = async || {
            let lanes = workers::Workers::start(|| (self.load_config)()).await?;
            Ok(Arc::new(EbsState::new(lanes, *self.ec2.timeouts())))
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
impl BlockApi for Ebs {
    async fn contents(&self, snapshot: &SnapshotId) -> Result<SnapshotContents> {
        let shared = self.shared().await?;
        let (known, again) = (shared.snapshot(snapshot), shared.clone());
        let listed = shared.workers.run(|worker| async move { again.contents(&worker, &known).await });
        listed.await.with_context(|| format!("listing the blocks of {snapshot}"))
    }

    async fn reader(&self, snapshot: &SnapshotId) -> Result<Arc<dyn SnapshotReader>> {
        let shared = self.shared().await?;
        let snapshot = shared.snapshot(snapshot);
        Ok(Arc::new(read::BlockReader { shared, snapshot }))
    }

    async fn parent(&self, snapshot: &SnapshotId, kind: &VolumeKind) -> Result<ParentUse> {
        self.ec2.parent_of(snapshot, kind).await.with_context(|| format!("inspecting {snapshot}"))
    }

    async fn copied(&self, snapshot: &SnapshotId, kind: &VolumeKind, tell: &dyn Fn()) -> Result<SnapshotId> {
        self.ec2
            .ensure_copy(snapshot, kind, tell)
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
