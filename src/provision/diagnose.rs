//! Reads the output of a step, stores the last lines, and explains known errors. A distribution's plugin lists the
//! known errors. An entry of this list is called a trouble. It has a pattern for output lines, and an explanation.

use super::space::{FullFileSystem, ImageSpace, paths_in};
use crate::sandbox::spec::{DiscardMemory, FullMemory, StepExit};
use crate::sandbox::tmpfs;
use crate::text::{is_unprintable, match_wildcards};
use oven_distro::{Step, Trouble};
use std::collections::VecDeque;
use std::path::Path;

/// The number of last lines of a failed step that an error message shows.
const TAIL: usize = 20;
/// The maximum length of a line. The rest of a longer line is cut off.
const LINE_MAX: usize = 400;
/// The maximum number of matches of one trouble that an error message explains.
const MATCHES_MAX: usize = 5;

/// Parts of messages that programs print when the disk is full: the texts of the errors ENOSPC and EDQUOT, and messages
/// of dnf and rpm.
const NO_SPACE: [&str; 4] =
    ["no space left on device", "disk quota exceeded", "more space needed on the /", "more space on the /"];
/// Parts of messages that libc, curl, apt, git and node print when there is no network.
const NO_NETWORK: [&str; 8] = [
    "temporary failure in name resolution",
    "temporary failure resolving",
    "name or service not known",
    "could not resolve host",
    "unable to resolve host address",
    "network is unreachable",
    "eai_again",
    "cannot assign requested address",
];
/// Addresses and names of the metadata service in messages of programs, in lower case.
const METADATA: [&str; 4] = ["169.254.169.254", "169.254.170.2", "fd00:ec2::254", "ec2 metadata"];

const NO_PRIVILEGES: &str = "A step already runs as root, and its programs cannot gain privileges, so sudo does not work. \
                             Leave sudo out. To run a command as another user, use `runuser -u USER -- COMMAND`.";
const NO_MOUNTS: &str = "A step can neither mount file systems nor create namespaces, so programs that need this, such as \
                         dockerd, podman and systemd-nspawn, do not run in it. Let them start when an instance boots.";
const NO_ATTRIBUTES: &str =
    "A step cannot set the attributes `i` and `a` of files (chattr). Set them when an instance boots.";
const OPEN_FILES: &str =
    "A process of a step can have 65536 files open. Raise this limit in the script: `ulimit -n 524288`.";

/// Parts of messages of programs that met a limit of a step, in lower case, and a hint. All parts must be in the line.
const STEP_LIMITS: [(&[&str], &str); 13] = [
    (&["no new privileges"], NO_PRIVILEGES),
    (&["sudo", "effective uid is not 0"], NO_PRIVILEGES),
    (&["mount:", "permission denied"], NO_MOUNTS),
    (&["mount:", "operation not permitted"], NO_MOUNTS),
    (&["must be superuser to use mount"], NO_MOUNTS),
    (&["unshare", "operation not permitted"], NO_MOUNTS),
    (&["cannot connect to the docker daemon"], NO_MOUNTS),
    (&["cannot set up namespace"], NO_MOUNTS),
    (&["cannot clone: operation not permitted"], NO_MOUNTS),
    (&["error mounting", "operation not permitted"], NO_MOUNTS),
    (&["operation not permitted", "while setting flags on"], NO_ATTRIBUTES),
    (&["chattr", "operation not permitted"], NO_ATTRIBUTES),
    (&["too many open files"], OPEN_FILES),
];

/// Lines that say that a package manager makes progress. In an error message, only the last of several such lines is
/// useful.
const PROGRESS: [&str; 20] = [
    "Reading package lists...",
    "Building dependency tree...",
    "Reading state information...",
    "Reading database ...",
    "(Reading database ...",
    "Get:",
    "Hit:",
    "Ign:",
    "Selecting previously unselected package ",
    "Preparing to unpack ",
    "Unpacking ",
    "Setting up ",
    "Processing triggers for ",
    "Extracting templates from packages",
    "Preconfiguring packages",
    "Fetched ",
    "  Preparing  ",
    "  Installing  ",
    "  Running scriptlet",
    "  Verifying  ",
];

/// Returns whether a text has these words, and the first word is not the end of a longer one.
fn has_word(text: &str, words: &str) -> bool {
    let is_start = |at: usize| !text[..at].ends_with(|c: char| c.is_alphanumeric());
    text.match_indices(words).any(|(at, _)| is_start(at))
}

fn is_progress(line: &str) -> bool {
    PROGRESS.iter().any(|start| line.starts_with(start))
}

