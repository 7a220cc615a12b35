//! The messages between a step's helper and oven. The helper sends JSON objects, each in one datagram. oven sends only
//! [`TERMINATE`].

use super::spec::StepExit;
use crate::error::{Failure, Kind, errno_of, hint_of};
use anyhow::{Context, Result};
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde::{Deserialize, Serialize};

/// The helper's descriptors after the three standard ones. `STATUS` is a pipe to oven, which the step's program gets if
/// its specification says so. `SPEC` is a file with the step's specification, and `CONTROL` is a socket to oven.
pub const STATUS: i32 = 3;
pub const SPEC: i32 = 4;
pub const CONTROL: i32 = 5;

/// The maximum size of a datagram in bytes. A datagram contains the text of an error, or the names of the processes
/// that were still running when the step's program ended.
const MAX: usize = 64 << 10;
/// The message with which oven asks the helper to send SIGTERM to the step's program.
pub const TERMINATE: &[u8] = b"terminate";

/// Messages from the helper.
#[derive(Debug, Serialize, Deserialize)]
pub enum HelperMessage {
    /// The step could not be started.
    Failed { kind: u8, message: String, hint: Option<String> },
    /// The step's program ended.
    Ended(StepExit),
}

impl HelperMessage {
    /// Makes the message for an error. An error without a kind comes from the image's files, unless this machine lacks
    /// a right or fails.
    pub fn failed(error: anyhow::Error) -> Self {
        let lacks_rights = matches!(errno_of(&error), Some(Errno::PERM | Errno::ACCESS));
        let kind = if lacks_rights { Kind::Machine } else { Kind::Step };
        let error = kind.unless_machine(error);
        Self::Failed { kind: Kind::of(&error) as u8, message: format!("{error:#}"), hint: hint_of(&error) }
    }

    /// Converts the fields of a [`HelperMessage::Failed`] into a failure. Every kind except `Machine` becomes `Step`.
    pub fn failure(kind: u8, message: &str, hint: Option<String>) -> Failure {
        let kind = if kind == Kind::Machine as u8 { Kind::Machine } else { Kind::Step };
        let failure = kind.failure(message);
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }

    pub fn send(&self, to: impl AsFd) -> Result<()> {
        let bytes = serde_json::to_vec(self).context("writing to oven")?;
        rustix::net::send(to, &bytes[..bytes.len().min(MAX)], SendFlags::NOSIGNAL)
            .context("writing to oven")?;
        Ok(())
    }

    /// Receives a message without waiting. Returns `None` if no message has arrived, or if the socket is closed.
    pub fn receive(from: impl AsFd) -> Result<Option<Self>> {
        let mut buffer = vec![0; MAX];
        let len = match rustix::net::recv(from, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNRESET) => return Ok(None),
            result => result.context("reading from the step's helper")?.0,
        };
        Ok(Some(serde_json::from_slice(&buffer[..len]).context("reading from the step's helper")?))
    }
}
