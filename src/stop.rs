//! Ctrl-C, SIGTERM and a closed terminal: the first asks for a clean end, the second ends at once.

use crate::error::Kind;
use crate::report::{Report, Style};
use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use serde_json::json;
use std::future::Future;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// What has to be done at the first signal without the runtime's thread: it may be waiting in the kernel for just that.
pub trait AtOnce: Send + Sync {
    fn stop(&self);
}

/// Those who want to know, for as long as they live; and whether it happened.
static AT_ONCE: Mutex<(Vec<Weak<dyn AtOnce>>, bool)> = Mutex::new((Vec::new(), false));

fn at_once() -> MutexGuard<'static, (Vec<Weak<dyn AtOnce>>, bool)> {
    AT_ONCE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells it of the first signal, from another thread; at once if that was before.
pub fn tell_at_once(who: &Arc<impl AtOnce + 'static>) {
    let who: Arc<dyn AtOnce> = who.clone();
    let mut all = at_once();
    if all.1 {
        drop(all);
        return who.stop();
    }
    all.0.retain(|one| one.strong_count() > 0);
    all.0.push(Arc::downgrade(&who));
}

fn stop_at_once() {
    let all = {
        let mut all = at_once();
        all.1 = true;
        std::mem::take(&mut all.0)
    };
    all.iter().filter_map(Weak::upgrade).for_each(|one| one.stop());
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
        _ = told.send(true);
        stop_at_once();
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
    };
    // One that is for the process is given to its first thread, if that takes it; and where that waits in the kernel, to
    // nobody else. All that is started from here on starts with what is let through again.
    let ours = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    ours.thread_block().context("blocking signals")?;
    let thread = std::thread::Builder::new().name("signals".to_owned());
    let listen = move || {
        ours.thread_unblock().expect("signals that were blocked can be unblocked");
        runtime.block_on(listening)
    };
    thread.spawn(listen).context("starting a thread for signals")?;
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
