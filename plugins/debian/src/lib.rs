//! Debian, Ubuntu and their relatives: apt and dpkg.
//!
//! Packages are downloaded in one step, which has the network and runs no package's code, and installed in another,
//! which has none. Both are the same apt command, so both find the same set. How apt behaves is told by a
//! configuration file that is there only while the steps run (`conf.rs`).

mod ask;
mod caches;
mod conf;
mod fonts;
mod hold;
mod mirror;
mod repositories;
mod security;
mod tools;
mod troubles;
mod verify;

use ask::Asks;
use oven_distro::{
    Claim, Claims, Conffiles, Distro, Expect, Job, OsRelease, Phase, Plan, Refused, Shim, Step, Upgrade,
};
use std::collections::BTreeMap;

/// The plugin. It holds nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Debian;

const APT_GET: &str = "/usr/bin/apt-get";
const APT_MARK: &str = "/usr/bin/apt-mark";
const DPKG_QUERY: &str = "/usr/bin/dpkg-query";
const SET_SELECTIONS: &str = "/usr/bin/debconf-set-selections";
const ANSWERS: &str = "/run/oven/debconf";
const STATUS: &str = "/var/lib/dpkg/status";
const LISTS: &str = "/var/lib/apt/lists";
const INITRAMFS_TOOLS: &str = "/usr/sbin/mkinitramfs";
/// Read last of what says how an initramfs is made. It is copied into that, where nothing asks for it.
const GENERIC: &str = "/etc/initramfs-tools/conf.d/zz-generic";

/// Seconds. An index is some 10 MB; Debian's whole archive of packages that a server needs, some 1 GB.
const UPDATE_TIMEOUT: u64 = 15 * 60;
const FETCH_TIMEOUT: u64 = 60 * 60;
/// A package's script that works for longer than this hangs.
const INSTALL_TIMEOUT: u64 = 60 * 60;
const CLEAN_TIMEOUT: u64 = 5 * 60;
/// apt tries each file again by itself; this is for an archive that changes while it is read.
const RETRIES: u32 = 2;

impl Distro for Debian {
    fn id(&self) -> &str {
        "debian"
    }

    fn claims(&self, os: &OsRelease) -> Claims {
        let claim = match os.id() {
            "debian" | "ubuntu" => Claim::Exact,
            _ if os.id_like().any(|id| id == "debian" || id == "ubuntu") => Claim::Family,
            _ => return Claims::default(),
        };
        let look_for = [APT_GET, APT_MARK, DPKG_QUERY, SET_SELECTIONS, INITRAMFS_TOOLS, conf::IMAGES_MAIN];
        Claims {
            claim,
            look_for: look_for.into_iter().chain(mirror::LOOK_FOR).map(str::to_owned).collect(),
            read: vec![security::IMAGES_PREFERENCES.to_owned()],
        }
    }

    fn plan(&self, job: &Job) -> Result<Plan, Refused> {
        let has = |path: &str| job.present.get(path).copied().unwrap_or(false);
        let asks = Asks::of(job)?;
        let repositories = repositories::of(job)?;
        hold::check(job)?;
        let downloads =
            job.upgrade != Upgrade::None || !asks.arguments.is_empty() || !job.repositories.is_empty();
        let changes = downloads || !job.hold.is_empty() || !job.debconf.is_empty();
        let tools = tools::tools(job, downloads);
        let needed = [
            (APT_GET, downloads || tools.is_some(), "packages cannot be installed"),
            (DPKG_QUERY, changes || tools.is_some(), "packages cannot be installed"),
            (APT_MARK, !job.hold.is_empty(), "packages cannot be held"),
            (SET_SELECTIONS, !job.debconf.is_empty(), "`debconf` cannot be answered"),
        ];
        if let Some((missing, _, what)) = needed.into_iter().find(|(path, needed, _)| *needed && !has(path)) {
            return Err(Refused(format!("{what}: the image has no {missing}")));
        }
        let mut plan = Plan { shims: vec![policy()], troubles: troubles::all(), tools, ..Plan::default() };
        if has(DPKG_QUERY) {
            plan.facts = BTreeMap::from([("packages".to_owned(), query())]);
            plan.expect = expect();
        }
        if changes || plan.tools.is_some() {
            plan.shims.extend(conf::first());
            plan.shims.push(verify::shim());
            plan.shims.push(conf::last(job, has(conf::IMAGES_MAIN)));
            plan.shims.extend(mirror::shims(job)?);
            plan.shims.extend(has(INITRAMFS_TOOLS).then(generic_initramfs));
            plan.caches = caches::all();
            plan.shims.extend(caches::shims());
            plan.shims.push(fonts::shim());
        }
        if changes {
            if has(APT_MARK) {
                plan.facts.insert("held".to_owned(), hold::query());
            }
            plan.expect.packages = hold::wanted(job, asks.wanted);
            plan.shims.extend(repositories.shims);
            plan.shims.extend(answers(&job.debconf));
            plan.shims.extend(security::pins(job));
            plan.files = repositories.files;
            plan.failures = repositories.failures;
            plan.steps = steps(job, &asks.arguments, downloads);
        }
        if has(APT_GET) {
            plan.steps.push(clean());
        }
        Ok(plan)
    }
}

