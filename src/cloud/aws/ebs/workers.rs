//! Threads that talk to EBS direct, each with a runtime and a client of its own: readers block theirs, and the main
//! one may be in the kernel, waiting for a disk that only these can fill.

use crate::trace::Track;
use anyhow::{Context, Result};
use aws_sdk_ebs::Client;
use aws_sdk_ebs::config::{Config, IdentityCache};
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// One thread encrypts and copies some 400 MB a second; 900 blocks are 470 MB.
const LANES: usize = 2;

pub struct Lanes {
    all: Vec<Arc<Lane>>,
    next: AtomicUsize,
}

pub struct Lane {
    handle: Handle,
    config: Mutex<Config>,
    client: Mutex<Client>,
    /// The thread ends when it is dropped.
    _end: oneshot::Sender<()>,
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lanes {
    /// `load` is carried out on each of the threads: what it makes is used by no other.
    pub async fn start<F>(load: impl Fn() -> F) -> Result<Self>
    where
        F: Future<Output = Config> + Send + 'static,
    {
        let mut all = Vec::new();
        for _ in 0..LANES {
            let (handle, end) = thread()?;
            let config = handle.spawn(load()).await.context("loading the configuration of EBS direct")?;
            let client = Mutex::new(Client::from_conf(config.clone()));
            all.push(Arc::new(Lane { handle, config: Mutex::new(config), client, _end: end }));
        }
        Ok(Self { all, next: AtomicUsize::new(0) })
    }

    /// One after the other.
    pub fn next(&self) -> Arc<Lane> {
        self.all[self.next.fetch_add(1, Ordering::Relaxed) % self.all.len()].clone()
    }

    /// Carries a future out on one of the threads, which it may use the client of. It is given up when this one is
    /// dropped.
    pub async fn run<T, F>(&self, of: impl FnOnce(Arc<Lane>) -> F) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let lane = self.next();
        let mut task = Task(lane.handle.spawn(Track::here().follow(of(lane.clone()))));
        match (&mut task.0).await {
            Ok(value) => value,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => unreachable!("nobody else ends it, and the thread lives while this is borrowed"),
        }
    }

    /// The same, and blocks this thread, which is none of these.
    pub fn block<T, F>(&self, of: impl FnOnce(Arc<Lane>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (sender, receiver) = mpsc::sync_channel(1);
        let lane = self.next();
        let answer = of(lane.clone());
        lane.handle.spawn(async move {
            // Nobody waits any more.
            _ = sender.send(answer.await);
        });
        receiver.recv().context("waiting for a thread of EBS direct")
    }
}

impl Lane {
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    pub fn client(&self) -> Client {
        locked(&self.client).clone()
    }

    /// Forgets the credentials in use, and takes new ones.
    pub fn renew(&self) {
        let mut config = locked(&self.config);
        *config = config.to_builder().identity_cache(IdentityCache::lazy().build()).build();
        *locked(&self.client) = Client::from_conf(config.clone());
    }
}

/// Ends with the future that waits for it.
struct Task<T>(JoinHandle<T>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn thread() -> Result<(Handle, oneshot::Sender<()>)> {
    let runtime = Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    let handle = runtime.handle().clone();
    let (end, ended) = oneshot::channel::<()>();
    std::thread::Builder::new()
        .name("ebs".to_owned())
        .spawn(move || {
            // Either way it is over.
            _ = runtime.block_on(ended);
        })
        .context("starting a thread for EBS direct")?;
    Ok((handle, end))
}
