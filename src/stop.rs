//! Ctrl-C, SIGTERM and a closed terminal: the first asks for a clean end, the second ends at once.

use crate::error::Kind;
use crate::report::{Report, Style};
use anyhow::{Context, Result};
use serde_json::json;
use std::io::Write;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Turns true at the first signal. Local things die with the process, so that the second one may end it at once.
pub fn signals(report: &Report) -> Result<watch::Receiver<bool>> {
    let (told, heard) = watch::channel(false);
    let listen = |kind| signal(kind).context("listening for signals");
    let (mut interrupt, mut terminate, mut hang_up) =
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
    let (screen, style) = (report.screen().clone(), report.style());
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => "interrupted",
                _ = terminate.recv() => "asked to end",
                _ = hang_up.recv() => "the terminal was closed",
            }
        };
        let why = next().await;
        _ = told.send(true);
        screen.print(&format!("{why}: stopping, and cleaning up (once more to stop at once)"));
        let why = next().await;
        screen.print(&format!("{why}: stopped at once; `oven sweep` removes what is left"));
        let code = Kind::Interrupted as u8;
        if style == Style::Json {
            let error = json!({"kind": Kind::Interrupted.name(), "message": "stopped at once"});
            let result = json!({"event": "result", "exit_code": code, "error": error});
            _ = writeln!(std::io::stdout().lock(), "{result}");
        }
        std::process::exit(code.into());
    });
    Ok(heard)
}
