//! Runs work that blocks in the kernel on a thread of its own, as everything else shares one thread.

use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// Joins its thread when it is dropped, so that cancelled work has ended before things are cleaned up.
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

/// Runs `work` on a thread of its own, in the namespaces of this one. Dropping the future waits until the work is done:
/// a mount or a sync cannot be cancelled half-way.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    #[tokio::test]
    async fn the_result_is_returned_and_dropping_waits_for_the_work() {
        assert_eq!(blocking(|| 7).await, 7);
        let done = Arc::new(AtomicBool::new(false));
        let (go, wait) = mpsc::channel::<()>();
        let theirs = done.clone();
        let work = blocking(move || {
            _ = wait.recv_timeout(Duration::from_millis(50));
            theirs.store(true, Ordering::SeqCst);
        });
        assert!(tokio::time::timeout(Duration::from_millis(5), work).await.is_err());
        assert!(done.load(Ordering::SeqCst));
        drop(go);
    }
}
