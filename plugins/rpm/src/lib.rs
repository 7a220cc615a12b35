//! The common part of the plugins for rpm: the spelling of package names, queries of rpm, and explanations of its
//! messages. There is a separate plugin for each package manager that uses rpm (dnf, zypper).

mod packages;
mod repository;
mod troubles;

pub use packages::{PackageRequests, Spelling};
pub use repository::{check as check_repository, priority_line};
pub use troubles::{failures, notes, trouble, troubles};

use oven_distro::{Cache, Expect, Holds, Job, Package, Phase, Repository, Shim, Step, Wanted};
use std::collections::BTreeMap;

pub const RPM: &str = "/usr/bin/rpm";
pub const DRACUT: &str = "/usr/bin/dracut";

/// Time limits in seconds. An index has some 50 MB.
pub const UPDATE_TIMEOUT: u64 = 15 * 60;
pub const FETCH_TIMEOUT: u64 = 60 * 60;
/// A package's script that runs longer than this is assumed to hang.
pub const INSTALL_TIMEOUT: u64 = 60 * 60;
pub const CLEAN_TIMEOUT: u64 = 5 * 60;
/// Retries are for a mirror that changes while it is read, or that fails for a short time.
pub const RETRIES: u32 = 2;

/// Names for states of packages. They are oven's own, because rpm has no names for these states. An entry of rpm's
/// database is either an installed package or a key.
const INSTALLED: &str = "installed";
const KEY: &str = "key";

/// The command of the fact `packages`, whose output is stored with the image. A missing epoch is left out and not
/// printed as 0, as in the output of dpkg.
pub fn list_packages_command() -> Vec<String> {
    let format = format!(
        "%{{NAME}}\\t%|EPOCH?{{%{{EPOCH}}:}}|%{{VERSION}}-%{{RELEASE}}\\t%{{ARCH}}\\t\
         %|ARCH?{{{INSTALLED}}}:{{{KEY}}}|\\t[%{{PROVIDENAME}},]\\n"
    );
    ["rpm", "-qa", "--queryformat", &format].map(str::to_owned).to_vec()
}

pub fn expected(packages: Vec<Wanted>) -> Expect {
    Expect { sound: vec![INSTALLED.to_owned()], absent: vec![KEY.to_owned()], packages }
}

/// Configures dracut, which by default only includes the drivers of the machine on which it runs. dracut reads the
/// files of all its directories in the order of their names. The last file takes precedence, so this file's name begins
/// with `zz`.
pub fn generic_initramfs() -> Shim {
    let path = "/etc/dracut.conf.d/zz-generic.conf";
    Shim { path: path.to_owned(), content: "hostonly=\"no\"\n".to_owned(), mode: 0o644 }
}

/// rpm's name of the job's architecture.
pub fn architecture(job: &Job) -> &str {
    match job.architecture.as_str() {
        "arm64" => "aarch64",
        other => other,
    }
}

/// A step without the network.
pub fn step(phase: Phase, why: &str, argv: Vec<String>) -> Step {
    // Messages have to be in English, because they are compared with patterns.
    let env = BTreeMap::from([("LC_ALL".to_owned(), "C.UTF-8".to_owned())]);
    Step {
        phase,
        why: why.to_owned(),
        argv,
        env,
        retries: 0,
        before_retry: Vec::new(),
        network: false,
        also_good: Vec::new(),
        once: false,
        timeout: INSTALL_TIMEOUT,
    }
}

/// A step that downloads. `clean` is the command that removes metadata after a failed attempt.
pub fn fetch(why: &str, argv: Vec<String>, clean: &[String]) -> Step {
    Step {
        retries: RETRIES,
        before_retry: clean.to_vec(),
        network: true,
        timeout: FETCH_TIMEOUT,
        ..step(Phase::Fetch, why, argv)
    }
}

/// Whether the job asks for a version of a package.
pub fn names_version(job: &Job) -> bool {
    job.packages.iter().any(|package| matches!(package, Package::Named { version: Some(_), .. }))
}

/// A command that prints the versions of a package, newest first. `query` prints them in any order. `filter` is a command
/// that reads its output, and prints a version on each line.
pub fn list_versions(query: Vec<String>, filter: &str) -> Vec<String> {
    let script = format!("\"$@\" 2> /dev/null | {filter} | sort -r -V | uniq");
    ["sh", "-c", &script, "sh"].map(str::to_owned).into_iter().chain(query).collect()
}

/// The cache of a package manager that stores metadata and packages in one directory. Without sources, oven does not
/// cache the directory, and only verifies that no files remain in it.
pub fn cache(path: &str, sources: &[&str]) -> Cache {
    Cache { path: path.to_owned(), holds: Holds::Indexes, sources: words(sources.iter().copied()) }
}

/// `1 package`, `2 packages`.
pub fn count(requests: &PackageRequests) -> String {
    match requests.arguments.len() {
        1 => "1 package".to_owned(),
        n => format!("{n} packages"),
    }
}

/// The path of a repository's key. If the repository stays in the image, its key does, too. Otherwise the key exists
/// only in the `/run` of the steps.
pub fn key_file(repository: &Repository) -> String {
    let directory = if repository.keep { "/etc/pki/rpm-gpg" } else { "/run/oven/keys" };
    format!("{directory}/RPM-GPG-KEY-{}", repository.name)
}

/// The key of a repository, as a file.
pub fn key(repository: &Repository) -> Option<Shim> {
    let content = repository.key.clone()?;
    Some(Shim { path: key_file(repository), content, mode: 0o644 })
}

pub fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    words.into_iter().map(str::to_owned).collect()
}
