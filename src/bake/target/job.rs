//! Creates the job of a plugin from a definition. The job is part of the request for a plan.

use crate::config::project::NetworkSettings;
use crate::definition::{Definition, PackageRequest};
use crate::ids::Architecture;
use crate::image::tree::ImageTree;
use crate::provision::programs;
use crate::provision::scripts;
use crate::provision::{CA_FILE, package_path};
use anyhow::Result;
use oven_distro::{Claims, Job, OsRelease, Package};

/// The maximum size in bytes of a file whose content a plugin requests.
const TEXT_MAX: u64 = 1 << 20;

/// Creates a definition's job without reading the image. Tools are the programs that the definition's scripts need. The
/// job contains all tools, as if the image had none of them. Packages with a URL must already be downloaded
/// ([`super::super::download`]). Otherwise the job does not contain them.
pub fn from_definition(
    image: &Definition,
    os_release: OsRelease,
    architecture: Architecture,
    network: &NetworkSettings,
) -> Job {
    let packages = image.packages.iter().enumerate().filter_map(|(index, ask)| {
        let (source, package) = match ask {
            PackageRequest::Named { name, version, suite } => {
                let (name, version, suite) = (name.clone(), version.clone(), suite.clone());
                return Some(Package::Named { name, version, suite });
            }
            PackageRequest::Group { name } => return Some(Package::Group { name: name.clone() }),
            PackageRequest::File { source, package } => (source, package),
            PackageRequest::Url { file, .. } => file.as_ref().map(|file| (&file.source, &file.package))?,
        };
        Some(Package::File {
            path: package_path(index, source),
            name: package.name.clone(),
            version: package.version.clone(),
            architecture: package.architecture.clone(),
        })
    });
    Job {
        os_release,
        architecture: architecture.to_string(),
        packages: packages.collect(),
        upgrade: image.upgrade,
        repositories: image.repositories.clone(),
        hold: image.hold.clone(),
        debconf: image.debconf.clone(),
        tools: scripts::tools(image),
        recommends: image.recommends,
        conffiles: image.conffiles,
        network: image.network,
        mirror: network.mirror.clone(),
        ca_file: network.ca_file.as_ref().map(|_| CA_FILE.to_owned()),
        ..Job::default()
    }
}

/// Adds the information about the image that the plugin requested: whether certain files exist, and the content of
/// others. Removes tools that the image has already.
pub fn add_image_facts(job: &mut Job, claims: &Claims, inside: &ImageTree) -> Result<()> {
    for path in &claims.look_for {
        job.present.insert(path.clone(), inside.exists(path)?);
    }
    for path in &claims.read {
        if let Some(text) = inside.read_at_most(path, TEXT_MAX)? {
            job.texts.insert(path.clone(), String::from_utf8_lossy(&text).into_owned());
        }
    }
    for tool in std::mem::take(&mut job.tools) {
        if !programs::has_program(inside, &tool)? {
            job.tools.push(tool);
        }
    }
    Ok(())
}
