//! Finds resources that killed runs left in a region.

use super::Region;
use super::records::{
    ImageRecord, PARENT, RegionRecord, SnapshotRecord, VolumeRecord, millis, now, remove_if_there,
};
use crate::cloud::{StaleRun, tag};
use crate::ids::RunId;
use crate::owner::{Owner, OwnerEnded};
use anyhow::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The resources of a run in the region.
#[derive(Default)]
struct RunResources {
    owner: String,
    resources: Vec<String>,
    kept: bool,
    newest: u64,
}

impl RunResources {
    fn add(&mut self, record: &impl RegionRecord) {
        let tags = record.tags();
        if let Some(owner) = tags.get(tag::OWNER) {
            self.owner.clone_from(owner);
        }
        self.kept |= tags.contains_key(tag::KEPT);
        // An invalid creation time counts as the current time, so that the run is never considered old.
        self.newest = self.newest.max(millis(record.created()).unwrap_or_else(now));
        self.resources.push(record.id().to_owned());
    }

    fn is_stale(&self, older_than: Option<Duration>) -> bool {
        match self.owner.parse::<Owner>().map_or(OwnerEnded::Unknown, |owner| owner.is_gone()) {
            OwnerEnded::Yes => true,
            OwnerEnded::No => false,
            OwnerEnded::Unknown => {
                older_than.is_some_and(|age| u128::from(now().saturating_sub(self.newest)) > age.as_millis())
            }
        }
    }
}

impl Region {
    /// See [`crate::cloud::Cloud::tidy`].
    pub(crate) async fn remove_orphans(&self) -> Result<()> {
        let tidied = self.store().locked(|region| {
            region.tidy()?;
            for snapshot in region.list::<SnapshotRecord>()? {
                if snapshot.written.as_ref().is_some_and(|written| written.sealed.is_some()) {
                    // The link to the parent's data remains if a process completed the snapshot and was killed before
                    // it removed the link.
                    remove_if_there(&region.part::<SnapshotRecord>(&snapshot.id.0, PARENT))?;
                }
            }
            Ok(())
        });
        tidied.await
    }

    /// See [`crate::cloud::Cloud::stale_runs`].
    pub(crate) async fn stale(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>> {
        let found = self.store().locked(|region| {
            let used: BTreeSet<_> =
                region.list::<ImageRecord>()?.into_iter().map(|image| image.snapshot).collect();
            let mut runs = BTreeMap::<String, RunResources>::new();
            for volume in region.list::<VolumeRecord>()? {
                if let Some(run) = volume.tags.get(tag::RUN) {
                    runs.entry(run.clone()).or_default().add(&volume);
                }
            }
            for snapshot in region.list::<SnapshotRecord>()? {
                if let (Some(run), false) = (snapshot.tags.get(tag::RUN), used.contains(&snapshot.id)) {
                    runs.entry(run.clone()).or_default().add(&snapshot);
                }
            }
            Ok(runs)
        });
        let stale = found.await?.into_iter().filter(|(_, found)| found.is_stale(older_than));
        Ok(stale
            .map(|(run, RunResources { owner, resources, kept, .. })| StaleRun {
                run: RunId(run),
                owner,
                resources,
                kept,
            })
            .collect())
    }
}
