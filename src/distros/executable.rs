//! An executable seen as a distro: asked in a contained process, believed only what the contract allows.

use super::sandboxed_plugin;
use super::sandboxed_plugin::{Ended, Told};
use crate::error::Kind;
use crate::text::printable;
use anyhow::{Context, Result};
use oven_distro::check::Speaker;
use oven_distro::wire::{ClaimsAnswer, ClaimsRequest, PlanAnswer, PlanRequest};
use oven_distro::{Claims, Job, OsRelease, Plan, Refused, faults_of_claims, faults_of_plan};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A pure function answers at once; this is for an interpreter that starts on a busy machine. Less than the 10 s within
/// which a bake that is stopped has to be gone.
const TIMEOUT: Duration = Duration::from_secs(8);
/// For the helper's own end, beyond that.
const PATIENCE: Duration = Duration::from_secs(3);
/// A longer answer is none: the plans of our own plugins have some 10 KiB.
const ANSWER_MAX: usize = 4 << 20;
const WORDS_MAX: usize = 64 << 10;
/// Of a plugin's words, what a failure tells.
const WORDS_SHOWN: usize = 10;
/// A message of the helper.
const TOLD_MAX: u64 = 1 << 20;

/// A plugin that is an executable. It is held in memory as it was read: what was looked at is what runs.
pub struct Exec {
    /// Where it came from.
    pub path: PathBuf,
    program: Vec<u8>,
    /// `oven`.
    helper: PathBuf,
    timeout: Duration,
    /// Why it runs as the user's own process: the kernel gives a user who is not root no namespaces.
    uncontained: Cell<Option<&'static str>>,
}

/// What a plugin said.
#[derive(Debug)]
struct Said {
    answer: String,
    words: String,
}

impl Exec {
    pub fn new(path: &Path, program: Vec<u8>, helper: &Path) -> Self {
        let (path, helper, uncontained) = (path.to_owned(), helper.to_owned(), Cell::new(None));
        Self { path, program, helper, timeout: TIMEOUT, uncontained }
    }

    /// SHA-256, in hexadecimal digits.
    pub fn digest(&self) -> String {
        Sha256::digest(&self.program).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Why the last call was not contained, if it was not.
    pub fn uncontained(&self) -> Option<&'static str> {
        self.uncontained.get()
    }

    pub fn claims(&self, os: &OsRelease) -> Result<Claims> {
        let said = self.say("claims", &text(&ClaimsRequest::new(os)))?;
        match ClaimsAnswer::read(&said.answer) {
            Ok(Ok(claims)) => self.ensure("claims", &faults_of_claims(&claims)).map(|()| claims),
            Ok(Err(refused)) => Err(self.failure("claims", &format!("refused: {refused}"), &said.words)),
            Err(wrong) => Err(self.failure("claims", &format!("its answer {wrong}"), &said.words)),
        }
    }

    /// A refusal is the inner error.
    pub fn plan(&self, job: &Job) -> Result<Result<Plan, Refused>> {
        let said = self.say("plan", &text(&PlanRequest::new(job)))?;
        match PlanAnswer::read(&said.answer) {
            Ok(Ok(plan)) => self.ensure("plan", &faults_of_plan(&plan, job)).map(|()| Ok(plan)),
            Ok(Err(refused)) => Ok(Err(refused)),
            Err(wrong) => Err(self.failure("plan", &format!("its answer {wrong}"), &said.words)),
        }
    }

    fn ensure(&self, verb: &str, faults: &[String]) -> Result<()> {
        const SHOWN: usize = 5;
        if faults.is_empty() {
            return Ok(());
        }
        let more = faults.len().saturating_sub(SHOWN);
        let mut shown = faults[..faults.len() - more].join("; ");
        if more > 0 {
            shown += &format!("; and {more} more");
        }
        Err(self.failure(verb, &format!("its answer is not sound: {}", printable(&shown)), ""))
    }

    fn say(&self, verb: &str, request: &str) -> Result<Said> {
        let (ended, answer, words) = self.run(verb, request).with_context(|| self.asking(verb))?;
        if let Ended::Uncontained(why) = &ended {
            let failure =
                Kind::Machine.failure(format!("{}: it cannot be contained: {why}", self.asking(verb)));
            return Err(failure.hint("`oven doctor` lists what this machine lacks.").into());
        }
        match wrong_end(&ended, self.timeout, answer.len()) {
            None => Ok(Said { answer: String::from_utf8_lossy(&answer).into_owned(), words: told(&words) }),
            Some(wrong) => Err(self.failure(verb, &wrong, &told(&words))),
        }
    }

    fn asking(&self, verb: &str) -> String {
        format!("asking the plugin {} for its {verb}", self.path.display())
    }

    fn failure(&self, verb: &str, wrong: &str, words: &str) -> anyhow::Error {
        let message = format!("{}: {}{}", self.asking(verb), printable(wrong), saying(words));
        let hint =
            format!("`oven plugin check {}` tries all that a plugin has to hold to.", self.path.display());
        Kind::Machine.failure(message).hint(hint).into()
    }

    /// Asks, contained; for a user who is not root and gets no namespaces, as that user.
    fn run(&self, verb: &str, request: &str) -> Result<(Ended, Vec<u8>, Vec<u8>)> {
        let root = rustix::process::geteuid().is_root();
        if self.uncontained.get().is_none() {
            let said = self.once(verb, request, true)?;
            if root || !matches!(said.0, Ended::Uncontained(_)) {
                return Ok(said);
            }
            self.uncontained.set(Some("the kernel gives this user no namespaces"));
        }
        self.once(verb, request, false)
    }

