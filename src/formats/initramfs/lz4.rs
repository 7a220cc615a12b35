//! Unpacks LZ4 in the format that the kernel uses: the legacy frame with blocks of 8 MiB.

use std::io::{self, Read};

const BLOCK_MAX: usize = 8 << 20;
/// The maximum size of a packed block. An incompressible block grows by a 255th and a few bytes.
const PACKED_MAX: u32 = (BLOCK_MAX + BLOCK_MAX / 255 + 16) as u32;
const MAGIC: u32 = 0x184c_2102;

/// Unpacks a legacy frame. The output ends at the source's end, or at the first word that cannot be the length of a
/// block.
pub struct Lz4LegacyReader<R> {
    source: R,
    block: Vec<u8>,
    at: usize,
    ended: bool,
}

impl<R: Read> Lz4LegacyReader<R> {
    pub fn new(source: R) -> Self {
        Self { source, block: Vec::new(), at: 0, ended: false }
    }

    /// Reads the next block. Returns false if there is no further block.
    fn next_block(&mut self) -> io::Result<bool> {
        let mut length = [0; 4];
        loop {
            if self.ended || self.source.read(&mut length[..1])? == 0 {
                return Ok(false);
            }
            self.source.read_exact(&mut length[1..])?;
            let length = u32::from_le_bytes(length);
            match length {
                // A frame begins with its magic. Several frames may follow one another.
                MAGIC => continue,
                1..=PACKED_MAX => {
                    let mut packed = vec![0; length as usize];
                    self.source.read_exact(&mut packed)?;
                    // An empty block is not valid. Otherwise a file could consist of many blocks without any output.
                    let block = unpack(&packed).filter(|block| !block.is_empty());
                    self.block = block.ok_or(io::ErrorKind::InvalidData)?;
                    self.at = 0;
                    return Ok(true);
                }
                // This value cannot be a length. For example, it may be zeros before another archive.
                _ => self.ended = true,
            }
        }
    }
}

impl<R: Read> Read for Lz4LegacyReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let length = buffer.len().min(self.block.len() - self.at);
        buffer[..length].copy_from_slice(&self.block[self.at..self.at + length]);
        self.at += length;
        Ok(length)
    }
}

/// Unpacks a block, which consists of runs of literals, each followed by a copy of earlier output. Returns `None` if
/// the block is damaged.
fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut rest = packed;
    let take = |rest: &mut &[u8], length: usize| {
        let (taken, left) = rest.split_at_checked(length)?;
        *rest = left;
        Some(taken.to_vec())
    };
    let length = |rest: &mut &[u8], short: u8| {
        let mut length = usize::from(short);
        let mut more = if short == 15 { 255 } else { 0 };
        while more == 255 {
            let (next, left) = rest.split_first()?;
            *rest = left;
            more = *next;
            length += usize::from(more);
        }
        Some(length)
    };
    loop {
        let token = take(&mut rest, 1)?[0];
        let literals = length(&mut rest, token >> 4)?;
        out.extend(take(&mut rest, literals)?);
        if rest.is_empty() {
            return (out.len() <= BLOCK_MAX).then_some(out);
        }
        let offset = take(&mut rest, 2)?;
        let offset = usize::from(u16::from_le_bytes([offset[0], offset[1]]));
        let copied = length(&mut rest, token & 15)? + 4;
        let from = out.len().checked_sub(offset).filter(|_| offset > 0)?;
        if out.len() + copied > BLOCK_MAX {
            return None;
        }
        // The copy may overlap its own output, so its bytes are copied one by one.
        for at in from..from + copied {
            out.push(out[at]);
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Packs bytes without any copies.
    pub fn legacy(bytes: &[u8]) -> Vec<u8> {
        let mut out = MAGIC.to_le_bytes().to_vec();
        for block in bytes.chunks(BLOCK_MAX) {
            let mut packed = vec![0xf0];
            let mut more = block.len() - 15;
            while more >= 255 {
                packed.push(255);
                more -= 255;
            }
            packed.push(more as u8);
            packed.extend(block);
            out.extend((packed.len() as u32).to_le_bytes());
            out.extend(packed);
        }
        out
    }

    #[test]
    fn copies_and_their_overlaps() {
        // "abc", a copy of 9 bytes that begins 3 bytes back, and "X" without a copy.
        let block = [&[0x35][..], b"abc", &[3, 0], &[0x10], b"X"].concat();
        assert_eq!(unpack(&block).unwrap(), b"abcabcabcabcX");
        // A copy of 15 + 255 + 1 + 4 bytes that begins 1 byte back.
        let long = [&[0x1f][..], b"a", &[1, 0, 255, 1], &[0x00]].concat();
        assert_eq!(unpack(&long).unwrap(), vec![b'a'; 1 + 275]);
        for bad in [&[0x35, b'a'][..], &[0x10, b'a', 2, 0, 0], &[0x10, b'a', 0, 0, 0], &[], &[0xf0, 255]] {
            assert_eq!(unpack(bad), None, "{bad:?}");
        }
    }
}
