//! Work that blocks in the kernel, off the one thread that everything else runs on.

use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// Waits for its thread, so that nothing of cancelled work goes on while things are cleaned up.
struct Joined(Option<JoinHandle<()>>);

impl Joined {
    fn join(&mut self) -> std::thread::Result<()> {
        self.0.take().map_or(Ok(()), JoinHandle::join)
    }
}
impl Drop for Joined {
    fn drop(&mut self) {
        _ = self.join();
    }
}

/// Runs `work` on a thread of its own, in the namespaces of this one. Dropping the future waits until it is done: a
/// mount or a sync cannot be called off half-way.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (send, receive) = oneshot::channel();
    let thread = std::thread::spawn(move || _ = send.send(work()));
    let mut thread = Joined(Some(thread));
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
    async fn answers_and_is_waited_for_when_dropped() {
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
