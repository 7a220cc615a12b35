//! Ctrl-C, SIGTERM and a closed terminal: the first asks for a clean end, the second ends at once.

use crate::error::Kind;
use anyhow::{Context, Result};
use std::io::Write;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Turns true at the first signal. Local things die with the process, so that the second one may end it at once.
pub fn signals() -> Result<watch::Receiver<bool>> {
    let (told, heard) = watch::channel(false);
    let listen = |kind| signal(kind).context("listening for signals");
    let (mut interrupt, mut terminate, mut hang_up) =
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hang_up.recv() => {}
            }
        };
        next().await;
        _ = told.send(true);
        _ = writeln!(std::io::stderr().lock(), "stopping, and cleaning up; once more to stop at once");
        next().await;
        let hint = "stopped at once: `oven sweep` removes what is left";
        _ = writeln!(std::io::stderr().lock(), "{hint}");
        std::process::exit(i32::from(Kind::Interrupted as u8));
    });
    Ok(heard)
}
