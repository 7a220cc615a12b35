//! QEMU's machine protocol, as far as it is needed to plug disks in and out.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

/// The time limit for a response. A guest under TCG responds within a second, and QEMU itself immediately.
const ANSWER: Duration = Duration::from_secs(20);
/// The time limit for the removal of a disk. A guest takes 0.1 to 0.5 s, and longer while it boots.
const REMOVAL: Duration = Duration::from_secs(30);
/// The time for which one caller listens before other callers may use the connection.
const SLICE: Duration = Duration::from_millis(50);

const CLOSED: &str = "the connection was closed";

/// A QEMU guest.
pub struct Qmp {
    socket: PathBuf,
    connection: Mutex<Option<Connection>>,
}

struct Connection {
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
    /// Devices that QEMU has removed.
    deleted: BTreeSet<String>,
    /// The device on each port.
    ports: Vec<Option<String>>,
}

/// The error of a command, as QEMU describes it.
struct Failed(String);

impl Connection {
    async fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).await?;
        let (read, write) = stream.into_split();
        let lines = BufReader::new(read).lines();
        let mut connection = Self { lines, write, deleted: BTreeSet::new(), ports: Vec::new() };
        let greeting = connection.next().await?;
        if greeting.get("QMP").is_none() {
            bail!("it is no QMP socket: {greeting}");
        }
        connection.run("qmp_capabilities", json!({})).await?;
        Ok(connection)
    }

    async fn next(&mut self) -> Result<Value> {
        let line = timeout(ANSWER, self.lines.next_line()).await.context("no answer")??;
        let line = line.context(CLOSED)?;
        serde_json::from_str(&line).with_context(|| format!("reading {line:?}"))
    }

    fn note(&mut self, message: &Value) {
        if message["event"] == "DEVICE_DELETED"
            && let Some(device) = message["data"]["device"].as_str()
        {
            self.deleted.insert(device.to_owned());
        }
    }

    async fn execute(&mut self, command: &str, arguments: Value) -> Result<std::result::Result<(), Failed>> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.write.write_all(line.as_bytes()).await?;
        loop {
            let message = self.next().await?;
            self.note(&message);
            if message.get("return").is_some() {
                return Ok(Ok(()));
            }
            if let Some(error) = message.get("error") {
                return Ok(Err(Failed(error["desc"].as_str().unwrap_or_default().to_owned())));
            }
        }
    }

    async fn run(&mut self, command: &str, arguments: Value) -> Result<()> {
        match self.execute(command, arguments).await? {
            Ok(()) => Ok(()),
            Err(Failed(why)) => bail!("{command}: {why}"),
        }
    }

    /// Reads events for a short time.
    async fn listen(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match timeout(left, self.lines.next_line()).await {
                Err(_) => return Ok(()),
                Ok(line) => {
                    let line = line?.context(CLOSED)?;
                    self.note(&serde_json::from_str(&line)?);
                }
            }
        }
    }

    /// Plugs a disk in on the first free port.
    async fn plug(&mut self, name: &str, serial: &str, file: &Path) -> Result<()> {
        let node = json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": file}});
        self.run("blockdev-add", node).await?;
        for port in 0.. {
            if self.ports.len() <= port {
                self.ports.push(None);
            }
            if self.ports[port].is_some() {
                continue;
            }
            let device = json!({
                "driver": "nvme", "id": format!("dev-{name}"), "drive": name, "serial": serial, "bus": format!("rp{port}"),
                // A port has one slot. Without an address, QEMU 7.2 would put a second device of a port into another
                // slot. No guest looks for a device there, but QEMU reports success. Later versions report an error.
                "addr": "0",
            });
            match self.execute("device_add", device).await? {
                Ok(()) => {
                    self.ports[port] = Some(name.to_owned());
                    return Ok(());
                }
                // Another client of QEMU has put a device on this port.
                Err(Failed(why)) if !why.contains("not found") => {
                    if !(why.contains("in use") || why.contains("occupied") || why.contains("not available"))
                    {
                        self.run("blockdev-del", json!({"node-name": name})).await?;
                        bail!("device_add: {why}");
                    }
                }
                Err(Failed(why)) => {
                    self.run("blockdev-del", json!({"node-name": name})).await?;
                    bail!("every port of the guest is taken: {why}");
                }
            }
        }
        unreachable!("ports are counted without end")
    }
}

