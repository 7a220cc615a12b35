//! A server of EC2's and EBS direct's snapshots on 127.0.0.1 that does right, unless a test's script says otherwise.

use super::Ebs;
use crate::cloud::SnapshotId;
use crate::cloud::blocks::BLOCK;
use crate::cloud::ec2::{Ec2, Options, Pace};
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_ec2::config::{Credentials, SharedCredentialsProvider};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Enough for something else to happen first.
const LATE: Duration = Duration::from_millis(100);

/// A request: its action, and its parameters of whatever kind, by their names in small letters.
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
    /// What a good server does.
    Right,
    /// The same, and the connection is closed without the answer.
    Lost,
    /// The same, and then a bit of the answer's body is flipped.
    Flipped,
    /// The same, and some time passes before the answer.
    Late,
    /// The connection is closed, and nothing was done.
    Drop,
    Refuse(u16, &'static str, &'static str, &'static str),
    Body(String),
}

/// HTTP status 400.
pub fn refuse(code: &'static str, message: &'static str) -> Reply {
    Reply::Refuse(400, code, message, "")
}

#[derive(Debug, Clone, Default)]
pub struct Kept {
    pub state: &'static str,
    /// `self`, `all`: public and another's, `private`: another's, and shared with us.
    pub owner: &'static str,
    pub key: Option<String>,
    pub size: u64,
    pub blocks: BTreeMap<u32, Vec<u8>>,
    pub tags: BTreeMap<String, String>,
    token: String,
}

#[derive(Default)]
pub struct World {
    pub snapshots: BTreeMap<String, Kept>,
    pub calls: Vec<Request>,
    /// Blocks of a page, and the number of pages without one that follow each.
    pub page: usize,
    pub empty: usize,
    /// Part of each token: others are refused.
    pub age: u32,
    pub encrypts: bool,
    /// In which state a copy, or a sealed snapshot, is from then on.
    pub ends: &'static str,
}

type Script = Box<dyn FnMut(&Request, usize) -> Reply + Send>;

/// The fake, as tests see it.
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

    /// A snapshot with these blocks, each full of one byte.
    pub fn add(&self, id: &str, blocks: &[(u32, u8)], owner: &'static str) -> SnapshotId {
        let blocks = blocks.iter().map(|(index, byte)| (*index, vec![*byte; BLOCK])).collect();
        let kept = Kept { state: "completed", owner, size: 8, blocks, ..Default::default() };
        self.with(|world| world.snapshots.insert(id.to_owned(), kept));
        SnapshotId(id.to_owned())
    }
}

/// `script` is given a request, and how many of the same action came before it.
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
    let options = Options {
        region: None,
        instance_id: None,
        zone: None,
        documents: dir.to_owned(),
        devices: Rc::new(|_| Ok(None)),
        pace: Pace::default().faster(200, Duration::from_secs(2)),
    };
    let ec2 = Ec2::with_shared(shared.clone(), options);
    (Ebs::with_config(ec2, aws_sdk_ebs::config::Config::new(&shared)), fake)
}