/// The output of a step so far.
pub struct Diagnoser<'a> {
    troubles: &'a [Trouble],
    tail: VecDeque<String>,
    /// The matches so far. Each match has the index of its trouble in `troubles`, and the text that each `*` of the
    /// pattern matched.
    matched: Vec<(usize, Vec<String>)>,
    pub no_space: bool,
    /// The first lines that say that no space is left.
    no_space_lines: Vec<String>,
    pub no_network: bool,
    /// Whether the step tried to reach the builder's metadata service.
    pub metadata: bool,
    /// Whether the kernel did not permit the step to open a device node.
    pub device: bool,
    /// The hint about the limit of a step that the output names first.
    pub step_limit: Option<&'static str>,
    /// The number of lines so far.
    pub lines: u64,
}

/// The plugin's explanation of a line in a step's output.
#[derive(Debug, PartialEq, Eq)]
pub struct Diagnosis {
    pub means: String,
    pub hint: Option<String>,
    /// `Some` if image.toml must be changed. The value is the package that image.toml should not list. It is empty if
    /// no single package is the cause.
    pub package: Option<String>,
}

impl<'a> Diagnoser<'a> {
    pub fn new(troubles: &'a [Trouble]) -> Self {
        let (tail, matched, no_space_lines) = (VecDeque::new(), Vec::new(), Vec::new());
        let (no_space, no_network, metadata, device) = (false, false, false, false);
        Self {
            troubles,
            tail,
            matched,
            no_space,
            no_space_lines,
            no_network,
            metadata,
            device,
            step_limit: None,
            lines: 0,
        }
    }

    pub fn line(&mut self, line: &str) {
        self.lines += 1;
        let line: String =
            line.chars().filter(|c| !is_unprintable(*c) || *c == '\t').take(LINE_MAX).collect();
        let line = line.trim_end();
        let lower = line.to_ascii_lowercase();
        if NO_SPACE.iter().any(|words| lower.contains(words)) {
            self.no_space = true;
            if self.no_space_lines.len() < TAIL {
                self.no_space_lines.push(line.to_owned());
            }
        }
        self.no_network |= NO_NETWORK.iter().any(|words| lower.contains(words));
        self.metadata |= METADATA.iter().any(|words| lower.contains(words));
        self.device |= lower.contains("/dev/") && lower.contains("operation not permitted");
        if self.step_limit.is_none() {
            let is_met = |parts: &[&str]| parts.iter().all(|part| has_word(&lower, part));
            self.step_limit = STEP_LIMITS.iter().find(|(parts, _)| is_met(parts)).map(|(_, hint)| *hint);
        }
        for (index, trouble) in self.troubles.iter().enumerate() {
            if let Some(found) = match_wildcards(&trouble.output, line) {
                let found: Vec<_> = found.into_iter().map(str::to_owned).collect();
                if self.matched.len() < 100 && !self.matched.contains(&(index, found.clone())) {
                    self.matched.push((index, found));
                }
            }
        }
        if line.is_empty() {
            return;
        }
        if is_progress(line) && self.tail.back().is_some_and(|last| is_progress(last)) {
            self.tail.pop_back();
        }
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(line.to_owned());
    }

    /// Returns the explanation of the trouble that matched the output. If several troubles matched, the first of them
    /// in the plugin's list is used. If the pattern of this trouble matched several lines, the explanation covers up to
    /// `MATCHES_MAX` of these lines.
    pub fn meaning(&self) -> Option<Diagnosis> {
        let index = self.matched.iter().map(|(index, _)| *index).min()?;
        let trouble = &self.troubles[index];
        let mut captures = self.matched.iter().filter(|(i, _)| *i == index).map(|(_, found)| found);
        let first = captures.next()?;
        let mut explanations = vec![fill(&trouble.means, first)];
        for found in captures.take(MATCHES_MAX - 1) {
            let explanation = fill(&trouble.means, found);
            // Explanations without a part of the line are equal.
            if !explanations.contains(&explanation) {
                explanations.push(explanation);
            }
        }
        let means = explanations.join("; ");
        let hint = trouble.hint.as_ref().map(|hint| fill(hint, first));
        let package = trouble.package.as_ref().map(|package| fill(package, first));
        Some(Diagnosis { means, hint, package })
    }

    /// Returns the explanations of all matches, in the order of the output.
    pub fn all(&self) -> impl Iterator<Item = Diagnosis> {
        self.matched.iter().map(|(index, found)| {
            let Trouble { means, hint, package, .. } = &self.troubles[*index];
            let fill = |text: &String| fill(text, found);
            Diagnosis {
                means: fill(means),
                hint: hint.as_ref().map(fill),
                package: package.as_ref().map(fill),
            }
        })
    }