/// Returns whether an error means that the guest no longer exists.
fn is_gone(error: &anyhow::Error) -> bool {
    error.chain().any(|e| e.is::<std::io::Error>() || e.to_string() == CLOSED)
}

impl Qmp {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, connection: Mutex::new(None) }
    }

    async fn with<T>(&self, run: impl AsyncFnOnce(&mut Connection) -> Result<T>) -> Result<T> {
        let mut connection = self.connection.lock().await;
        let mut open = connection.take();
        if let Some(old) = &mut open
            && old.listen(Duration::from_millis(1)).await.is_err()
        {
            // The guest is gone, and its devices with it. Another guest may be at the socket.
            open = None;
        }
        let open = match open {
            Some(open) => open,
            None => Connection::open(&self.socket)
                .await
                .with_context(|| format!("connecting to {}", self.socket.display()))?,
        };
        let open = connection.insert(open);
        let result = run(open).await;
        if result.as_ref().is_err_and(is_gone) {
            *connection = None;
        }
        result
    }

    /// Adds an NVMe controller with this serial number to the guest.
    pub async fn plug(&self, name: &str, serial: &str, file: &Path) -> Result<()> {
        self.with(async |open| open.plug(name, serial, file).await)
            .await
            .with_context(|| format!("plugging {name} in"))
    }

    /// Removes a disk from the guest, which must agree. If the guest is gone, nothing has to be removed.
    pub async fn unplug(&self, name: &str) -> Result<()> {
        match self.unplug_from_guest(name).await {
            Err(error) if is_gone(&error) => Ok(()),
            result => result,
        }
    }

    async fn unplug_from_guest(&self, name: &str) -> Result<()> {
        let device = format!("dev-{name}");
        let end = Instant::now() + REMOVAL;
        let mut asked: Option<Instant> = None;
        loop {
            // A guest that is booting ignores the request, so it is repeated every 5 s.
            if asked.is_none_or(|at| at.elapsed() > Duration::from_secs(5)) {
                asked = Some(Instant::now());
                let asking = self.with(async |open| open.execute("device_del", json!({"id": device})).await);
                match asking.await.with_context(|| format!("plugging {name} out"))? {
                    Ok(()) => {}
                    // The device is already removed, or is being removed.
                    Err(Failed(why)) if why.contains("not found") => break,
                    Err(Failed(why)) if why.contains("in the process of unplug") => {}
                    // With native hot-plug, the guest is still processing the previous request.
                    Err(Failed(why)) if why.contains("guest is busy") => {}
                    Err(Failed(why)) => bail!("plugging {name} out: {why}"),
                }
            }
            let gone = self.with(async |open| {
                open.listen(SLICE).await?;
                Ok(open.deleted.remove(&device))
            });
            if gone.await? {
                break;
            }
            if Instant::now() > end {
                bail!("plugging {name} out: the guest does not let go of it");
            }
        }
        self.with(async |open| {
            for port in open.ports.iter_mut().filter(|port| port.as_deref() == Some(name)) {
                *port = None;
            }
            // The device is removed, but its last reads may not be complete.
            for _ in 0..100 {
                match open.execute("blockdev-del", json!({"node-name": name})).await? {
                    Err(Failed(why)) if why.contains("in use") => open.listen(SLICE).await?,
                    Ok(()) | Err(Failed(_)) => return Ok(()),
                }
            }
            bail!("QEMU does not let go of {name}")
        })
        .await
    }
}
