//! The calls. Each call takes its parameters, checks permissions and other conditions, and then takes effect.

mod describe;
mod images;
mod instances;
mod shapes;
mod snapshots;
pub mod tags;
mod volumes;

pub use volumes::remove as volumes_remove;

use crate::attach::{Guests, Held};
use crate::direct::Known;
use crate::faults::Turn;
use crate::iam::{self, Target};
use crate::imds::Imds;
use crate::options::ServerOptions;
use crate::params::Params;
use crate::refusal::{Refusal, Result, no, refuse};
use crate::state::State;
use crate::world::{Image, Mapping, Tags, Time, World, now};
use crate::xml::Xml;
use oven::cloud::local::Region;
use oven::cloud::{BaseRef, Cloud};
use oven::ids::ImageId;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The data on which calls work. They belong to the server's thread.
pub struct Ctx {
    pub region: Region,
    pub state: Arc<Mutex<State>>,
    /// Serializes changes. A call that is repeated while the first one is being processed waits for it.
    pub changing: tokio::sync::Mutex<()>,
    /// The devices of attached volumes.
    pub held: RefCell<BTreeMap<String, Held>>,
    pub guests: Guests,
    pub imds: RefCell<Imds>,
    /// Data about snapshots that were read block by block.
    pub known: Known,
    /// The file in which the world is saved.
    pub file: PathBuf,
}

impl Ctx {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Saves the world. The next server on this directory starts with it.
    pub fn save(&self) {
        let world = serde_json::to_vec(&self.state().world);
        let beside = self.file.with_extension("new");
        let saved = world.map_err(std::io::Error::from).and_then(|world| {
            std::fs::write(&beside, world)?;
            std::fs::rename(&beside, &self.file)
        });
        if let Err(error) = saved {
            eprintln!("oven-ec2-server: writing {}: {error}", self.file.display());
        }
    }

    /// Adds images that were imported into the region.
    pub async fn import(&self) -> Result<()> {
        for found in self.region.images(None).await.map_err(internal)? {
            if self.state().world.images.contains_key(&found.id.0) {
                continue;
            }
            let base = self.region.base(&BaseRef::Id(ImageId(found.id.0.clone()))).await.map_err(internal)?;
            let mut state = self.state();
            let size = found.size_gib as u32;
            let mut common = state.common(&found.id.0, found.tags, Default::default(), None);
            (common.seeded, common.visible_at) = (true, 0);
            let snapshot = found.snapshot.0;
            let kind = crate::world::Kind { volume_type: "gp2".into(), ..Default::default() };
            let mapping = Mapping {
                device: base.root_device.clone(),
                snapshot: Some(snapshot.clone()),
                size: Some(size),
                delete_on_termination: true,
                kind,
                virtual_name: None,
            };
            let image = Image {
                name: found.name,
                description: (!found.description.is_empty()).then_some(found.description),
                architecture: found.architecture.to_string(),
                virtualization: "hvm".into(),
                root_device_type: "ebs".into(),
                root_device: base.root_device,
                mappings: vec![mapping],
                ena: Some(true),
                sriov: Some("simple".into()),
                platform_details: images::LINUX.0.into(),
                usage_operation: images::LINUX.1.into(),
                common: common.clone(),
                ..Image::default()
            };
            let common = crate::world::Common { id: snapshot.clone(), tags: Tags::new(), ..common };
            let record = crate::world::Snapshot {
                common,
                volume: crate::direct::NO_VOLUME.into(),
                size,
                ..Default::default()
            };
            // The image is added to both worlds, because it must also be visible to stale reads.
            let State { world, before, .. } = &mut *state;
            for world in [world, &mut before.0] {
                world.images.insert(found.id.0.clone(), image.clone());
                world.snapshots.entry(snapshot.clone()).or_insert_with(|| record.clone());
            }
        }
        Ok(())
    }
}

/// A call, and the fault that is planned for it.
pub struct Ask {
    pub action: String,
    pub params: Params,
    pub dry_run: bool,
    pub turn: Option<Turn>,
}

