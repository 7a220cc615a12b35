//! A mirror: an HTTP server of one directory on this machine's loopback interface.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The mirror serves until the test's process ends.
pub struct Mirror {
    pub address: String,
    faults: Arc<Mutex<BTreeMap<String, u32>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Mirror {
    pub fn of(directory: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/", listener.local_addr().unwrap());
        let mirror = Self { address, faults: Arc::default(), asked: Arc::default() };
        let (faults, asked) = (mirror.faults.clone(), mirror.asked.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client may close the connection before the response.
                _ = answer(stream, &directory, &faults, &asked);
            }
        });
        mirror
    }

    /// The next `times` requests for paths with this end get 404.
    pub fn fails(&self, end: &str, times: u32) {
        self.faults.lock().unwrap().insert(end.to_owned(), times);
    }

    /// Returns the number of requests for paths that contain `part`.
    pub fn asked_with(&self, part: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|path| path.contains(part)).count()
    }

    /// Returns the number of requests for paths that end with `end`.
    pub fn asked(&self, end: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|path| path.ends_with(end)).count()
    }
}

fn answer(
    mut stream: TcpStream,
    directory: &Path,
    faults: &Mutex<BTreeMap<String, u32>>,
    asked: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default();
    asked.lock().unwrap().push(path.to_owned());
    let relative = Path::new(path.trim_start_matches('/'));
    let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
    let mut faults = faults.lock().unwrap();
    let fault = faults.iter_mut().find(|(end, times)| path.ends_with(end.as_str()) && **times > 0);
    let content = match fault {
        Some((_, times)) => {
            *times -= 1;
            None
        }
        None if plain => std::fs::read(directory.join(relative)).ok(),
        None => None,
    };
    let status = if content.is_some() { "200 OK" } else { "404 Not Found" };
    let body = content.unwrap_or_default();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    if method == "GET" { stream.write_all(&body) } else { Ok(()) }
}
