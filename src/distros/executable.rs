//! A plugin that is an executable. It is run in a sandbox, and its answers are validated.

use super::sandboxed_plugin;
use super::sandboxed_plugin::{PluginCall, PluginExit};
use crate::error::Kind;
use crate::text::{list_first, without_control_characters};
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

/// The time limit of a plugin. A plugin needs almost no time, but on a busy machine its interpreter may start slowly.
/// The limit is less than 10 s, because a bake has to end within 10 s after a signal.
const TIMEOUT: Duration = Duration::from_secs(8);
/// The additional time that the helper gets to end. The helper is a process of `oven` that runs the plugin (see
/// `sandboxed_plugin`).
const HELPER_TIMEOUT: Duration = Duration::from_secs(3);
/// The maximal size of an answer, in bytes. The plans of the built-in plugins have some 10 KiB.
const ANSWER_MAX: usize = 4 << 20;
/// oven keeps only the last part of standard error in memory. This is the maximal size of that part in bytes.
const STDERR_MAX: usize = 64 << 10;
/// The number of lines of a plugin's standard error that an error message shows.
const STDERR_LINES_SHOWN: usize = 10;
/// The maximal size of the helper's message, in bytes.
const MESSAGE_MAX: u64 = 1 << 20;

/// A plugin that is an executable. Its file is read into memory once, so that oven runs the same content that it
/// checked.
pub struct ExecutablePlugin {
    /// The path from which the plugin was read.
    pub path: PathBuf,
    program: Vec<u8>,
    /// The program `oven`, which runs as the helper.
    helper: PathBuf,
    timeout: Duration,
    /// The reason why the last run had no sandbox. `None` if the run had a sandbox.
    uncontained: Cell<Option<&'static str>>,
}

/// The output of a plugin.
#[derive(Debug)]
struct PluginOutput {
    answer: String,
    /// The last lines of standard error.
    words: String,
}

impl ExecutablePlugin {
    pub fn new(path: &Path, program: Vec<u8>, helper: &Path) -> Self {
        let (path, helper, uncontained) = (path.to_owned(), helper.to_owned(), Cell::new(None));
        Self { path, program, helper, timeout: TIMEOUT, uncontained }
    }

    /// The SHA-256 of the plugin's file, in hexadecimal digits.
    pub fn digest(&self) -> String {
        Sha256::digest(&self.program).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The reason why the last run had no sandbox. `None` if the run had a sandbox.
    pub fn missing_sandbox_reason(&self) -> Option<&'static str> {
        self.uncontained.get()
    }

    pub fn claims(&self, os: &OsRelease) -> Result<Claims> {
        let output = self.ask_plugin("claims", &text(&ClaimsRequest::new(os)))?;
        match ClaimsAnswer::read(&output.answer) {
            Ok(Ok(claims)) => self.ensure_valid("claims", &faults_of_claims(&claims)).map(|()| claims),
            Ok(Err(refused)) => Err(self.failure("claims", &format!("refused: {refused}"), &output.words)),
            Err(wrong) => Err(self.failure("claims", &format!("its answer {wrong}"), &output.words)),
        }
    }

    /// Asks the plugin for a plan. The inner error means that the plugin refuses the job.
    pub fn plan(&self, job: &Job) -> Result<Result<Plan, Refused>> {
        let output = self.ask_plugin("plan", &text(&PlanRequest::new(job)))?;
        match PlanAnswer::read(&output.answer) {
            Ok(Ok(plan)) => self.ensure_valid("plan", &faults_of_plan(&plan, job)).map(|()| Ok(plan)),
            Ok(Err(refused)) => Ok(Err(refused)),
            Err(wrong) => Err(self.failure("plan", &format!("its answer {wrong}"), &output.words)),
        }
    }

    fn ensure_valid(&self, verb: &str, faults: &[String]) -> Result<()> {
        const SHOWN: usize = 5;
        if faults.is_empty() {
            return Ok(());
        }
        let shown = list_first(faults, SHOWN, "; ");
        Err(self.failure(verb, &format!("its answer is invalid: {}", without_control_characters(&shown)), ""))
    }

    fn ask_plugin(&self, verb: &str, request: &str) -> Result<PluginOutput> {
        let (ended, answer, words) = self.run(verb, request).with_context(|| self.describe(verb))?;
        if let PluginExit::Uncontained(why) = &ended {
            let failure = Kind::Machine
                .failure(format!("{}: its sandbox cannot be set up: {why}", self.describe(verb)));
            return Err(failure.hint("`oven doctor` lists what this machine lacks.").into());
        }
        match find_fault(&ended, self.timeout, answer.len()) {
            None => Ok(PluginOutput {
                answer: String::from_utf8_lossy(&answer).into_owned(),
                words: stderr_summary(&words),
            }),
            Some(wrong) => Err(self.failure(verb, &wrong, &stderr_summary(&words))),
        }
    }

    fn describe(&self, verb: &str) -> String {
        format!("asking the plugin {} for its {verb}", self.path.display())
    }

    fn failure(&self, verb: &str, wrong: &str, words: &str) -> anyhow::Error {
        let message =
            format!("{}: {}{}", self.describe(verb), without_control_characters(wrong), stderr_suffix(words));
        let hint =
            format!("`oven plugin check {}` tests the plugin against the contract.", self.path.display());
        Kind::Machine.failure(message).hint(hint).into()
    }

