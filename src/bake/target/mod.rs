//! Derives the requests to the cloud, to the disk and to the distribution's plugin from a definition.

mod attributes;
pub mod job;
mod links;

use super::Bake;
use crate::bake::options::{BakeOptions, Compat};
use crate::cloud::{Attributes, BakeKey, Base, BaseRef, Image, ImageSpec, Tags, VolumeKind, tag};
use crate::config::project::Settings;
use crate::definition::{DEFAULT_TYPE, Definition};
use crate::disk::DiskSpec;
use crate::distros::KnownPlugin;
use crate::error::{Kind, Place};
use crate::identity::fingerprint::{DefinitionLink, Inputs};
use crate::ids::{Architecture, RunId};
use crate::mount::Root;
use crate::report::Report;
use crate::site::Site;
use anyhow::{Context, Result};
pub use attributes::attributes;
use oven_distro::{Claims, Job, OsRelease};
use std::collections::BTreeMap;

/// The target of a bake: its base image, the attributes of the new image, and all inputs that can change the new image.
#[derive(Debug, Clone)]
pub struct Target {
    pub base: Base,
    pub attributes: Attributes,
    pub inputs: Inputs,
}

impl Target {
    /// Fails if the definition has changed since the bake read it.
    pub fn ensure_unchanged(&self, bake: &Bake<'_>) -> Result<()> {
        let _activity =
            bake.site.report.activity("plan", &format!("reading all files of {} again", bake.image.name));
        self.inputs.ensure_unchanged(bake.image).context("reading the definition again")
    }
}

/// Finds the base image, and reads all inputs of the new image.
pub async fn resolve(bake: &Bake<'_>) -> Result<Target> {
    let base = base(bake.site, bake.image, bake.from).await?;
    let attributes = attributes(bake.image, &base)?;
    let inputs = inputs(bake.site, bake.image, &base)?;
    Ok(Target { base, attributes, inputs })
}

/// Returns the image that the bake would make, if it exists already.
pub async fn existing(bake: &Bake<'_>, target: &Target) -> Result<Option<Image>> {
    find(bake.site, &target.inputs, bake.options).await
}

/// Returns the base image of a definition. Fails if it is larger than the definition's disk.
pub async fn base(site: &Site, image: &Definition, from: &BaseRef) -> Result<Base> {
    let base = site.cloud.base(from).await.with_context(|| image.place("from", None))?;
    match image.size_gib {
        Some(size) if size < base.size_gib => {
            let place = image.place("disk.size_gib", None);
            let message = format!(
                "{place} is {size}, which is less than the {} GiB of the base image {} ({})",
                base.size_gib, base.id, base.name
            );
            Err(Kind::Definition.failure(message).at(&place).hint("A disk can grow, but not shrink.").into())
        }
        _ => Ok(base),
    }
}

/// The document with the inputs of an image.
pub const INPUTS: &str = "inputs.json";
/// The document with the digests of the keys of image.toml.
pub const KEYS: &str = "keys.json";
/// The document with the times of the bake, until it registered the image.
pub const TIMES: &str = "times.json";

/// The number of hexadecimal digits of the fingerprint in an AMI's name. They have 48 bits, which is enough: a
/// definition never has so many images that two of them have the same digits.
const NAME_DIGITS: usize = 12;

/// The name of an image. It contains digits of the fingerprint, and a name can be used only once. So, without
/// `--force`, two builders cannot both register an image with the same inputs.
pub fn name(image: &Definition, inputs: &Inputs, run: Option<&RunId>) -> String {
    let fingerprint = inputs.fingerprint();
    let digits = &fingerprint[..NAME_DIGITS];
    match run {
        Some(run) => format!("{}-{digits}-{}", image.name, run.short()),
        None => format!("{}-{digits}", image.name),
    }
}

