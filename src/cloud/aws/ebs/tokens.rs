//! EBS direct requires a token for each block that is read. This module caches the tokens of a snapshot. The cache
//! consists of windows, each with the tokens of a range of blocks.

use std::time::{Duration, SystemTime};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// The number of blocks in a window. Tokens are listed and discarded window by window. A window covers 8 GiB of the
/// disk, and listing it takes one or two pages.
pub const WINDOW: u32 = 1 << 14;

/// The maximum number of cached windows. They take at most 48 MiB, whatever the snapshot's size.
const WINDOWS: usize = 24;

/// A token that was listed within this time counts as valid, even if it has expired by this machine's clock, because
/// that clock may be wrong.
const FRESH: Duration = Duration::from_secs(60);

/// The cached tokens of a snapshot: the windows that were listed last.
#[derive(Default)]
pub struct BlockTokens(pub Mutex<Vec<Window>>);

pub struct Window {
    /// The position of the window: its first block has the index `number` × [`WINDOW`].
    pub number: u32,
    /// Sorted by index.
    pub tokens: Vec<(u32, Box<str>)>,
    pub listed: Instant,
    pub expires: Option<SystemTime>,
}

impl Window {
    pub fn new(number: u32) -> Self {
        Self { number, tokens: Vec::new(), listed: Instant::now(), expires: None }
    }

    pub fn is_valid(&self) -> bool {
        self.listed.elapsed() < FRESH || self.expires.is_none_or(|expires| SystemTime::now() < expires)
    }

    pub fn token(&self, index: u32) -> Option<&str> {
        let found = self.tokens.binary_search_by_key(&index, |(index, _)| *index).ok()?;
        Some(&self.tokens[found].1)
    }
}

/// Adds a window. If there are too many windows, removes the one that was listed first.
pub fn remember(windows: &mut Vec<Window>, window: Window) {
    windows.retain(|known| known.number != window.number);
    if windows.len() >= WINDOWS {
        windows.remove(0);
    }
    windows.push(window);
}
