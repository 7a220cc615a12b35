//! Starts snapshots, writes their blocks and completes them.

use super::call::EbsState;
use super::{Ebs, base64_of, digest_of};
use crate::cloud::aws::ec2::client::call::ApiError;
use crate::cloud::aws::ec2::client::errors::{
    COMPLETE_SNAPSHOT, ErrorClass, PUT_SNAPSHOT_BLOCK, START_SNAPSHOT,
};
use crate::cloud::aws::ec2::images::convert;
use crate::cloud::aws::ec2::volumes::client_token;
use crate::cloud::block_api::{NewSnapshot, SnapshotExpired};
use crate::error::Kind;
use crate::ids::{BLOCK, Digest};
use crate::ids::{RunId, SnapshotId};
use crate::sys::lock::lock_mutex;
use anyhow::{Error, Result};
use aws_sdk_ebs::Client;
use aws_sdk_ebs::error::SdkError;
use aws_sdk_ebs::operation::start_snapshot::builders::StartSnapshotInputBuilder;
use aws_sdk_ebs::operation::start_snapshot::{StartSnapshotError, StartSnapshotInput, StartSnapshotOutput};
use aws_sdk_ebs::primitives::ByteStream;
use aws_sdk_ebs::types::{ChecksumAggregationMethod, ChecksumAlgorithm, Tag};
use aws_sdk_ec2::types::SnapshotState;
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};

/// The lower bound of a pending snapshot's timeout in minutes. EBS discards the snapshot if no block is written for
/// that time. The bound is high, because a bake starts its snapshot before its steps, each of which may take an hour.
const MIN_TIMEOUT: u64 = 360;
/// The upper bound of that timeout in minutes.
const MAX_TIMEOUT: u64 = 4320;
/// The time in seconds to write a GiB over a slow connection to EBS, at 20 MB/s.
const SECONDS_PER_GIB: u64 = 54;

/// Remembers the calls of StartSnapshot and their outcomes.
#[derive(Default)]
pub struct SnapshotStarts {
    /// The number of attempts for each run. Each attempt has a different client token.
    attempts: RefCell<HashMap<RunId, u32>>,
    /// Requests whose outcome is unknown, by client token. Each of them may have started a snapshot. If such a request
    /// is sent again, EBS recognizes its token and answers with that snapshot.
    unresolved: Arc<Mutex<HashMap<String, (RunId, StartSnapshotInputBuilder)>>>,
    /// Has an entry for each snapshot for which EBS refused a block. The value says whether EBS has discarded the
    /// snapshot. This is queried once for each snapshot, not for each block.
    expired: RefCell<HashMap<SnapshotId, Rc<OnceCell<bool>>>>,
}

impl SnapshotStarts {
    fn token(&self, run: &RunId) -> String {
        let mut attempts = self.attempts.borrow_mut();
        let attempt = attempts.entry(run.clone()).or_default();
        *attempt += 1;
        client_token(run, "direct", *attempt)
    }

    fn with_unresolved<T>(
        &self,
        with: impl FnOnce(&mut HashMap<String, (RunId, StartSnapshotInputBuilder)>) -> T,
    ) -> T {
        with(&mut lock_mutex(&self.unresolved))
    }
}

/// Returns the timeout of a pending snapshot in minutes: [`MIN_TIMEOUT`] plus twice the time to write the whole disk,
/// but at most [`MAX_TIMEOUT`].
fn timeout_minutes(size_gib: u64) -> i32 {
    let minutes = size_gib.saturating_mul(2 * SECONDS_PER_GIB) / 60;
    convert::to_i32(minutes.saturating_add(MIN_TIMEOUT).min(MAX_TIMEOUT))
}

/// Truncates a description to the 255 characters that EBS accepts. Returns `None` for an empty description, because EBS
/// rejects it.
fn truncate_description(text: &str) -> Option<String> {
    Some(text.chars().take(255).collect::<String>()).filter(|text| !text.is_empty())
}

async fn send(
    request: StartSnapshotInputBuilder,
    client: Client,
) -> Result<StartSnapshotOutput, SdkError<StartSnapshotError>> {
    request.send_with(&client).await
}

