//! Debts to the cloud: written down before the call, paid when the story ends.
//!
//! A debt says "ensure absent, by run tag", so it can be owed before anything exists, and paying it is right whether
//! the call took effect or not. What is local (mounts, loop devices, children) dies with its value instead.

mod background;

use crate::ids::RunId;
pub use background::Meanwhile;

use crate::error::Kind;
use anyhow::{Error, Result};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How long paying may take after an interruption: a user who pressed Ctrl-C waits 10 s at most.
const PATIENCE_WHEN_STOPPED: Duration = Duration::from_secs(8);
/// How long it may take otherwise: EC2 detaches and deletes a volume within a few minutes, or not at all.
const PATIENCE: Duration = Duration::from_secs(300);

/// When a debt is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Always: volumes.
    Scratch,
    /// Unless the story succeeds: the snapshot.
    OnFailure,
}

type Cause = Box<dyn Fn() -> Option<Error>>;
/// What pays a debt.
pub type Payment = Pin<Box<dyn Future<Output = Result<()>>>>;

/// Something that must not be there in the end.
pub struct Debt {
    pub due: Due,
    /// What: `the volumes of run 1f2e…`.
    pub what: String,
    /// The command that removes it by hand.
    pub command: String,
    /// Ensures that it is absent. May be called when it never was there.
    pub pay: Box<dyn FnOnce() -> Payment>,
    /// Instead of paying after a failure, when the user wants to look: marks it as kept.
    pub keep: Option<Box<dyn FnOnce() -> Payment>>,
}

/// A debt that can be forgiven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DebtId(usize);

/// The debts of one story.
#[derive(Default)]
pub struct Undo {
    debts: RefCell<Vec<(DebtId, Debt)>>,
    next: Cell<usize>,
    causes: RefCell<Vec<Cause>>,
    stops: RefCell<Vec<Box<dyn Fn()>>>,
    early: background::Early,
}

/// Something that could not be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    pub what: String,
    pub command: String,
    /// Why it is still there.
    pub why: String,
}
impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "left behind: {} ({}); remove it by: {}", self.what, self.why, self.command)
    }
}

/// How a story ended, and what could not be cleaned up after it.
#[derive(Debug)]
pub struct Ended<T> {
    pub result: Result<T>,
    pub left: Vec<Left>,
    /// What was kept because the user asked for it.
    pub kept: Vec<String>,
}

impl Undo {
    pub fn owe(&self, debt: Debt) -> DebtId {
        let id = DebtId(self.next.replace(self.next.get() + 1));
        self.debts.borrow_mut().push((id, debt));
        id
    }

    /// The debt's object became a result.
    pub fn forgive(&self, id: DebtId) {
        self.debts.borrow_mut().retain(|(owed, _)| *owed != id);
    }

    /// Asked when the story fails: whether it failed for a reason that it did not see itself. (A file system tells of an
    /// I/O error, and not why the disk had one.)
    pub fn explain(&self, cause: impl Fn() -> Option<Error> + 'static) {
        self.causes.borrow_mut().push(Box::new(cause));
    }

    /// Called when the story is stopped, before it is dropped: what it waits for in the kernel has to end now.
    pub fn when_stopped(&self, end: impl Fn() + 'static) {
        self.stops.borrow_mut().push(Box::new(end));
    }

    fn explained(&self, error: Error) -> Error {
        match self.causes.borrow().iter().find_map(|cause| cause()) {
            Some(cause) => cause.context(format!("{error:#}")),
            None => error,
        }
    }

    /// Forgives every debt that is due only on failure: the image is registered.
    pub fn forgive_on_failure(&self) {
        self.debts.borrow_mut().retain(|(_, debt)| debt.due == Due::Scratch);
    }

    /// Makes what is due only on failure due in any case: the story will succeed with somebody else's image, and our
    /// own snapshot is of no use.
    pub fn due_now(&self) {
        self.debts.borrow_mut().iter_mut().for_each(|(_, debt)| debt.due = Due::Scratch);
    }
}

/// How a scope treats failure.
pub struct Policy {
    /// Scratch that can be kept is kept when the story fails (not when it is stopped).
    pub keep_on_failure: bool,
    /// Told of the failure before anything is cleaned up, so that the cause is seen first.
    pub on_failure: Box<dyn Fn(&Error)>,
    /// Told of each debt that is being paid.
    pub on_payment: Box<dyn Fn(&str)>,
}