/// Collects all inputs of the image, and warns of inputs that are probably mistakes.
pub fn inputs(site: &Site, image: &Definition, base: &Base) -> Result<Inputs> {
    let _activity = site.report.activity("plan", &format!("reading all files of {}", image.name));
    let mut inputs = Inputs::of(image, base, &site.settings)?;
    if let Some((id, place)) = named(image).as_ref()
        && let Some(digest) = site.distros.named(id, place)?.digest()
    {
        inputs = inputs.with_plugin(id, &digest);
    }
    inputs.warnings().iter().for_each(|warning| site.report.warn(warning));
    check_links(&site.report, image, inputs.links())?;
    for (index, repository) in image.repositories.iter().enumerate() {
        if repository.key.is_some() {
            continue;
        }
        let (place, name) = (image.place(&format!("repository[{index}].signed"), None), &repository.name);
        site.report.warn(format!(
            "{place}: the repository `{name}` is not signed, so oven installs whatever its server sends"
        ));
    }
    Ok(inputs)
}

/// Warns of links of a definition that scripts cannot follow. Errors: [`Kind::Definition`] if a link is absolute.
pub fn check_links(report: &Report, image: &Definition, links: &[DefinitionLink]) -> Result<()> {
    if let Some(warning) = links::check(image, links)? {
        report.warn(warning);
    }
    Ok(())
}

pub fn key(inputs: &Inputs, compat: Option<Compat>) -> BakeKey {
    BakeKey {
        checksum: inputs.checksum().to_owned(),
        fingerprint: compat.is_none().then(|| inputs.fingerprint()),
        architecture: inputs.architecture(),
    }
}

/// Returns the image that a bake would make, if it exists already.
pub async fn find(site: &Site, inputs: &Inputs, options: &BakeOptions) -> Result<Option<Image>> {
    if options.force {
        return Ok(None);
    }
    site.cloud.find(&key(inputs, options.compat)).await.context("looking for an existing image")
}

/// The disk of a bake. If the definition does not set the volume type, the disk is a gp3 volume, which is fast and
/// costs nothing extra. There is one exception: if the definition sets IOPS or throughput without a type, the base's
/// type is used, because these values are meant for that type.
pub fn disk_spec(image: &Definition, base: &Base, run: &RunId) -> DiskSpec {
    // The tags of the owner, which is the process that bakes, are not set here. The disk strategy and the cloud add
    // them.
    let tags = run_tags(image, run);
    let VolumeKind { volume_type, iops, throughput, .. } = &image.volume;
    let inherited = base.attributes.root_volume.volume_type.clone();
    let inherited = inherited.filter(|_| iops.is_some() || throughput.is_some());
    let volume_type = volume_type.clone().or(inherited).unwrap_or_else(|| DEFAULT_TYPE.to_owned());
    let kind = VolumeKind { volume_type: Some(volume_type), ..image.volume.clone() };
    DiskSpec { size_gib: image.size_gib, kind, tags, verify: false, will_commit: true }
}

/// The tags of all resources that a run creates. A run is one execution of a bake.
fn run_tags(image: &Definition, run: &RunId) -> Tags {
    let mut tags = image.tags.clone();
    tags.insert(tag::NAME.to_owned(), image.name.clone());
    tags.insert(tag::RUN.to_owned(), run.0.clone());
    tags
}

/// Returns the plugin that a definition names, and the place in image.toml that names it.
pub fn named(image: &Definition) -> Option<(&str, Place)> {
    image.distro.as_deref().map(|id| (id, image.place("distro", None)))
}

/// Returns the plugin for an image, and the plugin's claims.
pub fn distro<'a>(site: &'a Site, image: &Definition, os: &OsRelease) -> Result<(&'a KnownPlugin, Claims)> {
    let named = named(image);
    let (known, claims) = site.distros.detect(os, named.as_ref().map(|(id, place)| (*id, place)))?;
    if let (None, Some(_)) = (&named, known.digest()) {
        let (id, origin) = (&known.id, &known.origin);
        site.report.note(format!(
            "the plugin {id} ({origin}) plans this image. To bake a new image when the plugin changes, set distro = \
             {id:?}"
        ));
    }
    Ok((known, claims))
}

