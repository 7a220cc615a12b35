//! A fake EC2 for tests. It is an HTTP server on 127.0.0.1, and each test determines its answers.

use super::{Ec2, Ec2Options, Timeouts};
use crate::device::Device;
use crate::ids::VolumeId;
use aws_sdk_ec2::config::{BehaviorVersion, Config, Credentials, Region};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub const INSTANCE: &str = "i-0123456789abcdef0";

/// A request: its action and its parameters.
#[derive(Debug, Clone)]
pub struct Request {
    pub action: String,
    pub params: BTreeMap<String, String>,
}

impl Request {
    pub fn get(&self, name: &str) -> &str {
        self.params.get(name).map_or("", String::as_str)
    }

    /// Returns the first value of a filter.
    pub fn filter(&self, name: &str) -> Option<&str> {
        let (key, _) = self.params.iter().find(|(key, value)| key.ends_with(".Name") && *value == name)?;
        Some(self.get(&key.replace(".Name", ".Value.1")))
    }
}

pub enum Reply {
    /// Success, with the content of the response element.
    Ok(String),
    Error(u16, &'static str, String),
    /// Closes the connection without an answer.
    Drop,
    /// Never answers.
    Hang,
}

pub fn ok(inside: impl Into<String>) -> Reply {
    Reply::Ok(inside.into())
}

pub fn refuse(code: &'static str, message: impl Into<String>) -> Reply {
    Reply::Error(400, code, message.into())
}

type Handler = Box<dyn FnMut(&Request, usize) -> Reply + Send>;

/// The requests that the server received, oldest first.
#[derive(Clone, Default)]
pub struct Calls(Arc<Mutex<Vec<Request>>>);

impl Calls {
    pub fn all(&self) -> Vec<Request> {
        self.0.lock().unwrap().clone()
    }

    pub fn of(&self, action: &str) -> Vec<Request> {
        self.all().into_iter().filter(|request| request.action == action).collect()
    }

    pub fn names(&self) -> Vec<String> {
        self.all().into_iter().map(|request| request.action).collect()
    }
}

/// Starts a server and returns a client for it. `handler` makes the answers. It gets the request, and the number of
/// earlier requests with the same action.
pub async fn ec2(dir: &Path, handler: impl FnMut(&Request, usize) -> Reply + Send + 'static) -> (Ec2, Calls) {
    let (endpoint, calls) = server(handler).await;
    let config = Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("eu-test-1"))
        .endpoint_url(endpoint)
        .credentials_provider(credentials())
        .build();
    (Ec2::with_config(config, options(dir)), calls)
}

/// Like [`ec2`], but the configuration is loaded with aws-config, as outside of tests. So the client can also call SSM.
pub async fn connected(
    dir: &Path,
    handler: impl FnMut(&Request, usize) -> Reply + Send + 'static,
) -> (Ec2, Calls) {
    let (endpoint, calls) = server(handler).await;
    let loader = aws_config::defaults(BehaviorVersion::v2026_01_12()).endpoint_url(endpoint);
    let options = Ec2Options { region: Some("eu-test-1".to_owned()), ..options(dir) };
    let ec2 = Ec2::load(loader.credentials_provider(credentials()), options).await;
    (ec2.unwrap(), calls)
}

fn credentials() -> Credentials {
    Credentials::new("AKIDTEST", "secret", None, None, "test")
}

async fn server(handler: impl FnMut(&Request, usize) -> Reply + Send + 'static) -> (String, Calls) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let calls = Calls::default();
    let (handler, seen) = (Arc::new(Mutex::new(Box::new(handler) as Handler)), calls.clone());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, handler.clone(), seen.clone()));
        }
    });
    (endpoint, calls)
}

/// Returns options with short timeouts. A volume's device is found only by the second search.
fn options(dir: &Path) -> Ec2Options {
    let looks = Cell::new(0);
    let devices = move |volume: &VolumeId| {
        looks.set(looks.get() + 1);
        let device = Device {
            node: std::fs::File::open("/dev/null").unwrap().into(),
            path: "/dev/null".into(),
            rdev: 0,
            serial: volume.0.clone(),
            trimming: None,
        };
        Ok((looks.get() > 1).then_some(device))
    };
    let fast = Timeouts::default().faster(200, Duration::from_secs(1));
    Ec2Options {
        region: None,
        instance_id: Some(INSTANCE.to_owned()),
        zone: Some("eu-test-1a".to_owned()),
        documents: dir.to_owned(),
        devices: Rc::new(devices),
        // This limit is not shortened as much as the others. Even on a busy machine, there must be enough time for a
        // retry if the first answer is lost.
        timeouts: Timeouts { unreachable: Duration::from_secs(3), ..fast },
    }
}

async fn serve(mut stream: TcpStream, handler: Arc<Mutex<Handler>>, calls: Calls) {
    let Some(request) = read(&mut stream).await else { return };
    let reply = {
        let nth = calls.of(&request.action).len();
        calls.0.lock().unwrap().push(request.clone());
        (handler.lock().unwrap())(&request, nth)
    };
    let (status, body) = match reply {
        // SSM uses JSON, and EC2 uses XML.
        Reply::Ok(json) if json.starts_with('{') => (200, json),
        Reply::Error(status, code, message) if request.params.is_empty() => {
            (status, format!("{{\"__type\": \"{code}\", \"message\": \"{message}\"}}"))
        }
        Reply::Ok(inside) => {
            let name = format!("{}Response", request.action);
            (
                200,
                format!(
                    "<{name} xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><requestId>req-1</requestId>{inside}</{name}>"
                ),
            )
        }
        Reply::Error(status, code, message) => (
            status,
            format!(
                "<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>\
                 <RequestID>req-1</RequestID></Response>"
            ),
        ),
        Reply::Drop => return,
        Reply::Hang => return std::future::pending().await,
    };
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: text/xml\r\nx-amzn-requestid: req-1\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    _ = stream.write_all((head + &body).as_bytes()).await;
    _ = stream.shutdown().await;
}

async fn read(stream: &mut TcpStream) -> Option<Request> {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let n = stream.read(&mut buffer).await.ok().filter(|n| *n > 0)?;
        bytes.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| {
            line.to_ascii_lowercase()
                .strip_prefix("content-length:")
                .and_then(|n| n.trim().parse::<usize>().ok())
        });
        if body.len() >= length.unwrap_or(0) {
            let target = head.lines().find_map(|line| line.strip_prefix("x-amz-target: AmazonSSM."));
            if let Some(action) = target {
                return Some(Request { action: action.to_owned(), params: BTreeMap::new() });
            }
            let params: BTreeMap<String, String> = body
                .split('&')
                .filter_map(|pair| pair.split_once('='))
                .map(|(k, v)| (decode(k), decode(v)))
                .collect();
            return Some(Request { action: params.get("Action").cloned().unwrap_or_default(), params });
        }
    }
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
