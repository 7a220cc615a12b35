//! A server that behaves like EC2, as far as oven uses it. It is based on a local region. Over HTTP on this machine, it
//! serves the EC2 API, the EBS direct APIs (all below `/snapshots`), the instance metadata service, and the few actions
//! of SSM and STS that oven needs. It is as strict as EC2, because otherwise a passed test would prove nothing: an
//! unknown parameter or filter is refused, a name can be used only once, and a resource in use cannot be deleted.
//! Faults are planned by action and number ([`Fault`]).
//!
//! It serves in its own thread until the [`Server`] is dropped.

mod actions;
mod attach;
mod chunks;
mod clock;
mod control;
mod direct;
mod faults;
mod filter;
mod http;
mod iam;
mod imds;
mod ledger;
mod options;
mod others;
mod params;
mod qmp;
mod refusal;
mod state;
mod wire;
pub mod world;
mod xml;

pub use faults::{Fault, Turn, What};
pub use ledger::{Entry, Ledger};
pub use options::{AttachAs, Builder, Delays, Direct, DirectThrottle, Limits, ServerOptions, Throttle};
pub use state::Call;

use actions::Ctx;
use anyhow::{Context, Result};
use oven::cloud::local::Region;
use oven::ids::Architecture;
use oven::report::Report;
use state::State;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::oneshot;
use world::{Common, Instance, World, now};

/// A running server.
pub struct Server {
    addresses: Vec<(String, SocketAddr)>,
    dir: PathBuf,
    state: Arc<Mutex<State>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Returns the world of the last server on a directory, or a new world. Adds the instances of these options.
fn world(file: &Path, options: &ServerOptions) -> Result<World> {
    let mut world = match std::fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("reading {}", file.display()))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => World::default(),
        Err(e) => return Err(e).with_context(|| format!("reading {}", file.display())),
    };
    for volume in world.volumes.values_mut() {
        // The last server has ended, and its attachments with it.
        volume.attachment = None;
    }
    for (builder, n) in options.builders().into_iter().zip(0..) {
        let common = Common {
            id: builder.id.clone(),
            owner: options.account.clone(),
            created: now(),
            seeded: true,
            ..Common::default()
        };
        let root = format!("vol-{n:017x}");
        let devices = [("/dev/xvda".to_owned(), root)].into();
        let instance =
            Instance { common, zone: builder.zone, state: "running".into(), devices, ..Instance::default() };
        world.instances.insert(builder.id, instance);
    }
    Ok(world)
}

impl Server {
    /// Starts a server on a local region's directory. Images that were imported there belong to the account.
    pub fn start(region_dir: &Path, options: ServerOptions) -> Result<Self> {
        // The server also writes its own files here, and a region is made only in an empty directory.
        Region::open(region_dir).with_context(|| format!("making {}", region_dir.display()))?;
        let dir =
            region_dir.canonicalize().with_context(|| format!("looking at {}", region_dir.display()))?;
        let builders = options.builders();
        let mut listeners = Vec::new();
        for (builder, n) in builders.iter().zip(0..) {
            let mut address = options.listen;
            if n > 0 {
                address.set_port(0);
            }
            let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
            listener.set_nonblocking(true)?;
            listeners.push((builder.clone(), listener));
        }
        let addresses =
            listeners.iter().map(|(b, l)| Ok((b.id.clone(), l.local_addr()?))).collect::<Result<_>>()?;
        let file = dir.join("ec2.json");
        let world = world(&file, &options)?;
        let state = Arc::new(Mutex::new(State::new(options, world)));
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let (shared, path) = (state.clone(), dir.clone());
        let thread = std::thread::Builder::new().name("ec2-server".into()).spawn(move || {
            let run = || -> Result<()> {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                let local = tokio::task::LocalSet::new();
                local.block_on(&runtime, async {
                    let mut guests = attach::Guests::new();
                    for (builder, _) in &listeners {
                        if let AttachAs::Qmp(socket) = &builder.attach {
                            guests.insert(builder.id.clone(), Rc::new(qmp::Qmp::new(socket.clone())));
                        }
                    }
                    let ctx = Rc::new(Ctx {
                        region: Region::open(&path)?,
                        state: shared,
                        changing: Default::default(),
                        held: Default::default(),
                        guests,
                        imds: Default::default(),
                        known: Default::default(),
                        file,
                    });
                    ctx.import().await.map_err(|e| anyhow::anyhow!("{}: {}", e.code, e.message))?;
                    direct::resume(&ctx);
                    for (builder, listener) in listeners {
                        let listener = tokio::net::TcpListener::from_std(listener)?;
                        tokio::task::spawn_local(http::serve(ctx.clone(), listener, builder));
                    }
                    _ = ready.send(Ok(()));
                    _ = stopped.await;
                    ctx.save();
                    for id in ctx.held.borrow().keys() {
                        _ = std::fs::remove_file(attach::note(&ctx, id));
                    }
                    Ok(())
                })
            };
            // If the server had started, nobody receives this error.
            if let Err(error) = run() {
                _ = ready.send(Err(error));
            }
        })?;
        started.recv().context("the server ended")??;
        Ok(Self { addresses, dir, state, stop: Some(stop), thread: Some(thread) })
    }

