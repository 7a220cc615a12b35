//! Ctrl-C, SIGTERM and a closed terminal: the first asks for a clean end, the second ends at once.

use crate::error::Kind;
use anyhow::{Context, Result};
use std::io::Write;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Turns true at the first signal. Local things die with the process, so that the second one may end it at once: also
/// while the runtime's thread is busy, for this one listens on a thread of its own.
pub fn signals() -> Result<watch::Receiver<bool>> {
    let (told, heard) = watch::channel(false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let inside = runtime.enter();
    let listen = |kind| signal(kind).context("listening for signals");
    let (mut interrupt, mut terminate, mut hang_up) =
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
    drop(inside);
    let listening = async move {
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
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(move || runtime.block_on(listening)).context("starting a thread for signals")?;
    Ok(heard)
}
