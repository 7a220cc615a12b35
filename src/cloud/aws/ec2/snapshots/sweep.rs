//! What killed runs left, found by its tags.

use super::release::holds;
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::errors::DESCRIBE_INSTANCES;
use crate::cloud::aws::ec2::images::convert;
use crate::cloud::aws::ec2::images::convert::{filter, from_tags};
use crate::cloud::{StaleRun, Tags, tag};
use crate::ids::RunId;
use crate::owner::{Gone, Owner};
use anyhow::Result;
use aws_sdk_ec2::types::{InstanceStateName, VolumeState};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// A filter takes 200 values.
const VALUES: usize = 200;

/// What a run has in the region.
#[derive(Default)]
struct Found {
    owner: String,
    resources: Vec<String>,
    kept: bool,
    newest: Option<SystemTime>,
}

impl Found {
    fn add(&mut self, id: String, tags: &Tags, created: Option<SystemTime>) {
        if let Some(owner) = tags.get(tag::OWNER) {
            self.owner.clone_from(owner);
        }
        self.kept |= tags.contains_key(tag::KEPT);
        // Unknown: as if it were made now, so that it is never taken for an old one.
        self.newest = self.newest.max(Some(created.unwrap_or_else(SystemTime::now)));
        self.resources.push(id);
    }

    fn is_older_than(&self, age: Duration) -> bool {
        self.newest
            .and_then(|newest| SystemTime::now().duration_since(newest).ok())
            .is_some_and(|old| old > age)
    }
}

/// The instance that an owner runs on; a PID namespace of it counts as the instance.
fn instance_of(owner: &Owner) -> Option<&str> {
    let host = owner.host.split('+').next()?;
    host.starts_with("i-").then_some(host)
}

impl Ec2 {
    pub(crate) async fn stale(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>> {
        let mut runs = BTreeMap::<String, Found>::new();
        let ours = [filter("tag-key", [tag::RUN])];
        for volume in self.volumes("", &ours).await? {
            let tags = from_tags(volume.tags());
            let ended = matches!(volume.state, Some(VolumeState::Deleting | VolumeState::Deleted));
            if let (Some(run), false) = (tags.get(tag::RUN), ended) {
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
        let used = self.used(ids).await?;
        for snapshot in snapshots {
            let tags = from_tags(snapshot.tags());
            let id = convert::id("snap", snapshot.snapshot_id.as_deref())?;
            if let (Some(run), false) = (tags.get(tag::RUN), used.contains(&id)) {
                runs.entry(run.clone()).or_default().add(
                    id,
                    &tags,
                    convert::time(snapshot.start_time.as_ref()),
                );
            }
        }
        let ended = self.ended(&runs).await?;
        // Who attaches nothing need not have known which instance it was on.
        let here = [self.owner(), Owner::this()];
        let stale = runs.into_iter().filter(|(_, found)| {
            let owner = found.owner.parse::<Owner>().ok();
            let seen = owner
                .iter()
                .flat_map(|owner| here.iter().map(|here| owner.is_gone_from(here, Path::new("/proc"))));
            let gone = seen.into_iter().find(|gone| *gone != Gone::Unknown).unwrap_or(Gone::Unknown);
            let elsewhere =
                owner.as_ref().and_then(instance_of).is_some_and(|instance| ended.contains(instance));
            match gone {
                Gone::Yes => true,
                Gone::No => false,
                Gone::Unknown => elsewhere || older_than.is_some_and(|age| found.is_older_than(age)),
            }
        });
        let told = |(run, found): (String, Found)| StaleRun {
            run: RunId(run),
            owner: found.owner,
            resources: found.resources,
            kept: found.kept,
        };
        Ok(stale.map(told).collect())
    }

    /// Snapshots that an image uses: results.
    async fn used(&self, snapshots: Vec<String>) -> Result<BTreeSet<String>> {
        let mut used = BTreeSet::new();
        for some in snapshots.chunks(VALUES) {
            let images = self.own_images("", &[filter("block-device-mapping.snapshot-id", some)]).await?;
            let mappings =
                images.iter().filter(|image| holds(image)).flat_map(|image| image.block_device_mappings());
            used.extend(mappings.filter_map(|mapping| mapping.ebs.as_ref()?.snapshot_id.clone()));
        }
        Ok(used)
    }

    /// Other instances that own a run, and are terminated or not there at all.
    async fn ended(&self, runs: &BTreeMap<String, Found>) -> Result<BTreeSet<String>> {
        let owners = runs.values().filter_map(|found| found.owner.parse::<Owner>().ok());
        let here = self.0.options.instance_id.as_deref();
        let mut asked: BTreeSet<String> =
            owners.filter_map(|owner| instance_of(&owner).map(str::to_owned)).collect();
        asked.retain(|instance| Some(instance.as_str()) != here);
        let mut ended = asked.clone();
        let asked: Vec<String> = asked.into_iter().collect();
        for some in asked.chunks(VALUES) {
            let mut token = None::<String>;
            loop {
                let sent = self.call(&DESCRIBE_INSTANCES, "", |client| {
                    let call = client.describe_instances().filters(filter("instance-id", some));
                    call.set_next_token(token.clone()).send()
                });
                let page = sent.await?;
                for instance in page.reservations().iter().flat_map(|reservation| reservation.instances()) {
                    let state = instance.state.as_ref().and_then(|state| state.name.as_ref());
                    if let (Some(id), false) =
                        (&instance.instance_id, state == Some(&InstanceStateName::Terminated))
                    {
                        ended.remove(id);
                    }
                }
                token = page.next_token.filter(|token| !token.is_empty());
                if token.is_none() {
                    break;
                }
            }
        }
        Ok(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_of_owners() {
        let owner = |host: &str| Owner { host: host.into(), boot: "b".into(), pid: 1, started: 1 };
        assert_eq!(instance_of(&owner("i-0abc")), Some("i-0abc"));
        assert_eq!(instance_of(&owner("i-0abc+pidns-4026532")), Some("i-0abc"));
        assert_eq!(instance_of(&owner("0123456789abcdef0123456789abcdef")), None);
    }
}
