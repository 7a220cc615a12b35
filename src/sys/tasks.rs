//! Runs blocking work on separate threads, because the async runtime has only one thread.

use crate::error::Kind;
use anyhow::Result;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// Waits for its thread when the value is dropped. So the thread has ended before the clean-up after a cancelled
/// operation begins.
struct JoinOnDrop(Option<JoinHandle<()>>);

impl JoinOnDrop {
    fn join(&mut self) -> std::thread::Result<()> {
        self.0.take().map_or(Ok(()), JoinHandle::join)
    }
}
impl Drop for JoinOnDrop {
    fn drop(&mut self) {
        _ = self.join();
    }
}

/// Runs `work` on a separate thread, in the namespaces of the calling thread. Dropping the future waits until the work
/// is done, because a mount or a sync cannot be cancelled half-way.
pub async fn run_to_end<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (send, receive) = oneshot::channel();
    let thread = std::thread::spawn(move || _ = send.send(work()));
    let mut thread = JoinOnDrop(Some(thread));
    match receive.await {
        Ok(done) => done,
        Err(_) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!("the thread sends before it ends, or panics"),
        },
    }
}

/// A flag that is set when nobody waits for the result of the work any more. The work must check the flag often, and
/// end when it is set.
#[derive(Debug, Clone, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// Cancels the work.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Fails if the work was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(Kind::Interrupted.error("stopped")) } else { Ok(()) }
    }
}

/// Runs long work on another thread. Dropping the future cancels the work.
pub async fn run<T: Send + 'static>(
    work: impl FnOnce(&CancelFlag) -> Result<T> + Send + 'static,
) -> Result<T> {
    struct OnDrop(CancelFlag);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.cancel();
        }
    }
    let cancelled = CancelFlag::default();
    let _guard = OnDrop(cancelled.clone());
    match tokio::task::spawn_blocking(move || work(&cancelled)).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[tokio::test]
    async fn the_result_is_returned_and_dropping_waits_for_the_work() {
        assert_eq!(run_to_end(|| 7).await, 7);
        let done = Arc::new(AtomicBool::new(false));
        let (go, wait) = mpsc::channel::<()>();
        let theirs = done.clone();
        let work = run_to_end(move || {
            _ = wait.recv_timeout(Duration::from_millis(50));
            theirs.store(true, Ordering::SeqCst);
        });
        assert!(tokio::time::timeout(Duration::from_millis(5), work).await.is_err());
        assert!(done.load(Ordering::SeqCst));
        drop(go);
    }

    #[tokio::test]
    async fn dropping_the_future_stops_the_work() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let work = run(move |cancelled| {
            while cancelled.check().is_ok() {
                std::thread::yield_now();
            }
            sender.send(()).unwrap();
            Ok(())
        });
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), work).await.is_err());
        receiver.recv_timeout(std::time::Duration::from_secs(10)).expect("the work was not cancelled");
    }
}