impl Ebs {
    pub(crate) async fn start_snapshot(&self, spec: &NewSnapshot) -> Result<SnapshotId> {
        let tags = self.ec2.owned(&spec.tags, &spec.run)?;
        let tags = tags.iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect();
        let without_parent = spec.parent.is_none();
        let key = spec.kms_key.clone().filter(|_| without_parent && spec.encrypted);
        if let Some(key) = key.as_ref().filter(|key| !key.starts_with("arn:")) {
            let failure = Kind::Definition.failure(format!("EBS direct does not accept the key {key:?}"));
            return Err(failure
                .hint("Set kms_key to the key's ARN: arn:aws:kms:REGION:ACCOUNT:key/….")
                .into());
        }
        let what = match &spec.parent {
            Some(parent) => format!("on {parent}, run {}", spec.run),
            None => format!("run {}", spec.run),
        };
        let request = StartSnapshotInput::builder()
            .volume_size(spec.size_gib.try_into().unwrap_or(i64::MAX))
            .set_parent_snapshot_id(spec.parent.as_ref().map(|parent| parent.0.clone()))
            .set_description(truncate_description(&spec.description))
            .set_tags(Some(tags))
            .timeout(timeout_minutes(spec.size_gib))
            // EBS rejects this parameter for a child, because a child is encrypted like its parent.
            .set_encrypted(without_parent.then_some(true).filter(|_| spec.encrypted))
            .set_kms_key_arn(key);
        let (shared, mut may_retry) = (self.shared().await?, true);
        let started = loop {
            let token = self.starts.token(&spec.run);
            let request = request.clone().client_token(&token);
            let sent = self.ec2.repeat(&START_SNAPSHOT, &what, async || {
                let (worker, (again, token)) = (shared.workers.next(), (request.clone(), token.clone()));
                let (unresolved, of) = (self.starts.unresolved.clone(), spec.run.clone());
                let (sent, client) = (request.clone(), worker.client());
                let task = worker.handle().spawn(send(sent, client));
                let answer = async { task.await.expect("the thread lives as long as the program's Ebs") };
                self.ec2
                    .send_in_background(&spec.run, &START_SNAPSHOT, &what, answer, move |run, result| {
                        let mut unresolved = lock_mutex(&unresolved);
                        match result {
                            Ok(snapshot) => {
                                run.snapshots.extend(snapshot.snapshot_id.clone());
                                unresolved.remove(&token);
                            }
                            Err(refused) if refused.class == ErrorClass::Ambiguous => {
                                unresolved.insert(token, (of, again));
                            }
                            Err(_) => {}
                        }
                    })
                    .await
            });
            match sent.await {
                Ok(started) => break started,
                // Another request has used this token. A new token is tried once.
                Err(refused) if refused.is("ConflictException") && may_retry => may_retry = false,
                Err(refused) => return Err(refused.into()),
            }
        };
        let id = SnapshotId(convert::id("snap", started.snapshot_id.as_deref())?);
        self.ec2.born(&id.0);
        shared.born(&id);
        if let Some(size) = started.block_size.filter(|size| *size != BLOCK as i32) {
            return Err(
                Kind::Cloud.error(format!("{id} has blocks of {size} bytes, but oven supports only {BLOCK}"))
            );
        }
        Ok(id)
    }

