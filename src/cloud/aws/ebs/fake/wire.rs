//! Parses requests to EC2 and to EBS direct.

use super::Request;
use std::collections::BTreeMap;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

pub async fn read(stream: &mut TcpStream) -> Option<Request> {
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
