//! What is read of a base before anybody asks for it.

use super::backing::Lower;
use crate::formats::ext_metadata;
use crate::formats::partition::ReadAt;
use crate::ids::BLOCK;
use std::io;
use std::sync::Arc;

/// What was used by a bake like this one comes first, in its order; then what every use of a file system needs. Beside
/// the caller: the second has to be read to be known.
pub fn begin(lower: &Arc<Lower>, used: Vec<u32>) {
    lower.ahead(used);
    let lower = lower.clone();
    // Without it, blocks are read when they are asked for.
    _ = std::thread::Builder::new().name("metadata".to_owned()).spawn(move || {
        let blocks = ext_metadata::blocks(&Read(&lower));
        lower.ahead(blocks);
    });
}

/// The base as bytes.
struct Read<'a>(&'a Lower);

impl ReadAt for Read<'_> {
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
