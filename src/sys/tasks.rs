//! Runs blocking work on separate threads, because the async runtime has only one thread.

use crate::error::Kind;
use anyhow::Result;
use std::cell::RefCell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
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

/// The interval of progress reports.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

tokio::task_local! {
    static LISTENER: Rc<Listener>;
}

/// How far the work of a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskProgress {
    /// `all` is the total number of bytes, if it is known.
    Bytes {
        done: u64,
        all: Option<u64>,
    },
    Percent(u64),
}

/// Gets the progress of the work.
struct Listener {
    on_progress: Box<dyn Fn(TaskProgress)>,
    /// The work that counts its bytes. Some of it may be done concurrently.
    counted: RefCell<Vec<CancelFlag>>,
}

impl Listener {
    fn report(&self) {
        let counted = self.counted.borrow();
        let sum = |of: &dyn Fn(&Shared) -> u64| counted.iter().map(|flag| of(&flag.0)).sum::<u64>();
        let all = sum(&|shared| shared.all.load(Ordering::Relaxed));
        let done = sum(&|shared| shared.done.load(Ordering::Relaxed));
        if all > 0 {
            (self.on_progress)(TaskProgress::Bytes { done: done.min(all), all: Some(all) });
        } else if done > 0 {
            (self.on_progress)(TaskProgress::Bytes { done, all: None });
        }
    }

    /// Forgets work that counted nothing, such as the many writes of single blocks.
    fn end(&self) {
        let counts = |flag: &CancelFlag| {
            [&flag.0.all, &flag.0.done].iter().any(|number| number.load(Ordering::Relaxed) > 0)
        };
        self.counted.borrow_mut().retain(counts);
    }
}

/// Runs `future`. While it waits for work that counts its bytes ([`run`], [`follow`]), `on_progress` regularly gets the
/// number of bytes that are done, and of all bytes if it is known. It also gets the percentages of [`report_percent`].
pub async fn listen<T>(on_progress: impl Fn(TaskProgress) + 'static, future: impl Future<Output = T>) -> T {
    let listener = Listener { on_progress: Box::new(on_progress), counted: RefCell::default() };
    LISTENER.scope(Rc::new(listener), future).await
}

/// Reports how far the work of the current task is, if somebody listens ([`listen`]).
pub fn report_percent(percent: u64) {
    _ = LISTENER.try_with(|listener| (listener.on_progress)(TaskProgress::Percent(percent.min(100))));
}

thread_local! {
    static COUNTER: RefCell<CancelFlag> = RefCell::default();
}

/// Runs `work`. On this thread, [`counter`] returns `counter` until the work ends.
pub fn with_counter<T>(counter: CancelFlag, work: impl FnOnce() -> T) -> T {
    struct Restore(CancelFlag);
    impl Drop for Restore {
        fn drop(&mut self) {
            COUNTER.set(std::mem::take(&mut self.0));
        }
    }
    let _restore = Restore(COUNTER.replace(counter));
    work()
}

/// Returns what counts the bytes of this thread's work. Nobody sees the count outside of [`with_counter`].
pub fn counter() -> CancelFlag {
    COUNTER.with_borrow(CancelFlag::clone)
}

/// Waits for `work`. The bytes that `counter` counts meanwhile are the progress of the current task.
pub async fn follow<T>(counter: CancelFlag, work: impl Future<Output = T>) -> T {
    let Ok(listener) = LISTENER.try_with(Rc::clone) else { return work.await };
    listener.counted.borrow_mut().push(counter);
    let (mut work, mut ticks) = (pin!(work), tokio::time::interval(PROGRESS_INTERVAL));
    let ended = loop {
        tokio::select! {
            biased;
            ended = &mut work => break ended,
            _ = ticks.tick() => listener.report(),
        }
    };
    listener.end();
    ended
}

/// A flag that is set when nobody waits for the result of the work any more. The work must check the flag often, and
/// end when it is set. The work may also count its bytes, see [`listen`].
#[derive(Debug, Clone, Default)]
pub struct CancelFlag(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    done: AtomicU64,
    all: AtomicU64,
}

impl CancelFlag {
    /// Cancels the work.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
    }

    /// Fails if the work was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.0.cancelled.load(Ordering::Relaxed) {
            Err(Kind::Interrupted.error("stopped"))
        } else {
            Ok(())
        }
    }

    /// Begins to count the bytes of the work, whose number is known.
    pub fn expect_bytes(&self, all: u64) {
        self.0.done.store(0, Ordering::Relaxed);
        self.0.all.store(all, Ordering::Relaxed);
    }

    /// Like [`Self::expect_bytes`], but in addition to earlier bytes.
    pub fn expect_more_bytes(&self, more: u64) {
        self.0.all.fetch_add(more, Ordering::Relaxed);
    }

    /// Counts bytes that are done.
    pub fn add_bytes(&self, done: u64) {
        self.0.done.fetch_add(done, Ordering::Relaxed);
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
    let counted = cancelled.clone();
    match follow(counted, tokio::task::spawn_blocking(move || work(&cancelled))).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

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
    async fn a_listener_gets_the_bytes_of_the_work() {
        let heard = Rc::new(std::cell::RefCell::new(Vec::new()));
        let (told, (go, wait)) = (heard.clone(), mpsc::channel());
        let seven = TaskProgress::Bytes { done: 7, all: Some(10) };
        let listener = move |progress| {
            told.borrow_mut().push(progress);
            _ = go.send(progress);
        };
        let work = run(move |counter| {
            counter.expect_bytes(10);
            counter.add_bytes(7);
            // The first report may come before the bytes are counted.
            while wait.recv_timeout(Duration::from_secs(10))? != seven {}
            Ok(())
        });
        listen(listener, work).await.expect("the listener got nothing");
        let zero = TaskProgress::Bytes { done: 0, all: Some(10) };
        assert!(heard.borrow().iter().all(|progress| [zero, seven].contains(progress)), "{heard:?}");
        let without_listener = run(|counter| {
            counter.add_bytes(1);
            Ok(())
        });
        without_listener.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_listener_gets_percentages_and_the_count_of_another_thread() {
        let heard = Rc::new(RefCell::new(Vec::new()));
        let (told, counted) = (heard.clone(), CancelFlag::default());
        let counter_of_thread = counted.clone();
        let thread = std::thread::spawn(move || {
            with_counter(counter_of_thread, || {
                counter().expect_more_bytes(4);
                counter().expect_more_bytes(6);
                counter().add_bytes(3);
            });
            counter().add_bytes(1); // nobody sees this
        });
        thread.join().unwrap();
        report_percent(1); // nobody listens
        let work = async {
            report_percent(40);
            follow(counted, tokio::time::sleep(Duration::from_secs(1))).await;
        };
        listen(move |progress| told.borrow_mut().push(progress), work).await;
        let heard = heard.borrow();
        assert_eq!(heard[0], TaskProgress::Percent(40));
        assert_eq!(heard[1], TaskProgress::Bytes { done: 3, all: Some(10) });
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
