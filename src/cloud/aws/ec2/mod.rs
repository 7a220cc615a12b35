//! EC2: implements [`Cloud`] and [`Volumes`] with AWS's SDK. No type of the SDK leaves this module.
//!
//! One layer retries calls (`client/call.rs`), with one table of error classes (`client/errors.rs`). A call without a client token is sent
//! once, and its outcome is looked up: `CreateSnapshot` by volume and run, `RegisterImage` by name, `AttachVolume` by
//! the volume's state. A call that changes something continues when the bake is cancelled during it (`client/in_flight.rs`), so that
//! the undo debts know what to remove.

pub mod client;
#[cfg(test)]
mod fake;
pub mod images;
pub mod snapshots;
#[cfg(test)]
mod tests;
pub(crate) mod volumes;

pub use client::timeouts::Timeouts;

use crate::cloud::{
    BakeKey, Base, BaseRef, Cloud, Image, ImageSpec, Permission, StaleRun, Tags, VolumeSpec, Volumes, tag,
};
use crate::device::Device;
use crate::error::Kind;
use crate::ids::{ImageId, RunId, SnapshotId, VolumeId};
use crate::owner::Owner;
use crate::undo::{Payment, Undo};
use anyhow::Result;
use async_trait::async_trait;
use aws_config::{AppName, BehaviorVersion, ConfigLoader, Region, SdkConfig};
use aws_sdk_ec2::Client;
use aws_sdk_ec2::config::timeout::TimeoutConfig;
use aws_sdk_ec2::config::{Config, IdentityCache, retry::RetryConfig};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::Instant;

/// Finds an attached volume on this machine; `None`: it is not there yet.
pub type FindDevice = Rc<dyn Fn(&VolumeId) -> Result<Option<Device>>>;

/// The options of [`Ec2`].
#[derive(Clone)]
pub struct Ec2Options {
    /// `None`: as `aws-config` finds it, from environment, profile or IMDS.
    pub region: Option<String>,
    /// This instance. Without it nothing can be attached, but images can be looked up and swept.
    pub instance_id: Option<String>,
    /// This instance's availability zone.
    pub zone: Option<String>,
    /// A directory on the builder for documents by image id, and for permissions that were granted.
    pub documents: PathBuf,
    pub devices: FindDevice,
    pub timeouts: Timeouts,
}

/// EC2 in one region, as seen from one instance. It is cheap to clone.
#[derive(Clone)]
pub struct Ec2(Rc<Inner>);

struct Inner {
    config: RefCell<Config>,
    client: RefCell<Client>,
    /// For SSM; `None` in tests that need none.
    shared: Option<SdkConfig>,
    options: Ec2Options,
    /// Whether EC2 ever answered: an endpoint that never did is probably wrong.
    answered: Cell<bool>,
    /// When this process created each id, and whether EC2 has shown it since.
    born: RefCell<HashMap<String, (Instant, bool)>>,
    made: client::in_flight::InFlight,
    names: RefCell<volumes::device_names::DeviceNames>,
    /// Whether bakes attach no volumes here.
    direct: Cell<bool>,
    /// Held while a snapshot is copied.
    copying: tokio::sync::Mutex<()>,
    wire: client::connection::TrafficObserver,
}

/// Part of the user agent, so that CloudTrail shows who called.
pub(crate) const APP_NAME: &str = "oven";

impl Ec2 {
    /// Takes region, credentials and endpoint as AWS's tools do: from environment, profiles, assumed roles, web
    /// identity, containers, IMDS. Sends nothing to EC2 yet.
    pub async fn connect(options: Ec2Options) -> Result<Self> {
        Self::load(aws_config::defaults(BehaviorVersion::v2026_01_12()), options).await
    }

    async fn load(loader: ConfigLoader, options: Ec2Options) -> Result<Self> {
        let app = AppName::new(APP_NAME).expect("letters only");
        let mut loader = loader.app_name(app).timeout_config(sdk_timeouts(&options.timeouts));
        if let Some(region) = &options.region {
            loader = loader.region(Region::new(region.clone()));
        }
        let shared = loader.load().await;
        if shared.region().is_none() {
            let hint = "Pass --region, set AWS_REGION, or set a region in the profile.";
            return Err(Kind::Machine.failure("no AWS region is set").hint(hint).into());
        }
        Ok(Self::with_shared(shared, options))
    }

