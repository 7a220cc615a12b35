//! Uses the selected strategy for new disks. Uses both strategies to find preserved disks and to remove a run's
//! leftovers.

use super::direct::preserved_disk;
use super::{Disk, DiskSpec, DiskStrategy, step_record};
use crate::cloud::{Base, Cloud, StaleRun};
use crate::config::project::Strategy;
use crate::ids::RunId;
use crate::undo::Undo;
use anyhow::Result;
use async_trait::async_trait;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

/// Returns the runs that have leftovers in the cloud or on this machine. For the cloud, see [`Cloud::stale_runs`].
/// Preserved disks on this machine are also returned if oven cannot know whether their process has ended. `older_than`
/// does not apply to them. `state` is the state directory of this machine.
pub async fn stale_runs(
    cloud: &dyn Cloud,
    state: &Path,
    older_than: Option<Duration>,
) -> Result<Vec<StaleRun>> {
    let mut stale = cloud.stale_runs(older_than).await?;
    for here in preserved_disk::list_runs(state)? {
        match stale.iter_mut().find(|run| run.run == here.run) {
            Some(run) => {
                run.resources.extend(here.resources);
                run.kept |= here.kept;
            }
            None => stale.push(here),
        }
    }
    Ok(stale)
}

pub struct SelectedDisks {
    pub strategy: Strategy,
    pub attached: Rc<dyn DiskStrategy>,
    pub direct: Rc<dyn DiskStrategy>,
    /// The state directory of this machine.
    pub state: PathBuf,
}

#[async_trait(?Send)]
impl DiskStrategy for SelectedDisks {
    async fn query_facts(&self, base: &Base, spec: &DiskSpec, run: &RunId) -> Result<()> {
        match self.strategy {
            Strategy::Attached => self.attached.query_facts(base, spec, run).await,
            Strategy::Direct => self.direct.query_facts(base, spec, run).await,
        }
    }

    async fn checkout(
        &self,
        base: &Base,
        spec: &DiskSpec,
        run: &RunId,
        undo: &Undo,
    ) -> Result<Box<dyn Disk>> {
        match self.strategy {
            Strategy::Attached => self.attached.checkout(base, spec, run, undo).await,
            Strategy::Direct => self.direct.checkout(base, spec, run, undo).await,
        }
    }

    /// Opens the disk with the strategy that preserved it, even if the other strategy is selected.
    async fn reopen(&self, run: &RunId) -> Result<Box<dyn Disk>> {
        let is_direct = preserved_disk::open(&self.state, run)?.is_some();
        if is_direct { self.direct.reopen(run).await } else { self.attached.reopen(run).await }
    }

    async fn forget(&self, run: &RunId) -> Result<()> {
        // If one strategy fails, the other one still removes its resources.
        let (attached, direct) = (self.attached.forget(run).await, self.direct.forget(run).await);
        attached.and(direct)?;
        step_record::remove(&self.state, run)
    }
}
