//! Implements [`Cloud`] and [`Volumes`] for EC2 with AWS's SDK. These two traits use no types of the SDK.
//!
//! Calls are retried only in `client/call.rs`. The table of error classes in `client/errors.rs` determines which errors
//! are retried. Some calls must not take effect twice, but have no client token. If the answer to such a call is lost,
//! oven first looks up whether the call had an effect. After `CreateSnapshot`, it searches for a snapshot of the volume
//! with the tag of the run (a run is the baking of one image). After `RegisterImage`, it searches for an image with the
//! requested name. After `AttachVolume`, it queries the volume's state. If a bake is cancelled during a call that
//! creates something, the call is still completed (`client/in_flight.rs`). So the clean-up knows which resources to
//! remove.

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

/// Finds the device of an attached volume on this machine. Returns `None` if the kernel does not show it yet.
pub type FindDevice = Rc<dyn Fn(&VolumeId) -> Result<Option<Device>>>;

/// The options of [`Ec2`].
#[derive(Clone)]
pub struct Ec2Options {
    /// If this is `None`, `aws-config` takes the region from the environment, a profile or IMDS.
    pub region: Option<String>,
    /// The id of this instance. Without an id, oven cannot attach volumes. But it can find images, and remove the
    /// resources of runs that have ended.
    pub instance_id: Option<String>,
    /// This instance's availability zone.
    pub zone: Option<String>,
    /// A directory on the builder for the documents of images ([`ImageSpec::documents`]), and for cached results of
    /// permission checks.
    pub documents: PathBuf,
    pub devices: FindDevice,
    pub timeouts: Timeouts,
}

/// A client of EC2 in one region. It is cheap to clone, because all clones share one state.
#[derive(Clone)]
pub struct Ec2(Rc<Inner>);

struct Inner {
    config: RefCell<Config>,
    client: RefCell<Client>,
    /// The configuration for SSM and for checking the credentials. It is `None` in tests that need neither.
    shared: Option<SdkConfig>,
    options: Ec2Options,
    /// Whether EC2 has answered any call of this process. An endpoint that has never answered is probably wrong, so
    /// calls to it are retried only for a short time.
    answered: Cell<bool>,
    /// The resources that this process created, by id. Each value contains the time of creation, and whether EC2 has
    /// listed the resource since then.
    born: RefCell<HashMap<String, (Instant, bool)>>,
    made: client::in_flight::InFlight,
    names: RefCell<volumes::device_names::DeviceNames>,
    /// Whether the bakes of this process use EBS direct (the API for blocks of snapshots), and attach no volumes.
    direct: Cell<bool>,
    /// Locked while a bake searches for a copy of a snapshot, or creates one.
    copying: tokio::sync::Mutex<()>,
    wire: client::connection::TrafficObserver,
}

/// A part of the user agent, so that CloudTrail shows which calls oven made.
pub(crate) const APP_NAME: &str = "oven";

impl Ec2 {
    /// Gets the region, the credentials and the endpoint from the same sources as AWS's own tools. These are the
    /// environment, profiles, assumed roles, web identity, containers and IMDS. This sends no request to EC2.
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

    /// Uses a given configuration for EC2, SSM and credentials. This function is public for tests.
    pub fn with_shared(shared: SdkConfig, options: Ec2Options) -> Self {
        Self::new(Config::new(&shared), Some(shared), options)
    }

    /// Uses a given configuration for EC2 only. oven's timeouts and retries replace those of the configuration. Only
    /// tests call this function.
    pub fn with_config(config: Config, options: Ec2Options) -> Self {
        Self::new(config, None, options)
    }

    fn new(config: Config, shared: Option<SdkConfig>, options: Ec2Options) -> Self {
        let wire = client::connection::TrafficObserver::default();
        // The SDK must not retry. After a lost answer, it would send CreateSnapshot again, which could create a second
        // snapshot.
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

    /// Returns a client for bakes that attach no volumes. Such bakes need other permissions, and need not run on an
    /// instance.
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

    /// Makes a client with new connections. The new connections may reach another server of EC2.
    fn new_client(&self) -> Client {
        Client::from_conf(self.0.config.borrow().clone())
    }

    /// Returns `None` if SSM is not configured.
    fn ssm(&self) -> Option<aws_sdk_ssm::Client> {
        let config = aws_sdk_ssm::config::Builder::from(self.0.shared.as_ref()?);
        let retry = aws_sdk_ssm::config::retry::RetryConfig::disabled();
        // This client loads its credentials again, because the cached ones may have expired.
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

    /// Records that this process has just created the resource with this id.
    pub(crate) fn born(&self, id: &str) {
        self.0.born.borrow_mut().entry(id.to_owned()).or_insert_with(|| (Instant::now(), false));
    }

    /// Records that EC2 has shown the resources with these ids.
    fn seen<'a>(&self, ids: impl Iterator<Item = &'a str>) {
        let mut born = self.0.born.borrow_mut();
        ids.for_each(|id| {
            if let Some((_, seen)) = born.get_mut(id) {
                *seen = true;
            }
        });
    }

    /// Returns whether EC2 may answer "not found" for this id although the resource exists. This can happen if this
    /// process created the resource recently, and EC2 has never shown it.
    fn is_unseen(&self, id: &str) -> bool {
        let visible = self.timeouts().visible;
        self.0.born.borrow().get(id).is_some_and(|(born, seen)| !seen && born.elapsed() < visible)
    }

    /// Returns the time since this process created a resource; `None` if it did not create it.
    fn age(&self, id: &str) -> Option<Duration> {
        self.0.born.borrow().get(id).map(|(born, _)| born.elapsed())
    }

    /// Returns whether a text contains the id of a resource that this process created so recently that some servers of
    /// EC2 may not show it yet.
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

    /// Returns the [`Owner`] that identifies this process. If the instance's id is known, it is the owner's host.
    fn owner(&self) -> Owner {
        self.0.options.instance_id.as_deref().map_or_else(Owner::this, Owner::on)
    }

    /// Adds the tags that name the run and the process to which a resource belongs.
    pub(crate) fn owned(&self, tags: &Tags, run: &RunId) -> Result<Tags> {
        let mut tags = tags.clone();
        tags.insert(tag::RUN.to_owned(), run.0.clone());
        tags.insert(tag::OWNER.to_owned(), self.owner().to_string());
        crate::cloud::ec2_rules::check_tags(&tags)?;
        Ok(tags)
    }

    /// Waits before the first poll, because no change in EC2 is complete immediately.
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
