//! Standard output: the results of verbs, or the stream of JSON events.

use crate::error::Kind;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;
use rustix::stdio;
use std::os::fd::AsFd;
use std::sync::OnceLock;

/// The first failure to write. Results of a verb are lost from there on.
static FAILURE: OnceLock<Errno> = OnceLock::new();

/// Writes a line. Nothing happens if the reader closed the pipe, because it does not want the rest. Any other failure is
/// stored for [`failure`], because most callers have more to do before they end.
pub fn write_line(line: &str) {
    // The lock keeps lines of several threads apart.
    let _lock = std::io::stdout().lock();
    store(write_all(stdio::stdout(), format!("{line}\n").as_bytes()));
}

/// Stores the failure of text that other code wrote to standard output.
pub fn check(written: std::io::Result<()>) {
    // The standard library does not report that a descriptor was opened only for reading.
    let is_writable =
        fcntl_getfl(stdio::stdout()).map(|flags| flags & OFlags::RWMODE != OFlags::RDONLY).unwrap_or(true);
    store(match written {
        Ok(()) if is_writable => Ok(()),
        Ok(()) => Err(Errno::BADF),
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    });
}

fn store(written: Result<(), Errno>) {
    if let Err(errno) = written
        && errno != Errno::PIPE
    {
        // Only the first failure is reported, because the others follow from it.
        _ = FAILURE.set(errno);
    }
}

/// The error if standard output could not be written.
pub fn failure() -> Option<anyhow::Error> {
    let errno = FAILURE.get()?;
    Some(
        Kind::Machine
            .failure(format!("standard output cannot be written: {errno}"))
            .hint("The result is not printed. Run the command again, and write its output to another place.")
            .into(),
    )
}

fn write_all(out: impl AsFd, mut rest: &[u8]) -> Result<(), Errno> {
    while !rest.is_empty() {
        match rustix::io::write(&out, rest) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => rest = &rest[count..],
            Err(Errno::INTR) => {}
            // Another process may have made the pipe or the terminal non-blocking.
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(&out, PollFlags::OUT)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            },
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn failures_have_their_number() {
        assert_eq!(write_all(File::create("/dev/full").unwrap(), b"x"), Err(Errno::NOSPC));
        assert_eq!(write_all(File::open("/dev/null").unwrap(), b"x"), Err(Errno::BADF));
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(write_all(writer, b"x"), Err(Errno::PIPE));
    }

    #[test]
    fn a_slow_reader_gets_everything() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        // More than a pipe holds.
        let text = "0123456789abcde\n".repeat(100_000);
        let expected = text.len();
        let writing = std::thread::spawn(move || write_all(writer, text.as_bytes()));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!((writing.join().unwrap(), read.len()), (Ok(()), expected));
    }
}
