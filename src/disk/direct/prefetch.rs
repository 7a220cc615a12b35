//! Chooses which blocks of a base snapshot are prefetched, and in which order. The threads that
//! [`BackingStore::start_threads`] starts fetch these blocks.

use super::backing::BackingStore;
use crate::formats::ext_metadata;
use crate::formats::partition::ReadAt;
use crate::ids::BLOCK;
use std::io;
use std::sync::Arc;

/// Queues blocks for prefetching. The first ones are the blocks in `used`. The last bake of a definition with the same
/// `name` used these blocks, in this order. The next ones are the blocks with the file system's metadata, which every
/// bake needs. A separate thread finds the metadata, because the search has to read blocks, which takes time.
pub fn start_prefetching(lower: &Arc<BackingStore>, used: Vec<u32>) {
    lower.queue_prefetch(used);
    let lower = lower.clone();
    // If the thread cannot be started, blocks are read when they are needed.
    _ = std::thread::Builder::new().name("metadata".to_owned()).spawn(move || {
        let blocks = ext_metadata::blocks(&BaseReader(&lower));
        lower.queue_prefetch(blocks);
    });
}

/// Reads the base as a sequence of bytes.
struct BaseReader<'a>(&'a BackingStore);

impl ReadAt for BaseReader<'_> {
    fn size(&self) -> u64 {
        self.0.blocks().max().map_or(0, |last| (u64::from(last) + 1) * BLOCK as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let (index, within) = ((at / BLOCK as u64) as u32, (at % BLOCK as u64) as usize);
            let length = (BLOCK - within).min(buffer.len() - done);
            let part = &mut buffer[done..done + length];
            if self.0.blocks().contains(index) {
                self.0.fetch(index).map_err(io::Error::other)?;
                self.0.cached().read(index, within, part)?;
            } else {
                part.fill(0);
            }
            done += length;
        }
        Ok(())
    }
}
