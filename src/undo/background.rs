//! Runs slow calls to the cloud in the background of a story ([`super`] defines the terms). There are two kinds:
//! clean-up actions for resources that the story no longer needs, and work whose result the story uses later.

use super::{DebtId, Payment, Undo};
use anyhow::Result;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

/// The background work of one story.
#[derive(Default)]
pub struct BackgroundWork {
    under_way: RefCell<Vec<(DebtId, Payment)>>,
    work: RefCell<Vec<Weak<dyn PollWork>>>,
    /// Whether resources with a `keep` function are preserved if the story fails. If true, they must not be removed
    /// before the story ends.
    pub may_keep: Cell<bool>,
}

/// A handle to background work. Awaiting the handle returns the work's result. Dropping the handle cancels work that is
/// not complete.
pub struct Background<T>(Rc<Work<T>>);

struct Work<T>(RefCell<WorkState<T>>);

enum WorkState<T> {
    /// The work, and the waker of the task that waits for it.
    Running(Pin<Box<dyn Future<Output = Result<T>>>>, Option<Waker>),
    Done(Option<T>),
}

trait PollWork {
    /// Polls the work. Fails if the work fails.
    fn poll_work(&self, cx: &mut Context<'_>) -> Result<()>;
}

impl<T> PollWork for Work<T> {
    fn poll_work(&self, cx: &mut Context<'_>) -> Result<()> {
        let mut step = self.0.borrow_mut();
        let WorkState::Running(work, waiting) = &mut *step else { return Ok(()) };
        let Poll::Ready(answer) = work.as_mut().poll(cx) else { return Ok(()) };
        if let Some(waiting) = waiting.take() {
            waiting.wake();
        }
        *step = WorkState::Done(None);
        *step = WorkState::Done(Some(answer?));
        Ok(())
    }
}

impl<T> Future for Background<T> {
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        self.0.poll_work(cx)?;
        match &mut *self.0.0.borrow_mut() {
            WorkState::Running(_, waiting) => {
                *waiting = Some(cx.waker().clone());
                Poll::Pending
            }
            WorkState::Done(answer) => Poll::Ready(Ok(answer.take().expect("its answer is taken once"))),
        }
    }
}

impl Undo {
    /// Starts work in the background. The story awaits the returned handle when it needs the result. If the work fails,
    /// the story fails immediately, because it could not continue without the result.
    pub fn run_in_background<T: 'static>(
        &self,
        work: impl Future<Output = Result<T>> + 'static,
    ) -> Background<T> {
        let work = Rc::new(Work(RefCell::new(WorkState::Running(Box::pin(work), None))));
        let weak: Weak<Work<T>> = Rc::downgrade(&work);
        self.background.work.borrow_mut().push(weak);
        Background(work)
    }

    /// Starts a clean-up action in the background. The action remains registered until it succeeds. So if it fails or
    /// is interrupted, it is executed again when the story ends. The action is not started early if its resource may be
    /// preserved.
    pub fn pay_early(&self, id: DebtId, payment: Payment) {
        let debts = self.debts.borrow();
        let Some((_, debt)) = debts.iter().find(|(owed, _)| *owed == id) else { return };
        if !(self.background.may_keep.get() && debt.keep.is_some()) {
            self.background.under_way.borrow_mut().push((id, payment));
        }
    }

    /// Runs the story. Polls background work and early clean-up actions whenever the story waits.
    pub(crate) async fn run_with_background<T>(
        &self,
        mut story: Pin<&mut impl Future<Output = Result<T>>>,
    ) -> Result<T> {
        std::future::poll_fn(|cx| {
            let result = story.as_mut().poll(cx);
            if result.is_pending() {
                self.poll_background(cx)?;
                self.poll_payments(cx);
            }
            result
        })
        .await
    }

    fn poll_background(&self, cx: &mut Context<'_>) -> Result<()> {
        let work: Vec<_> = self.background.work.borrow().iter().filter_map(Weak::upgrade).collect();
        work.iter().try_for_each(|work| work.poll_work(cx))?;
        self.background.work.borrow_mut().retain(|work| work.strong_count() > 0);
        Ok(())
    }

    fn poll_payments(&self, cx: &mut Context<'_>) {
        // Removes the payments from the list first, so that the list is not borrowed while they are polled.
        for (id, mut payment) in self.background.under_way.take() {
            match payment.as_mut().poll(cx) {
                Poll::Ready(Ok(())) => self.forgive(id),
                // The debt remains registered. An error is reported only if the clean-up at the end also fails.
                Poll::Ready(Err(_)) => {}
                Poll::Pending => self.background.under_way.borrow_mut().push((id, payment)),
            }
        }
    }

    /// Returns the future of a clean-up action that was started early and is not complete.
    pub(crate) fn take_begun(&self, id: DebtId) -> Option<Payment> {
        let mut under_way = self.background.under_way.borrow_mut();
        let index = under_way.iter().position(|(begun, _)| *begun == id)?;
        Some(under_way.remove(index).1)
    }
}