impl Ask {
    /// Fails if a parameter is unknown, or if the call is not permitted.
    pub fn permitted(&self, state: &State, targets: &[Target<'_>]) -> Result<()> {
        self.params.done()?;
        iam::permitted(&state.options, &self.action, targets)
    }

    /// Fails if the call is a dry run. This is the last check of every call.
    pub fn really(&self) -> Result<()> {
        if self.dry_run {
            no!("DryRunOperation", "Request would have succeeded, but DryRun flag is set.");
        }
        Ok(())
    }
}

/// The data that a reading call sees.
pub struct View<'a> {
    pub world: &'a World,
    pub options: &'a ServerOptions,
    pub now: Time,
}

/// Returns a refusal for an error of the server itself.
pub fn internal(error: anyhow::Error) -> Refusal {
    eprintln!("oven-ec2-server: {error:#}");
    refuse("InternalError", format!("{error:#}"))
}

type Read = fn(&View<'_>, &mut Ask) -> Result<Xml>;

fn reading(action: &str) -> Option<Read> {
    Some(match action {
        "DescribeAvailabilityZones" => instances::zones,
        "DescribeImageAttribute" => images::attribute,
        "DescribeImages" => describe::images,
        "DescribeInstanceAttribute" => instances::attribute,
        "DescribeInstances" => instances::describe,
        "DescribeRegions" => instances::regions,
        "DescribeSnapshots" => describe::snapshots,
        "DescribeVolumes" => describe::volumes,
        "GetEbsEncryptionByDefault" => describe::encryption,
        _ => return None,
    })
}

pub fn is_known(action: &str) -> bool {
    reading(action).is_some() || CHANGING.contains(&action)
}

const CHANGING: [&str; 14] = [
    "AttachVolume",
    "CopySnapshot",
    "CreateSnapshot",
    "CreateTags",
    "CreateVolume",
    "DeleteSnapshot",
    "DeleteTags",
    "DeleteVolume",
    "DeregisterImage",
    "DetachVolume",
    "ModifyImageAttribute",
    "ModifyInstanceAttribute",
    "RegisterImage",
    "TerminateInstances",
];

/// Executes a call. With `stale`, a reading call sees the world before the last change.
pub async fn perform(ctx: &Rc<Ctx>, mut ask: Ask, stale: bool) -> Result<Xml> {
    ctx.import().await?;
    if let Some(read) = reading(&ask.action) {
        let state = ctx.state();
        let (world, now) = if stale { (&state.before.0, state.before.1) } else { (&state.world, now()) };
        return read(&View { world, options: &state.options, now }, &mut ask);
    }
    let _one = ctx.changing.lock().await;
    match ask.action.as_str() {
        "AttachVolume" => volumes::attach(ctx, ask).await,
        "CopySnapshot" => snapshots::copy(ctx, ask).await,
        "CreateSnapshot" => snapshots::create(ctx, ask).await,
        "CreateTags" => tags::create(ctx, ask),
        "CreateVolume" => volumes::create(ctx, ask).await,
        "DeleteSnapshot" => snapshots::delete(ctx, ask).await,
        "DeleteTags" => tags::delete(ctx, ask),
        "DeleteVolume" => volumes::delete(ctx, ask).await,
        "DeregisterImage" => images::deregister(ctx, ask).await,
        "DetachVolume" => volumes::detach(ctx, ask).await,
        "ModifyImageAttribute" => images::modify(ctx, ask),
        "ModifyInstanceAttribute" => instances::modify(ctx, ask),
        "RegisterImage" => images::register(ctx, ask),
        "TerminateInstances" => instances::terminate(ctx, ask).await,
        other => no!("InvalidAction", "The action {other} is not valid for this web service."),
    }
}

/// Takes `TagSpecification.N`. Only the resource type `allowed` is accepted.
fn tag_specifications(params: &mut Params, allowed: &str) -> Result<Tags> {
    let mut all = Tags::new();
    for mut specification in params.structures("TagSpecification")? {
        let kind = specification.required("ResourceType")?;
        if kind != allowed {
            no!(
                "InvalidParameterValue",
                "'{kind}' is not a valid taggable resource type for this operation."
            );
        }
        for (key, value) in tags::take(&mut specification)? {
            if all.contains_key(&key) {
                no!("InvalidParameterValue", "Duplicate tag key '{key}' specified.");
            }
            all.insert(key, value);
        }
        specification.done()?;
    }
    tags::check(&all)?;
    Ok(all)
}