    /// Repeats the calls of StartSnapshot whose outcome is unknown. If the first call started a snapshot, EBS
    /// recognizes the client token and answers with that snapshot. If the first call never arrived, the second call
    /// starts a snapshot. In both cases the snapshot's id is known afterwards, so the clean-up can delete the snapshot.
    pub(crate) async fn resolve_starts(&self, run: &RunId) -> Result<()> {
        self.ec2.made().settled(run).await;
        let unresolved: Vec<_> = self.starts.with_unresolved(|unresolved| {
            let of_run = unresolved.iter().filter(|(_, (of, _))| of == run);
            of_run.map(|(token, (_, request))| (token.clone(), request.clone())).collect()
        });
        if unresolved.is_empty() {
            return Ok(());
        }
        let shared = self.shared().await?;
        for (token, request) in unresolved {
            let what = format!("to find the snapshot that run {run} may have started");
            let sent = self.ec2.repeat(&START_SNAPSHOT, &what, async || {
                let request = request.clone();
                let answer = shared.workers.run(|worker| send(request, worker.client())).await;
                answer.map_err(|error| ApiError::of(&START_SNAPSHOT, &what, error))
            });
            match sent.await {
                Ok(started) => {
                    let id = convert::id("snap", started.snapshot_id.as_deref())?;
                    self.ec2.born(&id);
                    self.ec2.made().with_run(run, |run| run.snapshots.insert(id));
                }
                // The outcome of the first call is still unknown.
                Err(refused)
                    if matches!(
                        refused.class,
                        ErrorClass::Ambiguous | ErrorClass::Throttled | ErrorClass::CredentialsExpired
                    ) =>
                {
                    return Err(refused.into());
                }
                // EBS refused this call. Either EBS also refused the first call, or the first call started a snapshot.
                // The clean-up finds such a snapshot by the run's tag.
                Err(_) => {}
            }
            self.starts.with_unresolved(|unresolved| unresolved.remove(&token));
        }
        Ok(())
    }

    pub(crate) async fn put_block(
        &self,
        id: &SnapshotId,
        index: u32,
        data: Arc<[u8]>,
        digest: Digest,
    ) -> Result<()> {
        let state = self.shared().await?;
        let (shared, snapshot) = (state.clone(), id.clone());
        let sent = state.workers.run(|worker| async move {
            let _permit = shared.puts.acquire().await.expect("the semaphore is never closed");
            let (snapshot, what) = (shared.snapshot(&snapshot), format!("{snapshot}, block {index}"));
            let (data, checksum) = (Bytes::from_owner(data), base64_of(&digest));
            let put =
                shared.repeat(&worker, &PUT_SNAPSHOT_BLOCK, &snapshot, Some(&snapshot.puts), |client| {
                    let call = client
                        .put_snapshot_block()
                        .snapshot_id(&snapshot.id.0)
                        .block_index(i32::try_from(index).unwrap_or(i32::MAX))
                        .data_length(convert::to_i32(data.len()))
                        .checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256)
                        .checksum(&checksum)
                        .block_data(ByteStream::from(data.clone()));
                    let what = &what;
                    async move {
                        let put = call.send().await;
                        let put = put.map_err(|error| ApiError::of(&PUT_SNAPSHOT_BLOCK, what, error))?;
                        match put.checksum.as_deref().and_then(digest_of) {
                            Some(other) if other != digest => {
                                let text = "EBS returned a wrong checksum".to_owned();
                                Err(ApiError::broken(&PUT_SNAPSHOT_BLOCK, what, text, ErrorClass::Ambiguous))
                            }
                            _ => Ok(()),
                        }
                    }
                });
            put.await
        });
        match sent.await {
            Ok(()) => Ok(()),
            Err(refused) if is_final(&refused) && self.has_expired(id).await? => {
                Err(Error::new(SnapshotExpired(id.clone())).context(Kind::Cloud.failure(refused)))
            }
            Err(refused) => Err(refused.into()),
        }
    }

    /// Returns whether EBS has discarded a snapshot, or somebody has deleted it. For example, `oven sweep` may have
    /// deleted the snapshot if the run began long ago. This is called after EBS refused a block of the snapshot.
    async fn has_expired(&self, id: &SnapshotId) -> Result<bool> {
        let cell = self.starts.expired.borrow_mut().entry(id.clone()).or_default().clone();
        cell.get_or_try_init(async || Ok(is_discarded(self.ec2.snapshot_state(id).await?))).await.copied()
    }

    pub(crate) async fn complete_snapshot(
        &self,
        id: &SnapshotId,
        count: u32,
        checksum: Digest,
    ) -> Result<()> {
        let (begun, mut lost) = (Instant::now(), false);
        loop {
            let refused = match self.send_complete(id, count, checksum).await? {
                Ok(()) => break,
                Err(refused) => refused,
            };
            let is_outcome_known = !lost || is_block_mismatch(&refused);
            if refused.class != ErrorClass::Ambiguous && is_outcome_known {
                if is_final(&refused) {
                    return Err(self.discard(id, refused.into()).await);
                }
                return Err(refused.into());
            }
            match self.ec2.snapshot_state(id).await? {
                Some(SnapshotState::Completed) => return Ok(()),
                Some(SnapshotState::Error) => return Err(self.discard(id, refused.into()).await),
                // An earlier call took effect, but its answer was lost. So EBS refuses this call. The snapshot will be
                // complete soon.
                _ if refused.class != ErrorClass::Ambiguous => break,
                _ if begun.elapsed() >= self.ec2.timeouts().outage => return Err(refused.into()),
                _ => lost = true,
            }
            sleep(self.ec2.timeouts().first_poll).await;
        }
        match self.ec2.completed(id).await? {
            Ok(()) => Ok(()),
            Err(error) => Err(self.discard(id, error).await),
        }
    }

    async fn send_complete(
        &self,
        id: &SnapshotId,
        count: u32,
        checksum: Digest,
    ) -> Result<Result<(), ApiError>> {
        let shared = self.shared().await?;
        let (again, id) = (shared.clone(), id.clone());
        let count = convert::to_i32(count);
        let send = |worker| async move { complete(&again, worker, &id, count, checksum).await };
        Ok(shared.workers.run(send).await)
    }

    /// Deletes a snapshot that cannot be completed, and returns `error`. If EBS discarded the snapshot, or if somebody
    /// deleted it, the returned error has [`SnapshotExpired`] in its chain, so that the blocks are written again.
    async fn discard(&self, id: &SnapshotId, error: Error) -> Error {
        let expired = self.ec2.snapshot_state(id).await.is_ok_and(is_discarded);
        let error = match expired {
            true => {
                Error::new(SnapshotExpired(id.clone())).context(Kind::Cloud.failure(format!("{error:#}")))
            }
            false => error,
        };
        // A failure to delete the snapshot does not hide the first error. The clean-up tries again to delete the
        // snapshot.
        match self.ec2.send_delete(id).await {
            Err(refused) if refused.class != ErrorClass::AlreadyDone => {
                error.context(format!("{id} could not be deleted ({refused})"))
            }
            _ => error,
        }
    }
}