/// Services are not started: `invoke-rc.d` and `deb-systemd-invoke` ask this file, if it is executable, and 101 is
/// "forbidden".
fn policy() -> Shim {
    let content = "#!/bin/sh\n# There while oven bakes: services start when an instance boots.\nexit 101\n";
    Shim { path: "/usr/sbin/policy-rc.d".into(), content: content.into(), mode: 0o755 }
}

/// With the drivers of every machine, not with those of the one that bakes. That is initramfs-tools' own default.
fn generic_initramfs() -> Shim {
    Shim { path: GENERIC.into(), content: "MODULES=most\n".into(), mode: 0o644 }
}

fn query() -> Vec<String> {
    let format = r"-f=${Package}\t${Version}\t${Architecture}\t${db:Status-Status}\t${Provides}\n";
    ["dpkg-query", "-W", format].map(str::to_owned).to_vec()
}

/// dpkg's words for a package's state. What is neither is half-installed, unpacked, half-configured or waits for a
/// trigger: what `dpkg --audit` complains of.
fn expect() -> Expect {
    let (sound, absent) = (["installed"], ["config-files", "not-installed"]);
    Expect {
        sound: sound.map(str::to_owned).to_vec(),
        absent: absent.map(str::to_owned).to_vec(),
        packages: Vec::new(),
    }
}

/// What packages ask when they are installed.
fn answers(debconf: &[String]) -> Option<Shim> {
    let content = debconf.iter().map(|line| format!("{line}\n")).collect::<String>();
    // Root's alone: an answer may be a password.
    (!debconf.is_empty()).then(|| Shim { path: ANSWERS.into(), content, mode: 0o600 })
}

fn refresh(job: &Job) -> Step {
    let mut env = environment(job.conffiles);
    env.insert("APT_CONFIG".into(), conf::UPDATE.into());
    Step {
        phase: Phase::Fetch,
        why: "refreshing the package index".into(),
        argv: ["apt-get", "update"].map(str::to_owned).to_vec(),
        env,
        retries: RETRIES,
        // A proxy's stale copy of a part of it would be asked for again, as part of what is there.
        before_retry: ["find", LISTS, "-xdev", "-type", "f", "-delete"].map(str::to_owned).to_vec(),
        network: true,
        also_good: Vec::new(),
        once: false,
        timeout: UPDATE_TIMEOUT,
    }
}

/// With an index that is new, what is kept may be what a repository no longer has.
fn hold_against_index(job: &Job) -> Step {
    Step {
        phase: Phase::Fetch,
        why: caches::HOLDING.into(),
        argv: vec![caches::HOLD.into()],
        env: environment(job.conffiles),
        retries: 0,
        before_retry: Vec::new(),
        // As every step that fetches; it needs none.
        network: true,
        also_good: Vec::new(),
        once: true,
        timeout: FETCH_TIMEOUT,
    }
}

