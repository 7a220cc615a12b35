//! Reads a file that is not trusted. Holes are not read from the file, because a file can have 16 TiB of them.

use super::limits::ReadMeter;
use crate::sys::sparse_copy::data_after;
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Reads a file piece by piece. Each read ends with an error if a signal asked this process to end, or if all reads of
/// the image took too long. As a [`Read`], returns zeros for holes, but not for a hole at the end of the file.
pub struct DataReader {
    file: File,
    meter: Arc<ReadMeter>,
    at: u64,
    /// The data at or after `at`, or an empty range if it is not known.
    data: Range<u64>,
}

impl DataReader {
    pub fn new(file: File, meter: Arc<ReadMeter>) -> Self {
        Self { file, meter, at: 0, data: 0..0 }
    }

    /// Reads the next data, and skips the hole before them. Returns the offset in the file and the number of bytes.
    /// Returns `None` at the end of the data.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<Option<(u64, usize)>> {
        if !self.find_data()? {
            return Ok(None);
        }
        self.at = self.at.max(self.data.start);
        let offset = self.at;
        let read = self.read_here(buffer)?;
        Ok((read > 0).then_some((offset, read)))
    }

    /// Finds the data at or after the current position. Returns false if there are none.
    fn find_data(&mut self) -> Result<bool> {
        self.meter.check()?;
        if self.at >= self.data.end {
            let Some((from, to)) = data_after(self.file.as_fd(), self.at, u64::MAX)? else {
                return Ok(false);
            };
            self.data = from..to;
        }
        Ok(true)
    }

    fn read_here(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let length = usize::try_from(self.data.end - self.at).unwrap_or(usize::MAX).min(buffer.len());
        loop {
            match self.file.read_at(&mut buffer[..length], self.at) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => {
                    let read = read.context("reading data")?;
                    self.at += read as u64;
                    return Ok(read);
                }
            }
        }
    }

    fn read_with_holes(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if !self.find_data()? {
            return Ok(0);
        }
        let hole = self.data.start.saturating_sub(self.at);
        if hole == 0 {
            return self.read_here(buffer);
        }
        let length = usize::try_from(hole).unwrap_or(usize::MAX).min(buffer.len());
        buffer[..length].fill(0);
        self.at += length as u64;
        Ok(length)
    }
}

impl Read for DataReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_with_holes(buffer).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a file of 15 TiB with data at these offsets.
    fn sparse_file(data: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(15 << 40).unwrap();
        data.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        file
    }

    #[test]
    fn only_data_are_read() {
        let data: [(u64, &[u8]); 3] = [(5, b"one"), (1 << 30, b"two"), ((15 << 40) - 3, b"end")];
        let mut reader = DataReader::new(sparse_file(&data), Arc::default());
        let (mut buffer, mut found) = ([0; 1000], Vec::new());
        while let Some((at, read)) = reader.read_data(&mut buffer).unwrap() {
            found.push(at..at + read as u64);
            assert!(found.len() < 10_000, "it reads holes: {:?}", found.last());
        }
        for (at, bytes) in data {
            let end = at + bytes.len() as u64;
            assert!((at..end).all(|at| found.iter().any(|range| range.contains(&at))), "{at}");
        }
    }

    #[test]
    fn holes_are_zeros_and_a_hole_at_the_end_is_not_read() {
        let mut content = Vec::new();
        let file = sparse_file(&[(0, b"one"), (100_000, b"two")]);
        DataReader::new(file, Arc::default()).read_to_end(&mut content).unwrap();
        assert!(content.len() < 200_000, "{}", content.len());
        assert_eq!((&content[..3], &content[100_000..100_003]), (&b"one"[..], &b"two"[..]));
        assert!(content[3..100_000].iter().all(|byte| *byte == 0));
        let mut content = Vec::new();
        DataReader::new(sparse_file(&[]), Arc::default()).read_to_end(&mut content).unwrap();
        assert_eq!(content, b"");
    }

    #[test]
    fn a_stop_ends_a_read() {
        let meter = ReadMeter::new(Default::default(), || true);
        let mut reader = DataReader::new(sparse_file(&[(0, b"one")]), Arc::new(meter));
        assert!(reader.read_data(&mut [0; 3]).is_err());
    }
}