/// Runs a story until it ends or `stop` does. Then the story is dropped (children killed, unmounted, loops closed) and
/// its debts are paid, newest first.
pub async fn scope<T>(
    policy: Policy,
    stop: impl Future<Output = ()>,
    story: impl AsyncFnOnce(Rc<Undo>) -> Result<T>,
) -> Ended<T> {
    let undo = Rc::new(Undo::default());
    undo.early.may_keep.set(policy.keep_on_failure);
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
            result = undo.beside(story) => result.map_err(|error| undo.explained(error)),
        }
    };
    // It may have failed because what it waited for, in the kernel, was ended by the stop.
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
    let mut ended = Ended { result, left: Vec::new(), kept: Vec::new() };
    let mut deadline = Instant::now() + if stopped { PATIENCE_WHEN_STOPPED } else { PATIENCE };
    loop {
        // Taken out first: no borrow is held while paying.
        let Some((id, debt)) = undo.debts.borrow_mut().pop() else { break };
        let failed = ended.result.is_err();
        if debt.due == Due::OnFailure && !failed {
            continue;
        }
        let keep = debt.keep.filter(|_| policy.keep_on_failure && failed && !stopped);
        let keeping = keep.is_some();
        if !keeping {
            (policy.on_payment)(&debt.what);
        }
        let mut payment = match (keep, undo.begun(id)) {
            (Some(keep), _) => keep(),
            (None, Some(begun)) if !stopped => {
                Box::pin(async { if begun.await.is_ok() { Ok(()) } else { (debt.pay)().await } })
            }
            (None, _) => (debt.pay)(),
        };
        // One that is stuck must not take the others' time.
        let share = |until: Instant| {
            let now = Instant::now();
            now + until.saturating_duration_since(now) / (undo.debts.borrow().len() as u32 + 1)
        };
        let paid = tokio::select! {
            biased;
            paid = timeout_at(share(deadline), &mut payment) => paid,
            () = &mut stop, if !stopped => {
                stopped = true;
                deadline = deadline.min(Instant::now() + PATIENCE_WHEN_STOPPED);
                timeout_at(share(deadline), payment).await
            }
        };
        let why = match paid {
            Ok(Ok(())) if keeping => {
                ended.kept.push(debt.what);
                continue;
            }
            Ok(Ok(())) => continue,
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "not released in time".to_owned(),
        };
        ended.left.push(Left { what: debt.what, command: debt.command, why });
    }
    ended
}

async fn is_ready(future: &mut (impl Future<Output = ()> + Unpin)) -> bool {
    std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *future).poll(cx).is_ready())).await
}

