//! The messages between the helper and oven: a JSON object in each datagram.

use super::spec::ExitStatus;
use crate::error::{Failure, Kind, hint_of};
use anyhow::{Context, Result};
use rustix::fd::AsFd;
use rustix::net::{RecvFlags, SendFlags};
use serde::{Deserialize, Serialize};

/// The largest datagram: it has an error's text, or the names of processes that a step left.
const MAX: usize = 64 << 10;
/// From oven: end the step's program.
pub const TERMINATE: &[u8] = b"terminate";

/// From the helper.
#[derive(Debug, Serialize, Deserialize)]
pub enum HelperMessage {
    /// The step could not be started.
    Failed { kind: u8, message: String, hint: Option<String> },
    /// The step's program ended before these other processes.
    Ended { status: ExitStatus, left: Vec<String> },
}

impl HelperMessage {
    pub fn failed(error: &anyhow::Error) -> Self {
        Self::Failed { kind: Kind::of(error) as u8, message: format!("{error:#}"), hint: hint_of(error) }
    }

    /// The failure of a [`HelperMessage::Failed`]. A kind that the helper does not use becomes `Step`.
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

    /// `None`: there is no message, now or for ever.
    pub fn receive(from: impl AsFd) -> Result<Option<Self>> {
        let mut buffer = vec![0; MAX];
        let len = match rustix::net::recv(from, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((0, _)) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNRESET) => return Ok(None),
            result => result.context("reading from the step's helper")?.0,
        };
        Ok(Some(serde_json::from_slice(&buffer[..len]).context("reading from the step's helper")?))
    }
}