struct Answer {
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
    let Some(request) = read(&mut stream).await else { return };
    let (answer, late) = {
        let mut both = fake.0.lock().unwrap();
        let (world, script) = &mut *both;
        let nth = world.calls.iter().filter(|call| call.action == request.action).count();
        // The data of blocks is in the snapshots.
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

impl World {
    fn act(&mut self, request: &Request) -> Answer {
        match request.action.as_str() {
            "DescribeSnapshots" => self.describe(request),
            "GetEbsEncryptionByDefault" => {
                let text = format!("<ebsEncryptionByDefault>{}</ebsEncryptionByDefault>", self.encrypts);
                xml(request, &text)
            }
            "DeleteSnapshot" => match self.snapshots.remove(request.get("SnapshotId")) {
                Some(_) => xml(request, "<return>true</return>"),
                None => refusal(400, "InvalidSnapshot.NotFound", "no such snapshot", "", false),
            },
            "CopySnapshot" => {
                let mut copy = self.snapshots[request.get("SourceSnapshotId")].clone();
                (copy.owner, copy.state, copy.tags) = ("self", self.ends, request_tags(request));
                copy.key = request.params.get("kmskeyid").cloned();
                let id = self.insert(copy);
                xml(request, &format!("<snapshotId>{id}</snapshotId>"))
            }
            "StartSnapshot" => self.start(&request.json()),
            _ => {
                let (id, world) = (request.get("snapshot").to_owned(), (self.page, self.empty, self.age));
                let ends = self.ends;
                match self.snapshots.get_mut(&id) {
                    None => {
                        refusal(404, "ResourceNotFoundException", "no snapshot", "SNAPSHOT_NOT_FOUND", true)
                    }
                    Some(kept) => match request.action.as_str() {
                        "ListSnapshotBlocks" => list(kept, request, world),
                        "GetSnapshotBlock" => get(kept, request, world.2),
                        "PutSnapshotBlock" => put(kept, request),
                        "CompleteSnapshot" => complete(kept, request, ends),
                        action => panic!("{action}"),
                    },
                }
            }
        }
    }

    fn insert(&mut self, kept: Kept) -> String {
        let id = format!("snap-1{:016}", self.calls.len());
        self.snapshots.insert(id.clone(), kept);
        id
    }

    fn describe(&self, request: &Request) -> Answer {
        let owner = match request.get("RestorableBy.1") {
            "" => "self",
            "self" => "private",
            all => all,
        };
        let wanted = request.filter("snapshot-id");
        let tag = request.filter("tag:oven:copy-of").map(|value| ("oven:copy-of", value));
        let tag = tag.or(request.filter("tag:oven:run").map(|value| ("oven:run", value)));
        let items = self.snapshots.iter().filter(|(id, kept)| {
            kept.owner == owner
                && wanted.is_none_or(|wanted| wanted == *id)
                && tag.is_none_or(|(key, value)| kept.tags.get(key).is_some_and(|tag| tag == value))
        });
        let items = items.map(|(id, kept)| {
            let key = kept.key.as_ref().map(|key| format!("<kmsKeyId>{key}</kmsKeyId>")).unwrap_or_default();
            format!(
                "<item><snapshotId>{id}</snapshotId><status>{}</status><volumeSize>{}</volumeSize>\
                 <ownerId>123456789012</ownerId><encrypted>{}</encrypted>{key}</item>",
                kept.state,
                kept.size,
                kept.key.is_some()
            )
        });
        xml(request, &format!("<snapshotSet>{}</snapshotSet>", items.collect::<String>()))
    }

    fn start(&mut self, asked: &serde_json::Value) -> Answer {
        let text = |key: &str| asked[key].as_str().map(str::to_owned);
        if asked.get("ParentSnapshotId").is_some()
            && (asked.get("Encrypted").is_some() || asked.get("KmsKeyArn").is_some())
        {
            let message = "You cannot specify ParentSnapshotId and Encrypted";
            return refusal(400, "ValidationException", message, "INVALID_PARAMETER_VALUE", true);
        }
        let token = text("ClientToken").unwrap();
        let known = self.snapshots.iter().find(|(_, kept)| kept.token == token).map(|(id, _)| id.clone());
        let tags = asked["Tags"].as_array().unwrap().iter();
        let pair = |tag: &serde_json::Value| {
            (tag["Key"].as_str().unwrap().into(), tag["Value"].as_str().unwrap().into())
        };
        let size = asked["VolumeSize"].as_u64().unwrap();
        let kept = Kept {
            state: "pending",
            owner: "self",
            token,
            size,
            tags: tags.map(pair).collect(),
            ..Default::default()
        };
        let id = known.unwrap_or_else(|| self.insert(kept));
        answer(
            201,
            format!(
                r#"{{"SnapshotId": "{id}", "Status": "pending", "BlockSize": {BLOCK}, "VolumeSize": {size}}}"#
            ),
        )
    }
}

fn list(kept: &Kept, request: &Request, (page, empty, age): (usize, usize, u32)) -> Answer {
    // A page's token: the next index, how many empty pages come before it, and its age.
    let parts: Vec<u32> = request.get("pageToken").split('-').filter_map(|part| part.parse().ok()).collect();
    let (from, vain) = match parts[..] {
        [.., of] if of != age => {
            return refusal(400, "ValidationException", "Invalid page token", "INVALID_PAGE_TOKEN", true);
        }
        [from, vain, _] => (from, vain),
        _ => (request.get("startingBlockIndex").parse().unwrap_or(0), 0),
    };
    let rest: Vec<u32> = kept.blocks.keys().copied().filter(|index| *index >= from).collect();
    let shown = if vain > 0 { &[][..] } else { &rest[..rest.len().min(page)] };
    let next = match shown.last() {
        None if vain > 0 => Some((from, vain - 1)),
        Some(last) if rest.len() > shown.len() => Some((last + 1, empty as u32)),
        _ => None,
    };
    let blocks: Vec<_> = shown
        .iter()
        .map(|index| serde_json::json!({ "BlockIndex": index, "BlockToken": format!("{index}-{age}") }))
        .collect();
    let mut body = serde_json::json!({ "Blocks": blocks, "BlockSize": BLOCK, "VolumeSize": kept.size });
    if let Some((from, vain)) = next {
        body["NextToken"] = format!("{from}-{vain}-{age}").into();
    }
    answer(200, body.to_string())
}

fn get(kept: &Kept, request: &Request, age: u32) -> Answer {
    if request.get("blockToken") != format!("{}-{age}", request.index()) {
        return refusal(400, "ValidationException", "Invalid block token", "INVALID_BLOCK_TOKEN", true);
    }
    let data = kept.blocks[&request.index()].clone();
    let headers = vec![
        ("x-amz-Checksum", STANDARD.encode(Sha256::digest(&data))),
        ("x-amz-Checksum-Algorithm", "SHA256".to_owned()),
        ("x-amz-Data-Length", data.len().to_string()),
    ];
    Answer { status: 200, headers, body: data }
}

fn put(kept: &mut Kept, request: &Request) -> Answer {
    let checksum = STANDARD.encode(Sha256::digest(&request.body));
    if kept.state != "pending" {
        return refusal(
            400,
            "ValidationException",
            "The snapshot is not pending",
            "INVALID_SNAPSHOT_ID",
            true,
        );
    }
    if request.get("x-amz-checksum") != checksum || request.get("x-amz-data-length") != BLOCK.to_string() {
        return refusal(400, "ValidationException", "bad checksum", "INVALID_PARAMETER_VALUE", true);
    }
    kept.blocks.insert(request.index(), request.body.clone());
    Answer { status: 201, headers: vec![("x-amz-Checksum", checksum)], body: b"{}".to_vec() }
}

fn complete(kept: &mut Kept, request: &Request, ends: &'static str) -> Answer {
    if kept.state != "pending" {
        return refusal(
            400,
            "ValidationException",
            "The snapshot is not pending",
            "INVALID_SNAPSHOT_ID",
            true,
        );
    }
    let all = kept.blocks.values().fold(Sha256::new(), |all, data| all.chain_update(Sha256::digest(data)));
    if request.get("x-amz-changedblockscount") != kept.blocks.len().to_string() {
        return refusal(
            400,
            "ValidationException",
            "wrong changed blocks count",
            "INVALID_PARAMETER_VALUE",
            true,
        );
    }
    let linear = request.get("x-amz-checksum-aggregation-method") == "LINEAR";
    if !linear || request.get("x-amz-checksum") != STANDARD.encode(all.finalize()) {
        return refusal(
            400,
            "ValidationException",
            "The checksum does not match",
            "INVALID_PARAMETER_VALUE",
            true,
        );
    }
    kept.state = ends;
    answer(202, r#"{"Status": "pending"}"#)
}

fn request_tags(request: &Request) -> BTreeMap<String, String> {
    let keys = (1..).map_while(|i| {
        let at = |what| request.params.get(&format!("tagspecification.1.tag.{i}.{what}")).cloned();
        at("key").zip(at("value"))
    });
    keys.collect()
}

fn xml(request: &Request, inside: &str) -> Answer {
    let name = format!("{}Response", request.action);
    answer(
        200,
        format!(
            "<{name} xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><requestId>req-1</requestId>{inside}</{name}>"
        ),
    )
}

async fn read(stream: &mut TcpStream) -> Option<Request> {
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    let (head, begin) = loop {
        let n = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        bytes.extend_from_slice(&buffer[..n]);
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break (String::from_utf8_lossy(&bytes[..end]).into_owned(), end + 4);
        }
    };
    let mut params = BTreeMap::new();
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    params.extend(lines.filter_map(|line| {
        let (name, value) = line.split_once(": ")?;
        Some((name.to_ascii_lowercase(), value.to_owned()))
    }));
    let length = params.get("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    while bytes.len() < begin + length {
        let n = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        bytes.extend_from_slice(&buffer[..n]);
    }
    let body = bytes[begin..].to_vec();
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let form = if path == "/" { String::from_utf8_lossy(&body).into_owned() } else { query.to_owned() };
    params.extend(form.split('&').filter_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        Some((decode(key).to_ascii_lowercase(), decode(value)))
    }));
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let (action, id) = match (method.as_str(), &parts[..]) {
        ("POST", ["snapshots"]) => ("StartSnapshot", ""),
        ("POST", ["snapshots", "completion", id]) => ("CompleteSnapshot", *id),
        ("GET", ["snapshots", id, "blocks"]) => ("ListSnapshotBlocks", *id),
        ("GET", ["snapshots", id, "blocks", index]) => {
            params.insert("index".to_owned(), (*index).to_owned());
            ("GetSnapshotBlock", *id)
        }
        ("PUT", ["snapshots", id, "blocks", index]) => {
            params.insert("index".to_owned(), (*index).to_owned());
            ("PutSnapshotBlock", *id)
        }
        _ => (params["action"].as_str(), ""),
    };
    let (action, id) = (action.to_owned(), id.to_owned());
    params.insert("snapshot".to_owned(), id);
    Some(Request { action, params, body })
}

fn decode(text: &str) -> String {
    let (bytes, mut out, mut i) = (text.as_bytes(), Vec::new(), 0);
    while i < bytes.len() {
        match bytes[i] {
            b'%' => {
                out.push(u8::from_str_radix(&text[i + 1..i + 3], 16).unwrap());
                i += 2;
            }
            b'+' => out.push(b' '),
            byte => out.push(byte),
        }
        i += 1;
    }
    String::from_utf8(out).unwrap()
}
