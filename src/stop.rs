//! Ctrl-C, SIGTERM and a closed terminal: the first asks for a clean end, the second ends at once.

use crate::error::Kind;
use crate::report::events::FORMAT;
use crate::report::{Report, Style};
use anyhow::{Context, Result};
use serde_json::json;
use std::future::Future;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Whether this process was asked to end: for threads that cannot wait for the runtime, which may wait for them.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Whether this process was asked to end.
pub fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// As much as the first thread of a process has.
const STACK: usize = 8 << 20;

/// Does all the work in a thread beside the first one, which waits for it. A signal to a process goes to its first
/// thread, also while that one waits in the kernel for a disk and cannot take it: then nobody would hear of it.
pub fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::Builder::new().name("oven".to_owned()).stack_size(STACK);
    let thread = thread.spawn(work).expect("a process can have two threads");
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Turns true at the first signal. Local things die with the process, so that the second one may end it at once: also
/// while the runtime's thread is busy, for this one listens on a thread of its own.
pub fn signals(report: &Report) -> Result<watch::Receiver<bool>> {
    let (told, heard) = watch::channel(false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let inside = runtime.enter();
    let listen = |kind| signal(kind).context("listening for signals");
    let (mut interrupt, mut terminate, mut hang_up) =
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
    drop(inside);
    let (screen, style) = (report.screen().clone(), report.style());
    let listening = async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => "interrupted",
                _ = terminate.recv() => "asked to end",
                _ = hang_up.recv() => "the terminal was closed",
            }
        };
        let why = next().await;
        ASKED.store(true, Ordering::Relaxed);
        _ = told.send(true);
        screen.print(&format!("{why}: stopping, and cleaning up (once more to stop at once)"));
        let why = next().await;
        screen.print(&format!("{why}: stopped at once; `oven sweep` removes what is left"));
        let code = Kind::Interrupted as u8;
        if style == Style::Json {
            let error = json!({"kind": Kind::Interrupted.name(), "message": "stopped at once"});
            let result = json!({"event": "result", "format": FORMAT, "exit_code": code, "error": error});
            _ = writeln!(std::io::stdout().lock(), "{result}");
        }
        std::process::exit(code.into());
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(move || runtime.block_on(listening)).context("starting a thread for signals")?;
    Ok(heard)
}

/// Work that has nothing to clean up: it is let go of at the first signal.
pub async fn or<T>(stop: &watch::Receiver<bool>, work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut stop = stop.clone();
    tokio::select! {
        biased;
        // An error: nobody listens to signals any more, and there will be none.
        Ok(_) = stop.wait_for(|stop| *stop) => Err(Kind::Interrupted.error("interrupted")),
        result = work => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_ends_by_itself_or_at_a_signal() {
        let (told, heard) = watch::channel(false);
        assert_eq!(or(&heard, async { Ok(7) }).await.unwrap(), 7);
        let hanging = or(&heard, std::future::pending::<Result<()>>());
        let (ended, _) = tokio::join!(hanging, async { told.send(true) });
        assert_eq!(Kind::of(&ended.unwrap_err()), Kind::Interrupted);
        drop(told);
        let (_, nobody) = watch::channel(false);
        assert_eq!(or(&nobody, async { Ok(7) }).await.unwrap(), 7);
    }
}