    /// Runs the plugin in a sandbox. If oven does not run as root and the kernel does not allow a sandbox, runs the
    /// plugin without one. Returns how the plugin ended, its answer, and its standard error.
    fn run(&self, verb: &str, request: &str) -> Result<(PluginExit, Vec<u8>, Vec<u8>)> {
        let root = rustix::process::geteuid().is_root();
        if self.uncontained.get().is_none() {
            let output = self.run_helper(verb, request, true)?;
            if root || !matches!(output.0, PluginExit::Uncontained(_)) {
                return Ok(output);
            }
            self.uncontained.set(Some("the kernel does not allow namespaces to this user"));
        }
        self.run_helper(verb, request, false)
    }

    fn run_helper(
        &self,
        verb: &str,
        request: &str,
        contained: bool,
    ) -> Result<(PluginExit, Vec<u8>, Vec<u8>)> {
        let (control, theirs) = UnixStream::pair().context("creating a socket to the plugin's helper")?;
        let started = Command::new(&self.helper)
            .arg(sandboxed_plugin::VERB)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut helper = Helper(started.with_context(|| format!("starting {}", self.helper.display()))?);
        let path = std::path::absolute(&self.path).context("finding the plugin's absolute path")?;
        let message = PluginCall { path, verb: verb.to_owned(), contained, timeout: self.timeout };
        let message = serde_json::to_vec(&message)?;
        for message in [&message[..], if contained { &self.program } else { &[] }, request.as_bytes()] {
            sandboxed_plugin::send(&control, message).context("writing to the plugin's helper")?;
        }
        let deadline = Instant::now() + self.timeout + HELPER_TIMEOUT;
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
                Ok(0) => return Ok((PluginExit::TimedOut, answer, words)),
                Err(rustix::io::Errno::INTR) => continue,
                result => _ = result.context("waiting for the plugin")?,
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
                    return Ok((PluginExit::Exited { code: 0, left: Vec::new() }, answer, words));
                }
            }
            if let Some(fd) = &stderr
                && ready.next() == Some(true)
            {
                match rustix::io::read(fd, &mut buffer[..]).context("reading the plugin's standard error")? {
                    0 => stderr = None,
                    // Earlier bytes are dropped, because the last lines are the most useful.
                    len => {
                        words.extend(&buffer[..len]);
                        let more = words.len().saturating_sub(STDERR_MAX);
                        words.drain(..more);
                    }
                }
            }
        }
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        control.set_read_timeout(Some(left)).context("waiting for the plugin's helper")?;
        match sandboxed_plugin::receive(&control, MESSAGE_MAX) {
            Ok(ended) => Ok((serde_json::from_slice(&ended)?, answer, words)),
            Err(error) => Err(error).with_context(|| {
                format!(
                    "the plugin's helper ended without a result{}",
                    stderr_suffix(&stderr_summary(&words))
                )
            }),
        }
    }
}

/// The conformance suite runs a plugin in the same way as a bake. But it treats output on standard error as a fault.
impl Speaker for &ExecutablePlugin {
    fn ask(&self, verb: &str, request: &str) -> Result<String, String> {
        let (ended, answer, words) = self.run(verb, request).map_err(|error| format!("{error:#}"))?;
        let words = stderr_summary(&words);
        if let PluginExit::Uncontained(why) = &ended {
            return Err(format!("its sandbox cannot be set up: {why}"));
        }
        if let Some(wrong) = find_fault(&ended, self.timeout, answer.len()) {
            return Err(format!("{}{}", without_control_characters(&wrong), stderr_suffix(&words)));
        }
        if !words.is_empty() {
            return Err(format!("it answered, but also wrote to standard error{}", stderr_suffix(&words)));
        }
        String::from_utf8(answer).map_err(|_| "the answer is not UTF-8".to_owned())
    }
}

/// Returns the reason why a run of the plugin gave no usable answer, or `None` if it gave one.
fn find_fault(ended: &PluginExit, timeout: Duration, len: usize) -> Option<String> {
    if len > ANSWER_MAX {
        return Some(format!("it answered with more than {} MiB and was killed", ANSWER_MAX >> 20));
    }
    match ended {
        PluginExit::Exited { code: 0, left } if left.is_empty() => None,
        PluginExit::Exited { code: 0, left } => {
            Some(format!("it left processes running: {}", left.join(", ")))
        }
        PluginExit::Exited { code, .. } => Some(format!("it ended with exit status {code}")),
        PluginExit::Signaled { number } => {
            let name = nix::sys::signal::Signal::try_from(*number).map(|signal| signal.to_string());
            Some(format!("it was killed by {}", name.unwrap_or_else(|_| format!("signal {number}"))))
        }
        PluginExit::TimedOut => Some(format!("it took longer than {} s and was killed", timeout.as_secs())),
        PluginExit::Uncontained(why) | PluginExit::Failed(why) => Some(why.clone()),
    }
}

/// The last lines of a plugin's standard error.
fn stderr_summary(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let from = lines.len().saturating_sub(STDERR_LINES_SHOWN);
    lines[from..]
        .iter()
        .map(|line| without_control_characters(&line.chars().take(400).collect::<String>()).into_owned())
        .collect::<Vec<_>>()
        .join("\n")
}

fn stderr_suffix(words: &str) -> String {
    match words {
        "" => String::new(),
        words if words.contains('\n') => format!("; standard error:\n    {}", words.replace('\n', "\n    ")),
        words => format!("; standard error: {words}"),
    }
}

fn text(request: &impl serde::Serialize) -> String {
    serde_json::to_string(request).expect("texts, numbers and maps with texts as keys become JSON")
}

/// The helper's process. Dropping this value kills the helper and all processes of the plugin.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}
