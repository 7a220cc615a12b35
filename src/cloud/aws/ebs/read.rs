//! Reads and verifies blocks.

use super::call::{EbsState, KnownSnapshot};
use super::digest_of;
use super::workers::Worker;
use crate::cloud::aws::ec2::client::call::ApiError;
use crate::cloud::aws::ec2::client::errors::{ErrorClass, GET_SNAPSHOT_BLOCK};
use crate::cloud::block_api::SnapshotReader;
use crate::error::Kind;
use crate::ids::{BLOCK, Digest};
use anyhow::{Context, Result};
use aws_sdk_ebs::Client;
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use tokio::time::{Instant, timeout};

/// How many times a block is read again if it does not match its digest. If the block was damaged in transit, the next
/// read probably succeeds.
const REREADS: u32 = 3;
/// How many times the tokens are listed again if EBS refuses a block's token.
const MAX_TOKENS: u32 = 3;

pub struct BlockReader {
    pub shared: Arc<EbsState>,
    pub snapshot: Arc<KnownSnapshot>,
}

impl SnapshotReader for BlockReader {
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        let context = || format!("reading block {index} of {}", self.snapshot.id);
        for _ in 0..=REREADS {
            let (shared, snapshot) = (self.shared.clone(), self.snapshot.clone());
            let got = self
                .shared
                .workers
                .run_blocking(|worker| async move { shared.get(&worker, &snapshot, index).await });
            let (data, digest) = got?.with_context(context)?;
            // The digest is computed on the caller's thread, because there are many callers and only few worker
            // threads.
            if data.len() == BLOCK && Sha256::digest(&data)[..] == digest {
                return Ok((data, digest));
            }
        }
        let text = format!("the block does not match its checksum, {} times in a row", REREADS + 1);
        Err(Kind::Cloud.error(text)).with_context(context)
    }
}

impl EbsState {
    async fn get(&self, worker: &Worker, snapshot: &KnownSnapshot, index: u32) -> Result<(Vec<u8>, Digest)> {
        let _permit = self.gets.acquire().await.context("waiting for a permit to read")?;
        let what = format!("{}, block {index}", snapshot.id);
        let (mut refused_token, mut tokens) = (None::<Box<str>>, 0);
        loop {
            let token = self.token(worker, snapshot, index, refused_token.as_deref()).await?;
            let got = self.repeat(worker, &GET_SNAPSHOT_BLOCK, snapshot, Some(&snapshot.gets), |client| {
                let (what, token, timeouts) = (&what, &token, &self.timeouts);
                async move {
                    // The SDK's timeout covers the request only until the data begin to arrive. This timeout also
                    // covers the data.
                    let begun = Instant::now();
                    match timeout(timeouts.attempt, fetch_block(&client, snapshot, index, token, what)).await
                    {
                        Ok(got) => got.inspect(|_| self.took(begun.elapsed())),
                        Err(_) => Err(incomplete_answer(what, "the block did not arrive in time".to_owned())),
                    }
                }
            });
            match got.await {
                // A block token expires after a week. Then the blocks are listed again to get a new one.
                Err(error) if tokens < MAX_TOKENS && is_block_token_error(&error) => {
                    (refused_token, tokens) = (Some(token), tokens + 1);
                }
                got => return Ok(got?),
            }
        }
    }
}

async fn fetch_block(
    client: &Client,
    snapshot: &KnownSnapshot,
    index: u32,
    token: &str,
    what: &str,
) -> Result<(Vec<u8>, Digest), ApiError> {
    let call = client.get_snapshot_block().snapshot_id(&snapshot.id.0).block_token(token);
    let sent = call.block_index(i32::try_from(index).unwrap_or(i32::MAX)).send().await;
    let mut answer = sent.map_err(|error| ApiError::of(&GET_SNAPSHOT_BLOCK, what, error))?;
    let mut data = Vec::with_capacity(BLOCK);
    while let Some(part) = answer.block_data.next().await {
        let part =
            part.map_err(|error| incomplete_answer(what, format!("the block's data ended early: {error}")))?;
        if data.len() + part.len() > BLOCK {
            return Err(incomplete_answer(what, format!("the block has more than {BLOCK} bytes")));
        }
        data.extend_from_slice(&part);
    }
    let digest = answer.checksum.as_deref().and_then(digest_of);
    let digest = digest.ok_or_else(|| incomplete_answer(what, "the block has no checksum".to_owned()))?;
    Ok((data, digest))
}

fn incomplete_answer(what: &str, message: String) -> ApiError {
    ApiError::broken(&GET_SNAPSHOT_BLOCK, what, message, ErrorClass::Ambiguous)
}

/// Returns whether the error says that the block's token has expired.
fn is_block_token_error(error: &ApiError) -> bool {
    error.is("ValidationException")
        && (error.reason.as_deref() == Some("INVALID_BLOCK_TOKEN")
            || error.message.to_ascii_lowercase().contains("token"))
}
