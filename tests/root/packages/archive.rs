//! A small archive of Debian packages: real packages, a real index with a real signature, served over HTTP by a thread
//! of the test. What is not real is its size, and that each test says which answers go wrong.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

/// What goes wrong, by the path that is asked for: an answer, and how often.
type Faults = Arc<Mutex<BTreeMap<String, (&'static str, u32)>>>;

/// What was answered: a path, and the code.
type Answers = Arc<Mutex<Vec<(String, u16)>>>;

/// What a path held when it was asked for last, and how often that was something else: its date.
type Versions = Arc<Mutex<BTreeMap<String, (String, u32)>>>;

/// The bytes that all connections together may send in a second; 0 is no limit.
type Throttle = Arc<AtomicU64>;

/// A server of a directory.
pub struct Archive {
    dir: TempDir,
    port: u16,
    faults: Faults,
    answers: Answers,
    throttle: Throttle,
    sent: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

/// An OpenPGP key of a test.
pub struct Key {
    home: TempDir,
    pub public: String,
}

/// As a fault: no answer comes.
pub const SILENCE: &str = "503 Silence";

impl Key {
    pub fn new() -> Self {
        let home = tempfile::Builder::new().prefix("oven-gpg-").tempdir().unwrap();
        let mut key = Self { home, public: String::new() };
        key.gpg(
            &[
                "--passphrase",
                "",
                "--quick-gen-key",
                "Archive <archive@example.org>",
                "ed25519",
                "sign",
                "never",
            ],
            b"",
        );
        key.public = String::from_utf8(key.gpg(&["--armor", "--export"], b"")).unwrap();
        key
    }

    fn gpg(&self, arguments: &[&str], input: &[u8]) -> Vec<u8> {
        let file = self.home.path().join("input");
        fs::write(&file, input).unwrap();
        let output = Command::new("gpg")
            .args(["--batch", "--quiet", "--yes", "--no-tty", "--homedir"])
            .arg(self.home.path())
            .args(arguments)
            .stdin(fs::File::open(&file).unwrap())
            .output()
            .expect("these tests need gpg: run scripts/setup");
        assert!(output.status.success(), "gpg: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // Its agent, which would stay.
        _ = Command::new("gpgconf").arg("--homedir").arg(self.home.path()).args(["--kill", "all"]).status();
    }
}

impl Archive {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("oven-archive-").tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (faults, answers, stop) = (Faults::default(), Answers::default(), Arc::default());
        let (versions, throttle) = (Versions::default(), Throttle::default());
        let line = Arc::new(Mutex::new(Arc::clone(&throttle)));
        let archive = Self {
            dir,
            port,
            faults: Arc::clone(&faults),
            answers: Arc::clone(&answers),
            throttle,
            sent: Arc::default(),
            stop: Arc::clone(&stop),
        };
        let (root, sent) = (archive.dir.path().to_owned(), Arc::clone(&archive.sent));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (root, faults) = (root.clone(), Arc::clone(&faults));
                let (answers, versions) = (Arc::clone(&answers), Arc::clone(&versions));
                let (line, sent) = (Arc::clone(&line), Arc::clone(&sent));
                std::thread::spawn(move || {
                    let (path, since) = request(&stream)?;
                    let answer = answer(&root, (&path, since.as_deref()), &faults, &answers, &versions);
                    send(&stream, &answer, &line, &sent);
                    Some(())
                });
            }
        });
        archive
    }

    /// From now on, all connections together send this many bytes in a second.
    pub fn throttle(&self, bytes_per_second: u64) {
        self.throttle.store(bytes_per_second, Ordering::Relaxed);
    }

    /// How many bytes were sent.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}/{path}", self.port)
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// The next `times` answers for a path are this status line.
    pub fn fail(&self, path: &str, status: &'static str, times: u32) {
        self.faults.lock().unwrap().insert(path.to_owned(), (status, times));
    }

    /// What was asked for, in order.
    pub fn asked(&self) -> Vec<String> {
        self.answers.lock().unwrap().iter().map(|(path, _)| path.clone()).collect()
    }

    /// What was answered since this was called last: `200 pool/x.deb`.
    pub fn answered(&self) -> Vec<String> {
        let mut answers: Vec<_> =
            self.answers.lock().unwrap().drain(..).map(|(path, code)| format!("{code} {path}")).collect();
        answers.sort();
        answers
    }

    /// Takes a package file into the archive's pool.
    pub fn add(&self, file: &Path, name: &str) -> String {
        let to = self.path("pool").join(name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, &to).unwrap();
        format!("pool/{name}")
    }

    /// Writes the index of a suite with the component `main`, signed if there is a key. `fields`: more of its Release.
    pub fn publish(&self, suite: &str, fields: &str, pool: &[String], key: Option<&Key>) {
        let dists = self.path("dists").join(suite);
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let index = format!("main/binary-{architecture}/Packages");
        let head = format!(
            "Suite: {suite}\nCodename: {suite}\nArchitectures: {architecture}\nComponents: main\n{fields}"
        );
        self.write((&dists, ""), &index, &head, pool, key);
    }

    /// The same for a flat repository, which says nothing of itself, in a directory of its own.
    pub fn publish_flat(&self, dir: &str, pool: &[String], key: Option<&Key>) {
        let own: Vec<_> = pool
            .iter()
            .map(|file| {
                let name = file.rsplit('/').next().unwrap().to_owned();
                fs::create_dir_all(self.path(dir)).unwrap();
                fs::copy(self.path(file), self.path(dir).join(&name)).unwrap();
                name
            })
            .collect();
        self.write((&self.path(dir), dir), "Packages", "", &own, key);
    }

    fn write(
        &self,
        (dir, below): (&Path, &str),
        index: &str,
        head: &str,
        files: &[String],
        key: Option<&Key>,
    ) {
        let packages: String = files.iter().map(|file| stanza(&self.path(below).join(file), file)).collect();
        let path = dir.join(index);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &packages).unwrap();
        let release = format!(
            "{head}Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n {} {} {index}\n",
            sha256(packages.as_bytes()),
            packages.len()
        );
        for old in ["InRelease", "Release"] {
            _ = fs::remove_file(dir.join(old));
        }
        match key {
            Some(key) => {
                fs::write(dir.join("InRelease"), key.gpg(&["--clearsign"], release.as_bytes())).unwrap();
            }
            None => fs::write(dir.join("Release"), release).unwrap(),
        }
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        _ = TcpStream::connect(("127.0.0.1", self.port)); // so that it sees it
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn stanza(file: &Path, name: &str) -> String {
    let control = Command::new("dpkg-deb").arg("-f").arg(file).output().unwrap();
    assert!(control.status.success(), "{}", String::from_utf8_lossy(&control.stderr));
    let (control, bytes) = (String::from_utf8(control.stdout).unwrap(), fs::read(file).unwrap());
    let (size, digest) = (bytes.len(), sha256(&bytes));
    format!("{}\nFilename: {name}\nSize: {size}\nSHA256: {digest}\n\n", control.trim_end())
}

