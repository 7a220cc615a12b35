//! Runs many futures concurrently. Each is polled only after it was woken.

use anyhow::Result;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

struct Slot<F> {
    future: Pin<Box<F>>,
    signal: Arc<Signal>,
}

struct Signal {
    woken: AtomicBool,
    task: Mutex<Waker>,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.task.lock().unwrap_or_else(PoisonError::into_inner).wake_by_ref();
    }
}

/// Runs pieces of work as they arrive, until all are done or one fails. `next` returns the next piece and limits the
/// number of concurrent ones. `done` gets each result.
pub async fn process_concurrently<I, O, F: Future<Output = Result<O>>>(
    mut next: impl FnMut(&mut Context<'_>) -> Poll<Option<Result<I>>>,
    mut work: impl FnMut(I) -> F,
    mut done: impl FnMut(O),
) -> Result<()> {
    let mut slots: Vec<Slot<F>> = Vec::new();
    let mut more = true;
    poll_fn(move |cx| {
        while more {
            match next(cx) {
                Poll::Ready(Some(Ok(piece))) => slots.push(Slot::new(work(piece), cx)),
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => more = false,
                Poll::Pending => break,
            }
        }
        let mut at = 0;
        while let Some(slot) = slots.get_mut(at) {
            match slot.poll(cx) {
                Poll::Ready(Ok(output)) => {
                    slots.swap_remove(at);
                    done(output);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => at += 1,
            }
        }
        if more || !slots.is_empty() { Poll::Pending } else { Poll::Ready(Ok(())) }
    })
    .await
}

impl<O, F: Future<Output = Result<O>>> Slot<F> {
    fn new(future: F, cx: &Context<'_>) -> Self {
        let signal = Signal { woken: AtomicBool::new(true), task: Mutex::new(cx.waker().clone()) };
        Self { future: Box::pin(future), signal: Arc::new(signal) }
    }

    fn poll(&mut self, cx: &Context<'_>) -> Poll<Result<O>> {
        // The waker is set before the signal is checked, so that every wake-up after the check wakes this task.
        self.signal.task.lock().unwrap_or_else(PoisonError::into_inner).clone_from(cx.waker());
        if !self.signal.woken.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        let waker = Waker::from(self.signal.clone());
        self.future.as_mut().poll(&mut Context::from_waker(&waker))
    }
}