    fn once(&self, verb: &str, request: &str, contained: bool) -> Result<(Ended, Vec<u8>, Vec<u8>)> {
        let (control, theirs) = UnixStream::pair().context("making a socket to the plugin's helper")?;
        let started = Command::new(&self.helper)
            .arg(sandboxed_plugin::VERB)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut helper = Helper(started.with_context(|| format!("starting {}", self.helper.display()))?);
        let path = std::path::absolute(&self.path).context("looking for the plugin")?;
        let told = Told { path, verb: verb.to_owned(), contained, timeout: self.timeout };
        let told = serde_json::to_vec(&told)?;
        for message in [&told[..], if contained { &self.program } else { &[] }, request.as_bytes()] {
            sandboxed_plugin::send(&control, message).context("talking to the plugin's helper")?;
        }
        let deadline = Instant::now() + self.timeout + PATIENCE;
        let (mut answer, mut words) = (Vec::new(), Vec::new());
        let (mut stdout, mut stderr) = (helper.0.stdout.take(), helper.0.stderr.take());
        let mut buffer = vec![0; 64 << 10];
        while stdout.is_some() || stderr.is_some() {
            let left = deadline.saturating_duration_since(Instant::now());
            let span = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let fds: Vec<_> =
                [stdout.as_ref().map(AsFd::as_fd), stderr.as_ref().map(AsFd::as_fd)].into_iter().collect();
            let mut polled: Vec<_> = fds.iter().flatten().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
            match poll(&mut polled, Some(&span)) {
                Ok(0) => return Ok((Ended::TimedOut, answer, words)),
                Err(rustix::io::Errno::INTR) => continue,
                result => _ = result.context("listening to the plugin")?,
            }
            let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
            let mut ready = ready.into_iter();
            if let Some(fd) = &stdout
                && ready.next() == Some(true)
            {
                match rustix::io::read(fd, &mut buffer[..]).context("reading the plugin's answer")? {
                    0 => stdout = None,
                    len => answer.extend(&buffer[..len]),
                }
                if answer.len() > ANSWER_MAX {
                    return Ok((Ended::Exited { code: 0, left: Vec::new() }, answer, words));
                }
            }
            if let Some(fd) = &stderr
                && ready.next() == Some(true)
            {
                match rustix::io::read(fd, &mut buffer[..]).context("reading the plugin's words")? {
                    0 => stderr = None,
                    // The last ones tell the most.
                    len => {
                        words.extend(&buffer[..len]);
                        let more = words.len().saturating_sub(WORDS_MAX);
                        words.drain(..more);
                    }
                }
            }
        }
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        control.set_read_timeout(Some(left)).context("listening to the plugin's helper")?;
        match sandboxed_plugin::receive(&control, TOLD_MAX) {
            Ok(ended) => Ok((serde_json::from_slice(&ended)?, answer, words)),
            Err(error) => Err(error).with_context(|| {
                format!("the plugin's helper ended without a word{}", saying(&self::told(&words)))
            }),
        }
    }
}

/// The suite hears a plugin as a bake does, and takes words on standard error for a fault, too.
impl Speaker for &Exec {
    fn ask(&self, verb: &str, request: &str) -> Result<String, String> {
        let (ended, answer, words) = self.run(verb, request).map_err(|error| format!("{error:#}"))?;
        let words = told(&words);
        if let Ended::Uncontained(why) = &ended {
            return Err(format!("it cannot be contained: {why}"));
        }
        if let Some(wrong) = wrong_end(&ended, self.timeout, answer.len()) {
            return Err(format!("{}{}", printable(&wrong), saying(&words)));
        }
        if !words.is_empty() {
            return Err(format!("it answers, and writes to standard error{}", saying(&words)));
        }
        String::from_utf8(answer).map_err(|_| "the answer is not UTF-8".to_owned())
    }
}

/// Why what a plugin wrote is no answer.
fn wrong_end(ended: &Ended, timeout: Duration, len: usize) -> Option<String> {
    if len > ANSWER_MAX {
        return Some(format!("it answered with more than {} MiB and was killed", ANSWER_MAX >> 20));
    }
    match ended {
        Ended::Exited { code: 0, left } if left.is_empty() => None,
        Ended::Exited { code: 0, left } => Some(format!("it left processes running: {}", left.join(", "))),
        Ended::Exited { code, .. } => Some(format!("it ended with exit status {code}")),
        Ended::Signaled { number } => {
            let name = nix::sys::signal::Signal::try_from(*number).map(|signal| signal.to_string());
            Some(format!("it was killed by {}", name.unwrap_or_else(|_| format!("signal {number}"))))
        }
        Ended::TimedOut => Some(format!("it took longer than {} s and was killed", timeout.as_secs())),
        Ended::Uncontained(why) | Ended::Failed(why) => Some(why.clone()),
    }
}

/// The last lines of what a plugin wrote to standard error.
fn told(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let from = lines.len().saturating_sub(WORDS_SHOWN);
    lines[from..]
        .iter()
        .map(|line| printable(&line.chars().take(400).collect::<String>()))
        .collect::<Vec<_>>()
        .join("\n")
}

fn saying(words: &str) -> String {
    match words {
        "" => String::new(),
        words if words.contains('\n') => format!("; it says:\n{words}"),
        words => format!("; it says: {words}"),
    }
}

fn text(request: &impl serde::Serialize) -> String {
    serde_json::to_string(request).expect("texts, numbers and maps with texts as keys become JSON")
}

/// Dies with this value, and all of the plugin with it.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}
