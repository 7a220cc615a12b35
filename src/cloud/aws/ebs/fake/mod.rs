//! A server on 127.0.0.1 that implements the calls of EC2 and EBS direct for snapshots. It answers correctly unless a
//! test's script says otherwise.

mod wire;
mod world;

use super::Ebs;
use crate::cloud::aws::ec2::{Ec2, Ec2Options, Timeouts};
use crate::ids::BLOCK;
use crate::ids::SnapshotId;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_ec2::config::{Credentials, SharedCredentialsProvider};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

/// A delay that is long enough for other events to happen first.
const LATE: Duration = Duration::from_millis(100);

/// A request. It has the action, and all parameters by their names in lower case.
#[derive(Debug, Clone)]
pub struct Request {
    pub action: String,
    params: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Request {
    pub fn get(&self, name: &str) -> &str {
        self.params.get(&name.to_ascii_lowercase()).map_or("", String::as_str)
    }

    pub fn index(&self) -> u32 {
        self.get("index").parse().unwrap()
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn filter(&self, name: &str) -> Option<&str> {
        let (key, _) = self.params.iter().find(|(key, value)| key.ends_with(".name") && *value == name)?;
        Some(self.get(&key.replace(".name", ".value.1")))
    }
}

#[derive(Debug, Clone)]
pub enum Reply {
    /// Answers correctly.
    Right,
    /// Executes the request, and closes the connection without an answer.
    Lost,
    /// Executes the request, and flips a bit of the answer's body.
    Flipped,
    /// Executes the request, and answers after some time.
    Late,
    /// Closes the connection without executing the request.
    Drop,
    Refuse(u16, &'static str, &'static str, &'static str),
    Body(String),
}

/// Refuses with the HTTP status 400.
pub fn refuse(code: &'static str, message: &'static str) -> Reply {
    Reply::Refuse(400, code, message, "")
}

#[derive(Debug, Clone, Default)]
pub struct StoredSnapshot {
    pub state: &'static str,
    /// `self` is this account. `all` is another account that made the snapshot public. `private` is another account
    /// that shares it with this one.
    pub owner: &'static str,
    pub key: Option<String>,
    pub size: u64,
    pub blocks: BTreeMap<u32, Vec<u8>>,
    pub tags: BTreeMap<String, String>,
    token: String,
}

#[derive(Default)]
pub struct World {
    pub snapshots: BTreeMap<String, StoredSnapshot>,
    pub calls: Vec<Request>,
    /// The number of blocks in a page of a listing. Each page with blocks is followed by `empty` pages without blocks.
    pub page: usize,
    pub empty: usize,
    /// Each token contains this number. Tokens with another number are refused, as if they had expired.
    pub age: u32,
    pub encrypts: bool,
    /// The state of a snapshot after CopySnapshot or CompleteSnapshot.
    pub ends: &'static str,
}

type Script = Box<dyn FnMut(&Request, usize) -> Reply + Send>;

/// The handle with which tests control the server.
#[derive(Clone)]
pub struct Fake(Arc<Mutex<(World, Script)>>);

impl Fake {
    pub fn with<T>(&self, with: impl FnOnce(&mut World) -> T) -> T {
        with(&mut self.0.lock().unwrap().0)
    }

    pub fn count(&self, action: &str) -> usize {
        self.with(|world| world.calls.iter().filter(|call| call.action == action).count())
    }

    pub fn of(&self, action: &str) -> Vec<Request> {
        self.with(|world| world.calls.iter().filter(|call| call.action == action).cloned().collect())
    }

    pub fn left(&self) -> Vec<String> {
        self.with(|world| world.snapshots.keys().cloned().collect())
    }

    /// Adds a snapshot with these blocks, each filled with one byte.
    pub fn add(&self, id: &str, blocks: &[(u32, u8)], owner: &'static str) -> SnapshotId {
        let blocks = blocks.iter().map(|(index, byte)| (*index, vec![*byte; BLOCK])).collect();
        let stored = StoredSnapshot { state: "completed", owner, size: 8, blocks, ..Default::default() };
        self.with(|world| world.snapshots.insert(id.to_owned(), stored));
        SnapshotId(id.to_owned())
    }
}

/// Starts a server. For each request, `script` gets the request and the number of earlier requests with the same
/// action.
pub async fn ebs(dir: &Path, script: impl FnMut(&Request, usize) -> Reply + Send + 'static) -> (Ebs, Fake) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let world = World { page: 100, ends: "completed", ..Default::default() };
    let fake = Fake(Arc::new(Mutex::new((world, Box::new(script)))));
    let served = fake.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, served.clone()));
        }
    });
    let keys = Credentials::new("AKIDTEST", "secret", None, None, "test");
    let shared = SdkConfig::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("eu-test-1"))
        .endpoint_url(endpoint)
        .credentials_provider(SharedCredentialsProvider::new(keys))
        .build();
    let fast = Timeouts::default().faster(200, Duration::from_secs(2));
    let options = Ec2Options {
        region: None,
        instance_id: None,
        zone: None,
        documents: dir.to_owned(),
        devices: Rc::new(|_| Ok(None)),
        // If the first call is lost, its retry has to be in time even on a busy machine.
        timeouts: Timeouts { unreachable: Duration::from_secs(3), ..fast },
    };
    let ec2 = Ec2::with_shared(shared.clone(), options);
    (Ebs::with_config(ec2, aws_sdk_ebs::config::Config::new(&shared)), fake)
}

pub struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer { status, headers: Vec::new(), body: body.into() }
}

fn refusal(status: u16, code: &str, message: &str, reason: &str, rest: bool) -> Answer {
    let body = match rest {
        true => {
            format!(r#"{{"Message": "{message}", "Reason": "{reason}"}}"#).replace(r#", "Reason": """#, "")
        }
        false => format!(
            "<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>\
             <RequestID>req-1</RequestID></Response>"
        ),
    };
    Answer { status, headers: vec![("x-amzn-errortype", code.to_owned())], body: body.into() }
}

async fn serve(mut stream: TcpStream, fake: Fake) {
    let Some(request) = wire::read(&mut stream).await else { return };
    let (answer, late) = {
        let mut both = fake.0.lock().unwrap();
        let (world, script) = &mut *both;
        let nth = world.calls.iter().filter(|call| call.action == request.action).count();
        // The body of a put is not recorded, because the block's data are in the snapshot.
        let body = if request.action == "PutSnapshotBlock" { Vec::new() } else { request.body.clone() };
        world.calls.push(Request { body, ..request.clone() });
        let rest = !request.params.contains_key("action");
        let reply = script(&request, nth);
        let late = matches!(reply, Reply::Late);
        let answer = match reply {
            Reply::Right | Reply::Late => Some(world.act(&request)),
            Reply::Lost => {
                world.act(&request);
                None
            }
            Reply::Flipped => {
                let mut answer = world.act(&request);
                answer.body[BLOCK / 2] ^= 1;
                Some(answer)
            }
            Reply::Drop => None,
            Reply::Refuse(status, code, message, reason) => {
                Some(refusal(status, code, message, reason, rest))
            }
            Reply::Body(body) => Some(answer(200, body)),
        };
        (answer, late)
    };
    if late {
        tokio::time::sleep(LATE).await;
    }
    let Some(answer) = answer else { return };
    let mut head = format!("HTTP/1.1 {} X\r\nx-amzn-requestid: req-1\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\nConnection: close\r\n\r\n", answer.body.len());
    _ = stream.write_all(head.as_bytes()).await;
    _ = stream.write_all(&answer.body).await;
    _ = stream.shutdown().await;
}