    /// Uses a given configuration, also for SSM and credentials: for tests.
    pub fn with_shared(shared: SdkConfig, options: Ec2Options) -> Self {
        Self::new(Config::new(&shared), Some(shared), options)
    }

    /// Uses a given configuration for EC2 alone: for tests. Timeouts and retries are set by oven in any case.
    pub fn with_config(config: Config, options: Ec2Options) -> Self {
        Self::new(config, None, options)
    }

    fn new(config: Config, shared: Option<SdkConfig>, options: Ec2Options) -> Self {
        let wire = client::connection::TrafficObserver::default();
        // There is one layer that retries: the SDK's own would send CreateSnapshot three times.
        let config = config
            .to_builder()
            .retry_config(RetryConfig::disabled())
            .timeout_config(sdk_timeouts(&options.timeouts))
            .interceptor(wire.clone())
            .build();
        Self(Rc::new(Inner {
            client: RefCell::new(Client::from_conf(config.clone())),
            config: RefCell::new(config),
            shared,
            options,
            answered: Cell::new(false),
            born: RefCell::default(),
            made: client::in_flight::InFlight::default(),
            names: RefCell::default(),
            direct: Cell::new(false),
            copying: tokio::sync::Mutex::default(),
            wire,
        }))
    }

    /// For bakes that attach no volumes: they need other permissions, and need not run on an instance.
    pub fn without_volumes(self) -> Self {
        self.0.direct.set(true);
        self
    }

    pub(crate) fn made(&self) -> &client::in_flight::InFlight {
        &self.0.made
    }

    /// The region in use.
    pub fn region(&self) -> String {
        self.0.config.borrow().region().map_or_else(String::new, ToString::to_string)
    }

    fn client(&self) -> Client {
        self.0.client.borrow().clone()
    }

    /// A client with its own connections: it may reach another of EC2's endpoints.
    fn new_client(&self) -> Client {
        Client::from_conf(self.0.config.borrow().clone())
    }

    /// `None` without a shared configuration.
    fn ssm(&self) -> Option<aws_sdk_ssm::Client> {
        let config = aws_sdk_ssm::config::Builder::from(self.0.shared.as_ref()?);
        let retry = aws_sdk_ssm::config::retry::RetryConfig::disabled();
        // It has its own credentials: cached ones may be too old.
        let config = config.retry_config(retry).identity_cache(IdentityCache::lazy().build());
        Some(aws_sdk_ssm::Client::from_conf(config.build()))
    }

    /// Discards the credentials in use and loads new ones.
    fn renew(&self) {
        let config =
            self.0.config.borrow().to_builder().identity_cache(IdentityCache::lazy().build()).build();
        self.0.client.replace(Client::from_conf(config.clone()));
        self.0.config.replace(config);
    }

    pub(crate) fn timeouts(&self) -> &Timeouts {
        &self.0.options.timeouts
    }

    fn answered(&self) {
        self.0.answered.set(true);
    }

    fn has_answered(&self) -> bool {
        self.0.answered.get()
    }

    /// Records that this process has just created an id.
    pub(crate) fn born(&self, id: &str) {
        self.0.born.borrow_mut().entry(id.to_owned()).or_insert_with(|| (Instant::now(), false));
    }

    /// Records that EC2 shows these ids.
    fn seen<'a>(&self, ids: impl Iterator<Item = &'a str>) {
        let mut born = self.0.born.borrow_mut();
        ids.for_each(|id| {
            if let Some((_, seen)) = born.get_mut(id) {
                *seen = true;
            }
        });
    }

    /// Whether this process created the id so recently that EC2 may not know it everywhere, and it was never shown:
    /// "not found" does not prove that it does not exist.
    fn is_unseen(&self, id: &str) -> bool {
        let visible = self.timeouts().visible;
        self.0.born.borrow().get(id).is_some_and(|(born, seen)| !seen && born.elapsed() < visible)
    }

    /// The time since this process created an id.
    fn age(&self, id: &str) -> Option<Duration> {
        self.0.born.borrow().get(id).map(|(born, _)| born.elapsed())
    }

    /// Whether a text names something that was created so recently that EC2 may not show it everywhere yet.
    fn is_new(&self, what: &str) -> bool {
        let visible = self.timeouts().visible;
        self.0
            .born
            .borrow()
            .iter()
            .any(|(id, (born, _))| born.elapsed() < visible && what.contains(id.as_str()))
    }

    fn instance(&self) -> Result<&str> {
        self.0.options.instance_id.as_deref().ok_or_else(not_an_instance)
    }

    fn zone(&self) -> Result<&str> {
        self.0.options.zone.as_deref().ok_or_else(not_an_instance)
    }

    /// This process as an owner, by the instance's id if that is known.
    fn owner(&self) -> Owner {
        self.0.options.instance_id.as_deref().map_or_else(Owner::this, Owner::on)
    }

    /// Adds the tags that say which run and process own a resource.
    pub(crate) fn owned(&self, tags: &Tags, run: &RunId) -> Result<Tags> {
        let mut tags = tags.clone();
        tags.insert(tag::RUN.to_owned(), run.0.clone());
        tags.insert(tag::OWNER.to_owned(), self.owner().to_string());
        crate::cloud::ec2_rules::check_tags(&tags)?;
        Ok(tags)
    }

    /// Waits before the first poll: nothing on EC2 is ready at once.
    async fn wait_before_first_poll(&self) {
        tokio::time::sleep(self.timeouts().first_poll).await;
    }
}

