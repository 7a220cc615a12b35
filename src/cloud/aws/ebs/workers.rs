//! Worker threads for EBS direct, each with its own runtime and client. No other thread could send the requests. A
//! thread that reads a block is blocked until the block arrives. The main thread may be blocked in the kernel, because
//! it reads a disk whose blocks only the worker threads can fetch.

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

/// The number of threads. One thread is not enough: it encrypts and copies about 400 MB a second, but 900 blocks a
/// second are 470 MB.
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
    /// Starts the threads. Each thread runs one future that `load` returned, and uses the configuration that this
    /// future loads.
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

    /// Returns one of the workers. Successive calls return them in rotation.
    pub fn next(&self) -> Arc<Worker> {
        self.all[self.next.fetch_add(1, Ordering::Relaxed) % self.all.len()].clone()
    }

    /// Runs the future that `work` returns on one of the threads. `work` gets the worker of that thread. If the future
    /// of this function is dropped, the future of `work` is aborted.
    pub async fn run<T, F>(&self, work: impl FnOnce(Arc<Worker>) -> F) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let worker = self.next();
        let mut task = AbortOnDrop(worker.handle.spawn(Track::here().follow(work(worker.clone()))));
        match (&mut task.0).await {
            Ok(value) => value,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => unreachable!("only dropping this future aborts the task, and its thread outlives it"),
        }
    }

    /// Like [`Self::run`], but blocks the calling thread, which must not be a worker thread.
    pub fn run_blocking<T, F>(&self, work: impl FnOnce(Arc<Worker>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (sender, receiver) = mpsc::sync_channel(1);
        let worker = self.next();
        let answer = work(worker.clone());
        worker.handle.spawn(async move {
            // The caller may have stopped waiting.
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
            // The thread ends when the sender is dropped. No message is sent.
            _ = runtime.block_on(ended);
        })
        .context("starting a thread for EBS direct")?;
    Ok((handle, end))
}
