//! The ring's lock. All tests of a ring are threads of one process, and they run at the same time. A test that only
//! works in directories, on devices and with processes of its own disturbs nobody. One that looks at more, or that
//! changes more (all processes, mounts or loop devices of this machine, what a machine does in a time, this process's
//! environment) has to be alone: it takes the lock with [`exclusive`] in its first line.
//!
//! All others hold it with [`shared`]. The worlds of this crate take it when they are made, so that no test forgets it.
//! Besides them, a test takes it itself if it starts threads that make worlds, or makes devices or mounts without one.
//!
//! - A thread that holds the lock gets it again at once: a test may make several worlds.
//! - Threads that a test starts belong to it: they have no name (the test harness names the tests' own threads), and do
//!   not wait for anybody while some test holds the lock.
//! - A test that waits to be alone goes before those that come after it, so that it does not wait for ever.
//! - A test that panics gives the lock back as its worlds are dropped.
//!
//! Processes that a test starts do not take part: also not its own program, run again.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

#[derive(Default)]
struct State {
    /// Who holds it together with others, and how often.
    shared: Option<HashMap<ThreadId, usize>>,
    /// Who holds it alone, and how often.
    alone: Option<(ThreadId, usize)>,
    /// How many wait to be alone.
    waiting: usize,
}

static STATE: Mutex<State> = Mutex::new(State { shared: None, alone: None, waiting: 0 });
static CHANGED: Condvar = Condvar::new();

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn holders(&mut self) -> &mut HashMap<ThreadId, usize> {
        self.shared.get_or_insert_default()
    }

    /// Whether this thread, or the test that it belongs to, has the lock.
    fn is_held(&mut self, by: ThreadId, is_test: bool) -> bool {
        let held = self.holders().contains_key(&by) || self.alone.is_some_and(|(holder, _)| holder == by);
        held || !is_test && (self.alone.is_some() || !self.holders().is_empty())
    }
}

/// The lock, together with others.
#[must_use = "the lock is given back when this is dropped"]
pub struct Shared {
    holder: ThreadId,
}

/// The lock, alone.
#[must_use = "the lock is given back when this is dropped"]
pub struct Exclusive {
    holder: ThreadId,
}

/// Waits while somebody is alone, or waits to be.
pub fn shared() -> Shared {
    let thread = thread::current();
    let (holder, is_test) = (thread.id(), thread.name().is_some());
    let mut state = state();
    while !state.is_held(holder, is_test) && (state.alone.is_some() || state.waiting > 0) {
        state = CHANGED.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    *state.holders().entry(holder).or_default() += 1;
    Shared { holder }
}

/// Waits until no other test holds the lock.
pub fn exclusive() -> Exclusive {
    let holder = thread::current().id();
    let mut state = state();
    if let Some((_, count)) = state.alone.as_mut().filter(|(alone, _)| *alone == holder) {
        *count += 1;
        return Exclusive { holder };
    }
    assert!(!state.holders().contains_key(&holder), "take the lock alone before any world is made");
    state.waiting += 1;
    while state.alone.is_some() || !state.holders().is_empty() {
        state = CHANGED.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    state.waiting -= 1;
    state.alone = Some((holder, 1));
    Exclusive { holder }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut state = state();
        let holders = state.holders();
        // A world may be dropped by another thread than the one that made it.
        if let Some(count) = holders.get_mut(&self.holder) {
            *count -= 1;
            if *count == 0 {
                holders.remove(&self.holder);
            }
        }
        CHANGED.notify_all();
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let mut state = state();
        if let Some((_, count)) = state.alone.as_mut().filter(|(holder, _)| *holder == self.holder) {
            *count -= 1;
            if *count == 0 {
                state.alone = None;
            }
        }
        CHANGED.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::{exclusive, shared};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;

    /// A thread with a name, as a test has.
    fn test(work: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
        thread::Builder::new().name("a test".to_owned()).spawn(work).unwrap()
    }

    #[test]
    fn one_is_alone_and_the_others_are_together() {
        static INSIDE: AtomicUsize = AtomicUsize::new(0);
        static ALONE: AtomicBool = AtomicBool::new(false);
        let work = |n: usize| {
            move || {
                for _ in 0..200 {
                    if n == 0 {
                        let _ring = exclusive();
                        let _again = exclusive();
                        let _inside = shared();
                        ALONE.store(true, Ordering::SeqCst);
                        assert_eq!(INSIDE.load(Ordering::SeqCst), 0);
                        // What a test starts belongs to it.
                        thread::spawn(|| drop(shared())).join().unwrap();
                        ALONE.store(false, Ordering::SeqCst);
                    } else {
                        let _ring = shared();
                        INSIDE.fetch_add(1, Ordering::SeqCst);
                        assert!(!ALONE.load(Ordering::SeqCst));
                        // Again, while somebody waits to be alone.
                        let _again = shared();
                        thread::spawn(|| drop(shared())).join().unwrap();
                        INSIDE.fetch_sub(1, Ordering::SeqCst);
                    }
                }
            }
        };
        let threads: Vec<_> = (0..4).map(|n| test(work(n))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn a_panic_gives_it_back() {
        let thread = test(|| {
            let _ring = exclusive();
            panic!("as a test that fails");
        });
        assert!(thread.join().is_err());
        drop(exclusive());
        drop(shared());
    }
}
