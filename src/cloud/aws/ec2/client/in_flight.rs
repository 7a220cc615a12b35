//! Records what this process created, by run. A call that creates something is completed even if the bake is cancelled
//! during it. So its result is recorded, and the clean-up actions registered with `undo` know the ids to remove.

use super::call::ApiError;
use super::errors::Action;
use crate::cloud::aws::ec2::Ec2;
use crate::ids::{RunId, SnapshotId, VolumeId};
use crate::sys::lock::lock_mutex;
use aws_sdk_ec2::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ec2::operation::create_volume::builders::CreateVolumeInputBuilder;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, oneshot};

/// The resources that a run created, and its calls whose outcome is unknown.
#[derive(Default)]
pub struct RunCalls {
    calls_under_way: usize,
    pub volumes: BTreeSet<String>,
    /// The request that created each volume. If the request is sent again with the same client token, EC2's answer
    /// shows whether the volume still exists.
    pub requests: BTreeMap<String, CreateVolumeInputBuilder>,
    pub snapshots: BTreeSet<String>,
    /// Snapshots that were created and deleted. EC2 may still show them for a while.
    pub deleted: BTreeSet<String>,
    /// A request that may have created a volume. If the request is sent again with the same client token, EC2's answer
    /// identifies the volume. The field remains set when a retry is refused, because a refusal does not show whether
    /// the first call created a volume.
    pub doubtful_volume: Option<CreateVolumeInputBuilder>,
    /// A volume of which a snapshot may have been created, by a call whose answer was lost.
    pub doubtful_snapshot: Option<VolumeId>,
}

#[derive(Clone, Default)]
pub struct InFlight(Arc<Shared>);

#[derive(Default)]
struct Shared {
    runs: Mutex<HashMap<RunId, RunCalls>>,
    call_ended: Notify,
}

impl InFlight {
    /// Reads or changes the record of a run.
    pub fn with_run<T>(&self, run: &RunId, with: impl FnOnce(&mut RunCalls) -> T) -> T {
        let mut runs = lock_mutex(&self.0.runs);
        with(runs.entry(run.clone()).or_default())
    }

    /// Records that a snapshot was deleted, so that it is not deleted again. EC2 would refuse a second call if the role
    /// may delete only snapshots with a certain tag.
    pub fn snapshot_deleted(&self, id: &SnapshotId) {
        let mut runs = lock_mutex(&self.0.runs);
        for run in runs.values_mut().filter(|run| run.snapshots.contains(&id.0)) {
            run.snapshots.remove(&id.0);
            run.deleted.insert(id.0.clone());
        }
    }

    /// Waits until the run has no calls under way.
    pub async fn settled(&self, run: &RunId) {
        loop {
            let call_ended = self.0.call_ended.notified();
            if self.with_run(run, |run| run.calls_under_way) == 0 {
                return;
            }
            call_ended.await;
        }
    }
}

impl Ec2 {
    /// Sends one request that creates something. The request is completed even if this future is dropped.
    /// `record_result` is called with the result in any case.
    pub(crate) async fn send_in_background<T, E>(
        &self,
        run: &RunId,
        action: &'static Action,
        what: &str,
        request: impl Future<Output = Result<T, SdkError<E>>> + Send + 'static,
        record_result: impl FnOnce(&mut RunCalls, &Result<T, ApiError>) + Send + 'static,
    ) -> Result<T, ApiError>
    where
        T: Send + 'static,
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let (made, run, what) = (self.0.made.clone(), run.clone(), what.to_owned());
        made.with_run(&run, |run| run.calls_under_way += 1);
        tokio::spawn(async move {
            let result = request.await.map_err(|error| ApiError::of(action, &what, error));
            made.with_run(&run, |run| {
                run.calls_under_way -= 1;
                record_result(run, &result);
            });
            made.0.call_ended.notify_waiters();
            // The receiver is gone if the bake was cancelled.
            _ = sender.send(result);
        });
        receiver.await.expect("the task answers before it ends")
    }
}
