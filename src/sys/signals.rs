//! Handles Ctrl-C, SIGTERM and a closed terminal. The first signal requests a clean end, and the second one ends the
//! process immediately.

use crate::error::Kind;
use anyhow::{Context, Result};
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Whether a signal asked this process to end. Code that blocks the runtime's thread reads this flag. So do threads for
/// which the runtime's thread may be waiting, such as the one that watches a disk's server. In both cases, the runtime
/// cannot notify them.
static STOP_REQUESTED: AtomicBool = AtomicBool::new(false);

/// Returns whether a signal asked this process to end.
pub fn is_stop_requested() -> bool {
    STOP_REQUESTED.load(Ordering::Relaxed)
}

/// Fails if a signal asked this process to end. Errors: [`Kind::Interrupted`].
pub fn ensure_not_stopped() -> Result<()> {
    interrupt_if(is_stop_requested())
}

/// Fails if `is_stop_requested` is true. Errors: [`Kind::Interrupted`].
pub fn interrupt_if(is_stop_requested: bool) -> Result<()> {
    if is_stop_requested { Err(Kind::Interrupted.error("interrupted")) } else { Ok(()) }
}

/// A signal that asks the process to end. The text is the reason, such as `interrupted`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// The first signal: the process cleans up and ends.
    First(&'static str),
    /// The second signal: the process ends immediately.
    Second(&'static str),
}

/// The stack size of the second thread in bytes. The first thread of a process usually has a stack of this size.
const STACK: usize = 8 << 20;

/// Runs `work` in a second thread, while the first thread only waits for it. The kernel prefers the first thread when
/// it delivers a signal to a process, even if this thread is blocked by a slow disk. If `work` ran in the first thread,
/// such a signal would be handled late.
pub fn run_in_second_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::Builder::new().name("oven".to_owned()).stack_size(STACK);
    let thread = thread.spawn(work).expect("a process can have two threads");
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Listens for signals in a separate thread, so that they are handled while the runtime's thread is busy. At the first
/// signal, the value in the receiver becomes true. At the second signal, the process ends immediately. The kernel then
/// removes this process's mounts and loop devices.
pub fn listen(on_signal: impl Fn(Signal) + Send + 'static) -> Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let entered = runtime.enter();
    let listen = |kind| signal(kind).context("listening for signals");
    let (mut interrupt, mut terminate, mut hang_up) =
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
    drop(entered);
    let listening = async move {
        let mut next = async || {
            tokio::select! {
                _ = interrupt.recv() => "interrupted",
                _ = terminate.recv() => "received SIGTERM",
                _ = hang_up.recv() => "the terminal was closed",
            }
        };
        let why = next().await;
        // Work that ends because of the flag must find the value in the receiver.
        _ = sender.send(true);
        STOP_REQUESTED.store(true, Ordering::Relaxed);
        on_signal(Signal::First(why));
        let why = next().await;
        on_signal(Signal::Second(why));
        std::process::exit(Kind::Interrupted as i32);
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(move || runtime.block_on(listening)).context("starting a thread for signals")?;
    Ok(receiver)
}

/// Runs work that needs no clean-up, and drops it at the first signal. Errors: [`Kind::Interrupted`].
pub async fn run_until_stopped<T>(
    stop: &watch::Receiver<bool>,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let mut stop = stop.clone();
    tokio::select! {
        biased;
        // An error means that the listening thread has ended. No signal can arrive any more, so only `work` is awaited.
        Ok(_) = stop.wait_for(|stop| *stop) => Err(Kind::Interrupted.error("interrupted")),
        result = work => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requested_stop_is_an_interrupt() {
        interrupt_if(false).unwrap();
        assert_eq!(Kind::of(&interrupt_if(true).unwrap_err()), Kind::Interrupted);
    }

    #[tokio::test]
    async fn work_ends_by_itself_or_at_a_signal() {
        let (sender, stop) = watch::channel(false);
        assert_eq!(run_until_stopped(&stop, async { Ok(7) }).await.unwrap(), 7);
        let hanging = run_until_stopped(&stop, std::future::pending::<Result<()>>());
        let (ended, _) = tokio::join!(hanging, async { sender.send(true) });
        assert_eq!(Kind::of(&ended.unwrap_err()), Kind::Interrupted);
        drop(sender);
        let (_, nobody) = watch::channel(false);
        assert_eq!(run_until_stopped(&nobody, async { Ok(7) }).await.unwrap(), 7);
    }
}