pub(crate) fn sdk_timeouts(timeouts: &Timeouts) -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(timeouts.connect)
        .read_timeout(timeouts.read)
        .operation_attempt_timeout(timeouts.attempt)
        .operation_timeout(timeouts.operation)
        .build()
}

fn not_an_instance() -> anyhow::Error {
    let hint = "Bake on an EC2 instance, or name the instance with --instance-id ID --zone ZONE.";
    Kind::Machine.failure("the id and zone of this EC2 instance are unknown").hint(hint).into()
}

#[async_trait(?Send)]
impl Cloud for Ec2 {
    async fn base(&self, from: &BaseRef) -> Result<Base> {
        self.find_base(from).await
    }

    async fn find(&self, key: &BakeKey) -> Result<Option<Image>> {
        self.find_baked(key).await
    }

    async fn register(&self, snapshot: &SnapshotId, spec: &ImageSpec, undo: &Undo) -> Result<Image> {
        self.register_image(snapshot, spec, undo).await
    }

    async fn images(&self, family: Option<&str>) -> Result<Vec<Image>> {
        self.find_own_images(family).await
    }

    async fn image(&self, id: &ImageId) -> Result<(Image, BTreeMap<String, String>)> {
        Ok((self.find_own_image(id).await?, self.documents(id)?))
    }

    async fn replace_failed(&self, name: &str) -> Result<Option<ImageId>> {
        self.replace(name).await
    }

    async fn remove(&self, _: &ImageId, _: &SnapshotId) -> Result<()> {
        let failure = Kind::Usage.failure("`oven images remove` works only with a local region");
        Err(failure.hint("In AWS, use AWS's own tools.").into())
    }

    fn removal_command(&self, id: &ImageId) -> String {
        format!("aws ec2 deregister-image --image-id {id}")
    }

    async fn stale_runs(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>> {
        self.stale(older_than).await
    }

    async fn ensure_permitted(&self, base: &Base) -> Result<()> {
        if !self.0.direct.get() {
            self.ensure_builder().await?;
        }
        self.ensure_essentials(base).await
    }

    async fn connection(&self) -> Vec<(String, Result<()>)> {
        self.run_connection_checks().await
    }

    async fn permissions(&self) -> Result<Vec<Permission>> {
        self.run_permission_checks().await
    }
}

#[async_trait(?Send)]
impl Volumes for Ec2 {
    async fn create(&self, spec: &VolumeSpec) -> Result<VolumeId> {
        self.create_volume(spec).await
    }

    async fn attach(&self, volume: &VolumeId) -> Result<Device> {
        self.attach_volume(volume).await
    }

    async fn snapshot(&self, volume: &VolumeId, run: &RunId, tags: &Tags) -> Result<SnapshotId> {
        self.take_snapshot(volume, run, tags).await
    }

    async fn keep(&self, run: &RunId) -> Result<Vec<VolumeId>> {
        self.tag_and_detach_volumes(run).await
    }

    async fn kept(&self, run: &RunId) -> Result<Option<VolumeId>> {
        self.find_preserved_volume(run).await
    }

    async fn ensure_no_volumes(&self, run: &RunId) -> Result<()> {
        self.remove_volumes(run).await
    }

    fn removal(&self, run: &RunId) -> Option<Payment> {
        let (ec2, run) = (self.clone(), run.clone());
        Some(Box::pin(async move { ec2.remove_volumes(&run).await }))
    }

    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()> {
        self.remove_snapshots(run).await
    }
}