    /// Returns the step's file system in memory that was full, or `None` if none was.
    pub fn full_memory(&self, exit: &StepExit) -> Option<FullMemory> {
        let measured = exit.full_file_systems.first().cloned();
        if measured.is_some() || !self.no_space {
            return measured;
        }
        // The command may have removed its files before it ended. The image's disk was not full if no write of the
        // command went there.
        let named: Vec<_> = self.no_space_lines.iter().flat_map(|line| paths_in(line)).collect();
        named.iter().find_map(|path| tmpfs::full_memory_of(path)).or_else(|| {
            let holds =
                |memory: &&DiscardMemory| Path::new(named.first().unwrap_or(&"/")).starts_with(&memory.path);
            let memory = exit.discarded.iter().filter(holds).max_by_key(|memory| memory.path.len());
            memory.map(|memory| memory.if_full.clone())
        })
    }

    /// Returns the file system that was full according to the output. Call this only if [`Self::no_space`] is true.
    pub fn full_file_system(&self, space: &ImageSpace) -> FullFileSystem {
        let (messages, others) = (&self.no_space_lines, &self.tail);
        space.full_by_messages(messages.iter().map(String::as_str), others.iter().map(String::as_str))
    }

    /// Returns the last lines as text to append to an error message. Each line is indented.
    pub fn tail(&self) -> String {
        self.tail.iter().map(|line| format!("\n    | {line}")).collect()
    }
}