/// Reads the path that is asked for, and the date since which it must have changed.
fn request(stream: &TcpStream) -> Option<(String, Option<String>)> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut since = None;
    for line in lines.take_while(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("if-modified-since")
        {
            since = Some(value.to_owned());
        }
    }
    let path = first.split(' ').nth(1).unwrap_or_default();
    Some((path.trim_start_matches('/').replace("/./", "/"), since))
}

/// The answer to a request.
struct Answer {
    status: &'static str,
    date: Option<String>,
    body: Vec<u8>,
}

fn answer(
    root: &Path,
    (path, since): (&str, Option<&str>),
    faults: &Faults,
    answers: &Answers,
    versions: &Versions,
) -> Answer {
    let fault = match faults.lock().unwrap().get_mut(path) {
        Some((status, times)) if *times > 0 => {
            *times -= 1;
            Some(*status)
        }
        _ => None,
    };
    let found = fs::read(root.join(path)).ok();
    let date = found.as_ref().map(|body| date(path, body, versions));
    let (status, body) = match (fault, found) {
        (Some(status), _) => (status, Vec::new()),
        (None, Some(_)) if since.is_some() && since == date.as_deref() => ("304 Not Modified", Vec::new()),
        (None, Some(body)) => ("200 OK", body),
        (None, None) => ("404 Not Found", Vec::new()),
    };
    let code = status.split(' ').next().unwrap().parse().unwrap();
    answers.lock().unwrap().push((path.to_owned(), code));
    Answer { status, date, body }
}

/// Sends the one answer of a connection.
#[allow(clippy::disallowed_methods, reason = "a thread of the test waits")]
fn send(mut stream: &TcpStream, answer: &Answer, line: &Mutex<Throttle>, sent: &AtomicU64) {
    let Answer { status, date, body } = answer;
    if *status == SILENCE {
        std::thread::sleep(Duration::from_secs(20)); // longer than any test
    }
    let date = date.as_ref().map(|date| format!("Last-Modified: {date}\r\n")).unwrap_or_default();
    let head =
        format!("HTTP/1.1 {status}\r\n{date}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    // The other may have gone.
    if stream.write_all(head.as_bytes()).is_err() {
        return;
    }
    for chunk in body.chunks(16 << 10) {
        let turn = line.lock().unwrap();
        let rate = turn.load(Ordering::Relaxed);
        if rate > 0 {
            std::thread::sleep(Duration::from_secs_f64(chunk.len() as f64 / rate as f64));
        }
        drop(turn);
        if stream.write_all(chunk).is_err() {
            return;
        }
        sent.fetch_add(chunk.len() as u64, Ordering::Relaxed);
    }
}

/// When what is at a path became what it is: a minute later for each time that it was something else.
fn date(path: &str, body: &[u8], versions: &Versions) -> String {
    let digest = sha256(body);
    let mut versions = versions.lock().unwrap();
    let version = versions.entry(path.to_owned()).or_insert_with(|| (digest.clone(), 0));
    if version.0 != digest {
        *version = (digest, version.1 + 1);
    }
    format!("Thu, 01 Jan 2026 00:{:02}:00 GMT", version.1)
}