fn steps(job: &Job, packages: &[String], downloads: bool) -> Vec<Step> {
    let environment = environment(job.conffiles);
    let step = |phase, why: &str, argv: &[&str], packages: &[String]| Step {
        phase,
        why: why.to_owned(),
        argv: argv.iter().map(|a| (*a).to_owned()).chain(packages.iter().cloned()).collect(),
        env: environment.clone(),
        retries: 0,
        before_retry: Vec::new(),
        also_good: Vec::new(),
        once: false,
        network: false,
        timeout: INSTALL_TIMEOUT,
    };
    let fetch = |why: &str, argv: &[&str], packages: &[String]| Step {
        retries: RETRIES,
        network: true,
        once: true,
        timeout: FETCH_TIMEOUT,
        ..step(Phase::Fetch, why, argv, packages)
    };
    let mut steps = Vec::new();
    if !job.debconf.is_empty() {
        let why = "answering what packages will ask";
        steps.push(step(Phase::Prepare, why, &["debconf-set-selections", ANSWERS], &[]));
    }
    // The others are there once they are installed.
    let (installed, asked) = hold::split(job);
    if !installed.is_empty() {
        steps.push(step(Phase::Prepare, "holding packages", &["apt-mark", "hold", "--"], &installed));
    }
    if downloads {
        steps.extend([refresh(job), hold_against_index(job)]);
    }
    // What an upgrade takes away is not chosen by oven: dist-upgrade is the one that brings everything up to date, a
    // kernel of a new name too.
    let (what, upgrade) = match job.upgrade {
        Upgrade::Security => ("security upgrades", security::UPGRADE),
        Upgrade::None | Upgrade::All => ("upgrades", &["dist-upgrade"][..]),
    };
    if job.upgrade != Upgrade::None {
        let argv = [&["apt-get", "--download-only"], upgrade].concat();
        steps.push(fetch(&format!("downloading {what}"), &argv, &[]));
    }
    let count = match packages.len() {
        1 => "1 package".to_owned(),
        n => format!("{n} packages"),
    };
    if !packages.is_empty() {
        // Together with the upgrade, for that is the state in which they will be installed. Not with one of security
        // alone, whose pins are not for packages that are asked for.
        let verb = if job.upgrade == Upgrade::All { "dist-upgrade" } else { "install" };
        let why = format!("downloading {count} and dependencies");
        steps.push(fetch(&why, &["apt-get", "--download-only", verb, "--"], packages));
    }
    if job.upgrade != Upgrade::None || !packages.is_empty() {
        steps.push(fetch(caches::DECOMPRESSING, &[caches::DECOMPRESS], &[]));
    }
    let change = |phase, why: &str, argv: &[&str], packages: &[String]| Step {
        network: job.network,
        ..step(phase, why, argv, packages)
    };
    // Not with --no-download: apt then does not resolve a local file's path either, and fails on it.
    if job.upgrade == Upgrade::Security {
        steps.push(step(Phase::Upgrade, security::LOOKING, security::LOOK, &[]));
    }
    if job.upgrade != Upgrade::None {
        let why =
            if job.upgrade == Upgrade::Security { "upgrading for security" } else { "upgrading packages" };
        steps.push(change(Phase::Upgrade, why, &[&["apt-get"], upgrade].concat(), &[]));
    }
    if !packages.is_empty() {
        let why = format!("installing {count}");
        steps.push(change(Phase::Install, &why, &["apt-get", "install", "--"], packages));
    }
    if !asked.is_empty() {
        steps.push(step(Phase::Install, "holding what was installed", &["apt-mark", "hold", "--"], &asked));
    }
    steps
}

fn environment(conffiles: Conffiles) -> BTreeMap<String, String> {
    // ucf keeps the configuration files that dpkg does not know.
    let ucf = match conffiles {
        Conffiles::Keep => "UCF_FORCE_CONFFOLD",
        Conffiles::Replace => "UCF_FORCE_CONFFNEW",
    };
    [
        ("APT_CONFIG", conf::FIRST),
        ("APT_LISTBUGS_FRONTEND", "none"),
        ("APT_LISTCHANGES_FRONTEND", "none"),
        ("DEBCONF_NONINTERACTIVE_SEEN", "true"),
        ("DEBIAN_FRONTEND", "noninteractive"),
        // apt's messages are read: they have to be the ones in English.
        ("LC_ALL", "C.UTF-8"),
        ("NEEDRESTART_SUSPEND", "1"),
        (ucf, "1"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// The indexes (symlinks, where a repository is a directory of the image) and the downloaded packages. Directories
/// stay, for some belong to apt's own user, and so do symlinks that stand for them.
fn clean() -> Step {
    let argv = [
        &["find", LISTS, "/var/cache/apt", "-mindepth", "1", "-xdev"][..],
        &["(", "-type", "f", "-o", "-type", "l", "!", "-xtype", "d", ")", "-delete"],
    ];
    Step {
        phase: Phase::Clean,
        why: "removing package indexes and caches".into(),
        argv: argv.concat().into_iter().map(str::to_owned).collect(),
        env: BTreeMap::new(),
        retries: 0,
        before_retry: Vec::new(),
        also_good: Vec::new(),
        once: false,
        network: false,
        timeout: CLEAN_TIMEOUT,
    }
}