async fn complete(
    shared: &EbsState,
    worker: Arc<super::workers::Worker>,
    id: &SnapshotId,
    count: i32,
    checksum: Digest,
) -> Result<(), ApiError> {
    let snapshot = shared.snapshot(id);
    let sent = shared.repeat(&worker, &COMPLETE_SNAPSHOT, &snapshot, None, |client| {
        let call = client
            .complete_snapshot()
            .snapshot_id(&id.0)
            .changed_blocks_count(count)
            .checksum(base64_of(&checksum))
            .checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256)
            .checksum_aggregation_method(ChecksumAggregationMethod::ChecksumAggregationLinear);
        async { call.send().await.map_err(|error| ApiError::of(&COMPLETE_SNAPSHOT, &id.0, error)) }
    });
    sent.await.map(drop)
}

/// Returns whether a snapshot that was pending can no longer be completed.
fn is_discarded(state: Option<SnapshotState>) -> bool {
    matches!(state, Some(SnapshotState::Error) | None)
}

/// Returns whether a retry would be refused again.
fn is_final(refused: &ApiError) -> bool {
    matches!(refused.class, ErrorClass::Fatal | ErrorClass::NotVisibleYet)
}

/// Returns whether the error says that the blocks do not match the given count or checksum.
fn is_block_mismatch(refused: &ApiError) -> bool {
    let message = refused.message.to_ascii_lowercase();
    ["checksum", "count"].iter().any(|word| message.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_snapshot_gets_a_longer_timeout() {
        assert_eq!(timeout_minutes(1), 361);
        assert_eq!(timeout_minutes(33), 419);
        assert_eq!(timeout_minutes(100), 540);
        assert_eq!(timeout_minutes(64 << 10), 4320);
    }
}
