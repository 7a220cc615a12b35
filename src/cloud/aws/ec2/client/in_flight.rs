//! Records the resources that each run of this process created. A run is the baking of one image. If a bake is
//! cancelled during a call that creates something, the call is still completed, and its result is recorded. So the
//! clean-up actions, which are registered with `undo`, know which ids to remove.

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

/// The resources that a run created, and the run's calls whose outcome is unknown.
#[derive(Default)]
pub struct RunCalls {
    calls_under_way: usize,
    pub volumes: BTreeSet<String>,
    /// For each volume id, the request that created the volume. If the request is sent again with the same client
    /// token, EC2's answer shows whether the volume still exists.
    pub requests: BTreeMap<String, CreateVolumeInputBuilder>,
    pub snapshots: BTreeSet<String>,
    /// Snapshots that were created and deleted. EC2 may still show them for a while.
    pub deleted: BTreeSet<String>,
    /// A request that may have created a volume. If the request is sent again with the same client token, EC2's answer
    /// identifies the volume. The field remains set when a retry is refused, because a refusal does not show whether
    /// the first call created a volume. The clean-up clears it: after a final refusal, it searches for the volume by the
    /// run's tag.
    pub doubtful_volume: Option<CreateVolumeInputBuilder>,
    /// The volume that CreateSnapshot was called for, if the answer was lost. A snapshot of the volume may exist.
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

    /// Records that a snapshot was deleted, so that DeleteSnapshot is not sent again for it. If the role may delete
    /// only snapshots with a certain tag, EC2 would refuse the second call, because a deleted snapshot has no tags.
    pub fn snapshot_deleted(&self, id: &SnapshotId) {
        let mut runs = lock_mutex(&self.0.runs);
        for run in runs.values_mut().filter(|run| run.snapshots.contains(&id.0)) {
            run.snapshots.remove(&id.0);
            run.deleted.insert(id.0.clone());
        }
    }

    /// Waits until all calls of the run have ended.
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
    /// `record_result` is called with the result, even if the future was dropped.
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
            // If the bake was cancelled, nothing receives the result. This is not an error.
            _ = sender.send(result);
        });
        receiver.await.expect("the task answers before it ends")
    }
}
