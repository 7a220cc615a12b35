//! The ring's lock. All tests of a ring are threads of one process, and they run at the same time. A test does not
//! disturb others if it works only in its own directories, on its own devices and with its own processes. Another test
//! must run alone: for example, one that lists all processes, mounts or loop devices of this machine, measures a time,
//! or changes this process's environment. Such a test takes the lock with [`exclusive`] in its first line.
//!
//! All other tests hold the lock with [`shared`]. The worlds of this crate take it when they are created. A test takes
//! it itself only if it starts threads that create worlds, or if it creates devices or mounts without a world.
//!
//! - A thread that holds the lock can take it again without waiting, because a test may create several worlds.
//! - Threads that a test starts belong to the test. They do not wait while any test holds the lock. They are recognized
//!   because they have no name, and the test harness names the tests' own threads.
//! - A test that waits for the exclusive lock goes before tests that ask later. Otherwise it could wait for ever.
//! - A test that panics releases the lock, because its worlds are dropped.
//!
//! Processes that a test starts do not use the lock, even if they run the test's own program.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

#[derive(Default)]
struct State {
    /// The threads that hold the lock together, and how often each has taken it.
    shared: Option<HashMap<ThreadId, usize>>,
    /// The thread that holds the lock alone, and how often it has taken it.
    alone: Option<(ThreadId, usize)>,
    /// The number of threads that wait to hold the lock alone.
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

    /// Returns whether this thread, or the test to which it belongs, holds the lock.
    fn is_held(&mut self, by: ThreadId, is_test: bool) -> bool {
        let held = self.holders().contains_key(&by) || self.alone.is_some_and(|(holder, _)| holder == by);
        held || !is_test && (self.alone.is_some() || !self.holders().is_empty())
    }
}

/// The lock, held together with other tests.
#[must_use = "the lock is given back when this is dropped"]
pub struct Shared {
    holder: ThreadId,
}

/// The lock, held alone.
#[must_use = "the lock is given back when this is dropped"]
pub struct Exclusive {
    holder: ThreadId,
}

/// Takes the lock together with other tests. Waits while another test holds it alone or waits to do so.
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

/// Takes the lock alone. Waits until no other test holds it.
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
        // A world may be dropped by another thread than the thread that created it.
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

    /// Starts a thread with a name, like the thread of a test.
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
                        // A thread that a test starts belongs to the test.
                        thread::spawn(|| drop(shared())).join().unwrap();
                        ALONE.store(false, Ordering::SeqCst);
                    } else {
                        let _ring = shared();
                        INSIDE.fetch_add(1, Ordering::SeqCst);
                        assert!(!ALONE.load(Ordering::SeqCst));
                        // The lock is taken again while another test waits to hold it alone.
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
