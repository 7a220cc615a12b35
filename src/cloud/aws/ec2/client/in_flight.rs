//! What this process made, by run. A call that makes something is carried out even if the story is stopped in the
//! middle of it: then the debts know what there is to remove, and need not guess.

use super::call::Refused;
use super::errors::Action;
use crate::cloud::aws::ec2::Ec2;
use crate::ids::{RunId, SnapshotId, VolumeId};
use aws_sdk_ec2::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ec2::operation::create_volume::builders::CreateVolumeInputBuilder;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Notify, oneshot};

/// What a run made.
#[derive(Default)]
pub struct Run {
    flying: usize,
    pub volumes: BTreeSet<String>,
    /// What each volume was asked for with: sent again, its token tells whether it is there still.
    pub requests: BTreeMap<String, CreateVolumeInputBuilder>,
    pub snapshots: BTreeSet<String>,
    /// Snapshots that were made and deleted: EC2 may show them for a while.
    pub deleted: BTreeSet<String>,
    /// A call that may have made a volume: sent again, with its token, it tells which. A later call that was refused
    /// does not settle it.
    pub doubtful_volume: Option<CreateVolumeInputBuilder>,
    /// A snapshot of this volume may have been made.
    pub doubtful_snapshot: Option<VolumeId>,
}

#[derive(Clone, Default)]
pub struct Made(Arc<Shared>);

#[derive(Default)]
struct Shared {
    runs: Mutex<HashMap<RunId, Run>>,
    landed: Notify,
}

impl Made {
    /// Reads or changes what is known of a run.
    pub fn of<T>(&self, run: &RunId, with: impl FnOnce(&mut Run) -> T) -> T {
        let mut runs = self.0.runs.lock().unwrap_or_else(PoisonError::into_inner);
        with(runs.entry(run.clone()).or_default())
    }

    /// A snapshot was deleted. Nobody is to delete it once more: a role that may delete what carries a tag is refused
    /// what is gone.
    pub fn snapshot_deleted(&self, id: &SnapshotId) {
        let mut runs = self.0.runs.lock().unwrap_or_else(PoisonError::into_inner);
        for run in runs.values_mut().filter(|run| run.snapshots.contains(&id.0)) {
            run.snapshots.remove(&id.0);
            run.deleted.insert(id.0.clone());
        }
    }

    /// Waits for the answers of calls that are under way.
    pub async fn settled(&self, run: &RunId) {
        loop {
            let landed = self.0.landed.notified();
            if self.of(run, |run| run.flying) == 0 {
                return;
            }
            landed.await;
        }
    }
}

impl Ec2 {
    /// Sends one request that makes something. It is carried out even if this future is dropped; then `landed` still
    /// learns the result.
    pub(crate) async fn fly<T, E>(
        &self,
        run: &RunId,
        action: &'static Action,
        what: &str,
        request: impl Future<Output = Result<T, SdkError<E>>> + Send + 'static,
        landed: impl FnOnce(&mut Run, &Result<T, Refused>) + Send + 'static,
    ) -> Result<T, Refused>
    where
        T: Send + 'static,
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let (made, run, what) = (self.0.made.clone(), run.clone(), what.to_owned());
        made.of(&run, |run| run.flying += 1);
        tokio::spawn(async move {
            let result = request.await.map_err(|error| Refused::of(action, &what, error));
            made.of(&run, |run| {
                run.flying -= 1;
                landed(run, &result);
            });
            made.0.landed.notify_waiters();
            // Nobody listens any more: the story was stopped.
            _ = sender.send(result);
        });
        receiver.await.expect("the task answers before it ends")
    }
}