    fn url(&self, n: usize) -> String {
        format!("http://{}", self.addresses[n].1)
    }

    /// Returns the value for `AWS_ENDPOINT_URL`.
    pub fn endpoint(&self) -> String {
        self.url(0)
    }

    /// Returns the value for `AWS_EC2_METADATA_SERVICE_ENDPOINT` on the first instance.
    pub fn imds(&self) -> String {
        self.url(0)
    }

    /// Returns the value for `AWS_EC2_METADATA_SERVICE_ENDPOINT` on an instance.
    pub fn imds_of(&self, instance: &str) -> Option<String> {
        self.addresses.iter().position(|(id, _)| id == instance).map(|n| self.url(n))
    }

    /// The region's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the file that [`AttachAs::Loop`] writes for an attached volume: `{"node": "/dev/loop7", "rdev": N,
    /// "device": "/dev/sdf"}`.
    pub fn attached(&self, volume: &str) -> PathBuf {
        self.dir.join("attached").join(format!("{volume}.json"))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the resources that exist. An image that another process imported appears at the next call.
    pub fn ledger(&self) -> Ledger {
        Ledger::of(&self.state().world, &self.dir, now())
    }

    /// Returns all calls, the oldest first.
    pub fn calls(&self) -> Vec<Call> {
        self.state().calls.clone()
    }

    /// Returns the EC2 calls without dry runs.
    pub fn ec2_calls(&self) -> Vec<Call> {
        let mut calls = self.calls();
        calls.retain(|call| call.service == "ec2" && !call.dry_run);
        calls
    }

    /// Returns the calls of the EBS direct APIs.
    pub fn ebs_calls(&self) -> Vec<Call> {
        let mut calls = self.calls();
        calls.retain(|call| call.service == "ebs");
        calls
    }

    /// Returns whether no call is being processed. A call is processed to its end even if its client is gone.
    pub fn is_idle(&self) -> bool {
        self.state().at_work == 0
    }

    /// Clears the list of calls, and counts calls for faults from 0 again.
    pub fn forget_calls(&self) {
        let mut state = self.state();
        state.calls.clear();
        state.plan = Default::default();
    }

    /// Changes the options for all later calls.
    pub fn set(&self, change: impl FnOnce(&mut ServerOptions)) {
        change(&mut self.state().options);
    }

    /// Reads or changes the resources, for example an image's owner, product codes or deprecation.
    pub fn with_world<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let mut state = self.state();
        let result = change(&mut state.world);
        state.before.0 = state.world.clone();
        result
    }

    /// Imports a raw disk as an image of the account, and returns its id. To make it another account's image, change it
    /// afterwards ([`Self::with_world`]).
    pub fn import(&self, raw: &Path, name: &str, architecture: Architecture) -> Result<String> {
        // The import runs in another thread, because the caller's thread may have a runtime.
        let import = || -> Result<String> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let region = Region::open(&self.dir)?;
                let image =
                    region.import(raw, name, architecture, &Default::default(), &Report::silent()).await?;
                let (state, file) = (self.state.clone(), self.dir.join("ec2.json"));
                let ctx = Ctx {
                    region,
                    state,
                    changing: Default::default(),
                    held: Default::default(),
                    guests: Default::default(),
                    imds: Default::default(),
                    known: Default::default(),
                    file,
                };
                ctx.import().await.map_err(|e| anyhow::anyhow!("{}: {}", e.code, e.message))?;
                Ok(image.id.0)
            })
        };
        std::thread::scope(|scope| {
            scope.spawn(import).join().map_err(|_| anyhow::anyhow!("the import panicked"))?
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}
