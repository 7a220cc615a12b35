//! A client of the EBS direct APIs, of a few lines.

use super::TestServer;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

pub const BLOCK: usize = 512 << 10;

pub const AUTH: &str = "Authorization: AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/ebs/aws4_request, \
                        SignedHeaders=host, Signature=0\r\n";

/// What was answered.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map_or("", |(_, value)| value)
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&self.body)))
    }

    /// `ValidationException INVALID_BLOCK`.
    pub fn error(&self) -> String {
        assert!(self.status >= 400, "{} went through", self.status);
        let body = self.json();
        assert_eq!(self.header("x-amzn-errortype"), body["__type"].as_str().unwrap());
        assert!(!body["Message"].as_str().unwrap().is_empty());
        format!("{} {}", body["__type"].as_str().unwrap(), body["Reason"].as_str().unwrap_or_default())
            .trim()
            .to_owned()
    }
}

/// A connection that stays.
pub struct Line(BufReader<TcpStream>);

impl Line {
    pub fn open(endpoint: &str) -> Self {
        let stream = TcpStream::connect(endpoint.strip_prefix("http://").unwrap()).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self(BufReader::new(stream))
    }

    pub fn patience(&self, ms: u64) {
        self.0.get_ref().set_read_timeout(Some(Duration::from_millis(ms))).unwrap();
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    /// `None`: no answer, or no whole one.
    pub fn read(&mut self) -> Option<Reply> {
        let mut text = String::new();
        self.0.read_line(&mut text).ok().filter(|n| *n > 0)?;
        let status = text[9..12].parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        let mut reply = Reply { status, headers, body: Vec::new() };
        reply.body = vec![0; reply.header("content-length").parse().unwrap_or(0)];
        self.0.read_exact(&mut reply.body).ok()?;
        Some(reply)
    }

    pub fn try_call(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> Option<Reply> {
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{AUTH}{headers}\r\n");
        self.write(&[head.as_bytes(), body].concat());
        self.read()
    }

    pub fn call(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
        self.try_call(method, path, headers, body).expect("an answer")
    }

    pub fn put(&mut self, snapshot: &str, index: u32, block: &[u8]) -> Reply {
        self.call("PUT", &format!("/snapshots/{snapshot}/blocks/{index}"), &of_block(block), block)
    }
}

pub fn digest(block: &[u8]) -> [u8; 32] {
    Sha256::digest(block).into()
}

pub fn base64(bytes: impl AsRef<[u8]>) -> String {
    STANDARD.encode(bytes)
}

/// The headers of PutSnapshotBlock.
pub fn of_block(block: &[u8]) -> String {
    format!(
        "x-amz-Data-Length: {}\r\nx-amz-Checksum: {}\r\nx-amz-Checksum-Algorithm: SHA256\r\n\
         x-amz-content-sha256: UNSIGNED-PAYLOAD\r\n",
        block.len(),
        base64(digest(block))
    )
}

/// Those of CompleteSnapshot, for blocks in the order of their indexes.
pub fn of_blocks(blocks: &[&[u8]]) -> String {
    let all: Vec<u8> = blocks.iter().flat_map(|block| digest(block)).collect();
    format!(
        "x-amz-ChangedBlocksCount: {}\r\nx-amz-Checksum: {}\r\nx-amz-Checksum-Algorithm: SHA256\r\n\
         x-amz-Checksum-Aggregation-Method: LINEAR\r\n",
        blocks.len(),
        base64(digest(&all))
    )
}

pub fn block(byte: u8) -> Vec<u8> {
    vec![byte; BLOCK]
}

impl TestServer {
    pub fn ebs(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
        Line::open(&self.server.endpoint()).call(method, path, headers, body)
    }

    pub fn start_with(&self, body: Value) -> Reply {
        self.ebs("POST", "/snapshots", "", body.to_string().as_bytes())
    }

    /// The id of a new pending snapshot.
    pub fn start(&self, body: Value) -> String {
        let reply = self.start_with(body);
        assert_eq!(reply.status, 201, "{}", String::from_utf8_lossy(&reply.body));
        reply.json()["SnapshotId"].as_str().unwrap().to_owned()
    }

    pub fn put(&self, snapshot: &str, index: u32, block: &[u8]) -> Reply {
        Line::open(&self.server.endpoint()).put(snapshot, index, block)
    }

    pub fn complete(&self, snapshot: &str, blocks: &[&[u8]]) -> Reply {
        self.ebs("POST", &format!("/snapshots/completion/{snapshot}"), &of_blocks(blocks), b"")
    }

    pub fn blocks(&self, snapshot: &str, query: &str) -> Reply {
        self.ebs("GET", &format!("/snapshots/{snapshot}/blocks{query}"), "", b"")
    }

    /// The index and the token of each block.
    pub fn listed(&self, snapshot: &str) -> Vec<(u32, String)> {
        let reply = self.blocks(snapshot, "");
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        of_list(&reply.json())
    }

    pub fn get(&self, snapshot: &str, index: u32, token: &str) -> Reply {
        let token: String = form_urlencoded::byte_serialize(token.as_bytes()).collect();
        self.ebs("GET", &format!("/snapshots/{snapshot}/blocks/{index}?blockToken={token}"), "", b"")
    }

    /// `pending`, `completed`, `error`, as EC2 says.
    pub fn snapshot_state(&self, snapshot: &str) -> String {
        self.good("DescribeSnapshots", &[("SnapshotId.1", snapshot)]).get("status").unwrap()
    }

    /// A completed snapshot with these blocks.
    pub fn written(&self, start: Value, blocks: &[(u32, Vec<u8>)]) -> String {
        let id = self.start(start);
        for (index, block) in blocks {
            assert_eq!(self.put(&id, *index, block).status, 201);
        }
        let all: Vec<&[u8]> = blocks.iter().map(|(_, block)| &block[..]).collect();
        assert_eq!(self.complete(&id, &all).status, 202);
        super::eventually("completed", || self.snapshot_state(&id) == "completed");
        id
    }
}

pub fn of_list(list: &Value) -> Vec<(u32, String)> {
    let one = |block: &Value| {
        (block["BlockIndex"].as_u64().unwrap() as u32, block["BlockToken"].as_str().unwrap().to_owned())
    };
    list["Blocks"].as_array().unwrap().iter().map(one).collect()
}