/// Returns a short name for a step's command: the program without its directory, and at most two arguments. Settings
/// (`-o NAME=VALUE`) are not part of the name.
pub fn command_name(step: &Step) -> String {
    let mut words = step.argv.iter().map(String::as_str);
    let program = words.next().unwrap_or_default();
    let mut is_value = false;
    let words = words.filter(|word| !std::mem::replace(&mut is_value, *word == "-o") && *word != "-o");
    let program = program.rsplit('/').next().unwrap_or(program);
    std::iter::once(program)
        .chain(words.take_while(|word| *word != "--").take(2))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Replaces `{1}` with the first found text, and so on.
pub fn fill(text: &str, found: &[String]) -> String {
    let mut text = text.to_owned();
    for (index, value) in found.iter().enumerate() {
        text = text.replace(&format!("{{{}}}", index + 1), value);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::spec::ExitStatus;

    #[test]
    fn patterns() {
        assert_eq!(match_wildcards("a", "a"), Some(vec![]));
        assert_eq!(match_wildcards("a", "ab"), None);
        assert_eq!(match_wildcards("E: * '*' was", "E: Version '1.*' was"), Some(vec!["Version", "1.*"]));
        assert_eq!(match_wildcards("5:7.0.*", "5:7.0.15-1"), Some(vec!["15-1"]));
        assert_eq!(match_wildcards("*-1", "7.0-1-1"), Some(vec!["7.0-1"]));
        assert_eq!(match_wildcards("a*a", "a"), None, "the same letter does not count twice");
        assert_eq!(match_wildcards("*", ""), Some(vec![""]));
        assert_eq!(match_wildcards("*b*", "aaa"), None);
    }

    fn trouble(output: &str, means: &str) -> Trouble {
        Trouble {
            output: output.into(),
            means: means.into(),
            hint: Some("See {1}.".into()),
            package: Some("{1}".into()),
        }
    }

    #[test]
    fn the_first_trouble_is_explained_with_each_of_its_matches_once() {
        let troubles = [trouble("E: Unable to locate package *", "no package `{1}`"), trouble("E: *", "{1}")];
        let mut diagnoser = Diagnoser::new(&troubles);
        for line in
            ["Reading…", "E: general", "E: Unable to locate package a", "E: Unable to locate package b"]
        {
            diagnoser.line(line);
            diagnoser.line(line);
        }
        let meaning = diagnoser.meaning().unwrap();
        assert_eq!(meaning.means, "no package `a`; no package `b`");
        assert_eq!((meaning.hint.as_deref(), meaning.package.as_deref()), (Some("See a."), Some("a")));
        assert_eq!(Diagnoser::new(&troubles).meaning(), None);

        let troubles = [trouble("* unexpected size *", "the mirror is being updated")];
        let mut diagnoser = Diagnoser::new(&troubles);
        ["a has unexpected size (1)", "b has unexpected size (2)"]
            .iter()
            .for_each(|line| diagnoser.line(line));
        assert_eq!(diagnoser.meaning().unwrap().means, "the mirror is being updated");
    }

    #[test]
    fn all_matches_are_explained_in_their_order() {
        let troubles = [trouble("*two *", "second {2}"), trouble("one *", "first {1}")];
        let mut diagnoser = Diagnoser::new(&troubles);
        ["one a", "x two b", "one a", "nothing"].iter().for_each(|line| diagnoser.line(line));
        assert_eq!(diagnoser.all().map(|meaning| meaning.means).collect::<Vec<_>>(), ["first a", "second b"]);
    }

    #[test]
    fn the_last_lines_have_no_control_characters() {
        let mut diagnoser = Diagnoser::new(&[]);
        (0..100).for_each(|n| diagnoser.line(&format!("\x1b[31mline {n}\r")));
        diagnoser.line("");
        diagnoser.line(&"x".repeat(9999));
        let tail = diagnoser.tail();
        assert_eq!(tail.lines().count(), 21);
        assert!(tail.contains("[31mline 99") && !tail.contains('\x1b') && !tail.contains("line 80\n"));
        assert!(tail.len() < 2000);
    }

    #[test]
    fn a_full_disk_and_a_missing_network_are_recognized() {
        let mut diagnoser = Diagnoser::new(&[]);
        diagnoser.line("cp: error writing 'x': No space left on device");
        assert!(diagnoser.no_space && !diagnoser.no_network);
        diagnoser.line("curl: (6) Could not resolve host: example.org");
        assert!(diagnoser.no_network && !diagnoser.metadata);
        diagnoser.line("Failed to connect to 169.254.169.254 port 80: Operation not permitted");
        assert!(diagnoser.metadata);
    }

    #[test]
    fn the_memory_of_a_test_that_removed_its_files_is_named() {
        let memory = |path: &str, of_image: Option<&str>| DiscardMemory {
            path: path.into(),
            if_full: FullMemory {
                message: format!("memory of {path}"),
                of_image: of_image.map(str::to_owned),
            },
        };
        let status = ExitStatus::Exited(1);
        // This machine's memory limits what the test writes to the root, and the free space of /boot the rest.
        let discarded = vec![memory("/", None), memory("/boot", Some("/boot"))];
        let exit = StepExit { discarded, ..StepExit::of(status) };
        let full = |exit: &StepExit, line: &str| {
            let mut diagnoser = Diagnoser::new(&[]);
            diagnoser.line(line);
            diagnoser.full_memory(exit)
        };
        for (line, message, of_image) in [
            ("dd: error writing '/opt/x': No space left on device", "memory of /", None),
            ("cp: error writing 'x': No space left on device", "memory of /", None),
            ("cp: error writing '/boot/x': No space left on device", "memory of /boot", Some("/boot")),
            (
                "/run/oven/definition/x.sh: 2: cannot create /boot/x: No space left on device",
                "memory of /boot",
                Some("/boot"),
            ),
            ("cp: error writing '/bootable/x': No space left on device", "memory of /", None),
        ] {
            let full = full(&exit, line).unwrap();
            assert_eq!((&*full.message, full.of_image.as_deref()), (message, of_image), "{line}");
        }
        let run = full(&exit, "cp: error writing '/run/x': No space left on device").unwrap();
        assert!(run.message.starts_with("/run, which is in memory"), "{run:?}");
        assert_eq!(full(&exit, "something else"), None);
        // What a script writes is on the image's disk.
        assert_eq!(full(&StepExit::of(status), "cp: error writing 'x': No space left on device"), None);
    }

    #[test]
    fn only_the_last_line_about_progress_is_shown() {
        let mut diagnoser = Diagnoser::new(&[]);
        let output = "Reading package lists...\nGet:1 http://x y\nUnpacking a (1) ...\nSetting up a (1) ...\n\
                      a.postinst: failed\nSetting up b (1) ...\nProcessing triggers for c (2) ...\nE: the end";
        output.lines().for_each(|line| diagnoser.line(line));
        let shown: Vec<_> = diagnoser.tail.iter().map(String::as_str).collect();
        let expected =
            ["Setting up a (1) ...", "a.postinst: failed", "Processing triggers for c (2) ...", "E: the end"];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_limit_of_a_step_is_recognized() {
        for (line, hint) in [
            (
                "sudo: The \"no new privileges\" flag is set, which prevents sudo from running as root.",
                NO_PRIVILEGES,
            ),
            ("sudo: effective uid is not 0, is sudo installed setuid root?", NO_PRIVILEGES),
            ("mount: /mnt: permission denied.", NO_MOUNTS),
            ("mount: mounting tmpfs on /mnt failed: Operation not permitted", NO_MOUNTS),
            ("mount: only root can use \"--types\" option (must be superuser to use mount)", NO_MOUNTS),
            ("unshare: unshare failed: Operation not permitted", NO_MOUNTS),
            ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", NO_MOUNTS),
            ("cannot clone: Operation not permitted", NO_MOUNTS),
            ("chattr: Operation not permitted while setting flags on /etc/x", NO_ATTRIBUTES),
            ("OSError: [Errno 24] Too many open files: '/x'", OPEN_FILES),
        ] {
            let mut diagnoser = Diagnoser::new(&[]);
            diagnoser.line("starting");
            diagnoser.line(line);
            assert_eq!(diagnoser.step_limit, Some(hint), "{line}");
        }
        let mut diagnoser = Diagnoser::new(&[]);
        diagnoser.line("the amount: permission denied by policy");
        diagnoser.line("dismount: done");
        assert_eq!(diagnoser.step_limit, None);
    }
}
