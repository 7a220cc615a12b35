//! The tokens by which EBS direct lets blocks be read, cached in windows.

use std::time::{Duration, SystemTime};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// Tokens are listed and discarded in groups of this many blocks: 8 GiB of the disk, one page or two.
pub const WINDOW: u32 = 1 << 14;

/// This many groups are cached: at most 48 MiB, whatever the snapshot's size.
const WINDOWS: usize = 24;

/// A token that was listed this recently is valid, whatever this machine's clock says.
const FRESH: Duration = Duration::from_secs(60);

/// A cache of the tokens of a snapshot's blocks: the windows that were listed last.
#[derive(Default)]
pub struct BlockTokens(pub Mutex<Vec<Window>>);

pub struct Window {
    /// The first index is this times [`WINDOW`].
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

/// Adds a window; the oldest one goes if there are too many.
pub fn remember(windows: &mut Vec<Window>, window: Window) {
    windows.retain(|known| known.number != window.number);
    if windows.len() >= WINDOWS {
        windows.remove(0);
    }
    windows.push(window);
}