/// Creates the job for the distribution's plugin. Fails if the base is registered with another architecture than its
/// programs have, or if its programs cannot run on this machine.
pub fn job(
    image: &Definition,
    base: &Base,
    claims: &Claims,
    root: &Root<'_>,
    settings: &Settings,
) -> Result<Job> {
    let architecture = root.architecture()?;
    fits(base, architecture)?;
    let mut job = job::from_definition(image, root.os_release()?, architecture, &settings.network);
    job::add_image_facts(&mut job, claims, root.tree()).map_err(|e| Kind::Definition.unless_machine(e))?;
    Ok(job)
}

fn fits(base: &Base, programs: Architecture) -> Result<()> {
    let (id, registered) = (&base.id, base.architecture);
    if programs != registered {
        let text = format!("{id} is registered as {registered}, but its programs are for {programs}");
        let hint = format!(
            "Import the disk again under another name with --arch {programs}, and bake on that image."
        );
        return Err(Kind::Definition.failure(text).hint(hint).into());
    }
    if !programs.runs_here() {
        let text =
            format!("the programs of {id} are for {programs}, but this machine is {}", Architecture::HOST);
        return Err(Kind::Machine.failure(text).hint("Bake it on a machine of that architecture.").into());
    }
    Ok(())
}

/// The specification of the image to register. `facts` has the output of each fact command of the plan, by name. These
/// outputs are stored with the image.
pub fn image_spec(bake: &Bake<'_>, target: Target, facts: BTreeMap<String, String>) -> ImageSpec {
    let Target { base, attributes, inputs } = target;
    let Bake { image, run, options, .. } = bake;
    let mut tags = run_tags(image, run);
    tags.insert(tag::CHECKSUM.to_owned(), inputs.checksum().to_owned());
    tags.insert(tag::FINGERPRINT.to_owned(), inputs.fingerprint());
    tags.insert(tag::INPUTS.to_owned(), inputs.digest());
    tags.insert(tag::BASE.to_owned(), base.id.0.clone());
    if options.force {
        tags.insert(tag::FORCED.to_owned(), "true".to_owned());
    }
    let mut documents = facts;
    documents.insert(INPUTS.to_owned(), inputs.to_json());
    documents.extend(inputs.keys_to_json().map(|keys| (KEYS.to_owned(), keys)));
    documents.insert(TIMES.to_owned(), bake.site.report.times_to_json().to_string());
    ImageSpec {
        name: name(image, &inputs, options.force.then_some(run)),
        description: image.description.clone(),
        architecture: base.architecture,
        root_device: base.root_device,
        size_gib: image.size_gib.unwrap_or(base.size_gib),
        attributes,
        tags,
        run: (*run).clone(),
        documents,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ImageId, SnapshotId};

    #[test]
    fn programs_have_to_fit_the_base_and_this_machine() {
        let (here, other) = match Architecture::HOST {
            Architecture::X86_64 => (Architecture::X86_64, Architecture::Arm64),
            Architecture::Arm64 => (Architecture::Arm64, Architecture::X86_64),
        };
        let fits = |registered: Architecture, programs: Architecture| {
            let base = Base {
                id: ImageId("ami-1".into()),
                name: "base".into(),
                snapshot: SnapshotId("snap-1".into()),
                architecture: registered,
                size_gib: 1,
                root_device: "/dev/xvda".into(),
                attributes: Attributes::default(),
            };
            fits(&base, programs).map_err(|error| Kind::of(&error))
        };
        assert_eq!(fits(here, here), Ok(()));
        assert_eq!(fits(other, here), Err(Kind::Definition));
        assert_eq!(fits(here, other), Err(Kind::Definition));
        if !other.runs_here() {
            assert_eq!(fits(other, other), Err(Kind::Machine));
        }
    }
}
