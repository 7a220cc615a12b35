//! Makes a [`Site`] in EC2. For some verbs (subcommands), this module also finds out on which instance oven runs.

use super::{Findings, LOCKS, LOGS, Site, Use};
use crate::cloud::aws::ebs::Ebs;
use crate::cloud::aws::{ec2, imds, nvme};
use crate::config::project::{Settings, Strategy};
use crate::error::Kind;
use crate::ids::VolumeId;
use crate::report::Report;
use crate::sys::state_files;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The directory for logs, locks, caches, and texts that belong to images, such as the list of an image's packages.
const STATE_DIR: &str = "/var/lib/oven";
const SYS: &str = "/sys";
const DEV: &str = "/dev";

pub async fn site(settings: Settings, report: Report, used: Use) -> Result<Site> {
    let direct = settings.disks() == Strategy::Direct;
    let instance = match used {
        // With direct disks, any machine can bake, even without a metadata service.
        Use::Builds if direct => None,
        Use::Builds => {
            has_nvme()?;
            Some(identify_this_instance(&settings).await?)
        }
        Use::Sweeps => identify_this_instance(&settings).await.ok(),
        Use::Looks | Use::Imports | Use::Checks => None,
    };
    let site = connect(settings, report, instance).await?;
    if used == Use::Builds {
        // An older oven made these directories with the modes that the umask permitted.
        for dir in [&site.state, &site.state.join(LOGS), &site.state.join(LOCKS)] {
            state_files::create_dir(dir)?;
        }
    }
    Ok(site)
}

/// Runs all checks, even if some fail. Also makes the site, if this is possible.
pub async fn examine(settings: Settings, report: Report) -> (Findings, Result<Site>) {
    if settings.disks() == Strategy::Direct {
        return (Vec::new(), connect(settings, report, None).await);
    }
    let instance = identify_this_instance(&settings).await;
    let what = match &instance {
        Ok(found) => format!("instance {} in {}", found.id, found.zone),
        Err(_) => "instance".to_owned(),
    };
    let (result, instance) = match instance {
        Ok(found) => (Ok(()), Some(found)),
        Err(error) => (Err(error), None),
    };
    let findings = vec![(what, result), ("NVMe".to_owned(), has_nvme())];
    (findings, connect(settings, report, instance).await)
}

async fn identify_this_instance(settings: &Settings) -> Result<imds::Instance> {
    let Settings { instance_id, zone, region, .. } = settings.clone();
    let given = imds::InstanceOverrides { instance_id, zone, region };
    imds::identify_instance(given).await.context("identifying this instance")
}

fn has_nvme() -> Result<()> {
    if nvme::has_nvme(Path::new(SYS)) {
        return Ok(());
    }
    let failure = Kind::Machine
        .failure("this machine has no NVMe disks, but oven finds a volume by its NVMe serial number");
    let hint = "Bake on an instance of the Nitro system, or with `--disks direct`, which attaches no volume.";
    Err(failure.hint(hint).into())
}

async fn connect(settings: Settings, report: Report, instance: Option<imds::Instance>) -> Result<Site> {
    let (instance_id, zone, at) =
        instance.map(|i| (Some(i.id), Some(i.zone), Some(i.region))).unwrap_or_default();
    let state = PathBuf::from(STATE_DIR);
    let mut cloud = ec2::Ec2::connect(ec2::Ec2Options {
        region: settings.region.clone().or(at),
        instance_id,
        zone,
        documents: state.join("aws"),
        devices: Rc::new(move |volume: &VolumeId| nvme::find(Path::new(SYS), Path::new(DEV), volume)),
        timeouts: ec2::Timeouts::default(),
    })
    .await?;
    if settings.disks() == Strategy::Direct {
        cloud = cloud.without_volumes();
    }
    let blocks = Rc::new(Ebs::new(cloud.clone()));
    Site::with(Rc::new(cloud), blocks, state, settings, report)
}
