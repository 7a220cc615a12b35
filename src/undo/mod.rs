//! Clean-up of cloud resources. These terms are used in the code:
//!
//! - A *story* is the function that [`scope`] runs, for example one bake.
//! - A *debt* is a clean-up action. It is *owed*, that is registered, before the call that creates the resource. It is
//!   *paid*, that is executed, when the story ends. To *forgive* a debt is to cancel it.
//!
//! Each story has a run id, and every resource that it creates in the cloud has this id as a tag. A clean-up action
//! finds its resources by this tag, and ensures that none exists. So the action can be registered before the resource
//! exists. It also succeeds if the resource was never created. Local resources (mounts, loop devices, child processes)
//! need no debts, because dropping their values releases them.

mod background;

use crate::ids::RunId;
pub use background::Background;

use crate::error::{Kind, hint_of};
use anyhow::{Error, Result};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// The time limit for the clean-up after an interrupt. A user who pressed Ctrl-C should wait at most 10 s.
const STOPPED_TIME_LIMIT: Duration = Duration::from_secs(8);
/// The time limit for the clean-up otherwise. EC2 detaches and deletes a volume within a few minutes, or never.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// When a clean-up action must be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Always, for example for volumes.
    Scratch,
    /// Only if the story fails, for example for the snapshot.
    OnFailure,
}

type Cause = Box<dyn Fn() -> Option<Error>>;
/// A future that executes a clean-up action.
pub type Payment = Pin<Box<dyn Future<Output = Result<()>>>>;

/// A clean-up action for a resource.
pub struct Debt {
    pub due: Due,
    /// The resource to remove, such as `the volumes of run 1f2e…`.
    pub what: String,
    /// The command that removes the resource by hand.
    pub command: String,
    /// Ensures that the resource does not exist. May also be called if the resource never existed.
    pub pay: Box<dyn FnOnce() -> Payment>,
    /// Marks the resource as preserved. Called instead of `pay` after a failure, if the user wants to inspect it.
    pub keep: Option<Box<dyn FnOnce() -> Payment>>,
}

/// Identifies a clean-up action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebtId(usize);

/// The registered clean-up actions of one story.
#[derive(Default)]
pub struct Undo {
    debts: RefCell<Vec<(DebtId, Debt)>>,
    next: Cell<usize>,
    causes: RefCell<Vec<Cause>>,
    stops: RefCell<Vec<Box<dyn Fn()>>>,
    background: background::BackgroundWork,
}

/// A resource that could not be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    pub what: String,
    pub command: String,
    /// The reason why it could not be removed.
    pub why: String,
}
impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "left behind: {} ({}); remove it with: {}", self.what, self.why, self.command)
    }
}

/// The result of a story, and the outcome of its clean-up.
#[derive(Debug)]
pub struct Ended<T> {
    pub result: Result<T>,
    pub leftovers: Vec<Leftover>,
    /// Resources that were preserved because the user requested it.
    pub preserved: Vec<String>,
}

impl Undo {
    pub fn owe(&self, debt: Debt) -> DebtId {
        let id = DebtId(self.next.replace(self.next.get() + 1));
        self.debts.borrow_mut().push((id, debt));
        id
    }

    /// Cancels a clean-up action. Call this when its resource has become a result of the story.
    pub fn forgive(&self, id: DebtId) {
        self.debts.borrow_mut().retain(|(owed, _)| *owed != id);
    }

    /// Registers a function that is called when the story fails. The function returns the real cause if it knows one.
    /// For example, a file system reports only an I/O error, but the process that serves the disk knows the reason.
    pub fn explain(&self, cause: impl Fn() -> Option<Error> + 'static) {
        self.causes.borrow_mut().push(Box::new(cause));
    }

    /// Registers a function that is called when the story is interrupted, before the story is dropped. If the story
    /// waits in a system call, the function must end that wait.
    pub fn on_stop(&self, end: impl Fn() + 'static) {
        self.stops.borrow_mut().push(Box::new(end));
    }

    fn explain_cause(&self, error: Error) -> Error {
        match self.causes.borrow().iter().find_map(|cause| cause()) {
            Some(cause) => {
                let failure = Kind::of(&cause)
                    .failure(format!("{cause:#}. Because of this, the bake failed: {error:#}"));
                match hint_of(&cause) {
                    Some(hint) => failure.hint(hint).into(),
                    None => failure.into(),
                }
            }
            None => error,
        }
    }

