//! HTTP/1.1, as much of it as the clients of this server speak: bodies with a length, and connections that stay.

use std::io::{Error, ErrorKind, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Of a request. EC2 takes user data of 16 KiB, and little else that is long.
const LONGEST: usize = 1 << 20;
const MOST_HEADERS: usize = 64;

/// The headers of a request, names in lower case.
#[derive(Debug, Clone, Default)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Debug)]
pub struct Request {
    pub method: String,
    /// Without the query.
    pub path: String,
    pub headers: Headers,
    pub body: Vec<u8>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// Of the body: `text/plain`.
    pub kind: &'static str,
    pub body: String,
}

/// The connection is closed without an answer.
#[derive(Debug)]
pub struct Dropped;

fn bad(text: &str) -> Error {
    Error::new(ErrorKind::InvalidData, text.to_owned())
}

/// The request at the beginning of what was read, its length there, and that of its body.
fn head(read: &[u8]) -> Result<Option<(Request, usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(length) = parsed.parse(read).map_err(|e| bad(&e.to_string()))? else {
        return Ok(None);
    };
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    let headers =
        Headers(parsed.headers.iter().map(|h| (h.name.to_ascii_lowercase(), text(h.value))).collect());
    if headers.get("transfer-encoding").is_some() {
        return Err(bad("a body without a length"));
    }
    let body = headers.get("content-length").unwrap_or("0").trim().parse().map_err(|_| bad("no length"))?;
    let path = parsed.path.unwrap_or("/").split('?').next().unwrap_or("/").to_owned();
    let method = parsed.method.unwrap_or_default().to_owned();
    Ok(Some((Request { method, path, headers, body: Vec::new() }, length, body)))
}

/// Reads one request. `None`: the client is done.
async fn next(stream: &mut TcpStream, read: &mut Vec<u8>) -> Result<Option<Request>> {
    let (mut request, start, length) = loop {
        if let Some(parsed) = head(read)? {
            break parsed;
        }
        if read.len() > LONGEST {
            return Err(bad("a head that does not end"));
        }
        if stream.read_buf(read).await? == 0 {
            return Ok(None);
        }
    };
    if length > LONGEST {
        return Err(bad("too long"));
    }
    if request.headers.get("expect").is_some() && read.len() < start + length {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    while read.len() < start + length {
        if stream.read_buf(read).await? == 0 {
            return Ok(None);
        }
    }
    request.body = read[start..start + length].to_vec();
    read.drain(..start + length);
    Ok(Some(request))
}

/// Answers what comes over a connection, until either side ends it.
pub async fn serve(
    mut stream: TcpStream,
    handle: impl AsyncFn(Request) -> std::result::Result<Answer, Dropped>,
) -> Result<()> {
    let mut read = Vec::new();
    while let Some(request) = next(&mut stream, &mut read).await? {
        let close = request.headers.get("connection").is_some_and(|how| how.eq_ignore_ascii_case("close"));
        let Ok(Answer { status, kind, body }) = handle(request).await else { return Ok(()) };
        let connection = if close { "close" } else { "keep-alive" };
        let text = format!(
            "HTTP/1.1 {status} {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: {connection}\r\n\
             Server: oven-ec2-server\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(text.as_bytes()).await?;
        if close {
            break;
        }
    }
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads() {
        let (request, length, body) =
            head(b"POST /a?b HTTP/1.1\r\nContent-Length: 3\r\nX-A:  b \r\n\r\nxyz").unwrap().unwrap();
        assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/a"));
        assert_eq!((request.headers.get("x-a"), length, body), (Some("b"), 51, 3));
        assert!(head(b"GET / HTTP/1.1\r\nHost").unwrap().is_none());
        assert!(head(b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n").is_err());
        assert!(head(b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").is_err());
        assert!(head(b"\x16\x03\x01").is_err());
    }
}