/// The command that removes what a run left.
pub fn sweep_command(run: &RunId) -> String {
    format!("oven sweep --run {run}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};

    fn policy() -> Policy {
        Policy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) }
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
    async fn success_pays_scratch_alone() {
        let (ended, paid) = run(pending(), async |undo, paid| {
            undo.owe(debt(Due::Scratch, "volume", &paid, || Ok(())));
            undo.owe(debt(Due::OnFailure, "snapshot", &paid, || Ok(())));
            Ok(1)
        })
        .await;
        assert_eq!((ended.result.unwrap(), paid), (1, vec!["volume".to_owned()]));
    }

    #[tokio::test]
    async fn what_is_due_now_is_paid_after_success_too() {
        let (ended, paid) = run(pending(), async |undo, paid| {
            undo.owe(debt(Due::Scratch, "volume", &paid, || Ok(())));
            undo.owe(debt(Due::OnFailure, "snapshot", &paid, || Ok(())));
            undo.due_now();
            undo.owe(debt(Due::OnFailure, "later", &paid, || Ok(())));
            Ok(1)
        })
        .await;
        assert!(ended.result.is_ok());
        assert_eq!(paid, ["snapshot", "volume"]);
    }

    #[tokio::test]
    async fn failure_pays_all_newest_first_and_the_forgiven_stays() {
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
    async fn what_cannot_be_paid_is_left_behind_and_the_rest_is_paid() {
        let (ended, paid) = run(pending(), async |undo, paid| {
            undo.owe(debt(Due::Scratch, "volume", &paid, || Ok(())));
            undo.owe(debt(Due::Scratch, "stuck", &paid, || anyhow::bail!("busy")));
            Ok(1)
        })
        .await;
        assert_eq!(paid, ["stuck", "volume"]);
        assert_eq!(ended.left.len(), 1);
        assert_eq!(ended.left[0].to_string(), "left behind: stuck (busy); remove it by: rm stuck");
    }

    /// Whether the disk is kept, where `stopped` is before the story ends, and `result` its end. Also what was told.
    async fn keeping(stopped: bool, result: fn() -> Result<u8>) -> (Ended<u8>, Vec<String>) {
        let told = Rc::new(RefCell::new(Vec::new()));
        let tell = |what: &str| told.borrow_mut().push(what.to_owned());
        let (failed, paying) = (told.clone(), told.clone());
        let policy = Policy {
            keep_on_failure: true,
            on_failure: Box::new(move |error| failed.borrow_mut().push(error.to_string())),
            on_payment: Box::new(move |what| paying.borrow_mut().push(format!("({what})"))),
        };
        let stop = async {
            if stopped { tokio::time::sleep(Duration::from_secs(1)).await } else { pending().await }
        };
        let kept = told.clone();
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
        tell(&format!("{:?}", ended.kept));
        let told = told.borrow().clone();
        (ended, told)
    }

    #[tokio::test]
    async fn what_the_story_did_not_see_is_told_as_its_cause() {
        let ended = scope(policy(), pending(), async |undo| {
            undo.explain(|| None);
            undo.explain(|| Some(Kind::Machine.error("the disk is full")));
            Err::<(), _>(Kind::Step.error("exit status 1").context("installing packages"))
        });
        let error = ended.await.result.unwrap_err();
        assert_eq!(format!("{error:#}"), "installing packages: exit status 1: the disk is full");
        assert_eq!(Kind::of(&error), Kind::Machine);
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_is_kept_after_a_failure_alone_and_the_cause_is_told_first() {
        let (ended, told) = keeping(false, || anyhow::bail!("no")).await;
        assert!(ended.result.is_err() && ended.left.is_empty());
        assert_eq!(told, ["no", "kept", "(snapshot)", "[\"volume\"]"]);
        let (_, told) = keeping(false, || Ok(1)).await;
        assert_eq!(told, ["(volume)", "[]"]);
        let (_, told) = keeping(true, || Ok(1)).await;
        assert_eq!(told, ["interrupted", "(volume)", "(snapshot)", "[]"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_stuck_leaves_time_for_the_others() {
        let (ended, paid) = run(pending(), async |undo, paid| {
            let slow = debt(Due::Scratch, "slow", &paid, || Ok(()));
            let pay = Box::new(|| -> Payment {
                Box::pin(async {
                    tokio::time::sleep(PATIENCE / 3).await;
                    Ok(())
                })
            });
            undo.owe(Debt { pay, ..slow });
            let stuck = debt(Due::Scratch, "stuck", &paid, || Ok(()));
            undo.owe(Debt { pay: Box::new(|| Box::pin(pending())), ..stuck });
            Ok(1)
        })
        .await;
        let left: Vec<_> = ended.left.iter().map(|left| left.what.as_str()).collect();
        assert_eq!((left, paid), (vec!["stuck"], Vec::<String>::new()));
    }

    #[tokio::test]
    async fn a_story_that_the_stop_let_fail_is_interrupted() {
        for asked in [false, true] {
            let flag = Rc::new(Cell::new(false));
            let seen = flag.clone();
            let stop =
                std::future::poll_fn(move |_| if seen.get() { Poll::Ready(()) } else { Poll::Pending });
            // It is asked while the story holds the thread.
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
        assert_eq!((ended.result.unwrap(), ended.left.len()), (1, 1));
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_stop_drops_the_story_before_it_pays() {
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
            let told = paid.clone();
            undo.when_stopped(move || told.borrow_mut().push("told".into()));
            let _mounted = Mounted(paid);
            _ = sender.send(());
            pending::<()>().await;
            Ok(1)
        })
        .await;
        assert_eq!(Kind::of(&ended.result.unwrap_err()), Kind::Interrupted);
        assert_eq!(paid, ["told", "unmounted", "volume"]);
    }
}
