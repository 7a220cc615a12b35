//! What goes on beside the story, where the cloud takes its time: debts that are paid because the story has no more use
//! for the thing, and work whose answer it takes later.

use super::{DebtId, Payment, Undo};
use anyhow::Result;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

/// What goes on.
#[derive(Default)]
pub struct Early {
    under_way: RefCell<Vec<(DebtId, Payment)>>,
    begun: RefCell<Vec<Weak<dyn Goes>>>,
    /// Whether scratch may be kept when the story fails: then it has to be there until it did not.
    pub may_keep: Cell<bool>,
}

/// Work that goes on beside the story, and its answer. Dropped before it has that, it is called off.
pub struct Meanwhile<T>(Rc<Work<T>>);

struct Work<T>(RefCell<Step<T>>);

enum Step<T> {
    /// And who waits for it.
    UnderWay(Pin<Box<dyn Future<Output = Result<T>>>>, Option<Waker>),
    Over(Option<T>),
}

trait Goes {
    /// Fails when the work does.
    fn go_on(&self, cx: &mut Context<'_>) -> Result<()>;
}

impl<T> Goes for Work<T> {
    fn go_on(&self, cx: &mut Context<'_>) -> Result<()> {
        let mut step = self.0.borrow_mut();
        let Step::UnderWay(work, waiting) = &mut *step else { return Ok(()) };
        let Poll::Ready(answer) = work.as_mut().poll(cx) else { return Ok(()) };
        if let Some(waiting) = waiting.take() {
            waiting.wake();
        }
        *step = Step::Over(None);
        *step = Step::Over(Some(answer?));
        Ok(())
    }
}

impl<T> Future for Meanwhile<T> {
    type Output = Result<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        self.0.go_on(cx)?;
        match &mut *self.0.0.borrow_mut() {
            Step::UnderWay(_, waiting) => {
                *waiting = Some(cx.waker().clone());
                Poll::Pending
            }
            Step::Over(answer) => Poll::Ready(Ok(answer.take().expect("its answer is taken once"))),
        }
    }
}

impl Undo {
    /// Begins work that goes on beside the story, whose answer the story takes later. If it fails, so does the story, at
    /// once: it could not go on without the answer.
    pub fn meanwhile<T: 'static>(&self, work: impl Future<Output = Result<T>> + 'static) -> Meanwhile<T> {
        let work = Rc::new(Work(RefCell::new(Step::UnderWay(Box::pin(work), None))));
        let goes: Weak<Work<T>> = Rc::downgrade(&work);
        self.early.begun.borrow_mut().push(goes);
        Meanwhile(work)
    }

    /// Pays a debt beside the story. It stays owed until that went well: what fails, or is stopped, is paid in the end
    /// as if it never had been tried. What the user may want to keep after a failure is paid in the end alone.
    pub fn pay_early(&self, id: DebtId, payment: Payment) {
        let owed = self.debts.borrow();
        let Some((_, debt)) = owed.iter().find(|(owed, _)| *owed == id) else { return };
        if !(self.early.may_keep.get() && debt.keep.is_some()) {
            self.early.under_way.borrow_mut().push((id, payment));
        }
    }

    /// The story; and beside it, as far as it gets, what was begun and what is paid early.
    pub(crate) async fn beside<T>(&self, mut story: Pin<&mut impl Future<Output = Result<T>>>) -> Result<T> {
        std::future::poll_fn(|cx| {
            let told = story.as_mut().poll(cx);
            if told.is_pending() {
                self.go_on(cx)?;
                self.pay_on(cx);
            }
            told
        })
        .await
    }

    fn go_on(&self, cx: &mut Context<'_>) -> Result<()> {
        let begun: Vec<_> = self.early.begun.borrow().iter().filter_map(Weak::upgrade).collect();
        begun.iter().try_for_each(|work| work.go_on(cx))?;
        self.early.begun.borrow_mut().retain(|work| work.strong_count() > 0);
        Ok(())
    }

    fn pay_on(&self, cx: &mut Context<'_>) {
        // Taken out first: no borrow is held while paying.
        for (id, mut payment) in self.early.under_way.take() {
            match payment.as_mut().poll(cx) {
                Poll::Ready(Ok(())) => self.forgive(id),
                // Owed still: the reason is told if it fails in the end, too.
                Poll::Ready(Err(_)) => {}
                Poll::Pending => self.early.under_way.borrow_mut().push((id, payment)),
            }
        }
    }

    /// How far the payment of a debt got: its rest.
    pub(crate) fn begun(&self, id: DebtId) -> Option<Payment> {
        let mut under_way = self.early.under_way.borrow_mut();
        let place = under_way.iter().position(|(begun, _)| *begun == id)?;
        Some(under_way.remove(place).1)
    }
}

