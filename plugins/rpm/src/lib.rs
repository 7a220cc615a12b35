//! The common part of the plugins for rpm: how package names are spelled, how rpm is queried, and what its messages
//! mean. Each package manager on top of rpm (dnf, zypper) has a plugin of its own.

mod packages;
mod repository;
mod troubles;

pub use packages::{PackageRequests, Spelling};
pub use repository::check as check_repository;
pub use troubles::{failures, notes, trouble, troubles};

use oven_distro::{Cache, Expect, Holds, Phase, Repository, Shim, Step, Wanted};
use std::collections::BTreeMap;

pub const RPM: &str = "/usr/bin/rpm";
pub const DRACUT: &str = "/usr/bin/dracut";

/// Seconds. An index is some 50 MB.
pub const UPDATE_TIMEOUT: u64 = 15 * 60;
pub const FETCH_TIMEOUT: u64 = 60 * 60;
/// A package's script that runs for longer than this hangs.
pub const INSTALL_TIMEOUT: u64 = 60 * 60;
pub const CLEAN_TIMEOUT: u64 = 5 * 60;
/// For a mirror that changes while it is read, or fails for a moment.
pub const RETRIES: u32 = 2;

/// Our names for states of packages, as rpm has none: an entry of its database is either an installed package or a
/// key.
const INSTALLED: &str = "installed";
const KEY: &str = "key";

/// The command that lists packages, in the columns of the fact `packages`. rpm leaves out an epoch of 0, as dpkg does.
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

/// Configures dracut, which by default only includes the drivers of the machine on which it runs. dracut reads its
/// files in the order of their names, whichever directory they are in, and the last one wins.
pub fn generic_initramfs() -> Shim {
    let path = "/etc/dracut.conf.d/zz-generic.conf";
    Shim { path: path.to_owned(), content: "hostonly=\"no\"\n".to_owned(), mode: 0o644 }
}

/// rpm's name of the job's architecture.
pub fn architecture(job: &oven_distro::Job) -> &str {
    match job.architecture.as_str() {
        "arm64" => "aarch64",
        other => other,
    }
}

/// A step without the network.
pub fn step(phase: Phase, why: &str, argv: Vec<String>) -> Step {
    // Plugins match the messages, so they have to be in English.
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

/// A step that downloads. `clean`: the command that drops the metadata which a failed attempt may have left.
pub fn fetch(why: &str, argv: Vec<String>, clean: &[String]) -> Step {
    Step {
        retries: RETRIES,
        before_retry: clean.to_vec(),
        network: true,
        timeout: FETCH_TIMEOUT,
        ..step(Phase::Fetch, why, argv)
    }
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

/// The path of a repository's key: in the image if the repository stays there, otherwise in the steps' own `/run`.
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
