//! What a definition wants of an image, as a plugin is asked for it.

use crate::cloud::Architecture;
use crate::definition::{Ask, Definition};
use crate::root::Inside;
use crate::root::execute::{CA_FILE, package_path};
use crate::settings::NetworkSettings;
use anyhow::Result;
use oven_distro::{Distro, Job, OsRelease, Package};

/// A definition's job, on an image that is not looked at. Package files by URL have to be there
/// ([`crate::download::packages`]): those that are not are left out.
pub fn wishes(
    image: &Definition,
    os_release: OsRelease,
    architecture: Architecture,
    network: &NetworkSettings,
) -> Job {
    let packages = image.packages.iter().enumerate().filter_map(|(index, ask)| {
        let (source, package) = match ask {
            Ask::Named { name, version } => {
                return Some(Package::Named { name: name.clone(), version: version.clone() });
            }
            Ask::Group { name } => return Some(Package::Group { name: name.clone() }),
            Ask::File { source, package } => (source, package),
            Ask::Url { file, .. } => file.as_ref().map(|file| (&file.source, &file.package))?,
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
        recommends: image.recommends,
        conffiles: image.conffiles,
        network: image.network,
        mirror: network.mirror.clone(),
        ca_file: network.ca_file.as_ref().map(|_| CA_FILE.to_owned()),
        ..Job::default()
    }
}

/// Adds what the plugin wants to know of the image.
pub fn look(job: &mut Job, distro: &dyn Distro, inside: &Inside) -> Result<()> {
    let claims = distro.claims(&job.os_release);
    for path in claims.look_for {
        job.present.insert(path.clone(), inside.exists(&path)?);
    }
    for path in claims.read {
        if let Some(text) = inside.read(&path)? {
            job.texts.insert(path, String::from_utf8_lossy(&text).into_owned());
        }
    }
    Ok(())
}
