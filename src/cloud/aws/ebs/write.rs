//! Starts, fills and seals snapshots.

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
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep};

/// Minutes without a write after which EBS discards a pending snapshot. This is the lower bound: a bake starts its
/// snapshot before its steps, each of which may take an hour.
const MIN_TIMEOUT: u64 = 360;
/// The upper bound.
const MAX_TIMEOUT: u64 = 4320;
/// Seconds for a GiB at 20 MB/s, a slow connection to EBS.
const SECONDS_PER_GIB: u64 = 54;

/// What is known about calls of StartSnapshot.
#[derive(Default)]
pub struct SnapshotStarts {
    /// Attempts by run: each has its own token.
    attempts: RefCell<HashMap<RunId, u32>>,
    /// Calls that may have started a snapshot, by token: sent again, they answer with that snapshot.
    unresolved: Arc<Mutex<HashMap<String, (RunId, StartSnapshotInputBuilder)>>>,
    /// Whether EBS discarded a snapshot that refused a block: it is asked once for all of the blocks.
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
        with(&mut self.unresolved.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// [`MIN_TIMEOUT`], plus twice the time to write the whole disk, in minutes.
fn timeout_minutes(size_gib: u64) -> i32 {
    let minutes = size_gib.saturating_mul(2 * SECONDS_PER_GIB) / 60;
    convert::to_i32(minutes.saturating_add(MIN_TIMEOUT).min(MAX_TIMEOUT))
}

/// EBS accepts 1 to 255 characters.
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
            // A child is encrypted as its parent is: EBS rejects the parameter.
            .set_encrypted(without_parent.then_some(true).filter(|_| spec.encrypted))
            .set_kms_key_arn(key);
        let (shared, mut again) = (self.shared().await?, true);
        let started = loop {
            let token = self.starts.token(&spec.run);
            let request = request.clone().client_token(&token);
            let sent = self.ec2.repeat(&START_SNAPSHOT, &what, async || {
                let (lane, (again, token)) = (shared.lanes.next(), (request.clone(), token.clone()));
                let (unresolved, of) = (self.starts.unresolved.clone(), spec.run.clone());
                let (sent, client) = (request.clone(), lane.client());
                let task = lane.handle().spawn(send(sent, client));
                let answer = async { task.await.expect("the thread lives as long as the program's Ebs") };
                self.ec2
                    .send_in_background(&spec.run, &START_SNAPSHOT, &what, answer, move |run, result| {
                        let mut unresolved = unresolved.lock().unwrap_or_else(PoisonError::into_inner);
                        match result {
                            Ok(snapshot) => {
                                run.snapshots.extend(snapshot.snapshot_id.clone());
                                unresolved.remove(&token);
                            }
                            Err(refused) if refused.class == ErrorClass::Lost => {
                                unresolved.insert(token, (of, again));
                            }
                            Err(_) => {}
                        }
                    })
                    .await
            });
            match sent.await {
                Ok(started) => break started,
                // Another request used this token: a new one is tried once.
                Err(refused) if refused.is("ConflictException") && again => again = false,
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

    /// Sends a call again that may have started a snapshot: EBS recognizes the token and answers with that snapshot. If
    /// the first call never arrived, this one starts a snapshot, whose id is then known.
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
            let what = format!("to find out what was started for run {run}");
            let sent = self.ec2.repeat(&START_SNAPSHOT, &what, async || {
                let request = request.clone();
                let answer = shared.lanes.run(|lane| send(request, lane.client())).await;
                answer.map_err(|error| ApiError::of(&START_SNAPSHOT, &what, error))
            });
            match sent.await {
                Ok(started) => {
                    let id = convert::id("snap", started.snapshot_id.as_deref())?;
                    self.ec2.born(&id);
                    self.ec2.made().of(run, |run| run.snapshots.insert(id));
                }
                // The outcome is still unknown.
                Err(refused)
                    if matches!(
                        refused.class,
                        ErrorClass::Lost | ErrorClass::Throttled | ErrorClass::Expired
                    ) =>
                {
                    return Err(refused.into());
                }
                // It was refused: then the first call was refused too, or its snapshot is found by its tag.
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
        let lanes = self.shared().await?;
        let (shared, snapshot) = (lanes.clone(), id.clone());
        let sent = lanes.lanes.run(|lane| async move {
            let _permit = shared.puts.acquire().await.expect("the semaphore is never closed");
            let (snapshot, what) = (shared.snapshot(&snapshot), format!("{snapshot}, block {index}"));
            let (data, checksum) = (Bytes::from_owner(data), base64_of(&digest));
            let put = shared.repeat(&lane, &PUT_SNAPSHOT_BLOCK, &snapshot, Some(&snapshot.puts), |client| {
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
                            Err(ApiError::broken(&PUT_SNAPSHOT_BLOCK, what, text, ErrorClass::Lost))
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
                Err(Error::new(SnapshotExpired(id.clone())).context(refused.to_string()))
            }
            Err(refused) => Err(refused.into()),
        }
    }

    /// Whether EBS discarded a snapshot that refused a request, or it is gone: somebody may have swept a run that began
    /// long ago.
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
            let known = !lost || is_block_mismatch(&refused);
            if refused.class != ErrorClass::Lost && known {
                if is_final(&refused) {
                    return Err(self.discard(id, refused.into()).await);
                }
                return Err(refused.into());
            }
            match self.ec2.snapshot_state(id).await? {
                Some(SnapshotState::Completed) => return Ok(()),
                Some(SnapshotState::Error) => return Err(self.discard(id, refused.into()).await),
                // The snapshot was sealed by a call whose answer was lost: EBS refuses the second one.
                _ if refused.class != ErrorClass::Lost => break,
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
        let send = |lane| async move { complete(&again, lane, &id, count, checksum).await };
        Ok(shared.lanes.run(send).await)
    }

    /// Deletes a snapshot that cannot be completed. If EBS discarded it, or it is gone, it has to be written again.
    async fn discard(&self, id: &SnapshotId, error: Error) -> Error {
        let expired = self.ec2.snapshot_state(id).await.is_ok_and(is_discarded);
        let error = match expired {
            true => Error::new(SnapshotExpired(id.clone())).context(format!("{error:#}")),
            false => error,
        };
        // The debt removes it in any case; a failure to delete it does not hide the first error.
        match self.ec2.send_delete(id).await {
            Err(refused) if refused.class != ErrorClass::Done => {
                error.context(format!("{id} cannot be deleted ({refused})"))
            }
            _ => error,
        }
    }
}

async fn complete(
    shared: &EbsState,
    lane: Arc<super::workers::Worker>,
    id: &SnapshotId,
    count: i32,
    checksum: Digest,
) -> Result<(), ApiError> {
    let snapshot = shared.snapshot(id);
    let sent = shared.repeat(&lane, &COMPLETE_SNAPSHOT, &snapshot, None, |client| {
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

/// Whether a snapshot that was pending accepts no more blocks and will never be complete.
fn is_discarded(state: Option<SnapshotState>) -> bool {
    matches!(state, Some(SnapshotState::Error) | None)
}

/// Whether a retry would be refused again.
fn is_final(refused: &ApiError) -> bool {
    matches!(refused.class, ErrorClass::Terminal | ErrorClass::NotYet)
}

/// Whether the error says that the blocks differ from the given count or checksum.
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