#[cfg(test)]
mod tests {
    use crate::error::Kind;
    use crate::undo::{Debt, Due, Ended, Payment, Policy, Undo, scope};
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

    type Told = Rc<RefCell<Vec<String>>>;

    fn say(told: &Told, what: &str) {
        told.borrow_mut().push(what.to_owned());
    }

    const SECOND: Duration = Duration::from_secs(1);

    /// A story with a volume, whose early payment takes so long and ends so. Then it goes on for a while, and ends.
    async fn told(
        keep_on_failure: bool,
        stop: impl Future<Output = ()>,
        early: (Duration, fn() -> Result<()>),
        story: (Duration, fn() -> Result<u8>),
    ) -> (Ended<u8>, Vec<String>) {
        let told = Told::default();
        let policy = Policy { keep_on_failure, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) };
        let ended = scope(policy, stop, async |undo: Rc<Undo>| {
            let (paid, kept, tried) = (told.clone(), told.clone(), told.clone());
            let pay = move || -> Payment {
                say(&paid, "paid");
                Box::pin(ready(Ok(())))
            };
            let keep = move || -> Payment {
                say(&kept, "kept");
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
                    say(&tried, "begun");
                    sleep(early.0).await;
                    let result = early.1();
                    say(&tried, "over");
                    result
                }),
            );
            sleep(story.0).await;
            say(&told, "registered");
            story.1()
        });
        let ended = ended.await;
        let told = told.borrow().clone();
        (ended, told)
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_paid_beside_the_story_is_not_owed_any_more() {
        let (ended, told) = told(false, pending(), (SECOND, || Ok(())), (2 * SECOND, || Ok(1))).await;
        assert!(ended.result.is_ok() && ended.left.is_empty());
        assert_eq!(told, ["begun", "over", "registered"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_being_paid_when_the_story_ends_is_paid_to_its_end() {
        let (ended, told) = told(false, pending(), (2 * SECOND, || Ok(())), (SECOND, || Ok(1))).await;
        assert!(ended.result.is_ok() && ended.left.is_empty());
        assert_eq!(told, ["begun", "registered", "over"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_paid_early_is_paid_in_the_end_and_fails_no_story() {
        let fails: fn() -> Result<()> = || anyhow::bail!("busy");
        for (early, order) in
            [(1, ["begun", "over", "registered", "paid"]), (3, ["begun", "registered", "over", "paid"])]
        {
            let (ended, told) = told(false, pending(), (early * SECOND, fails), (2 * SECOND, || Ok(1))).await;
            assert!(ended.result.is_ok() && ended.left.is_empty());
            assert_eq!(told, order);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_story_that_fails_or_is_stopped_meanwhile_leaves_nothing() {
        let fails: fn() -> Result<u8> = || anyhow::bail!("no");
        let (ended, told_of) = told(false, pending(), (2 * SECOND, || Ok(())), (SECOND, fails)).await;
        assert!(ended.result.is_err() && ended.left.is_empty());
        assert_eq!(told_of, ["begun", "registered", "over"]);
        // Stopped, it does not wait for a call that may hang: the debt is paid anew.
        let hangs = (1000 * SECOND, (|| Ok(())) as fn() -> Result<()>);
        let (ended, told) = told(false, sleep(SECOND), hangs, (5 * SECOND, || Ok(1))).await;
        assert_eq!(Kind::of(&ended.result.unwrap_err()), Kind::Interrupted);
        assert!(ended.left.is_empty());
        assert_eq!(told, ["begun", "paid"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_payment_that_hangs_beside_a_finished_story_is_told() {
        let hangs = (10_000 * SECOND, (|| Ok(())) as fn() -> Result<()>);
        let (ended, told) = told(false, pending(), hangs, (SECOND, || Ok(1))).await;
        assert!(ended.result.is_ok());
        assert_eq!(ended.left.len(), 1);
        assert_eq!(told, ["begun", "registered"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_be_kept_is_not_paid_early() {
        let fails: fn() -> Result<u8> = || anyhow::bail!("no");
        let (ended, told_of) = told(true, pending(), (SECOND, || Ok(())), (2 * SECOND, fails)).await;
        assert_eq!(
            (ended.kept, told_of),
            (vec!["volume".to_owned()], vec!["registered".into(), "kept".into()])
        );
        let (ended, told) = told(true, pending(), (SECOND, || Ok(())), (2 * SECOND, || Ok(1))).await;
        assert!(ended.result.is_ok());
        assert_eq!(told, ["registered", "paid"]);
    }

    /// A story that begins work of so long, takes its answer after a while or never, and what the work did.
    async fn beside(work: Duration, takes: Option<Duration>) -> (Ended<u8>, Vec<&'static str>, Duration) {
        let did = Rc::new(RefCell::new(Vec::new()));
        let (of_work, begun) = (did.clone(), tokio::time::Instant::now());
        let policy =
            Policy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) };
        let ended = scope(policy, pending(), async |undo: Rc<Undo>| {
            let answer = undo.meanwhile(async move {
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
        let did = did.borrow().clone();
        (ended, did, begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn work_goes_on_beside_the_story_and_answers_it() {
        for (work, takes, both) in [(1, 3, 3), (3, 1, 3), (2, 2, 2), (0, 1, 1), (1, 0, 1)] {
            let (ended, did, took) = beside(work * SECOND, Some(takes * SECOND)).await;
            assert_eq!(ended.result.unwrap(), 7);
            assert_eq!((did, took.as_secs()), (vec!["begun", "over"], both), "{work} beside {takes}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn work_of_a_story_that_fails_is_called_off() {
        let (ended, did, took) = beside(3 * SECOND, None).await;
        assert!(ended.result.is_err());
        assert_eq!((did, took.as_secs()), (vec!["begun"], 1));
    }

    fn policy() -> Policy {
        Policy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) }
    }

    /// Polls a future only when its own waker was woken, as sets of futures do.
    struct Apart<F>(Pin<Box<F>>, Arc<Woken>);

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

    impl<F: Future> Future for Apart<F> {
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
    async fn whoever_waits_for_an_answer_is_woken() {
        let ended = scope(policy(), pending(), async |undo: Rc<Undo>| {
            let answer = undo.meanwhile(async {
                sleep(2 * SECOND).await;
                Ok(5)
            });
            let woken = Arc::new(Woken::default());
            woken.0.store(true, Ordering::SeqCst);
            tokio::time::timeout(10 * SECOND, Apart(Box::pin(answer), woken)).await?
        });
        assert_eq!(ended.await.result.unwrap(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn a_story_ends_when_its_work_fails() {
        for takes in [false, true] {
            let begun = tokio::time::Instant::now();
            let ended = scope(policy(), pending(), async |undo: Rc<Undo>| {
                let answer = undo.meanwhile(async {
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
