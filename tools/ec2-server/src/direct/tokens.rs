//! Tokens of blocks and pages. A token contains what it is for and its time of expiry. Only this server can create it.

use crate::world::Time;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Returns a hash of the data for which a token is valid. It only detects mistakes, because a test's client does not
/// forge tokens.
fn seal(of: impl Hash) -> u64 {
    let mut hash = DefaultHasher::new();
    ("oven-ec2-server", of).hash(&mut hash);
    hash.finish()
}

fn token(a: u32, b: u32, until: Time, seal: u64) -> String {
    let mut bytes = [0; 24];
    bytes[..4].copy_from_slice(&a.to_be_bytes());
    bytes[4..8].copy_from_slice(&b.to_be_bytes());
    bytes[8..16].copy_from_slice(&until.to_be_bytes());
    bytes[16..].copy_from_slice(&seal.to_be_bytes());
    STANDARD.encode(bytes)
}

fn parts(token: &str) -> Option<(u32, u32, Time, u64)> {
    let bytes: [u8; 24] = STANDARD.decode(token).ok()?.try_into().ok()?;
    let four = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let eight = |at: usize| u64::from(four(at)) << 32 | u64::from(four(at + 4));
    Some((four(0), four(4), eight(8), eight(16)))
}

/// Returns the token of a block.
pub fn block(snapshot: &str, index: u32, until: Time) -> String {
    token(index, 0, until, seal((snapshot, index, until)))
}

/// Returns whether the text is an unexpired token of this block.
pub fn is_of_block(text: &str, snapshot: &str, index: u32, now: Time) -> bool {
    parts(text).is_some_and(|(_, _, until, is)| is == seal((snapshot, index, until)) && now < until)
}

/// Returns the token of a query's page. `start` is the page's first block.
pub fn page(query: &str, start: u32, number: u32, until: Time) -> String {
    token(start, number, until, seal((query, start, number, until)))
}

/// Returns the first block and the number of a page. Returns `None` if the text is not an unexpired token of this
/// query.
pub fn of_page(text: &str, query: &str, now: Time) -> Option<(u32, u32)> {
    let (start, number, until, is) = parts(text)?;
    (is == seal((query, start, number, until)) && now < until).then_some((start, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_of_one_thing_and_for_a_time() {
        let token = block("snap-1", 7, 100);
        assert!(is_of_block(&token, "snap-1", 7, 99));
        assert!(!is_of_block(&token, "snap-1", 7, 100));
        assert!(!is_of_block(&token, "snap-2", 7, 99) && !is_of_block(&token, "snap-1", 8, 99));
        assert!(!is_of_block("AAAA", "snap-1", 7, 99) && !is_of_block("", "snap-1", 7, 99));
        let token = page("list snap-1", 5, 2, 100);
        assert_eq!(of_page(&token, "list snap-1", 99), Some((5, 2)));
        assert_eq!(of_page(&token, "list snap-2", 99), None);
        assert_eq!(of_page(&token, "list snap-1", 100), None);
        assert!(token.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b)));
    }
}
