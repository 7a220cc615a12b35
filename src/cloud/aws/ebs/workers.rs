//! Worker threads for EBS direct, each with its own runtime and client. Readers block their thread, and the main thread
//! may be in the kernel, waiting for a disk that only these threads can fill.

use crate::sys::lock::lock_mutex;
use crate::trace::Track;
use anyhow::{Context, Result};
use aws_sdk_ebs::Client;
use aws_sdk_ebs::config::{Config, IdentityCache};
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// One thread encrypts and copies about 400 MB a second; 900 blocks are 470 MB.
const THREADS: usize = 2;

pub struct Workers {
    all: Vec<Arc<Worker>>,
    next: AtomicUsize,
}

pub struct Worker {
    handle: Handle,
    config: Mutex<Config>,
    client: Mutex<Client>,
    /// The thread ends when this is dropped.
    _end: oneshot::Sender<()>,
}

impl Workers {
    /// Starts the threads. `load` runs on each of them: what it makes is used by no other.
    pub async fn start<F>(load: impl Fn() -> F) -> Result<Self>
    where
        F: Future<Output = Config> + Send + 'static,
    {
        let mut all = Vec::new();
        for _ in 0..THREADS {
            let (handle, end) = start_thread()?;
            let config = handle.spawn(load()).await.context("loading the configuration of EBS direct")?;
            let client = Mutex::new(Client::from_conf(config.clone()));
            all.push(Arc::new(Worker { handle, config: Mutex::new(config), client, _end: end }));
        }
        Ok(Self { all, next: AtomicUsize::new(0) })
    }

    /// The next thread, in turn.
    pub fn next(&self) -> Arc<Worker> {
        self.all[self.next.fetch_add(1, Ordering::Relaxed) % self.all.len()].clone()
    }

    /// Runs a future on one of the threads and gives it that thread's client. It is aborted when the returned future is
    /// dropped.
    pub async fn run<T, F>(&self, work: impl FnOnce(Arc<Worker>) -> F) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let lane = self.next();
        let mut task = AbortOnDrop(lane.handle.spawn(Track::here().follow(work(lane.clone()))));
        match (&mut task.0).await {
            Ok(value) => value,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => unreachable!("only dropping this future aborts the task, and its thread outlives it"),
        }
    }

    /// Like [`Self::run`], but blocks the calling thread, which must not be one of these.
    pub fn block<T, F>(&self, work: impl FnOnce(Arc<Worker>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (sender, receiver) = mpsc::sync_channel(1);
        let lane = self.next();
        let answer = work(lane.clone());
        lane.handle.spawn(async move {
            // The receiver may be gone.
            _ = sender.send(answer.await);
        });
        receiver.recv().context("waiting for a thread of EBS direct")
    }
}

impl Worker {
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    pub fn client(&self) -> Client {
        lock_mutex(&self.client).clone()
    }

    /// Discards the credentials in use and loads new ones.
    pub fn renew(&self) {
        let mut config = lock_mutex(&self.config);
        *config = config.to_builder().identity_cache(IdentityCache::lazy().build()).build();
        *lock_mutex(&self.client) = Client::from_conf(config.clone());
    }
}

/// Aborts its task when it is dropped.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn start_thread() -> Result<(Handle, oneshot::Sender<()>)> {
    let runtime = Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    let handle = runtime.handle().clone();
    let (end, ended) = oneshot::channel::<()>();
    std::thread::Builder::new()
        .name("ebs".to_owned())
        .spawn(move || {
            // A message and a dropped sender both end the thread.
            _ = runtime.block_on(ended);
        })
        .context("starting a thread for EBS direct")?;
    Ok((handle, end))
}
