//! Lists the blocks of a snapshot, and the tokens that are needed to read these blocks.

use super::call::{EbsState, KnownSnapshot};
use super::tokens::{WINDOW, Window, remember};
use super::workers::Worker;
use crate::cloud::aws::ec2::client::call::ApiError;
use crate::cloud::aws::ec2::client::errors::{ErrorClass, LIST_SNAPSHOT_BLOCKS};
use crate::cloud::block_api::{BlockIndexes, SnapshotContents};
use crate::error::Kind;
use crate::ids::BLOCK;
use anyhow::{Result, bail};
use std::time::SystemTime;

/// The number of blocks in a page. It is large, so that few pages are listed. Listing a page takes as long as reading
/// many blocks.
const PAGE_SIZE: i32 = 10_000;
/// A listing fails if more than this many pages in a row have no new block.
const MAX_EMPTY_PAGES: u32 = 1000;
/// How many times a listing is resumed after an expired page token without getting a new block.
const MAX_RELISTS: u32 = 5;

struct Page {
    size_gib: u64,
    blocks: Vec<(u32, Box<str>)>,
    expires: Option<SystemTime>,
    next: Option<String>,
}

impl EbsState {
    async fn page(
        &self,
        worker: &Worker,
        snapshot: &KnownSnapshot,
        from: u32,
        token: Option<String>,
    ) -> Result<Page, ApiError> {
        let (action, what) = (&LIST_SNAPSHOT_BLOCKS, snapshot.id.to_string());
        let from = token.is_none().then(|| i32::try_from(from).unwrap_or(i32::MAX));
        let answer = self
            .repeat(worker, action, snapshot, None, |client| {
                let call = client.list_snapshot_blocks().snapshot_id(&what).max_results(PAGE_SIZE);
                let sent = call.set_starting_block_index(from).set_next_token(token.clone()).send();
                async { sent.await.map_err(|error| ApiError::of(action, &what, error)) }
            })
            .await?;
        let wrong = |text: String| ApiError::broken(action, &what, text, ErrorClass::Fatal);
        if let Some(size) = answer.block_size.filter(|size| *size != BLOCK as i32) {
            return Err(wrong(format!("the blocks have {size} bytes, but oven supports only {BLOCK}")));
        }
        let blocks = answer.blocks.unwrap_or_default().into_iter().map(|block| {
            let index = block.block_index.and_then(|index| u32::try_from(index).ok());
            index
                .zip(block.block_token.map(String::into_boxed_str))
                .ok_or_else(|| wrong("a block has no index or no token".to_owned()))
        });
        Ok(Page {
            size_gib: answer.volume_size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
            blocks: blocks.collect::<Result<_, _>>()?,
            expires: answer.expiry_time.and_then(|time| SystemTime::try_from(time).ok()),
            next: answer.next_token.filter(|token| !token.is_empty()),
        })
    }

    /// Lists the blocks from index `from` on. Calls `each` for every block until `each` returns false. Returns the
    /// volume's size in GiB.
    async fn pages(
        &self,
        worker: &Worker,
        snapshot: &KnownSnapshot,
        from: u32,
        mut each: impl FnMut(u32, Box<str>, Option<SystemTime>) -> bool,
    ) -> Result<u64> {
        let (mut next, mut token, mut empty_pages, mut relists) = (from, None, 0, 0);
        loop {
            let page = match self.page(worker, snapshot, next, token.clone()).await {
                Ok(page) => page,
                // A page token expires after an hour. Then the listing is resumed after the last listed block.
                Err(refused) if token.is_some() && is_page_token_error(&refused) && relists < MAX_RELISTS => {
                    (token, relists) = (None, relists + 1);
                    continue;
                }
                Err(refused) => return Err(refused.into()),
            };
            let is_new = |(index, _): &(u32, Box<str>)| *index >= next;
            empty_pages = if page.blocks.iter().any(is_new) { 0 } else { empty_pages + 1 };
            for (index, token) in page.blocks {
                // A resumed listing may begin with blocks that were already listed.
                if index < next {
                    continue;
                }
                (next, relists) = (index + 1, 0);
                if !each(index, token, page.expires) {
                    return Ok(page.size_gib);
                }
            }
            if page.next.is_none() {
                return Ok(page.size_gib);
            }
            token = page.next;
            if empty_pages > MAX_EMPTY_PAGES {
                bail!(Kind::Cloud.failure(format!(
                    "EBS listed {MAX_EMPTY_PAGES} pages of {} without a new block",
                    snapshot.id
                )));
            }
        }
    }

    /// Lists all blocks of a snapshot. An empty page does not end the list, because pages with blocks may follow.
    pub async fn contents(&self, worker: &Worker, snapshot: &KnownSnapshot) -> Result<SnapshotContents> {
        let mut windows = snapshot.tokens.0.lock().await;
        let (mut blocks, mut window) = (BlockIndexes::new(), Window::new(0));
        let size_gib = self
            .pages(worker, snapshot, 0, |index, token, expires| {
                blocks.insert(index);
                if index / WINDOW != window.number {
                    let full = std::mem::replace(&mut window, Window::new(index / WINDOW));
                    remember(&mut windows, full);
                }
                window.expires = expires;
                window.tokens.push((index, token));
                true
            })
            .await?;
        remember(&mut windows, window);
        Ok(SnapshotContents { size_gib, blocks })
    }

    /// Returns the token that is needed to read a block. `refused_token` is a token of this block that EBS no longer
    /// accepts.
    pub async fn token(
        &self,
        worker: &Worker,
        snapshot: &KnownSnapshot,
        index: u32,
        refused_token: Option<&str>,
    ) -> Result<Box<str>> {
        let number = index / WINDOW;
        // The lock is held during the listing. Concurrent reads usually need the same window of tokens. The first read
        // lists the window, and the others wait and then find it in the cache.
        let mut windows = snapshot.tokens.0.lock().await;
        let known = windows.iter().find(|window| window.number == number && window.is_valid());
        if let Some(token) =
            known.and_then(|window| window.token(index)).filter(|t| Some(*t) != refused_token)
        {
            return Ok(token.into());
        }
        let mut window = Window::new(number);
        self.pages(worker, snapshot, number * WINDOW, |index, token, expires| {
            let inside = index / WINDOW == number;
            if inside {
                window.expires = expires;
                window.tokens.push((index, token));
            }
            inside
        })
        .await?;
        let found = window.token(index).map(Into::into);
        remember(&mut windows, window);
        found.ok_or_else(|| Kind::Cloud.error(format!("{} has no block {index}", snapshot.id)))
    }
}

/// Returns whether the error says that the page's token has expired.
fn is_page_token_error(refused: &ApiError) -> bool {
    refused.is("ValidationException")
        && (refused.reason.as_deref() == Some("INVALID_PAGE_TOKEN")
            || refused.message.to_ascii_lowercase().contains("token"))
}
