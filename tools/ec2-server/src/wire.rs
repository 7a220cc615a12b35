//! HTTP/1.1, as far as the clients of this server use it. Bodies have a length or come in chunks, and connections are
//! reused.

use crate::chunks;
use std::io::{Error, ErrorKind, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The maximum size of a request. A block of a snapshot has 512 KiB, and the signatures of its chunks are added.
const LONGEST: usize = 1 << 20;
const MOST_HEADERS: usize = 64;
/// The size of the first read. It has room for a request's head, but not for much of the body, which is copied.
const HEAD: usize = 8 << 10;
/// A body up to this length is written together with its head.
const SHORT: usize = 16 << 10;

/// The headers of a request. Their names are in lower case.
#[derive(Debug, Clone, Default)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    fn is(&self, name: &str, value: &str) -> bool {
        self.get(name).is_some_and(|is| is.trim().eq_ignore_ascii_case(value))
    }
}

#[derive(Debug)]
pub struct Request {
    pub method: String,
    /// The path without the query.
    pub path: String,
    /// The text after the `?`.
    pub query: String,
    pub headers: Headers,
    pub body: Vec<u8>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The content type of the body, such as `text/plain`.
    pub kind: &'static str,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

/// The connection is closed without a response.
#[derive(Debug)]
pub struct Dropped;

fn bad(text: &str) -> Error {
    Error::new(ErrorKind::InvalidData, text.to_owned())
}

/// Parses the request's head at the beginning of `read`. Returns the request, the head's length, and the body's length.
/// The body's length is `None` if the body comes in chunks.
fn head(read: &[u8]) -> Result<Option<(Request, usize, Option<usize>)>> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(length) = parsed.parse(read).map_err(|e| bad(&e.to_string()))? else {
        return Ok(None);
    };
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    let headers =
        Headers(parsed.headers.iter().map(|h| (h.name.to_ascii_lowercase(), text(h.value))).collect());
    let body = match headers.get("transfer-encoding") {
        Some(_) if headers.is("transfer-encoding", "chunked") => None,
        Some(_) => return Err(bad("a body in an unknown encoding")),
        None => {
            let length = headers.get("content-length").unwrap_or("0").trim();
            Some(length.parse().map_err(|_| bad("no length"))?)
        }
    };
    let (path, query) =
        parsed.path.unwrap_or("/").split_once('?').unwrap_or((parsed.path.unwrap_or("/"), ""));
    let (path, query) = (path.to_owned(), query.to_owned());
    let method = parsed.method.unwrap_or_default().to_owned();
    Ok(Some((Request { method, path, query, headers, body: Vec::new() }, length, body)))
}

/// Reads one request. Returns `None` if the client has closed the connection.
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
    if length.is_some_and(|length| length > LONGEST) {
        return Err(bad("too long"));
    }
    let whole = length.is_some_and(|length| read.len() >= start + length);
    if request.headers.is("expect", "100-continue") && !whole {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    let body = match length {
        Some(length) => {
            let end = read.len().min(start + length);
            let mut body = Vec::with_capacity(length);
            body.extend_from_slice(&read[start..end]);
            read.drain(..end);
            while body.len() < length {
                let rest = (length - body.len()) as u64;
                if (&mut *stream).take(rest).read_buf(&mut body).await? == 0 {
                    return Ok(None);
                }
            }
            body
        }
        None => {
            let end = loop {
                if let Some(end) = chunks::end(&read[start..]).map_err(bad)? {
                    break start + end;
                }
                if read.len() > LONGEST + start {
                    return Err(bad("too long"));
                }
                if stream.read_buf(read).await? == 0 {
                    return Ok(None);
                }
            };
            let body = chunks::joined(&read[start..end]);
            read.drain(..end);
            body
        }
    };
    // The body, chunked by HTTP or not, may consist of signed chunks.
    let encodings = request.headers.get("content-encoding").unwrap_or_default();
    let signed = encodings.split(',').any(|encoding| encoding.trim().eq_ignore_ascii_case("aws-chunked"));
    request.body = match signed {
        true if chunks::end(&body).map_err(bad)? == Some(body.len()) => chunks::joined(&body),
        true => return Err(bad("chunks that do not end")),
        false => body,
    };
    Ok(Some(request))
}

/// Serves requests of a connection until one side closes it.
pub async fn serve(
    mut stream: TcpStream,
    handle: impl AsyncFn(Request) -> std::result::Result<Answer, Dropped>,
) -> Result<()> {
    let mut read = Vec::with_capacity(HEAD);
    while let Some(request) = next(&mut stream, &mut read).await? {
        let close = request.headers.is("connection", "close");
        let Ok(Answer { status, kind, headers, body }) = handle(request).await else { return Ok(()) };
        let connection = if close { "close" } else { "keep-alive" };
        let more: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let mut head = format!(
            "HTTP/1.1 {status} {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: {connection}\r\n\
             Server: oven-ec2-server\r\n{more}\r\n",
            body.len()
        )
        .into_bytes();
        if body.len() <= SHORT {
            head.extend_from_slice(&body);
            stream.write_all(&head).await?;
        } else {
            stream.write_all(&head).await?;
            stream.write_all(&body).await?;
        }
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
        assert_eq!((request.headers.get("x-a"), length, body), (Some("b"), 51, Some(3)));
        assert_eq!(request.query, "b");
        assert!(head(b"GET / HTTP/1.1\r\nHost").unwrap().is_none());
        assert!(head(b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n").is_err());
        let chunked = head(b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap().unwrap();
        assert_eq!(chunked.2, None);
        assert!(head(b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n").is_err());
        assert!(head(b"\x16\x03\x01").is_err());
    }
}
