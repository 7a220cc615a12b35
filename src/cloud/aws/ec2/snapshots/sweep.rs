//! Finds volumes and snapshots that remained when a run of oven was killed. The tags of a resource name its run and the
//! run's owner, which is the process that created the resource.

use super::release::is_registered;
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::errors::DESCRIBE_INSTANCES;
use crate::cloud::aws::ec2::images::convert;
use crate::cloud::aws::ec2::images::convert::{filter, from_tags};
use crate::cloud::{StaleRun, Tags, tag};
use crate::ids::RunId;
use crate::owner::{Owner, OwnerEnded};
use anyhow::Result;
use aws_sdk_ec2::types::{InstanceStateName, VolumeState};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The maximum number of values that EC2 accepts in a filter.
const MAX_FILTER_VALUES: usize = 200;

/// The resources of a run in the region.
#[derive(Default)]
struct RunResources {
    owner: String,
    resources: Vec<String>,
    kept: bool,
    newest: Option<SystemTime>,
}

impl RunResources {
    fn add(&mut self, id: String, tags: &Tags, created: Option<SystemTime>) {
        if let Some(owner) = tags.get(tag::OWNER) {
            self.owner.clone_from(owner);
        }
        self.kept |= tags.contains_key(tag::KEPT);
        // An unknown time counts as now, so that the run is never considered old.
        self.newest = self.newest.max(Some(created.unwrap_or_else(SystemTime::now)));
        self.resources.push(id);
    }

    fn is_older_than(&self, age: Duration) -> bool {
        self.newest
            .and_then(|newest| SystemTime::now().duration_since(newest).ok())
            .is_some_and(|old| old > age)
    }
}

/// Returns the id of the instance on which an owner runs or ran; `None` if the owner's host is not an instance. The
/// text after a `+` names a PID namespace, and is ignored.
fn instance_of(owner: &Owner) -> Option<&str> {
    let host = owner.host.split('+').next()?;
    host.starts_with("i-").then_some(host)
}

impl Ec2 {
    pub(crate) async fn stale(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>> {
        let mut runs = BTreeMap::<String, RunResources>::new();
        let ours = [filter("tag-key", [tag::RUN])];
        for volume in self.volumes("", &ours).await? {
            let tags = from_tags(volume.tags());
            let is_deleted = matches!(volume.state, Some(VolumeState::Deleting | VolumeState::Deleted));
            if let (Some(run), false) = (tags.get(tag::RUN), is_deleted) {
                let id = convert::id("vol", volume.volume_id.as_deref())?;
                runs.entry(run.clone()).or_default().add(
                    id,
                    &tags,
                    convert::time(volume.create_time.as_ref()),
                );
            }
        }
        let snapshots = self.snapshots("", &ours).await?;
        let ids = snapshots.iter().filter_map(|snapshot| snapshot.snapshot_id.clone()).collect();
        let used_by_images = self.used_by_images(ids).await?;
        for snapshot in snapshots {
            let tags = from_tags(snapshot.tags());
            let id = convert::id("snap", snapshot.snapshot_id.as_deref())?;
            if let (Some(run), false) = (tags.get(tag::RUN), used_by_images.contains(&id)) {
                runs.entry(run.clone()).or_default().add(
                    id,
                    &tags,
                    convert::time(snapshot.start_time.as_ref()),
                );
            }
        }
        let terminated = self.terminated(&runs).await?;
        // A host on EC2 has two names: the instance id, and the name that oven uses if it does not know the instance
        // id. A bake that attaches no volumes may not know the id. So the owner is compared with both names of this
        // host.
        let here = [self.owner(), Owner::this()];
        let stale = runs.into_iter().filter(|(_, found)| {
            let owner = found.owner.parse::<Owner>().ok();
            let seen = owner.iter().flat_map(|owner| {
                here.iter().map(|here| owner.has_ended_seen_from(here, Path::new("/proc")))
            });
            let gone =
                seen.into_iter().find(|gone| *gone != OwnerEnded::Unknown).unwrap_or(OwnerEnded::Unknown);
            let instance_is_gone =
                owner.as_ref().and_then(instance_of).is_some_and(|instance| terminated.contains(instance));
            match gone {
                OwnerEnded::Yes => true,
                OwnerEnded::No => false,
                OwnerEnded::Unknown => {
                    instance_is_gone || older_than.is_some_and(|age| found.is_older_than(age))
                }
            }
        });
        let to_stale_run = |(run, found): (String, RunResources)| StaleRun {
            run: RunId(run),
            owner: found.owner,
            resources: found.resources,
            kept: found.kept,
        };
        Ok(stale.map(to_stale_run).collect())
    }

    /// Returns the snapshots that an image uses. These snapshots are results of bakes, so they are not removed.
    async fn used_by_images(&self, snapshots: Vec<String>) -> Result<BTreeSet<String>> {
        let mut used_by_images = BTreeSet::new();
        for chunk in snapshots.chunks(MAX_FILTER_VALUES) {
            let images = self.own_images("", &[filter("block-device-mapping.snapshot-id", chunk)]).await?;
            let mappings = images
                .iter()
                .filter(|image| is_registered(image))
                .flat_map(|image| image.block_device_mappings());
            used_by_images.extend(mappings.filter_map(|mapping| mapping.ebs.as_ref()?.snapshot_id.clone()));
        }
        Ok(used_by_images)
    }

    /// Returns the instances of the runs' owners that EC2 reports as terminated or does not know. The instance on which
    /// this process runs is left out.
    async fn terminated(&self, runs: &BTreeMap<String, RunResources>) -> Result<BTreeSet<String>> {
        let owners = runs.values().filter_map(|found| found.owner.parse::<Owner>().ok());
        let here = self.0.options.instance_id.as_deref();
        let mut instances: BTreeSet<String> =
            owners.filter_map(|owner| instance_of(&owner).map(str::to_owned)).collect();
        instances.retain(|instance| Some(instance.as_str()) != here);
        let mut terminated = instances.clone();
        let instances: Vec<String> = instances.into_iter().collect();
        for chunk in instances.chunks(MAX_FILTER_VALUES) {
            let mut token = None::<String>;
            loop {
                let sent = self.call(&DESCRIBE_INSTANCES, "", |client| {
                    let call = client.describe_instances().filters(filter("instance-id", chunk));
                    call.set_next_token(token.clone()).send()
                });
                let page = sent.await?;
                for instance in page.reservations().iter().flat_map(|reservation| reservation.instances()) {
                    let state = instance.state.as_ref().and_then(|state| state.name.as_ref());
                    if let (Some(id), false) =
                        (&instance.instance_id, state == Some(&InstanceStateName::Terminated))
                    {
                        terminated.remove(id);
                    }
                }
                token = page.next_token.filter(|token| !token.is_empty());
                if token.is_none() {
                    break;
                }
            }
        }
        Ok(terminated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_name_their_instance() {
        let owner = |host: &str| Owner { host: host.into(), boot: "b".into(), pid: 1, started: 1 };
        assert_eq!(instance_of(&owner("i-0abc")), Some("i-0abc"));
        assert_eq!(instance_of(&owner("i-0abc+pidns-4026532")), Some("i-0abc"));
        assert_eq!(instance_of(&owner("0123456789abcdef0123456789abcdef")), None);
    }
}
