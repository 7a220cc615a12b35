//! What the plugins for rpm have in common: how a definition's packages are spelt, what rpm is asked, and what its
//! words mean. The package managers above it (dnf, zypper) differ; a plugin each knows them.

mod ask;
mod repository;
mod troubles;

pub use ask::{Asks, Spelling};
pub use repository::check as check_repository;
pub use troubles::{failures, notes, trouble, troubles};

use oven_distro::{Cache, Expect, Holds, Phase, Repository, Shim, Step, Wanted};
use std::collections::BTreeMap;

pub const RPM: &str = "/usr/bin/rpm";
pub const DRACUT: &str = "/usr/bin/dracut";

/// Seconds. An index is some 50 MB.
pub const UPDATE_TIMEOUT: u64 = 15 * 60;
pub const FETCH_TIMEOUT: u64 = 60 * 60;
/// A package's script that works for longer than this hangs.
pub const INSTALL_TIMEOUT: u64 = 60 * 60;
pub const CLEAN_TIMEOUT: u64 = 5 * 60;
/// For a mirror that changes while it is read, or answers with an error for a moment.
pub const RETRIES: u32 = 2;

/// Words for a package's state. rpm has none: what is in its database is installed, or a key.
const INSTALLED: &str = "installed";
const KEY: &str = "key";

/// Lists packages, in the columns of the fact `packages`. rpm leaves an epoch of 0 out, as dpkg does.
pub fn query() -> Vec<String> {
    let format = format!(
        "%{{NAME}}\\t%|EPOCH?{{%{{EPOCH}}:}}|%{{VERSION}}-%{{RELEASE}}\\t%{{ARCH}}\\t\
         %|ARCH?{{{INSTALLED}}}:{{{KEY}}}|\\t[%{{PROVIDENAME}},]\\n"
    );
    ["rpm", "-qa", "--queryformat", &format].map(str::to_owned).to_vec()
}

pub fn expect(packages: Vec<Wanted>) -> Expect {
    Expect { sound: vec![INSTALLED.to_owned()], absent: vec![KEY.to_owned()], packages }
}

/// For dracut, which otherwise takes the drivers of the machine that it runs on. Its files are read by their names,
/// wherever they lie, and the last one wins.
pub fn generic_initramfs() -> Shim {
    let path = "/etc/dracut.conf.d/zz-generic.conf";
    Shim { path: path.to_owned(), content: "hostonly=\"no\"\n".to_owned(), mode: 0o644 }
}

/// rpm's word for an architecture.
pub fn architecture(job: &oven_distro::Job) -> &str {
    match job.architecture.as_str() {
        "arm64" => "aarch64",
        other => other,
    }
}

/// A step without the network.
pub fn step(phase: Phase, why: &str, argv: Vec<String>) -> Step {
    // Messages are read: they have to be the ones in English.
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

/// A step that downloads; `clean`: what drops the metadata that a broken try may have left.
pub fn fetch(why: &str, argv: Vec<String>, clean: &[String]) -> Step {
    Step {
        retries: RETRIES,
        before_retry: clean.to_vec(),
        network: true,
        timeout: FETCH_TIMEOUT,
        ..step(Phase::Fetch, why, argv)
    }
}

/// Where a package manager keeps what it downloads. Metadata and packages lie together there.
pub fn cache(path: &str, sources: &[&str]) -> Cache {
    Cache { path: path.to_owned(), holds: Holds::Indexes, sources: words(sources.iter().copied()) }
}

/// `1 package`, `2 packages`.
pub fn count(asks: &Asks) -> String {
    match asks.arguments.len() {
        1 => "1 package".to_owned(),
        n => format!("{n} packages"),
    }
}

/// Where a repository's key is: in the image if the repository stays there, else in the steps' own `/run`.
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