    /// Cancels all clean-up actions that are due only on failure. Call this when the image is registered.
    pub fn forgive_on_failure(&self) {
        self.debts.borrow_mut().retain(|(_, debt)| debt.due == Due::Scratch);
    }

    /// Makes all registered clean-up actions due even if the story succeeds. Call this if the story will return another
    /// builder's image, because then this run's snapshot is useless.
    pub fn make_all_due(&self) {
        self.debts.borrow_mut().iter_mut().for_each(|(_, debt)| debt.due = Due::Scratch);
    }
}

/// How [`scope`] handles failures and reports the clean-up.
pub struct UndoPolicy {
    /// Whether resources that have a `keep` function are preserved if the story fails. An interrupt does not count as a
    /// failure.
    pub keep_on_failure: bool,
    /// Called with the error before the clean-up, so that the error is printed first.
    pub on_failure: Box<dyn Fn(&Error)>,
    /// Called before each clean-up action.
    pub on_payment: Box<dyn Fn(&str)>,
}

/// Runs a story until it ends or `stop` completes. Then this function drops the story, which kills child processes,
/// unmounts file systems and closes loop devices. Last, it executes the clean-up actions, newest first.
pub async fn scope<T>(
    policy: UndoPolicy,
    stop: impl Future<Output = ()>,
    story: impl AsyncFnOnce(Rc<Undo>) -> Result<T>,
) -> Ended<T> {
    let undo = Rc::new(Undo::default());
    undo.background.may_keep.set(policy.keep_on_failure);
    let (mut stop, mut stopped) = (std::pin::pin!(stop), false);
    let result = {
        let story = std::pin::pin!(story(undo.clone()));
        tokio::select! {
            biased;
            () = &mut stop => {
                stopped = true;
                undo.stops.borrow().iter().for_each(|end| end());
                Err(Kind::Interrupted.error("interrupted"))
            }
            result = undo.run_with_background(story) => result.map_err(|error| undo.explain_cause(error)),
        }
    };
    // `stop` may have ended a wait in a system call, and so made the story fail. Such a failure counts as an interrupt.
    let result = match result {
        Err(error) if !stopped && is_ready(&mut stop).await => {
            stopped = true;
            Err(Kind::Interrupted.error(format!("interrupted: {error:#}")))
        }
        result => result,
    };
    if let Err(error) = &result {
        (policy.on_failure)(error);
    }
    let mut ended = Ended { result, leftovers: Vec::new(), preserved: Vec::new() };
    let mut deadline = Instant::now() + if stopped { STOPPED_TIME_LIMIT } else { TIME_LIMIT };
    loop {
        // Removes the debt from the list first, so that the list is not borrowed during the clean-up.
        let Some((id, debt)) = undo.debts.borrow_mut().pop() else { break };
        let failed = ended.result.is_err();
        if debt.due == Due::OnFailure && !failed {
            continue;
        }
        let keep = debt.keep.filter(|_| policy.keep_on_failure && failed && !stopped);
        let is_preserving = keep.is_some();
        if !is_preserving {
            (policy.on_payment)(&debt.what);
        }
        let mut payment = match (keep, undo.take_begun(id)) {
            (Some(keep), _) => keep(),
            (None, Some(begun)) if !stopped => {
                Box::pin(async { if begun.await.is_ok() { Ok(()) } else { (debt.pay)().await } })
            }
            (None, _) => (debt.pay)(),
        };
        // Each action has only its share of the remaining time. So an action that hangs does not use up the time of the
        // others.
        let share = |until: Instant| {
            let now = Instant::now();
            now + until.saturating_duration_since(now) / (undo.debts.borrow().len() as u32 + 1)
        };
        let paid = tokio::select! {
            biased;
            paid = timeout_at(share(deadline), &mut payment) => paid,
            () = &mut stop, if !stopped => {
                stopped = true;
                deadline = deadline.min(Instant::now() + STOPPED_TIME_LIMIT);
                timeout_at(share(deadline), payment).await
            }
        };
        let why = match paid {
            Ok(Ok(())) if is_preserving => {
                ended.preserved.push(debt.what);
                continue;
            }
            Ok(Ok(())) => continue,
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "not released in time".to_owned(),
        };
        ended.leftovers.push(Leftover { what: debt.what, command: debt.command, why });
    }
    ended
}

async fn is_ready(future: &mut (impl Future<Output = ()> + Unpin)) -> bool {
    std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *future).poll(cx).is_ready())).await
}