#[cfg(test)]
mod tests {
    use crate::error::Kind;
    use crate::undo::{Debt, Due, Ended, Payment, Undo, UndoPolicy, scope};
    use anyhow::Result;
    use std::cell::RefCell;
    use std::future::{Future, pending, ready};
    use std::pin::Pin;
    use std::rc::Rc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    use std::task::{Context, Poll, Wake, Waker};
    use std::time::Duration;
    use tokio::time::sleep;

    type Events = Rc<RefCell<Vec<String>>>;

    fn record(events: &Events, what: &str) {
        events.borrow_mut().push(what.to_owned());
    }

    const SECOND: Duration = Duration::from_secs(1);

    /// Runs a story that removes its volume early. `early` is the duration and the result of this clean-up. Then the
    /// story continues for the time in `story`, and returns the result in `story`. Also returns the events.
    async fn run_story(
        keep_on_failure: bool,
        stop: impl Future<Output = ()>,
        early: (Duration, fn() -> Result<()>),
        story: (Duration, fn() -> Result<u8>),
    ) -> (Ended<u8>, Vec<String>) {
        let events = Events::default();
        let policy =
            UndoPolicy { keep_on_failure, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) };
        let ended = scope(policy, stop, async |undo: Rc<Undo>| {
            let (paid, kept, tried) = (events.clone(), events.clone(), events.clone());
            let pay = move || -> Payment {
                record(&paid, "paid");
                Box::pin(ready(Ok(())))
            };
            let keep = move || -> Payment {
                record(&kept, "kept");
                Box::pin(ready(Ok(())))
            };
            let volume = undo.owe(Debt {
                due: Due::Scratch,
                what: "volume".into(),
                command: "rm".into(),
                pay: Box::new(pay),
                keep: Some(Box::new(keep)),
            });
            undo.pay_early(
                volume,
                Box::pin(async move {
                    record(&tried, "begun");
                    sleep(early.0).await;
                    let result = early.1();
                    record(&tried, "over");
                    result
                }),
            );
            sleep(story.0).await;
            record(&events, "registered");
            story.1()
        });
        let ended = ended.await;
        let events = events.borrow().clone();
        (ended, events)
    }

    #[tokio::test(start_paused = true)]
    async fn a_debt_that_was_paid_early_is_not_paid_again() {
        let (ended, events) = run_story(false, pending(), (SECOND, || Ok(())), (2 * SECOND, || Ok(1))).await;
        assert!(ended.result.is_ok() && ended.leftovers.is_empty());
        assert_eq!(events, ["begun", "over", "registered"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_early_payment_is_finished_when_the_story_ends() {
        let (ended, events) = run_story(false, pending(), (2 * SECOND, || Ok(())), (SECOND, || Ok(1))).await;
        assert!(ended.result.is_ok() && ended.leftovers.is_empty());
        assert_eq!(events, ["begun", "registered", "over"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_early_payment_is_repeated_at_the_end_and_fails_no_story() {
        let fails: fn() -> Result<()> = || anyhow::bail!("busy");
        for (early, order) in
            [(1, ["begun", "over", "registered", "paid"]), (3, ["begun", "registered", "over", "paid"])]
        {
            let (ended, events) =
                run_story(false, pending(), (early * SECOND, fails), (2 * SECOND, || Ok(1))).await;
            assert!(ended.result.is_ok() && ended.leftovers.is_empty());
            assert_eq!(events, order);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_story_that_fails_or_is_interrupted_leaves_nothing() {
        let fails: fn() -> Result<u8> = || anyhow::bail!("no");
        let (ended, events) = run_story(false, pending(), (2 * SECOND, || Ok(())), (SECOND, fails)).await;
        assert!(ended.result.is_err() && ended.leftovers.is_empty());
        assert_eq!(events, ["begun", "registered", "over"]);
        // An interrupted story does not wait for a call that may hang. It starts the clean-up again.
        let hangs = (1000 * SECOND, (|| Ok(())) as fn() -> Result<()>);
        let (ended, events) = run_story(false, sleep(SECOND), hangs, (5 * SECOND, || Ok(1))).await;
        assert_eq!(Kind::of(&ended.result.unwrap_err()), Kind::Interrupted);
        assert!(ended.leftovers.is_empty());
        assert_eq!(events, ["begun", "paid"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_early_payment_that_hangs_is_reported_at_the_end() {
        let hangs = (10_000 * SECOND, (|| Ok(())) as fn() -> Result<()>);
        let (ended, events) = run_story(false, pending(), hangs, (SECOND, || Ok(1))).await;
        assert!(ended.result.is_ok());
        assert_eq!(ended.leftovers.len(), 1);
        assert_eq!(events, ["begun", "registered"]);
    }

    #[tokio::test(start_paused = true)]
    async fn debts_that_may_be_preserved_are_not_paid_early() {
        let fails: fn() -> Result<u8> = || anyhow::bail!("no");
        let (ended, events) = run_story(true, pending(), (SECOND, || Ok(())), (2 * SECOND, fails)).await;
        assert_eq!(
            (ended.preserved, events),
            (vec!["volume".to_owned()], vec!["registered".into(), "kept".into()])
        );
        let (ended, events) = run_story(true, pending(), (SECOND, || Ok(())), (2 * SECOND, || Ok(1))).await;
        assert!(ended.result.is_ok());
        assert_eq!(events, ["registered", "paid"]);
    }

    /// Runs a story that starts work of this duration. After `takes`, the story uses the work's result. If `takes` is
    /// `None`, the story fails. Also returns the events of the work, and the time that the story took.
    async fn run_with_work(
        work: Duration,
        takes: Option<Duration>,
    ) -> (Ended<u8>, Vec<&'static str>, Duration) {
        let events = Rc::new(RefCell::new(Vec::new()));
        let (of_work, begun) = (events.clone(), tokio::time::Instant::now());
        let policy =
            UndoPolicy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) };
        let ended = scope(policy, pending(), async |undo: Rc<Undo>| {
            let answer = undo.run_in_background(async move {
                of_work.borrow_mut().push("begun");
                sleep(work).await;
                of_work.borrow_mut().push("over");
                Ok(7)
            });
            sleep(takes.unwrap_or(SECOND)).await;
            match takes {
                Some(_) => answer.await,
                None => anyhow::bail!("no"),
            }
        });
        let ended = ended.await;
        let events = events.borrow().clone();
        (ended, events, begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn work_runs_in_the_background_and_returns_its_result() {
        for (work, takes, both) in [(1, 3, 3), (3, 1, 3), (2, 2, 2), (0, 1, 1), (1, 0, 1)] {
            let (ended, events, took) = run_with_work(work * SECOND, Some(takes * SECOND)).await;
            assert_eq!(ended.result.unwrap(), 7);
            assert_eq!((events, took.as_secs()), (vec!["begun", "over"], both), "work {work}, takes {takes}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_work_of_a_failed_story_is_cancelled() {
        let (ended, events, took) = run_with_work(3 * SECOND, None).await;
        assert!(ended.result.is_err());
        assert_eq!((events, took.as_secs()), (vec!["begun"], 1));
    }

    fn policy() -> UndoPolicy {
        UndoPolicy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) }
    }

    /// Polls a future only if its waker was woken. Types such as `FuturesUnordered` do the same.
    struct PolledWhenWoken<F>(Pin<Box<F>>, Arc<Woken>);

    #[derive(Default)]
    struct Woken(AtomicBool, Mutex<Option<Waker>>);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
            if let Some(outer) = self.1.lock().unwrap().take() {
                outer.wake();
            }
        }
    }

    impl<F: Future> Future for PolledWhenWoken<F> {
        type Output = F::Output;

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
            *self.1.1.lock().unwrap() = Some(cx.waker().clone());
            if !self.1.0.swap(false, Ordering::SeqCst) {
                return Poll::Pending;
            }
            let own = self.1.clone().into();
            self.0.as_mut().poll(&mut Context::from_waker(&own))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_waits_for_a_result_is_woken() {
        let ended = scope(policy(), pending(), async |undo: Rc<Undo>| {
            let answer = undo.run_in_background(async {
                sleep(2 * SECOND).await;
                Ok(5)
            });
            let woken = Arc::new(Woken::default());
            woken.0.store(true, Ordering::SeqCst);
            tokio::time::timeout(10 * SECOND, PolledWhenWoken(Box::pin(answer), woken)).await?
        });
        assert_eq!(ended.await.result.unwrap(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_story_fails_when_its_work_fails() {
        for takes in [false, true] {
            let begun = tokio::time::Instant::now();
            let ended = scope(policy(), pending(), async |undo: Rc<Undo>| {
                let answer = undo.run_in_background(async {
                    sleep(SECOND).await;
                    anyhow::bail!("refused")
                });
                if !takes {
                    sleep(100 * SECOND).await;
                }
                let () = answer.await?;
                Ok(1)
            });
            assert_eq!(ended.await.result.unwrap_err().to_string(), "refused");
            assert_eq!(begun.elapsed(), SECOND);
        }
    }
}