/// The command that removes the leftovers of a run.
pub fn sweep_command(run: &RunId) -> String {
    format!("oven sweep --run {run}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};

    fn policy() -> UndoPolicy {
        UndoPolicy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) }
    }

    fn debt(due: Due, name: &str, paid: &Rc<RefCell<Vec<String>>>, outcome: fn() -> Result<()>) -> Debt {
        let (paid, name) = (paid.clone(), name.to_owned());
        Debt {
            due,
            what: name.clone(),
            command: format!("rm {name}"),
            pay: Box::new(move || {
                paid.borrow_mut().push(name);
                Box::pin(ready(outcome()))
            }),
            keep: None,
        }
    }

    async fn run(
        stop: impl Future<Output = ()>,
        story: impl AsyncFnOnce(Rc<Undo>, Rc<RefCell<Vec<String>>>) -> Result<u8>,
    ) -> (Ended<u8>, Vec<String>) {
        let paid = Rc::new(RefCell::new(Vec::new()));
        let ended = scope(policy(), stop, async |undo| story(undo, paid.clone()).await).await;
        let paid = paid.borrow().clone();
        (ended, paid)
    }

    #[tokio::test]
    async fn success_pays_only_scratch() {
        let (ended, paid) = run(pending(), async |undo, paid| {
            undo.owe(debt(Due::Scratch, "volume", &paid, || Ok(())));
            undo.owe(debt(Due::OnFailure, "snapshot", &paid, || Ok(())));
            Ok(1)
        })
        .await;
        assert_eq!((ended.result.unwrap(), paid), (1, vec!["volume".to_owned()]));
    }

    #[tokio::test]
    async fn debts_that_are_due_now_are_paid_after_success_too() {
        let (ended, paid) = run(pending(), async |undo, paid| {
            undo.owe(debt(Due::Scratch, "volume", &paid, || Ok(())));
            undo.owe(debt(Due::OnFailure, "snapshot", &paid, || Ok(())));
            undo.make_all_due();
            undo.owe(debt(Due::OnFailure, "later", &paid, || Ok(())));
            Ok(1)
        })
        .await;
        assert!(ended.result.is_ok());
        assert_eq!(paid, ["snapshot", "volume"]);
    }

    #[tokio::test]
    async fn failure_pays_all_but_forgiven_debts_newest_first() {
        let (ended, paid) = run(pending(), async |undo, paid| {
            undo.owe(debt(Due::Scratch, "volume", &paid, || Ok(())));
            undo.owe(debt(Due::OnFailure, "snapshot", &paid, || Ok(())));
            let forgiven = undo.owe(debt(Due::OnFailure, "other", &paid, || Ok(())));
            undo.forgive(forgiven);
            anyhow::bail!("no")
        })
        .await;
        assert!(ended.result.is_err());
        assert_eq!(paid, ["snapshot", "volume"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_payment_is_reported_and_the_others_are_paid() {
        let (ended, paid) = run(pending(), async |undo, paid| {
            undo.owe(debt(Due::Scratch, "volume", &paid, || Ok(())));
            undo.owe(debt(Due::Scratch, "stuck", &paid, || anyhow::bail!("busy")));
            Ok(1)
        })
        .await;
        assert_eq!(paid, ["stuck", "volume"]);
        assert_eq!(ended.leftovers.len(), 1);
        assert_eq!(ended.leftovers[0].to_string(), "left behind: stuck (busy); remove it with: rm stuck");
    }

    /// Runs a story whose volume can be preserved. If `stopped`, the story is interrupted. Otherwise it returns
    /// `result`. Also returns the events.
    async fn run_with_keep(stopped: bool, result: fn() -> Result<u8>) -> (Ended<u8>, Vec<String>) {
        let events = Rc::new(RefCell::new(Vec::new()));
        let record = |what: &str| events.borrow_mut().push(what.to_owned());
        let (failed, paying) = (events.clone(), events.clone());
        let policy = UndoPolicy {
            keep_on_failure: true,
            on_failure: Box::new(move |error| failed.borrow_mut().push(error.to_string())),
            on_payment: Box::new(move |what| paying.borrow_mut().push(format!("({what})"))),
        };
        let stop = async {
            if stopped { tokio::time::sleep(Duration::from_secs(1)).await } else { pending().await }
        };
        let kept = events.clone();
        let ended = scope(policy, stop, async |undo| {
            let nobody = Rc::default();
            undo.owe(debt(Due::OnFailure, "snapshot", &nobody, || Ok(())));
            let keep = Box::new(move || -> Payment {
                kept.borrow_mut().push("kept".to_owned());
                Box::pin(ready(Ok(())))
            });
            undo.owe(Debt { keep: Some(keep), ..debt(Due::Scratch, "volume", &nobody, || Ok(())) });
            if stopped {
                pending::<()>().await;
            }
            result()
        })
        .await;
        record(&format!("{:?}", ended.preserved));
        let events = events.borrow().clone();
        (ended, events)
    }

    #[tokio::test]
    async fn the_real_cause_is_added_to_the_error() {
        let ended = scope(policy(), pending(), async |undo| {
            undo.explain(|| None);
            undo.explain(|| Some(Kind::Machine.error("the disk is full")));
            Err::<(), _>(Kind::Step.error("exit status 1").context("installing packages"))
        });
        let error = ended.await.result.unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "the disk is full. Because of this, the bake failed: installing packages: exit status 1"
        );
        assert_eq!(Kind::of(&error), Kind::Machine);
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_is_preserved_only_after_a_failure_and_the_cause_is_reported_first() {
        let (ended, events) = run_with_keep(false, || anyhow::bail!("no")).await;
        assert!(ended.result.is_err() && ended.leftovers.is_empty());
        assert_eq!(events, ["no", "kept", "(snapshot)", "[\"volume\"]"]);
        let (_, events) = run_with_keep(false, || Ok(1)).await;
        assert_eq!(events, ["(volume)", "[]"]);
        let (_, events) = run_with_keep(true, || Ok(1)).await;
        assert_eq!(events, ["interrupted", "(volume)", "(snapshot)", "[]"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stuck_payment_leaves_time_for_the_others() {
        let (ended, paid) = run(pending(), async |undo, paid| {
            let slow = debt(Due::Scratch, "slow", &paid, || Ok(()));
            let pay = Box::new(|| -> Payment {
                Box::pin(async {
                    tokio::time::sleep(TIME_LIMIT / 3).await;
                    Ok(())
                })
            });
            undo.owe(Debt { pay, ..slow });
            let stuck = debt(Due::Scratch, "stuck", &paid, || Ok(()));
            undo.owe(Debt { pay: Box::new(|| Box::pin(pending())), ..stuck });
            Ok(1)
        })
        .await;
        let left: Vec<_> = ended.leftovers.iter().map(|left| left.what.as_str()).collect();
        assert_eq!((left, paid), (vec!["stuck"], Vec::<String>::new()));
    }

    #[tokio::test]
    async fn a_story_that_failed_because_of_the_stop_is_interrupted() {
        for asked in [false, true] {
            let flag = Rc::new(Cell::new(false));
            let seen = flag.clone();
            let stop =
                std::future::poll_fn(move |_| if seen.get() { Poll::Ready(()) } else { Poll::Pending });
            // Requests the stop while the story runs.
            let ended = scope(policy(), stop, async |_| {
                flag.set(asked);
                Err::<(), _>(Kind::Step.error("I/O error"))
            });
            let error = ended.await.result.unwrap_err();
            assert_eq!(Kind::of(&error), if asked { Kind::Interrupted } else { Kind::Step });
            assert!(error.to_string().contains("I/O error"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_while_paying_shortens_the_wait() {
        let start = Instant::now();
        let stop = tokio::time::sleep(Duration::from_secs(1));
        let (ended, _) = run(stop, async |undo, paid| {
            undo.owe(debt(Due::Scratch, "volume", &paid, || Ok(())));
            let stuck = debt(Due::Scratch, "stuck", &paid, || Ok(()));
            undo.owe(Debt { pay: Box::new(|| Box::pin(pending())), ..stuck });
            Ok(1)
        })
        .await;
        assert_eq!((ended.result.unwrap(), ended.leftovers.len()), (1, 1));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_stop_drops_the_story_before_debts_are_paid() {
        struct Mounted(Rc<RefCell<Vec<String>>>);
        impl Drop for Mounted {
            fn drop(&mut self) {
                self.0.borrow_mut().push("unmounted".into());
            }
        }
        let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
        let stop = async { _ = receiver.await };
        let (ended, paid) = run(stop, async |undo, paid| {
            undo.owe(debt(Due::Scratch, "volume", &paid, || Ok(())));
            let events = paid.clone();
            undo.on_stop(move || events.borrow_mut().push("stopped".into()));
            let _mounted = Mounted(paid);
            _ = sender.send(());
            pending::<()>().await;
            Ok(1)
        })
        .await;
        assert_eq!(Kind::of(&ended.result.unwrap_err()), Kind::Interrupted);
        assert_eq!(paid, ["stopped", "unmounted", "volume"]);
    }
}
